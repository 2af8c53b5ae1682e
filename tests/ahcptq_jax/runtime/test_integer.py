"""Integer inference: equal in both carriers at every site, in widths that are proven to suffice."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import QuantConfig
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.runtime import integer, quantized
from ahcptq_jax.runtime.integer import integer_model, width_table, widths
from ahcptq_jax.runtime.products import CARRIERS
from ahcptq_jax.runtime.quantized import QuantizedWeight
from ahcptq_jax.runtime.quantized_layers import intercept_quantized
from sam_flax import MINI_SCENES as MINI
from sam_flax import VIT_B, VIT_H, VIT_L, SamPredictor
from sam_flax.encoders import vit
from sam_flax.encoders.vit import Block
from sam_flax.layers import Conv, Linear, conv_same
from sam_flax.sam import call
from sam_flax.segmenter import random_like

BOXES = jnp.asarray([[10.0, 12, 70, 80], [30, 5, 90, 100]])


def picture(config, seed=7):
    size = config.img_size
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, (1, size, size, 3)).astype(np.float32))


def test_every_code_and_every_logit_is_equal(tiny_quantized):
    whole = integer_model(tiny_quantized)
    tiny_quantized = dataclasses.replace(tiny_quantized, carrier="float32")
    image = picture(tiny_quantized.config)
    embeddings, codes = tiny_quantized.encode_with_codes(image)
    integer_embeddings, integer_codes = whole.encode_with_codes(image)
    np.testing.assert_array_equal(embeddings, integer_embeddings)
    outputs, more = tiny_quantized.decode_with_codes(embeddings, None, BOXES, None, False)
    integer_outputs, integer_more = whole.decode_with_codes(embeddings, None, BOXES, None, False)
    jax.tree.map(np.testing.assert_array_equal, outputs, integer_outputs)
    codes, integer_codes = codes | more, integer_codes | integer_more
    assert set(codes) == set(integer_codes) == set(tiny_quantized.activations)
    for site, value in codes.items():
        assert value.dtype == np.uint8 and 0 < value.max() < 16
        np.testing.assert_array_equal(value, integer_codes[site], err_msg=site)
    # Without the codes other programs are compiled, with the same results.
    np.testing.assert_array_equal(tiny_quantized.encode_image(image), whole.encode_image(image))


def test_every_layer_is_its_fake_quantized_self_on_equal_inputs(tiny_quantized):
    """The modules on decoded weights with quantized sites, given the inputs that occur: 1e-5 of the largest output."""
    image = picture(tiny_quantized.config)
    seen, given, product_of = {}, {}, {Linear: "product", Conv: "__call__"}

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if path in tiny_quantized.weights and context.method_name == product_of[type(context.module)]:
            given[path], seen[path] = args[0], y
        return y

    params = tiny_quantized.float_params()
    weights, activations = tiny_quantized.weights, tiny_quantized.activations

    @jax.jit
    def run():
        with nn.intercept_methods(watch), intercept_quantized(weights, activations, 8, "int8", None):
            call(tiny_quantized.sam, params, image, None, BOXES[:1], None, False)
        return given, seen

    inputs, outputs = run()
    assert set(inputs) == set(weights)
    flat = flatten(params)
    for path, x in inputs.items():
        kernel, quantizer = flat[f"{path}/kernel"], activations[f"{path}/input"]
        layer = conv_same if kernel.ndim == 4 else jnp.matmul
        wanted = layer(quantizer.fake_quant(x), kernel)
        error = float(jnp.abs(outputs[path] - wanted).max() / jnp.abs(wanted).max())
        assert error < 1e-5, (path, error)


@pytest.fixture(scope="module")
def sam_b_block():
    """A windowed block as wide as SAM-B's with random weights at W4A4, on one window."""
    block = Block(dim=768, num_heads=12, mlp_dim=3072, window=14, grid=14, parent=None)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (1, 14, 14, 768)), jnp.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params = flatten(random_like(shapes, jax.random.key(1)))
    rng = np.random.default_rng(1)
    labels = jnp.asarray(rng.choice(4, 768, p=[0.5, 0.3, 0.15, 0.05]))
    groups = Grouped(jnp.asarray([0.3, 0.25, 0.4, 0.5]), jnp.asarray([8.0, 7, 8, 9]), labels, 4)
    activations = {
        "attn/qkv/input": groups,
        "mlp/lin1/input": groups,
        "mlp/lin2/input": Hybrid.from_range(-0.17, 3.0, 0.3, 0.5, 4),
        "attn/proj/input": Uniform.from_range(-0.5, 0.5, 4),
        "attn/softmax": Log2(jnp.float32(0.1), jnp.int32(2), 4),
    } | {f"attn/{name}": Uniform.from_range(-3.0, 3.0, 4) for name in "qkv"}
    activations = {site: kind_of(made).on_grid(made, 8) for site, made in activations.items()}
    weights = {}
    for site in list(activations):
        if site.endswith("/input"):
            layer = site.removesuffix("/input")
            kernel = params.pop(f"{layer}/kernel")
            quantizer = Uniform.from_range(kernel.min(0), kernel.max(0), 4)
            codes = quantizer.encode(kernel)
            weights[layer] = QuantizedWeight.from_codes(codes, quantizer.scale, quantizer.zero_point, 4)
    return Operation(block), unflatten(params), weights, activations, (x,)


@pytest.mark.parametrize("bounded", [False, True])
def test_a_block_of_sam_b(sam_b_block, bounded, monkeypatch):
    asked = []
    if bounded:
        # The map of a global block of SAM-B is never held whole.
        monkeypatch.setattr(vit, "_attention_bytes", lambda: asked.append(1) or (1, 1))
        monkeypatch.setattr(vit, "QUERY_CHUNK", 98)
    # A function of its own: what it compiles is in no cache of `_apply`, before or after.
    apply = jax.jit(lambda *args: quantized._apply.__wrapped__(*args), static_argnums=(0, 5, 6, 7))
    results = [apply(*sam_b_block, 8, carrier, True) for carrier in CARRIERS]
    assert len(asked) == 2 * bounded, "both were traced anew"
    (y, codes), (integer_y, integer_codes) = results
    assert set(codes) == set(sam_b_block[3])
    assert float(jnp.abs(y - sam_b_block[4][0]).max()) > 0.1
    for site, value in codes.items():
        assert len(np.unique(value)) > 4, site
        np.testing.assert_array_equal(value, integer_codes[site], err_msg=site)
    np.testing.assert_array_equal(y, integer_y)


def test_float_products_are_whole_on_every_device(sam_b_block):
    """Sums of integers are exact in float32, and not in what GPUs and TPUs multiply in by default."""
    text = quantized._apply.lower(*sam_b_block, 8, "float32", False).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "f32>" in line]
    assert len(products) > 6 and all("precision = [HIGHEST, HIGHEST]" in line for line in products), products


def test_products_are_of_int8_and_hold_no_wider_operand(sam_b_block):
    """Four layers and two products of an attention; relative positions, rows and columns, are floats."""
    text = quantized._apply.lower(*sam_b_block, 8, "int8", False).as_text()
    products = [line.split(" : ")[-1] for line in text.splitlines() if "stablehlo.dot_general" in line]
    whole = [line for line in products if "i32>" in line]
    assert len(whole) == 6 and all(line.count("xi8>") == 2 for line in whole), products
    assert len(products) == 8, products


@pytest.mark.slow
def test_the_predictor_takes_it(tiny_quantized):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    answers = []
    for model in (dataclasses.replace(tiny_quantized, carrier="float32"), integer_model(tiny_quantized)):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        answers.append(predictor.predict(box=np.array([5, 5, 50, 50]), multimask_output=False))
    jax.tree.map(np.testing.assert_array_equal, *answers)


def test_what_has_no_integer_product_is_refused_and_runs_in_floating_point(tiny_quantized):
    site = "image_encoder/blocks_0/mlp/lin1/input"
    channels = tiny_quantized.activations[site].per_channel()
    other = dataclasses.replace(tiny_quantized, activations=tiny_quantized.activations | {site: channels})
    with pytest.raises(ValueError, match="The input of image_encoder/blocks_0/mlp/lin1 is not quantized so"):
        integer_model(other)
    image = picture(other.config)
    # The same quantization with a product of floats.
    difference = jnp.abs(other.encode_image(image) - tiny_quantized.encode_image(image))
    assert float(difference.mean()) < 2e-3 * float(jnp.abs(tiny_quantized.encode_image(image)).mean())
    rest = {k: v for k, v in tiny_quantized.activations.items() if k != "image_encoder/blocks_0/attn/softmax"}
    with pytest.raises(ValueError, match="Site image_encoder/blocks_0/attn/k is quantized in a way"):
        integer_model(dataclasses.replace(tiny_quantized, activations=rest))


# --- Widths -----------------------------------------------------------------------------------------------------------


def test_the_documented_table_is_the_computed_one():
    assert width_table(widths(VIT_H, QuantConfig(w_bits=4, a_bits=4))) in integer.__doc__


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("config", [MINI, VIT_B, VIT_L, VIT_H], ids=["mini", "vit_b", "vit_l", "vit_h"])
def test_no_sum_overflows(config, bits):
    found = widths(config, QuantConfig(w_bits=bits, a_bits=bits))
    assert max(width.bits for width in found) <= integer.SUM_BITS


def test_widths_hold_what_occurs(tiny_quantized):
    """Every sum of a real run stays far inside."""
    found = {width.name: width for width in widths(tiny_quantized.config, tiny_quantized.quant_config)}
    site = "image_encoder/blocks_0/mlp/lin2/input"
    _, codes = tiny_quantized.encode_with_codes(picture(tiny_quantized.config))
    weight = tiny_quantized.weights[site.removesuffix("/input")]
    quantizer = tiny_quantized.activations[site]
    level = np.asarray(kind_of(quantizer).levels(quantizer).of(codes[site]), np.int64)
    columns = np.asarray(weight.codes(), np.int64) - np.asarray(weight.zero_point, np.int64)
    assert 0 < np.abs(level @ columns).max() < 2 ** (found["linear"].bits - 1)
    assert 128 < level.max() < 2 ** found["level"].bits
    assert np.abs(columns.sum(0)).max() < 2 ** (found["sum of a column of weights"].bits - 1)
