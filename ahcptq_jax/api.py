"""`quantize(params, calib)`: from a floating-point SAM and a few images to a `Quantized` one."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration import passes, saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.config import W4A4, QuantConfig
from ahcptq_jax.quantizers import Uniform, searches
from ahcptq_jax.recipe import weight_path
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight
from sam_flax import preprocessing
from sam_flax.encoders.vit import PatchEmbed
from sam_flax.files.infer import infer_config
from sam_flax.sam import Params, Sam, apply_embed


@dataclasses.dataclass(frozen=True)
class CalibrationImage:
    """One image as the model sees it.

    Attributes:
        canvas: (S, S, 3) float32, normalised and padded.
        boxes: (P, 4) float32 prompts in canvas pixels.
    """

    canvas: np.ndarray
    boxes: np.ndarray


def quantize(
    params: Params,
    calib: Iterable[Any],
    config: QuantConfig = W4A4,
    *,
    sam: Sam | None = None,
    progress: bool = True,
) -> Quantized:
    """Quantizes a SAM, calibrated on a few images; `quantize_reconstructed` goes on to learn rounding and scales.

    Args:
        params: parameters of a SAM, as `sam_flax.load_sam` returns them.
        calib: images as (H, W, 3) uint8 arrays, each alone or as (image, boxes) with boxes (N, 4) as x0, y0, x1, y1
            in pixels of that image. An image alone is prompted with the box that covers it. 32 images are usual.
        config: bits and switches.
        sam: the module; by default it is inferred from the parameters' shapes, with the 32 channels per decoder head
            that all SAMs have.
        progress: shows bars on stderr.

    Returns:
        The quantized model, which `sam_flax.SamPredictor` takes as it is.

    Raises:
        ValueError: if the parameters are no SAM's or not finite, or a calibration image or box is unusable.
    """
    return quantize_model(check_model(sam, params), params, calib, config, progress=progress)


def check_model(sam: Sam | None, params: Params) -> Sam:
    """The module that fits the parameters, which is `sam` if given.

    Raises:
        ValueError: if the parameters are no SAM's or another SAM's.
    """
    parts = ("image_encoder", "prompt_encoder", "mask_decoder")
    if not isinstance(params, Mapping) or not all(isinstance(params.get(part), Mapping) for part in parts):
        raise ValueError(
            f"params must be the nested parameters of a SAM, with {', '.join(parts)}, but is a "
            f"{type(params).__name__} without them; pass the second result of sam_flax.load_sam."
        )
    # With one head every width is possible; the real number is not in the shapes.
    inferred = infer_config(params, decoder_num_heads=1)
    if sam is None:
        return Sam(dataclasses.replace(inferred, decoder_num_heads=max(1, inferred.out_chans // 32)))
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "out_chans", "decoder_depth"):
        if getattr(sam.config, name) != getattr(inferred, name):
            raise ValueError(
                f"sam has {name}={getattr(sam.config, name)} but params are those of a SAM with "
                f"{name}={getattr(inferred, name)}; pass both results of one load_sam."
            )
    return sam


def quantize_model(
    sam: Sam,
    params: Params,
    calib: Iterable[Any],
    config: QuantConfig,
    *,
    progress: bool,
    state_dir: str | Path | None = None,
    cache: StatisticsCache | None = None,
) -> Quantized:
    """`quantize` with the module given.

    Args:
        progress: shows bars on stderr.
        state_dir: where the encoder's statistics are kept after each image, and found again by a later run with the
            same arguments, which ends with the same result.
        cache: passes of earlier runs over the same images and weights that they quantized, to which those of this run
            are added; the result is the same without it.

    Raises:
        ValueError: as `quantize`, or if a file in `state_dir` is damaged or another run's.
    """
    check_model(sam, params)
    items = prepare_images(calib, sam, config)
    quantized = quantize_prepared(sam, params, items, config, progress=progress, state_dir=state_dir, cache=cache)
    return quantized.with_rounded_remainder()


def prepare_images(calib: Iterable[Any], sam: Sam, config: QuantConfig) -> list[CalibrationImage]:
    """Checks all calibration items and moves them to the canvas; see `prepare`.

    Raises:
        ValueError: if there are none, or one is unusable.
    """
    if not isinstance(calib, Iterable):
        raise ValueError(f"calib must be an iterable of images but is a {type(calib).__name__}; pass a list.")
    rng = np.random.default_rng(config.seed)
    items = [prepare(i, item, sam, config, rng) for i, item in enumerate(calib)]
    if not items:
        raise ValueError("There are no calibration images; give at least one, 32 are usual.")
    return items


def quantize_prepared(
    sam: Sam,
    params: Params,
    items: Sequence[CalibrationImage],
    config: QuantConfig,
    *,
    progress: bool,
    state_dir: str | Path | None = None,
    cache: StatisticsCache | None = None,
) -> Quantized:
    """`quantize_model` with the images on their canvases.

    Raises:
        ValueError: if a parameter is not finite, or a file in `state_dir` is damaged or another run's.
    """
    _check_finite(params)

    def bar(iterable: Iterable[Any], label: str) -> Iterable[Any]:
        return tqdm(iterable, desc=label, disable=not progress, mininterval=1)

    # As the paper's recipe: statistics come from the floating-point model; BIG is done before the decoder's.
    embed_params = {k: params["image_encoder"][k] for k in ("patch_embed", "pos_embed")}
    embed = partial(apply_embed, PatchEmbed(sam.config.patch_size, sam.config.embed_dim, parent=None), embed_params)
    saved = None
    if state_dir is not None:
        identity = saved_state.fingerprint(
            saved_state.code_version(), sam.config, config, params, [item.canvas for item in items]
        )
        saved = passes.SavedStatistics(Path(state_dir), identity)
    if cache is None:
        cache = StatisticsCache()
    else:
        inputs = [(item.canvas, item.boxes) for item in items]
        cache.keep_passes_of(saved_state.fingerprint(sam.config, config.seed, params, inputs))
    canvases = bar([item.canvas for item in items], "calibrate encoder")
    activations, embeddings = passes.observe_encoder(sam, params, canvases, config, embed, saved, cache)
    boxes = [item.boxes for item in items]
    if config.big:
        params, _ = passes.unify_keys(sam, params, embeddings, boxes)
    prompts = bar(boxes, "calibrate decoder")
    activations |= passes.observe_decoder(sam, params, embeddings, prompts, config, cache)

    layers = sorted({path for site in activations if (path := weight_path(site)) is not None})
    flat = flatten(params)
    weights = {}
    for layer in bar(layers, "quantize weights"):
        kernel = flat.pop(f"{layer}/kernel")
        key = (saved_state.fingerprint(kernel), config.w_bits, config.weight_search)
        if key not in cache.weights:
            cache.weights[key] = quantize_weight(kernel, config)
        weights[layer] = cache.weights[key]
    return Quantized(unflatten(flat), weights, activations, sam, config)


def quantize_weight(kernel: jax.Array, config: QuantConfig) -> QuantizedWeight:
    """A kernel (..., out) as packed codes, quantized per output channel."""
    kernel = jnp.asarray(kernel, jnp.float32)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if config.weight_search:
        quantizer = searches.search_weight(matrix, config.w_bits)
    else:
        quantizer = Uniform.from_range(matrix.min(0), matrix.max(0), config.w_bits)
    return _pack_weight(kernel, quantizer)


@jax.jit
def _pack_weight(kernel: jax.Array, quantizer: Uniform) -> QuantizedWeight:
    codes = quantizer.encode(kernel)
    return QuantizedWeight.from_codes(codes, quantizer.scale, quantizer.zero_point, quantizer.bits)


def prepare(index: int, item: Any, sam: Sam, config: QuantConfig, rng: np.random.Generator) -> CalibrationImage:
    """Checks one calibration item and moves it to the canvas.

    Every image gets `prompts_per_image` boxes, chosen by `rng` or repeated, so that all share one shape.

    Raises:
        ValueError: if the image or a box is unusable; the sentence names its position.
    """
    image, boxes = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    try:
        image = preprocessing.check_image(image)
    except ValueError as error:
        raise ValueError(f"Calibration item {index}: {error}") from error
    height, width = image.shape[:2]
    try:
        boxes = np.array([[0, 0, width, height]] if boxes is None else boxes, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"Calibration item {index}: boxes must be numbers; give x0, y0, x1, y1 in pixels.") from None
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or len(boxes) == 0 or not np.isfinite(boxes).all():
        raise ValueError(
            f"Calibration item {index}: boxes of shape {boxes.shape} must be a non-empty, finite (N, 4) array of "
            "x0, y0, x1, y1 in pixels."
        )
    clipped = np.clip(boxes, 0, [width, height, width, height])
    if (clipped[:, 2:] <= clipped[:, :2]).any():
        raise ValueError(
            f"Calibration item {index}: a box has no area inside its image of {width}x{height} pixels; "
            "remove it or give corners as x0, y0, x1, y1."
        )
    order = np.resize(rng.permutation(len(boxes)), config.prompts_per_image)
    canvas, _ = preprocessing.prepare_image(image, sam.config)
    return CalibrationImage(canvas, preprocessing.apply_boxes(clipped[order], (height, width), sam.config.img_size))


def _check_finite(params: Params) -> None:
    for path, value in flatten(params).items():
        # On the host: jitted, every shape would be compiled for one look.
        if not np.isfinite(np.asarray(value)).all():
            raise ValueError(f"Parameter {path} contains NaN or infinity; load an intact checkpoint.")
