"""What the report shows of layers: right layers, right values, right codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import QuantConfig
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.quantizers import Grouped, Hybrid, Uniform
from ahcptq_jax.runtime.quantized import Quantized
from experiments.report import GroupPanel, HybridPanel, panels
from sam_flax import preprocessing
from sam_flax.sam import Sam, SamModel

LIN2 = "image_encoder/blocks_{}/mlp/lin2/input"
QKV = "image_encoder/blocks_{}/attn/qkv/input"


def quantizers(config):
    """One hybrid and one grouped site in every block, without any calibration."""
    hidden = Hybrid.from_range(-0.2, 4.0, 0.3, 0.25, 4)
    rng = np.random.default_rng(0)
    found = {}
    for i in range(config.depth):
        groups = jnp.asarray(rng.integers(0, 3, config.embed_dim), jnp.int32)
        found[LIN2.format(i)] = hidden
        found[QKV.format(i)] = Grouped(jnp.array([0.1, 0.2, 0.5]), jnp.array([8.0, 3.0, 15.0]), groups, 4)
        found[f"image_encoder/blocks_{i}/attn/q"] = Uniform(jnp.float32(0.1), jnp.float32(8), 4)
    found["mask_decoder/transformer/layers_0/mlp/lin2/input"] = hidden
    return found


@pytest.fixture(scope="module")
def model(sam_tiny):
    config, params = sam_tiny
    return SamModel(Sam(config), params)


@pytest.fixture(scope="module")
def shown(model):
    quantized = Quantized(model.params, {}, quantizers(model.config), model.sam, QuantConfig())
    rng = np.random.default_rng(1)
    calib = [(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8), np.array([[5.0, 5, 30, 30]])) for _ in range(3)]
    return quantized, calib, panels.layer_panels(quantized, model, calib, images=2)


def test_first_and_last_layers_of_both_kinds(shown, model):
    last = model.config.depth - 1
    assert [(type(p), p.name) for p in shown[2]] == [
        (HybridPanel, LIN2.format(0)),
        (HybridPanel, LIN2.format(last)),
        (GroupPanel, QKV.format(0)),
        (GroupPanel, QKV.format(last)),
    ]


def test_values_are_the_float_models_on_the_first_images(shown, model):
    quantized, calib, found = shown
    wanted = {panel.name: [] for panel in found}

    @jax.jit
    def run(canvas):
        seen = {}

        def note(path, value):
            if path in wanted:
                seen[path] = value
            return value

        with intercept_sites(note):
            model.sam.apply({"params": model.params}, canvas, method="encode_image")
        return seen

    for image, _ in calib[:2]:
        canvas, _ = preprocessing.prepare_image(image, model.config)
        for path, value in run(jnp.asarray(canvas[None])).items():
            wanted[path].append(np.asarray(value).reshape(-1, value.shape[-1]))
    for panel in found:
        values = np.concatenate(wanted[panel.name])
        quantizer = quantized.activations[panel.name]
        if isinstance(panel, HybridPanel):
            assert panel.counts.sum() == values.size and len(panel.edges) == len(panel.counts) + 1
            np.testing.assert_allclose(panel.edges[[0, -1]], [values.min(), values.max()], rtol=1e-4, atol=1e-4)
            assert len(panel.codes) == 16
            np.testing.assert_allclose(panel.breakpoint, -0.2 + 0.3 * 4.0, rtol=1e-6)
            assert panel.breakpoint in panel.codes
        else:
            np.testing.assert_allclose(panel.channel_min, values.min(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(panel.channel_max, values.max(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(panel.groups, quantizer.groups)
            # The least and the greatest value that each group's codes reach.
            labels = np.asarray(quantizer.groups)
            codes = np.repeat(np.arange(16)[:, None], len(labels), 1)
            values = np.asarray(quantizer.decode(codes))
            np.testing.assert_allclose(panel.group_min[labels], values.min(0), rtol=1e-6)
            np.testing.assert_allclose(panel.group_max[labels], values.max(0), rtol=1e-6)


def test_blocks_are_ordered_by_number(model):
    sites = {LIN2.format(i): quantizers(model.config)[LIN2.format(0)] for i in (0, 1, 2, 10, 11, 9)}
    quantized = Quantized({}, {}, sites, model.sam, QuantConfig())
    assert panels._spread(quantized, "hybrid", 2) == [LIN2.format(0), LIN2.format(11)]
    assert panels._spread(quantized, "hybrid", 3) == [LIN2.format(0), LIN2.format(2), LIN2.format(11)]
    assert panels._spread(quantized, "hybrid", 1) == [LIN2.format(0)]


def test_a_model_without_such_layers_has_no_panels(model):
    quantized = Quantized({}, {}, {}, model.sam, QuantConfig())
    assert panels.layer_panels(quantized, model, []) == []


def test_products_are_in_full_float32_whatever_the_default_is(shown, model, monkeypatch):
    seen = []
    activations = panels._activations

    def noting(*arguments):
        seen.append(jax.config.jax_default_matmul_precision)
        return activations(*arguments)

    monkeypatch.setattr(panels, "_activations", noting)
    quantized, calib, _ = shown
    with jax.default_matmul_precision("bfloat16"):
        panels.layer_panels(quantized, model, calib, images=1)
    assert seen == ["float32"]
