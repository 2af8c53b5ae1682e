"""COCO-style folders of photographs with segments, read at the resolution that training sees."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from experiments.coco.masks import run_lengths


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of photographs and the annotation files of its segments.

    Attributes:
        images: where the files are.
        annotations: COCO-style JSON files; the segments of an image are those of all of them.
        source: what its images are called where their records name no `source`.
    """

    images: Path
    annotations: tuple[Path, ...]
    source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image of a folder: its file, its source, and its segments as COCO writes them."""

    path: Path
    source: str
    width: int
    height: int
    segmentations: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Photograph:
    """One photograph at training resolution with its segments (which may overlap)."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    segments: np.ndarray  # (N, H, W) bool


def find_folders(photos: str, coco: str) -> list[Folder]:
    """The folders behind the flags `--photos` (images/, segments.json) and `--coco` (train2017/, annotations/).

    Raises:
        FileNotFoundError: if a folder is given that is not laid out so.
    """
    found = []
    if photos:
        found.append(Folder(Path(photos) / "images", (Path(photos) / "segments.json",), "photos"))
    if coco:
        annotations = tuple(sorted((Path(coco) / "annotations").glob("*train2017.json")))
        found.append(Folder(Path(coco) / "train2017", annotations, "coco"))
    for folder in found:
        for path in (folder.images, *folder.annotations):
            if not path.exists() or not folder.annotations:
                raise FileNotFoundError(f"{path} does not exist; give a COCO image folder and its annotation JSON.")
    return found


def list_records(folder: Folder) -> list[Record]:
    """The images of a folder that have segments, in the order of its first annotation file."""
    images: dict[int, dict[str, Any]] = {}
    segmentations: dict[int, list[Any]] = {}
    for path in folder.annotations:
        document = json.loads(path.read_text())
        for image in document["images"]:
            images.setdefault(image["id"], image)
        for annotation in document["annotations"]:
            if not annotation.get("iscrowd"):
                segmentations.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
    return [
        Record(
            folder.images / image["file_name"],
            image.get("source", folder.source),
            image["width"],
            image["height"],
            tuple(segmentations[number]),
        )
        for number, image in images.items()
        if number in segmentations
    ]


def read_photograph(record: Record, side: int) -> Photograph:
    """Reads an image with its segments, shrunk to `side` pixels on the long side where it is larger.

    Raises:
        FileNotFoundError: if the image is missing or unreadable.
    """
    pixels = cv2.imread(str(record.path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise FileNotFoundError(f"{record.path} is missing or unreadable; restore the image.")
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    image = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)[..., ::-1]
    segments = []
    for segmentation in record.segmentations:
        mask = mask_utils.decode(run_lengths(segmentation, record.width, record.height))
        # Coverage, cut at a half: a thin part neither vanishes nor grows.
        small = cv2.resize(255 * mask, size, interpolation=cv2.INTER_AREA) > 127
        if small.any():
            segments.append(small)
    stacked = np.stack(segments) if segments else np.zeros((0, size[1], size[0]), bool)
    return Photograph(np.ascontiguousarray(image), stacked)


def read_photographs(records: Sequence[Record], side: int, workers: int) -> Iterator[Photograph]:
    """`read_photograph` of many records, in their order, by threads: OpenCV and pycocotools release the lock."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda record: read_photograph(record, side), records)
