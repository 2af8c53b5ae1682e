"""Images, coordinates and masks between the user's picture and the model's canvas.

Source: segment_anything/utils/transforms.py (ResizeLongestSide) and modeling/sam.py (preprocess,
postprocess_masks). All host-side NumPy: pictures come in any size, and none should trigger a compilation.
"""

import numpy as np
from PIL import Image

from sam_flax.config import SamConfig
from sam_flax.errors import InputError


def check_image(image: np.ndarray) -> np.ndarray:
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


def resize_image(image: np.ndarray, long_side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 with the longer side `long_side`, antialiased bilinear."""
    height, width = preprocess_shape(image.shape[0], image.shape[1], long_side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalize_and_pad(image: np.ndarray, config: SamConfig) -> np.ndarray:
    """Resized (h, w, 3) -> normalised float32 (S, S, 3), zeros at the right and bottom."""
    mean = np.array(config.pixel_mean, np.float32)
    std = np.array(config.pixel_std, np.float32)
    size = config.img_size
    height, width = image.shape[:2]
    canvas = np.zeros((size, size, 3), np.float32)
    canvas[:height, :width] = (image.astype(np.float32) - mean) / std
    return canvas


def prepare_image(image: np.ndarray, config: SamConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """A user's image -> the encoder's input (S, S, 3) and the (height, width) it occupies there."""
    resized = resize_image(check_image(image), config.img_size)
    return normalize_and_pad(resized, config), (resized.shape[0], resized.shape[1])


def apply_coords(coords: np.ndarray, original_size: tuple[int, int], long_side: int) -> np.ndarray:
    """(..., 2) x, y pixels of the original image -> pixels of the canvas, float32."""
    height, width = original_size
    new_height, new_width = preprocess_shape(height, width, long_side)
    scale = np.array([new_width / width, new_height / height])
    return (np.asarray(coords, np.float64) * scale).astype(np.float32)


def apply_boxes(boxes: np.ndarray, original_size: tuple[int, int], long_side: int) -> np.ndarray:
    """(..., 4) x0, y0, x1, y1 of the original image -> the canvas, float32."""
    boxes = np.asarray(boxes)
    corners = apply_coords(boxes.reshape(*boxes.shape[:-1], 2, 2), original_size, long_side)
    return corners.reshape(boxes.shape)


def interpolation_weights(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear resampling of `old` values to `new` ones, with half-pixel centres and clamped edges.

    The same weights as `torch.nn.functional.interpolate(mode="linear" or "bilinear", align_corners=False)`.

    Returns:
        For each new value the two old ones (new,) and (new,) int64 that it lies between, and how far it is on the way
        from the first to the second, (new,) float32 in 0..1.
    """
    source = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    return low, high, (source - low).astype(np.float32)


def interpolation_matrix(new: int, old: int) -> np.ndarray:
    """(new, old) float32 matrix of the resampling by `interpolation_weights`."""
    low, high, fraction = interpolation_weights(new, old)
    matrix = np.zeros((new, old), np.float32)
    rows = np.arange(new)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def resample(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values resampled along every axis where `shape` differs from theirs, by `interpolation_weights`."""
    for axis, (old, new) in enumerate(zip(values.shape, shape, strict=True)):
        if old != new:
            low, high, fraction = interpolation_weights(new, old)
            fraction = fraction.reshape(-1, *(1,) * (values.ndim - axis - 1))
            values = values.take(low, axis) * (1 - fraction) + values.take(high, axis) * fraction
    return values


def postprocess_masks(
    low_res: np.ndarray, input_size: tuple[int, int], original_size: tuple[int, int], img_size: int
) -> np.ndarray:
    """Low-resolution logits (..., 4g, 4g) -> logits at the original size (..., H, W), float32.

    Up to the canvas, cut to the part the image occupies, then to the original size: each step is linear in
    rows and columns, so the two resamplings of each axis are one matrix.
    """
    axes = []
    for side, inside, original in zip(low_res.shape[-2:], input_size, original_size, strict=True):
        to_canvas = interpolation_matrix(img_size, side)[:inside]
        axes.append(interpolation_matrix(original, inside) @ to_canvas)
    rows, cols = axes
    return rows @ np.asarray(low_res, np.float32) @ cols.T
