"""A new model in one file: a segmenter whose encoder has two branches and a neck that takes two stages' outputs.

It is quantized, reconstructed and run through the public entry, so that nothing outside its own file can depend on the
ViT; and an objective of its own runs prompts through the rest of the model.
"""

import dataclasses
import json
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ahcptq_jax
from ahcptq_jax import METHODS, QuantConfig, ReconstructionConfig, Rule
from ahcptq_jax.architectures import base
from ahcptq_jax.architectures.base import Architecture, Operation, Unit, architecture_of
from ahcptq_jax.architectures.sites import flatten
from ahcptq_jax.quantizers import Grouped
from ahcptq_jax.reconstruction import objectives
from ahcptq_jax.reconstruction.objectives import Objective, Place
from sam_flax.errors import InputError
from sam_flax.heads.mask_decoder import Attention
from sam_flax.layers import Conv, Linear, MLPBlock, PatchConv
from sam_flax.sam import call
from sam_flax.stages import EMBEDDED, Stage, StageGraph

# --- The model --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """Hashable, as every configuration is."""

    img_size: int = 32
    width: int = 16
    heads: int = 2
    pixel_mean: tuple[float, float, float] = (120.0, 120.0, 120.0)
    pixel_std: tuple[float, float, float] = (60.0, 60.0, 60.0)
    mask_threshold: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Coarse(nn.Module):
    """Half the resolution: (B, H, W, C) -> (B, H/2, W/2, C)."""

    width: int

    def setup(self) -> None:
        self.conv = Conv(self.width, self.width, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        return self.conv(nn.relu(x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))))


class Side(nn.Module):
    """The other branch, at full resolution: (B, H, W, C) -> (B, H, W, C)."""

    width: int

    def setup(self) -> None:
        self.conv = Conv(self.width, self.width, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Neck(nn.Module):
    """Two levels to one: (B, H, W, C) and (B, H/2, W/2, C) -> (B, H, W, C)."""

    width: int

    def setup(self) -> None:
        self.fine, self.coarse = Conv(self.width, self.width, 1), Conv(self.width, self.width, 1)

    def __call__(self, fine: jax.Array, coarse: jax.Array) -> jax.Array:
        return self.fine(fine) + self.coarse(coarse).repeat(2, axis=1).repeat(2, axis=2)


class Pyramid(nn.Module):
    """The segmenter. Its embedding is a pair: the neck's output and that of the branch at full resolution."""

    config: PyramidConfig

    def setup(self) -> None:
        width = self.config.width
        self.stem = PatchConv(3, width, 4)
        self.main, self.side = MLPBlock(width, 2 * width), Side(width)
        self.coarse, self.neck = Coarse(width), Neck(width)
        self.prompt = Linear(4, width)
        self.attend, self.score = Attention(width, self.config.heads), Linear(width, 1)

    def encode_image(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.stem(images)
        main, side = self.main(x), self.side(x)
        return self.neck(side, self.coarse(main)), main

    def decode(
        self, embedding: Any, points: Any = None, boxes: Any = None, masks: Any = None, multimask_output: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Logits (N, 1, H, W) and scores (N, 1) of boxes (N, 4)."""
        del points, masks, multimask_output
        low, high = embedding
        tokens = self.prompt(boxes / self.config.img_size)[:, None]  # (N, 1, C)
        image = jnp.broadcast_to(low.reshape(1, -1, low.shape[-1]), (len(boxes), low[0, ..., 0].size, low.shape[-1]))
        tokens = tokens + self.attend(tokens, image, image)
        return jnp.einsum("nc,hwc->nhw", tokens[:, 0], high[0])[:, None], self.score(tokens[:, 0])

    def __call__(self, images: jax.Array, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.decode(self.encode_image(images), boxes=boxes)

    def init_params(self, key: jax.Array) -> Any:
        size = self.config.img_size
        return self.init(key, jnp.zeros((1, size, size, 3)), jnp.ones((1, 4)))["params"]


# --- Its file in `architectures` --------------------------------------------------------------------------------------


class PyramidArchitecture(Architecture):
    name = "pyramid"
    parts = ("stem", "main", "side", "coarse", "neck", "prompt", "attend", "score")
    decoder_parts = ("prompt", "attend", "score")
    rules = (
        Rule("main/lin1/input", "grouped"),
        Rule("main/lin2/input", "hybrid"),
        Rule("(side/conv|coarse/conv|neck/fine|neck/coarse)/input", "uniform"),
        Rule("attend/[qkv]_proj/input", "grouped"),
        Rule("attend/([qkv]|out_proj/input)", "uniform"),
        Rule("attend/softmax", "log2"),
        Rule("(prompt|score)/input", "float"),
    )

    def fits(self, sam: Any) -> bool:
        return isinstance(sam, Pyramid)

    def module(self, config: Any) -> Pyramid | None:
        return Pyramid(config) if isinstance(config, PyramidConfig) else None

    def parse_config(self, text: str, source: str) -> PyramidConfig:
        values = json.loads(text)
        return PyramidConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def stages(self, sam: Pyramid) -> StageGraph:
        width = sam.config.width
        stages = (
            Stage("main", "main/", MLPBlock(width, 2 * width, parent=None), (EMBEDDED,)),
            Stage("coarse", "coarse/", Coarse(width, parent=None), ("main",)),
            Stage("side", "side/", Side(width, parent=None), (EMBEDDED,)),
            Stage("neck", "neck/", Neck(width, parent=None), ("side", "coarse")),
        )
        return StageGraph(stages, ("neck", "main"))

    def embed(self, sam: Pyramid, params: Any, images: jax.Array) -> jax.Array:
        return call(PatchConv(3, sam.config.width, 4, parent=None), params["stem"], images)

    def encoder_units(self, sam: Pyramid, granularity: str = "part") -> list[Unit]:
        return [
            Unit(
                s.key, s.prefix, (), Operation(s.module), "neck" if s.key == "neck" else "encoder_mlp", inputs=s.inputs
            )
            for s in self.stages(sam).stages
        ]

    def unit_outputs(self, sam: Pyramid, granularity: str = "part") -> tuple[str, ...]:
        return self.stages(sam).outputs

    def decoder_units(self, sam: Pyramid) -> list[Unit]:
        attention = Attention(sam.config.width, sam.config.heads, parent=None)
        return [Unit("attend", "attend/", (), Operation(attention), "decoder_attention")]


@dataclasses.dataclass(frozen=True)
class MaskError:
    """An objective that needs the prompts: the neck's output, run through the decoder to the masks."""

    sam: Pyramid

    def __call__(self, output: jax.Array, target: jax.Array, context: tuple[jax.Array, ...], shared: Any) -> jax.Array:
        (boxes,) = context
        high = jnp.ones_like(output)
        logits, _ = call(self.sam, shared, (output, high), boxes=boxes, method="decode")
        wanted, _ = call(self.sam, shared, (target, high), boxes=boxes, method="decode")
        return jnp.mean(jnp.square(logits - wanted)) + 0.1 * jnp.mean(jnp.square(output - target))


def mask_error(place: Place, power: float) -> Objective:
    if place.unit.part != "neck":
        return objectives.objective_named("local")(place, power)
    return Objective(MaskError(place.sam), (np.stack(place.boxes),), place.architecture.decoder(place.params))


# --- Tests ------------------------------------------------------------------------------------------------------------

CONFIG = QuantConfig(w_bits=8, a_bits=8, groups=2, prompts_per_image=3)
BOXES = jnp.array([[4.0, 4, 20, 24], [8, 2, 30, 30]])
FEW = ReconstructionConfig(iterations=6, chunk=3)


@pytest.fixture(scope="module")
def pyramid():
    """The model and its parameters."""
    sam = Pyramid(PyramidConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base._ARCHITECTURES, "pyramid", PyramidArchitecture())
        patch.setitem(objectives._OBJECTIVES, "masks", mask_error)
        yield sam, sam.init_params(jax.random.key(0))


@pytest.fixture(scope="module")
def calib():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (40, 32, 3), np.uint8), [[2, 3, 20, 30], [5, 5, 30, 22]]) for _ in range(3)]


@pytest.fixture(scope="module")
def learned(pyramid, calib):
    sam, params = pyramid
    reports: list[Any] = []
    return ahcptq_jax.quantize(
        params, calib, CONFIG, sam=sam, reconstruction=FEW, progress=False, on_unit=reports.append
    ), reports


def masks(model: Any, canvas: jax.Array) -> np.ndarray:
    return np.asarray(model.decode(model.encode_image(canvas), boxes=BOXES)[0])


def float_masks(sam: Pyramid, params: Any, canvas: jax.Array) -> np.ndarray:
    return np.asarray(call(sam, params, canvas, BOXES)[0])


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def canvas():
    return jnp.asarray(0.5 * np.random.default_rng(5).normal(size=(1, 32, 32, 3)), jnp.float32)


def test_its_sites_are_found(pyramid):
    sites = architecture_of(pyramid[0]).sites(pyramid[0])
    layers = ("main/lin1", "main/lin2", "side/conv", "coarse/conv", "neck/fine", "neck/coarse", "prompt", "score")
    attention = [f"attend/{name}_proj/input" for name in ("q", "k", "v", "out")] + [f"attend/{n}" for n in "qkv"]
    assert set(sites) == {f"{layer}/input" for layer in layers} | {*attention, "attend/softmax"}
    assert sites["attend/softmax"] is None and sites["main/lin2/input"] == 32 and sites["attend/q"] == 8


def test_it_is_quantized_and_runs(pyramid, calib, canvas):
    sam, params = pyramid
    wanted = float_masks(sam, params, canvas)
    errors = {}
    # Uniform codes are fine at 8 bits; logarithmic ones of a random model's flat attention maps are not.
    for bits, method in ((8, "minmax"), (4, "minmax"), (8, "ahcptq")):
        config = dataclasses.replace(CONFIG, w_bits=bits, a_bits=bits, **METHODS[method])
        quantized = ahcptq_jax.quantize(params, calib, config, sam=sam, progress=False)
        errors[bits, method] = relative_error(masks(quantized, canvas), wanted)
        assert set(quantized.weights) == {
            *("main/lin1", "main/lin2", "side/conv", "coarse/conv", "neck/fine", "neck/coarse"),
            *(f"attend/{name}_proj" for name in ("q", "k", "v", "out")),
        }
    assert errors[8, "minmax"] < 0.05 and errors[8, "minmax"] < errors[4, "minmax"] < 0.6, errors
    assert errors[8, "ahcptq"] < 0.5, errors


@pytest.mark.slow
def test_it_is_reconstructed(learned, pyramid, canvas):
    quantized, reports = learned
    assert [report.name for report in reports] == ["main", "coarse", "side", "neck", "attend"]
    assert all(np.isfinite([report.before, report.after]).all() for report in reports)
    assert {q.scale.shape for q in quantized.activations.values() if isinstance(q, Grouped)} == {(2,)}
    assert relative_error(masks(quantized, canvas), float_masks(*pyramid, canvas)) < 0.5


def test_it_is_saved_loaded_and_summarized(pyramid, calib, canvas, tmp_path):
    sam, params = pyramid
    quantized = ahcptq_jax.quantize(params, calib, CONFIG, sam=sam, progress=False)
    ahcptq_jax.save(quantized, tmp_path / "pyramid.safetensors")
    loaded = ahcptq_jax.load(tmp_path / "pyramid.safetensors")
    assert loaded.sam == quantized.sam and loaded.quant_config == CONFIG
    np.testing.assert_array_equal(masks(loaded, canvas), masks(quantized, canvas))
    summary = ahcptq_jax.summarize(quantized)
    assert summary.nbytes == (tmp_path / "pyramid.safetensors").stat().st_size
    assert {"main/lin1", "attend/softmax"} <= {row.name for row in summary.rows}


@pytest.mark.slow
def test_an_objective_may_need_the_prompts(pyramid, calib):
    sam, params = pyramid
    few = dataclasses.replace(FEW, objective="masks", parts=("neck",))
    found, local = (
        ahcptq_jax.quantize(params, calib, CONFIG, sam=sam, reconstruction=settings, progress=False)
        for settings in (few, dataclasses.replace(few, objective="local"))
    )
    changed = [site for site in found.activations if not _same(found.activations[site], local.activations[site])]
    assert changed and all(site.startswith("neck/") for site in changed)
    with pytest.raises(InputError, match="objective='masks of all' is unknown; choose one of local, masks"):
        unknown = dataclasses.replace(FEW, objective="masks of all")
        ahcptq_jax.quantize(params, calib, CONFIG, sam=sam, reconstruction=unknown, progress=False)


def _same(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_another_models_parameters_are_refused(pyramid, calib):
    sam, params = pyramid
    flat = flatten(params)
    wrong = {k: v for k, v in params.items() if k != "score"}
    with pytest.raises(InputError, match="params must be the nested parameters"):
        ahcptq_jax.quantize(wrong, calib, sam=sam)
    shapes = jax.eval_shape(Pyramid(PyramidConfig(width=8)).init_params, jax.random.key(0))
    other = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    with pytest.raises(InputError, match="params do not fit sam: the shape of .* is .*, and .* in sam"):
        ahcptq_jax.quantize(other, calib, sam=sam)
    assert flat.keys() == flatten(other).keys()


def test_a_model_that_no_rule_matches_is_refused_and_forgotten_sites_are_told(pyramid, calib, monkeypatch, caplog):
    sam, params = pyramid
    monkeypatch.setattr(PyramidArchitecture, "rules", (Rule("nothing/of/this", "uniform"),))
    with pytest.raises(InputError, match="No rule quantizes any of the model's 16 sites"):
        ahcptq_jax.quantize(params, calib, CONFIG, sam=sam, progress=False)
    caplog.clear()
    monkeypatch.setattr(PyramidArchitecture, "rules", (Rule("side/conv/input", "uniform"),))
    with caplog.at_level(logging.WARNING):
        quantized = ahcptq_jax.quantize(params, calib, CONFIG, sam=sam, progress=False)
    assert set(quantized.weights) == {"side/conv"}
    assert "15 sites that no rule names stay in floating point: " in caplog.text


def test_a_module_of_no_architecture_is_refused(pyramid, calib):
    with pytest.raises(InputError, match="sam is a Coarse and of no known architecture"):
        architecture_of(Coarse(8))
