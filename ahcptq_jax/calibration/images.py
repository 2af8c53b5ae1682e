"""Calibration images: checked, moved to the model's canvas, and each with the same number of boxes as prompts."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from ahcptq_jax.calibration.sources import items_of
from ahcptq_jax.config import QuantConfig
from sam_flax import preprocessing
from sam_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class CalibrationImage:
    """One calibration image as the model sees it, and its prompts.

    Attributes:
        canvas: the image, resized, normalised and padded.
        boxes: the prompts as x0, y0, x1, y1 in canvas pixels.
    """

    canvas: Float32[np.ndarray, "s s 3"]
    boxes: Float32[np.ndarray, "p 4"]


def prepare_images(calib: Any, sam: Any, config: QuantConfig) -> list[CalibrationImage]:
    """Checks all calibration items and moves them to the canvas; see `prepare`.

    Args:
        calib: what `sources.items_of` takes.
        sam: the module, whose configuration has the canvas and the pixel statistics.
        config: says how many prompts an image gets, and the seed that chooses them.

    Raises:
        FileNotFoundError: if a path leads nowhere.
        InputError: if there are none, or one is unusable.
    """
    rng = np.random.default_rng(config.seed)
    items = [prepare(i, item, sam, config, rng) for i, item in enumerate(items_of(calib))]
    if not items:
        raise InputError("There are no calibration images; give at least one, 32 are usual.")
    return items


def prepare(index: int, item: Any, sam: Any, config: QuantConfig, rng: np.random.Generator) -> CalibrationImage:
    """Checks one calibration item and moves it to the canvas.

    Every image gets `prompts_per_image` boxes, chosen by `rng` or repeated, so that all share one shape.

    Args:
        index: its position among all items, which error messages name.
        item: an image (H, W, 3) uint8, or (image, boxes) with boxes (N, 4) as x0, y0, x1, y1 in its pixels.
        sam: the module, whose configuration has the canvas and the pixel statistics.
        config: says how many prompts an image gets.
        rng: chooses them.

    Raises:
        InputError: if the image or a box is unusable; the sentence names its position.
    """
    image, boxes = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    try:
        image = preprocessing.check_image(image)
    except ValueError as error:
        raise InputError(f"Calibration item {index}: {error}") from error
    height, width = image.shape[:2]
    try:
        boxes = np.array([[0, 0, width, height]] if boxes is None else boxes, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"Calibration item {index}: boxes must be numbers; give x0, y0, x1, y1 in pixels.") from None
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or len(boxes) == 0 or not np.isfinite(boxes).all():
        raise InputError(
            f"Calibration item {index}: boxes of shape {boxes.shape} must be a non-empty, finite (N, 4) array of "
            "x0, y0, x1, y1 in pixels."
        )
    clipped = np.clip(boxes, 0, [width, height, width, height])
    if (clipped[:, 2:] <= clipped[:, :2]).any():
        raise InputError(
            f"Calibration item {index}: a box has no area inside its image of {width}x{height} pixels; "
            "remove it or give corners as x0, y0, x1, y1."
        )
    order = np.resize(rng.permutation(len(boxes)), config.prompts_per_image)
    canvas, _ = preprocessing.prepare_image(image, sam.config)
    return CalibrationImage(canvas, preprocessing.transform_of(sam.config).apply_boxes(clipped[order], (height, width)))
