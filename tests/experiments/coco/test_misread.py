"""Files written in another way than COCO's are told; what calibration does not need is not asked for."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import coco
from sam_flax.errors import InputError
from sam_flax.files.coco_boxes import misreading

CASES = Path(__file__).parents[4] / "shared" / "cases"
WIDTH, HEIGHT = 100, 80


def document() -> dict[str, Any]:
    """Four images, three of them with two objects whose boxes fit their masks."""
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, 5)]
    annotations = []
    for i in range(3):
        for x, y, w, h in ((6 + i, 5, 30, 20), (51 + i, 30, 40, 40)):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            about = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0, "area": w * h}
            annotations.append(about | {"bbox": [x, y, w, h], "segmentation": [polygon]})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(1, 5):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


WRITINGS: dict[str, Callable[[float, float, float, float], list[float]]] = {
    "corners [x0, y0, x1, y1] in pixels": lambda x, y, w, h: [x, y, x + w, y + h],
    "[x, y, width, height] as shares": lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT],
    "corners [x0, y0, x1, y1] as shares": lambda x, y, w, h: [
        *(x / WIDTH, y / HEIGHT),
        *((x + w) / WIDTH, (y + h) / HEIGHT),
    ],
    "[centre x, centre y, width, height] in pixels": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "[centre x, centre y, width, height] as shares": lambda x, y, w, h: [
        *((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT),
        *(w / WIDTH, h / HEIGHT),
    ],
}


def written(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("writing", WRITINGS)
@pytest.mark.parametrize("run_lengths", [False, True])
def test_boxes_written_in_another_way_are_told(tmp_path: Path, images: Path, writing: str, run_lengths: bool) -> None:
    found = document()
    for annotation in found["annotations"]:
        if run_lengths:
            (polygon,) = annotation["segmentation"]
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[polygon[1] : polygon[5], polygon[0] : polygon[2]] = 1
            flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
            edges = np.flatnonzero(np.diff(flat))
            counts = np.diff([0, *edges, mask.size]).tolist()
            annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    coco.load_coco(images, written(tmp_path, found))
    for annotation in found["annotations"]:
        annotation["bbox"] = WRITINGS[writing](*annotation["bbox"])
    for require_masks in (True, False):
        with pytest.raises(InputError) as caught:
            coco.load_coco(images, written(tmp_path, found), require_masks=require_masks)
        assert f"boxes that fit their masks as {writing}" in str(caught.value)
        assert str(caught.value).endswith("write COCO's [x, y, width, height] in pixels.")


@pytest.mark.parametrize("writing", [w for w in WRITINGS if "shares" in w or "corners" in w])
def test_so_are_those_of_a_detector_and_those_without_masks(tmp_path: Path, images: Path, writing: str) -> None:
    found = document()
    dataset = coco.load_coco(images, written(tmp_path, found))
    detections = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": WRITINGS[writing](*a["bbox"]), "score": 0.9}
        for a in found["annotations"]
    ]
    part = "between 0 and 1" if "shares" in writing else "fit as corners"
    with pytest.raises(InputError, match=part):
        coco.load_detections(written(tmp_path, detections), dataset)
    for annotation, detection in zip(found["annotations"], detections, strict=True):
        annotation["bbox"] = detection["bbox"]
        del annotation["segmentation"]
    with pytest.raises(InputError, match=part):
        coco.load_coco(images, written(tmp_path, found), require_masks=False)


def test_honest_boxes_are_not_suspected() -> None:
    """Loose boxes, boxes at the corner of the image, tiny ones, and one mask of many that lies elsewhere."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 30))
        corner = rng.uniform(0, 60, (count, 2)) * rng.choice([0, 1])
        side = rng.uniform(1, 40, (count, 2))
        boxes = [tuple(map(float, (*c, *s))) for c, s in zip(corner, side, strict=True)]
        around = [(*c, *(c + s)) for c, s in zip(corner + rng.uniform(-1, 1), side, strict=True)]
        if count > 5:
            around[0] = (90.0, 90.0, 99.0, 99.0)
        assert misreading(boxes, [(100, 100)] * count, around) == ""
        assert misreading(boxes, [(200, 200)] * count, [None] * count) == ""
    assert misreading([], [], []) == ""


def test_single_boxes_far_from_their_masks_are_counted(tmp_path: Path, images: Path) -> None:
    found = document()
    found["annotations"][0]["bbox"] = [60, 50, 20, 20]
    notes = coco.load_coco(images, written(tmp_path, found)).notes()
    assert len(notes) == 1 and ": 1 boxes overlap the box around their own mask by less than half" in notes[0]


def test_masks_that_are_all_crowds_name_the_program_that_writes_them(tmp_path: Path, images: Path) -> None:
    found = document()
    for annotation in found["annotations"]:
        annotation["iscrowd"] = 1
    dataset = coco.load_coco(images, written(tmp_path, found))
    with pytest.raises(InputError, match="CVAT.* set iscrowd to 0"):
        coco.annotated_boxes(dataset)
    # A detector's boxes are prompts, but there is still nothing to score.
    assert any("crowds (iscrowd 1), which COCO's AP leaves out" in note for note in dataset.notes())


NO_MASK: dict[str, Any] = {
    "empty polygon": [[]],
    "no polygon": [],
    "nothing": None,
    "text": "",
    "two points": [[1, 2, 3, 4]],
    "another size": {"size": [5, 5], "counts": [25]},
    "no counts": {"size": [HEIGHT, WIDTH], "counts": []},
}


@pytest.mark.parametrize("kind", [*NO_MASK, "absent", "no category"])
def test_calibration_needs_neither_masks_nor_categories(tmp_path: Path, images: Path, kind: str) -> None:
    found = document()
    for annotation in found["annotations"][:3]:
        if kind in NO_MASK:
            annotation["segmentation"] = copy.deepcopy(NO_MASK[kind])
        else:
            del annotation["segmentation" if kind == "absent" else "category_id"]
    path = written(tmp_path, found)
    dataset = coco.load_coco(images, path, require_masks=False)
    assert len(coco.annotated_boxes(dataset)) == 6
    with pytest.raises(InputError, match="category_id" if kind == "no category" else "no valid mask|a mask of size"):
        coco.load_coco(images, path)


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "png"])
def test_replaced_pictures_are_another_dataset(tmp_path: Path, suffix: str) -> None:
    """Their sizes in bytes are equal where the format's is fixed; the contents decide."""
    found = document()
    for record in found["images"]:
        record["file_name"] = f"{record['id']}.{suffix}"
    path = written(tmp_path, found)

    def fingerprint(value: int) -> str:
        for i in range(1, 5):
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), value + i, np.uint8)).save(tmp_path / f"{i}.{suffix}")
        return coco.load_coco(tmp_path, path).fingerprint

    first, second, again = fingerprint(0), fingerprint(100), fingerprint(0)
    assert first != second and first == again
    os.utime(tmp_path / f"1.{suffix}", (0, 0))
    assert coco.load_coco(tmp_path, path).fingerprint == first, "the time of a file is not its content"


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of real reports are not at {CASES}")
@pytest.mark.parametrize(
    ("name", "part"),
    [("base", ""), ("bbox_xyxy", "corners"), ("bbox_normalised", "shares"), ("calib_without_masks", "no valid mask")],
)
def test_files_of_real_reports(images: Path, name: str, part: str) -> None:
    if part:
        with pytest.raises(InputError, match=part):
            coco.load_coco(images, CASES / f"{name}.json")
    else:
        coco.load_coco(images, CASES / f"{name}.json")
    if "bbox" not in name:
        coco.load_coco(images, CASES / f"{name}.json", require_masks=False)
