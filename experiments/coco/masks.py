"""Masks as COCO writes them: polygons, run lengths and compressed run lengths (RLE)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from sam_flax.errors import InputError
from sam_flax.files.json_values import is_integer, is_number


def check_segmentation(segmentation: Any, width: int, height: int, name: str) -> Any:
    """A mask in one of COCO's three encodings: polygons, run lengths, or compressed run lengths.

    pycocotools reads a malformed mask as something else or past its end, so it is refused here.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons = [segmentation] if all(is_number(v) for v in segmentation) else segmentation
        # A polygon of two points has no area, and pycocotools would take its four numbers for a box.
        usable = [p for p in polygons if isinstance(p, list) and len(p) >= 6]
        if usable and all(len(p) % 2 == 0 and all(is_number(v) for v in p) for p in usable):
            return usable
    if isinstance(segmentation, dict) and segmentation.get("counts"):
        size, counts = segmentation.get("size"), segmentation["counts"]
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise InputError(
                f"{name} has a mask of size {size}, but its image has [height, width] {[height, width]}: "
                "make the mask at the image's size."
            )
        if isinstance(counts, str | bytes):
            counts = _decompress(counts)
        if isinstance(counts, list) and all(is_integer(v) and v >= 0 for v in counts) and sum(counts) == width * height:
            return segmentation
    raise InputError(
        f"{name} has no valid mask: give polygons of at least three points, or run lengths that cover the image."
    )


def _decompress(counts: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed form, or [-1] if it is not of that form.

    Each number is written in 6-bit characters from "0" on, low bits first: 5 bits of it and one that says
    whether more follow; from the fourth on it is the difference from the run two before (pycocotools'
    maskApi.c).
    """
    codes = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        if not 48 <= code < 112:
            return [-1]
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return [-1] if shift else runs


def run_lengths(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Compressed run lengths of a checked mask; the polygons of one object are united."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation


def box_around(segmentation: Any, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Corners of the smallest box around a checked mask, cut at the image's border; None if it is empty."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation])
        x0, y0 = np.clip(points.min(0), 0, (width, height))
        x1, y1 = np.clip(points.max(0), 0, (width, height))
    else:
        x0, y0, w, h = mask_utils.toBbox(run_lengths(segmentation, width, height))
        x1, y1 = x0 + w, y0 + h
    return (float(x0), float(y0), float(x1), float(y1)) if x1 > x0 and y1 > y0 else None


def encode(masks: np.ndarray) -> list[str]:
    """Compressed run lengths of masks (N, H, W) bool: the `counts` of each."""
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1).astype(np.uint8))
    return [rle["counts"].decode() for rle in mask_utils.encode(columns)]


def decode(rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Masks (N, H, W) bool of run lengths that all have this (height, width); N may be 0."""
    if not rles:
        return np.zeros((0, *size), bool)
    return np.moveaxis(mask_utils.decode(list(rles)), -1, 0).astype(bool)


def iou(first: dict[str, Any], second: dict[str, Any]) -> float:
    """IoU of two run-length masks; 1 if both are empty."""
    if not mask_utils.area(first) and not mask_utils.area(second):
        return 1.0
    return float(mask_utils.iou([first], [second], [0])[0, 0])
