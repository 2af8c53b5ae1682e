"""Ranges of weights, per output channel, with the least ``|error|^2.4``."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ahcptq_jax.quantizers import Uniform
from ahcptq_jax.quantizers.base import check_bits, qparams_from_range
from ahcptq_jax.quantizers.searches.loss import loss_sums, pad_rows
from ahcptq_jax.quantizers.searches.ranges import RANGE_STEPS

# Minimum, maximum and loss of the best range so far, per channel.
_Best = tuple[jax.Array, jax.Array, jax.Array]


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


@functools.partial(jax.jit, static_argnames=("bits", "side"))
def _search_weight(rows: jax.Array, bits: int, side: str) -> _Best:
    """Best (minimum, maximum, mean loss), each (C,), of rows (R, C)."""
    highest = 2**bits - 1
    count = rows.shape[0]
    low, high = jnp.min(rows, axis=0), jnp.max(rows, axis=0)
    width = jnp.maximum(high, 0.0) - jnp.minimum(low, 0.0) if side == "both" else jnp.maximum(jnp.abs(low), high)
    rows = pad_rows(rows)
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
        loss = loss_sums(rows, scale, zero_point, highest) / count
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
