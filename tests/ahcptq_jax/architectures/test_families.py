"""MobileSAM and SAM 2 through the public entry: quantized, reconstructed, saved, run, exported."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ahcptq_jax
from ahcptq_jax import METHODS, QuantConfig, ReconstructionConfig
from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.formats import stablehlo
from ahcptq_jax.formats.onnx.export import export_onnx
from ahcptq_jax.recipe import recipe_of
from ahcptq_jax.reconstruction.units import encoder_units, run_unit
from ahcptq_jax.runtime.integer import integer_model
from sam_flax import SamAutomaticMaskGenerator, SamModel, SamPredictor
from sam_flax.encoders.hiera import SAM2_TINY, Features, Sam2Config
from sam_flax.encoders.tiny_vit import MOBILE_SAM, MobileSamConfig
from sam_flax.mobile_sam import MobileSam
from sam_flax.preprocessing import prepare_image, resample
from sam_flax.sam2 import Sam2
from sam_flax.stages import EMBEDDED

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

_HEADS: dict[str, Any] = {
    "img_size": 32, "out_chans": 16, "mask_in_chans": 4, "decoder_depth": 1, "decoder_num_heads": 2,
    "decoder_mlp_dim": 16, "iou_head_hidden_dim": 8, "iou_head_depth": 2,
}  # fmt: skip
# One of each kind of stage; windows that do not divide the grid.
TINY = {
    "mobile_sam": MobileSam(
        MobileSamConfig(
            **_HEADS, patch_size=8, embed_dims=(8, 16), depths=(1, 1), num_heads=(2,), window_sizes=(3,),
            merge_strides=(2,),
        )
    ),
    "sam2": Sam2(
        Sam2Config(
            **_HEADS, patch_size=16, embed_dim=4, num_heads=1, depths=(1, 1, 1, 1), window_sizes=(4, 6, 2, 2),
            global_attn_indexes=(0,), background_size=3,
        )
    ),
}  # fmt: skip
WHOLE = {"mobile_sam": MobileSam(MOBILE_SAM), "sam2": Sam2(SAM2_TINY)}
# Ranges alone, whose statistics compile in no time; logarithmic codes of a random model's flat maps are coarse, too.
CONFIG = QuantConfig(w_bits=8, a_bits=8, prompts_per_image=2, **METHODS["minmax"])
WHOLE_METHOD = QuantConfig(w_bits=8, a_bits=8, groups=2, prompts_per_image=2)
BOXES = jnp.array([[4.0, 4, 20, 24], [8, 4, 30, 30]])
# The same as the decoder's files take them, and the size of the image whose masks they give.
CORNERS = np.asarray(BOXES, np.float32).reshape(len(BOXES), 2, 2), np.tile(np.float32([[2, 3]]), (len(BOXES), 1))
ORIGINAL = (20, 27)


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def calib() -> list[Any]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (25, 32, 3), np.uint8), [[2, 3, 20, 15], [5, 5, 30, 21]]) for _ in range(2)]


@pytest.fixture(scope="module")
def canvas(family, calib) -> jax.Array:
    return jnp.asarray(prepare_image(calib[0][0], TINY[family].config)[0][None])


@pytest.fixture(scope="module")
def params(family) -> Any:
    """Random ones, with batch norms and biases that are no identities."""
    rng = np.random.default_rng(1)

    def shaken(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        size = {"scale": 0.2, "bias": 0.1, "attention_biases": 0.5}.get(name, 0.0)
        return jnp.asarray(leaf + size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(shaken, TINY[family].init_params(jax.random.key(0)))


@pytest.fixture(scope="module")
def quantized(family, params, calib) -> ahcptq_jax.Quantized:
    return ahcptq_jax.quantize(params, calib, CONFIG, sam=TINY[family], progress=False)


def masks(model: Any, canvas: jax.Array) -> np.ndarray:
    return np.asarray(model.decode(model.encode_image(canvas), boxes=BOXES)[0])


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_every_site_of_the_published_size_has_a_rule(family):
    sam = WHOLE[family]
    architecture = architecture_of(sam)
    sites = architecture.sites(sam)
    recipe = recipe_of(architecture, QuantConfig())
    assert not recipe.unnamed(sites)
    idle = {rule.pattern for rule in recipe.idle(sites)}
    assert not idle, idle
    kernels = {path.removesuffix("/kernel") for path in architecture.shapes(sam)}
    assert {site.removesuffix("/input") for site in sites if site.endswith("/input")} <= kernels
    assert architecture.shapes(sam) == {
        path: leaf.shape for path, leaf in flatten(jax.eval_shape(sam.init_params, jax.random.key(0))).items()
    }


def test_units_have_every_quantized_layer_once(family, quantized):
    for granularity in ("part", "block"):
        found = [
            unit.prefix + path
            for unit in encoder_units(TINY[family], granularity)
            for path in unit.own({path: 0 for path in quantized.weights})
        ]
        assert sorted(found) == sorted(path for path in quantized.weights if path.startswith("image_encoder/"))


@pytest.mark.parametrize("granularity", ["part", "block"])
def test_units_in_turn_are_the_encoder(family, params, canvas, granularity):
    """Each with no parameters but its own."""
    sam, flat = TINY[family], flatten(params)
    architecture = architecture_of(sam)
    values = {EMBEDDED: architecture.embed(sam, params, canvas)}
    for unit in encoder_units(sam, granularity):
        args = tuple(values[name] for name in unit.inputs)
        values[unit.name] = run_unit(unit.operation, unflatten(unit.own(flat)), {}, {}, args)
    found = [values[name] for name in architecture.unit_outputs(sam, granularity)]
    wanted = jax.tree.leaves(SamModel(sam, params).encode_image(canvas))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_it_computes_nearly_what_it_did(family, params, quantized, canvas):
    """Both carriers to the bit; embeddings of 8-bit codes near those in floating point."""
    wanted = SamModel(TINY[family], params).encode_image(canvas)
    embedding, codes = quantized.encode_with_codes(canvas)
    for one, other in zip(jax.tree.leaves(embedding), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, other) < 0.1
    assert codes.keys() == {site for site in quantized.activations if site.startswith("image_encoder/")}
    other, others = dataclasses.replace(quantized, carrier="float32").encode_with_codes(canvas)
    for site, values in codes.items():
        np.testing.assert_array_equal(values, others[site], err_msg=site)
    jax.tree.map(np.testing.assert_array_equal, embedding, other)
    integer_model(quantized)  # every product is one of integers
    if family == "mobile_sam":
        kernels = {weight.shape[:3] for weight in quantized.weights.values()}
        assert (3, 3, 1) in kernels, "depthwise convolutions are quantized"
        assert "image_encoder/patch_embed/conv2/conv" in quantized.weights, "strided ones too"
        scale = quantized.params["image_encoder"]["merges_0"]["conv2"]["norm"]["scale"]
        assert (np.asarray(scale) == 1).all(), "batch norms are folded"


@pytest.mark.slow
def test_it_is_reconstructed_saved_and_loaded(family, params, calib, canvas, tmp_path):
    reports: list[Any] = []
    few = ReconstructionConfig(iterations=2, chunk=2)
    learned = ahcptq_jax.quantize(
        params, calib, WHOLE_METHOD, sam=TINY[family], reconstruction=few, progress=False, on_unit=reports.append
    )
    assert [r.name for r in reports if r.name.startswith("image_encoder")] == [
        unit.name for unit in encoder_units(TINY[family])
    ]
    assert all(np.isfinite([report.before, report.after]).all() for report in reports)
    ahcptq_jax.save(learned, tmp_path / "model.safetensors")
    loaded = ahcptq_jax.load(tmp_path / "model.safetensors")
    assert loaded.sam == learned.sam
    np.testing.assert_array_equal(masks(loaded, canvas), masks(learned, canvas))
    _, codes = learned.encode_with_codes(canvas)
    _, others = dataclasses.replace(learned, carrier="float32").encode_with_codes(canvas)
    jax.tree.map(np.testing.assert_array_equal, codes, others)


def test_it_is_saved_loaded_and_told(quantized, tmp_path):
    ahcptq_jax.save(quantized, tmp_path / "model.safetensors")
    loaded = ahcptq_jax.load(tmp_path / "model.safetensors")
    assert loaded.sam == quantized.sam
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ahcptq_jax.summarize(quantized).nbytes == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_predictor_and_mask_generator_take_it(quantized):
    image = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    predictor = SamPredictor(quantized)
    predictor.set_image(image)
    found, iou, low = predictor.predict(box=np.array([4, 4, 40, 40]))
    assert found.shape == (3, 48, 64) and np.isfinite(iou).all() and low.shape[0] == 3
    generator = SamAutomaticMaskGenerator(
        quantized, points_per_side=2, pred_iou_thresh=-1e9, stability_score_thresh=0, box_nms_thresh=1.0
    )
    records = generator.generate(image)
    assert records and all(record["segmentation"].shape == (48, 64) for record in records)


@pytest.mark.slow
def test_stablehlo_computes_the_same(quantized, canvas):
    encode, decode = (
        jax.export.deserialize(data)
        for data in (stablehlo.export_encoder(quantized), stablehlo.export_decoder(quantized))
    )
    embedding = encode.call(canvas)
    logits, iou = decode.call(embedding, BOXES)
    wanted = quantized.encode_image(canvas)
    for one, other in zip(jax.tree.leaves(embedding), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, other) < 0.02  # last bits differ, and codes at their boundaries
    assert np.isfinite(logits).all() and iou.shape == (2, 1)


def run_onnx(folder: Path, canvas: jax.Array, coords: np.ndarray, labels: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """The features, as our decoder takes them, and all outputs that ONNX Runtime computes of the exported files."""
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    found = encoder.run(None, {"images": np.asarray(canvas).transpose(0, 3, 1, 2)})
    features = dict(zip((output.name for output in encoder.get_outputs()), found, strict=True))
    size = 4 * found[0].shape[-1]
    feeds = {
        **features,
        "point_coords": coords,
        "point_labels": labels,
        "mask_input": np.zeros((1, 1, size, size), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(ORIGINAL, np.float32),
    }
    names = [output.name for output in decoder.get_outputs()]
    last = [jnp.asarray(feature.transpose(0, 2, 3, 1)) for feature in found]
    return Features(*last) if len(last) > 1 else last[0], dict(zip(names, decoder.run(None, feeds), strict=True))


def test_onnx_computes_the_same(family, params, quantized, canvas, tmp_path):
    """The files of a model in floating point, and of one quantized."""
    floating = SamModel(TINY[family], params)
    for model, tolerance in ((floating, 1e-4), (quantized, 0.02)):
        export_onnx(model, tmp_path)
        features, found = run_onnx(tmp_path, canvas, *CORNERS)
        wanted = model.encode_image(canvas)
        for one, other in zip(jax.tree.leaves(features), jax.tree.leaves(wanted), strict=True):
            assert one.shape == other.shape and relative_error(one, other) < tolerance
        logits, iou = model.decode(features, boxes=BOXES)
        assert relative_error(found["low_res_masks"][:, 1:], np.asarray(logits)) < tolerance
        assert relative_error(found["iou_predictions"][:, 1:], np.asarray(iou)) < tolerance
        assert found["masks"].shape == (len(BOXES), 4, *ORIGINAL)


def test_onnx_files_of_sam2_take_points_and_give_scores_and_single_masks(tmp_path):
    """Masks at the original size and the choice of a single mask, stable or not, are the predictor's."""
    sam = TINY["sam2"]
    params = sam.init_params(jax.random.key(3))
    coords = np.random.default_rng(5).uniform(0, sam.config.img_size, (12, 1, 2)).astype(np.float32)
    labels = np.ones((12, 1), np.float32)
    canvas = jnp.asarray(np.random.default_rng(6).normal(size=(1, 32, 32, 3)), jnp.float32)
    export_onnx(SamModel(sam, params), tmp_path / "all")
    features, every = run_onnx(tmp_path / "all", canvas, coords, labels)
    points = jnp.asarray(coords), jnp.asarray(labels, jnp.int32)
    scores = sam.apply({"params": params}, features, points, method="object_scores")
    np.testing.assert_allclose(every["object_score_logits"], scores, rtol=1e-4, atol=1e-4)

    # With this threshold half of the single masks are stable.
    delta, first = sam.config.stability_delta, every["low_res_masks"][:, 0]
    middle = np.median((first > delta).sum((1, 2)) / np.maximum((first > -delta).sum((1, 2)), 1))
    chosen = SamModel(Sam2(dataclasses.replace(sam.config, stability_threshold=float(middle))), params)
    export_onnx(chosen, tmp_path / "one", single_mask=True)
    _, one = run_onnx(tmp_path / "one", canvas, coords, labels)
    logits, iou = chosen.decode(features, points, multimask_output=False)
    np.testing.assert_allclose(one["low_res_masks"], np.clip(logits, -32, 32), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one["iou_predictions"], iou, rtol=1e-4)
    firsts = (one["iou_predictions"][:, 0] == every["iou_predictions"][:, 0]).sum()
    assert 0 < firsts < len(coords), "both choices occur"
    full = resample(np.asarray(logits, np.float32), (*logits.shape[:2], *ORIGINAL))
    np.testing.assert_allclose(one["masks"], full, rtol=1e-3, atol=1e-3)
