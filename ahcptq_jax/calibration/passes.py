"""One streaming pass over calibration images: activations -> statistics -> quantizers.

Statistics are taken on the floating-point model, one image at a time, inside the jitted function that runs a block:
activations never leave it. Blocks of one kind share one compilation on a device, whatever their number. Where there are
several devices, each has some of the blocks and the images pass from one to the next.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import Observed, StatisticsCache
from ahcptq_jax.calibration.statistics import SiteRule, finalize, init_statistics, relevant, update_statistics
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.recipe import BIMODAL_ATTENTION, site_kind
from ahcptq_jax.transforms import bimodal
from sam_flax.layers import in_float32
from sam_flax.sam import Params, Sam, call, encoder_stages

Sites = tuple[SiteRule, ...]
Run = Callable[[Params, Any], Any]


@partial(jax.jit, static_argnames=("run", "sites", "config"))
@in_float32
def observe(
    run: Run,
    params: Params,
    statistics: dict[str, Any],
    inputs: Any,
    key: jax.Array,
    *,
    sites: Sites,
    config: QuantConfig,
) -> tuple[Any, dict[str, Any]]:
    """Runs a part of the model on one batch and adds its activations to the statistics of `sites`."""
    captured: dict[str, Any] = {}

    def capture(path: str, value: Any) -> Any:
        # The attention map may be inside a loop and is rebuilt from its operands where needed.
        if not path.endswith("/softmax"):
            captured[path] = value
        return value

    with intercept_sites(capture):
        output = run(params, inputs)
    keys = jax.random.split(key, len(sites))
    updated = {
        rule.path: update_statistics(statistics[rule.path], rule, captured, params, k, config)
        for rule, k in zip(sites, keys, strict=True)
    }
    return output, updated


def discover(run: Run, params: Params, inputs: Any, prefix: str, config: QuantConfig) -> tuple[Sites, dict[str, Any]]:
    """The quantized sites of a part of the model and their empty statistics, found by abstract evaluation."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, value: Any) -> Any:
        if not isinstance(value, tuple):
            shapes[path] = value.shape
        return value

    with intercept_sites(note):
        # A new function every time: JAX caches traces of equal functions, and a cached one calls no site.
        jax.eval_shape(lambda params, inputs: run(params, inputs), params, inputs)
    kinds = ((path, site_kind(prefix + path, config)) for path in sorted(shapes))
    sites = tuple(SiteRule(path, kind, config.a_bits) for path, kind in kinds if kind is not None)
    return sites, {rule.path: init_statistics(rule, shapes[rule.path], config) for rule in sites}


class _ApplyStage:
    """`module.apply` as a hashable function: equal modules are equal functions, and share a compilation."""

    def __init__(self, module: nn.Module, method: str | None = None):
        self.module, self.method = module, method

    def __call__(self, params: Params, inputs: Any) -> Any:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        return call(self.module, params, *args, method=self.method)

    def __hash__(self) -> int:
        return hash((type(self.module), self.method))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ApplyStage) and (self.module, self.method) == (other.module, other.method)


@dataclasses.dataclass(frozen=True)
class SavedStatistics:
    """The encoder's calibration in a folder, so that a killed one goes on after its last finished image.

    Attributes:
        folder: holds one file of statistics and one for each embedding.
        identity: of the run, see `saved_state.fingerprint`.
    """

    folder: Path
    identity: str

    def load(self, empty: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Statistics and embeddings of the finished images; `empty` statistics and none if there is no file.

        Raises:
            ValueError: if a file is damaged or another run's.
        """
        path = self.folder / "statistics.npz"
        arrays = saved_state.load(path, self.identity)
        if arrays is None:
            return empty, []
        leaves, structure = jax.tree.flatten(empty)
        saved_state.check_names(path, arrays, ["images", *(f"leaf/{i}" for i in range(len(leaves)))])
        found = [arrays[f"leaf/{i}"] for i in range(len(leaves))]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves, strict=True)):
            raise saved_state.damaged(path, "an array has a wrong shape")
        embeddings = []
        for index in range(int(arrays["images"])):
            file = self._embedding(index)
            embedding = saved_state.load(file, self.identity)
            if embedding is None or "embedding" not in embedding:
                raise saved_state.damaged(path, f"{file.name}, which belongs to it, is missing")
            embeddings.append(embedding["embedding"])
        return jax.tree.unflatten(structure, [jnp.asarray(a) for a in found]), embeddings

    def add(self, statistics: dict[str, Any], embeddings: Sequence[np.ndarray]) -> None:
        """Saves the state after the image of the last embedding."""
        last = len(embeddings) - 1
        # The embedding first: statistics that count an image always find its embedding.
        saved_state.save(self._embedding(last), self.identity, {"embedding": embeddings[last]})
        leaves = {f"leaf/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(statistics))}
        saved_state.save(self.folder / "statistics.npz", self.identity, leaves | {"images": np.array(len(embeddings))})

    def _embedding(self, index: int) -> Path:
        return self.folder / f"embedding_{index:04d}.npz"


def _put(tree: Any, device: jax.Device | None) -> Any:
    return tree if device is None else jax.device_put(tree, device)


def stage_devices(stages: int) -> list[jax.Device | None]:
    """The local device of each stage, runs of stages on one; None where there is but one device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return [None] * stages
    return [devices[stage * len(devices) // stages] for stage in range(stages)]


def observe_encoder(
    sam: Sam,
    params: Params,
    images: Iterable[np.ndarray],
    config: QuantConfig,
    embed: Callable[[jax.Array], jax.Array],
    saved: SavedStatistics | None = None,
    cache: StatisticsCache | None = None,
) -> tuple[dict[str, Quantizer], list[np.ndarray]]:
    """Quantizers of the image encoder, and the floating-point embedding of each image.

    A device waits for no other but for its next image, so that all are at work once as many images as there are devices
    are on their way; every stage still sees the images one by one and in order, as on a single device.

    Args:
        images: canvases (S, S, 3), normalised and padded.
        embed: patch embedding, (1, S, S, 3) -> (1, g, g, D).
        saved: where the state is kept after each image; images that it has are not run again.
        cache: a pass that it has is taken over, one that it has not is added.
    """
    cache = StatisticsCache() if cache is None else cache
    encoder = params["image_encoder"]
    stages = [(key, _ApplyStage(module)) for key, module in encoder_stages(sam.config)]
    tokens = jax.ShapeDtypeStruct((1, sam.config.grid, sam.config.grid, sam.config.embed_dim), jnp.float32)
    sites: dict[str, Sites] = {}
    statistics: dict[str, dict[str, Any]] = {}
    for stage, run in stages:
        sites[stage], statistics[stage] = discover(run, encoder[stage], tokens, f"image_encoder/{stage}/", config)
    # What observes a stage: the part of its rules and settings that its statistics depend on.
    observers = {stage: relevant(of_stage, config) for stage, of_stage in sites.items()}
    embeddings: list[np.ndarray] = []
    whole = ("encoder", *observers.items())
    if (known := cache.passes.get(whole)) is not None:
        statistics, embeddings = known.statistics, list(known.embeddings)
    elif saved is not None:
        statistics, embeddings = saved.load(statistics)
    places = dict(zip(statistics, stage_devices(len(stages)), strict=True))
    encoder = {stage: _put(encoder[stage], device) for stage, device in places.items()}
    statistics = {stage: _put(state, places[stage]) for stage, state in statistics.items()}
    # Embeddings that may still be in the making, and the statistics that count their images.
    under_way: deque[tuple[jax.Array, dict[str, Any]]] = deque()

    def settle() -> None:
        x, counted = under_way.popleft()
        embeddings.append(np.asarray(x))
        if saved is not None:
            saved.add(counted, embeddings)

    done = len(embeddings)
    for index, image in enumerate(images):
        if index < done:
            continue
        x = embed(jnp.asarray(image[None]))
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        for stage, run in stages:
            x, statistics[stage] = observe(
                run,
                encoder[stage],
                statistics[stage],
                _put(x, places[stage]),
                _put(key, places[stage]),
                sites=observers[stage][0],
                config=observers[stage][1],
            )
        under_way.append((x, dict(statistics)))
        if len(under_way) >= len(set(places.values())):
            settle()
    while under_way:
        settle()
    if None not in places.values():
        statistics = jax.tree.map(jnp.asarray, jax.device_get(statistics))
    cache.passes[whole] = Observed(statistics, embeddings)
    states: dict[str, Any] = {}
    rules: list[SiteRule] = []
    for stage, of_stage in sites.items():
        for rule in of_stage:
            rules.append(rule._replace(path=f"image_encoder/{stage}/{rule.path}"))
            states[rules[-1].path] = statistics[stage][rule.path]
    quantizers = finalize(states, rules, config)
    return quantizers, embeddings


def _decode_run(sam: Sam) -> _ApplyStage:
    return _ApplyStage(sam, "decode")


def _decoder_inputs(embedding: np.ndarray, boxes: np.ndarray) -> tuple:
    return (jnp.asarray(embedding), None, jnp.asarray(boxes))


def unify_keys(
    sam: Sam, params: Params, embeddings: Sequence[np.ndarray], prompts: Sequence[np.ndarray]
) -> tuple[Params, list[str]]:
    """BIG: flips the signs of bimodal keys and of their queries (paper section on BIG).

    Judged on the first calibration image with all its prompts (the official code: with its first); the signs of channel
    means come from all images.

    Returns:
        Equivalent parameters, and the attentions that were flipped.
    """

    @jax.jit
    @in_float32
    def keys_of(params: Params, inputs: tuple) -> dict[str, jax.Array]:
        captured: dict[str, jax.Array] = {}

        def capture(path: str, value: Any) -> Any:
            if path.endswith("/k") and re.fullmatch(BIMODAL_ATTENTION, path.removesuffix("/k")):
                # (N, heads, T, d) -> (N, T, heads*d): the channels of k_proj
                captured[path.removesuffix("/k")] = value.transpose(0, 2, 1, 3).reshape(len(value), value.shape[2], -1)
            return value

        with intercept_sites(capture):
            _decode_run(sam)(params, inputs)
        return captured

    decoder = {k: params[k] for k in ("prompt_encoder", "mask_decoder")}
    first: dict[str, jax.Array] = {}
    means: dict[str, np.ndarray] = {}
    for embedding, boxes in zip(embeddings, prompts, strict=True):
        found = keys_of(decoder, _decoder_inputs(embedding, boxes))
        first = first or found
        for path, k in found.items():
            means[path] = means.get(path, 0.0) + np.asarray(k.mean((0, 1)))
    flat, flipped = flatten(params), []
    for path, k in first.items():
        if not bimodal.is_bimodal(np.asarray(k)):
            continue
        q_path, k_path = f"{path}/q_proj/", f"{path}/k_proj/"
        q_new, k_new = bimodal.flip_signs(below(q_path, flat), below(k_path, flat), means[path])
        flat |= {q_path + n: v for n, v in q_new.items()} | {k_path + n: v for n, v in k_new.items()}
        flipped.append(path)
    return unflatten(flat), flipped


def observe_decoder(
    sam: Sam,
    params: Params,
    embeddings: Sequence[np.ndarray],
    prompts: Iterable[np.ndarray],
    config: QuantConfig,
    cache: StatisticsCache | None = None,
) -> dict[str, Quantizer]:
    """Quantizers of the mask decoder, prompted with (P, 4) canvas boxes per image; `cache` as in `observe_encoder`."""
    cache = StatisticsCache() if cache is None else cache
    decoder = {k: params[k] for k in ("prompt_encoder", "mask_decoder")}
    run = _decode_run(sam)
    sites: Sites = ()
    statistics: dict[str, Any] = {}
    observer: tuple[Sites, QuantConfig] = ((), config)
    whole = None
    for index, (embedding, boxes) in enumerate(zip(embeddings, prompts, strict=True)):
        inputs = _decoder_inputs(embedding, boxes)
        if not sites:
            sites, statistics = discover(run, decoder, inputs, "", config)
            observer = relevant(sites, config)
            # BIG changes the parameters, and the encoder's pass the last bits of the embeddings.
            whole = ("decoder", saved_state.fingerprint(decoder, embeddings), observer)
            if (known := cache.passes.get(whole)) is not None:
                return finalize(known.statistics, sites, config)
        key = jax.random.fold_in(jax.random.key(config.seed + 1), index)
        _, statistics = observe(run, decoder, statistics, inputs, key, sites=observer[0], config=observer[1])
    cache.passes[whole] = Observed(statistics, [])
    return finalize(statistics, sites, config)
