"""Masks that a promptable model predicts for the boxes of images."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.coco import BoxSet, CocoDataset, ImageBoxes, ImageItem, stream_images
from experiments.coco.masks import decode, encode
from experiments.job.protocol import AHCPTQ_PROTOCOL, EvaluationProtocol
from sam_flax.errors import InputError

# Prompts are padded to one of these counts, so that a jitted decoder compiles only for them.
CHUNK_SIZES = (8, 32)
# A chunk holds at most this many mask pixels at the original size (as float logits: 256 MiB).
_CHUNK_PIXELS = 2**26
# SAM makes three masks where several are asked for.
_MOST_MASKS = 3
# Mid-gray carries no information and stays near zero after SAM's normalisation.
_BLANK_VALUE = 128


class Predictor(Protocol):
    """What evaluation needs of `sam_flax.SamPredictor`: it is given boxes, or points with labels."""

    def set_image(self, image: np.ndarray) -> Any:
        """Embeds one uint8 RGB image (H, W, 3)."""

    def predict_batch(
        self,
        boxes: np.ndarray | None = None,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        *,
        multimask_output: bool,
    ) -> tuple[Any, Any, Any]:
        """Masks (N, M, H, W) bool, predicted IoU (N, M) and low-resolution logits.

        For boxes (N, 4), or for points (N, P, 2) with labels (N, P).
        """


@dataclasses.dataclass(frozen=True, eq=False)
class ImageResult:
    """Predicted masks of one image, one per box prompt and in the prompts' order.

    Attributes:
      image_id: the image.
      size: (height, width) of the image and of every mask.
      counts: N compressed run lengths (pycocotools).
      predicted_iou: float64 (N,), the model's own estimate.
    """

    image_id: int
    size: tuple[int, int]
    counts: tuple[str, ...]
    predicted_iou: np.ndarray

    @property
    def rles(self) -> list[dict[str, Any]]:
        """The masks as pycocotools takes them."""
        return [{"size": list(self.size), "counts": counts} for counts in self.counts]

    def masks(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """Decodes masks, (N, H, W) bool; `indices` selects some."""
        chosen = self.rles if indices is None else [self.rles[i] for i in indices]
        return decode(chosen, self.size)


def predict_images(
    predictor: Predictor,
    dataset: CocoDataset,
    boxes: BoxSet,
    items: Sequence[ImageItem],
    blank: bool,
    chunk_sizes: Sequence[int],
    protocol: EvaluationProtocol = AHCPTQ_PROTOCOL,
) -> Generator[ImageResult]:
    """The predictions of images, one after another, while the next ones are read."""
    prompted = [item for item in items if len(boxes.per_image[item.image_id])]
    source = _blank_images(prompted) if blank else stream_images(dataset, prompted)
    last_blank: tuple[int, int] | None = None
    with contextlib.closing(source):
        for item in items:
            prompts = boxes.per_image[item.image_id]
            if len(prompts):
                item, image = next(source)
                # Blank images of one size are equal: their embedding is made once.
                if not blank or image.shape[:2] != last_blank:
                    predictor.set_image(image)
                    last_blank = image.shape[:2]
            yield predict_image(predictor, item, prompts, chunk_sizes, protocol)


def predict_image(
    predictor: Predictor,
    item: ImageItem,
    prompts: ImageBoxes,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    protocol: EvaluationProtocol = AHCPTQ_PROTOCOL,
) -> ImageResult:
    """Predicts one mask per box of the image that the predictor holds, as the protocol has it.

    The boxes are cut into chunks of the largest of `chunk_sizes` that they fill by more than half, and the
    last chunk is filled up by repeating its last box.

    Raises:
      ValueError: if the predictor returns other shapes than asked for, or a predicted IoU that is not finite.
    """
    best_of_all = protocol.multimask == "best"
    pixels = item.height * item.width * (_MOST_MASKS if best_of_all else 1)
    allowed = sorted(chunk_sizes)
    affordable = [n for n in allowed if n * pixels <= _CHUNK_PIXELS] or allowed[:1]
    counts: list[str] = []
    ious: list[np.ndarray] = []
    first = 0
    while first < len(prompts):
        left = len(prompts) - first
        padded = next((n for n in reversed(affordable) if left > n // 2), affordable[0])
        chunk = prompts.boxes[first : first + padded]
        first += len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], padded - len(chunk), axis=0)])
        masks, iou, _ = predictor.predict_batch(**_as_prompts(filled, protocol), multimask_output=best_of_all)
        masks, iou = _checked(np.asarray(masks), np.asarray(iou), item, padded, best_of_all)
        chosen = iou[: len(chunk)].argmax(1)
        rows = np.arange(len(chunk))
        counts += encode(masks[rows, chosen])
        ious.append(iou[rows, chosen].astype(np.float64))
    size = (item.height, item.width)
    return ImageResult(item.image_id, size, tuple(counts), np.concatenate(ious) if ious else np.zeros(0))


def _as_prompts(boxes: np.ndarray, protocol: EvaluationProtocol) -> dict[str, np.ndarray]:
    """The arguments of `predict_batch` for boxes (N, 4)."""
    if protocol.prompt == "box":
        return {"boxes": boxes}
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    return {"point_coords": centres, "point_labels": np.ones((len(boxes), 1), np.int64)}


def _checked(
    masks: np.ndarray, iou: np.ndarray, item: ImageItem, count: int, several: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What a predictor returned for `count` prompts, if it has the shapes that were asked for and finite numbers."""
    shape = (count, iou.shape[1] if several and iou.ndim == 2 else 1)
    if iou.shape != shape or masks.shape != (*shape, item.height, item.width):
        raise ValueError(
            f"The predictor returned masks {masks.shape} and IoU {iou.shape} for {count} boxes on image "
            f"{item.name} of {item.height}x{item.width} pixels: predict_batch must return "
            f"{'some such masks' if several else 'one such mask'} per box."
        )
    if not np.isfinite(iou).all():
        raise InputError(
            f"The model predicts an IoU that is not finite for image {item.name}: its weights or "
            "quantizer scales hold NaN or infinity; calibrate again or load an intact checkpoint."
        )
    return masks, iou


def _blank_images(items: Sequence[ImageItem]) -> Generator[tuple[ImageItem, np.ndarray]]:
    """Every image as mid-gray of its size."""
    for item in items:
        yield item, np.full((item.height, item.width, 3), _BLANK_VALUE, np.uint8)
