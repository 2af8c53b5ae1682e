"""AdaRound against stored numbers of the official code, and its properties."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.quantizers import Uniform
from ahcptq_jax.reconstruction import adaround

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def official(golden):
    """The stored arrays, out-last as our weights are."""
    return {name: np.swapaxes(a, -1, -2) if a.ndim == 2 else a for name, a in golden("adaround_s0").items()}


@pytest.fixture(scope="module")
def quantizer(official):
    return Uniform(jnp.asarray(official["scale"]), jnp.asarray(official["zero_point"], jnp.float32), 4)


@pytest.fixture(scope="module")
def floor(official):
    return jnp.floor(official["w"] / official["scale"])


def test_initial_alpha_and_its_sigmoid(official):
    alpha = adaround.initial_alpha(official["w"], official["scale"])
    # Where a weight lies on a grid point but for rounding, the logarithm is steep.
    np.testing.assert_allclose(alpha, official["alpha_init"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adaround.rectified_sigmoid(alpha), official["h_init"], **TOLERANCE)


def test_soft_weight_at_start(official, quantizer, floor):
    soft = adaround.soft_weight(floor, official["alpha_init"], quantizer)
    np.testing.assert_allclose(soft, official["out_soft_init"], **TOLERANCE)


def test_hard_codes_at_start_round_to_nearest(official, quantizer, floor):
    hard = quantizer.decode(adaround.hard_codes(floor, official["alpha_init"], quantizer))
    np.testing.assert_allclose(hard, official["out_nearest"], **TOLERANCE)


def test_learned_weight_soft_and_hard(official, quantizer, floor):
    alpha = official["alpha"]
    np.testing.assert_allclose(adaround.rectified_sigmoid(alpha), official["h"], **TOLERANCE)
    np.testing.assert_allclose(adaround.soft_weight(floor, alpha, quantizer), official["out_soft"], **TOLERANCE)
    hard = quantizer.decode(adaround.hard_codes(floor, alpha, quantizer))
    np.testing.assert_allclose(hard, official["out_hard"], **TOLERANCE)


def test_gradient_of_soft_weight(official, quantizer, floor):
    grad = jax.grad(lambda a: jnp.sum(adaround.soft_weight(floor, a, quantizer) * official["grad_out"]))
    np.testing.assert_allclose(grad(official["alpha"]), official["grad_alpha"], **TOLERANCE)


@pytest.mark.parametrize("beta", [20, 10, 2])
def test_regularizer_and_its_gradient(official, beta):
    alpha = official["alpha"]
    value = adaround.regularizer(alpha, beta)
    np.testing.assert_allclose(value, official[f"reg_b{beta}"], **TOLERANCE)
    np.testing.assert_allclose(value.sum(), official[f"reg_sum_b{beta}"], rtol=1e-4)
    grad = jax.grad(lambda a: adaround.regularizer(a, beta).sum())
    np.testing.assert_allclose(grad(alpha), official[f"reg_grad_alpha_b{beta}"], rtol=1e-4, atol=2e-5)


def test_temperature(official):
    steps, warmup, start, end = (float(v) for v in official["decay_params"])
    found = [adaround.temperature(int(t), int(steps), warmup, start, end) for t in official["decay_t"]]
    np.testing.assert_allclose(found, official["decay_b"], rtol=1e-5)


@pytest.mark.parametrize("alpha", [-1e4, 0.0, 1e4])
def test_gradients_are_finite_where_decided_and_half_way(alpha):
    grad = jax.grad(lambda a: adaround.regularizer(a, jnp.float32(20.0)))(jnp.float32(alpha))
    assert np.isfinite(grad)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_hard_codes_are_one_of_the_two_neighbours(bits, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 3)).astype(np.float32)
    quantizer = Uniform.from_range(0.8 * weight.min(0), 0.8 * weight.max(0), bits)
    floor = jnp.floor(weight / quantizer.scale)
    codes = np.asarray(adaround.hard_codes(floor, rng.normal(size=weight.shape) * 10, quantizer))
    ends = [np.clip(np.asarray(floor + quantizer.zero_point) + up, 0, 2**bits - 1) for up in (0, 1)]
    assert ((codes == ends[0]) | (codes == ends[1])).all()
    nearest = adaround.hard_codes(floor, adaround.initial_alpha(weight, quantizer.scale), quantizer)
    distance = np.abs(quantizer.decode(nearest) - weight) - np.abs(quantizer.fake_quant(weight) - weight)
    assert distance.max() <= 1e-6 * np.asarray(quantizer.scale).max()
