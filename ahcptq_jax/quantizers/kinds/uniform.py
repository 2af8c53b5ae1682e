"""The uniform kind: one scale and zero point a tensor, of a range that is observed, cut at percentiles or searched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import cost
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.quantizers.kinds.registry import Kind, Levels, Observation, Statistic, evenly_spaced
from ahcptq_jax.quantizers.searches import percentile, ranges
from ahcptq_jax.quantizers.searches.batches import summed
from ahcptq_jax.quantizers.uniform import Uniform


def _init(shape: tuple[int, ...], bits: int, settings: QuantConfig) -> Any:
    del shape, bits
    return percentile.percentile_init() if settings.act_range == "percentile" else ranges.range_init()


def _of_batch(before: Any, observed: Observation, bits: int, settings: QuantConfig) -> Any:
    del before
    # A plain minimum and maximum leaves no query of an attention map out.
    x = observed.values(0 if settings.act_range == "minmax" else settings.softmax_rows)
    if settings.act_range == "percentile":
        return percentile.percentile_update(percentile.percentile_init(), x, bits)
    if settings.act_range == "mse":
        return ranges.uniform_mse_update(ranges.range_init(), x, bits)
    return ranges.extremes_of(x)


def _finalize(states: Mapping[str, Any], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    if settings.act_range == "percentile":
        return {path: percentile.percentile_finalize(state, bits) for path, state in states.items()}
    return {path: state.quantizer(bits) for path, state in states.items()}


def _depends_on(settings: QuantConfig, attention: bool) -> tuple[str, ...]:
    if settings.act_range == "minmax":
        return ("act_range",)
    return ("act_range", "bits", "softmax_rows") if attention else ("act_range", "bits")


def on_grid(quantizer: Uniform, grid_bits: int) -> Uniform:
    """Itself: codes less the zero point are whole numbers already."""
    del grid_bits
    return quantizer


def levels(quantizer: Uniform) -> Levels:
    """``code - z``; at 8 bits, where that takes 9 bits, ``code - 128`` with an offset.

    A quantizer with a scale for every channel has a step for every channel.
    """
    scale, zero = (jnp.asarray(a, jnp.float32) for a in (quantizer.scale, quantizer.zero_point))
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    codes = jnp.arange(2**quantizer.bits, dtype=jnp.int32).reshape(-1, *(1,) * zero.ndim)
    if quantizer.bits == 8:
        return Levels(scale, scale * (128.0 - zero), jnp.broadcast_to(codes - 128, (256, *zero.shape)))
    return Levels(scale, jnp.zeros_like(scale), codes - jnp.round(zero).astype(jnp.int32))


KIND = Kind(
    name="uniform",
    quantizer=Uniform,
    fields=("scale", "zero_point"),
    statistic=Statistic(_init, _of_batch, summed, _finalize, _depends_on),
    learned=("scale",),
    on_grid=on_grid,
    levels=levels,
    level_of=evenly_spaced,
    always_on_grid=True,
    has_offset=lambda bits: bits == 8,
    has_zero=True,
    cost=cost.UNIFORM,
)
