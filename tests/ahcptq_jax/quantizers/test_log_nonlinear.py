"""LNQ against its formula, worked out here in float64, and what it is made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.config import METHODS, QuantConfig
from ahcptq_jax.quantizers import LogNonlinear, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.log_nonlinear import ALPHAS, log_nonlinear_values
from ahcptq_jax.quantizers.searches import softmax
from ahcptq_jax.recipe import site_kind


def by_formula(x, alpha, scale, bits):
    """Values and codes in float64: codes are even in ln(1 + alpha x)."""
    last = 2**bits - 1
    whole = np.log(1 + alpha * scale)
    code = np.round(last * np.log(1 + alpha * np.clip(x, 0, scale)) / whole)
    return (np.exp(code / last * whole) - 1) / alpha, code.astype(int)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("alpha", [0.1, 20.0, 200.0])
def test_codes_and_values_are_the_formulas(alpha, bits):
    rng = np.random.default_rng(bits)
    x = (rng.random(4000) ** 4 * 1.2).astype(np.float32)
    values, codes = by_formula(x.astype(np.float64), alpha, 0.9, bits)
    quantizer = LogNonlinear(np.float32(alpha), np.float32(0.9), bits).validate()
    found = np.asarray(quantizer.encode(x))
    assert found.min() >= 0 and found.max() == 2**bits - 1
    same = found == codes
    assert same.mean() > 0.999 and np.abs(found - codes).max() <= 1  # ties alone
    np.testing.assert_allclose(np.asarray(quantizer.fake_quant(x))[same], values[same], rtol=2e-5, atol=1e-7)
    searched = np.asarray(log_nonlinear_values(x, np.float32(alpha), np.float32(0.9), bits))
    np.testing.assert_allclose(searched[same], values[same], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_value_is_its_own_code(bits):
    for alpha in ALPHAS:
        quantizer = LogNonlinear(np.float32(alpha), np.float32(0.7), bits)
        codes = np.arange(2**bits)
        np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)
        assert float(quantizer.decode(0)) == 0.0
        on_grid = kind_of(quantizer).on_grid(quantizer, 8)
        levels = kind_of(quantizer).levels(on_grid)
        np.testing.assert_array_equal(kind_of(quantizer).level_of(on_grid, levels, codes), levels.of(codes))
        assert int(levels.table[0]) == 0 and int(levels.table[-1]) == 255


def test_gradients_pass_inside_the_range_alone():
    quantizer = LogNonlinear(jnp.float32(20), jnp.float32(0.5), 4)
    slope = jax.grad(lambda x: jnp.sum(quantizer.fake_quant(x)))(jnp.array([-0.1, 0.2, 0.4, 0.8]))
    np.testing.assert_array_equal(slope, [0, 1, 1, 0])


def loss(attention, quantized, value):
    return np.mean(np.abs((quantized - attention) @ value) ** 2.4)


@pytest.mark.parametrize("bits", [3, 4])
def test_search_is_as_good_as_all_pairs(bits):
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (2, 40, 60))
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention = (attention / attention.sum(-1, keepdims=True)).astype(np.float32)
    value = rng.normal(size=(2, 60, 8)).astype(np.float32)
    state = softmax.log_nonlinear_update(softmax.softmax_init(len(ALPHAS)), attention, value, bits)
    found = softmax.log_nonlinear_finalize(state, bits)
    top = attention.max()
    every = [
        loss(attention, by_formula(attention, alpha, scale, bits)[0], value)
        for alpha in ALPHAS
        for scale in np.linspace(0.1 * top, top, 200)
    ]
    assert loss(attention, np.asarray(found.fake_quant(attention)), value) <= 1.05 * min(every)
    uniform = Uniform(top / (2**bits - 1), np.float32(0), bits)
    assert loss(attention, np.asarray(found.fake_quant(attention)), value) < 0.5 * loss(
        attention, np.asarray(uniform.fake_quant(attention)), value
    )


@pytest.mark.parametrize("grid_bits", [6, 7, 8])
def test_search_sees_the_grid(grid_bits):
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (2, 64, 1024))
    logits[:, 0, 0] += 10
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention = (attention / attention.sum(-1, keepdims=True)).astype(np.float32)
    value = rng.normal(size=(2, 1024, 8)).astype(np.float32)
    losses = []
    for searched_on in (0, grid_bits):
        state = softmax.softmax_init(len(ALPHAS))
        state = softmax.log_nonlinear_update(state, attention, value, 4, grid_bits=searched_on)
        found = dataclasses.replace(softmax.log_nonlinear_finalize(state, 4), grid_bits=grid_bits)
        losses.append(loss(attention, np.asarray(found.fake_quant(attention)), value))
    # What the search promises is what the quantizer on the grid loses.
    assert losses[1] == pytest.approx(float(state.error_sum.min()), rel=1e-3)
    assert losses[1] <= losses[0] * 1.0001
    assert grid_bits == 8 or losses[1] < losses[0]


def test_no_batch_and_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="batch"):
        softmax.log_nonlinear_finalize(softmax.softmax_init(len(ALPHAS)), 4)
    with pytest.raises(ValueError, match="alpha must be finite and positive"):
        LogNonlinear(np.float32(0), np.float32(1), 4).validate()
    with pytest.raises(ValueError, match="must be scalars"):
        LogNonlinear(np.float32(1), np.ones(3, np.float32), 4).validate()


def test_the_method_takes_it_at_every_softmax():
    path = "image_encoder/blocks_0/attn/softmax"
    assert site_kind(path, QuantConfig(), "sam_vit") == "log2"
    assert site_kind(path, QuantConfig(agq=False, lnq=True), "sam_vit") == "log_nonlinear"
    assert site_kind(path, QuantConfig(**METHODS["ahcq_sam"]), "sam_vit") == "log_nonlinear"
