"""The registry of quantizer kinds: everything that the rest of the package asks about a quantizer.

A kind is one `Kind` record: its quantizer class, what a file stores of it, the statistic that calibrates it, what is
learned of it, its whole levels on the integer grid, the line that describes it and what it costs. Calibration,
reconstruction, runtime, file format, summary and cost model ask the record and name no kind, so that a new kind is one
file that calls `register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.quantizers.cost import Cost
from sam_flax.errors import InputError

# Width of the levels of a quantizer that says nothing else.
GRID_BITS = 8


class Levels(NamedTuple):
    """A quantizer as a codebook on one integer grid: the value of a code is ``offset + step * table[code]``.

    The following conditions hold:
      * `table` holds whole numbers that fit in 8 bits, signed (-128..127) or unsigned (0..255).

    Attributes:
        step: float32 scalar; (C,) where every channel has a step of its own, which no product on levels takes.
        offset: float32 scalar, or (C,) with one for each channel of the last axis.
        table: int32 (2^bits,), or (2^bits, C) with levels of each channel's own.
    """

    step: jax.Array
    offset: jax.Array
    table: jax.Array

    def of(self, codes: jax.Array) -> jax.Array:
        """int32 levels of integer codes (..., C)."""
        codes = jnp.asarray(codes).astype(jnp.int32)
        if self.table.ndim == 1:
            return self.table[codes]
        return self.table[codes, jnp.arange(self.table.shape[1])]

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer codes (..., C)."""
        return self.offset + self.step * self.of(codes).astype(jnp.float32)


def evenly_spaced(quantizer: Any, levels: Levels, codes: jax.Array) -> jax.Array:
    """`Kind.level_of` where the levels of a channel are evenly spaced."""
    del quantizer
    return levels.table[0] + codes * (levels.table[1] - levels.table[0])


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a statistic is given of one batch at one site; every part may be traced.

    Attributes:
        key: for whatever is drawn.
        attention: at a softmax, a function of the most queries per head to take (0: all), which are drawn by `key`;
            it returns the probabilities (..., M, T) and the values (..., T, d) that they weigh. Else None.
        activations: elsewhere the activations (..., C).
        kernel: at the input of a layer, the layer's weight (..., C, out).
    """

    key: jax.Array
    attention: Callable[[int], tuple[jax.Array, jax.Array]] | None = None
    activations: jax.Array | None = None
    kernel: jax.Array | None = None

    def values(self, queries: int) -> jax.Array:
        """The activations, or the probabilities of at most so many queries per head (0: all)."""
        if self.attention is not None:
            return self.attention(queries)[0]
        assert self.activations is not None
        return self.activations


@dataclasses.dataclass(frozen=True)
class Statistic:
    """How calibration finds the quantizers of a kind: what a batch tells, and how that of several is one.

    Batches may be looked at by several devices at once. What they tell is merged in the order of the batches, so that
    the bits are those of one device.

    Attributes:
        init: ``(shape, bits, settings) -> state`` of a site of this shape before the first batch.
        of_batch: ``(before, observation, bits, settings) -> state`` of this batch alone; traced. `before` is the state
            of the batches before it, of which nothing may be read but what `outline` makes: for most kinds nothing.
        merge: ``(before, batch) -> state`` of both; traced, and associative but for rounding.
        finalize: ``(states by site, bits, settings) -> quantizers by site``, for all sites of one width at once.
        depends_on: ``(settings, attention) -> names`` of the settings that `init` and `update` read, "bits" among them
            if they read the width; `attention` says whether the site is a softmax. What is not named neither costs a
            compilation nor a second pass over the images.
        outline: ``(empty, observation) -> state`` of a batch as far as `of_batch` of a later one looks at it, the rest
            as in the empty state; None if that is nothing. Where devices look at batches at once, outlines are
            exchanged first.
    """

    init: Callable[[tuple[int, ...], int, QuantConfig], Any]
    of_batch: Callable[[Any, Observation, int, QuantConfig], Any]
    merge: Callable[[Any, Any], Any]
    finalize: Callable[[Mapping[str, Any], int, QuantConfig], dict[str, Quantizer]]
    depends_on: Callable[[QuantConfig, bool], tuple[str, ...]]
    outline: Callable[[Any, Observation], Any] | None = None


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """What a kind with groups of channels adds, so that CAG's ladder can go on while scales are learned.

    Attributes:
        count: number of groups.
        labels: (C,) group of each channel.
        padded: the same quantizer with room for one group per channel, so that all numbers of groups are one program.
        merged: ``(quantizer, groups, final, metric)`` -> its channels in so many groups, with room for the widest rung
            of a ladder that ends at `final` groups.
        trimmed: the quantizer with room for so many groups alone.
    """

    count: Callable[[Any], int]
    labels: Callable[[Any], jax.Array]
    padded: Callable[[Any], Any]
    merged: Callable[[Any, int, int, str], Any]
    trimmed: Callable[[Any, int], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """All that is known of a kind of quantizer.

    Attributes:
        name: in recipes and files.
        quantizer: its class, a frozen pytree dataclass as `base.Quantizer` describes.
        fields: its numbers, float32 scalars or vectors of one length, as the file stores them.
        channel_fields: its whole numbers per channel, (C,) each, stored as integers.
        whole_fields: of `fields` those that are int32 in memory.
        static_fields: its whole numbers besides `bits` that are not array leaves.
        statistic: how it is calibrated.
        learned: of `fields` those that reconstruction learns; their gradients are scaled by the class's
            `with_gradient_scale`.
        on_grid: ``(quantizer, grid_bits)`` -> the nearest one whose values are whole levels of so many bits; traceable.
        levels: the levels of a quantizer, exact if it is on the grid and else those of the nearest one that is;
            traceable.
        channel_groups: see `ChannelGroups`; None for a kind without groups.
        level_of: ``(quantizer, its levels, int32 codes) -> int32 levels`` by arithmetic, for quantizers on the grid;
            equal to the table, which costs a gather for every value and so several times as much on CPUs.
        always_on_grid: whether its codes are whole levels whatever its numbers are.
        unsigned: whether its levels are 0..255; else they are -128..127.
        has_offset: whether there may be an offset at so many bits.
        has_zero: whether zero is one of its levels, so that borders can be padded.
        describe: the numbers of a quantizer that say how it divides its range, in a few words.
        cost: what a cost model counts.
    """

    name: str
    quantizer: type
    fields: tuple[str, ...]
    channel_fields: tuple[str, ...] = ()
    whole_fields: tuple[str, ...] = ()
    static_fields: tuple[str, ...] = ()
    statistic: Statistic
    learned: tuple[str, ...]
    on_grid: Callable[[Any, int], Any]
    levels: Callable[[Any], Levels]
    level_of: Callable[[Any, Levels, jax.Array], jax.Array] = lambda quantizer, levels, codes: levels.of(codes)
    always_on_grid: bool = False
    unsigned: bool = False
    has_offset: Callable[[int], bool] = lambda bits: True
    has_zero: bool = False
    channel_groups: ChannelGroups | None = None
    describe: Callable[[Any], str] = lambda quantizer: ""
    cost: Cost = Cost()

    def groups(self, quantizer: Any) -> int:
        """Distinct scales of its channels; 0 for a kind without groups."""
        return 0 if self.channel_groups is None else self.channel_groups.count(quantizer)

    def learned_values(self, quantizer: Any) -> dict[str, jax.Array]:
        """What reconstruction learns of a quantizer, by name."""
        return {name: getattr(quantizer, name) for name in self.learned}


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Adds a kind to the registry and returns it.

    Raises:
        ValueError: if another kind has its name or its class, or it names a field that its class has not.
    """
    names = {field.name for field in dataclasses.fields(kind.quantizer)}
    used = {*kind.fields, *kind.channel_fields, *kind.static_fields, "bits"}
    if used != names or not {*kind.learned, *kind.whole_fields} <= set(kind.fields):
        odd = sorted((used ^ names) | ({*kind.learned, *kind.whole_fields} - set(kind.fields)))
        raise ValueError(f"Kind {kind.name!r} and its class disagree about the field {odd[0]!r}.")
    for other in _KINDS.values():
        if (other.name == kind.name) != (other.quantizer is kind.quantizer):
            raise ValueError(f"Kind {kind.name!r} has the name or the class of the registered kind {other.name!r}.")
    _KINDS[kind.name] = kind
    return kind


def kind_names() -> tuple[str, ...]:
    """The names of all registered kinds, in the order of their registration."""
    return tuple(_KINDS)


def kind_named(name: str) -> Kind:
    """The kind of this name.

    Raises:
        InputError: if none is registered under it.
    """
    if name not in _KINDS:
        raise InputError(f"Quantizer kind {name!r} is unknown; use one of {', '.join(_KINDS)}, or register it first.")
    return _KINDS[name]


def kind_of(quantizer: Quantizer) -> Kind:
    """The kind that a quantizer is of.

    Raises:
        ValueError: if its class is none of a registered kind.
    """
    for kind in _KINDS.values():
        if type(quantizer) is kind.quantizer:
            return kind
    raise ValueError(f"{type(quantizer).__name__} is the class of no registered quantizer kind; see kinds.register.")


def scalar(value: Any) -> float:
    """A parameter that is one number as a Python float."""
    return float(np.asarray(value).reshape(()))
