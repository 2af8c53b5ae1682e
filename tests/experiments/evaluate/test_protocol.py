"""The protocol of an evaluation: what is asked of the model, which mask counts, what ranks masks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import coco, evaluate
from experiments.evaluate.metrics import coco_results
from experiments.evaluate.predictions import ImageResult, predict_image
from experiments.job import run as one_run
from experiments.job.options import Options
from experiments.job.protocol import EvaluationProtocol
from experiments.job.summary import summary
from experiments.scenes.scenes import scene_dataset, to_coco
from sam_flax.errors import InputError

TINY = str(Path(__file__).parents[2] / "data" / "sam_tiny_s0.pth")


class ThreeMasks:
    """A predictor whose second mask of three has the greatest IoU; a single one is another still."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.size = (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        self.size = image.shape[:2]

    def predict_batch(self, *, multimask_output: bool, **prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        self.asked.append(prompts | {"multimask_output": multimask_output})
        count = len(next(iter(prompts.values())))
        iou = np.tile([0.2, 0.9, 0.4] if multimask_output else [0.6], (count, 1))
        masks = np.zeros((*iou.shape, *self.size), bool)
        for index in range(iou.shape[1]):
            masks[:, index, : index + (1 if multimask_output else 5)] = True
        return masks, iou, None


def one_image() -> tuple[coco.CocoDataset, coco.BoxSet]:
    dataset = coco.CocoDataset.from_memory(*to_coco(scene_dataset(3, 1, 64)))
    return dataset, coco.annotated_boxes(dataset)


def predicted(**choices: str) -> tuple[ThreeMasks, ImageResult, coco.BoxSet]:
    dataset, boxes = one_image()
    predictor, item = ThreeMasks(), dataset.items[0]
    predictor.set_image(dataset.read_image(item))
    protocol = EvaluationProtocol(**choices)
    return predictor, predict_image(predictor, item, boxes.per_image[item.image_id], protocol=protocol), boxes


def test_one_mask_or_the_best_of_three() -> None:
    predictor, result, _ = predicted()
    assert not predictor.asked[0]["multimask_output"]
    assert (result.predicted_iou == 0.6).all() and result.masks()[:, :5].all() and not result.masks()[:, 5:].any()
    predictor, result, _ = predicted(multimask="best")
    assert predictor.asked[0]["multimask_output"]
    assert (result.predicted_iou == 0.9).all() and result.masks()[:, :2].all() and not result.masks()[:, 2:].any()


def test_boxes_or_their_centres() -> None:
    predictor, result, boxes = predicted(prompt="point")
    (asked,) = predictor.asked
    given = boxes.per_image[result.image_id].boxes
    assert "boxes" not in asked and asked["point_coords"].shape[1:] == (1, 2) and (asked["point_labels"] == 1).all()
    np.testing.assert_array_equal(asked["point_coords"][: len(given), 0], (given[:, :2] + given[:, 2:]) / 2)


def test_what_ranks_masks() -> None:
    _, result, boxes = predicted()
    prompts = boxes.per_image[result.image_id]
    scored = coco.BoxSet("x.json", {result.image_id: dataclasses.replace(prompts, scores=np.full(len(prompts), 0.5))})
    for score, value in (("product", 0.3), ("detector", 0.5), ("iou", 0.6)):
        found = coco_results(scored, {result.image_id: result}, score)
        assert [entry["score"] for entry in found] == pytest.approx([value] * len(prompts))


def test_the_choice_changes_ap_and_partial_results_tell_masks_apart(tmp_path: Path) -> None:
    dataset, boxes = one_image()
    about: dict[str, Any] = {"model_fingerprint": "m", "code": "c", "progress": None}
    path = tmp_path / "partial.jsonl"
    evaluate.evaluate(ThreeMasks(), dataset, boxes, partial_results=path, **about)
    again = evaluate.evaluate(
        ThreeMasks(), dataset, boxes, partial_results=path, protocol=EvaluationProtocol(score="iou"), **about
    )
    assert again.resumed == 1, "what ranks masks is worked out from the same masks"
    for other in ({"multimask": "best"}, {"prompt": "point"}):
        with pytest.raises(InputError, match="another evaluation"):
            protocol = EvaluationProtocol(**other)
            evaluate.evaluate(ThreeMasks(), dataset, boxes, partial_results=path, protocol=protocol, **about)


def test_unknown_choices_are_refused() -> None:
    for wrong in ({"multimask": "all"}, {"score": "x"}, {"prompt": "mask"}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}=.* is unknown; choose one of"):
            Options(**wrong)


def test_results_report_and_terminal_say_the_protocol(tmp_path: Path) -> None:
    options = Options(
        **{"checkpoint": TINY, "decoder_num_heads": 4, "method": "fp", "num_scenes": 1, "blank": False},
        **{"out": str(tmp_path), "multimask": "best", "score": "iou", "prompt": "point"},
    )
    found = one_run.run(options, verbosity=-1)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert {name: kept["protocol"][name] for name in ("multimask", "score", "prompt")} == {
        "multimask": "best",
        "score": "iou",
        "prompt": "point",
    }
    sentence = "the best of three masks by predicted IoU, ranked by predicted IoU"
    assert sentence in (tmp_path / "report.html").read_text() and sentence in summary(found)
