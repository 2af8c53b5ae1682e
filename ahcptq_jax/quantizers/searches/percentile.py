"""Percentile calibration of a per-tensor uniform quantizer: how much of each tail to cut off, chosen by loss.

The official code computes the loss of every percentile and then always keeps the last one; here the least loss
wins. Streams like the searches of `search`: init, update, finalize.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import Uniform

# Shares of the values at or below the upper end; as many lie at or above the lower end.
PERCENTILES = (0.99, 0.999, 0.9999, 0.99999)
# Percentiles of larger tensors are those of an evenly spaced part, which still has ten values beyond the last one.
_MOST_SORTED = 2**20


class PercentileState(NamedTuple):
    """Running statistics, one entry for each percentile.

    Attributes:
        low: ``(P,)`` sum over batches of the lower ends.
        high: ``(P,)`` of the upper ends.
        loss: ``(P,)`` of the mean squared errors.
        batches: batches seen.
    """

    low: jax.Array
    high: jax.Array
    loss: jax.Array
    batches: jax.Array


def percentile_init() -> PercentileState:
    """Empty state."""
    zero = jnp.zeros(len(PERCENTILES), jnp.float32)
    return PercentileState(zero, zero, zero, jnp.float32(0))


@functools.partial(jax.jit, static_argnames="bits")
def percentile_update(state: PercentileState, x: jax.Array, bits: int) -> PercentileState:
    """Adds a batch of any shape: each percentile's range and the error of its quantizer on the whole batch."""
    values = jnp.asarray(x, jnp.float32).reshape(-1)
    ordered = jnp.sort(values[:: -(-values.size // _MOST_SORTED)])
    share = jnp.asarray(PERCENTILES, jnp.float32)
    # The nearest value and not one between two: a tail of few values is not thinned by the empty space before it.
    beyond = jnp.round((1.0 - share) * (ordered.size - 1)).astype(jnp.int32)
    low, high = ordered[beyond], ordered[ordered.size - 1 - beyond]

    def loss(ends: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(jnp.square(Uniform.from_range(*ends, bits).fake_quant(values) - values))

    losses = jax.lax.map(loss, (low, high))
    return PercentileState(state.low + low, state.high + high, state.loss + losses, state.batches + 1)


def percentile_finalize(state: PercentileState, bits: int) -> Uniform:
    """The quantizer of the percentile with the least loss over all batches, of its mean range.

    Raises:
        ValueError: without batches, or if the losses are not finite.
    """
    if not state.batches:
        raise ValueError("calibration needs at least one batch with data, got none; pass calibration images")
    if not np.all(np.isfinite(np.asarray(state.loss))):
        raise ValueError("the percentiles' losses are not finite; the activations hold NaN or infinity")
    best = int(np.argmin(np.asarray(state.loss)))
    return Uniform.from_range(state.low[best] / state.batches, state.high[best] / state.batches, bits)
