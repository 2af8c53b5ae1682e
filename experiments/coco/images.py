"""Image files and arrays as pictures of 8 bits per channel."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def decode_file(path: Path) -> Image.Image:
    """Opens and fully decodes an image file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it cannot be decoded, or has 32 bits per pixel.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_eight_bits(image, str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The image {path} does not exist: give the folder that belongs to the annotations."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read: copy the file again or remove it.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {path} cannot be decoded ({error}): the file is damaged or cut off, so copy it again."
        ) from error


def decode_array(array: np.ndarray | None, name: str) -> Image.Image:
    """An array in memory, uint8 (H, W, 3) or (H, W), as an image.

    Raises:
      ValueError: if it is something else; the sentence has `name`.
    """
    array = None if array is None else np.asarray(array)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        found = "none" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(f"The array of {name} is {found}: give uint8 of shape (height, width, 3).")
    return Image.fromarray(array)


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image with 8 bits per channel; Pillow would clip 16-bit grey values at 255, not scale them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"The image {name} has 32 bits per pixel: convert it to 8 bits per channel.")
    return image
