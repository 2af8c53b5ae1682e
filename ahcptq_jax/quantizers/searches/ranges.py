"""Ranges of uniform activations: averaged minimum and maximum, or those with the least ``|error|^2.4``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ahcptq_jax.quantizers import Uniform
from ahcptq_jax.quantizers.base import check_bits
from ahcptq_jax.quantizers.searches.batches import no_batches, nonempty, summed
from ahcptq_jax.quantizers.searches.loss import loss_power, loss_sums, pad_rows

# Ranges tried, evenly spaced up to that of the values.
RANGE_STEPS = 100
_UNIFORM_COLUMNS = 256
_BINS = 2048
_FINE_SPANS = 9

# Losses (Z,) of a scale with zero points (Z,).
_Losses = Callable[[jax.Array, jax.Array], jax.Array]


class RangeState(NamedTuple):
    """Sums of the batches' extremes.

    Attributes:
        low_sum: of the minima, scalar or ``(C,)``.
        high_sum: of the maxima, as ``low_sum``.
        batches: batches seen.
    """

    low_sum: jax.Array
    high_sum: jax.Array
    batches: jax.Array

    @property
    def minimum(self) -> jax.Array:
        """The mean of the minima."""
        return self.low_sum / self.batches

    @property
    def maximum(self) -> jax.Array:
        """The mean of the maxima."""
        return self.high_sum / self.batches

    def quantizer(self, bits: int) -> Uniform:
        """The uniform quantizer of the mean range."""
        return Uniform.from_range(self.minimum, self.maximum, bits)


def range_init(channels: int | None = None) -> RangeState:
    """Empty state of a per-tensor (None) or per-channel range."""
    zero = jnp.zeros(() if channels is None else (channels,), jnp.float32)
    return RangeState(zero, zero, jnp.float32(0))


@jax.jit
def range_update(state: RangeState, x: jax.Array) -> RangeState:
    """Adds a batch (any shape; channels last if the state is per channel).

    Source: official ``AvgMinMaxObserver`` and ``AvgMinMaxGroupObserver``, which keep the running mean.
    """
    return summed(state, extremes_of(x, state.low_sum.ndim))


def extremes_of(x: jax.Array, axes: int = 0) -> RangeState:
    """The state of one batch alone, per channel where `axes` is 1, else 0."""
    x = jnp.asarray(x, jnp.float32)
    over = tuple(range(x.ndim - axes))
    return RangeState(jnp.min(x, axis=over), jnp.max(x, axis=over), jnp.float32(1))


def search_range(batches: Iterable[jax.Array], bits: int, per_channel: bool = False) -> Uniform:
    """Uniform quantizer of the mean minimum and mean maximum over the batches.

    Args:
        batches: arrays (..., C), at least one.
        bits: code width, 2 to 8.
        per_channel: one range per channel of the last axis instead of one for the tensor.
    """
    check_bits(bits)
    state = None
    for x in nonempty(batches):
        state = range_init(x.shape[-1] if per_channel else None) if state is None else state
        state = range_update(state, x)
    if state is None:
        raise no_batches()
    return state.quantizer(bits)


@functools.partial(jax.jit, static_argnames="bits")
def uniform_mse_update(state: RangeState, x: jax.Array, bits: int) -> RangeState:
    """Adds to the running means the range of ``x`` (any shape) with the least mean ``|error|^2.4``.

    All 100 * 2^bits candidates on a histogram of the values, then the neighbourhood of the best on the values
    themselves. The official nested bounded search stops at a local minimum; a sample of the values, in place of the
    histogram, would miss the few in the tails on which the best range depends.

    Source: official ``SignAvgMSEFastObserver``.
    """
    highest = 2**bits - 1
    values = jnp.asarray(x, jnp.float32).reshape(-1)
    low, high = jnp.min(values), jnp.max(values)
    width = jnp.maximum(high, 0.0) - jnp.minimum(low, 0.0)
    bins, counts = _histogram(values, low, high)
    rows = pad_rows(jnp.pad(values, (0, -values.size % _UNIFORM_COLUMNS)).reshape(-1, _UNIFORM_COLUMNS))

    def histogram_losses(scale: jax.Array, zero_points: jax.Array) -> jax.Array:
        ratio, zero_points = bins / scale, zero_points[:, None]
        error = jnp.abs(jnp.clip(jnp.round(ratio), -zero_points, highest - zero_points) - ratio)
        return jnp.sum(loss_power(error) * counts, axis=1) * loss_power(scale)

    def losses(scale: jax.Array, zero_points: jax.Array) -> jax.Array:
        scales = jnp.broadcast_to(scale, zero_points.shape)[:, None]
        return jnp.sum(loss_sums(rows, scales, zero_points[:, None], highest), axis=1)

    def best(losses: _Losses, spans: jax.Array, zero_points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The best pair of all spans (S,) and zero points (Z,), candidates a span at a time."""
        table = jax.lax.map(lambda span: losses(jnp.maximum(span / highest, 1e-8), zero_points), spans)  # (S, Z)
        chosen = jnp.argmin(table)
        return spans[chosen // zero_points.size], zero_points[chosen % zero_points.size]

    steps = jnp.arange(1, RANGE_STEPS + 1, dtype=jnp.float32) / RANGE_STEPS
    span, zero_point = best(histogram_losses, width * steps, jnp.arange(2**bits, dtype=jnp.float32))
    near = jnp.maximum(span + width / RANGE_STEPS * jnp.linspace(-1.0, 1.0, _FINE_SPANS), width / RANGE_STEPS / 2)
    span, zero_point = best(losses, near, jnp.clip(zero_point + jnp.arange(-1.0, 2.0), 0.0, highest))
    minimum = -zero_point * span / highest
    low, high = jnp.maximum(minimum, jnp.minimum(low, 0.0)), jnp.minimum(minimum + span, high)
    return summed(state, RangeState(low, high, jnp.float32(1)))


def _histogram(values: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means and counts (B,) of the values in even bins from low to high."""
    place = (values - low) * (_BINS / jnp.maximum(high - low, 1e-30))
    place = jnp.clip(place.astype(jnp.int32), 0, _BINS - 1)
    counts = jnp.zeros(_BINS).at[place].add(1.0)
    return jnp.zeros(_BINS).at[place].add(values) / jnp.maximum(counts, 1.0), counts


def search_uniform(batches: Iterable[jax.Array], bits: int) -> Uniform:
    """Per-tensor uniform quantizer of the mean of the batches' best ranges (``uniform_mse_update``)."""
    check_bits(bits)
    state = range_init()
    for x in nonempty(batches):
        state = uniform_mse_update(state, x, bits)
    if not state.batches:
        raise no_batches()
    return state.quantizer(bits)
