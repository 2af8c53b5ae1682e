"""One box: its check, its cut at the image's border; and many: whether they are written in COCO's way at all.

COCO writes [x, y, width, height] in pixels. Other programs write corners, centres or shares of the image into the same
field, which every reader takes without a word and scores near zero. Two things tell: the masks that boxes belong to,
and where there are none, boxes that leave their images or are never larger than one pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sam_flax.errors import InputError
from sam_flax.files.json_values import is_number

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


# A box may leave the image by this many pixels and still count as rounding.
ROUNDING_PIXELS = 2.0
# Share of the boxes that must leave their images before all are taken for corners.
_LEAVING_SHARE = 0.3
# A box fits its mask if it overlaps the mask's own box so much, or differs by rounding alone.
_FITS_IOU = 0.9
_FAR_IOU = 0.5
# All boxes are misread if at most the one share of them fits as written and at least the other in some other way.
_FEW, _MOST = 0.2, 0.8

Boxes = np.ndarray  # (N, 4) float64
_WRITTEN = "[x, y, width, height] in pixels"


def _corners(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _around_centres(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


# Ways in which other programs write boxes, as corners in units of which the image has (width, height) or (1, 1).
_OTHERS: dict[str, tuple[Callable[[Boxes], Boxes], bool]] = {
    "corners [x0, y0, x1, y1] in pixels": (np.asarray, False),
    "[x, y, width, height] as shares of the image, 0 to 1": (_corners, True),
    "corners [x0, y0, x1, y1] as shares of the image, 0 to 1": (np.asarray, True),
    "[centre x, centre y, width, height] in pixels": (_around_centres, False),
    "[centre x, centre y, width, height] as shares of the image, 0 to 1": (_around_centres, True),
}


def misreading(boxes: Sequence[XYWH], sizes: Sequence[tuple[int, int]], mask_boxes: Sequence[Corners | None]) -> str:
    """A clause that says how the boxes of a file are written, if not in COCO's way; empty if they are.

    Args:
        boxes: as written.
        sizes: (width, height) of the image of each.
        mask_boxes: the box around the mask of each, None for those without a mask.
    """
    if not boxes:
        return ""
    written, limits = np.array(boxes, np.float64), np.array(sizes, np.float64)
    with_mask = [i for i, box in enumerate(mask_boxes) if box is not None]
    if with_mask:
        truth = np.array([mask_boxes[i] for i in with_mask], np.float64)
        own, size = written[with_mask], limits[with_mask]
        if _fits(_clipped(_corners(own), size), truth).mean() <= _FEW:
            for name, (corners, shares) in _OTHERS.items():
                found = corners(own) * (np.tile(size, 2) if shares else 1.0)
                if _fits(_clipped(found, size), truth).mean() >= _MOST:
                    return f"boxes that fit their masks as {name} and not as {_WRITTEN}"
    if (written >= 0).all() and written.max() <= 1 and limits.min() > ROUNDING_PIXELS:
        return f"boxes whose numbers all lie between 0 and 1, which are shares of the image and not {_WRITTEN}"
    leaving = (_corners(written)[:, 2:] > limits + ROUNDING_PIXELS).any(1)
    ordered = (written[:, :2] < written[:, 2:]).all() and (written[:, 2:] <= limits + ROUNDING_PIXELS).all()
    if ordered and leaving.mean() > _LEAVING_SHARE:
        return f"boxes that leave the image as {_WRITTEN} but fit as corners [x0, y0, x1, y1]"
    return ""


def far_from_masks(boxes: Sequence[Corners], mask_boxes: Sequence[Corners | None]) -> int:
    """How many boxes, as clipped corners, overlap the box around their own mask by less than half."""
    pairs = [(box, mask) for box, mask in zip(boxes, mask_boxes, strict=True) if mask is not None]
    if not pairs:
        return 0
    first, second = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
    return int(((_overlaps(first, second) < _FAR_IOU) & ~_close(first, second)).sum())


def _clipped(corners: Boxes, sizes: np.ndarray) -> Boxes:
    return np.clip(corners, 0, np.tile(sizes, 2))


def _fits(boxes: Boxes, truth: Boxes) -> np.ndarray:
    return (_overlaps(boxes, truth) >= _FITS_IOU) | _close(boxes, truth)


def _close(boxes: Boxes, truth: Boxes) -> np.ndarray:
    """Whether every corner is where it should be but for rounding, (N,)."""
    return (np.abs(boxes - truth) <= ROUNDING_PIXELS / 2).all(1)


def _overlaps(boxes: Boxes, truth: Boxes) -> np.ndarray:
    """IoU of each box with its partner, (N,); 0 where both are empty."""
    sides = np.minimum(boxes[:, 2:], truth[:, 2:]) - np.maximum(boxes[:, :2], truth[:, :2])
    common = np.prod(np.maximum(sides, 0), 1)
    areas = (np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), 1) for b in (boxes, truth))
    return common / np.maximum(sum(areas) - common, 1e-12)
