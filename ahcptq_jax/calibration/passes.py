"""One streaming pass over the calibration images, from activations to statistics to quantizers.

Statistics are taken on the floating-point model, stage by stage and image by image, or as many images at once as there
are devices (see `rounds`). The activations of one stage are held at a time. Stages of one kind share one compilation,
whatever their number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from ahcptq_jax import devices
from ahcptq_jax.architectures import Architecture, architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import Observed, StatisticsCache
from ahcptq_jax.calibration.rounds import Rounds, Run, Sites, Watched
from ahcptq_jax.calibration.saved_statistics import SavedStatistics
from ahcptq_jax.calibration.statistics import SiteRule, finalize, init_statistics, relevant
from ahcptq_jax.devices import BY_IMAGE, EVERYWHERE, spread
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.recipe import Recipe
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.stages import Stage


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
    rounds = Rounds(recipe.config.seed, architecture)
    params = rounds.everywhere(params)
    graph, flat = architecture.stages(sam), flatten(params)
    own = {stage.key: unflatten(below(stage.prefix, flat)) for stage in graph.stages}
    sites, statistics, shape = discover_stages(sam, params, own, recipe)
    # How a stage is looked at: the part of its rules and settings that its statistics depend on.
    watched = {s: Watched(*relevant(of_stage, recipe.config), architecture) for s, of_stage in sites.items()}
    if jax.process_count() > 1:
        cache = None
    # The parameters are part of the key: a transform may have rewritten those that the cache was entered with.
    whole = () if cache is None else ("encoder", saved_state.fingerprint(own), *watched.items())
    embeddings: dict[int, Any] = {}
    count, done = len(images), 0
    if cache is not None and (known := cache.passes.get(whole)) is not None:
        statistics, embeddings, done = known.statistics, dict(enumerate(known.embeddings)), len(known.embeddings)
    elif saved is not None:
        statistics, done, embeddings = saved.load(statistics, rounds.own)
    statistics = rounds.everywhere(statistics)
    for start, members in rounds.of(bar(images), done):
        bounds = (start, max(start, done), min(start + rounds.width, count))

        def apply(stage: Stage, inputs: tuple[Any, ...], bounds: tuple[int, int, int] = bounds) -> Any:
            output, statistics[stage.key] = rounds.observe(
                Operation(stage.module), own[stage.key], statistics[stage.key], inputs, bounds, watched[stage.key]
            )
            return output

        canvases = rounds.inputs(start, {index: image[None] for index, image in members.items()})
        if rounds.mesh is None:
            embedded = architecture.embed(sam, params, canvases)
        else:
            embedded = _embedded(architecture, sam, params, canvases, rounds.mesh)
        made = rounds.outputs(start, graph.run(embedded, apply), count)
        fresh = {index: made[index] for index in made.keys() - embeddings.keys()}
        embeddings |= fresh
        if saved is not None:
            saved.add(statistics, bounds[2], fresh)
    statistics = devices.on_host(statistics, rounds.mesh)
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
    rounds, count = Rounds(recipe.config.seed + 1, architecture), len(embeddings)
    held = embeddings.held if isinstance(embeddings, devices.Dealt) else embeddings.__getitem__
    sites: Sites = ()
    statistics: dict[str, Any] = {}
    watched = Watched((), recipe.config, architecture)
    whole: Any = ()
    decoder = rounds.everywhere(decoder)
    for start, members in rounds.of(prompts, 0):
        if not start:
            index, boxes = next(iter(members.items()))
            sites, statistics = discover(run, decoder, (held(index), None, jnp.asarray(boxes)), "", recipe)
            watched = Watched(*relevant(sites, recipe.config), architecture)
            if cache is not None:
                # Transforms change the parameters, and the encoder's pass the last bits of the embeddings.
                whole = ("decoder", saved_state.fingerprint(decoder, embeddings), watched)
                if (known := cache.passes.get(whole)) is not None:
                    return finalize(known.statistics, sites, recipe.config, recipe.grid_bits)
            statistics = rounds.everywhere(statistics)
        bounds = (start, start, min(start + rounds.width, count))
        embedding, boxes = rounds.inputs(start, {i: (held(i), np.asarray(b)) for i, b in members.items()})
        _, statistics = rounds.observe(run, decoder, statistics, (embedding, None, boxes), bounds, watched)
    statistics = devices.on_host(statistics, rounds.mesh)
    if cache is not None:
        cache.passes[whole] = Observed(statistics, [])
    return finalize(statistics, sites, recipe.config, recipe.grid_bits)
