"""COCO datasets and box prompts, checked when they are read.

A dataset is a list of images (files, or arrays in memory) and their annotations in COCO's instance format
(https://cocodataset.org/#format-data). A box set is the list of prompts per image: the annotated boxes, or
those of any detector in COCO's results format (https://cocodataset.org/#format-results).

Every failure is one sentence that names the file and says what to do about it. What real data sets contain
and is harmless is repaired and counted instead: boxes that stick out of the image are clipped, boxes of zero
width or height are kept as ground truth but not used as prompts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

# A box may leave the image by this many pixels and still count as rounding in a results file.
_ROUNDING_PIXELS = 2.0
# Share of the boxes that must leave the image before a results file is taken for corner coordinates.
_CORNER_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotated object.

    Attributes:
      annotation_id: positive and unique in the dataset; the file's own unless that has zero, missing or
        double ids.
      category_id: the file's category.
      box: `(x0, y0, x1, y1)` in pixels of the image, clipped to it.
      iscrowd: whether the mask covers a crowd instead of one object.
    """

    annotation_id: int
    category_id: int
    box: tuple[float, float, float, float]
    iscrowd: bool

    @property
    def degenerate(self) -> bool:
        """Whether the box has no area and cannot serve as a prompt."""
        return _without_area(self.box)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageItem:
    """One image of a dataset: a file (`path`) or an array in memory (`array`, uint8, (H, W, 3) or (H, W))."""

    image_id: int
    name: str
    height: int
    width: int
    path: Path | None
    array: np.ndarray | None
    annotations: tuple[Annotation, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CocoDataset:
    """Images with annotations.

    Attributes:
      items: the images in the order of the file, cut by `limit`.
      coco: pycocotools object that holds exactly these images and their annotations.
      source: what to call the dataset in messages (the annotation file, or "generated scenes").
      listed_ids: ids of all images of the file, also those beyond `limit`.
      clipped_boxes: number of annotated boxes that stuck out of their image and were clipped.
      degenerate_boxes: number of annotated boxes without area, which serve as ground truth but not as
        prompts.
    """

    items: tuple[ImageItem, ...]
    coco: COCO
    source: str
    listed_ids: frozenset[int]
    clipped_boxes: int
    degenerate_boxes: int

    @classmethod
    def from_memory(
        cls,
        images: Sequence[np.ndarray],
        coco_dict: Mapping[str, Any],
        *,
        limit: int | None = None,
        source: str = "generated scenes",
    ) -> "CocoDataset":
        """Makes a dataset of arrays.

        Args:
          images: uint8 arrays (H, W, 3), in the order of `coco_dict["images"]`.
          coco_dict: a COCO instances document; `file_name` is optional in it.
          limit: number of images to keep, from the start.
          source: what to call the dataset in messages.

        Raises:
          ValueError: if the document or an array is not as described.
        """
        listed = coco_dict.get("images")
        if isinstance(listed, list) and len(listed) != len(images):
            raise ValueError(
                f"{source} has {len(images)} arrays but lists {len(listed)} images: pass one array "
                "per listed image, in the same order."
            )
        return _build_dataset(coco_dict, source, limit, images=images)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of annotations and images (bytes if in memory, names and file sizes if on disk)."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.image_id} {item.name} {item.height} {item.width} ".encode())
            if item.array is not None:
                digest.update(np.ascontiguousarray(item.array).tobytes())
            elif item.path is not None and item.path.exists():
                digest.update(str(item.path.stat().st_size).encode())
        annotations = self.coco.dataset["annotations"]
        digest.update(json.dumps(annotations, sort_keys=True, default=_json_bytes).encode())
        return digest.hexdigest()[:32]

    def read_image(self, item: ImageItem) -> np.ndarray:
        """Reads one image.

        An EXIF rotation is applied when the rotated size is the annotated one.

        Returns:
          uint8 RGB array (item.height, item.width, 3).

        Raises:
          FileNotFoundError: if the file is gone.
          ValueError: if it cannot be decoded, or its size is not the annotated one.
        """
        image = _decode_file(item.path) if item.path is not None else _decode_array(item)
        expected = (item.height, item.width)
        for candidate in (ImageOps.exif_transpose(image), image):
            if (candidate.height, candidate.width) == expected:
                return np.array(candidate.convert("RGB"))
        raise ValueError(
            f"{item.path or item.name} is {image.width}x{image.height} pixels but {self.source} says "
            f"{item.width}x{item.height}: use the images that the annotations were made for."
        )

    def ground_truth_rle(self, annotation_id: int) -> dict[str, Any]:
        """The annotated mask as a pycocotools run-length encoding at the image's size.

        Raises:
          ValueError: if the annotation has a box alone (`load_coco(..., require_masks=False)`).
        """
        annotation = self.coco.anns[annotation_id]
        if "segmentation" not in annotation:
            raise ValueError(f"Annotation {annotation_id} of {self.source} has no mask: evaluate on a file with masks.")
        image = self.coco.imgs[annotation["image_id"]]
        return _run_lengths(annotation["segmentation"], image["width"], image["height"])

    def notes(self) -> tuple[str, ...]:
        """Sentences about what was repaired while loading; empty if nothing was."""
        sentences = []
        if self.clipped_boxes:
            sentences.append(f"{self.source}: {self.clipped_boxes} boxes left their image and were clipped to it.")
        if self.degenerate_boxes:
            sentences.append(f"{self.source}: {self.degenerate_boxes} boxes have no area and are not used as prompts.")
        return tuple(sentences)


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


def load_coco(
    images_dir: str | os.PathLike[str],
    annotations_json: str | os.PathLike[str],
    limit: int | None = None,
    *,
    images_flag: str = "--images",
    annotations_flag: str = "--annotations",
    require_masks: bool = True,
) -> CocoDataset:
    """Loads a COCO folder; image files are opened only by `CocoDataset.read_image`.

    Args:
      images_dir: folder that holds the image files.
      annotations_json: instances file.
      limit: number of images to keep, from the start of the file; None keeps all.
      images_flag: name of the command-line flag behind `images_dir`, for messages.
      annotations_flag: name of the flag behind `annotations_json`, for messages.
      require_masks: whether every annotation must have a mask (evaluation) or a box is enough (calibration).

    Raises:
      FileNotFoundError: if the folder, the file or one of the images is absent.
      ValueError: if the file is not a COCO instances document or contradicts itself.
    """
    folder, document_path = Path(images_dir), Path(annotations_json)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"The image folder {folder} {problem}: give an existing folder with {images_flag}.")
    document = _read_json(document_path, annotations_flag, "a COCO instances file")
    if not isinstance(document, dict):
        hint = " (a list is a results file, which belongs to --boxes)" if isinstance(document, list) else ""
        raise ValueError(
            f"{document_path} is not a COCO instances file: it holds no object with images and "
            f"annotations{hint}; give such a file with {annotations_flag}."
        )
    dataset = _build_dataset(document, str(document_path), limit, folder=folder, require_masks=require_masks)
    absent = [item for item in dataset.items if item.path is not None and not item.path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(dataset.items)} images listed in {document_path} are not in "
            f"{folder} (the first is {absent[0].name}): give the folder that belongs to the annotations with "
            f"{images_flag}."
        )
    return dataset


def stream_images(
    dataset: CocoDataset, items: Iterable[ImageItem] | None = None, *, ahead: int = 2
) -> Generator[tuple[ImageItem, np.ndarray]]:
    """Yields images in order while a thread decodes the next ones.

    Args:
      dataset: where to read from.
      items: which of its images; all by default.
      ahead: how many images the thread may hold ready.
    """
    queue: deque[tuple[ImageItem, Future[np.ndarray]]] = deque()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-image")
    try:
        for item in dataset.items if items is None else items:
            queue.append((item, reader.submit(dataset.read_image, item)))
            if len(queue) > ahead:
                ready, image = queue.popleft()
                yield ready, image.result()
        while queue:
            ready, image = queue.popleft()
            yield ready, image.result()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


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
      ValueError: if there is none.
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
        raise ValueError(
            f"{dataset.source} has no box that can serve as a prompt (all are crowds or have no area): "
            "give a detector's results file with --boxes."
        )
    return boxes


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
      ValueError: if it is not in the results format, contradicts the dataset, or nothing is left of it.
    """
    if max_per_image < 1:
        raise ValueError(f"The number of boxes per image is {max_per_image}: give at least 1.")
    path = Path(path)
    document = _read_json(path, flag, "a COCO results file, or gt")
    if not isinstance(document, list):
        raise ValueError(
            f"{path} is not a COCO results file: it must hold a list of detections with image_id, "
            f"category_id, bbox and score; give such a file with {flag}, or {flag}=gt."
        )
    sizes = {item.image_id: (item.width, item.height) for item in dataset.items}
    categories = set(dataset.coco.cats)
    kept: dict[int, list[tuple[float, int, tuple[float, float, float, float]]]] = {i: [] for i in sizes}
    unknown = clipped = outside = low = beyond = 0
    looks_like_corners, leaving, total = True, 0, 0
    for number, entry in enumerate(document):
        image_id, category_id, (x, y, w, h), score = _parse_detection(entry, path, number)
        if image_id not in sizes:
            unknown += image_id not in dataset.listed_ids
            continue
        if category_id not in categories:
            raise ValueError(
                f"Detection {number} of {path} has category {category_id}, which {dataset.source} does not "
                "define: write category ids as the annotations number them, not as the detector's class "
                "index."
            )
        total += 1
        width, height = sizes[image_id]
        leaving += x + w > width + _ROUNDING_PIXELS or y + h > height + _ROUNDING_PIXELS
        looks_like_corners &= x < w <= width + _ROUNDING_PIXELS and y < h <= height + _ROUNDING_PIXELS
        box, was_clipped = _clip_box(x, y, w, h, width, height)
        if score < min_score:
            low += 1
        elif _without_area(box):
            outside += 1
        else:
            clipped += was_clipped
            kept[image_id].append((score, category_id, box))
    if total and looks_like_corners and leaving > _CORNER_SHARE * total:
        raise ValueError(
            f"{path} holds boxes that leave the image as [x, y, width, height] but fit as [x0, y0, x1, y1]: "
            "write width and height as the third and fourth number."
        )
    per_image = {}
    for image_id, rows in kept.items():
        rows.sort(key=lambda row: -row[0])
        beyond += max(0, len(rows) - max_per_image)
        rows = rows[:max_per_image]
        per_image[image_id] = ImageBoxes(
            boxes=np.array([row[2] for row in rows], np.float32).reshape(-1, 4),
            scores=np.array([row[0] for row in rows], np.float64),
            category_ids=np.array([row[1] for row in rows], np.int64),
            annotation_ids=np.zeros(len(rows), np.int64),
        )
    if not any(len(prompts) for prompts in per_image.values()):
        reason = (
            "its image ids are not those of the annotations"
            if document and unknown == len(document)
            else f"{total} detections are of the evaluated images, {low} of them below the score "
            f"{min_score:g} and {outside} without area in the image"
        )
        raise ValueError(f"No box is left of {path} for {dataset.source}: {reason}; check {flag} and the score limit.")
    counts = {
        "belong to images that the annotations do not list": unknown,
        "left their image and were clipped to it": clipped,
        "have no area in their image and were left out": outside,
        f"score below {min_score:g} and were left out": low,
        f"are beyond the {max_per_image} best of their image and were left out": beyond,
    }
    notes = tuple(f"{path}: {count} boxes {what}." for what, count in counts.items() if count)
    return BoxSet(str(path), per_image, notes)


def quiet_coco(dataset: dict[str, Any]) -> COCO:
    """A pycocotools object over a COCO document, made without its prints."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _read_json(path: Path, flag: str, expected: str) -> Any:
    """Parses a JSON file.

    Raises:
      FileNotFoundError, ValueError: with a sentence that names the file and the flag.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The file {path} {problem}: give {expected} with {flag}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable as JSON ({error}): give {expected} with {flag}, or copy the file again "
            "if it was cut off."
        ) from error


def _build_dataset(
    document: Mapping[str, Any],
    source: str,
    limit: int | None,
    *,
    folder: Path | None = None,
    images: Sequence[np.ndarray] | None = None,
    require_masks: bool = True,
) -> CocoDataset:
    """Checks a COCO document and turns it into a dataset, with images from a folder or from memory."""
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list):
            raise ValueError(
                f'{source} is not a COCO instances file: it has no list "{key}"; use an '
                "instances_*.json file, which has images, annotations and categories."
            )
    if limit is not None and limit < 1:
        raise ValueError(f"The limit of images is {limit}: give at least 1, or leave it out for all images.")
    listed, annotations = document["images"], document["annotations"]
    if not listed:
        raise ValueError(f"{source} lists no images: use an annotation file with at least one image.")
    if not annotations:
        raise ValueError(f"{source} has no annotations: use a file with at least one annotated object.")
    records = [_parse_image(record, source, position) for position, record in enumerate(listed)]
    listed_ids = frozenset(record["id"] for record in records)
    if len(listed_ids) != len(records):
        raise ValueError(f"{source} lists an image id twice: give every image its own id.")
    records = records[:limit]
    sizes = {record["id"]: (record["width"], record["height"]) for record in records}
    categories = _parse_categories(document, source)
    known_categories = {category["id"] for category in categories}

    kept: list[dict[str, Any]] = []
    parsed: dict[int, list[Annotation]] = {image_id: [] for image_id in sizes}
    renumber = _needs_new_ids(annotations)
    clipped = 0
    for position, raw in enumerate(annotations):
        name = f"Annotation {raw.get('id', position) if isinstance(raw, dict) else position} of {source}"
        if not isinstance(raw, dict) or not {"image_id", "category_id", "bbox"} <= raw.keys():
            raise ValueError(f"{name} lacks image_id, category_id or bbox: use COCO's instances format.")
        if not _is_integer(raw["image_id"]) or raw["image_id"] not in listed_ids:
            raise ValueError(
                f"{name} belongs to image {raw['image_id']}, which the file does not list: "
                "remove the annotation or add the image."
            )
        if raw["image_id"] not in sizes:
            continue
        if not _is_integer(raw["category_id"]) or raw["category_id"] not in known_categories:
            raise ValueError(
                f"{name} has category {raw['category_id']}, which the file does not define: "
                "add the category or correct the annotation."
            )
        width, height = sizes[raw["image_id"]]
        box, was_clipped = _annotated_box(raw["bbox"], width, height, name)
        clipped += was_clipped
        iscrowd = bool(raw.get("iscrowd", 0))
        record: dict[str, Any] = {
            "id": position + 1 if renumber else raw["id"],
            "image_id": raw["image_id"],
            "category_id": raw["category_id"],
            "bbox": [float(value) for value in raw["bbox"]],
            "iscrowd": int(iscrowd),
        }
        if require_masks or raw.get("segmentation"):
            record["segmentation"] = _check_segmentation(raw.get("segmentation"), width, height, name)
        record["area"] = _area(raw, record, width, height)
        kept.append(record)
        parsed[raw["image_id"]].append(Annotation(record["id"], record["category_id"], box, iscrowd))
    if not kept:
        raise ValueError(
            f"None of the first {len(records)} images of {source} has an annotation: evaluate more images (--limit)."
        )
    items = tuple(
        ImageItem(
            image_id=record["id"],
            name=_file_name(record, source, needed=folder is not None),
            height=record["height"],
            width=record["width"],
            path=None if folder is None else folder / record["file_name"],
            array=None if images is None else images[position],
            annotations=tuple(parsed[record["id"]]),
        )
        for position, record in enumerate(records)
    )
    coco = quiet_coco({"images": records, "annotations": kept, "categories": categories})
    degenerate = sum(a.degenerate for item in items for a in item.annotations)
    return CocoDataset(items, coco, source, listed_ids, clipped, degenerate)


def _parse_image(record: Any, source: str, position: int) -> dict[str, Any]:
    """One entry of "images", with its id and size checked."""
    name = f"Image {position} of {source}"
    if not isinstance(record, dict) or not _is_integer(record.get("id")):
        raise ValueError(f"{name} has no integer id: use COCO's instances format.")
    for key in ("height", "width"):
        if not _is_number(record.get(key)) or record[key] < 1 or record[key] != int(record[key]):
            raise ValueError(f"{name} (id {record['id']}) has no positive whole {key}: add the image's size in pixels.")
    return {**record, "height": int(record["height"]), "width": int(record["width"])}


def _file_name(record: Mapping[str, Any], source: str, *, needed: bool) -> str:
    """The image's file name; arrays in memory may go without."""
    name = record.get("file_name")
    if isinstance(name, str) and name:
        return name
    if needed:
        raise ValueError(f"Image {record['id']} of {source} has no file_name: add the name of its file.")
    return f"image {record['id']}"


def _parse_categories(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """The categories, or one per id in use if the file names none."""
    categories = document.get("categories")
    if categories is None:
        found = (a.get("category_id") for a in document["annotations"] if isinstance(a, dict))
        return [{"id": category, "name": str(category)} for category in sorted(set(filter(_is_integer, found)))]
    if not isinstance(categories, list) or not all(
        isinstance(category, dict) and _is_integer(category.get("id")) for category in categories
    ):
        raise ValueError(f"{source} has malformed categories: give a list of objects with a whole id and a name.")
    return [dict(category) for category in categories]


def _needs_new_ids(annotations: Sequence[Any]) -> bool:
    """Whether annotation ids must be replaced; pycocotools takes the ground-truth id 0 for "no match"."""
    ids = [a.get("id") for a in annotations if isinstance(a, dict)]
    return not all(_is_integer(i) and i > 0 for i in ids) or len(set(ids)) != len(ids)


def _annotated_box(bbox: Any, width: int, height: int, name: str) -> tuple[tuple[float, float, float, float], bool]:
    """The clipped corners of an annotated `[x, y, width, height]`, and whether clipping changed them."""
    if not isinstance(bbox, list | tuple) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        raise ValueError(f"{name} has the box {bbox}: write four finite numbers, [x, y, width, height].")
    x, y, w, h = (float(value) for value in bbox)
    if w < 0 or h < 0:
        raise ValueError(f"{name} has a box of negative size, {list(bbox)}: write [x, y, width, height].")
    beside = x >= width or (x < 0 and x + w <= 0)
    above_or_below = y >= height or (y < 0 and y + h <= 0)
    if beside or above_or_below:
        raise ValueError(
            f"{name} has the box {list(bbox)}, which lies outside its {width}x{height} image: correct or remove it."
        )
    return _clip_box(x, y, w, h, width, height)


def _clip_box(
    x: float, y: float, w: float, h: float, width: int, height: int
) -> tuple[tuple[float, float, float, float], bool]:
    """Corners of a box cut at the image's border, and whether the cut changed them."""
    corners = (x, y, x + w, y + h)
    clipped = (
        min(max(x, 0.0), width),
        min(max(y, 0.0), height),
        min(max(x + w, 0.0), width),
        min(max(y + h, 0.0), height),
    )
    # Sums such as 0.1 + 0.2 leave the image by rounding alone; that is nothing to report.
    return clipped, any(abs(a - b) > 1e-3 for a, b in zip(corners, clipped, strict=True))


def _without_area(box: tuple[float, float, float, float]) -> bool:
    """Whether a box is empty in the float32 numbers that prompts are made of."""
    x0, y0, x1, y1 = (np.float32(value) for value in box)
    return bool(x1 <= x0 or y1 <= y0)


def _check_segmentation(segmentation: Any, width: int, height: int, name: str) -> Any:
    """A mask in one of COCO's three encodings: polygons, run lengths, or compressed run lengths.

    pycocotools reads a malformed mask as something else or past its end, so it is refused here.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons = [segmentation] if all(_is_number(v) for v in segmentation) else segmentation
        # A polygon of two points has no area, and pycocotools would take its four numbers for a box.
        usable = [p for p in polygons if isinstance(p, list) and len(p) >= 6]
        if usable and all(len(p) % 2 == 0 and all(_is_number(v) for v in p) for p in usable):
            return usable
    if isinstance(segmentation, dict) and segmentation.get("counts"):
        size, counts = segmentation.get("size"), segmentation["counts"]
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise ValueError(
                f"{name} has a mask of size {size}, but its image has [height, width] {[height, width]}: "
                "make the mask at the image's size."
            )
        if isinstance(counts, str | bytes):
            counts = _decompress(counts)
        if (
            isinstance(counts, list)
            and all(_is_integer(v) and v >= 0 for v in counts)
            and sum(counts) == width * height
        ):
            return segmentation
    raise ValueError(
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


def _area(raw: Mapping[str, Any], record: Mapping[str, Any], width: int, height: int) -> float:
    """The annotated area, or that of the mask, or that of the box."""
    if _is_number(raw.get("area")) and raw["area"] >= 0:
        return float(raw["area"])
    if "segmentation" not in record:
        return record["bbox"][2] * record["bbox"][3]
    return float(mask_utils.area(_run_lengths(record["segmentation"], width, height)))


def _run_lengths(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Compressed run lengths of a checked mask; the polygons of one object are united."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation


def _parse_detection(entry: Any, path: Path, number: int) -> tuple[int, int, tuple[float, float, float, float], float]:
    """One entry of a results file: image id, category id, box as written, score."""
    name = f"Detection {number} of {path}"
    if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= entry.keys():
        missing = sorted({"image_id", "category_id", "bbox", "score"} - set(entry)) if isinstance(entry, dict) else []
        what = f"lacks {', '.join(missing)}" if missing else "is not an object"
        raise ValueError(f"{name} {what}: use COCO's results format (image_id, category_id, bbox, score).")
    bbox, score = entry["bbox"], entry["score"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        raise ValueError(f"{name} has the box {bbox}: write four finite numbers, [x, y, width, height].")
    if bbox[2] < 0 or bbox[3] < 0:
        raise ValueError(f"{name} has a box of negative size, {bbox}: write [x, y, width, height].")
    if not _is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"{name} has the score {score}: write a probability between 0 and 1.")
    if not _is_integer(entry["image_id"]) or not _is_integer(entry["category_id"]):
        raise ValueError(f"{name} has an image_id or category_id that is not a whole number: use the annotations' ids.")
    x, y, w, h = (float(value) for value in bbox)
    return entry["image_id"], entry["category_id"], (x, y, w, h), float(score)


def _decode_file(path: Path) -> Image.Image:
    """Opens and fully decodes an image file."""
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


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image with 8 bits per channel; Pillow would clip 16-bit grey values at 255, not scale them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"The image {name} has 32 bits per pixel: convert it to 8 bits per channel.")
    return image


def _decode_array(item: ImageItem) -> Image.Image:
    """An array in memory as an image."""
    array = None if item.array is None else np.asarray(item.array)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        found = "none" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(f"The array of {item.name} is {found}: give uint8 of shape (height, width, 3).")
    return Image.fromarray(array)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _json_bytes(value: Any) -> Any:
    """Bytes (compressed run lengths) and NumPy numbers as JSON values."""
    return value.decode() if isinstance(value, bytes) else value.item()
