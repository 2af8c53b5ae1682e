"""CAG: channels of an activation share a few (scale, zero point) pairs, found by k-means.

The official code runs scikit-learn's ``KMeans(random_state=0)``, one random start on the host per layer and stage.
Here the whole ladder is one compiled function, deterministic on every machine, for all layers of a width at once
(``jax.vmap``): k-means++ with fixed noise, then centre swaps, so that the result is mostly better and seldom worse.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import GROUP_METRICS
from ahcptq_jax.quantizers import Grouped
from ahcptq_jax.quantizers.base import qparams_from_range

_SEED = 0
# (rank by removal cost, rank by inertia) of the centre to take away and of the cluster to split, tried in turn.
_SWAPS = np.array([(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 1), (1, 2)], np.int32)
_SWAP_ROUNDS = 4
_SWAP_LLOYD_STEPS = 1
_LLOYD_STEPS = 3
_FEW_POINTS = 96


class ChannelGroups(NamedTuple):
    """Parameters shared by groups of channels.

    Attributes:
        scale: ``(..., G)`` scale of each group.
        zero_point: ``(..., G)`` zero point of each group, a whole number.
        labels: ``(..., C)`` group of each channel, int32.
    """

    scale: jax.Array
    zero_point: jax.Array
    labels: jax.Array

    def quantizer(self, bits: int) -> Grouped:
        """The grouped quantizer with these parameters."""
        return Grouped(self.scale, self.zero_point, self.labels, bits)


def _distances(points: jax.Array, centers: jax.Array) -> jax.Array:
    """Squared distances (K, N) of points (2, N) to centers (2, K)."""
    return jnp.square(centers[0][:, None] - points[0]) + jnp.square(centers[1][:, None] - points[1])


def _lloyd(points: jax.Array, weights: jax.Array, centers: jax.Array, steps: int) -> jax.Array:
    """Lloyd iterations on weighted points (2, N) from centers (2, K); an empty cluster keeps its centre."""
    table = jnp.concatenate([points * weights, weights[None]]).T  # (N, 3)

    def step(_: jax.Array, centers: jax.Array) -> jax.Array:
        distances = _distances(points, centers)
        # min and a comparison vectorise where argmin does not; a tie counts for both centres, which are then equal
        # or equally good.
        nearest = (distances == jnp.min(distances, axis=0)).astype(jnp.float32)  # (K, N)
        sums = jnp.matmul(nearest, table, precision=jax.lax.Precision.HIGHEST)  # (K, 3)
        count = sums[:, 2]
        means = (sums[:, :2] / jnp.where(count > 0, count, 1.0)[:, None]).T
        return jnp.where(count > 0, means, centers)

    return jax.lax.fori_loop(0, steps, step, centers)


def _inertia(points: jax.Array, weights: jax.Array, centers: jax.Array) -> jax.Array:
    return jnp.sum(weights * jnp.min(_distances(points, centers), axis=0))


def _spread_start(noise: jax.Array, points: jax.Array, weights: jax.Array, active: jax.Array) -> jax.Array:
    """k-means++ centers (2, K): each next one drawn with probability of its weighted squared distance.

    Args:
        noise: (K, N) exponentials of Gumbel noise: the largest product with a weight is a weighted draw.
        active: (K,) false for centres that do not take part; they are put at infinity, nearest to nothing.
    """

    def draw(weights: jax.Array, noise: jax.Array) -> jax.Array:
        return points[:, jnp.argmax(weights * noise)]

    def step(nearest: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        center = draw(weights * nearest, noise)
        return jnp.minimum(nearest, jnp.sum(jnp.square(points - center[:, None]), axis=0)), center

    first = draw(weights, noise[0])
    nearest = jnp.sum(jnp.square(points - first[:, None]), axis=0)
    _, others = jax.lax.scan(step, nearest, noise[1:])
    return jnp.where(active, jnp.concatenate([first[None], others]).T, jnp.inf)


def _swap(points: jax.Array, weights: jax.Array, centers: jax.Array, active: jax.Array, choice: jax.Array) -> jax.Array:
    """Takes away a centre that is hardly missed and splits a cluster that is badly served."""
    k = centers.shape[1]
    distances = _distances(points, centers)  # (K, N)
    nearest = jnp.min(distances, axis=0)
    own = distances == nearest
    second = jnp.min(jnp.where(own, jnp.inf, distances), axis=0)
    # Coincident centres leave no second one; either can go at no cost.
    missed = jnp.where(jnp.isfinite(second), second - nearest, 0.0)
    own_weight = own.astype(jnp.float32) * weights
    inertia, cost = jnp.matmul(own_weight, jnp.stack([nearest, missed]).T, precision=jax.lax.Precision.HIGHEST).T
    cost = jnp.where(active, cost, jnp.inf)
    ranks = min(3, k)
    # No more ranks than centres that take part, or one that does not would be brought in.
    taking_part = jnp.minimum(ranks, jnp.sum(active))
    removed = jax.lax.top_k(-cost, ranks)[1][jnp.minimum(choice[0], taking_part - 1)]
    inertia = jnp.where(active & (jnp.arange(k) != removed), inertia, -1.0)
    split = jax.lax.top_k(inertia, ranks)[1][jnp.clip(choice[1], 0, jnp.maximum(taking_part - 2, 0))]
    center, weight = centers[:, split], own_weight[split]
    variance = jnp.sum(weight * jnp.square(points - center[:, None]), axis=1) / jnp.maximum(jnp.sum(weight), 1e-30)
    offset = jnp.sqrt(variance) * (variance == jnp.max(variance))
    return centers.at[:, removed].set(center + offset).at[:, split].set(center - offset)


def _kmeans(points: jax.Array, weights: jax.Array, k: int, wanted: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Centers (2, K) and labels (N,) of weighted points (2, N).

    Args:
        points: those of weight zero count for nothing.
        weights: (N,).
        k: static size K > 1 of the result.
        wanted: centres to use, up to K; may be traced. The rest are at infinity.
    """
    count = points.shape[1]
    active = jnp.arange(k) < wanted
    starts = 1 if count > _FEW_POINTS else 4  # Where points are few, more tries cost nothing.
    noise = np.exp(np.random.default_rng(_SEED).gumbel(size=(starts, k, count))).astype(np.float32)

    def start(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        centers = _lloyd(points, weights, _spread_start(noise, points, weights, active), _LLOYD_STEPS)
        loss = _inertia(points, weights, centers)
        _, centers, _ = jax.lax.fori_loop(0, _SWAP_ROUNDS, swap, (loss, centers, jnp.int32(0)))
        centers = _lloyd(points, weights, centers, _LLOYD_STEPS)
        return _inertia(points, weights, centers), centers

    def swap(_: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        loss, centers, failures = carry
        trial = _swap(points, weights, centers, active, jnp.asarray(_SWAPS)[failures % len(_SWAPS)])
        trial = _lloyd(points, weights, trial, _SWAP_LLOYD_STEPS)
        trial_loss = _inertia(points, weights, trial)
        # Few centres leave nothing to swap: such a trial is not a number, and not better.
        better = trial_loss < loss
        return (
            jnp.where(better, trial_loss, loss),
            jnp.where(better, trial, centers),
            (failures + 1) * ~better,
        )

    losses, found = jax.vmap(start)(jnp.asarray(noise))
    centers = found[jnp.argmin(losses)]
    return centers, jnp.argmin(_distances(points, centers), axis=0).astype(jnp.int32)


def _group(
    scale: jax.Array,
    zero_point: jax.Array,
    weights: jax.Array,
    k: int,
    wanted: jax.Array | int,
    metric: str,
    bits: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Groups (N,) weighted parameter pairs: scale (K,), rounded zero point (K,), labels (N,); see ``_kmeans``."""
    points = jnp.stack([scale, zero_point])
    if metric == "range":
        assert bits is not None
        ranges = scale * jnp.stack([-zero_point, 2**bits - 1 - zero_point])  # (2, N): low, high
        labels = _kmeans(ranges, weights, k, wanted)[1] if k > 1 else jnp.zeros(scale.shape, jnp.int32)
        return *_cover(ranges, weights, labels, k, bits), labels
    mean = jnp.sum(points * weights, axis=1, keepdims=True) / jnp.sum(weights)
    if k == 1:
        return mean[0], jnp.round(mean[1]), jnp.zeros(points.shape[1], jnp.int32)
    unit = jnp.ones((2, 1), jnp.float32)
    if metric == "normalized":
        deviation = jnp.sqrt(jnp.sum(jnp.square(points - mean) * weights, axis=1, keepdims=True) / jnp.sum(weights))
        unit = jnp.where(deviation > 1e-6 * jnp.abs(mean), deviation, 1.0)
    centers, labels = _kmeans(points / unit, weights, k, wanted)
    centers = centers * unit
    return centers[0], jnp.round(centers[1]), labels


def _cover(ranges: jax.Array, weights: jax.Array, labels: jax.Array, k: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point (K,) of the range that covers those (2, N) of each group; of all where a group is empty."""
    member = (labels == jnp.arange(k)[:, None]) & (weights > 0)  # (K, N)
    member |= ~jnp.any(member, axis=1, keepdims=True) & (weights > 0)
    low = jnp.min(jnp.where(member, ranges[0], jnp.inf), axis=1)
    high = jnp.max(jnp.where(member, ranges[1], -jnp.inf), axis=1)
    return qparams_from_range(low, high, bits)


def _check(
    scale: jax.Array, zero_point: jax.Array, num_groups: int, metric: str, bits: int | None
) -> tuple[jax.Array, jax.Array]:
    scale, zero_point = jnp.asarray(scale, jnp.float32), jnp.asarray(zero_point, jnp.float32)
    if scale.ndim < 1 or scale.shape != zero_point.shape or scale.shape[-1] == 0:
        raise ValueError(
            f"scale {scale.shape} and zero_point {zero_point.shape} must have the same shape (..., channels)"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if metric not in GROUP_METRICS:
        raise ValueError(f"metric must be one of {GROUP_METRICS}, got {metric!r}")
    if metric == "range" and bits is None:
        raise ValueError("the metric 'range' needs the bits that the scale and the zero point belong to")
    return scale, zero_point


@functools.partial(jax.jit, static_argnames=("stages", "metric", "bits"))
def _ladder(
    scale: jax.Array, zero_point: jax.Array, stages: tuple[int, ...], metric: str, bits: int | None
) -> tuple[ChannelGroups, ...]:
    def one(scale: jax.Array, zero_point: jax.Array) -> tuple[ChannelGroups, ...]:
        channels = scale.shape[0]
        found = []
        rest = list(stages)
        while rest and rest[0] >= channels:
            found.append(ChannelGroups(scale, jnp.round(zero_point), jnp.arange(channels, dtype=jnp.int32)))
            del rest[0]
        if not rest:
            return tuple(found)
        most = rest.pop(0)
        scale, zero_point, labels = _group(scale, zero_point, jnp.ones_like(scale), most, most, metric, bits)
        found.append(ChannelGroups(scale, zero_point, labels))
        if not rest:
            return tuple(found)
        # Channels of a group have equal values after a stage, so the next one needs only the groups with their
        # channel counts (none for an empty group). The later stages are one loop over padded arrays: one compilation.
        wide = max(rest)

        def stage(carry: ChannelGroups, wanted: jax.Array) -> tuple[ChannelGroups, ChannelGroups]:
            scale, zero_point, labels = carry
            weights = jnp.sum(labels == jnp.arange(most)[:, None], axis=1).astype(jnp.float32)
            scale, zero_point, mapping = _group(scale, zero_point, weights, wide, wanted, metric, bits)
            labels = mapping[labels]
            # Unused places repeat a used one: finite, and without weight.
            used = jnp.arange(most) < wanted
            scale, zero_point = (
                jnp.where(used, jnp.pad(a, (0, most - wide), mode="edge"), a[0]) for a in (scale, zero_point)
            )
            groups = ChannelGroups(scale, zero_point, labels)
            return groups, groups

        _, later = jax.lax.scan(stage, found[-1], jnp.array(rest))
        for i, k in enumerate(rest):
            found.append(ChannelGroups(later.scale[i, :k], later.zero_point[i, :k], later.labels[i]))
        return tuple(found)

    function = one
    for _ in range(scale.ndim - 1):
        function = jax.vmap(function)
    return function(scale, zero_point)


def group_channels(
    scale: jax.Array, zero_point: jax.Array, num_groups: int, metric: str = "paper", bits: int | None = None
) -> ChannelGroups:
    """Groups channels by k-means on their ``(scale, zero_point)``, or on the ranges that these stand for.

    Args:
        scale: ``(..., C)`` per-channel scales; leading axes are independent layers, done at once.
        zero_point: ``(..., C)`` per-channel zero points.
        num_groups: number of groups; with as many as channels (or more) every channel stays alone, G = C.
        metric: ``"paper"`` clusters the raw pairs, in which the zero point (0..2^bits-1) outweighs the scale;
            ``"normalized"`` divides both by their deviation over the channels. Both give a group the mean scale and
            the rounded mean zero point, which cut off the wider channels of the group.
            ``"range"`` clusters the ranges (low, high) and gives a group the range that covers its channels: none is
            cut off, and no step is coarser than that of one range for the tensor.
        bits: width of the codes; needed by ``"range"`` alone.

    Returns:
        The groups. Fewer distinct pairs than groups leave groups without channels, whose parameters are valid but
        unused.

    Raises:
        ValueError: on shapes that differ, ``num_groups`` below 1, an unknown metric, or ``"range"`` without bits.

    Source: official ``GroupLSQFakeQuantize.group_channel``.
    """
    scale, zero_point = _check(scale, zero_point, num_groups, metric, bits)
    return _ladder(scale, zero_point, (num_groups,), metric, bits)[0]


@functools.partial(jax.jit, static_argnames=("room", "metric", "bits"))
def group_padded(
    scale: jax.Array, zero_point: jax.Array, wanted: jax.Array, *, room: int, metric: str, bits: int
) -> ChannelGroups:
    """`group_channels` of one layer for a traced number of groups: any rung of a ladder is the same program.

    Args:
        scale: ``(C,)``.
        zero_point: ``(C,)``.
        wanted: number of groups, 1 to `room`.
        room: most groups ever wanted, at most C; more than 1.
        metric: see `group_channels`.
        bits: width of the codes.

    Returns:
        ``(C,)`` arrays; places beyond the groups wanted repeat the first group and have no channel.
    """
    scale, zero_point = _check(scale, zero_point, room, metric, bits)
    channels = scale.shape[0]
    scale, zero_point, labels = _group(scale, zero_point, jnp.ones_like(scale), room, wanted, metric, bits)
    used = jnp.arange(room) < wanted
    scale, zero_point = (
        jnp.pad(jnp.where(used, a, a[0]), (0, channels - room), mode="edge") for a in (scale, zero_point)
    )
    return ChannelGroups(scale, zero_point, labels)


def ladder_stages(num_groups: int) -> tuple[int, ...]:
    """The paper's progressive numbers of groups: 8G, 4G, 2G, G."""
    return tuple(num_groups * factor for factor in (8, 4, 2, 1))


def ladder(
    scale: jax.Array, zero_point: jax.Array, num_groups: int = 4, metric: str = "paper", bits: int | None = None
) -> tuple[ChannelGroups, ...]:
    """Groups channels down 8G, 4G, 2G, G groups; each stage starts from the values of the one before.

    Args and errors as ``group_channels``.

    Returns:
        The groups of each stage; the last is the result when nothing is learned in between.
    """
    scale, zero_point = _check(scale, zero_point, num_groups, metric, bits)
    return _ladder(scale, zero_point, ladder_stages(num_groups), metric, bits)
