"""COCO's instance documents, checked (https://cocodataset.org/#format-data)."""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from pycocotools import mask as mask_utils

from experiments.coco.masks import box_around, check_segmentation, run_lengths
from sam_flax.errors import InputError
from sam_flax.files.coco_boxes import Corners, clip_box, far_from_masks, misreading, parse_box
from sam_flax.files.json_values import is_integer, is_number


@dataclasses.dataclass(frozen=True, eq=False)
class Instances:
    """What is used of a document, for its first images.

    Attributes:
      images: records of the images, each with a whole `id`, `height` and `width`.
      annotations: their annotations, in the fields that pycocotools reads.
      boxes: the box of each annotation, clipped to its image.
      categories: records with a whole `id`.
      listed_ids: ids of all images of the document.
      clipped: number of boxes that stuck out of their image.
      far: number of boxes that overlap the box around their own mask by less than half.
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    boxes: list[Corners]
    categories: list[dict[str, Any]]
    listed_ids: frozenset[int]
    clipped: int
    far: int


def parse_instances(document: Mapping[str, Any], source: str, limit: int | None, require_masks: bool) -> Instances:
    """Checks a document and takes what is used of it; the document is left as it is.

    Args:
      document: the parsed JSON.
      source: what to call it in messages.
      limit: number of images to keep, from the start; None keeps all.
      require_masks: whether every annotation must have a mask and a category; else boxes are enough, and a mask
        that cannot be used is left out.

    Raises:
      InputError: if it is not an instances document, contradicts itself, or has nothing for these images.
    """
    listed, raw_annotations = _lists(document, source, limit)
    images = [_parse_image(record, source, position) for position, record in enumerate(listed)]
    listed_ids = frozenset(record["id"] for record in images)
    if len(listed_ids) != len(images):
        raise InputError(f"{source} lists an image id twice: give every image its own id.")
    images = images[:limit]
    sizes = {record["id"]: (record["width"], record["height"]) for record in images}
    categories = _parse_categories(document, source)
    known_categories = {category["id"] for category in categories}

    renumber = _needs_new_ids(raw_annotations)
    found: list[_Parsed] = []
    for position, raw in enumerate(raw_annotations):
        name = f"Annotation {raw.get('id', position) if isinstance(raw, dict) else position} of {source}"
        _check_annotation(raw, name, listed_ids, known_categories, require_masks)
        if raw["image_id"] in sizes:
            number = position + 1 if renumber else raw["id"]
            found.append(_parse_annotation(raw, name, number, sizes[raw["image_id"]], require_masks))
    if not found:
        raise InputError(
            f"None of the first {len(images)} images of {source} has an annotation: evaluate more images (--limit)."
        )
    records, boxes = [one.record for one in found], [one.box for one in found]
    mask_boxes = [one.mask_box for one in found]
    written = [tuple(record["bbox"]) for record in records]
    if wrong := misreading(written, [sizes[record["image_id"]] for record in records], mask_boxes):
        raise InputError(f"{source} holds {wrong}: write COCO's [x, y, width, height] in pixels.")
    clipped, far = sum(one.clipped for one in found), far_from_masks(boxes, mask_boxes)
    return Instances(images, records, boxes, categories, listed_ids, clipped, far)


class _Parsed(NamedTuple):
    """One annotation: its record for pycocotools, its clipped box, whether that was cut, the box around its mask."""

    record: dict[str, Any]
    box: Corners
    clipped: bool
    mask_box: Corners | None


def _check_annotation(
    raw: Any, name: str, image_ids: Container[int], categories: Container[int], require_masks: bool
) -> None:
    """InputError unless an annotation has what is needed and belongs to an image and a category of its file."""
    needed = ("image_id", "category_id", "bbox") if require_masks else ("image_id", "bbox")
    if not isinstance(raw, dict) or not set(needed) <= raw.keys():
        missing = [key for key in needed if not isinstance(raw, dict) or key not in raw]
        raise InputError(f"{name} lacks {', '.join(missing)}: use COCO's instances format.")
    if not is_integer(raw["image_id"]) or raw["image_id"] not in image_ids:
        raise InputError(
            f"{name} belongs to image {raw['image_id']}, which the file does not list: "
            "remove the annotation or add the image."
        )
    if require_masks and (not is_integer(raw["category_id"]) or raw["category_id"] not in categories):
        raise InputError(
            f"{name} has category {raw['category_id']}, which the file does not define: "
            "add the category or correct the annotation."
        )


def _parse_annotation(
    raw: Mapping[str, Any], name: str, number: int, size: tuple[int, int], require_masks: bool
) -> _Parsed:
    """A checked annotation of an image of this (width, height); `number` becomes its id."""
    category = raw.get("category_id")
    box, clipped = _annotated_box(raw["bbox"], *size, name)
    record: dict[str, Any] = {
        "id": number,
        "image_id": raw["image_id"],
        "category_id": category if is_integer(category) else 0,
        "bbox": [float(value) for value in raw["bbox"]],
        "iscrowd": int(bool(raw.get("iscrowd", 0))),
    }
    mask = _mask(raw.get("segmentation"), *size, name, require_masks)
    if mask is not None:
        record["segmentation"] = mask
    record["area"] = _area(raw, record, *size)
    return _Parsed(record, box, clipped, None if mask is None else box_around(mask, *size))


def _mask(segmentation: Any, width: int, height: int, name: str, required: bool) -> Any:
    """The checked mask of an annotation; None where it has none that can be used and none is required."""
    try:
        return check_segmentation(segmentation, width, height, name)
    except InputError:
        if required:
            raise
        return None


def file_name(record: Mapping[str, Any], source: str, *, needed: bool) -> str:
    """An image's file name; arrays in memory (`needed` False) may go without."""
    name = record.get("file_name")
    if isinstance(name, str) and name:
        return name
    if needed:
        raise InputError(f"Image {record['id']} of {source} has no file_name: add the name of its file.")
    return f"image {record['id']}"


def _lists(document: Mapping[str, Any], source: str, limit: int | None) -> tuple[list[Any], list[Any]]:
    """Images and annotations as listed, neither of them empty."""
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list):
            raise InputError(
                f'{source} is not a COCO instances file: it has no list "{key}"; use an '
                "instances_*.json file, which has images, annotations and categories."
            )
    if limit is not None and limit < 1:
        raise InputError(f"The limit of images is {limit}: give at least 1, or leave it out for all images.")
    if not document["images"]:
        raise InputError(f"{source} lists no images: use an annotation file with at least one image.")
    if not document["annotations"]:
        raise InputError(f"{source} has no annotations: use a file with at least one annotated object.")
    return document["images"], document["annotations"]


def _parse_image(record: Any, source: str, position: int) -> dict[str, Any]:
    """One entry of "images", with its id and size checked."""
    name = f"Image {position} of {source}"
    if not isinstance(record, dict) or not is_integer(record.get("id")):
        raise InputError(f"{name} has no integer id: use COCO's instances format.")
    for key in ("height", "width"):
        if not is_number(record.get(key)) or record[key] < 1 or record[key] != int(record[key]):
            raise InputError(f"{name} (id {record['id']}) has no positive whole {key}: add the image's size in pixels.")
    return {**record, "height": int(record["height"]), "width": int(record["width"])}


def _parse_categories(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """The categories, or one per id in use if the file names none."""
    categories = document.get("categories")
    if categories is None:
        found = (a.get("category_id") for a in document["annotations"] if isinstance(a, dict))
        return [{"id": category, "name": str(category)} for category in sorted(set(filter(is_integer, found)))]
    if not isinstance(categories, list) or not all(
        isinstance(category, dict) and is_integer(category.get("id")) for category in categories
    ):
        raise InputError(f"{source} has malformed categories: give a list of objects with a whole id and a name.")
    return [dict(category) for category in categories]


def _needs_new_ids(annotations: Sequence[Any]) -> bool:
    """Whether annotation ids must be replaced; pycocotools takes the ground-truth id 0 for "no match"."""
    ids = [a.get("id") for a in annotations if isinstance(a, dict)]
    return not all(is_integer(i) and i > 0 for i in ids) or len(set(ids)) != len(ids)


def _annotated_box(bbox: Any, width: int, height: int, name: str) -> tuple[Corners, bool]:
    """The clipped corners of an annotated `[x, y, width, height]`, and whether clipping changed them."""
    x, y, w, h = parse_box(bbox, name)
    beside = x >= width or (x < 0 and x + w <= 0)
    above_or_below = y >= height or (y < 0 and y + h <= 0)
    if beside or above_or_below:
        raise InputError(
            f"{name} has the box {list(bbox)}, which lies outside its {width}x{height} image: correct or remove it."
        )
    return clip_box(x, y, w, h, width, height)


def _area(raw: Mapping[str, Any], record: Mapping[str, Any], width: int, height: int) -> float:
    """The annotated area, or that of the mask, or that of the box."""
    if is_number(raw.get("area")) and raw["area"] >= 0:
        return float(raw["area"])
    if "segmentation" not in record:
        return record["bbox"][2] * record["bbox"][3]
    return float(mask_utils.area(run_lengths(record["segmentation"], width, height)))
