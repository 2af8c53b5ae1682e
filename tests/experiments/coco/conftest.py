"""A small COCO document, and datasets of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.coco import CocoDataset


@pytest.fixture(scope="session")
def example_document() -> Callable[[], dict[str, Any]]:
    """Makes a document of two images, two polygons and a crowd."""
    return _example_document


@pytest.fixture(scope="session")
def write_folder() -> Callable[[Path, dict[str, Any]], tuple[Path, Path]]:
    """Writes a document and random images for `example_document`; gives the image folder and the file."""
    return _write_folder


@pytest.fixture(scope="session")
def in_memory() -> Callable[..., CocoDataset]:
    """Makes a dataset of black images; of `example_document` if no document is given."""
    return _in_memory


def _example_document():
    """Two images, two polygons and a crowd; category ids with a gap, as COCO's."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 9, "file_name": "b.png", "height": 30, "width": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "bbox": [10, 5, 20, 10],
                "segmentation": [[10, 5, 30, 5, 30, 15, 10, 15]],
                "area": 200,
                "iscrowd": 0,
            },
            {
                "id": 2,
                "image_id": 9,
                "category_id": 3,
                "bbox": [0, 0, 10, 10],
                "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]],
                "iscrowd": 0,
            },
            {
                "id": 3,
                "image_id": 9,
                "category_id": 3,
                "bbox": [0, 0, 30, 30],
                "segmentation": {"size": [30, 30], "counts": [0, 900]},
                "area": 900,
                "iscrowd": 1,
            },
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 3, "name": "three"}],
    }


def _write_folder(folder: Path, document) -> tuple[Path, Path]:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for record in _example_document()["images"]:
        pixels = rng.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / record["file_name"])
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return images, path


def _in_memory(document=None, **options) -> CocoDataset:
    document = document or _example_document()
    images = [np.zeros((r["height"], r["width"], 3), np.uint8) for r in document["images"]]
    return CocoDataset.from_memory(images, document, **options)
