"""Mask AP of a promptable model on a COCO dataset.

Images stream through the predictor once: one image embedding, all its box prompts in a few batches, masks
kept as run lengths at the original size, from which every score is computed (COCO segm AP by pycocotools,
mIoU, agreement of two models). The score of a mask is its box's score times the predicted IoU, as
in AHCPTQ's evaluation.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tqdm
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from experiments import devices
from experiments.coco import BoxSet, CocoDataset, ImageBoxes, ImageItem, stream_images
from experiments.coco.dataset import quiet_coco
from experiments.results import write_atomically

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU")
# Prompts are padded to one of these counts, so that a jitted decoder compiles only for them.
CHUNK_SIZES = (8, 32)
# A chunk holds at most this many mask pixels at the original size (as float logits: 256 MiB).
_CHUNK_PIXELS = 2**26
# Mid-gray carries no information and stays near zero after SAM's normalisation.
_BLANK_VALUE = 128
# A detection is compared with an object, for mIoU, when their boxes overlap at least so much.
_MATCH_IOU = 0.5
_JOURNAL_FORMAT = 1


class Predictor(Protocol):
    """What evaluation needs of `sam_flax.SamPredictor`."""

    def set_image(self, image: np.ndarray) -> Any:
        """Embeds one uint8 RGB image (H, W, 3)."""

    def predict_batch(self, *, boxes: np.ndarray, multimask_output: bool) -> tuple[Any, Any, Any]:
        """Masks (N, M, H, W) bool, predicted IoU (N, M) and low-resolution logits for boxes (N, 4)."""


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
        if not chosen:
            return np.zeros((0, *self.size), bool)
        return np.moveaxis(mask_utils.decode(chosen), -1, 0).astype(bool)


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Scores of one model on one dataset with one set of prompts.

    Attributes:
      metrics: `AP AP50 AP75 APs APm APl` in percent and `mIoU` in 0..1; None where nothing can be measured.
      images: predictions by image id.
      seconds: time spent on predictions, without what was resumed, and on scoring.
      resumed: number of images whose predictions were read from the partial results.
      miou_note: what mIoU was taken over, or why it is None.
    """

    metrics: Mapping[str, float | None]
    images: Mapping[int, ImageResult]
    seconds: float
    resumed: int
    miou_note: str


def evaluate(
    predictor: Predictor | Sequence[Predictor],
    dataset: CocoDataset,
    boxes: BoxSet,
    *,
    blank: bool = False,
    use_categories: bool = True,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    partial_results: str | os.PathLike[str] | None = None,
    model_fingerprint: str = "",
    progress: str | None = "evaluate",
) -> EvaluationResult:
    """Predicts one mask per box and scores the masks.

    Args:
      predictor: the model; its `set_image` is called once per image that has prompts. A sequence holds a copy for
        each local device (`devices.predictors`): the images are then shared among all devices of all processes.
      dataset: images and ground truth.
      boxes: prompts, from `load_boxes`.
      blank: replaces every image by mid-gray of the same size. The score that remains shows how much the
        boxes alone give away.
      use_categories: whether a mask must have its object's category, as in COCO.
      chunk_sizes: prompt counts to pad to.
      partial_results: JSON-lines file for the predictions of finished images; a run that finds it goes on
        from there.
      model_fingerprint: identifies the model and its quantization in `partial_results`.
      progress: label of the progress bar on stderr; None for no bar.

    Raises:
      ValueError: if an image cannot be read, the predictor breaks its contract, or `partial_results` belongs
        to another evaluation.
      FileNotFoundError: if an image is gone.
    """
    start = time.perf_counter()
    if any(item.image_id not in boxes.per_image for item in dataset.items):
        raise ValueError(f"The boxes of {boxes.source} were not made for {dataset.source}: load them for this dataset.")
    done: dict[int, ImageResult] = {}
    journal: Path | None = None
    if partial_results is not None:
        if not model_fingerprint:
            raise ValueError("Partial results need a model_fingerprint, so that another model's are not taken over.")
        journal = Path(partial_results)
        header = {
            "format": _JOURNAL_FORMAT,
            "model": model_fingerprint,
            "dataset": dataset.fingerprint,
            "boxes": boxes.fingerprint,
            "blank": blank,
        }
        done = _open_journal(journal, header, dataset, boxes)
    copies = list(predictor) if isinstance(predictor, Sequence) else [predictor]
    parts = [list(dataset.items)]
    if isinstance(predictor, Sequence):
        parts = [[dataset.items[i] for i in share] for share in devices.shares(len(dataset.items))]
    own = [item for part in parts for item in part]
    resumed = sum(item.image_id in done for item in own)
    results = dict(done)
    bar = tqdm.tqdm(
        total=len(own),
        initial=resumed,
        desc=progress,
        unit="image",
        file=sys.stderr,
        disable=progress is None,
    )
    lock, failed = threading.Lock(), threading.Event()

    def predict(copy: Predictor, part: Sequence[ImageItem]) -> None:
        todo = [item for item in part if item.image_id not in done]
        try:
            for result in _predict_images(copy, dataset, boxes, todo, blank, chunk_sizes):
                with lock:
                    results[result.image_id] = result
                    if journal is not None:
                        _append_to_journal(journal, result)
                    bar.update()
                if failed.is_set():
                    return
        except BaseException:
            failed.set()
            raise

    with bar:
        if len(copies) == 1:
            predict(copies[0], parts[0])
        else:
            with ThreadPoolExecutor(len(copies), thread_name_prefix="device") as pool:
                for future in [pool.submit(predict, *pair) for pair in zip(copies, parts, strict=True)]:
                    future.result()
    if isinstance(predictor, Sequence):
        found = devices.gather({image_id: _to_record(result) for image_id, result in results.items()})
        results = {item.image_id: _from_record(found[item.image_id], item) for item in dataset.items}
    results = {item.image_id: results[item.image_id] for item in dataset.items}
    metrics: dict[str, float | None] = dict(average_precision(dataset, boxes, results, use_categories=use_categories))
    metrics["mIoU"], note = mean_iou(dataset, boxes, results, use_categories=use_categories)
    return EvaluationResult(metrics, results, time.perf_counter() - start, resumed, note)


def _predict_images(
    predictor: Predictor,
    dataset: CocoDataset,
    boxes: BoxSet,
    items: Sequence[ImageItem],
    blank: bool,
    chunk_sizes: Sequence[int],
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
            yield predict_image(predictor, item, prompts, chunk_sizes)


def predict_image(
    predictor: Predictor, item: ImageItem, prompts: ImageBoxes, chunk_sizes: Sequence[int] = CHUNK_SIZES
) -> ImageResult:
    """Predicts one mask per box of the image that the predictor holds.

    The boxes are cut into chunks of the largest of `chunk_sizes` that they fill by more than half, and the
    last chunk is filled up by repeating its last box.

    Raises:
      ValueError: if the predictor returns other shapes than asked for, or a predicted IoU that is not finite.
    """
    size = (item.height, item.width)
    allowed = sorted(chunk_sizes)
    affordable = [n for n in allowed if n * item.height * item.width <= _CHUNK_PIXELS] or allowed[:1]
    counts: list[str] = []
    ious: list[np.ndarray] = []
    first = 0
    while first < len(prompts):
        left = len(prompts) - first
        padded = next((n for n in reversed(affordable) if left > n // 2), affordable[0])
        chunk = prompts.boxes[first : first + padded]
        first += len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], padded - len(chunk), axis=0)])
        masks, iou, _ = predictor.predict_batch(boxes=filled, multimask_output=False)
        masks, iou = np.asarray(masks), np.asarray(iou)
        if masks.shape != (padded, 1, *size) or iou.shape != (padded, 1):
            raise ValueError(
                f"The predictor returned masks {masks.shape} and IoU {iou.shape} for {padded} boxes on image "
                f"{item.name} of {size[0]}x{size[1]} pixels: predict_batch must return one such mask "
                "per box."
            )
        if not np.isfinite(iou[: len(chunk)]).all():
            raise ValueError(
                f"The model predicts an IoU that is not finite for image {item.name}: its weights or "
                "quantizer scales hold NaN or infinity; calibrate again or load an intact checkpoint."
            )
        counts += _encode(masks[: len(chunk), 0])
        ious.append(iou[: len(chunk), 0].astype(np.float64))
    return ImageResult(item.image_id, size, tuple(counts), np.concatenate(ious) if ious else np.zeros(0))


def coco_results(boxes: BoxSet, results: Mapping[int, ImageResult]) -> list[dict[str, Any]]:
    """The predictions in COCO's results format; the score is box score times predicted IoU."""
    entries = []
    for image_id, result in results.items():
        prompts = boxes.per_image[image_id]
        scores = prompts.scores * result.predicted_iou
        for rle, score, category in zip(result.rles, scores, prompts.category_ids, strict=True):
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": int(category),
                    "segmentation": rle,
                    "score": float(score),
                }
            )
    return entries


def average_precision(
    dataset: CocoDataset, boxes: BoxSet, results: Mapping[int, ImageResult], *, use_categories: bool = True
) -> dict[str, float | None]:
    """COCO segm `AP AP50 AP75 APs APm APl` in percent, on the images of the dataset.

    A size class without ground truth has no AP (None). As in COCO, at most 100 masks per image and category
    count.
    """
    predictions = coco_results(boxes, results)
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
            overlaps.append(_iou(rles[index], dataset.ground_truth_rle(int(annotation_id))))
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
        _iou(a, b) for image_id in first for a, b in zip(first[image_id].rles, second[image_id].rles, strict=True)
    ]
    return float(np.mean(overlaps)) if overlaps else None


def filled_box(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The baseline mask that fills its box: pixels whose centre is inside.

    Args:
      boxes: (N, 4), `(x0, y0, x1, y1)` in pixels.

    Returns:
      bool (N, height, width).
    """
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    across, down = (x >= x0) & (x < x1), (y >= y0) & (y < y1)  # (N, W), (N, H)
    return down[:, :, None] & across[:, None, :]


def inscribed_ellipse(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The baseline mask that fills the largest ellipse in its box; arguments and result as `filled_box`."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None].astype(np.float64) for i in range(4))
    radius_x, radius_y = np.maximum((x1 - x0) / 2, 1e-9), np.maximum((y1 - y0) / 2, 1e-9)
    across = ((x - (x0 + x1) / 2) / radius_x) ** 2  # (N, W)
    down = ((y - (y0 + y1) / 2) / radius_y) ** 2  # (N, H)
    return down[:, :, None] + across[:, None, :] <= 1


class ShapePredictor:
    """A predictor that draws a shape into every box and never looks at the image; its predicted IoU is 1."""

    def __init__(self, shape: Callable[[np.ndarray, int, int], np.ndarray]):
        self._shape = shape
        self._size = (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        """Remembers the image's size."""
        self._size = (image.shape[0], image.shape[1])

    def predict_batch(self, *, boxes: np.ndarray, multimask_output: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks (N, 1, H, W), IoU (N, 1), and no logits (N, 1, 0, 0)."""
        del multimask_output
        masks = self._shape(boxes, *self._size)[:, None]
        return masks, np.ones((len(boxes), 1)), np.zeros((len(boxes), 1, 0, 0))


def evaluate_baselines(dataset: CocoDataset, boxes: BoxSet) -> dict[str, dict[str, float | None]]:
    """Metrics of the filled box and of the inscribed ellipse, which need no model."""
    shapes = {"filled_box": filled_box, "inscribed_ellipse": inscribed_ellipse}
    # Images are not looked at, so blank ones spare the reading.
    return {
        name: dict(evaluate(ShapePredictor(shape), dataset, boxes, blank=True, progress=None).metrics)
        for name, shape in shapes.items()
    }


def _blank_images(items: Sequence[ImageItem]) -> Generator[tuple[ImageItem, np.ndarray]]:
    """Every image as mid-gray of its size."""
    for item in items:
        yield item, np.full((item.height, item.width, 3), _BLANK_VALUE, np.uint8)


def _encode(masks: np.ndarray) -> list[str]:
    """Compressed run lengths of masks (N, H, W)."""
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1).astype(np.uint8))
    return [rle["counts"].decode() for rle in mask_utils.encode(columns)]


def _iou(first: dict[str, Any], second: dict[str, Any]) -> float:
    """IoU of two run-length masks; 1 if both are empty."""
    if not mask_utils.area(first) and not mask_utils.area(second):
        return 1.0
    return float(mask_utils.iou([first], [second], [0])[0, 0])


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


def _open_journal(path: Path, header: Mapping[str, Any], dataset: CocoDataset, boxes: BoxSet) -> dict[int, ImageResult]:
    """Reads the finished images of an interrupted run, or starts the file.

    A last line that a killed run left incomplete is cut off.

    Raises:
      ValueError: if the file belongs to another evaluation or is damaged elsewhere than at its end.
    """
    if not path.exists() or path.stat().st_size == 0:
        write_atomically(path, json.dumps(header) + "\n")
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    found = _parse_line(lines[0]) if lines else None
    if found is None or "format" not in found:
        raise ValueError(f"{path} does not hold partial results: remove it or name another file.")
    different = [key for key in header if found.get(key) != header[key]]
    if different:
        raise ValueError(
            f"{path} holds partial results of another evaluation (different {', '.join(different)}): "
            "remove it or choose another --out."
        )
    items = {item.image_id: item for item in dataset.items}
    done: dict[int, ImageResult] = {}
    valid = len(lines[0]) + 1
    for number, line in enumerate(lines[1:], 2):
        record = _parse_line(line)
        result = None if record is None else _parse_result(record, items, boxes)
        if result is None:
            # The end of the file may be damaged by a crash of the machine; the middle never is by one.
            if number == len(lines):
                break
            raise ValueError(f"Line {number} of {path} is damaged: remove the file to start this evaluation again.")
        done[result.image_id] = result
        valid += len(line) + 1
    if valid < len(data):
        os.truncate(path, valid)
    return done


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A JSON object, or None."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse_result(record: Mapping[str, Any], items: Mapping[int, ImageItem], boxes: BoxSet) -> ImageResult | None:
    """The predictions in one line of partial results, or None if they are not of this dataset and boxes."""
    image_id, counts, iou = record.get("image_id"), record.get("counts"), record.get("predicted_iou")
    if not isinstance(image_id, int) or image_id not in items:
        return None
    if not isinstance(counts, list) or not isinstance(iou, list):
        return None
    if not len(counts) == len(iou) == len(boxes.per_image[image_id]):
        return None
    if not all(isinstance(c, str) for c in counts) or not all(isinstance(v, float) and math.isfinite(v) for v in iou):
        return None
    item = items[image_id]
    return _from_record(record, item)


def _to_record(result: ImageResult) -> dict[str, Any]:
    """The predictions as JSON; floats keep every bit."""
    return {
        "image_id": result.image_id,
        "counts": result.counts,
        "predicted_iou": result.predicted_iou.tolist(),
    }


def _from_record(record: Mapping[str, Any], item: ImageItem) -> ImageResult:
    """Inverse of `_to_record`."""
    iou = np.array(record["predicted_iou"], np.float64)
    return ImageResult(item.image_id, (item.height, item.width), tuple(record["counts"]), iou)


def _append_to_journal(path: Path, result: ImageResult) -> None:
    """Adds one line in one write, so that a killed run leaves at most its last line incomplete."""
    line = (json.dumps(_to_record(result)) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)
