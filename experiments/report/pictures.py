"""Examples as pictures: boxes, outlines and coloured masks on the image."""

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

from experiments.report.colours import PALETTE, rgb
from experiments.report.examples import Example

# Overlays are drawn so wide: enough for three beside each other on a large screen.
_PICTURE_WIDTH = 480
_MASK_OPACITY = 0.5


def draw_prompts(example: Example) -> Image.Image:
    """The image with its boxes, and dotted outlines of the true masks."""
    picture = _resize(example.image)
    factor = picture.width / example.image.shape[1]
    if example.gt_masks is not None:
        pixels = np.array(picture)
        rows, columns = np.indices(pixels.shape[:2])
        dots = (rows + columns) // 3 % 2 == 0
        for mask in example.gt_masks:
            outline = _outline(_resize_mask(mask, picture.size))
            pixels[outline & dots] = 255
            pixels[outline & ~dots] = 0
        picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for index, box in enumerate(example.boxes):
        corners = [float(value) * factor for value in box]
        # A rectangle's far border belongs to it, so it must stay inside the picture.
        corners = [min(corners[0], picture.width - 2), min(corners[1], picture.height - 2), *corners[2:]]
        corners[2] = max(min(corners[2], picture.width - 1), corners[0] + 1)
        corners[3] = max(min(corners[3], picture.height - 1), corners[1] + 1)
        draw.rectangle(corners, outline=PALETTE[index % len(PALETTE)], width=3)
    return picture


def draw_masks(image: np.ndarray, masks: np.ndarray) -> Image.Image:
    """The image, greyed and faded, below coloured masks with outlines; the largest mask lies lowest."""
    picture = _resize(image)
    grey = np.asarray(picture.convert("L"), np.float64)[..., None].repeat(3, axis=2)
    pixels = 0.75 * grey + 0.25 * 255
    for index in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        colour = np.array(rgb(PALETTE[index % len(PALETTE)]), np.float64)
        mask = _resize_mask(masks[index], picture.size)
        pixels[mask] = (1 - _MASK_OPACITY) * pixels[mask] + _MASK_OPACITY * colour
        pixels[_outline(mask)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def png(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    """The content of a PNG file, to stand in the page itself."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _resize(image: np.ndarray) -> Image.Image:
    """The image at the report's width; small ones are enlarged by whole pixels, so that they stay honest."""
    picture = Image.fromarray(image).convert("RGB")
    size = (_PICTURE_WIDTH, max(1, round(picture.height * _PICTURE_WIDTH / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST)


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at a picture's size, (H, W) bool."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def _outline(mask: np.ndarray) -> np.ndarray:
    """The border pixels of a mask, two wide."""
    inner = mask.copy()
    for _ in range(2):
        padded = np.pad(inner, 1)
        inner = inner & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & ~inner
