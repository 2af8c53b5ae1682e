"""Partial results are of one evaluation and one version of the code, and a full disk leaves whole lines."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from experiments import coco
from experiments.evaluate import journal
from experiments.evaluate.predictions import ImageResult
from experiments.scenes.scenes import scene_dataset, to_coco
from sam_flax.errors import InputError


@pytest.fixture(scope="module")
def prompts() -> tuple[coco.CocoDataset, coco.BoxSet]:
    dataset = coco.CocoDataset.from_memory(*to_coco(scene_dataset(3, 3, 64)))
    return dataset, coco.annotated_boxes(dataset)


def result(dataset: coco.CocoDataset, boxes: coco.BoxSet, index: int, counts: str = "a") -> ImageResult:
    item = dataset.items[index]
    n = len(boxes.per_image[item.image_id])
    return ImageResult(item.image_id, (item.height, item.width), (counts,) * n, np.full(n, 0.5))


def test_a_killed_run_does_not_go_on_in_changed_code(
    tmp_path: Path, prompts: tuple[coco.CocoDataset, coco.BoxSet], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, boxes = prompts
    path = tmp_path / "partial.jsonl"
    assert journal.resume(path, dataset, boxes, False, "model", "old") == {}
    journal.append(path, result(dataset, boxes, 0))
    assert len(journal.resume(path, dataset, boxes, False, "model", "old")) == 1
    with pytest.raises(InputError, match="another evaluation .different model"):
        journal.resume(path, dataset, boxes, False, "other model", "old")
    assert journal.resume(path, dataset, boxes, False, "model", "new") == {}
    assert "partial results of other code, which are left out" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 1, "the file is the new code's from here on"
    # A file of before versions were kept has none, and is left out as well.
    path.write_text(path.read_text().replace(', "code": "new"', ""))
    assert journal.resume(path, dataset, boxes, False, "model", "new") == {}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file can become larger: writes are cut short at the limit and then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines_and_names_the_file(
    tmp_path: Path, prompts: tuple[coco.CocoDataset, coco.BoxSet]
) -> None:
    dataset, boxes = prompts
    path = tmp_path / "partial.jsonl"
    journal.resume(path, dataset, boxes, False, "model", "code")
    journal.append(path, result(dataset, boxes, 0))
    before = path.read_bytes()
    with room_for(len(before) + 10), pytest.raises(OSError, match="partial.jsonl cannot be written .*: ") as caught:
        journal.append(path, result(dataset, boxes, 1, "a" * 1000))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before, "no part of the line"
    journal.append(path, result(dataset, boxes, 1))
    assert len(journal.resume(path, dataset, boxes, False, "model", "code")) == 2
