"""Evaluation with predictors whose masks are known: truth, boxes, ellipses, nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from experiments.coco import CocoDataset, annotated_boxes, load_boxes, load_coco
from experiments.evaluate import (
    METRICS,
    ShapePredictor,
    agreement_miou,
    evaluate,
    evaluate_baselines,
    filled_box,
    inscribed_ellipse,
)

COCO100 = Path(__file__).parents[4] / "shared" / "coco100"


def make_dataset(images=3, objects=5, size=(96, 128), seed=0):
    """Images that hold the index of the object of every pixel in their red channel."""
    rng = np.random.default_rng(seed)
    arrays, document = [], {"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 2}]}
    for image_id in range(1, images + 1):
        height, width = size
        array = np.zeros((height, width, 3), np.uint8)
        for index in range(objects):
            x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
            w, h = (int(v) for v in rng.integers(8, 40, 2))
            mask = inscribed_ellipse(np.array([[x, y, x + w, y + h]], float), height, width)[0]
            array[mask] = index + 1
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": index % 2 + 1,
                    "bbox": [x, y, w, h],
                    "area": float(mask.sum()),
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                    "iscrowd": 0,
                }
            )
        arrays.append(array)
        document["images"].append({"id": image_id, "height": height, "width": width})
    return CocoDataset.from_memory(arrays, document)


class SpyPredictor(ShapePredictor):
    """Records what it is asked, and can stop like a killed run."""

    def __init__(self, shape=filled_box, stop_after=None):
        super().__init__(shape)
        self.images, self.chunks, self.stop_after = [], [], stop_after

    def set_image(self, image):
        if self.stop_after is not None and len(self.images) == self.stop_after:
            raise KeyboardInterrupt
        self.images.append(image)
        super().set_image(image)

    def predict_batch(self, *, boxes, multimask_output):
        assert multimask_output is False
        self.chunks.append(len(boxes))
        masks, iou, low = super().predict_batch(boxes=boxes, multimask_output=multimask_output)
        # Any number that differs between prompts, so that a mixed-up order shows in the score.
        return masks, 0.5 + boxes[:, :1] / 1000, low


def test_true_masks_score_everything(capfd):
    dataset = make_dataset()
    result = evaluate(ShapePredictor(inscribed_ellipse), dataset, annotated_boxes(dataset), progress=None)
    assert tuple(result.metrics) == METRICS
    assert result.metrics["AP"] == pytest.approx(100)
    assert result.metrics["mIoU"] == 1
    assert result.metrics["APl"] is None  # no object is that large
    assert result.miou_note == "mean over 15 objects"
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_progress_goes_to_stderr_only(capfd):
    dataset = make_dataset(images=1)
    evaluate(ShapePredictor(filled_box), dataset, annotated_boxes(dataset), progress="fp")
    out, err = capfd.readouterr()
    assert out == "" and "fp" in err


def test_baselines_score_below_truth():
    dataset = make_dataset()
    baselines = evaluate_baselines(dataset, annotated_boxes(dataset))
    # A box holds pi/4 of an ellipse: IoU 0.785 passes the thresholds from 0.5 to 0.75.
    assert baselines["filled_box"]["mIoU"] == pytest.approx(math.pi / 4, abs=0.02)
    assert 40 < baselines["filled_box"]["AP"] < 75
    assert baselines["inscribed_ellipse"]["AP"] == pytest.approx(100)


def test_nothing_scores_nothing():
    dataset = make_dataset()
    empty = ShapePredictor(lambda boxes, height, width: np.zeros((len(boxes), height, width), bool))
    result = evaluate(empty, dataset, annotated_boxes(dataset), progress=None)
    assert result.metrics["AP"] == 0 and result.metrics["mIoU"] == 0


def test_each_image_is_embedded_once_and_prompts_are_padded():
    dataset = make_dataset(images=2, objects=37)
    predictor = SpyPredictor()
    result = evaluate(predictor, dataset, annotated_boxes(dataset), chunk_sizes=(4, 16), progress=None)
    assert len(predictor.images) == 2
    # 16 + 16 + 4 + 1: five boxes do not fill half of a large chunk.
    assert predictor.chunks == [16, 16, 4, 4] * 2
    assert [len(r.counts) for r in result.images.values()] == [37, 37]
    np.testing.assert_array_equal(predictor.images[0], dataset.items[0].array)


def test_chunks_do_not_change_the_result():
    dataset = make_dataset(objects=11)
    boxes = annotated_boxes(dataset)
    one = evaluate(SpyPredictor(), dataset, boxes, progress=None, chunk_sizes=(1,))
    many = evaluate(SpyPredictor(), dataset, boxes, progress=None, chunk_sizes=(8, 16))
    assert one.metrics == many.metrics
    for image_id in one.images:
        assert one.images[image_id].counts == many.images[image_id].counts
        np.testing.assert_array_equal(one.images[image_id].predicted_iou, many.images[image_id].predicted_iou)


def test_large_images_get_small_chunks(monkeypatch):
    monkeypatch.setattr("experiments.evaluate.predictions._CHUNK_PIXELS", 96 * 128 * 9)
    dataset = make_dataset(images=1, objects=20)
    predictor = SpyPredictor()
    evaluate(predictor, dataset, annotated_boxes(dataset), progress=None)
    assert predictor.chunks == [8, 8, 8]


def test_blank_images_are_gray_and_embedded_once_per_size():
    dataset = make_dataset()
    predictor = SpyPredictor()
    evaluate(predictor, dataset, annotated_boxes(dataset), blank=True, progress=None)
    assert len(predictor.images) == 1
    assert predictor.images[0].shape == (96, 128, 3) and np.all(predictor.images[0] == 128)


def write_detections(dataset, path, keep=lambda index: True):
    entries = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9 - 0.01 * index,
        }
        for index, a in enumerate(dataset.coco.dataset["annotations"])
        if keep(index)
    ]
    path.write_text(json.dumps(entries))
    return load_boxes(path, dataset)


def test_detections_score_as_box_times_predicted_iou(tmp_path):
    dataset = make_dataset()
    boxes = write_detections(dataset, tmp_path / "d.json", keep=lambda index: index % 3)
    result = evaluate(ShapePredictor(inscribed_ellipse), dataset, boxes, progress=None)
    assert result.metrics["mIoU"] == 1
    assert result.metrics["AP"] < 90  # a third of the objects was not detected
    assert result.miou_note.startswith("mean over 10 detections")


def test_detections_beside_every_object_have_no_miou(tmp_path):
    dataset = make_dataset()
    corner = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([corner]))
    boxes = load_boxes(tmp_path / "d.json", dataset)
    result = evaluate(ShapePredictor(filled_box), dataset, boxes, progress=None)
    assert result.metrics["mIoU"] is None and "no detection overlaps" in result.miou_note


def test_images_without_prompts_are_skipped_but_count(tmp_path):
    dataset = make_dataset()
    boxes = write_detections(dataset, tmp_path / "d.json", keep=lambda index: index < 5)
    predictor = SpyPredictor(inscribed_ellipse)
    result = evaluate(predictor, dataset, boxes, progress=None)
    assert len(predictor.images) == 1
    assert [len(r.counts) for r in result.images.values()] == [5, 0, 0]
    assert result.images[2].masks().shape == (0, 96, 128)
    assert result.metrics["AP"] < 50


def test_categories_matter_unless_told_otherwise(tmp_path):
    dataset = make_dataset()
    path = tmp_path / "d.json"
    write_detections(dataset, path)
    entries = json.loads(path.read_text())
    for entry in entries:
        entry["category_id"] = 3 - entry["category_id"]
    path.write_text(json.dumps(entries))
    boxes = load_boxes(path, dataset)
    predictor = ShapePredictor(inscribed_ellipse)
    assert evaluate(predictor, dataset, boxes, progress=None).metrics["AP"] < 20
    agnostic = evaluate(predictor, dataset, boxes, use_categories=False, progress=None)
    assert agnostic.metrics["AP"] == pytest.approx(100)


def test_evaluation_repeats_itself_and_leaves_the_dataset_alone():
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    before = json.dumps(dataset.coco.dataset)
    first = evaluate(SpyPredictor(), dataset, boxes, progress=None)
    second = evaluate(SpyPredictor(), dataset, boxes, progress=None)
    assert first.metrics == second.metrics
    assert json.dumps(dataset.coco.dataset) == before


def test_agreement():
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    ellipses = evaluate(ShapePredictor(inscribed_ellipse), dataset, boxes, progress=None)
    filled = evaluate(ShapePredictor(filled_box), dataset, boxes, progress=None)
    nothing = ShapePredictor(lambda b, height, width: np.zeros((len(b), height, width), bool))
    empty = evaluate(nothing, dataset, boxes, progress=None)
    assert agreement_miou(ellipses.images, ellipses.images) == 1
    assert agreement_miou(empty.images, empty.images) == 1
    assert agreement_miou(empty.images, filled.images) == 0
    assert agreement_miou(ellipses.images, filled.images) == pytest.approx(math.pi / 4, abs=0.02)
    with pytest.raises(ValueError, match="same images and boxes"):
        agreement_miou(ellipses.images, {1: ellipses.images[1]})


def test_masks_survive_the_run_lengths():
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    result = evaluate(ShapePredictor(filled_box), dataset, boxes, progress=None)
    expected = filled_box(boxes.per_image[1].boxes, 96, 128)
    np.testing.assert_array_equal(result.images[1].masks(), expected)
    np.testing.assert_array_equal(result.images[1].masks([2, 0]), expected[[2, 0]])


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, stop_after):
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    path = tmp_path / "out" / "partial.jsonl"
    options = {"partial_results": path, "model_fingerprint": "m", "progress": None}
    with pytest.raises(KeyboardInterrupt):
        evaluate(SpyPredictor(stop_after=stop_after), dataset, boxes, **options)
    with path.open("ab") as file:
        file.write(b'{"image_id": 3, "coun')  # a line that the killed run could not finish
    rest = SpyPredictor()
    resumed = evaluate(rest, dataset, boxes, **options)
    whole = evaluate(SpyPredictor(), dataset, boxes, progress=None)
    assert resumed.resumed == stop_after and len(rest.images) == 3 - stop_after
    assert resumed.metrics == whole.metrics
    assert [r.counts for r in resumed.images.values()] == [r.counts for r in whole.images.values()]
    again = SpyPredictor()
    assert evaluate(again, dataset, boxes, **options).metrics == whole.metrics
    assert again.images == []


def test_partial_results_of_another_evaluation_are_refused(tmp_path):
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    path = tmp_path / "partial.jsonl"
    options = {"partial_results": path, "progress": None}
    predictor = ShapePredictor(filled_box)
    with pytest.raises(ValueError, match="model_fingerprint"):
        evaluate(predictor, dataset, boxes, **options)
    evaluate(predictor, dataset, boxes, model_fingerprint="first", **options)
    with pytest.raises(ValueError, match=r"different model\)"):
        evaluate(predictor, dataset, boxes, model_fingerprint="second", **options)
    with pytest.raises(ValueError, match=r"different blank\)"):
        evaluate(predictor, dataset, boxes, model_fingerprint="first", blank=True, **options)
    other = make_dataset(seed=1)
    with pytest.raises(ValueError, match=r"different dataset, boxes\)"):
        evaluate(predictor, other, annotated_boxes(other), model_fingerprint="first", **options)


def test_damaged_partial_results(tmp_path):
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    path = tmp_path / "partial.jsonl"
    options = {"partial_results": path, "model_fingerprint": "m", "progress": None}
    predictor = ShapePredictor(filled_box)
    whole = evaluate(predictor, dataset, boxes, **options)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], b"\x00\x00garbage\n"]))
    assert evaluate(predictor, dataset, boxes, **options).resumed == 2
    assert evaluate(predictor, dataset, boxes, **options).metrics == whole.metrics
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
    with pytest.raises(ValueError, match="Line 2 of .* is damaged"):
        evaluate(predictor, dataset, boxes, **options)
    path.write_bytes(b"hello\n")
    with pytest.raises(ValueError, match="does not hold partial results"):
        evaluate(predictor, dataset, boxes, **options)


def test_a_predictor_that_breaks_its_contract_is_named():
    dataset = make_dataset()
    boxes = annotated_boxes(dataset)
    with pytest.raises(ValueError, match="predict_batch must return one such mask per box"):
        evaluate(ShapePredictor(lambda b, h, w: np.zeros((len(b), h, 5), bool)), dataset, boxes, progress=None)

    class Broken(ShapePredictor):
        def predict_batch(self, **arguments):
            masks, iou, low = super().predict_batch(**arguments)
            return masks, iou * np.nan, low

    with pytest.raises(ValueError, match="not finite"):
        evaluate(Broken(filled_box), dataset, boxes, progress=None)
    other = make_dataset(images=1)
    with pytest.raises(ValueError, match="not made for"):
        evaluate(ShapePredictor(filled_box), dataset, annotated_boxes(other), progress=None)


@pytest.mark.skipif(not COCO100.is_dir(), reason="the COCO excerpt is not beside the checkout")
def test_baselines_on_photographs():
    dataset = load_coco(COCO100 / "val2017", COCO100 / "annotations" / "instances_val2017.json")
    baselines = evaluate_baselines(dataset, annotated_boxes(dataset))
    assert baselines["filled_box"]["AP"] == pytest.approx(30.6, abs=0.05)
    assert baselines["inscribed_ellipse"]["AP"] == pytest.approx(33.0, abs=0.05)


def test_baseline_shapes():
    boxes = np.array([[1, 2, 5, 6], [0, 0, 8, 8]], np.float32)
    filled = filled_box(boxes, 8, 8)
    assert filled[0].sum() == 16 and filled[0, 2:6, 1:5].all() and filled[1].all()
    ellipse = inscribed_ellipse(boxes, 8, 8)
    assert ellipse[0].sum() == 12 and not (ellipse & ~filled).any()
