"""One streaming pass over the calibration images, from activations to statistics to quantizers.

Statistics are taken on the floating-point model, one image at a time, inside the jitted function that runs a stage:
activations never leave it. Stages of one kind share one compilation, whatever their number. Where there are several
devices, of one process or many, each runs a stage on an image of its own, and what the images tell is exchanged and
merged in their order: the result is that of one device.
"""

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
    Together,
    finalize,
    init_statistics,
    relevant,
    update_statistics,
)
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.recipe import Recipe
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.stages import Stage

# A hashable function (parameters, inputs...) -> output: a part of the model.
Run = Callable[..., Any]
Sites = tuple[SiteRule, ...]
T = TypeVar("T")


def _observed(
    run: Run,
    params: Params,
    statistics: dict[str, Any],
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    sites: Sites,
    config: QuantConfig,
    architecture: Architecture,
    together: Together | None = None,
) -> tuple[Any, dict[str, Any]]:
    captured: dict[str, Any] = {}

    def capture(path: str, value: Any) -> Any:
        # The attention map may be inside a loop and is rebuilt from its operands where needed.
        if not path.endswith("/softmax"):
            captured[path] = value
        return value

    with intercept_sites(capture):
        output = run(params, *inputs)
    return output, update_statistics(statistics, sites, captured, params, key, config, architecture, together)


@partial(jax.jit, static_argnames=("run", "sites", "config", "architecture"))
@in_float32
def observe(
    run: Run,
    params: Params,
    statistics: dict[str, Any],
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    *,
    sites: Sites,
    config: QuantConfig,
    architecture: Architecture,
) -> tuple[Any, dict[str, Any]]:
    """Runs a part of the model on one batch and adds its activations to the statistics of `sites`.

    Returns:
        The part's output, and the statistics with the batch.
    """
    return _observed(run, params, statistics, inputs, key, sites, config, architecture)


@partial(jax.jit, static_argnames=("run", "sites", "config", "architecture", "mesh"))
@in_float32
def observe_together(
    run: Run,
    params: Params,
    statistics: dict[str, Any],
    inputs: tuple[Any, ...],
    seed: jax.Array,
    bounds: tuple[jax.Array, jax.Array, jax.Array],
    *,
    sites: Sites,
    config: QuantConfig,
    architecture: Architecture,
    mesh: Mesh,
) -> tuple[Any, dict[str, Any]]:
    """`observe` of as many batches as the row has devices, each on its own.

    Args:
        inputs: the batches of all devices, one after the other.
        seed: of the key from which each image derives its own.
        bounds: the number of the image at the first place of the row, and those from which and before which images
            count.

    Returns:
        The outputs of all, and the statistics with all that count, which every device has.
    """

    def of_device(params: Params, statistics: Any, inputs: Any, seed: Any, bounds: Any) -> tuple[Any, Any]:
        start, first, last = bounds
        place = jax.lax.axis_index(devices.AXIS)
        key = jax.random.fold_in(jax.random.key(seed), start + place)
        together = Together(mesh.size, place, first - start, last - start)
        return _observed(run, params, statistics, inputs, key, sites, config, architecture, together)

    everywhere, by_image = devices.EVERYWHERE, devices.BY_IMAGE
    inputs_of = (everywhere, everywhere, by_image, everywhere, everywhere)
    return devices.spread(of_device, mesh, inputs_of, (by_image, everywhere))(params, statistics, inputs, seed, bounds)


class _Observer:
    """One pass over the images: on one device image by image, on several round by round.

    Attributes:
        mesh: the row of devices; None if there is but one.
        width: images in a round.
    """

    def __init__(self, seed: int, architecture: Architecture) -> None:
        self.seed, self.architecture = seed, architecture
        self.mesh = devices.row() if jax.device_count() > 1 else None
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
        observer: tuple[Sites, QuantConfig],
    ) -> tuple[Any, dict[str, Any]]:
        """`observe` of a round; `bounds` are as in `observe_together`."""
        sites, settings = observer
        if self.mesh is None:
            key = jax.random.fold_in(jax.random.key(self.seed), bounds[0])
            return observe(
                run, params, statistics, inputs, key, sites=sites, config=settings, architecture=self.architecture
            )
        return observe_together(
            run,
            params,
            statistics,
            inputs,
            np.int32(self.seed),
            tuple(map(np.int32, bounds)),
            sites=sites,
            config=settings,
            architecture=self.architecture,
            mesh=self.mesh,
        )


@partial(jax.jit, static_argnames=("architecture", "sam", "mesh"))
@in_float32
def _embedded(architecture: Architecture, sam: Any, params: Params, canvases: jax.Array, mesh: Mesh) -> Any:
    """What `Architecture.embed` makes of an image on every device."""
    everywhere, by_image = devices.EVERYWHERE, devices.BY_IMAGE
    return devices.spread(partial(architecture.embed, sam), mesh, (everywhere, by_image), by_image)(params, canvases)


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
    sites, statistics, shape = _discover_stages(sam, params, own, recipe)
    # What observes a stage: the part of its rules and settings that its statistics depend on.
    observers = {stage: relevant(of_stage, recipe.config) for stage, of_stage in sites.items()}
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


def _discover_stages(
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
    relevant_here: tuple[Sites, QuantConfig] = ((), recipe.config)
    whole: Any = ()
    decoder = observer.everywhere(decoder)
    for start, members in observer.rounds(prompts, 0):
        if not start:
            index, boxes = next(iter(members.items()))
            sites, statistics = discover(run, decoder, (held(index), None, jnp.asarray(boxes)), "", recipe)
            relevant_here = relevant(sites, recipe.config)
            if cache is not None:
                # Transforms change the parameters, and the encoder's pass the last bits of the embeddings.
                whole = ("decoder", saved_state.fingerprint(decoder, embeddings), relevant_here)
                if (known := cache.passes.get(whole)) is not None:
                    return finalize(known.statistics, sites, recipe.config, recipe.grid_bits)
            statistics = observer.everywhere(statistics)
        bounds = (start, start, min(start + observer.width, count))
        embedding, boxes = observer.inputs(start, {i: (held(i), np.asarray(b)) for i, b in members.items()})
        _, statistics = observer.observe(run, decoder, statistics, (embedding, None, boxes), bounds, relevant_here)
    if observer.mesh is not None:
        statistics = devices.on_host(statistics)
    if cache is not None:
        cache.passes[whole] = Observed(statistics, [])
    return finalize(statistics, sites, recipe.config, recipe.grid_bits)
