"""Rounds of a pass over the images: one image at a time, or as many at once as there are devices.

A part of the model is run on one image by three programs: the model, what the image alone tells, and the sum. Devices
that look at images at once run the same first two, which exchange nothing, and find the same bits as one device does;
what the images tell is then exchanged, and summed in their order. In one program the exchange would decide how XLA
fuses what comes before it, and last bits would differ.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from ahcptq_jax import devices
from ahcptq_jax.architectures import Architecture
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.calibration.statistics import SiteRule, batch_statistics, merged, outlines
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.devices import AXIS, BY_IMAGE, EVERYWHERE, spread
from ahcptq_jax.quantizers.kinds import kind_named
from sam_flax.layers import in_float32
from sam_flax.sam import Params

# A hashable function (parameters, inputs...) -> output: a part of the model.
Run = Callable[..., Any]
Sites = tuple[SiteRule, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Watched:
    """The sites of a part of the model and how they are looked at. Hashable: a static argument of `jax.jit`.

    Attributes:
        sites: their rules, as far as their statistics depend on them.
        settings: likewise the settings; see `statistics.relevant`.
        architecture: the model's.
    """

    sites: Sites
    settings: QuantConfig
    architecture: Architecture

    @property
    def with_outlines(self) -> bool:
        """Whether a statistic looks at what earlier batches had."""
        return any(kind_named(rule.kind).statistic.outline is not None for rule in self.sites)


def _capture(run: Run, params: Params, inputs: tuple[Any, ...], sites: Sites) -> tuple[Any, dict[str, Any]]:
    wanted = {rule.seen for rule in sites}
    captured: dict[str, Any] = {}

    def capture(path: str, value: Any) -> Any:
        # The attention map may be inside a loop and is rebuilt from its operands where needed.
        if path in wanted:
            captured[path] = value
        return value

    with intercept_sites(capture):
        return run(params, *inputs), captured


@partial(jax.jit, static_argnames=("run", "sites", "mesh"))
@in_float32
def run_captured(
    run: Run, params: Params, inputs: tuple[Any, ...], *, sites: Sites, mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """Runs a part of the model on one batch, or on one on every device of a mesh.

    Returns:
        The part's output, and what the statistics of `sites` look at, by path; of all devices one after the other.
    """
    if mesh is None:
        return _capture(run, params, inputs, sites)

    def of_device(params: Params, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        return _capture(run, params, inputs, sites)

    return spread(of_device, mesh, (EVERYWHERE, BY_IMAGE), BY_IMAGE)(params, inputs)


@partial(jax.jit, static_argnames=("watched", "mesh"))
@in_float32
def look(
    before: dict[str, Any],
    captured: dict[str, Any],
    params: Params,
    key: PRNGKeyArray,
    start: jax.Array,
    *,
    watched: Watched,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The statistics of one batch alone, or of each of the batches of a mesh, stacked.

    Args:
        before: the states before the batch; for a mesh stacked, those before each device's, of sites with outlines.
        captured: of `run_captured`.
        key: from it each batch derives its own by its number.
        start: the number of the batch, or of the one at the first place of the mesh.
    """

    def alone(before: Any, captured: Any, params: Params, key: Any, number: jax.Array) -> dict[str, Any]:
        key = jax.random.fold_in(key, number)
        rules, settings, architecture = watched.sites, watched.settings, watched.architecture
        return batch_statistics(before, rules, captured, params, key, settings, architecture)

    if mesh is None:
        return alone(before, captured, params, key, start)

    def of_device(before: Any, captured: Any, params: Params, key: Any, start: jax.Array) -> dict[str, Any]:
        place = jax.lax.axis_index(AXIS)
        return _stacked(alone(_first(before), captured, params, key, start + place))

    shares = (BY_IMAGE, BY_IMAGE, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    return spread(of_device, mesh, shares, BY_IMAGE)(before, captured, params, key, start)


@partial(jax.jit, static_argnames=("watched",))
def add(statistics: dict[str, Any], batch: dict[str, Any], *, watched: Watched) -> dict[str, Any]:
    """The statistics with one more batch."""
    return merged(watched.sites, statistics, batch)


@partial(jax.jit, static_argnames=("watched", "mesh"))
def add_all(
    statistics: dict[str, Any],
    batches: dict[str, Any],
    first: jax.Array,
    last: jax.Array,
    *,
    watched: Watched,
    mesh: Mesh,
) -> dict[str, Any]:
    """The statistics with the batches of the places `first` to `last - 1` of a mesh, in order, on every device."""

    def of_device(statistics: Any, batch: Any, first: jax.Array, last: jax.Array) -> dict[str, Any]:
        return _added(statistics, _everyones(batch), first, last, watched, mesh)

    shares = (EVERYWHERE, BY_IMAGE, EVERYWHERE, EVERYWHERE)
    return spread(of_device, mesh, shares, EVERYWHERE)(statistics, batches, first, last)


@partial(jax.jit, static_argnames=("watched", "mesh"))
def look_ahead(
    statistics: dict[str, Any],
    captured: dict[str, Any],
    params: Params,
    first: jax.Array,
    last: jax.Array,
    *,
    watched: Watched,
    mesh: Mesh,
) -> dict[str, Any]:
    """The states before each device's batch, stacked, as far as outlines tell them; arguments as in `add_all`."""

    def of_device(statistics: Any, captured: Any, params: Params, first: jax.Array, last: jax.Array) -> dict[str, Any]:
        own = outlines(statistics, watched.sites, captured, params, watched.architecture)
        until = jnp.minimum(last, jax.lax.axis_index(AXIS))
        return _stacked(_added(statistics, _everyones(_stacked(own)), first, until, watched, mesh))

    shares = (EVERYWHERE, BY_IMAGE, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    return spread(of_device, mesh, shares, BY_IMAGE)(statistics, captured, params, first, last)


def _added(
    statistics: dict[str, Any], batches: Any, first: jax.Array, last: jax.Array, watched: Watched, mesh: Mesh
) -> dict[str, Any]:
    states = {path: statistics[path] for path in batches}

    def step(place: jax.Array, states: dict[str, Any]) -> dict[str, Any]:
        more = merged(watched.sites, states, jax.tree.map(lambda leaf: leaf[place], batches))
        counts = (first <= place) & (place < last)
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), more, states)

    return jax.lax.fori_loop(0, mesh.size, step, states)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _everyones(batch: Any) -> Any:
    """The stacked states of all devices, from every device's own; one exchange for each type of number."""
    leaves, structure = jax.tree.flatten(batch)
    found: list[Any] = [None] * len(leaves)
    for dtype in sorted({str(leaf.dtype) for leaf in leaves}):
        of_type = [i for i, leaf in enumerate(leaves) if str(leaf.dtype) == dtype]
        everyone = jax.lax.all_gather(jnp.concatenate([leaves[i].reshape(-1) for i in of_type]), AXIS)
        ends = np.cumsum([leaves[i].size for i in of_type])[:-1]
        for i, part in zip(of_type, jnp.split(everyone, ends, axis=1), strict=True):
            found[i] = part.reshape(-1, *leaves[i].shape[1:])
    return jax.tree.unflatten(structure, found)


class Rounds:
    """One pass over the images: on one device image by image, on several round by round.

    Attributes:
        mesh: the row of devices; None if there is but one.
        width: images in a round.
    """

    def __init__(self, seed: int, architecture: Architecture) -> None:
        self.seed, self.architecture = seed, architecture
        self.mesh = devices.row() if devices.count() > 1 else None
        self.width = 1 if self.mesh is None else self.mesh.size
        self.places = [0] if self.mesh is None else devices.own_places(self.mesh)

    def own(self, index: int) -> bool:
        """Whether an image is looked at by a device of this process."""
        return index % self.width in self.places

    def everywhere(self, tree: Any) -> Any:
        """Arrays as every device needs them."""
        return devices.replicated(tree, self.mesh)

    def of(self, images: Iterable[T], done: int) -> Iterator[tuple[int, dict[int, T]]]:
        """The number of the first image of each round, and the images of this process by their numbers.

        Rounds without an image from the `done`-th on are left out. A process without an image in a round works along
        and gets the first one.
        """
        round_images: list[T] = []
        start = 0
        for image in images:
            if len(round_images) == self.width:
                if start + self.width > done:
                    yield start, self._members(start, round_images)
                start, round_images = start + self.width, []
            round_images.append(image)
        if start + len(round_images) > done:
            yield start, self._members(start, round_images)

    def _members(self, start: int, images: Sequence[T]) -> dict[int, T]:
        return {start + p: images[p] for p in self.places if p < len(images)} or {start: images[0]}

    def inputs(self, start: int, rows: Mapping[int, Any]) -> Any:
        """The rows of a round as the devices take them; a device without an image gets another's."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, rows[start])
        filler = next(iter(rows.values()))
        return devices.shared_out([rows.get(start + place, filler) for place in self.places], self.mesh)

    def outputs(self, start: int, value: Any, count: int) -> dict[int, Any]:
        """What `inputs` was made of: the rows of this process by the numbers of the images, on the host."""
        if self.mesh is None:
            return {start: jax.tree.map(np.asarray, value)}
        found = zip(self.places, devices.rows_of(value), strict=True)
        return {start + place: row for place, row in found if start + place < count}

    def observe(
        self,
        run: Run,
        params: Params,
        statistics: dict[str, Any],
        inputs: tuple[Any, ...],
        bounds: tuple[int, int, int],
        watched: Watched,
    ) -> tuple[Any, dict[str, Any]]:
        """Runs a part of the model on the images of a round and adds what they tell to the statistics.

        Args:
            inputs: of all devices, one after the other.
            bounds: the number of the round's first image, and those from which and before which images count.

        Returns:
            The part's output, and the statistics with the images that count.
        """
        start, mesh = bounds[0], self.mesh
        output, captured = run_captured(run, params, inputs, sites=watched.sites, mesh=mesh)
        numbers = jax.random.key(self.seed), np.int32(start)
        if mesh is None:
            batch = look(statistics, captured, params, *numbers, watched=watched)
            return output, add(statistics, batch, watched=watched)
        first, last = (np.int32(bound - start) for bound in bounds[1:])
        before = {}
        if watched.with_outlines:
            devices.settled(captured)
            before = look_ahead(statistics, captured, params, first, last, watched=watched, mesh=mesh)
            devices.settled(before)
        batches = devices.settled(look(before, captured, params, *numbers, watched=watched, mesh=mesh))
        return output, devices.settled(add_all(statistics, batches, first, last, watched=watched, mesh=mesh))
