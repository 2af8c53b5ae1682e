"""Seeded synthetic scenes on which MINI is trained, calibrated and evaluated.

Each scene holds 4 to 8 annotated objects whose outline cannot be guessed from their bounding box: letters,
rings, crescents, stars, curves, unions, figures with limbs. They are textured, lit, rotated, and occlude
each other over a cluttered background. An instance mask is the *visible* part of its object.

`make_scene(seed, index, size)` is a pure function of its arguments: scenes can be made in any order, by any
number of processes. Use the disjoint streams `TRAIN_SEED`, `CALIB_SEED` and `EVAL_SEED`.

To look at some scenes::

    python -m experiments.scenes --size=192 --count=8 --seed=0 --out=/tmp/scenes
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from experiments.coco.masks import encode
from experiments.scenes.outlines import random_shape, rasterise
from experiments.scenes.surfaces import appearance, background, photograph, pick_colour

# Streams never share a scene: the seed is part of the generator's entropy, whatever the index.
TRAIN_SEED = 101
CALIB_SEED = 202
EVAL_SEED = 303

MIN_OBJECTS = 4
MAX_OBJECTS = 8
# Below this share of the image an object is a few pixels wide on a half-resolution mask: unfair to score.
MIN_VISIBLE_AREA = 0.008
# An occluded object keeps at least this share of what the image frame shows of it.
MIN_VISIBLE_FRACTION = 0.45
# RGB distance across the outline (channels in [0, 1]) that counts as visible; share of outline that must be.
MIN_EDGE_CONTRAST = 0.09
MIN_VISIBLE_OUTLINE = 0.8


@dataclass(frozen=True)
class Scene:
    """One generated image and its instance masks.

    Attributes:
        image: uint8 (S, S, 3), RGB.
        masks: bool (N, S, S), the visible part of each annotated object; no pixel belongs to two objects.
    """

    image: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4), the tight boxes of the masks as (x0, y0, x1, y1); see `boxes_xyxy`."""
        return boxes_xyxy(self.masks)


# ------------------------------------------------------------------------------------------------ composition


class _Placed(NamedTuple):
    """An object's square patch and the part of it that lies inside the image."""

    rows: slice
    columns: slice
    patch: tuple[slice, slice]


def _window(top: int, left: int, side: int, size: int) -> _Placed:
    y0, y1, x0, x1 = max(top, 0), min(top + side, size), max(left, 0), min(left + side, size)
    return _Placed(slice(y0, y1), slice(x0, x1), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)))


def _place(
    rng: np.random.Generator, coverage: np.ndarray, visible: list[np.ndarray], framed: list[float], size: int
) -> _Placed | None:
    """A place where the new object shows enough of itself and leaves enough of those below it, or None."""
    side, floor = coverage.shape[0], MIN_VISIBLE_AREA * size * size
    for _ in range(8):
        x, y = rng.uniform(0.08, 0.92, 2) * size - side / 2
        place = _window(int(y), int(x), side, size)
        part = coverage[place.patch]
        shown = float(part.sum())
        if shown < max(1.3 * floor, 0.6 * float(coverage.sum())):
            continue
        for below, frame in zip(visible, framed, strict=True):
            left_over = float(below.sum()) - float((below[place.rows, place.columns] * part).sum())
            if left_over < max(1.1 * floor, MIN_VISIBLE_FRACTION * frame):
                break
        else:
            return place
    return None


def _cast_shadow(
    rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, place: _Placed, light: np.ndarray
) -> None:
    size = image.shape[0]
    margin = max(2, round(size * rng.uniform(0.01, 0.035)))
    padded = cv2.copyMakeBorder(coverage, 2 * margin, 2 * margin, 2 * margin, 2 * margin, cv2.BORDER_CONSTANT)
    shadow = cv2.GaussianBlur(padded, (0, 0), margin / 2)
    top = place.rows.start - place.patch[0].start - 2 * margin - round(margin * float(light[1]))
    left = place.columns.start - place.patch[1].start - 2 * margin - round(margin * float(light[0]))
    window = _window(top, left, padded.shape[0], size)
    image[window.rows, window.columns] *= 1 - np.float32(rng.uniform(0.2, 0.6)) * shadow[window.patch][..., None]


def _without_crumbs(mask: np.ndarray, floor: float) -> np.ndarray:
    """Removes from a uint8 mask the connected pieces smaller than `floor` pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count <= 2:
        return mask
    keep = stats[:, cv2.CC_STAT_AREA] >= floor
    keep[0] = False
    return keep[labels].astype(np.uint8)


def _outline_visibility(image: np.ndarray, mask: np.ndarray) -> float:
    """The share of a mask's outline across which the local mean colour changes by `MIN_EDGE_CONTRAST`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = (slice(max(rows[0] - 4, 0), rows[-1] + 5), slice(max(columns[0] - 4, 0), columns[-1] + 5))
    inside = mask[crop].astype(np.float32)
    edge = (inside > 0) & (cv2.erode(inside, np.ones((3, 3), np.uint8)) == 0)
    if not edge.any():
        return 1.0  # the object fills the crop: its outline is the image frame
    pixels = image[crop].astype(np.float32) / 255
    total, share = cv2.blur(pixels, (5, 5))[edge], cv2.blur(inside, (5, 5))[edge][:, None]
    mean_inside = cv2.blur(pixels * inside[..., None], (5, 5))[edge]
    difference = mean_inside / share - (total - mean_inside) / np.maximum(1 - share, 1e-3)
    return float((np.sqrt((difference**2).sum(-1)) >= MIN_EDGE_CONTRAST).mean())


def _compose(rng: np.random.Generator, size: int) -> Scene:
    image = background(rng, size)
    heading = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(heading), np.sin(heading)], np.float32)
    visible: list[np.ndarray] = []  # float32 (S, S) each: coverage less what covers it
    framed: list[float] = []  # pixels of each that the image frame shows
    wanted = int(rng.integers(MIN_OBJECTS + 1, MAX_OBJECTS + 1))
    for _ in range(3 * wanted):
        if len(visible) == wanted:
            break
        diameter = size * (0.2 + 0.35 * rng.beta(1.2, 1.6))
        coverage = rasterise(random_shape(rng), diameter)
        if coverage.sum() < 1.3 * MIN_VISIBLE_AREA * size * size:
            continue
        place = _place(rng, coverage, visible, framed, size)
        if place is None:
            continue
        if rng.random() < 0.45:
            _cast_shadow(rng, image, coverage, place, light)
        softness = rng.uniform(0.2, 0.7) * size / 192
        if rng.random() < 0.5:
            coverage = cv2.GaussianBlur(coverage, (0, 0), softness)
        part = coverage[place.patch]
        canvas = image[place.rows, place.columns]
        ring = (cv2.dilate(part, np.ones((5, 5), np.uint8)) > 0.5) & (part < 0.1)
        around = canvas[ring] if ring.any() else canvas.reshape(-1, 3)
        colour = pick_colour(rng, around, rng.uniform(0.22, 0.5))
        surface = appearance(rng, coverage, colour, light)[place.patch]
        canvas += part[..., None] * (surface - canvas)
        for below in visible:
            below[place.rows, place.columns] *= 1 - part
        own = np.zeros((size, size), np.float32)
        own[place.rows, place.columns] = part
        visible.append(own)
        framed.append(float(part.sum()))

    pixels = photograph(rng, image)
    masks = []
    for own in visible:
        mask = _without_crumbs((own > 0.5).astype(np.uint8), 4e-4 * size * size).astype(bool)
        # What people could not see stays in the image, unannotated, like any other clutter.
        if mask.mean() >= MIN_VISIBLE_AREA and _outline_visibility(pixels, mask) >= MIN_VISIBLE_OUTLINE:
            masks.append(mask)
    return Scene(pixels, np.stack(masks) if masks else np.zeros((0, size, size), bool))


def make_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Draws scene number `index` of stream `seed`.

    Args:
        seed: the stream, not negative; `TRAIN_SEED`, `CALIB_SEED` or `EVAL_SEED`.
        index: the scene's number in the stream, not negative.
        size: side of the square image in pixels, at least 64.

    Returns:
        A `Scene` with 4 to 8 masks. The same arguments always give the same scene; another size gives another
        arrangement.

    Raises:
        ValueError: if an argument is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed={seed}, index={index}.")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels for objects to be recognisable, got {size}.")
    rng = np.random.default_rng([seed, index])
    while True:  # rarely, crowding or the visibility check leaves too few objects: draw on
        scene = _compose(rng, size)
        if len(scene.masks) >= MIN_OBJECTS:
            return scene


def scene_dataset(seed: int, count: int, size: int = 128, start: int = 0) -> Iterator[Scene]:
    """Yields scenes `start` to `start + count - 1` of stream `seed`, one at a time."""
    for index in range(start, start + count):
        yield make_scene(seed, index, size)


# -------------------------------------------------------------------------------------- boxes and COCO format


def boxes_xyxy(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks.

    Args:
        masks: bool (N, H, W), none empty.

    Returns:
        float32 (N, 4): (x0, y0, x1, y1) with exclusive ends, so that width is x1 - x0 as in COCO annotations.

    Raises:
        ValueError: if a mask is empty.
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in enumerate(masks):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(ys):
            raise ValueError(f"mask {row} is empty and has no box; drop empty masks first.")
        boxes[row] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return boxes


def boxes_xywh(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks (N, H, W) as COCO writes them: float32 (N, 4), (x, y, width, height)."""
    boxes = boxes_xyxy(masks)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO run-length encoding of a mask (H, W), with `counts` as text so that it can be written as JSON."""
    return {"size": list(mask.shape), "counts": encode(mask[None])[0]}


def to_coco(scenes: Iterable[Scene]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Turns scenes into images and a COCO instances dictionary, for the evaluation path of real COCO.

    Args:
        scenes: any number of scenes.

    Returns:
        The images, uint8 (S, S, 3) each, and the dictionary (`info`, `images`, `annotations`, `categories`).
        Image ids are 1, 2, ... in the order of the images. All objects share category 1, "object".
    """
    images: list[np.ndarray] = []
    coco: dict[str, Any] = {
        "info": {"description": "synthetic scenes"},
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }
    for image_id, scene in enumerate(scenes, 1):
        images.append(scene.image)
        height, width = scene.image.shape[:2]
        name = f"scene_{image_id:06d}.png"
        coco["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for mask, box in zip(scene.masks, boxes_xywh(scene.masks), strict=True):
            annotation = {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": encode_mask(mask),
                "bbox": [float(value) for value in box],
                "area": float(mask.sum()),
                "iscrowd": 0,
            }
            coco["annotations"].append(annotation)
    return images, coco


# ---------------------------------------------------------------------------------------------------- looking


def contact_sheet(scenes: Sequence[Scene], columns: int = 4) -> np.ndarray:
    """Scenes in a grid, each above a copy with its masks outlined and tinted: uint8 (H, W, 3), RGB."""
    size = scenes[0].image.shape[0]
    rows = -(-len(scenes) // columns)
    sheet = np.full((rows * 2 * (size + 2), columns * (size + 2), 3), 255, np.uint8)
    for number, scene in enumerate(scenes):
        annotated = scene.image.copy()
        for colour_index, mask in enumerate(scene.masks):
            hue = np.array([[[(colour_index * 67) % 180, 255, 255]]], np.uint8)
            ink = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
            annotated[mask] = (0.5 * annotated[mask] + 0.5 * ink).astype(np.uint8)
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(annotated, contours, -1, ink.tolist(), 1)
        top, left = (number // columns) * 2 * (size + 2), (number % columns) * (size + 2)
        sheet[top : top + size, left : left + size] = scene.image
        sheet[top + size + 2 : top + 2 * size + 2, left : left + size] = annotated
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a contact sheet of scenes as PNG."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=192, help="side of each scene in pixels")
    parser.add_argument("--count", type=int, default=8, help="number of scenes")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="stream of scenes")
    parser.add_argument("--start", type=int, default=0, help="index of the first scene")
    parser.add_argument("--out", type=Path, required=True, help="folder for the sheet")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error("--count must be at least 1.")
    scenes = list(scene_dataset(arguments.seed, arguments.count, arguments.size, arguments.start))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"scenes_{arguments.seed}_{arguments.start}_{arguments.size}.png"
    if not cv2.imwrite(str(path), cv2.cvtColor(contact_sheet(scenes), cv2.COLOR_RGB2BGR)):
        parser.error(f"could not write {path}; choose a writable folder with --out.")
    print(path)
