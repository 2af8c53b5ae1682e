"""A quantizer kind of one's own, in this one file, through calibration, reconstruction, file and inference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import ahcptq_jax
from ahcptq_jax import QuantConfig, ReconstructionConfig
from ahcptq_jax.quantizers import base, kinds
from ahcptq_jax.quantizers.cost import Cost
from ahcptq_jax.quantizers.kinds import Kind, Levels, Statistic
from ahcptq_jax.rules import Rule
from sam_flax import Sam, SamPredictor
from sam_flax.errors import InputError

# ------------------------------------------------------------------------------------------------- the new kind


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["bits", "grid_bits"])
@dataclasses.dataclass(frozen=True)
class Cubic:
    """Values that crowd around zero: cubes of evenly spaced numbers from -1 to 1, times a scale."""

    scale: Any
    bits: int
    grid_bits: int = 0

    def validate(self, channels=None):
        del channels
        base.check_bits(self.bits)
        base.check_positive("scale", self.scale)
        return self

    def cubes(self):
        cubes = jnp.linspace(-1.0, 1.0, 2**self.bits) ** 3
        top = 2.0 ** (self.grid_bits - 1) - 1
        return jnp.round(top * cubes) / top if self.grid_bits else cubes

    def encode(self, x):
        root = jnp.cbrt(jnp.clip(jnp.asarray(x, jnp.float32) / self.scale, -1.0, 1.0))
        return jnp.round((root + 1) / 2 * (2**self.bits - 1)).astype(jnp.int32)

    def decode(self, codes):
        return self.scale * self.cubes()[jnp.asarray(codes).astype(jnp.int32)]

    def fake_quant(self, x):
        shape = jax.lax.stop_gradient(self.decode(self.encode(x)) / self.scale)
        return base.straight_through(x + self.scale * shape, self.scale * shape).astype(x.dtype)

    def with_gradient_scale(self, x_shape):
        return dataclasses.replace(self, scale=base.scale_gradient(jnp.asarray(self.scale), np.prod(x_shape) ** -0.5))


def levels(quantizer):
    bits = quantizer.grid_bits or 8
    step = jnp.asarray(quantizer.scale, jnp.float32) / (2 ** (bits - 1) - 1)
    table = jnp.round(dataclasses.replace(quantizer, grid_bits=bits).cubes() * (2 ** (bits - 1) - 1))
    return Levels(step, jnp.float32(0), table.astype(jnp.int32))


CUBIC = kinds.register(
    Kind(
        name="cubic",
        quantizer=Cubic,
        fields=("scale",),
        static_fields=("grid_bits",),
        statistic=Statistic(
            init=lambda shape, bits, settings: jnp.float32(0),
            of_batch=lambda before, observed, bits, settings: jnp.abs(observed.values(0)).max(),
            merge=jnp.maximum,
            finalize=lambda states, bits, settings: {path: Cubic(state, bits) for path, state in states.items()},
            depends_on=lambda settings, attention: (),
        ),
        learned=("scale",),
        on_grid=lambda quantizer, grid_bits: dataclasses.replace(quantizer, grid_bits=grid_bits),
        levels=levels,
        describe=lambda quantizer: f"cubes up to {float(quantizer.scale):.3g}",
        cost=Cost(codes=0),
    )
)

# -------------------------------------------------------------------------------------------------- its way through

LIN1, SOFTMAX = r"image_encoder/blocks_\d+/mlp/lin1/input", r"image_encoder/blocks_0/attn/softmax"
CONFIG = QuantConfig(
    rules=(Rule(LIN1, kind="cubic", a_bits=5), Rule(SOFTMAX, kind="cubic")), prompts_per_image=2, weight_search=False
)
LEARNING = ReconstructionConfig(iterations=4, parts=("encoder_mlp",))


@pytest.fixture(scope="module")
def calib():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (100, 120, 3), dtype=np.uint8) for _ in range(2)]


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow, id="off"), pytest.param(8, id="grid8")])
def quantized(request, sam_tiny, calib):
    config, params = sam_tiny
    settings = dataclasses.replace(CONFIG, grid_bits=request.param)
    return ahcptq_jax.quantize(params, calib, settings, sam=Sam(config), reconstruction=LEARNING, progress=False)


def test_it_is_calibrated_and_learned(quantized):
    own = {path: q for path, q in quantized.activations.items() if isinstance(q, Cubic)}
    assert len(own) == 5
    assert {q.bits for path, q in own.items() if "lin1" in path} == {5} and {q.bits for q in own.values()} == {4, 5}
    assert {q.grid_bits for q in own.values()} == {quantized.quant_config.grid_bits}
    for path, quantizer in own.items():
        quantizer.validate()
        assert kinds.kind_of(quantizer) is CUBIC, path


def test_it_is_saved_loaded_described_and_run(quantized, calib, tmp_path):
    quantized.save(tmp_path / "model")
    loaded = ahcptq_jax.load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, loaded, quantized)
    rows = {row.name: row for row in quantized.summary().rows}
    row = rows["image_encoder/blocks_0/mlp/lin1"]
    assert (row.kind, row.a_bits) == ("cubic", 5) and row.detail.startswith("cubes up to")
    predictor = SamPredictor(loaded)
    predictor.set_image(calib[0])
    masks, scores, _ = predictor.predict(box=np.array([10, 12, 50, 60]))
    assert masks.shape[1:] == (100, 120) and np.isfinite(scores).all()
    codes = loaded.encode_with_codes(jnp.zeros((1, *(loaded.config.img_size,) * 2, 3)))[1]
    assert codes["image_encoder/blocks_0/mlp/lin1/input"].max() < 32


def test_its_levels_are_its_values_on_the_grid(quantized):
    for quantizer in quantized.activations.values():
        kind = kinds.kind_of(quantizer)
        if kind is CUBIC:
            on_grid, codes = kind.on_grid(quantizer, 8), jnp.arange(2**quantizer.bits)
            np.testing.assert_allclose(kind.levels(on_grid).decode(codes), on_grid.decode(codes), rtol=1e-6, atol=1e-6)


def test_what_is_not_registered_is_refused(quantized, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'quartic' is unknown; use one of uniform, grouped"):
        kinds.kind_named("quartic")
    with monkeypatch.context() as unchecked, pytest.raises(ValueError, match="no registered quantizer kind"):
        unchecked.setattr(jaxtyping.config, "jaxtyping_disable", True)
        kinds.kind_of(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="disagree about the field 'zero'"):
        kinds.register(dataclasses.replace(CUBIC, fields=("scale", "zero")))
    with pytest.raises(ValueError, match="registered kind 'uniform'"):
        kinds.register(dataclasses.replace(CUBIC, name="uniform"))
    quantized.save(tmp_path / "model")
    # A process that does not know the kind.
    monkeypatch.delitem(kinds.registry._KINDS, "cubic")
    with pytest.raises(InputError, match="of the unknown kind cubic; register it"):
        ahcptq_jax.load(tmp_path / "model")


def test_a_rule_with_an_unknown_kind_is_refused_before_the_work(sam_tiny, calib):
    config, params = sam_tiny
    with pytest.raises(InputError, match="'quartic' is unknown"):
        ahcptq_jax.quantize(params, calib, QuantConfig(rules=(Rule(LIN1, kind="quartic"),)), sam=Sam(config))
