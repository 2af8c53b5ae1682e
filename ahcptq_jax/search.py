"""Searches for quantizer parameters: ranges, weight ranges, the HLUQ breakpoint, AGQ's tau and scale.

Calibration streams batches, so every activation search is a pure ``init / update / finalize`` over a small state, and
``search_*`` runs the three over an iterable. Statistics are float32 and every function is deterministic. The weight and
softmax losses are the official ``mean |error|^2.4``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import Hybrid, Log2, Uniform, log2_fake_quant
from ahcptq_jax.quantizers.base import check_bits, qparams_from_range
from ahcptq_jax.quantizers.log2 import TAUS

LOSS_POWER = 2.4
RANGE_STEPS = 100
RANGE_RATES = (0.1, 0.3, 0.5)
GRID_RATES = (1 / 8, 1 / 4, 1 / 2)
# A search over a whole tensor looks coarsely at this many of its values, and then finely at all of them.
_COARSE_ELEMENTS = 2**19
_HIGHEST = jax.lax.Precision.HIGHEST


# --- |error|^2.4 ------------------------------------------------------------------------------------------------------

_SQRT_HALF_BITS = 0x3F3504F3
_LOG_NODES = np.linspace(-0.2929, 0.4143, 4001) + 1e-12
_LOG_COEFFICIENTS = np.polynomial.Polynomial.fit(_LOG_NODES, np.log2(1 + _LOG_NODES) / _LOG_NODES, 7).convert().coef
_EXP_NODES = np.linspace(-0.5, 0.5, 4001)
_EXP_COEFFICIENTS = np.polynomial.Polynomial.fit(_EXP_NODES, 2.0**_EXP_NODES, 5).convert().coef


def _polynomial(coefficients: np.ndarray, x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, np.float32(coefficients[-1]))
    for coefficient in coefficients[-2::-1]:
        value = value * x + np.float32(coefficient)
    return value


def loss_power(error: jax.Array) -> jax.Array:
    """``error^2.4`` of non-negative float32 values, to 1e-5 relative (3e-6 near one).

    ``2^(2.4 log2 e)`` with short polynomials and no special cases: on a CPU 3 times as fast as ``exp2`` and ``log2``,
    15 times as fast as ``power``, and the searches below do little else.
    """
    bits = jax.lax.bitcast_convert_type(error, jnp.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = jax.lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1.0
    log = exponent.astype(jnp.float32) + mantissa * _polynomial(_LOG_COEFFICIENTS, mantissa)
    power = log * LOSS_POWER
    whole = jnp.round(power)
    fraction = _polynomial(_EXP_COEFFICIENTS, power - whole)
    # Zero has the least exponent: it comes out as 2^-126 or so.
    shift = (jnp.clip(whole, -126.0, 127.0).astype(jnp.int32) + 127) << 23
    return fraction * jax.lax.bitcast_convert_type(shift, jnp.float32)


# --- Uniform activations: averaged minimum and maximum ----------------------------------------------------------------


class RangeState(NamedTuple):
    """Running means of the batches' extremes.

    Attributes:
        minimum: scalar or ``(C,)``.
        maximum: as ``minimum``.
        batches: batches seen.
    """

    minimum: jax.Array
    maximum: jax.Array
    batches: jax.Array

    def quantizer(self, bits: int) -> Uniform:
        """The uniform quantizer of the mean range."""
        return Uniform.from_range(self.minimum, self.maximum, bits)


def range_init(channels: int | None = None) -> RangeState:
    """Empty state of a per-tensor (None) or per-channel range."""
    zero = jnp.zeros(() if channels is None else (channels,), jnp.float32)
    return RangeState(zero, zero, jnp.float32(0))


def _range_add(state: RangeState, minimum: jax.Array, maximum: jax.Array) -> RangeState:
    # The official running mean, whose value after each batch also serves the hybrid search.
    count = state.batches
    return RangeState(
        (state.minimum * count + minimum) / (count + 1),
        (state.maximum * count + maximum) / (count + 1),
        count + 1,
    )


@jax.jit
def range_update(state: RangeState, x: jax.Array) -> RangeState:
    """Adds a batch (any shape; channels last if the state is per channel).

    Source: official ``AvgMinMaxObserver`` and ``AvgMinMaxGroupObserver``.
    """
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(x.ndim - state.minimum.ndim))
    return _range_add(state, jnp.min(x, axis=axes), jnp.max(x, axis=axes))


def search_range(batches: Iterable[jax.Array], bits: int, per_channel: bool = False) -> Uniform:
    """Uniform quantizer of the mean minimum and mean maximum over the batches.

    Args:
        batches: arrays (..., C), at least one.
        bits: code width, 2 to 8.
        per_channel: one range per channel of the last axis instead of one for the tensor.
    """
    check_bits(bits)
    state = None
    for x in _nonempty(batches):
        state = range_init(x.shape[-1] if per_channel else None) if state is None else state
        state = range_update(state, x)
    if state is None:
        raise _no_batches()
    return state.quantizer(bits)


def _nonempty(batches: Iterable[jax.Array]) -> Iterable[jax.Array]:
    return (x for x in batches if math.prod(x.shape))


def _no_batches() -> ValueError:
    return ValueError("calibration needs at least one batch with data, got none; pass calibration images")


# --- Uniform ranges by |error|^2.4 ------------------------------------------------------------------------------------

_ROWS_PER_STEP = 16


def _loss_sums(rows: jax.Array, scale: jax.Array, zero_point: jax.Array, highest: int) -> jax.Array:
    """Sums over the rows of ``|fake_quant(w) - w|^2.4``, for candidates at once.

    Args:
        rows: (R, C), R a multiple of 16 (zero rows add nothing).
        scale: (K, C) or (K, 1) candidates' scales.
        zero_point: likewise.
        highest: last code.

    Returns:
        (K, C) sums.
    """
    inverse = 1.0 / scale
    low, high = -zero_point, highest - zero_point
    shape = (scale.shape[0], rows.shape[1])

    def step(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        # Unrolled rows keep a candidate's sum in a register: one fused loop, no (K, R, C) array. Sums of a block are
        # added up first, which keeps the float32 rounding of long columns small.
        part = jnp.zeros(shape, jnp.float32)
        for i in range(_ROWS_PER_STEP):
            ratio = block[i] * inverse
            part += loss_power(jnp.abs(jnp.clip(jnp.round(ratio), low, high) - ratio))
        return total + part, None

    blocks = rows.reshape(-1, _ROWS_PER_STEP, rows.shape[1])
    sums, _ = jax.lax.scan(step, jnp.zeros(shape, jnp.float32), blocks)
    # The error was in units of the scale.
    return sums * loss_power(scale)


def _pad_rows(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % _ROWS_PER_STEP), (0, 0)))


class WeightSearch(NamedTuple):
    """Outcome of a weight range search, per output channel.

    Attributes:
        quantizer: per-channel uniform quantizer.
        minimum: ``(out,)`` low end of the chosen range.
        maximum: ``(out,)`` high end.
        loss: ``(out,)`` mean ``|error|^2.4``.
    """

    quantizer: Uniform
    minimum: jax.Array
    maximum: jax.Array
    loss: jax.Array


# Minimum, maximum and loss of the best range so far, per channel.
_Best = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("bits", "side"))
def _search_weight(rows: jax.Array, bits: int, side: str) -> _Best:
    """Best (minimum, maximum, mean loss), each (C,), of rows (R, C)."""
    highest = 2**bits - 1
    count = rows.shape[0]
    low, high = jnp.min(rows, axis=0), jnp.max(rows, axis=0)
    width = jnp.maximum(high, 0.0) - jnp.minimum(low, 0.0) if side == "both" else jnp.maximum(jnp.abs(low), high)
    rows = _pad_rows(rows)
    zero_points = jnp.arange(2**bits, dtype=jnp.float32)[:, None]  # (L, 1)

    def candidates(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(minimum, maximum), each (K, C), of range steps (S,): the zero point varies fastest."""
        span = width / RANGE_STEPS * steps[:, None]  # (S, C)
        if side == "positive":
            return jnp.zeros_like(span), span
        if side == "negative":
            return -span, jnp.zeros_like(span)
        delta = (span / highest)[:, None]
        minimum = -zero_points * delta  # (S, L, C)
        maximum = span[:, None] - zero_points * delta
        return minimum.reshape(-1, span.shape[1]), maximum.reshape(-1, span.shape[1])

    def scan(best: _Best, steps: jax.Array) -> tuple[_Best, None]:
        best_minimum, best_maximum, best_loss = best
        minimum, maximum = candidates(steps)
        scale, zero_point = qparams_from_range(minimum, maximum, bits)
        loss = _loss_sums(rows, scale, zero_point, highest) / count
        chosen = jnp.argmin(loss, axis=0)[None]
        minimum, maximum, loss = (jnp.take_along_axis(a, chosen, axis=0)[0] for a in (minimum, maximum, loss))
        # Strictly less: of equal candidates the first in the official order (range, then zero point) stays.
        better = loss < best_loss
        return (
            jnp.where(better, minimum, best_minimum),
            jnp.where(better, maximum, best_maximum),
            jnp.minimum(loss, best_loss),
        ), None

    start = (jnp.minimum(low, 0.0), jnp.maximum(high, 0.0), jnp.full_like(low, jnp.inf))
    # About 100 candidates at a time fill the vector units without leaving the cache.
    per_step = 2**bits if side == "both" else 1
    together = max(n for n in (1, 2, 4, 5, 10, 20, 25, 50, 100) if n == 1 or n * per_step <= 128)
    steps = jnp.arange(1, RANGE_STEPS + 1, dtype=jnp.float32).reshape(-1, together)
    return jax.lax.scan(scan, start, steps)[0]


def search_weight_ranges(weight: jax.Array, bits: int) -> WeightSearch:
    """Range search of ``search_weight`` with the ranges and losses it found."""
    check_bits(bits)
    weight = jnp.asarray(weight, jnp.float32)
    if weight.ndim < 1 or weight.size == 0:
        raise ValueError(f"weight of shape {weight.shape} has nothing to quantize; pass (..., out) with values")
    lowest, highest = float(jnp.min(weight)), float(jnp.max(weight))
    if not math.isfinite(lowest) or not math.isfinite(highest):
        raise ValueError("weight must be finite; the checkpoint holds NaN or infinity")
    side = "positive" if lowest >= 0 else "negative" if highest <= 0 else "both"
    minimum, maximum, loss = _search_weight(weight.reshape(-1, weight.shape[-1]), bits, side)
    return WeightSearch(Uniform.from_range(minimum, maximum, bits), minimum, maximum, loss)


def search_weight(weight: jax.Array, bits: int) -> Uniform:
    """Per-output-channel uniform quantizer of a weight with the least mean ``|error|^2.4``.

    100 range steps times ``2^bits`` zero points for every channel; where all of the weight is on one side of zero,
    100 ranges from zero.

    Args:
        weight: (in, out), or any shape with the output channels on the last axis (HWIO convolution kernels).
        bits: code width, 2 to 8.

    Returns:
        ``Uniform`` with scale and zero point ``(out,)``.

    Raises:
        ValueError: on bad bits, an empty weight or one that is not finite.

    Source: official ``MSEObserver``.
    """
    return search_weight_ranges(weight, bits).quantizer


_UNIFORM_COLUMNS = 256


@functools.partial(jax.jit, static_argnames="bits")
def uniform_mse_update(state: RangeState, x: jax.Array, bits: int) -> RangeState:
    """Adds to the running means the range of ``x`` (any shape) with the least mean ``|error|^2.4``.

    All 100 * 2^bits candidates on an evenly spaced part of the values, then the neighbourhood of the best on all of
    them. The official nested bounded search stops at a local minimum.

    Source: official ``SignAvgMSEFastObserver``.
    """
    highest = 2**bits - 1
    values = jnp.asarray(x, jnp.float32).reshape(-1)
    low, high = jnp.min(values), jnp.max(values)
    width = jnp.maximum(high, 0.0) - jnp.minimum(low, 0.0)

    def columns(values: jax.Array) -> jax.Array:
        return _pad_rows(jnp.pad(values, (0, -values.size % _UNIFORM_COLUMNS)).reshape(-1, _UNIFORM_COLUMNS))

    def best(values: jax.Array, spans: jax.Array, zero_points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The best pair of all spans (S,) and zero points (Z,), candidates a span at a time."""
        rows = columns(values)

        def losses(span: jax.Array) -> jax.Array:
            scale = jnp.broadcast_to(jnp.maximum(span / highest, 1e-8), zero_points.shape)[:, None]
            return jnp.sum(_loss_sums(rows, scale, zero_points[:, None], highest), axis=1)

        table = jax.lax.map(losses, spans)  # (S, Z)
        chosen = jnp.argmin(table)
        return spans[chosen // zero_points.size], zero_points[chosen % zero_points.size]

    steps = jnp.arange(1, RANGE_STEPS + 1, dtype=jnp.float32) / RANGE_STEPS
    stride = max(1, values.size // (_COARSE_ELEMENTS // 8))
    span, zero_point = best(values[::stride], width * steps, jnp.arange(2**bits, dtype=jnp.float32))
    near = span + width / RANGE_STEPS * jnp.linspace(-1.0, 1.0, 17)
    span, zero_point = best(
        values,
        jnp.maximum(near, width / RANGE_STEPS / 2),
        jnp.clip(zero_point + jnp.arange(-1.0, 2.0), 0.0, highest),
    )
    minimum = -zero_point * span / highest
    return _range_add(state, jnp.maximum(minimum, jnp.minimum(low, 0.0)), jnp.minimum(minimum + span, high))


def search_uniform(batches: Iterable[jax.Array], bits: int) -> Uniform:
    """Per-tensor uniform quantizer of the mean of the batches' best ranges (``uniform_mse_update``)."""
    check_bits(bits)
    state = range_init()
    for x in _nonempty(batches):
        state = uniform_mse_update(state, x, bits)
    if not state.batches:
        raise _no_batches()
    return state.quantizer(bits)


# --- Hybrid: the breakpoint -------------------------------------------------------------------------------------------


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
        range: running mean of the extremes.
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


@functools.partial(jax.jit, static_argnames=("bits", "reach_maximum", "row_stride"))
def hybrid_update(
    state: HybridState,
    x: jax.Array,
    weight: jax.Array,
    candidates: jax.Array,
    bits: int,
    reach_maximum: bool = False,
    row_stride: int = 1,
) -> HybridState:
    """Adds a batch to every candidate's loss ``mean((x_q W - x W)^2)``.

    As in the official code, batch ``i`` is judged with the mean extremes of batches ``0..i``. The layer's bias
    cancels.

    Args:
        state: from ``hybrid_init`` or an earlier update.
        x: (..., in) inputs of the layer.
        weight: (in, out).
        candidates: (N, 2) pairs of range rate and grid rate.
        bits: code width.
        reach_maximum: see ``quantizers.hybrid_scales``.
        row_stride: losses of every n-th row only; the extremes always come from all.

    Source: official ``HybridParamObserver``.
    """
    extremes = range_update(state.range, x)
    rows = jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])[::row_stride]
    minimum = extremes.minimum

    def loss(candidate: jax.Array) -> jax.Array:
        quantizer = Hybrid.from_range(
            minimum, extremes.maximum - minimum, candidate[0], candidate[1], bits, reach_maximum
        )
        error = quantizer.fake_quant(rows) - rows
        return jnp.mean(jnp.square(jnp.matmul(error, weight, precision=_HIGHEST)))

    losses = jax.lax.map(loss, jnp.asarray(candidates, jnp.float32))
    return HybridState(state.loss_sum + losses, extremes)


def hybrid_finalize(state: HybridState, candidates: np.ndarray, bits: int, reach_maximum: bool = False) -> HybridSearch:
    """The candidate with the least mean loss, at the mean extremes; of equal ones the first."""
    if not state.range.batches:
        raise _no_batches()
    loss = np.asarray(state.loss_sum / state.range.batches)
    if not np.all(np.isfinite(loss)):
        raise ValueError("the breakpoint losses are not finite; the inputs or the weight hold NaN or infinity")
    index = int(np.argmin(loss))
    range_rate, grid_rate = (float(rate) for rate in np.asarray(candidates)[index])
    minimum, maximum, _ = state.range
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
    for x in _nonempty(batches):
        if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
            raise ValueError(f"weight {weight.shape} must be (in, out) for inputs of shape {tuple(x.shape)}")
        # A state without losses makes this batch's own losses the sum.
        update = hybrid_update(
            hybrid_init(candidates)._replace(range=state.range), x, weight, candidates, bits, reach_maximum
        )
        table.append(np.asarray(update.loss_sum))
        state = HybridState(state.loss_sum + update.loss_sum, update.range)
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


# --- Softmax: tau and scale -------------------------------------------------------------------------------------------


class SoftmaxState(NamedTuple):
    """Running statistics of the softmax search, one entry per tau (1, 2, 4).

    Attributes:
        scale_sum: ``(3,)`` sum over batches of the best scale.
        error_sum: ``(3,)`` sum over batches of its loss.
        batches: batches seen.
    """

    scale_sum: jax.Array
    error_sum: jax.Array
    batches: jax.Array


def softmax_init() -> SoftmaxState:
    """Empty state."""
    return SoftmaxState(jnp.zeros(len(TAUS), jnp.float32), jnp.zeros(len(TAUS), jnp.float32), jnp.float32(0))


def _softmax_losses(
    attention: jax.Array, value: jax.Array, tau: jax.Array, scales: jax.Array, levels: int
) -> jax.Array:
    """Mean ``|A_q V - A V|^2.4`` (3, n) for each tau (3,) and its scales (3, n), of (B, R, K) times (B, K, D)."""
    batch, rows, keys = attention.shape
    # Blocks that stay in the cache: 3 times as fast on a CPU as the whole tensor at once.
    together = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * rows * keys <= 2**20))
    blocks = (
        attention.reshape(batch // together, together, rows, keys),
        value.reshape(batch // together, together, keys, value.shape[-1]),
    )

    def loss(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        scale, tau = candidate

        def block_loss(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            attention, value = block
            error = log2_fake_quant(attention, scale, tau, levels) - attention
            return jnp.mean(loss_power(jnp.abs(jnp.matmul(error, value, precision=_HIGHEST))))

        return jnp.mean(jax.lax.map(block_loss, blocks))

    pairs = (scales.reshape(-1), jnp.repeat(tau, scales.shape[1]))
    return jax.lax.map(loss, pairs).reshape(scales.shape)


@functools.partial(jax.jit, static_argnames=("levels", "max_elements"))
def softmax_update(
    state: SoftmaxState, attention: jax.Array, value: jax.Array, levels: int, max_elements: int | None = 2**24
) -> SoftmaxState:
    """Adds a batch: the best scale and its loss for every tau.

    The loss has many small dents around one valley, so the bounded search is by grids, each over the neighbourhood of
    the best of the one before; for large tensors the first ones on an evenly spaced part of the rows.

    Args:
        state: from ``softmax_init`` or an earlier update.
        attention: (..., queries, keys) softmax outputs.
        value: (..., keys, width).
        levels: number of nonzero levels.
        max_elements: of a larger attention an evenly spaced part of the queries stands for all (None: never).

    Source: official ``LogAvgMSEFastObserver``.
    """
    attention = jnp.asarray(attention, jnp.float32).reshape(-1, *attention.shape[-2:])
    value = jnp.asarray(value, jnp.float32).reshape(-1, *value.shape[-2:])
    maximum = jnp.max(attention)
    low, high = jnp.minimum(0.1, 0.01 * maximum), maximum
    tau = jnp.asarray(TAUS, jnp.int32)

    def thinned(limit: int | None) -> jax.Array:
        stride = 1 if limit is None else math.ceil(attention.size / limit)
        return attention[:, :: max(1, min(stride, attention.shape[1]))]

    fine, coarse = thinned(max_elements), thinned(_COARSE_ELEMENTS)
    # (rows, points of the grid, half-width of the next one in grid steps). Small tensors are rough and cheap, large
    # ones smooth and dear.
    if fine.size <= _COARSE_ELEMENTS:
        rounds = [(fine, 33, 1.0), (fine, 33, 4.0), (fine, 65, 1.0), (fine, 17, 1.0)]
    else:
        rounds = [(coarse, 33, 1.0), (coarse, 17, 2.0), (fine, 9, 1.0), (fine, 5, 1.0)]
    left, right = jnp.full(tau.shape, low), jnp.full(tau.shape, high)
    best_scale = left
    best_loss = jnp.full(tau.shape, jnp.inf)
    for rows, points, reach in rounds:
        scales = left[:, None] + (right - left)[:, None] * jnp.linspace(0.0, 1.0, points)  # (3, points)
        losses = _softmax_losses(rows, value, tau, scales, levels)
        chosen = jnp.argmin(losses, axis=1)[:, None]
        scale, loss = (jnp.take_along_axis(a, chosen, axis=1)[:, 0] for a in (scales, losses))
        if rows is fine:
            # Losses on the same rows are comparable from grid to grid.
            better = loss < best_loss
            best_scale, best_loss = jnp.where(better, scale, best_scale), jnp.minimum(loss, best_loss)
        else:
            best_scale = scale
        half = (right - left) / (points - 1) * reach
        left, right = jnp.maximum(best_scale - half, low), jnp.minimum(best_scale + half, high)
    return SoftmaxState(state.scale_sum + best_scale, state.error_sum + best_loss, state.batches + 1)


def softmax_finalize(state: SoftmaxState, bits: int) -> Log2:
    """The tau with the least total loss, and the mean of its best scales."""
    if not state.batches:
        raise _no_batches()
    if not np.all(np.isfinite(np.asarray(state.error_sum))):
        raise ValueError("the softmax losses are not finite; the attention or the values hold NaN or infinity")
    index = int(np.argmin(np.asarray(state.error_sum)))
    return Log2(state.scale_sum[index] / state.batches, jnp.int32(TAUS[index]), bits)


def search_softmax(
    attention_batches: Iterable[jax.Array],
    value_batches: Iterable[jax.Array],
    bits: int,
    levels: int | None = None,
    max_elements: int | None = 2**24,
) -> Log2:
    """AGQ's search: tau in {1, 2, 4} and the scale with the least mean ``|A_q V - A V|^2.4``.

    Args:
        attention_batches: softmax outputs (..., queries, keys), at least one.
        value_batches: as many values (..., keys, width).
        bits: code width, 2 to 8.
        levels: number of nonzero levels; default ``2^bits - 1``, what the quantizer has (``2^bits``: official).
        max_elements: see ``softmax_update``.

    Raises:
        ValueError: on bad bits, no batch, unequal numbers of batches or shapes that do not fit.
    """
    check_bits(bits)
    levels = 2**bits - 1 if levels is None else levels
    state = softmax_init()
    for attention, value in zip(attention_batches, value_batches, strict=True):
        if attention.ndim < 2 or value.ndim < 2 or attention.shape[-1] != value.shape[-2]:
            raise ValueError(
                f"attention {tuple(attention.shape)} must be (..., queries, keys) and value {tuple(value.shape)} "
                "(..., keys, width) with the same keys"
            )
        state = softmax_update(state, attention, value, levels, max_elements)
    return softmax_finalize(state, bits)
