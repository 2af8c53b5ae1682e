"""Box prompts, annotated and detected: what is kept, and the sentence for everything else."""

import json
import math

import numpy as np
import pytest

from experiments.coco import annotated_boxes, load_boxes, load_detections


def detection(image_id=7, category_id=1, bbox=(10, 5, 20, 10), score=0.5):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def write_detections(tmp_path, entries):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    return path


def test_detections_are_sorted_limited_and_clipped(tmp_path, in_memory):
    entries = [
        detection(score=0.2),
        detection(score=0.9, bbox=(50, 30, 20, 20)),
        detection(score=0.6),
        detection(score=0.01),
        detection(image_id=9, category_id=3, bbox=(0, 0, 5, 5)),
        detection(image_id=1234),
        detection(bbox=(5, 5, 0, 3)),
    ]
    boxes = load_detections(write_detections(tmp_path, entries), in_memory(), max_per_image=2, min_score=0.05)
    first = boxes.per_image[7]
    np.testing.assert_array_equal(first.scores, [0.9, 0.6])
    np.testing.assert_array_equal(first.boxes[0], [50, 30, 60, 40])
    assert len(boxes) == 3 and not boxes.from_annotations
    assert len(boxes.notes) == 5


def test_detections_beyond_the_limit_are_not_unknown(tmp_path, in_memory):
    path = write_detections(tmp_path, [detection(), detection(image_id=9, category_id=3)])
    assert load_boxes(path, in_memory(limit=1)).notes == ()


def test_a_box_thinner_than_float32_is_no_prompt(tmp_path, example_document, in_memory):
    document = example_document()
    document["annotations"][0]["bbox"] = [50, 5, 1e-9, 10]
    assert len(annotated_boxes(in_memory(document))) == 1
    path = write_detections(tmp_path, [detection(), detection(bbox=(50, 5, 1e-9, 10))])
    assert len(load_boxes(path, in_memory())) == 1


BAD_DETECTIONS = {
    "object": ({"boxes": []}, "must hold a list"),
    "empty": ([], "No box is left"),
    "no score": ([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}], "lacks score"),
    "number": ([3], "is not an object"),
    "box of three": ([detection(bbox=(1, 2, 3))], "four finite numbers"),
    "NaN": ([detection(bbox=(1, 2, math.nan, 4))], "four finite numbers"),
    "negative": ([detection(bbox=(1, 2, -3, 4))], "negative size"),
    "score NaN": ([detection(score=math.nan)], "the score nan"),
    "score above one": ([detection(score=30)], "between 0 and 1"),
    "text id": ([detection(image_id="7")], "not a whole number"),
    "class index": ([detection(category_id=0)], "category 0"),
    "unknown images": ([detection(image_id=1)], "image ids are not those"),
    "low scores": ([detection(score=0.01)], "1 of them below the score 0.05"),
    "corners": ([detection(bbox=(20, 10, 50, 38)), detection(bbox=(5, 5, 8, 9))], "fit as"),
}


@pytest.mark.parametrize("name", BAD_DETECTIONS)
def test_bad_detections_get_one_sentence(tmp_path, name, in_memory):
    entries, message = BAD_DETECTIONS[name]
    path = write_detections(tmp_path, entries)
    with pytest.raises(ValueError, match=message) as caught:
        load_boxes(path, in_memory(), min_score=0.05)
    text = str(caught.value)
    assert "boxes.json" in text and text.endswith(".") and "\n" not in text


def test_absent_detections_name_their_flag(tmp_path, in_memory):
    with pytest.raises(FileNotFoundError, match="--boxes"):
        load_boxes(tmp_path / "nowhere.json", in_memory())
    with pytest.raises(ValueError, match="at least 1"):
        load_detections(write_detections(tmp_path, [detection()]), in_memory(), max_per_image=0)


def test_only_crowds_give_no_prompt(example_document, in_memory):
    document = example_document()
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(ValueError, match="crowds .iscrowd 1.*set iscrowd to 0"):
        load_boxes("gt", in_memory(document))
