"""One streaming pass over the calibration images, from activations to statistics to quantizers.

Statistics are taken on the floating-point model, one image at a time, inside the jitted function that runs a stage:
activations never leave it. Stages of one kind share one compilation, whatever their number. Where there are several
devices, of one process or many, each runs a stage on an image of its own, and what the images tell is exchanged and
merged in their order: the result is that of one device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, PRNGKeyArray

from ahcptq_jax import devices
from ahcptq_jax.architectures import Architecture, architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import Observed, StatisticsCache
from ahcptq_jax.calibration.saved_statistics import SavedStatistics
from ahcptq_jax.calibration.statistics import (
    SiteRule,
    batch_statistics,
    finalize,
    init_statistics,
    merged,
    outlines,
    relevant,
    seen_by,
)
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.devices import AXIS, BY_IMAGE, EVERYWHERE, spread
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.recipe import Recipe
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.stages import Stage

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
        return any(kind_named(rule.kind).statistic.outline is not None for rule in self.sites)


# A pass over one batch is three programs: the model, what the batch alone tells, and the sum. Devices that look at
# batches at once run the same first two, which exchange nothing, and therefore find the same bits: in one program the
# exchange would decide how XLA fuses what comes before it.


def _capture(run: Run, params: Params, inputs: tuple[Any, ...], sites: Sites) -> tuple[Any, dict[str, Any]]:
    wanted = set(seen_by(sites))
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


class _Observer:
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
        return tree if self.mesh is None else devices.replicated(tree, self.mesh)

    def rounds(self, images: Iterable[T], done: int) -> Iterator[tuple[int, dict[int, T]]]:
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
        if mesh is not None:
            devices.settled(captured)
        numbers = jax.random.key(self.seed), np.int32(start)
        if mesh is None:
            batch = look(statistics, captured, params, *numbers, watched=watched)
            return output, add(statistics, batch, watched=watched)
        first, last = (np.int32(bound - start) for bound in bounds[1:])
        before = {}
        if watched.with_outlines:
            before = look_ahead(statistics, captured, params, first, last, watched=watched, mesh=mesh)
        before = devices.settled(before)
        batches = devices.settled(look(before, captured, params, *numbers, watched=watched, mesh=mesh))
        return output, devices.settled(add_all(statistics, batches, first, last, watched=watched, mesh=mesh))


@partial(jax.jit, static_argnames=("architecture", "sam", "mesh"))
@in_float32
def _embedded(architecture: Architecture, sam: Any, params: Params, canvases: jax.Array, mesh: Mesh) -> Any:
    """What `Architecture.embed` makes of an image on every device."""
    return spread(partial(architecture.embed, sam), mesh, (EVERYWHERE, BY_IMAGE), BY_IMAGE)(params, canvases)


def discover(
    run: Run, params: Params, inputs: tuple[Any, ...], prefix: str, recipe: Recipe
) -> tuple[Sites, dict[str, Any]]:
    """The quantized sites of a part of the model and their empty statistics, found by abstract evaluation."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, value: Any) -> Any:
        if not isinstance(value, tuple):
            shapes[path] = value.shape
        return value

    with intercept_sites(note):
        # A new function every time: JAX caches traces of equal functions, and a cached one calls no site.
        jax.eval_shape(lambda params, inputs: run(params, *inputs), params, inputs)
    sites = []
    for path in sorted(shapes):
        if (choice := recipe.at(prefix + path)) is not None:
            sites.append(SiteRule(path, choice.kind, choice.a_bits))
    return tuple(sites), {rule.path: init_statistics(rule, shapes[rule.path], recipe.config) for rule in sites}


def observe_encoder(
    sam: Any,
    params: Params,
    images: Sequence[Float32[np.ndarray, "s s 3"]],
    recipe: Recipe,
    saved: SavedStatistics | None = None,
    cache: StatisticsCache | None = None,
    bar: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[dict[str, Quantizer], Sequence[Any]]:
    """Quantizers of the image encoder, and the floating-point embedding of each image.

    Args:
        sam: the module.
        params: its floating-point parameters.
        images: canvases, normalised and padded.
        recipe: says what each site gets.
        saved: where the state is kept after each image or round of images; what it has is not run again.
        cache: a pass that it has is taken over, one that it has not is added; with several processes it is not used.
        bar: shows progress over what it is given.

    Returns:
        The quantizers by site; and the embeddings, of which a process has its own where there are several.
    """
    architecture = architecture_of(sam)
    observer = _Observer(recipe.config.seed, architecture)
    params = observer.everywhere(params)
    graph, flat = architecture.stages(sam), flatten(params)
    own = {stage.key: unflatten(below(stage.prefix, flat)) for stage in graph.stages}
    sites, statistics, shape = discover_stages(sam, params, own, recipe)
    # What observes a stage: the part of its rules and settings that its statistics depend on.
    observers = {s: Watched(*relevant(of_stage, recipe.config), architecture) for s, of_stage in sites.items()}
    if jax.process_count() > 1:
        cache = None
    # The parameters are part of the key: a transform may have rewritten those that the cache was entered with.
    whole = () if cache is None else ("encoder", saved_state.fingerprint(own), *observers.items())
    embeddings: dict[int, Any] = {}
    count, done = len(images), 0
    if cache is not None and (known := cache.passes.get(whole)) is not None:
        statistics, embeddings, done = known.statistics, dict(enumerate(known.embeddings)), len(known.embeddings)
    elif saved is not None:
        statistics, done, embeddings = saved.load(statistics, observer.own)
    statistics = observer.everywhere(statistics)
    for start, members in observer.rounds(bar(images), done):
        bounds = (start, max(start, done), min(start + observer.width, count))

        def apply(stage: Stage, inputs: tuple[Any, ...], bounds: tuple[int, int, int] = bounds) -> Any:
            output, statistics[stage.key] = observer.observe(
                Operation(stage.module), own[stage.key], statistics[stage.key], inputs, bounds, observers[stage.key]
            )
            return output

        canvases = observer.inputs(start, {index: image[None] for index, image in members.items()})
        if observer.mesh is None:
            embedded = architecture.embed(sam, params, canvases)
        else:
            embedded = _embedded(architecture, sam, params, canvases, observer.mesh)
        made = observer.outputs(start, graph.run(embedded, apply), count)
        fresh = {index: made[index] for index in made.keys() - embeddings.keys()}
        embeddings |= fresh
        if saved is not None:
            saved.add(statistics, bounds[2], fresh)
    if observer.mesh is not None:
        statistics = devices.on_host(statistics)
    found: Sequence[Any]
    if jax.process_count() > 1:
        found = devices.Dealt(embeddings, count, shape, devices.row())
    else:
        found = [embeddings[index] for index in range(count)]
    if cache is not None:
        cache.passes[whole] = Observed(statistics, list(found))
    states: dict[str, Any] = {}
    rules: list[SiteRule] = []
    for stage in graph.stages:
        for rule in sites[stage.key]:
            rules.append(rule._replace(path=stage.prefix + rule.path))
            states[rules[-1].path] = statistics[stage.key][rule.path]
    return finalize(states, rules, recipe.config, recipe.grid_bits), found


def discover_stages(
    sam: Any, params: Params, own: Mapping[str, Params], recipe: Recipe
) -> tuple[dict[str, Sites], dict[str, dict[str, Any]], Any]:
    """The quantized sites of every stage of the encoder, their empty statistics, and the shape of an embedding."""
    architecture, size = architecture_of(sam), sam.config.img_size
    sites: dict[str, Sites] = {}
    statistics: dict[str, dict[str, Any]] = {}

    def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
        run = Operation(stage.module)
        sites[stage.key], statistics[stage.key] = discover(run, own[stage.key], inputs, stage.prefix, recipe)
        return jax.eval_shape(run, own[stage.key], *inputs)

    canvas = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    embedded = jax.eval_shape(lambda params, canvas: architecture.embed(sam, params, canvas), params, canvas)
    shape = architecture.stages(sam).run(embedded, apply)
    return sites, statistics, shape


def observe_decoder(
    sam: Any,
    params: Params,
    embeddings: Sequence[Any],
    prompts: Iterable[Float32[np.ndarray, "p 4"]],
    recipe: Recipe,
    cache: StatisticsCache | None = None,
) -> dict[str, Quantizer]:
    """Quantizers of the mask decoder, which is prompted with each image's boxes in canvas pixels.

    The other arguments are those of `observe_encoder`.
    """
    architecture = architecture_of(sam)
    decoder = architecture.decoder(params)
    run = Operation(sam, "decode")
    if jax.process_count() > 1:
        cache = None
    observer, count = _Observer(recipe.config.seed + 1, architecture), len(embeddings)
    held = embeddings.held if isinstance(embeddings, devices.Dealt) else embeddings.__getitem__
    sites: Sites = ()
    statistics: dict[str, Any] = {}
    watched = Watched((), recipe.config, architecture)
    whole: Any = ()
    decoder = observer.everywhere(decoder)
    for start, members in observer.rounds(prompts, 0):
        if not start:
            index, boxes = next(iter(members.items()))
            sites, statistics = discover(run, decoder, (held(index), None, jnp.asarray(boxes)), "", recipe)
            watched = Watched(*relevant(sites, recipe.config), architecture)
            if cache is not None:
                # Transforms change the parameters, and the encoder's pass the last bits of the embeddings.
                whole = ("decoder", saved_state.fingerprint(decoder, embeddings), watched)
                if (known := cache.passes.get(whole)) is not None:
                    return finalize(known.statistics, sites, recipe.config, recipe.grid_bits)
            statistics = observer.everywhere(statistics)
        bounds = (start, start, min(start + observer.width, count))
        embedding, boxes = observer.inputs(start, {i: (held(i), np.asarray(b)) for i, b in members.items()})
        _, statistics = observer.observe(run, decoder, statistics, (embedding, None, boxes), bounds, watched)
    if observer.mesh is not None:
        statistics = devices.on_host(statistics)
    if cache is not None:
        cache.passes[whole] = Observed(statistics, [])
    return finalize(statistics, sites, recipe.config, recipe.grid_bits)
