"""What `quantize` takes as calibration images, as one list of items: arrays, pictures, files, folders, COCO folders."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_flax.errors import InputError
from sam_flax.files.coco_boxes import clip_box, misreading, parse_box, without_area
from sam_flax.files.images import image_to_rgb, read_image
from sam_flax.files.json_values import is_integer, read_json

USUAL_IMAGES = 32  # as in the paper


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images to calibrate on, with the boxes of a COCO instances file if there is one.

    Attributes:
        path: the folder. Without annotations its own image files are taken, not those of folders in it.
        annotations: a JSON file in COCO's instances format, whose boxes prompt the images that it lists; masks are not
            needed. None prompts each image with the box that covers it.
        limit: the number of images, spread evenly over those of the folder in the order of their names, or over those
            with a box in the order of the file.
    """

    path: str | os.PathLike[str]
    annotations: str | os.PathLike[str] | None = None
    limit: int = USUAL_IMAGES


def items_of(calib: Any) -> Iterator[Any]:
    """Calibration items, each an array (H, W, 3) or such an array with its boxes (N, 4).

    Args:
        calib: an `ImageFolder`; the path of a folder, which is an `ImageFolder` without annotations; one image; or an
            iterable of images, which is gone through once. An image is an array, a Pillow image or the path of a file,
            and in an iterable it may come with boxes, as (image, boxes). `sam_flax.files.images` says how pictures and
            files become RGB.

    Raises:
        FileNotFoundError: if a path leads nowhere.
        InputError: if there is no image, or a folder, file or annotation cannot be used.
    """
    if isinstance(calib, str | os.PathLike) and Path(calib).is_dir():
        calib = ImageFolder(calib)
    if isinstance(calib, ImageFolder):
        yield from _folder_items(calib)
        return
    if isinstance(calib, str | os.PathLike | Image.Image) or (isinstance(calib, np.ndarray) and calib.ndim == 3):
        calib = [calib]
    if not isinstance(calib, Iterable) or isinstance(calib, bytes | Mapping):
        raise InputError(
            f"calib must be images, the path of a folder or an ImageFolder but is a {type(calib).__name__}; pass a "
            "list of images."
        )
    for item in calib:
        if isinstance(item, tuple | list) and len(item) == 2:
            yield pixels_of(item[0]), item[1]
        else:
            yield pixels_of(item)


def pixels_of(image: Any) -> Any:
    """An image's pixels: files and Pillow images as RGB (H, W, 3) uint8, all else as it is."""
    if isinstance(image, Image.Image):
        return image_to_rgb(image, "A calibration image")
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    return image


def _folder_items(folder: ImageFolder) -> Iterator[Any]:
    root = Path(folder.path)
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"The image folder {root} {problem}: give an existing folder to ImageFolder.")
    if not is_integer(folder.limit) or folder.limit < 1:
        raise InputError(f"limit={folder.limit!r} of ImageFolder must be a whole number of at least 1.")
    if folder.annotations is not None:
        yield from _coco_items(root, Path(folder.annotations), folder.limit)
        return
    known = Image.registered_extensions()
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in known and path.is_file())
    if not files:
        raise InputError(f"The folder {root} holds no image files; give the folder that holds them itself.")
    yield from (read_image(path) for path in _spread(files, folder.limit))


def _coco_items(root: Path, path: Path, limit: int) -> Iterator[Any]:
    """The images of a COCO instances file that have boxes, with these as (N, 4) x0, y0, x1, y1."""
    document = read_json(path, "ImageFolder's annotations", "a COCO instances file")
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path} is no COCO instances file: it needs a list of images and one of annotations.")
    images: dict[int, Mapping[str, Any]] = {}
    for record in document["images"]:
        needed = ("id", "width", "height", "file_name")
        if not isinstance(record, dict) or not all(key in record for key in needed):
            raise InputError(f"An image of {path} lacks one of {', '.join(needed)}: use COCO's instances format.")
        images[record["id"]] = record
    written, sizes, owners = [], [], []
    for number, raw in enumerate(document["annotations"]):
        if not isinstance(raw, dict) or raw.get("image_id") not in images or "bbox" not in raw:
            raise InputError(
                f"Annotation {number} of {path} lacks a bbox or an image that the file lists: use COCO's instances "
                "format."
            )
        if not raw.get("iscrowd"):
            record = images[raw["image_id"]]
            written.append(parse_box(raw["bbox"], f"Annotation {number} of {path}"))
            sizes.append((record["width"], record["height"]))
            owners.append(raw["image_id"])
    if wrong := misreading(written, sizes, [None] * len(written)):
        raise InputError(f"{path} holds {wrong}: write COCO's [x, y, width, height] in pixels.")
    boxes: dict[int, list[Any]] = {}
    for owner, box, size in zip(owners, written, sizes, strict=True):
        corners, _ = clip_box(*box, *size)
        if not without_area(corners):
            boxes.setdefault(owner, []).append(corners)
    if not boxes:
        raise InputError(f"{path} has no box that can prompt an image: use a file with annotated objects.")
    for owner in _spread([number for number in images if number in boxes], limit):
        record = images[owner]
        pixels = read_image(root / record["file_name"], (record["height"], record["width"]), str(path))
        yield pixels, np.array(boxes[owner], np.float64)


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly over them all: neighbours in a folder are often alike."""
    return items if len(items) <= limit else [items[i * len(items) // limit] for i in range(limit)]
