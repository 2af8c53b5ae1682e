"""The hybrid kind (HLUQ): logarithmic codes below a breakpoint and uniform ones above it.

The breakpoint is searched by the output error of the layer behind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import cost
from ahcptq_jax.quantizers.base import Quantizer, negative_power_of_two
from ahcptq_jax.quantizers.hybrid import Hybrid
from ahcptq_jax.quantizers.kinds.registry import GRID_BITS, Kind, Levels, Observation, Statistic, scalar
from ahcptq_jax.quantizers.searches import hybrid as searches
from ahcptq_jax.quantizers.searches.batches import draw_rows, summed
from ahcptq_jax.quantizers.searches.ranges import extremes_of

# Of `hluq_fine`.
FINE_RANGE_RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
FINE_GRID_RATES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8)


def breakpoints(bits: int, fine: bool) -> np.ndarray:
    """HLUQ's candidates (N, 2), see `searches.hybrid_candidates`: the paper's, or a finer grid that has them."""
    if not fine:
        return searches.hybrid_candidates(bits)
    return searches.hybrid_candidates(bits, FINE_RANGE_RATES, FINE_GRID_RATES)


def _init(shape: tuple[int, ...], bits: int, settings: QuantConfig) -> searches.HybridState:
    del shape
    return searches.hybrid_init(breakpoints(bits, settings.hluq_fine))


def _of_batch(before: Any, observed: Observation, bits: int, settings: QuantConfig) -> searches.HybridState:
    if observed.activations is None or observed.kernel is None:
        raise ValueError("The hybrid kind is searched by the output error of a layer; use it at the input of one.")
    x = observed.activations
    picked = draw_rows(x.size // x.shape[-1], settings.hluq_rows, observed.key)
    candidates = breakpoints(bits, settings.hluq_fine)
    reach = settings.hluq_reach_maximum
    return searches.hybrid_of_batch(before.range, x, observed.kernel, candidates, bits, reach, picked)


def _outline(empty: Any, observed: Observation) -> searches.HybridState:
    return empty._replace(range=extremes_of(observed.values(0)))


def _finalize(states: Mapping[str, Any], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    candidates, reach = breakpoints(bits, settings.hluq_fine), settings.hluq_reach_maximum
    return {path: searches.hybrid_finalize(s, candidates, bits, reach).quantizer for path, s in states.items()}


def _describe(quantizer: Hybrid) -> str:
    log, low, step = (scalar(x) for x in (quantizer.log_levels, quantizer.scale_log, quantizer.scale_uniform))
    minimum = scalar(quantizer.minimum)
    return f"{log:.0f} of {2**quantizer.bits} codes log up to {low:.3g} above {minimum:.3g}, then steps of {step:.3g}"


# ------------------------------------------------------------------------------------------------------ the grid


@functools.cache
def _whole_forms(bits: int, grid_bits: int) -> np.ndarray:
    """All forms that fit the grid, float32 (3, N): log levels L, their largest level `foot`, and `a`.

    The log part is ``foot * 2^-k`` for codes ``k < L``, `foot` being a multiple of ``2^(L-1)``, and the uniform part
    ``foot + a * n``. Of forms that are multiples of one another the smallest stands for all.
    """
    most, codes = 2**grid_bits - 1, 2**bits
    forms = []
    for log_levels in range(1, min(codes - 2, grid_bits) + 1):
        steps, octaves = codes - 1 - log_levels, 2 ** (log_levels - 1)
        for c in range(1, most // octaves + 1):
            several = range(1, (most - c * octaves) // steps + 1)
            forms += [(log_levels, c * octaves, a) for a in several if math.gcd(c, a) == 1]
    return np.array(forms, np.float32).reshape(-1, 3).T


def _nearest_form(quantizer: Hybrid, grid_bits: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(step, log levels, foot, a), float32 scalars: the form of `_whole_forms` nearest to a quantizer.

    Its largest value stays where it is. What counts is how far the ratio of its two scales moves, relative to itself,
    and where octaves are given up, the share of the log part that they leave without a code.
    """
    forms = _whole_forms(quantizer.bits, grid_bits)
    if not forms.size:
        raise ValueError(f"Codes of {quantizer.bits} bits do not fit on a grid of {grid_bits}; give it more bits.")
    scale_log, scale_uniform, log_levels = (
        jnp.asarray(a, jnp.float32).reshape(())
        for a in (quantizer.scale_log, quantizer.scale_uniform, quantizer.log_levels)
    )
    log, foot, a = jnp.asarray(forms)
    last = 2.0**quantizer.bits - 1.0
    reach = scale_uniform * (last - log_levels)
    moved = jnp.abs(jnp.log(foot / a * (reach / (last - log)) / scale_log))
    lost = jnp.where(log < log_levels, jnp.exp2(1.0 - log), 0.0)
    best = jnp.argmin(jnp.where(log > log_levels, jnp.inf, moved + lost))
    log, foot, a = log[best], foot[best], a[best]
    return (scale_log + reach) / (foot + a * (last - log)), log, foot, a


def on_grid(quantizer: Hybrid, grid_bits: int) -> Hybrid:
    """The quantizer whose values above its minimum are whole numbers of one step, `2^grid_bits - 1` at most.

    Where the grid is too narrow for its octaves (from 5 bits on) the lowest of them go to the uniform part.
    """
    step, log, foot, a = _nearest_form(quantizer, grid_bits)
    shape = jnp.shape(quantizer.scale_log)
    return dataclasses.replace(
        quantizer,
        scale_log=(step * foot).reshape(shape),
        scale_uniform=(step * a).reshape(shape),
        log_levels=log.reshape(jnp.shape(quantizer.log_levels)),
    )


def levels(quantizer: Hybrid) -> Levels:
    """``foot * 2^-k``, 0, and ``foot + a * n``, counted from the minimum, which is the offset."""
    step, log, foot, a = _nearest_form(quantizer, GRID_BITS)
    codes = jnp.arange(2**quantizer.bits, dtype=jnp.int32)
    logarithmic = jnp.where(codes < log, foot * negative_power_of_two(codes), 0.0)
    table = jnp.where(codes <= log, logarithmic, foot + a * (codes - log))
    return Levels(step, jnp.asarray(quantizer.minimum, jnp.float32).reshape(()), jnp.round(table).astype(jnp.int32))


def level_of(quantizer: Hybrid, levels: Levels, codes: jax.Array) -> jax.Array:
    """The levels of codes by a shift, or a multiplication."""
    log = jnp.asarray(quantizer.log_levels, jnp.float32).reshape(()).astype(jnp.int32)
    foot = levels.table[0]
    a = (levels.table[-1] - foot) // (2**quantizer.bits - 1 - log)
    logarithmic = jnp.where(codes < log, jnp.right_shift(foot, jnp.minimum(codes, 31)), 0)
    return jnp.where(codes <= log, logarithmic, foot + a * (codes - log))


KIND = Kind(
    name="hybrid",
    quantizer=Hybrid,
    fields=("minimum", "scale_log", "scale_uniform", "log_levels"),
    statistic=Statistic(
        _init,
        _of_batch,
        summed,
        _finalize,
        lambda settings, attention: ("bits", "hluq_fine", "hluq_reach_maximum", "hluq_rows"),
        _outline,
    ),
    learned=("scale_log", "scale_uniform"),
    on_grid=on_grid,
    levels=levels,
    level_of=level_of,
    unsigned=True,
    describe=_describe,
    cost=cost.HYBRID,
)
