"""The log2 kind (AGQ): logarithmic codes of softmax outputs, by the error of attention times values."""

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
from ahcptq_jax.quantizers.log2 import Log2
from ahcptq_jax.quantizers.searches import softmax
from ahcptq_jax.quantizers.searches.batches import summed


def _init(shape: tuple[int, ...], bits: int, settings: QuantConfig) -> softmax.SoftmaxState:
    del shape, bits, settings
    return softmax.softmax_init()


def _of_batch(before: Any, observed: Observation, bits: int, settings: QuantConfig) -> softmax.SoftmaxState:
    del before
    if observed.attention is None:
        raise ValueError("The log2 kind is searched by the values that its probabilities weigh; use it at a softmax.")
    empty = softmax.softmax_init()
    probabilities, values = observed.attention(settings.softmax_rows)
    return softmax.softmax_update(empty, probabilities, values, 2**bits - 1, grid_bits=settings.grid_bits)


def _finalize(states: Mapping[str, Any], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    del settings
    return {path: softmax.softmax_finalize(state, bits) for path, state in states.items()}


def on_grid(quantizer: Log2, grid_bits: int) -> Log2:
    """The quantizer with every value rounded to a whole number of steps, `2^grid_bits - 1` of them to the largest."""
    return dataclasses.replace(quantizer, grid_bits=grid_bits)


def levels(quantizer: Log2) -> Levels:
    """``round(top * 2^(-k/tau))`` with the largest value at `top`, and 0."""
    table = _whole(quantizer, jnp.arange(2**quantizer.bits, dtype=jnp.int32))
    return Levels(jnp.asarray(quantizer.scale, jnp.float32).reshape(()) / _top(quantizer), jnp.float32(0), table)


def _top(quantizer: Log2) -> int:
    return 2 ** (quantizer.grid_bits or GRID_BITS) - 1


def _whole(quantizer: Log2, codes: jax.Array) -> jax.Array:
    unit = Log2(jnp.float32(1), quantizer.tau, quantizer.bits)
    return jnp.round(_top(quantizer) * unit.decode(codes)).astype(jnp.int32)


KIND = Kind(
    name="log2",
    quantizer=Log2,
    fields=("scale", "tau"),
    whole_fields=("tau",),
    static_fields=("grid_bits",),
    statistic=Statistic(
        _init, _of_batch, summed, _finalize, lambda settings, attention: ("bits", "softmax_rows", "grid_bits")
    ),
    learned=("scale",),
    on_grid=on_grid,
    levels=levels,
    level_of=lambda quantizer, levels, codes: _whole(quantizer, codes),
    unsigned=True,
    has_offset=lambda bits: False,
    has_zero=True,
    describe=lambda quantizer: f"tau {scalar(quantizer.tau):.0f}",
    cost=cost.LOG2,
)
