"""Products on codes: both carriers give the same numbers, and they are those of the decoded tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.runtime import products
from ahcptq_jax.runtime.products import Operand
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax.layers import conv_same

CARRIERS = ("float32", "int32")


def quantizer(kind, bits, channels, rng):
    top = 2**bits - 1
    if kind == "uniform":
        return Uniform(jnp.float32(0.37), jnp.float32(rng.integers(0, top + 1)), bits)
    if kind == "grouped":
        labels = rng.choice([0, 1, 3], channels, p=[0.7, 0.2, 0.1])  # group 2 is empty
        scales, zeros = rng.uniform(0.01, 2, 4), rng.integers(0, top + 1, 4)
        return Grouped(jnp.asarray(scales, jnp.float32), jnp.asarray(zeros, jnp.float32), jnp.asarray(labels), bits)
    if kind.startswith("log2"):
        return Log2(jnp.float32(0.83), jnp.int32(kind[-1]), bits)
    levels = {"hybrid": 2 ** (bits - 1), "hybrid few": 1, "hybrid most": 2**bits - 2}[kind]
    return Hybrid(jnp.float32(-0.17), jnp.float32(0.6), jnp.float32(0.45), jnp.float32(levels), bits)


def operand(shape, bits, rng, per_channel=True):
    zero = rng.integers(0, 2**bits, shape[-1] if per_channel else ())
    return Operand(jnp.asarray(rng.integers(0, 2**bits, shape)), jnp.asarray(zero, jnp.float32), bits)


@pytest.mark.parametrize("bits", [5, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4))])
@pytest.mark.parametrize(
    ("kind", "features"),
    [(kind, 5) for kind in ("uniform", "log2 1", "log2 2", "log2 4", "hybrid", "hybrid few", "hybrid most")]
    + [("grouped", 5), ("grouped", 70)],  # fewer and more than channels: side by side and in turn
)
def test_carriers_agree_and_are_the_product_of_the_decoded(kind, bits, features):
    rng = np.random.default_rng(bits)
    channels = 37
    left = quantizer(kind, bits, channels, rng)
    codes = jnp.asarray(rng.integers(0, 2**bits, (2, 9, channels)), jnp.int32)
    right = operand((channels, features), bits, rng)
    found = [np.asarray(products.multiply(left, codes, right, c)) for c in CARRIERS]
    values = np.asarray(left.decode(codes), np.float64) - float(getattr(left, "minimum", 0))
    wanted = values @ (np.asarray(right.codes, np.float64) - np.asarray(right.zero_point))
    scale = np.abs(wanted).max()
    for y in found:
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * scale)
    if bits <= 5:
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("extreme", ["high", "low", "mixed"])
def test_the_largest_sums_of_sam_h_are_exact(carrier, extreme):
    """Worst codes at the widest layers against Python's integers: nothing overflows, nothing rounds."""
    terms, bits = 5120, 4
    pick = {"high": [15], "low": [0], "mixed": [0, 15]}[extreme]
    rng = np.random.default_rng(0)
    left, right = rng.choice(pick, (2, terms)), rng.choice(pick, (terms, 2))
    for zero, other_zero in ((0, 0), (15, 15), (0, 15), (15, 0)):
        wanted = (left - zero) @ (right - other_zero)
        own = Operand(jnp.asarray(right), jnp.full(2, other_zero, jnp.float32), bits)
        found = products.accumulate(jnp.asarray(left), jnp.float32(zero), own, carrier)
        np.testing.assert_array_equal(np.asarray(found, np.int64), wanted)
        k = np.zeros_like(left) if extreme != "mixed" else rng.integers(0, 8, left.shape)
        for octaves in products.octave_ranges(8, terms, bits, carrier):
            found = products.accumulate_powers(jnp.asarray(k), jnp.asarray(k >= 0), octaves, own, carrier)
            powers = 1 << (octaves[1] - 1 - np.minimum(k, octaves[1] - 1))
            wanted = np.where(k < octaves[1], powers, 0) @ (right - other_zero)
            np.testing.assert_array_equal(np.asarray(found, np.int64), wanted)


@given(
    octaves=st.integers(1, 255), terms=st.integers(1, 20_000), bits=st.integers(2, 8), carrier=st.sampled_from(CARRIERS)
)
def test_octave_ranges_cover_and_fit(octaves, terms, bits, carrier):
    ranges = products.octave_ranges(octaves, terms, bits, carrier)
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])] and ranges[-1][1] == octaves
    limit = 31 if carrier == "int32" and len(ranges) > products.MAX_PLANES else products.EXACT_BITS[carrier]
    assert all(terms * (2**bits - 1) << (high - low - 1) < 2**limit for low, high in ranges)
    if carrier == "int32" and len(products.octave_ranges(octaves, terms, bits, "float32")) <= products.MAX_PLANES:
        assert ranges == products.octave_ranges(octaves, terms, bits, "float32")


def test_sums_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="use fewer bits"):
        products.octave_ranges(1, 2**20, 8, "float32")


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), block=st.integers(1, 9))
def test_blocks_hold_every_channel_once_with_its_group(labels, block):
    index, starts = (np.asarray(a) for a in products.group_blocks(jnp.asarray(labels), 4, block))
    for group in range(4):
        own = index[starts[group] * block : starts[group + 1] * block]
        assert list(own[own < len(labels)]) == [i for i, label in enumerate(labels) if label == group]
    assert (index[starts[-1] * block :] == len(labels)).all() and (np.sort(index)[: len(labels)] < len(labels)).all()


@pytest.mark.parametrize(("kind", "size"), [("uniform", 3), ("uniform", 1), ("hybrid", 0), ("grouped", 0)])
def test_layers_are_those_of_the_decoded(kind, size):
    """Linears, and convolutions with their zero border, on equal inputs."""
    rng = np.random.default_rng(3)
    shape = (size, size, 12, 7) if size else (12, 7)
    right = operand((int(np.prod(shape[:-1])), 7), 4, rng)
    scale = jnp.asarray(rng.uniform(0.1, 1, 7), jnp.float32)
    weight = QuantizedWeight.from_codes(right.codes.reshape(shape), scale, right.zero_point, 4)
    left = quantizer(kind, 4, 12, rng)
    x = jnp.asarray(rng.normal(0.5, 2, (2, 5, 6, 12)), jnp.float32)
    codes = left.encode(x)
    wanted = conv_same(left.decode(codes), weight.decode()) if size else left.decode(codes) @ weight.decode()
    first, second = (np.asarray(products.layer(codes, left, weight, carrier)) for carrier in CARRIERS)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.asarray(wanted), rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("softmax", ["log2 2", "uniform"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_that_of_the_decoded(softmax, with_bias):
    rng = np.random.default_rng(4)
    sites = {name: Uniform(jnp.float32(0.2), jnp.float32(7), 4) for name in "qkv"}
    sites["softmax"] = (
        Uniform(jnp.float32(0.06), jnp.float32(0), 4) if softmax == "uniform" else quantizer(softmax, 4, 0, rng)
    )
    q, k, v = (jnp.asarray(rng.integers(0, 16, (3, 12, 8)), jnp.int32) for _ in range(3))
    biases = tuple(jnp.asarray(rng.normal(0, 1, (3, 12, n)), jnp.float32) for n in (3, 4)) if with_bias else ()
    (found, codes), second = (products.attend(sites, q, k, v, biases, carrier) for carrier in CARRIERS)
    jax.tree.map(np.testing.assert_array_equal, (found, codes), second)
    scores = sites["q"].decode(q) @ sites["k"].decode(k).swapaxes(-1, -2) / np.sqrt(8)
    if with_bias:
        scores += (biases[0][..., :, None] + biases[1][..., None, :]).reshape(scores.shape)
    probabilities = jax.nn.softmax(scores)
    assert (np.asarray(codes) == np.asarray(sites["softmax"].encode(probabilities))).mean() > 0.999
    wanted = sites["softmax"].decode(codes) @ sites["v"].decode(v)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
