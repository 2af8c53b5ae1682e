"""One box: its check, its cut at the image's border, and whether anything is left of it."""

from typing import Any

import numpy as np

from experiments.coco.values import is_number
from sam_flax.errors import InputError

XYWH = tuple[float, float, float, float]  # as COCO writes a box, in pixels
Corners = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels


def parse_box(bbox: Any, name: str) -> XYWH:
    """The numbers of `[x, y, width, height]`, as written.

    Raises:
      InputError: if it is something else; the sentence starts with `name`.
    """
    if not isinstance(bbox, list | tuple) or len(bbox) != 4 or not all(is_number(v) for v in bbox):
        raise InputError(f"{name} has the box {bbox}: write four finite numbers, [x, y, width, height].")
    x, y, w, h = (float(value) for value in bbox)
    if w < 0 or h < 0:
        raise InputError(f"{name} has a box of negative size, {list(bbox)}: write [x, y, width, height].")
    return x, y, w, h


def clip_box(x: float, y: float, w: float, h: float, width: int, height: int) -> tuple[Corners, bool]:
    """Corners of a box cut at the border of a `width` x `height` image, and whether the cut changed them."""
    corners = (x, y, x + w, y + h)
    clipped = (
        min(max(x, 0.0), width),
        min(max(y, 0.0), height),
        min(max(x + w, 0.0), width),
        min(max(y + h, 0.0), height),
    )
    # Sums such as 0.1 + 0.2 leave the image by rounding alone; that is nothing to report.
    return clipped, any(abs(a - b) > 1e-3 for a, b in zip(corners, clipped, strict=True))


def without_area(box: Corners) -> bool:
    """Whether a box is empty in the float32 numbers that prompts are made of."""
    x0, y0, x1, y1 = (np.float32(value) for value in box)
    return bool(x1 <= x0 or y1 <= y0)
