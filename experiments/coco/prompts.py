"""Box prompts: the annotated boxes, or a detector's (https://cocodataset.org/#format-results)."""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.coco.dataset import CocoDataset, stream_images
from sam_flax.errors import InputError
from sam_flax.files.coco_boxes import XYWH, Corners, clip_box, misreading, parse_box, without_area
from sam_flax.files.json_values import is_integer, is_number, read_json


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBoxes:
    """Box prompts of one image.

    Attributes:
      boxes: float32 (N, 4), `(x0, y0, x1, y1)` in pixels of the original image.
      scores: float64 (N,), the detector's scores; 1 for annotated boxes.
      category_ids: int64 (N,).
      annotation_ids: int64 (N,), the annotation that each box belongs to; 0 for a detector's box.
    """

    boxes: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray
    annotation_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)


@dataclasses.dataclass(frozen=True, eq=False)
class BoxSet:
    """Box prompts of a dataset.

    Attributes:
      source: "gt" or the results file.
      per_image: prompts by image id; every image of the dataset has an entry, possibly empty.
      notes: sentences about boxes that were clipped or left out.
    """

    source: str
    per_image: Mapping[int, ImageBoxes]
    notes: tuple[str, ...] = ()

    @property
    def from_annotations(self) -> bool:
        """Whether every box belongs to one annotated object."""
        return self.source == "gt"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all boxes, scores and categories."""
        digest = hashlib.sha256(str(self.from_annotations).encode())
        for image_id in sorted(self.per_image):
            prompts = self.per_image[image_id]
            digest.update(str(image_id).encode())
            for array in (prompts.boxes, prompts.scores, prompts.category_ids, prompts.annotation_ids):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return sum(len(prompts) for prompts in self.per_image.values())


def load_boxes(
    source: str | os.PathLike[str], dataset: CocoDataset, *, max_per_image: int = 100, min_score: float = 0.0
) -> BoxSet:
    """The prompts that the flag `--boxes` names: "gt", or a results file (see `load_detections`)."""
    if str(source) == "gt":
        return annotated_boxes(dataset)
    return load_detections(source, dataset, max_per_image=max_per_image, min_score=min_score)


def annotated_boxes(dataset: CocoDataset) -> BoxSet:
    """The box of every object that is not a crowd, with score 1.

    Raises:
      InputError: if there is none.
    """
    per_image = {}
    for item in dataset.items:
        usable = [a for a in item.annotations if not a.iscrowd and not a.degenerate]
        per_image[item.image_id] = ImageBoxes(
            boxes=np.array([a.box for a in usable], np.float32).reshape(-1, 4),
            scores=np.ones(len(usable)),
            category_ids=np.array([a.category_id for a in usable], np.int64),
            annotation_ids=np.array([a.annotation_id for a in usable], np.int64),
        )
    boxes = BoxSet("gt", per_image)
    if not len(boxes):
        if dataset.all_crowds:
            raise InputError(
                f"{dataset.source} marks all of its {dataset.crowd_count} objects as crowds (iscrowd 1), as CVAT's "
                "export does with every mask; crowds are no prompts and COCO's AP leaves them out, so set iscrowd to 0 "
                "in the file, or export polygons."
            )
        raise InputError(
            f"{dataset.source} has no box that can serve as a prompt (all are crowds or have no area): "
            "give a detector's results file with --boxes."
        )
    return boxes


def prompted_images(dataset: CocoDataset, count: int, progress: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images (H, W, 3) with `count` annotated boxes each, (count, 4), so that one compilation serves all.

    Args:
      dataset: where from; images without a box are left out.
      count: an image's boxes are repeated or cut to this number.
      progress: what the bar on stderr is called.
    """
    boxes = annotated_boxes(dataset).per_image
    items = [item for item in dataset.items if len(boxes[item.image_id])]
    for item, image in tqdm(stream_images(dataset, items), total=len(items), desc=progress):
        yield image, np.resize(boxes[item.image_id].boxes, (count, 4))


def load_detections(
    path: str | os.PathLike[str],
    dataset: CocoDataset,
    max_per_image: int = 100,
    min_score: float = 0.0,
    *,
    flag: str = "--boxes",
) -> BoxSet:
    """Loads a detector's boxes, a list of `{image_id, category_id, bbox: [x, y, width, height], score}`.

    Boxes are clipped to their image; those without area in it are left out. Detections of images that the
    dataset does not contain are left out too, since results of a whole data set are commonly used on a part
    of it.

    Args:
      path: the results file.
      dataset: the images to prompt.
      max_per_image: how many boxes to keep per image, best scores first.
      min_score: boxes with a lower score are left out.
      flag: name of the command-line flag behind `path`, for messages.

    Raises:
      FileNotFoundError: if the file is absent.
      InputError: if it is not in the results format, contradicts the dataset, or nothing is left of it.
    """
    if max_per_image < 1:
        raise InputError(f"The number of boxes per image is {max_per_image}: give at least 1.")
    path = Path(path)
    document = read_json(path, flag, "a COCO results file, or gt")
    if not isinstance(document, list):
        raise InputError(
            f"{path} is not a COCO results file: it must hold a list of detections with image_id, "
            f"category_id, bbox and score; give such a file with {flag}, or {flag}=gt."
        )
    kept, counts = _select(document, path, dataset, min_score)
    per_image = {image_id: _best(rows, max_per_image) for image_id, rows in kept.items()}
    if not any(len(prompts) for prompts in per_image.values()):
        reason = (
            "its image ids are not those of the annotations"
            if document and counts["unknown"] == len(document)
            else f"{counts['total']} detections are of the evaluated images, {counts['low']} of them below the score "
            f"{min_score:g} and {counts['outside']} without area in the image"
        )
        raise InputError(f"No box is left of {path} for {dataset.source}: {reason}; check {flag} and the score limit.")
    found = {
        "belong to images that the annotations do not list": counts["unknown"],
        "left their image and were clipped to it": counts["clipped"],
        "have no area in their image and were left out": counts["outside"],
        f"score below {min_score:g} and were left out": counts["low"],
        f"are beyond the {max_per_image} best of their image and were left out": sum(
            max(0, len(rows) - max_per_image) for rows in kept.values()
        ),
    }
    notes = tuple(f"{path}: {count} boxes {what}." for what, count in found.items() if count)
    return BoxSet(str(path), per_image, notes)


class _Detection(NamedTuple):
    score: float
    category_id: int
    box: Corners


def _select(
    document: list[Any], path: Path, dataset: CocoDataset, min_score: float
) -> tuple[dict[int, list[_Detection]], Counter[str]]:
    """The usable detections of every image of the dataset, and how many were unknown, clipped, outside or low.

    Raises:
      InputError: if an entry is malformed, or its boxes are not written as COCO writes them.
    """
    sizes = {item.image_id: (item.width, item.height) for item in dataset.items}
    categories = set(dataset.coco.cats)
    kept: dict[int, list[_Detection]] = {image_id: [] for image_id in sizes}
    counts: Counter[str] = Counter()
    written: list[XYWH] = []
    limits: list[tuple[int, int]] = []
    for number, entry in enumerate(document):
        image_id, category_id, as_written, score = _parse_detection(entry, path, number)
        if image_id not in sizes:
            counts["unknown"] += image_id not in dataset.listed_ids
            continue
        if category_id not in categories:
            raise InputError(
                f"Detection {number} of {path} has category {category_id}, which {dataset.source} does not "
                "define: write category ids as the annotations number them, not as the detector's class "
                "index."
            )
        counts["total"] += 1
        width, height = sizes[image_id]
        written.append(as_written)
        limits.append((width, height))
        box, was_clipped = clip_box(*as_written, width, height)
        if score < min_score:
            counts["low"] += 1
        elif without_area(box):
            counts["outside"] += 1
        else:
            counts["clipped"] += was_clipped
            kept[image_id].append(_Detection(score, category_id, box))
    if wrong := misreading(written, limits, [None] * len(written)):
        raise InputError(f"{path} holds {wrong}: write COCO's [x, y, width, height] in pixels.")
    return kept, counts


def _best(detections: list[_Detection], count: int) -> ImageBoxes:
    """The detections with the best scores."""
    best = sorted(detections, key=lambda detection: -detection.score)[:count]
    return ImageBoxes(
        boxes=np.array([d.box for d in best], np.float32).reshape(-1, 4),
        scores=np.array([d.score for d in best], np.float64),
        category_ids=np.array([d.category_id for d in best], np.int64),
        annotation_ids=np.zeros(len(best), np.int64),
    )


def _parse_detection(entry: Any, path: Path, number: int) -> tuple[int, int, XYWH, float]:
    """One entry of a results file: image id, category id, box as written, score."""
    name = f"Detection {number} of {path}"
    if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= entry.keys():
        missing = sorted({"image_id", "category_id", "bbox", "score"} - set(entry)) if isinstance(entry, dict) else []
        what = f"lacks {', '.join(missing)}" if missing else "is not an object"
        raise InputError(f"{name} {what}: use COCO's results format (image_id, category_id, bbox, score).")
    score, box = entry["score"], parse_box(entry["bbox"], name)
    if not is_number(score) or not 0 <= score <= 1:
        raise InputError(f"{name} has the score {score}: write a probability between 0 and 1.")
    if not is_integer(entry["image_id"]) or not is_integer(entry["category_id"]):
        raise InputError(f"{name} has an image_id or category_id that is not a whole number: use the annotations' ids.")
    return entry["image_id"], entry["category_id"], box, float(score)
