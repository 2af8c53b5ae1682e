"""HLUQ's breakpoint: the pair of range rate and grid rate with the least output error of the layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import Hybrid
from ahcptq_jax.quantizers.base import check_bits
from ahcptq_jax.quantizers.searches.batches import no_batches, nonempty, summed
from ahcptq_jax.quantizers.searches.ranges import RangeState, extremes_of, range_init

# The paper's candidates.
RANGE_RATES = (0.1, 0.3, 0.5)
GRID_RATES = (1 / 8, 1 / 4, 1 / 2)


def hybrid_candidates(
    bits: int, range_rates: Sequence[float] = RANGE_RATES, grid_rates: Sequence[float] = GRID_RATES
) -> np.ndarray:
    """Breakpoint candidates ``(N, 2)`` of (range rate, grid rate), in the official order.

    The default is the paper's 9 pairs. Grid rates that give the same number of log codes at these bits (1/8 and 1/4
    at 2 bits) count once.
    """
    check_bits(bits)
    kept: dict[float, float] = {}
    for rate in grid_rates:
        if not 0 < rate < 1:
            raise ValueError(f"grid rates must lie between 0 and 1, got {rate}")
        kept.setdefault(min(max(float(np.round(rate * 2**bits)), 1.0), 2.0**bits - 2), rate)
    for rate in range_rates:
        if not 0 < rate < 1:
            raise ValueError(f"range rates must lie between 0 and 1, got {rate}")
    return np.array([(r, g) for r in range_rates for g in kept.values()], np.float32).reshape(-1, 2)


class HybridState(NamedTuple):
    """Running statistics of the breakpoint search.

    Attributes:
        loss_sum: ``(N,)`` sum over batches of each candidate's loss.
        range: sums of the extremes.
    """

    loss_sum: jax.Array
    range: RangeState


class HybridSearch(NamedTuple):
    """Outcome of a breakpoint search.

    Attributes:
        quantizer: the chosen quantizer.
        chosen: position of the chosen pair among the candidates.
        range_rate, grid_rate: the chosen pair.
        loss: ``(N,)`` mean loss of each candidate.
        loss_table: ``(batches, N)``, where the search kept it.
    """

    quantizer: Hybrid
    chosen: int
    range_rate: float
    grid_rate: float
    loss: np.ndarray
    loss_table: np.ndarray | None = None


def hybrid_init(candidates: np.ndarray) -> HybridState:
    """Empty state for candidates ``(N, 2)``."""
    return HybridState(jnp.zeros(len(candidates), jnp.float32), range_init())


@functools.partial(jax.jit, static_argnames=("bits", "reach_maximum"))
def hybrid_of_batch(
    before: RangeState,
    x: jax.Array,
    weight: jax.Array,
    candidates: jax.Array,
    bits: int,
    reach_maximum: bool = False,
    picked: jax.Array | None = None,
) -> HybridState:
    """The state of one batch alone: its extremes, and every candidate's loss ``mean((x_q W - x W)^2)``.

    As in the official code, batch ``i`` is judged with the mean extremes of batches ``0..i``. The layer's bias
    cancels. States of batches add up, see ``batches.summed``.

    Args:
        before: the extremes of the batches before it.
        x: (..., in) inputs of the layer.
        weight: (in, out).
        candidates: (N, 2) pairs of range rate and grid rate.
        bits: code width.
        reach_maximum: see ``quantizers.hybrid_scales``.
        picked: (M,) rows, whose losses alone are taken, all if None; the extremes always come from all.

    Source: official ``HybridParamObserver``.
    """
    own = extremes_of(x)
    extremes = summed(before, own)
    rows = jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])
    rows = rows if picked is None else rows[picked]
    minimum = extremes.minimum

    def loss(candidate: jax.Array) -> jax.Array:
        quantizer = Hybrid.from_range(
            minimum, extremes.maximum - minimum, candidate[0], candidate[1], bits, reach_maximum
        )
        error = quantizer.fake_quant(rows) - rows
        return jnp.mean(jnp.square(jnp.matmul(error, weight, precision=jax.lax.Precision.HIGHEST)))

    losses = jax.lax.map(loss, jnp.asarray(candidates, jnp.float32))
    return HybridState(losses, own)


def hybrid_finalize(state: HybridState, candidates: np.ndarray, bits: int, reach_maximum: bool = False) -> HybridSearch:
    """The candidate with the least mean loss, at the mean extremes; of equal ones the first."""
    if not state.range.batches:
        raise no_batches()
    loss = np.asarray(state.loss_sum / state.range.batches)
    if not np.all(np.isfinite(loss)):
        raise ValueError("the breakpoint losses are not finite; the inputs or the weight hold NaN or infinity")
    index = int(np.argmin(loss))
    range_rate, grid_rate = (float(rate) for rate in np.asarray(candidates)[index])
    minimum, maximum = state.range.minimum, state.range.maximum
    quantizer = Hybrid.from_range(minimum, maximum - minimum, range_rate, grid_rate, bits, reach_maximum)
    return HybridSearch(quantizer, index, range_rate, grid_rate, loss)


def search_hybrid_table(
    batches: Iterable[jax.Array],
    weight: jax.Array,
    bits: int,
    *,
    candidates: np.ndarray | None = None,
    reach_maximum: bool = False,
) -> HybridSearch:
    """``search_hybrid`` with the losses of every batch and candidate."""
    candidates = hybrid_candidates(bits) if candidates is None else np.asarray(candidates, np.float32)
    check_bits(bits)
    weight = jnp.asarray(weight, jnp.float32)
    state, table = hybrid_init(candidates), []
    for x in nonempty(batches):
        if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
            raise ValueError(f"weight {weight.shape} must be (in, out) for inputs of shape {tuple(x.shape)}")
        batch = hybrid_of_batch(state.range, x, weight, candidates, bits, reach_maximum)
        table.append(np.asarray(batch.loss_sum))
        state = summed(state, batch)
    return hybrid_finalize(state, candidates, bits, reach_maximum)._replace(loss_table=np.array(table))


def search_hybrid(
    batches: Iterable[jax.Array],
    weight: jax.Array,
    bias: jax.Array | None,
    bits: int,
    *,
    candidates: np.ndarray | None = None,
    reach_maximum: bool = False,
) -> Hybrid:
    """HLUQ's breakpoint search: the (range rate, grid rate) with the least output error of the layer.

    Args:
        batches: inputs (..., in) of the layer, at least one.
        weight: (in, out) of the layer that follows.
        bias: (out,) or None; it cancels in the error and is accepted for the layer's sake.
        bits: code width, 2 to 8.
        candidates: (N, 2) pairs; default the paper's 9 (``hybrid_candidates``).
        reach_maximum: see ``quantizers.hybrid_scales``.

    Raises:
        ValueError: on bad bits or shapes, no batch, or inputs that are not finite.
    """
    del bias
    return search_hybrid_table(batches, weight, bits, candidates=candidates, reach_maximum=reach_maximum).quantizer
