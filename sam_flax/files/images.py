"""The one reader of image files for all commands, and the one rule by which pictures become RGB.

The rule, from first to last:

1. The first frame of the file is taken, in any format that Pillow reads.
2. An EXIF rotation is applied, as viewers do. A caller who knows the size (a COCO file says it) gets the picture that
   has it: turned, or as stored.
3. 16-bit grey values are divided by 256. (Pillow does the same to 16-bit colours; its own conversion of grey values
   would clip them at 255.) 32 bits per pixel are refused: nothing says what is white.
4. Palettes become their colours, CMYK is converted by Pillow's formula, grey is repeated in three channels.
5. Transparency is dropped and not blended: the colours stay as they are stored, as OpenCV and
   `Image.convert("RGB")` have it, and so as SAM's official examples see them.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sam_flax.errors import InputError

Size = tuple[int, int]  # (height, width) in pixels


def read_image(path: str | os.PathLike[str], size: Size | None = None, size_of: str = "") -> np.ndarray:
    """An image file as RGB, by the rule of this module.

    Args:
        path: the file.
        size: the (height, width) that the picture must have; any by default.
        size_of: what says so, for messages, such as a file of annotations.

    Returns:
        uint8 (H, W, 3).

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it is no image, is damaged, has 32 bits per pixel, or another size than `size`.
    """
    return image_to_rgb(_decode(Path(path)), f"The image {path}", size, size_of)


def image_to_rgb(
    image: Image.Image, name: str = "The image", size: Size | None = None, size_of: str = ""
) -> np.ndarray:
    """A Pillow image as RGB, by the rule of this module.

    Args:
        image: the picture, of any mode.
        name: what to call it in messages; their first words.
        size: the (height, width) that the picture must have; any by default.
        size_of: what says so, for messages.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: if it has 32 bits per pixel, or another size than `size`.
    """
    turned = ImageOps.exif_transpose(image)
    for candidate in (turned, image):
        if size is None or (candidate.height, candidate.width) == size:
            return np.array(_to_eight_bits(candidate, image.format, name).convert("RGB"))
    assert size is not None
    raise InputError(
        f"{name} is {image.width}x{image.height} pixels but {size_of or 'its caller'} says {size[1]}x{size[0]}: use "
        "the images that belong to it."
    )


def _decode(path: Path) -> Image.Image:
    """The image file, opened and decoded to its end."""
    try:
        # Given a path, Pillow 13 maps uncompressed grey TIFF files into memory and scrambles those with a rotation.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The image {path} does not exist: give the path of an image file.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read: copy the file again or remove it.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"The image {path} cannot be opened ({error.strerror}): give a readable file.") from error
    # Pillow raises SyntaxError, ValueError and others for damaged content, by the format's decoder.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(
            f"The image {path} cannot be decoded ({error}): the file is damaged or cut off, so copy it again."
        ) from error


def _to_eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """The image with 8 bits per channel; older versions of Pillow read a PNG's 16 bits as 32."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits per pixel: convert it to 8 bits per channel.")
    return image
