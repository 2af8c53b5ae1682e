"""Ranges of per-tensor activations: by percentile and by error, each chosen by its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import METHODS, QuantConfig
from ahcptq_jax.quantizers import Uniform
from ahcptq_jax.quantizers.kinds import Observation, kind_named
from ahcptq_jax.quantizers.kinds.hybrid import breakpoints
from ahcptq_jax.quantizers.searches.percentile import (
    PERCENTILES,
    percentile_finalize,
    percentile_init,
    percentile_update,
)

SHAPE = (4, 100, 128)  # more than 2 of the last percentile's tail


def quantizer_of(batches, **switches) -> Uniform:
    """By the statistics that calibration keeps for a per-tensor site."""
    config = QuantConfig(**switches)
    statistic = kind_named("uniform").statistic
    state = statistic.init(SHAPE, config.a_bits, config)
    for x in batches:
        observed = Observation(jax.random.key(0), activations=jnp.asarray(x))
        state = statistic.merge(state, statistic.of_batch(state, observed, config.a_bits, config))
    return statistic.finalize({"site": state}, config.a_bits, config)["site"]


def squared_error(quantizer: Uniform, batches) -> float:
    return float(np.mean([np.square(np.asarray(quantizer.fake_quant(x)) - x).mean() for x in batches]))


@pytest.fixture(scope="module")
def tails():
    """Activations with rare values far out."""
    return [np.random.default_rng(i).standard_t(3, SHAPE).astype(np.float32) for i in range(3)]


def test_methods_choose_their_ranges(tails):
    found = {name: quantizer_of(tails, **METHODS[name]) for name in ("minmax", "percentile", "omse")}
    errors = {name: squared_error(quantizer, tails) for name, quantizer in found.items()}
    assert max(errors["omse"], errors["percentile"]) < errors["minmax"] / 2, errors
    assert float(found["percentile"].scale) < float(found["minmax"].scale) / 2


def test_the_percentile_is_chosen_by_loss_and_not_by_order(tails):
    def chosen(batches):
        state = percentile_init()
        for x in batches:
            state = percentile_update(state, x, 4)
        quantizer = percentile_finalize(state, 4)
        # Every candidate's error, by itself.
        candidates = [Uniform.from_range(state.low[i] / 3, state.high[i] / 3, 4) for i in range(len(PERCENTILES))]
        best = int(np.argmin(np.asarray(state.loss)))
        assert float(quantizer.scale) == float(candidates[best].scale)
        return best, int(np.argmin([squared_error(c, batches) for c in candidates]))

    best, by_hand = chosen(tails)
    assert best == by_hand < len(PERCENTILES) - 1, "the official code keeps the last one"
    # Rare values that matter: 0.99 cuts them off, and of the others, which are equal, the first is taken.
    rare = [np.where(np.abs(x) > 6, np.sign(x), 0).astype(np.float32) for x in tails]
    assert [share > 0.99 for share in PERCENTILES].index(True) == chosen(rare)[0] == 1


def test_ends_are_those_of_the_values():
    x = np.random.default_rng(0).permutation(np.arange(10001.0, dtype=np.float32)) - 5000
    state = percentile_update(percentile_init(), x, 8)
    np.testing.assert_array_equal(state.high, [4900, 4990, 4999, 5000])
    np.testing.assert_array_equal(state.low, -np.asarray(state.high))


def test_unusable_statistics_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        percentile_finalize(percentile_init(), 4)
    with pytest.raises(ValueError, match="not finite"):
        percentile_finalize(percentile_update(percentile_init(), jnp.full(8, jnp.nan), 4), 4)
    with pytest.raises(ValueError, match="act_range='best'"):
        QuantConfig(act_range="best")


def test_a_finer_search_has_the_papers_candidates():
    fine, paper = (breakpoints(4, fine=f) for f in (True, False))
    assert len(paper) == 9 and {tuple(c) for c in paper} < {tuple(c) for c in fine}
