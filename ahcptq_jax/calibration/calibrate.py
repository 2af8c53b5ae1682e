"""Calibration: from floating-point parameters and images on their canvases to a quantized model."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten
from ahcptq_jax.calibration import passes, saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.calibration.images import CalibrationImage
from ahcptq_jax.calibration.moments import layer_moments
from ahcptq_jax.calibration.perceptual import clip_by_focus
from ahcptq_jax.calibration.saved_statistics import SavedStatistics
from ahcptq_jax.calibration.weights import quantize_weights
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.recipe import Recipe, recipe_of
from ahcptq_jax.runtime.quantized import Quantized
from ahcptq_jax.transforms import Context, Moments, transform_named
from sam_flax.errors import InputError
from sam_flax.sam import Params

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """The result of a calibration.

    Attributes:
        quantized: the model.
        params: the floating-point parameters that were quantized: those given, after all transforms.
        original: those whose function is the model's own, which reconstruction aims at: after the transforms that keep
            the function, up to the first that does not.
    """

    quantized: Quantized
    params: Params
    original: Params


def calibrate(
    sam: Any,
    params: Params,
    images: Sequence[CalibrationImage],
    config: QuantConfig,
    *,
    progress: bool = False,
    state_dir: str | Path | None = None,
    cache: StatisticsCache | None = None,
    off_grid: bool = False,
) -> Calibrated:
    """Quantizes a model by what its sites see on the images.

    Args:
        sam: the module.
        params: its floating-point parameters.
        images: see `images.prepare_images`.
        config: its bits, rules and switches.
        progress: shows bars on stderr.
        state_dir: where the encoder's statistics are kept after each image, and found again by a later run with the
            same arguments, which ends with the same result.
        cache: passes of earlier runs over the same images and weights that they quantized, to which those of this run
            are added; the result is the same without it.
        off_grid: leaves the quantizers off the grid, whose bits the searches are told nevertheless; for a
            reconstruction, which puts them on it while it learns.

    Raises:
        InputError: if a parameter is not finite, no rule matches the model, or a transform is unknown.
        ValueError: if a file in `state_dir` is damaged or another run's.
    """
    check_finite(params)
    architecture = architecture_of(sam)
    recipe = dataclasses.replace(recipe_of(architecture, config), off_grid=off_grid)
    check_recipe(recipe, architecture.sites(sam))
    for name in recipe.transforms:
        transform_named(name)  # an unknown one is told before the first pass
    if cache is not None:
        inputs = [(image.canvas, image.boxes) for image in images]
        cache.keep_passes_of(saved_state.fingerprint(sam.config, config.seed, params, inputs))
    run = _Calibration(sam, recipe, images, progress, None if state_dir is None else Path(state_dir), cache)
    return run.transformed(params)


def check_finite(params: Params) -> None:
    """Raises InputError if a parameter is NaN or infinite."""
    for path, value in flatten(params).items():
        # On the host: jitted, every shape would be compiled for one look.
        if not np.isfinite(np.asarray(value)).all():
            raise InputError(f"Parameter {path} contains NaN or infinity; load an intact checkpoint.")


def check_recipe(recipe: Recipe, sites: Iterable[str]) -> None:
    """Reports rules that match no site and sites that no rule names; `sites` are all of the model's.

    Raises:
        InputError: if a rule of the user's matches nothing, or nothing at all would be quantized.
    """
    paths = list(sites)
    for rule in recipe.idle(paths):
        if rule in recipe.config.rules:
            raise InputError(
                f"The rule {rule.pattern!r} matches none of the model's {len(paths)} sites, such as {paths[0]}; "
                "patterns match whole paths."
            )
        _LOG.warning("The rule %r matches no site of this model.", rule.pattern)
    if not any(recipe.at(path) for path in paths):
        raise InputError(
            f"No rule quantizes any of the model's {len(paths)} sites; give rules for them "
            "(QuantConfig.rules), or register an architecture that has them."
        )
    if unnamed := recipe.unnamed(paths):
        _LOG.warning("%d sites that no rule names stay in floating point: %s.", len(unnamed), ", ".join(unnamed[:8]))


# What the encoder's pass finds: its quantizers, and the embeddings of all images.
Encoded = tuple[dict[str, Quantizer], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class _Calibration:
    """The arguments of one call of `calibrate`, which its steps share."""

    sam: Any
    recipe: Recipe
    images: Sequence[CalibrationImage]
    progress: bool
    state_dir: Path | None
    cache: StatisticsCache | None

    def bar(self, iterable: Iterable[Any], label: str) -> Iterable[Any]:
        return tqdm(iterable, desc=label, disable=not self.progress, mininterval=1)

    def observe(self, params: Params, number: int) -> Encoded:
        """The encoder's pass, the `number`-th of this run: its quantizers, and the embeddings of all images."""
        saved = None
        if self.state_dir is not None:
            identity = saved_state.fingerprint(
                saved_state.code_version(),
                self.sam.config,
                self.recipe.config,
                params,
                [image.canvas for image in self.images],
            )
            folder = self.state_dir if number == 0 else self.state_dir / f"pass_{number}"
            saved = SavedStatistics(folder, identity)
        canvases = [image.canvas for image in self.images]
        bar = partial(self.bar, label="calibrate encoder")
        return passes.observe_encoder(self.sam, params, canvases, self.recipe, saved, self.cache, bar)

    def transformed(self, params: Params) -> Calibrated:
        """The calibration of the transformed parameters.

        As in the paper's recipe, statistics come from the floating-point model. A pass is made when a transform needs
        what it finds, and again only if the encoder's parameters have changed since: BIG rewrites the decoder alone.
        """
        architecture = architecture_of(self.sam)
        found: Encoded | None = None
        made = 0
        original: Params | None = None
        boxes = [image.boxes for image in self.images]
        for name in self.recipe.transforms:
            transform = transform_named(name)
            context = Context(architecture, self.sam, boxes=boxes)
            if transform.needs and found is None:
                found, made = self.observe(params, made), made + 1
            if "embeddings" in transform.needs and found is not None:
                context = dataclasses.replace(context, embeddings=found[1])
            if "moments" in transform.needs and found is not None:
                moments = partial(self.moments, params, self.quantized(params, found))
                context = dataclasses.replace(context, moments=moments)
            if original is None and not transform.keeps_function:
                original = params
            changed = transform.apply(params, context)
            if found is not None and not _equal(params, changed, architecture.is_encoder):
                found = None
            params = changed
        quantized = self.quantized(params, self.observe(params, made) if found is None else found)
        return Calibrated(quantized, params, params if original is None else original)

    def quantized(self, params: Params, found: Encoded) -> Quantized:
        """The quantized model, given what the encoder's pass has found with these parameters."""
        activations, embeddings = found
        prompts = self.bar([image.boxes for image in self.images], "calibrate decoder")
        activations = activations | passes.observe_decoder(
            self.sam, params, embeddings, prompts, self.recipe, self.cache
        )
        if self.recipe.config.pcc:
            architecture = architecture_of(self.sam)
            first = (embeddings[0], self.images[0].boxes)
            activations |= clip_by_focus(architecture, self.sam, params, *first, self.recipe)
        remainder, weights = quantize_weights(
            params,
            activations,
            self.recipe,
            self.cache or StatisticsCache(),
            lambda layers: self.bar(layers, "quantize weights"),
        )
        config = dataclasses.replace(self.recipe.config, grid_bits=self.recipe.grid_bits)
        return Quantized(remainder, weights, activations, self.sam, config)

    def moments(self, params: Params, quantized: Quantized) -> Iterator[tuple[str, Moments]]:
        """See `Context.moments`."""
        canvases, boxes = [image.canvas for image in self.images], [image.boxes for image in self.images]
        return layer_moments(params, quantized, canvases, boxes, self.bar)


def _equal(first: Params, second: Params, part: Callable[[str], bool]) -> bool:
    """Whether the parameters whose paths are in a part are the same in two trees."""
    one, other = flatten(first), flatten(second)
    return all(
        one[path] is other[path] or np.array_equal(np.asarray(one[path]), np.asarray(other[path]))
        for path in one
        if part(path)
    )
