"""Products on levels: both carriers give the same numbers, and they are those of the decoded tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.runtime import products
from ahcptq_jax.runtime.products import CARRIERS
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax.layers import conv_same

KINDS = ("uniform", "grouped", "log2 1", "log2 2", "log2 4", "hybrid", "hybrid few", "hybrid most")


def quantizer(kind, bits, channels, rng, grid_bits=8):
    top = 2**bits - 1
    if kind == "uniform":
        made = Uniform(jnp.float32(0.37), jnp.float32(rng.integers(0, top + 1)), bits)
    elif kind == "grouped":
        labels = rng.choice([0, 1, 3], channels, p=[0.7, 0.2, 0.1])  # group 2 is empty
        scales, zeros = rng.uniform(0.1, 1, 4), rng.integers(0, top + 1, 4)
        made = Grouped(jnp.asarray(scales, jnp.float32), jnp.asarray(zeros, jnp.float32), jnp.asarray(labels), bits)
    elif kind.startswith("log2"):
        made = Log2(jnp.float32(0.83), jnp.int32(kind[-1]), bits)
    else:
        levels = {"hybrid": 2 ** (bits - 1), "hybrid few": 1, "hybrid most": 2**bits - 2}[kind]
        made = Hybrid(jnp.float32(-0.17), jnp.float32(0.6), jnp.float32(0.45), jnp.float32(levels), bits)
    return kind_of(made).on_grid(made, grid_bits)


def random_weight(shape, bits, rng):
    scale = jnp.asarray(rng.uniform(0.1, 1, shape[-1]), jnp.float32)
    zero = jnp.asarray(rng.integers(0, 2**bits, shape[-1]), jnp.float32)
    return QuantizedWeight.from_codes(jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8), scale, zero, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_levels_by_arithmetic_are_those_of_the_table(kind, bits):
    """For every code, of every channel; in int8 after the shift, which encoding must not leave."""
    for grid_bits in (max(bits, 5), 8):
        made = quantizer(kind, bits, 11, np.random.default_rng(bits), grid_bits)
        record, codes = kind_of(made), jnp.broadcast_to(jnp.arange(2**bits, dtype=jnp.int32)[:, None], (2**bits, 11))
        levels = record.levels(made)
        found = np.asarray(record.level_of(made, levels, codes))
        np.testing.assert_array_equal(found, levels.of(codes))
        low, high = (0, 255) if record.unsigned else (-128, 127)
        assert low <= found.min() and found.max() <= high
        assert record.has_offset(bits) or not np.any(levels.offset)
        values = levels.decode(codes)
        assert not record.has_zero or np.abs(np.asarray(values)).min() < 1e-6
        np.testing.assert_allclose(made.decode(codes), values, rtol=0, atol=2e-6 * np.abs(values).max())


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("kind", "size"), [(k, 0) for k in KINDS] + [("uniform", 3), ("log2 2", 3), ("grouped", 1)])
def test_layers_are_those_of_the_decoded(kind, size, bits, w_bits):
    """Linears, and convolutions with their zero border, on equal inputs."""
    rng = np.random.default_rng(bits)
    weight = random_weight((size, size, 12, 7) if size else (12, 7), w_bits, rng)
    left = quantizer(kind, bits, 12, rng)
    x = jnp.asarray(rng.normal(0.5, 2, (2, 5, 6, 12)), jnp.float32)

    def run(carrier):
        site = products.on_grid(left, 8)
        assert products.supports_layer(site, weight.shape)
        level, codes = site.encode(x)
        assert level.dtype == jnp.int8
        return products.layer(level, site, weight, carrier), codes, site.decode(level)

    (first, codes, values), (second, *_) = (jax.jit(run, static_argnums=0)(carrier) for carrier in CARRIERS)
    np.testing.assert_array_equal(codes, left.encode(x))
    np.testing.assert_array_equal(first, second)
    decoded = left.decode(codes)
    np.testing.assert_allclose(values, decoded, rtol=0, atol=2e-6 * np.abs(decoded).max())
    wanted = conv_same(decoded, weight.decode()) if size else decoded @ weight.decode()
    np.testing.assert_allclose(first, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("softmax", ["log2 2", "uniform", "hybrid"])
@pytest.mark.parametrize("operands", ["uniform", "hybrid"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_that_of_the_decoded(softmax, operands, with_bias, bits):
    """Also of kinds with offsets, at every place that a rule can put them."""
    rng = np.random.default_rng(4)
    made = {name: quantizer(operands, bits, 0, rng) for name in "qkv"} | {"softmax": quantizer(softmax, bits, 0, rng)}
    if softmax == "uniform":
        made["softmax"] = Uniform(jnp.float32(1 / 2**bits), jnp.float32(0), bits)
    values = [jnp.asarray(rng.normal(0.5, 0.6, (3, 12, 8)), jnp.float32) for _ in range(3)]
    biases = tuple(jnp.asarray(rng.normal(0, 1, (3, 12, n)), jnp.float32) for n in (3, 4)) if with_bias else ()

    def run(carrier):
        sites = products.attention_sites(made, 8)
        q, k, v = (sites[name].encode(x)[0] for name, x in zip("qkv", values, strict=True))
        return products.attend(sites, q, k.swapaxes(-1, -2), v, biases, carrier)

    (found, codes), second = (jax.jit(run, static_argnums=0)(carrier) for carrier in CARRIERS)
    jax.tree.map(np.testing.assert_array_equal, (found, codes), second)
    q, k, v = (made[name].decode(made[name].encode(x)) for name, x in zip("qkv", values, strict=True))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    if with_bias:
        scores += (biases[0][..., :, None] + biases[1][..., None, :]).reshape(scores.shape)
    probabilities = jax.nn.softmax(scores)
    assert (np.asarray(codes) == np.asarray(made["softmax"].encode(probabilities))).mean() > 0.995
    wanted = made["softmax"].decode(codes) @ v
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_sums_of_sam_h_are_exact(carrier, bits):
    """Worst levels at the widest layers against Python's integers: nothing overflows, nothing rounds."""
    rng = np.random.default_rng(0)
    for terms, largest, w_bits in ((5120, 2**bits - 1, bits), (4096, 255, 8)):  # lin2, and the values of an attention
        extremes = [-largest, largest] if w_bits < 8 else [-128, 127]
        for pick, other in (((-128,), extremes[:1]), ((127,), extremes[1:]), ((-128, 127), extremes)):
            left, right = rng.choice(pick, (2, terms)), rng.choice(other, (terms, 3))
            bound = 128 if w_bits == 8 else largest
            found = products.integer_sum(left.astype(np.int8), right.astype(np.int8), carrier, bound)
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(np.asarray(found, np.int64), left @ right)


@pytest.mark.parametrize("kind", ["uniform", "hybrid"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_largest_layers_of_sam_h_at_8_bits_do_not_overflow(kind, carrier):
    """Every code and every weight at an end, so that the folded terms are as large as they can be."""
    rng = np.random.default_rng(1)
    for code, weight_code, zero in ((255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255)):
        left = quantizer(kind, 8, 5120, rng)
        codes = np.full((2, 5120), code)
        scale, zeros = np.ones(3, np.float32), np.full(3, zero, np.float32)
        weight = QuantizedWeight.from_codes(jnp.full((5120, 3), weight_code, jnp.uint8), scale, zeros, 8)
        site = products.on_grid(left, 8)
        assert site is not None
        level = (site.levels.of(codes) - site.shift).astype(jnp.int8)
        wanted = np.asarray(left.decode(codes), np.float64) @ np.full((5120, 3), weight_code - zero, np.float64)
        found = products.layer(level, site, weight, carrier)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * 5120 * 255)


def test_what_has_no_product_on_levels_is_known():
    rng = np.random.default_rng(0)
    per_channel = Uniform(jnp.ones(3), jnp.zeros(3), 4)
    assert products.on_grid(None, 8) is None and products.on_grid(per_channel, 8) is None
    off = [quantizer(kind, 4, 3, rng) for kind in ("hybrid", "grouped", "log2 1")]
    assert all(products.on_grid(q, 0) is None and products.on_grid(q, 8) is not None for q in off)
    assert products.on_grid(quantizer("uniform", 4, 3, rng), 0) is not None
    for kind, border in (("hybrid", False), ("grouped", False), ("log2 1", True), ("uniform", True)):
        site = products.on_grid(quantizer(kind, 4, 3, rng), 8)
        assert products.supports_layer(site, (3, 3, 3, 5)) == border and products.supports_layer(site, (1, 1, 3, 5))
