"""The grouped kind (CAG): channels share a few scales and zero points, found by k-means down a ladder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import cost
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.quantizers.grouped import Grouped
from ahcptq_jax.quantizers.kinds.registry import (
    GRID_BITS,
    ChannelGroups,
    Kind,
    Levels,
    Observation,
    Statistic,
    evenly_spaced,
)
from ahcptq_jax.quantizers.searches import grouping, ranges
from ahcptq_jax.quantizers.searches.batches import summed
from ahcptq_jax.quantizers.uniform import Uniform

# Group scales are 1 to so many times the step: a multiplication that an accelerator does in a few adds.
MOST_STEPS = 8


def _init(shape: tuple[int, ...], bits: int, settings: QuantConfig) -> Any:
    del bits, settings
    return ranges.range_init(shape[-1])


def _of_batch(before: Any, observed: Observation, bits: int, settings: QuantConfig) -> Any:
    del before, bits, settings
    return ranges.extremes_of(observed.values(0), 1)


def _finalize(states: Mapping[str, Any], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    return group_channels({path: state.quantizer(bits) for path, state in states.items()}, bits, settings)


def group_channels(per_channel: Mapping[str, Uniform], bits: int, settings: QuantConfig) -> dict[str, Quantizer]:
    """CAG without reconstruction: down the ladder 8G, 4G, 2G, G at once (paper section on CAG).

    All sites of one width are grouped in one call.
    """
    grouped: dict[str, Quantizer] = {}
    by_width: dict[int, list[str]] = {}
    for path, quantizer in per_channel.items():
        by_width.setdefault(quantizer.scale.shape[0], []).append(path)
    for channels, paths in by_width.items():
        scales, zeros = (
            jnp.stack([getattr(per_channel[path], name) for path in paths]) for name in ("scale", "zero_point")
        )
        if settings.groups == 0 or settings.groups >= channels:
            labels = jnp.broadcast_to(jnp.arange(channels), scales.shape)
        else:
            rungs = grouping.ladder(scales, zeros, settings.groups, settings.group_metric, bits)
            scales, zeros, labels = rungs[-1]
        rows = zip(paths, np.asarray(scales), np.asarray(zeros), np.asarray(labels), strict=True)
        for path, scale, zero, label in rows:
            grouped[path] = Grouped(jnp.asarray(scale), jnp.asarray(zero), jnp.asarray(label), bits)
    return grouped


# ------------------------------------------------------------------------------------------------- CAG's ladder


def _padded(quantizer: Grouped) -> Grouped:
    missing = np.shape(quantizer.groups)[0] - np.shape(quantizer.scale)[0]
    scale, zero = (np.pad(np.asarray(a), (0, missing), mode="edge") for a in (quantizer.scale, quantizer.zero_point))
    return dataclasses.replace(quantizer, scale=scale, zero_point=zero)


def _merged(quantizer: Grouped, groups: int, final: int, metric: str) -> Grouped:
    room = min(grouping.ladder_stages(final)[0], np.shape(quantizer.groups)[0])
    alone = quantizer.per_channel()
    scale, zero_point, labels = grouping.group_padded(
        alone.scale, alone.zero_point, jnp.int32(groups), room=room, metric=metric, bits=quantizer.bits
    )
    return dataclasses.replace(quantizer, scale=scale, zero_point=zero_point, groups=labels)


def _trimmed(quantizer: Grouped, count: int) -> Grouped:
    return dataclasses.replace(quantizer, scale=quantizer.scale[:count], zero_point=quantizer.zero_point[:count])


# ------------------------------------------------------------------------------------------------------ the grid


def _multiples(quantizer: Grouped, grid_bits: int) -> tuple[jax.Array, jax.Array]:
    """The step of the nearest grid, and the whole multiples of it that the groups' scales become.

    A multiple `a` is at most `MOST_STEPS`; `a` times the last code fits in `grid_bits` unsigned bits, and `a` times any
    code less its zero point in 8 signed ones. The largest scale is taken as 1, 2, … `MOST_STEPS` steps in turn, and the
    step refined by least squares; the number with the least relative error wins, weighed by how many channels each
    group has, so that room without a channel counts for nothing. Of equally good ones the smallest wins, so that a
    quantizer on the grid is left as it is.

    Returns:
        float32 step () and float32 multiples (G,).
    """
    scale, zero = (jnp.asarray(a, jnp.float32) for a in (quantizer.scale, quantizer.zero_point))
    channels = jnp.zeros_like(scale).at[jnp.asarray(quantizer.groups)].add(1.0)
    largest = jnp.max(jnp.where(channels > 0, scale, 0.0))
    most = min(MOST_STEPS, (2**grid_bits - 1) // (2**quantizer.bits - 1))
    if most <= 1 or quantizer.bits >= GRID_BITS - 1:
        # No room for two scales: the largest keeps every range whole.
        return largest, jnp.ones_like(scale)
    farthest = jnp.maximum(zero, 2.0**quantizer.bits - 1.0 - zero)  # from the zero point, in codes
    room = jnp.clip(jnp.floor(127.0 / farthest), 1.0, most)
    # A smaller step would cut off the range of a group that has no room for more of them.
    least_step = jnp.max(jnp.where(channels > 0, scale / room, 0.0))
    steps = jnp.maximum(largest / jnp.arange(1.0, most + 1.0), least_step)  # (M,)
    multiples = jnp.clip(jnp.round(scale / steps[:, None]), 1.0, room)  # (M, G)
    ratio = multiples / scale
    steps = jnp.sum(channels * ratio, 1) / jnp.sum(channels * jnp.square(ratio), 1)
    error = jnp.sqrt(jnp.sum(channels * jnp.square(steps[:, None] * ratio - 1.0), 1) / jnp.sum(channels))
    # More steps must be better by more than float rounding.
    best = jnp.argmin(error + 1e-5 * jnp.arange(most))
    return steps[best], multiples[best]


def on_grid(quantizer: Grouped, grid_bits: int) -> Grouped:
    """The groups with scales that are whole multiples of one step; see `_multiples`.

    With codes nearly as wide as the grid all groups have one scale, and only their zero points differ.
    """
    step, multiples = _multiples(quantizer, grid_bits)
    return dataclasses.replace(quantizer, scale=multiples * step)


def levels(quantizer: Grouped) -> Levels:
    """``a * (code - z)`` of each channel's group; at 8 bits ``code - 128`` and an offset for each channel."""
    labels = jnp.asarray(quantizer.groups)
    zero = jnp.round(jnp.asarray(quantizer.zero_point, jnp.float32))[labels].astype(jnp.int32)
    codes = jnp.arange(2**quantizer.bits, dtype=jnp.int32)[:, None]
    step, multiples = _multiples(quantizer, GRID_BITS)
    if quantizer.bits == 8:
        offset = step * (128 - zero).astype(jnp.float32)
        return Levels(step, offset, jnp.broadcast_to(codes - 128, (256, len(labels))))
    return Levels(step, jnp.float32(0), multiples.astype(jnp.int32)[labels] * (codes - zero))


KIND = Kind(
    name="grouped",
    quantizer=Grouped,
    fields=("scale", "zero_point"),
    channel_fields=("groups",),
    statistic=Statistic(_init, _of_batch, summed, _finalize, lambda settings, attention: ()),
    learned=("scale",),
    on_grid=on_grid,
    levels=levels,
    level_of=evenly_spaced,
    has_offset=lambda bits: bits == 8,
    channel_groups=ChannelGroups(
        count=lambda quantizer: int(np.size(quantizer.scale)),
        labels=lambda quantizer: quantizer.groups,
        padded=_padded,
        merged=_merged,
        trimmed=_trimmed,
    ),
    cost=cost.GROUPED,
)
