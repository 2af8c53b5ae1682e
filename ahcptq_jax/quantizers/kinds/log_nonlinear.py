"""The log_nonlinear kind (LNQ of AHCQ-SAM): codes even in ln(1 + alpha*x), by the error of attention times values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import cost
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.quantizers.kinds.registry import GRID_BITS, Kind, Levels, Observation, Statistic, scalar
from ahcptq_jax.quantizers.log_nonlinear import ALPHAS, LogNonlinear
from ahcptq_jax.quantizers.searches import softmax
from ahcptq_jax.quantizers.searches.batches import summed


def _init(shape: tuple[int, ...], bits: int, settings: QuantConfig) -> softmax.SoftmaxState:
    del shape, bits, settings
    return softmax.softmax_init(len(ALPHAS))


def _of_batch(before: Any, observed: Observation, bits: int, settings: QuantConfig) -> softmax.SoftmaxState:
    del before
    if observed.attention is None:
        raise ValueError(
            "The log_nonlinear kind is searched by the values that its probabilities weigh; use it at a softmax."
        )
    empty = softmax.softmax_init(len(ALPHAS))
    probabilities, values = observed.attention(settings.softmax_rows)
    return softmax.log_nonlinear_update(empty, probabilities, values, bits, grid_bits=settings.grid_bits)


def _finalize(states: Mapping[str, Any], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    del settings
    return {path: softmax.log_nonlinear_finalize(state, bits) for path, state in states.items()}


def on_grid(quantizer: LogNonlinear, grid_bits: int) -> LogNonlinear:
    """The quantizer with every value rounded to a whole number of steps, `2^grid_bits - 1` of them to the largest."""
    return dataclasses.replace(quantizer, grid_bits=grid_bits)


def levels(quantizer: LogNonlinear) -> Levels:
    """The rounded values in steps, with the largest at ``2^grid_bits - 1``."""
    grid_bits = quantizer.grid_bits or GRID_BITS
    step = jnp.asarray(quantizer.scale, jnp.float32).reshape(()) / (2.0**grid_bits - 1.0)
    return Levels(step, jnp.float32(0), quantizer.table(grid_bits))


def _level_of(quantizer: LogNonlinear, levels: Levels, codes: jax.Array) -> jax.Array:
    """Levels of codes as a sum over the table's rises: a gather costs several times as much on CPUs."""
    if quantizer.bits > 5:
        return levels.of(codes)
    rises = jnp.diff(levels.table)
    found = jnp.zeros(codes.shape, jnp.int32)
    for index in range(2**quantizer.bits - 1):
        found += jnp.where(codes > index, rises[index], 0)
    return found


KIND = Kind(
    name="log_nonlinear",
    quantizer=LogNonlinear,
    fields=("alpha", "scale"),
    static_fields=("grid_bits",),
    statistic=Statistic(
        _init, _of_batch, summed, _finalize, lambda settings, attention: ("bits", "softmax_rows", "grid_bits")
    ),
    learned=(),
    on_grid=on_grid,
    levels=levels,
    level_of=_level_of,
    unsigned=True,
    has_offset=lambda bits: False,
    has_zero=True,
    describe=lambda quantizer: f"alpha {scalar(quantizer.alpha):g}",
    cost=cost.TABLE,
)
