"""Images, coordinates and masks between the user's picture and the model's canvas.

Source: segment_anything/utils/transforms.py (ResizeLongestSide) and modeling/sam.py (preprocess,
postprocess_masks). All host-side NumPy: pictures come in any size, and none should trigger a compilation.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64, Real, UInt8
from PIL import Image

from sam_flax.errors import InputError


@runtime_checkable
class CanvasConfig(Protocol):
    """What preparing an image needs of a model's configuration, whatever its family."""

    @property
    def img_size(self) -> int:
        """Side of the square canvas, pixels."""

    @property
    def pixel_mean(self) -> tuple[float, float, float]:
        """RGB, 0..255."""

    @property
    def pixel_std(self) -> tuple[float, float, float]:
        """RGB, 0..255."""


def check_image(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Returns `image` if it is an (H, W, 3) uint8 array.

    Raises:
        InputError: otherwise.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"The image must be a uint8 array of shape (height, width, 3) but is {image.dtype} of shape "
            f"{image.shape}; convert it to 8-bit RGB."
        )
    if 0 in image.shape:
        raise InputError(f"The image has shape {image.shape} and no pixels; give a non-empty image.")
    return image


def preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """(height, width) after resizing the longer side to `long_side`."""
    scale = long_side / max(height, width)
    # A very thin image still needs one pixel.
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: UInt8[np.ndarray, "h w 3"], long_side: int) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """The image with the longer side `long_side`, antialiased bilinear."""
    height, width = preprocess_shape(image.shape[0], image.shape[1], long_side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalize_and_pad(
    image: Real[np.ndarray, "h w 3"], config: CanvasConfig
) -> Float32[np.ndarray, "{config.img_size} {config.img_size} 3"]:
    """A resized image -> the canvas: normalised, zeros at the right and bottom."""
    mean = np.array(config.pixel_mean, np.float32)
    std = np.array(config.pixel_std, np.float32)
    size = config.img_size
    height, width = image.shape[:2]
    canvas = np.zeros((size, size, 3), np.float32)
    canvas[:height, :width] = (image.astype(np.float32) - mean) / std
    return canvas


def prepare_image(
    image: Any, config: CanvasConfig
) -> tuple[Float32[np.ndarray, "{config.img_size} {config.img_size} 3"], tuple[int, int]]:
    """A user's image -> the encoder's input and the (height, width) it occupies there."""
    resized = transform_of(config).apply_image(check_image(image))
    return normalize_and_pad(resized, config), (resized.shape[0], resized.shape[1])


def apply_coords(
    coords: Real[np.ndarray, "*shape 2"], original_size: tuple[int, int], long_side: int
) -> Float32[np.ndarray, "*shape 2"]:
    """x, y in pixels of the original image -> pixels of the canvas."""
    height, width = original_size
    new_height, new_width = preprocess_shape(height, width, long_side)
    scale = np.array([new_width / width, new_height / height])
    return (np.asarray(coords, np.float64) * scale).astype(np.float32)


def apply_boxes(
    boxes: Real[np.ndarray, "*shape 4"], original_size: tuple[int, int], long_side: int
) -> Float32[np.ndarray, "*shape 4"]:
    """x0, y0, x1, y1 in pixels of the original image -> pixels of the canvas."""
    boxes = np.asarray(boxes)
    corners = apply_coords(boxes.reshape(*boxes.shape[:-1], 2, 2), original_size, long_side)
    return corners.reshape(boxes.shape)


@dataclasses.dataclass(frozen=True)
class ResizeLongestSide:
    """Images, points and boxes on a canvas whose longer side they fill (segment_anything/utils/transforms.py)."""

    target_length: int

    def canvas_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) on the canvas of an image of another (height, width)."""
        return preprocess_shape(*original_size, self.target_length)

    def restore(self, logits: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Low-resolution logits (..., 4g, 4g) at an image's (height, width), see `postprocess_masks`."""
        return postprocess_masks(logits, self.canvas_size(original_size), original_size, self.target_length)

    def apply_image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "new_h new_w 3"]:
        """The image with its longer side `target_length`."""
        return resize_image(image, self.target_length)

    def apply_coords(
        self, coords: Real[np.ndarray, "*shape 2"], original_size: tuple[int, int]
    ) -> Float32[np.ndarray, "*shape 2"]:
        """x, y in pixels of the original image, (height, width) large -> pixels of the canvas."""
        return apply_coords(coords, original_size, self.target_length)

    def apply_boxes(
        self, boxes: Real[np.ndarray, "*shape 4"], original_size: tuple[int, int]
    ) -> Float32[np.ndarray, "*shape 4"]:
        """x0, y0, x1, y1 in pixels of the original image, (height, width) large -> pixels of the canvas."""
        return apply_boxes(boxes, original_size, self.target_length)


@dataclasses.dataclass(frozen=True)
class Squash:
    """Images, points and boxes on a canvas that they fill, whatever their proportions (sam2/utils/transforms.py)."""

    target_length: int

    def canvas_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) on the canvas of an image of another (height, width)."""
        del original_size
        return (self.target_length, self.target_length)

    def restore(self, logits: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Low-resolution logits (..., 4g, 4g) at an image's (height, width), in one resampling."""
        rows, cols = map(interpolation_matrix, original_size, logits.shape[-2:])
        return rows @ np.asarray(logits, np.float32) @ cols.T

    def apply_image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "{self.target_length} new_w 3"]:
        """The image with both sides `target_length`, antialiased bilinear, rounded to whole levels."""
        size = (self.target_length, self.target_length)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))

    def apply_coords(
        self, coords: Real[np.ndarray, "*shape 2"], original_size: tuple[int, int]
    ) -> Float32[np.ndarray, "*shape 2"]:
        """x, y in pixels of the original image, (height, width) large -> pixels of the canvas."""
        height, width = original_size
        scale = self.target_length / np.array([width, height])
        return (np.asarray(coords, np.float64) * scale).astype(np.float32)

    def apply_boxes(
        self, boxes: Real[np.ndarray, "*shape 4"], original_size: tuple[int, int]
    ) -> Float32[np.ndarray, "*shape 4"]:
        """x0, y0, x1, y1 in pixels of the original image, (height, width) large -> pixels of the canvas."""
        boxes = np.asarray(boxes)
        return self.apply_coords(boxes.reshape(*boxes.shape[:-1], 2, 2), original_size).reshape(boxes.shape)


Transform = ResizeLongestSide | Squash


def transform_of(config: CanvasConfig) -> Transform:
    """How pictures of any size come onto the canvas of a model: `config.resize` is "pad", unless said, or "squash"."""
    squash = getattr(config, "resize", "pad") == "squash"
    return Squash(config.img_size) if squash else ResizeLongestSide(config.img_size)


def interpolation_weights(
    new: int, old: int
) -> tuple[Int64[np.ndarray, " {new}"], Int64[np.ndarray, " {new}"], Float32[np.ndarray, " {new}"]]:
    """Bilinear resampling of `old` values to `new` ones, with half-pixel centres and clamped edges.

    The same weights as `torch.nn.functional.interpolate(mode="linear" or "bilinear", align_corners=False)`.

    Returns:
        For each new value the two old ones that it lies between, and how far it is on the way from the first to the
        second, 0..1.
    """
    source = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    return low, high, (source - low).astype(np.float32)


def interpolation_matrix(new: int, old: int) -> Float32[np.ndarray, "{new} {old}"]:
    """The matrix of the resampling by `interpolation_weights`."""
    low, high, fraction = interpolation_weights(new, old)
    matrix = np.zeros((new, old), np.float32)
    rows = np.arange(new)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def resample(values: Float32[np.ndarray, "..."], shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Values resampled along every axis where `shape` differs from theirs, by `interpolation_weights`."""
    for axis, (old, new) in enumerate(zip(values.shape, shape, strict=True)):
        if old != new:
            low, high, fraction = interpolation_weights(new, old)
            fraction = fraction.reshape(-1, *(1,) * (values.ndim - axis - 1))
            values = values.take(low, axis) * (1 - fraction) + values.take(high, axis) * fraction
    return values


def postprocess_masks(
    low_res: Float[np.ndarray, "*masks side side"],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    img_size: int,
) -> Float32[np.ndarray, "*masks {original_size[0]} {original_size[1]}"]:
    """Low-resolution logits -> logits at the original size.

    Up to the canvas, cut to the part the image occupies, then to the original size: each step is linear in
    rows and columns, so the two resamplings of each axis are one matrix.
    """
    axes = []
    for side, inside, original in zip(low_res.shape[-2:], input_size, original_size, strict=True):
        to_canvas = interpolation_matrix(img_size, side)[:inside]
        axes.append(interpolation_matrix(original, inside) @ to_canvas)
    rows, cols = axes
    return rows @ np.asarray(low_res, np.float32) @ cols.T
