"""Scores of predicted masks: COCO's segm AP, mIoU, and the agreement of two models."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from experiments.coco import BoxSet, CocoDataset, ImageBoxes, ImageItem
from experiments.coco.dataset import quiet_coco
from experiments.coco.masks import iou
from experiments.evaluate.predictions import ImageResult

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU")
# A detection is compared with an object, for mIoU, when their boxes overlap at least so much.
_MATCH_IOU = 0.5


def coco_results(boxes: BoxSet, results: Mapping[int, ImageResult], score: str = "product") -> list[dict[str, Any]]:
    """The predictions in COCO's results format, scored as `EvaluationProtocol.score` has it."""
    entries = []
    for image_id, result in results.items():
        prompts = boxes.per_image[image_id]
        scores = {
            "detector": prompts.scores,
            "iou": result.predicted_iou,
            "product": prompts.scores * result.predicted_iou,
        }[score]
        for rle, value, category in zip(result.rles, scores, prompts.category_ids, strict=True):
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": int(category),
                    "segmentation": rle,
                    "score": float(value),
                }
            )
    return entries


def average_precision(
    dataset: CocoDataset,
    boxes: BoxSet,
    results: Mapping[int, ImageResult],
    *,
    use_categories: bool = True,
    score: str = "product",
) -> dict[str, float | None]:
    """COCO segm `AP AP50 AP75 APs APm APl` in percent, on the images of the dataset.

    A size class without ground truth has no AP (None). As in COCO, at most 100 masks per image and category
    count.
    """
    predictions = coco_results(boxes, results, score)
    for number, entry in enumerate(predictions, 1):
        entry |= {"id": number, "iscrowd": 0, "area": float(mask_utils.area(entry["segmentation"]))}
        entry["bbox"] = mask_utils.toBbox(entry["segmentation"]).tolist()
    document = dataset.coco.dataset
    # COCOeval replaces segmentations and marks annotations in place, so it gets copies.
    truth = quiet_coco({**document, "annotations": [dict(a) for a in document["annotations"]]})
    predicted = quiet_coco(
        {"images": document["images"], "annotations": predictions, "categories": document["categories"]}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, predicted, "segm")
        evaluation.params.imgIds = sorted(item.image_id for item in dataset.items)
        evaluation.params.useCats = int(use_categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools marks "no ground truth of this size" with -1.
    return {
        name: 100.0 * float(value) if value >= 0 else None
        for name, value in zip(METRICS[:6], evaluation.stats[:6], strict=True)
    }


def mean_iou(
    dataset: CocoDataset, boxes: BoxSet, results: Mapping[int, ImageResult], *, use_categories: bool = True
) -> tuple[float | None, str]:
    """Mean IoU of predicted and true masks, and what it was taken over (or why there is none).

    For annotated boxes: over all prompts, against the object whose box it is. For a detector's boxes: over
    those detections that overlap an object's box by at least 0.5, against the object with the greatest
    overlap.
    """
    overlaps = []
    for item in dataset.items:
        prompts, rles = boxes.per_image[item.image_id], results[item.image_id].rles
        pairs = (
            list(enumerate(prompts.annotation_ids))
            if boxes.from_annotations
            else _match_boxes(item, prompts, use_categories)
        )
        for index, annotation_id in pairs:
            overlaps.append(iou(rles[index], dataset.ground_truth_rle(int(annotation_id))))
    if not overlaps:
        return None, f"no detection overlaps an object's box by {_MATCH_IOU} or more, so there is no mIoU"
    matched = f"detections whose box overlaps an object's by {_MATCH_IOU} or more"
    what = "objects" if boxes.from_annotations else matched
    return float(np.mean(overlaps)), f"mean over {len(overlaps)} {what}"


def agreement_miou(first: Mapping[int, ImageResult], second: Mapping[int, ImageResult]) -> float | None:
    """Mean IoU between the masks that two models predict for the same prompts; None if there are none.

    Two empty masks agree (IoU 1).

    Raises:
      ValueError: if the predictions are not for the same prompts.
    """
    if first.keys() != second.keys() or any(len(first[i].counts) != len(second[i].counts) for i in first):
        raise ValueError("The two results are not for the same images and boxes: evaluate both models alike.")
    overlaps = [
        iou(a, b) for image_id in first for a, b in zip(first[image_id].rles, second[image_id].rles, strict=True)
    ]
    return float(np.mean(overlaps)) if overlaps else None


def _match_boxes(item: ImageItem, prompts: ImageBoxes, use_categories: bool) -> list[tuple[int, int]]:
    """Pairs (prompt, annotation id) of detections and the object whose box each overlaps most."""
    objects = [a for a in item.annotations if not a.iscrowd and not a.degenerate]
    if not objects or not len(prompts):
        return []
    boxes = prompts.boxes.astype(np.float64)[:, None]  # (N, 1, 4)
    truth = np.array([a.box for a in objects])[None]  # (1, M, 4)
    sides = np.minimum(boxes[..., 2:], truth[..., 2:]) - np.maximum(boxes[..., :2], truth[..., :2])
    common = np.prod(np.maximum(sides, 0), axis=-1)  # (N, M)
    total = sum(np.prod(b[..., 2:] - b[..., :2], axis=-1) for b in (boxes, truth)) - common
    overlap = common / total
    if use_categories:
        overlap *= prompts.category_ids[:, None] == np.array([a.category_id for a in objects])[None]
    best = overlap.argmax(axis=1)
    return [(i, objects[j].annotation_id) for i, j in enumerate(best) if overlap[i, j] >= _MATCH_IOU]
