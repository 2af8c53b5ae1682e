"""Scales of softmax outputs, by the error of attention times values: AGQ's with its tau, LNQ's with its alpha."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import Log2, LogNonlinear, log2_fake_quant
from ahcptq_jax.quantizers.base import check_bits
from ahcptq_jax.quantizers.log2 import TAUS
from ahcptq_jax.quantizers.log_nonlinear import ALPHAS, log_nonlinear_values
from ahcptq_jax.quantizers.searches.batches import COARSE_ELEMENTS, no_batches
from ahcptq_jax.quantizers.searches.loss import loss_power

# The coarse search takes no fewer of a large attention's rows than one in so many.
MOST_THINNED = 12
# From more values on, the fine search takes fewer points.
FINE_ELEMENTS = 2**22


class SoftmaxState(NamedTuple):
    """Running statistics of the softmax search, one entry for each of n taus or alphas.

    Attributes:
        scale_sum: ``(n,)`` sum over batches of the best scale.
        error_sum: ``(n,)`` sum over batches of its loss.
        batches: batches seen.
    """

    scale_sum: jax.Array
    error_sum: jax.Array
    batches: jax.Array


def softmax_init(candidates: int = len(TAUS)) -> SoftmaxState:
    """Empty state for so many taus or alphas."""
    return SoftmaxState(jnp.zeros(candidates, jnp.float32), jnp.zeros(candidates, jnp.float32), jnp.float32(0))


@functools.partial(jax.jit, static_argnames=("levels", "max_elements", "grid_bits"))
def softmax_update(
    state: SoftmaxState,
    attention: jax.Array,
    value: jax.Array,
    levels: int,
    max_elements: int | None = 2**24,
    grid_bits: int = 0,
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
        grid_bits: the losses are those of values on a grid of so many bits; 0 for none. There a probability below half
            a step is zero, so that a smaller scale, or more levels an octave, may lose less.

    Source: official ``LogAvgMSEFastObserver``.
    """
    tau = jnp.asarray(TAUS, jnp.int32)

    def error(attention: jax.Array, scale: jax.Array, tau: jax.Array) -> jax.Array:
        return log2_fake_quant(attention, scale, tau, levels, grid_bits) - attention

    maximum = jnp.max(jnp.asarray(attention, jnp.float32))
    low = jnp.minimum(0.1, 0.01 * maximum)
    return _add_best(state, attention, value, tau, low, maximum, error, max_elements)


@functools.partial(jax.jit, static_argnames=("bits", "max_elements", "grid_bits"))
def log_nonlinear_update(
    state: SoftmaxState,
    attention: jax.Array,
    value: jax.Array,
    bits: int,
    max_elements: int | None = 2**24,
    grid_bits: int = 0,
) -> SoftmaxState:
    """Adds a batch: the best scale and its loss for every alpha; arguments as in `softmax_update`.

    Source: AHCQ-SAM's search for LNQ, which bounds the scale to ``[max(1e-4, max / 10), max]``.
    """
    alpha = jnp.asarray(ALPHAS, jnp.float32)

    def error(attention: jax.Array, scale: jax.Array, alpha: jax.Array) -> jax.Array:
        return log_nonlinear_values(attention, alpha, scale, bits, grid_bits) - attention

    maximum = jnp.max(jnp.asarray(attention, jnp.float32))
    low = jnp.minimum(jnp.maximum(1e-4, 0.1 * maximum), maximum)
    return _add_best(state, attention, value, alpha, low, maximum, error, max_elements)


# (attention, scale, tau or alpha) -> what quantization adds to the attention.
QuantizationError = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _add_best(
    state: SoftmaxState,
    attention: jax.Array,
    value: jax.Array,
    tau: jax.Array,
    low: jax.Array,
    high: jax.Array,
    error: QuantizationError,
    max_elements: int | None,
) -> SoftmaxState:
    """Adds the best scale between two bounds for each tau or alpha (n,), and its loss; see `softmax_update`."""
    attention = jnp.asarray(attention, jnp.float32).reshape(-1, *attention.shape[-2:])
    value = jnp.asarray(value, jnp.float32).reshape(-1, *value.shape[-2:])

    def thinned(limit: int | None) -> jax.Array:
        stride = 1 if limit is None else math.ceil(attention.size / limit)
        return attention[:, :: max(1, min(stride, attention.shape[1]))]

    fine = thinned(max_elements)
    # Of fewer rows, the valley of the loss lies elsewhere.
    coarse = thinned(max(COARSE_ELEMENTS, fine.size // MOST_THINNED))
    # (rows, points of the grid, half-width of the next one in grid steps). Small tensors are rough and cheap, large
    # ones smooth and dear.
    if fine.size <= COARSE_ELEMENTS:
        rounds = [(fine, 33, 1.0), (fine, 33, 4.0), (fine, 65, 1.0), (fine, 17, 1.0)]
    elif fine.size <= FINE_ELEMENTS:
        rounds = [(coarse, 33, 3.0), (fine, 17, 1.0)]
    else:
        rounds = [(coarse, 33, 2.0), (fine, 9, 1.0)]
    left, right = jnp.full(tau.shape, low), jnp.full(tau.shape, high)
    best_scale = left
    best_loss = jnp.full(tau.shape, jnp.inf)
    for rows, points, reach in rounds:
        scales = left[:, None] + (right - left)[:, None] * jnp.linspace(0.0, 1.0, points)  # (n, points)
        losses = _softmax_losses(rows, value, tau, scales, error)
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
    index, scale = _best(state)
    return Log2(scale, jnp.int32(TAUS[index]), bits)


def log_nonlinear_finalize(state: SoftmaxState, bits: int) -> LogNonlinear:
    """The alpha with the least total loss, and the mean of its best scales."""
    index, scale = _best(state)
    return LogNonlinear(jnp.float32(ALPHAS[index]), scale, bits)


def _best(state: SoftmaxState) -> tuple[int, jax.Array]:
    """The index of the least total loss, and the mean of the best scales there."""
    if not state.batches:
        raise no_batches()
    if not np.all(np.isfinite(np.asarray(state.error_sum))):
        raise ValueError("the softmax losses are not finite; the attention or the values hold NaN or infinity")
    index = int(np.argmin(np.asarray(state.error_sum)))
    return index, state.scale_sum[index] / state.batches


def search_softmax(
    attention_batches: Iterable[jax.Array],
    value_batches: Iterable[jax.Array],
    bits: int,
    levels: int | None = None,
    max_elements: int | None = 2**24,
    grid_bits: int = 0,
) -> Log2:
    """AGQ's search: tau in {1, 2, 4} and the scale with the least mean ``|A_q V - A V|^2.4``.

    Args:
        attention_batches: softmax outputs (..., queries, keys), at least one.
        value_batches: as many values (..., keys, width).
        bits: code width, 2 to 8.
        levels: number of nonzero levels; default ``2^bits - 1``, what the quantizer has (``2^bits``: official).
        max_elements: see ``softmax_update``.
        grid_bits: see ``softmax_update``; what is returned is off the grid.

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
        state = softmax_update(state, attention, value, levels, max_elements, grid_bits)
    return softmax_finalize(state, bits)


def _softmax_losses(
    attention: jax.Array, value: jax.Array, tau: jax.Array, scales: jax.Array, error: QuantizationError
) -> jax.Array:
    """Mean ``|A_q V - A V|^2.4`` (n, s) for each tau (n,) and its scales (n, s), of (B, R, K) times (B, K, D)."""
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
            added = error(attention, scale, tau)
            return jnp.mean(loss_power(jnp.abs(jnp.matmul(added, value, precision=jax.lax.Precision.HIGHEST))))

        return jnp.mean(jax.lax.map(block_loss, blocks))

    pairs = (scales.reshape(-1), jnp.repeat(tau, scales.shape[1]))
    return jax.lax.map(loss, pairs).reshape(scales.shape)
