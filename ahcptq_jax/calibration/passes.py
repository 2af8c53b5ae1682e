"""One streaming pass over the calibration images, from activations to statistics to quantizers.

Statistics are taken on the floating-point model, one image at a time, inside the jitted function that runs a stage:
activations never leave it. Stages of one kind share one compilation on a device, whatever their number. Where there are
several devices, each has some of the stages and the images pass from one to the next.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, PRNGKeyArray

from ahcptq_jax.architectures import Architecture, architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import Observed, StatisticsCache
from ahcptq_jax.calibration.saved_statistics import SavedStatistics
from ahcptq_jax.calibration.statistics import SiteRule, finalize, init_statistics, relevant, update_statistics
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.recipe import Recipe
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.stages import Stage

# A hashable function (parameters, inputs...) -> output: a part of the model.
Run = Callable[..., Any]
Sites = tuple[SiteRule, ...]


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
    captured: dict[str, Any] = {}

    def capture(path: str, value: Any) -> Any:
        # The attention map may be inside a loop and is rebuilt from its operands where needed.
        if not path.endswith("/softmax"):
            captured[path] = value
        return value

    with intercept_sites(capture):
        output = run(params, *inputs)
    keys = jax.random.split(key, len(sites))
    updated = {
        rule.path: update_statistics(statistics[rule.path], rule, captured, params, site_key, config, architecture)
        for rule, site_key in zip(sites, keys, strict=True)
    }
    return output, updated


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


def _put(tree: Any, device: jax.Device | None) -> Any:
    return tree if device is None else jax.device_put(tree, device)


def stage_devices(stages: int) -> list[jax.Device | None]:
    """The local device of each stage, runs of stages on one; None where there is but one device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return [None] * stages
    return [devices[stage * len(devices) // stages] for stage in range(stages)]


def observe_encoder(
    sam: Any,
    params: Params,
    images: Iterable[Float32[np.ndarray, "s s 3"]],
    recipe: Recipe,
    saved: SavedStatistics | None = None,
    cache: StatisticsCache | None = None,
) -> tuple[dict[str, Quantizer], list[Any]]:
    """Quantizers of the image encoder, and the floating-point embedding of each image.

    A device waits only for its next image, so that all work at once when as many images as there are devices are on
    their way; every stage still sees the images one by one and in order, as on a single device.

    Args:
        sam: the module.
        params: its floating-point parameters.
        images: canvases, normalised and padded.
        recipe: says what each site gets.
        saved: where the state is kept after each image; images that it has are not run again.
        cache: a pass that it has is taken over, one that it has not is added.
    """
    architecture = architecture_of(sam)
    graph, flat = architecture.stages(sam), flatten(params)
    own = {stage.key: unflatten(below(stage.prefix, flat)) for stage in graph.stages}
    sites, statistics = _discover_stages(sam, params, own, recipe)
    embeddings: list[Any] = []
    # What observes a stage: the part of its rules and settings that its statistics depend on.
    observers = {stage: relevant(of_stage, recipe.config) for stage, of_stage in sites.items()}
    # The parameters are part of the key: a transform may have rewritten those that the cache was entered with.
    whole = () if cache is None else ("encoder", saved_state.fingerprint(own), *observers.items())
    if cache is not None and (known := cache.passes.get(whole)) is not None:
        statistics, embeddings = known.statistics, list(known.embeddings)
    elif saved is not None:
        statistics, embeddings = saved.load(statistics)
    places = dict(zip(statistics, stage_devices(len(graph.stages)), strict=True))
    own = {stage: _put(of_stage, places[stage]) for stage, of_stage in own.items()}
    statistics = {stage: _put(state, places[stage]) for stage, state in statistics.items()}
    # Embeddings that may still be in the making, and the statistics that count their images.
    under_way: deque[tuple[Any, dict[str, Any]]] = deque()

    def settle() -> None:
        embedding, counted = under_way.popleft()
        embeddings.append(jax.tree.map(np.asarray, embedding))
        if saved is not None:
            saved.add(counted, embeddings)

    done = len(embeddings)
    for index, image in enumerate(images):
        if index < done:
            continue
        key = jax.random.fold_in(jax.random.key(recipe.config.seed), index)

        def apply(stage: Stage, inputs: tuple[Any, ...], key: PRNGKeyArray = key) -> Any:
            run, place = Operation(stage.module), places[stage.key]
            inputs, key = _put(inputs, place), _put(key, place)
            rules, settings = observers[stage.key]
            output, statistics[stage.key] = observe(
                run,
                own[stage.key],
                statistics[stage.key],
                inputs,
                key,
                sites=rules,
                config=settings,
                architecture=architecture,
            )
            return output

        x = graph.run(architecture.embed(sam, params, jnp.asarray(image[None])), apply)
        under_way.append((x, dict(statistics)))
        if len(under_way) >= len(set(places.values())):
            settle()
    while under_way:
        settle()
    if None not in places.values():
        statistics = jax.tree.map(jnp.asarray, jax.device_get(statistics))
    if cache is not None:
        cache.passes[whole] = Observed(statistics, embeddings)
    states: dict[str, Any] = {}
    rules: list[SiteRule] = []
    for stage in graph.stages:
        for rule in sites[stage.key]:
            rules.append(rule._replace(path=stage.prefix + rule.path))
            states[rules[-1].path] = statistics[stage.key][rule.path]
    return finalize(states, rules, recipe.config, recipe.grid_bits), embeddings


def _discover_stages(
    sam: Any, params: Params, own: Mapping[str, Params], recipe: Recipe
) -> tuple[dict[str, Sites], dict[str, dict[str, Any]]]:
    """The quantized sites of every stage of the encoder and their empty statistics."""
    architecture, size = architecture_of(sam), sam.config.img_size
    sites: dict[str, Sites] = {}
    statistics: dict[str, dict[str, Any]] = {}

    def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
        run = Operation(stage.module)
        sites[stage.key], statistics[stage.key] = discover(run, own[stage.key], inputs, stage.prefix, recipe)
        return jax.eval_shape(run, own[stage.key], *inputs)

    canvas = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    embedded = jax.eval_shape(lambda params, canvas: architecture.embed(sam, params, canvas), params, canvas)
    architecture.stages(sam).run(embedded, apply)
    return sites, statistics


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
    sites: Sites = ()
    statistics: dict[str, Any] = {}
    observer: tuple[Sites, QuantConfig] = ((), recipe.config)
    whole: Any = ()
    for index, (embedding, boxes) in enumerate(zip(embeddings, prompts, strict=True)):
        inputs = (jax.tree.map(jnp.asarray, embedding), None, jnp.asarray(boxes))
        if not index:
            sites, statistics = discover(run, decoder, inputs, "", recipe)
            observer = relevant(sites, recipe.config)
            if cache is not None:
                # Transforms change the parameters, and the encoder's pass the last bits of the embeddings.
                whole = ("decoder", saved_state.fingerprint(decoder, embeddings), observer)
                if (known := cache.passes.get(whole)) is not None:
                    return finalize(known.statistics, sites, recipe.config, recipe.grid_bits)
        key = jax.random.fold_in(jax.random.key(recipe.config.seed + 1), index)
        rules, settings = observer
        _, statistics = observe(
            run, decoder, statistics, inputs, key, sites=rules, config=settings, architecture=architecture
        )
    if cache is not None:
        cache.passes[whole] = Observed(statistics, [])
    return finalize(statistics, sites, recipe.config, recipe.grid_bits)
