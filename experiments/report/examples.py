"""The images that a report shows, with the masks of both models."""

import dataclasses

import numpy as np

from experiments.coco import BoxSet, CocoDataset
from experiments.coco.masks import decode
from experiments.evaluate import EvaluationResult, agreement_miou


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One image with the masks of both models.

    Attributes:
      title: its caption.
      image: uint8 (H, W, 3).
      boxes: float (N, 4), the prompts, `(x0, y0, x1, y1)` in pixels.
      fp_masks: bool (N, H, W), the floating-point model's.
      quantized_masks: bool (N, H, W).
      gt_masks: bool (M, H, W), outlined on the image if given.
    """

    title: str
    image: np.ndarray
    boxes: np.ndarray
    fp_masks: np.ndarray
    quantized_masks: np.ndarray
    gt_masks: np.ndarray | None = None


def make_examples(
    dataset: CocoDataset,
    boxes: BoxSet,
    fp: EvaluationResult,
    quantized: EvaluationResult,
    *,
    count: int = 6,
    max_boxes: int = 8,
) -> list[Example]:
    """Picks images evenly from the best to the worst agreement between both models, so that none is
    flattered.

    Args:
      dataset: the evaluated images.
      boxes: the prompts of both evaluations.
      fp: the floating-point model's evaluation.
      quantized: the quantized model's.
      count: how many images.
      max_boxes: how many prompts to draw per image, those with the best scores and then the largest.
    """
    agreement = {}
    for item in dataset.items:
        key = item.image_id
        value = agreement_miou({key: fp.images[key]}, {key: quantized.images[key]})
        if value is not None:
            agreement[key] = value
    shown = [item for item in dataset.items if item.image_id in agreement]
    ranked = sorted(shown, key=lambda item: -agreement[item.image_id])
    chosen = np.linspace(0, max(len(ranked) - 1, 0), min(count, len(ranked))).round().astype(int)
    examples = []
    for index in chosen:
        item = ranked[index]
        prompts = boxes.per_image[item.image_id]
        area = np.prod(prompts.boxes[:, 2:] - prompts.boxes[:, :2], axis=1)
        drawn = np.lexsort((-area, -prompts.scores))[:max_boxes]
        truth = [dataset.ground_truth_rle(int(i)) for i in prompts.annotation_ids[drawn] if i]
        some = "" if len(drawn) == len(prompts) else f" ({len(drawn)} of them drawn)"
        examples.append(
            Example(
                title=f"{item.name}: {len(prompts)} boxes{some}, agreement {agreement[item.image_id]:.2f}",
                image=dataset.read_image(item),
                boxes=prompts.boxes[drawn],
                fp_masks=fp.images[item.image_id].masks(list(drawn)),
                quantized_masks=quantized.images[item.image_id].masks(list(drawn)),
                gt_masks=decode(truth, (item.height, item.width)) if truth else None,
            )
        )
    return examples
