"""One evaluation: images through the predictor, masks into scores."""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tqdm

from experiments.coco import BoxSet, CocoDataset, ImageItem
from experiments.evaluate import journal
from experiments.evaluate.metrics import average_precision, mean_iou
from experiments.evaluate.predictions import CHUNK_SIZES, ImageResult, Predictor, predict_images
from experiments.job import devices
from experiments.job.protocol import AHCPTQ_PROTOCOL, EvaluationProtocol


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
    code: str = "",
    protocol: EvaluationProtocol = AHCPTQ_PROTOCOL,
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
      code: version of the code; partial results of another one are not taken over.
      protocol: how the model is prompted, which mask counts and what ranks masks.
      progress: label of the progress bar on stderr; None for no bar.

    Raises:
      ValueError: if an image cannot be read, the predictor breaks its contract, or `partial_results` belongs
        to another evaluation.
      FileNotFoundError: if an image is gone.
    """
    start = time.perf_counter()
    if any(item.image_id not in boxes.per_image for item in dataset.items):
        raise ValueError(f"The boxes of {boxes.source} were not made for {dataset.source}: load them for this dataset.")
    path = None if partial_results is None else Path(partial_results)
    done = {} if path is None else journal.resume(path, dataset, boxes, blank, model_fingerprint, code, protocol)
    copies = list(predictor) if isinstance(predictor, Sequence) else [predictor]
    parts = [list(dataset.items)]
    if isinstance(predictor, Sequence):
        parts = [[dataset.items[i] for i in share] for share in devices.shares(len(dataset.items))]
    resumed = sum(item.image_id in done for part in parts for item in part)

    def predict(copy: Predictor, items: Sequence[ImageItem]) -> Generator[ImageResult]:
        return predict_images(copy, dataset, boxes, items, blank, chunk_sizes, protocol)

    results = done | _predict_parts(predict, copies, parts, done, path, progress)
    if isinstance(predictor, Sequence):
        found = devices.from_all_processes(
            {image_id: journal.to_record(result) for image_id, result in results.items()}
        )
        results = {item.image_id: journal.from_record(found[item.image_id], item) for item in dataset.items}
    results = {item.image_id: results[item.image_id] for item in dataset.items}
    precision = average_precision(dataset, boxes, results, use_categories=use_categories, score=protocol.score)
    metrics: dict[str, float | None] = dict(precision)
    metrics["mIoU"], note = mean_iou(dataset, boxes, results, use_categories=use_categories)
    return EvaluationResult(metrics, results, time.perf_counter() - start, resumed, note)


def _predict_parts(
    predict: Callable[[Predictor, Sequence[ImageItem]], Iterable[ImageResult]],
    copies: Sequence[Predictor],
    parts: Sequence[Sequence[ImageItem]],
    done: Container[int],
    path: Path | None,
    progress: str | None,
) -> dict[int, ImageResult]:
    """The predictions of all images that are not done, each part by its copy of the model; journalled in `path`."""
    own = [item.image_id for part in parts for item in part]
    bar = tqdm.tqdm(
        total=len(own),
        initial=sum(image_id in done for image_id in own),
        desc=progress,
        unit="image",
        file=sys.stderr,
        disable=progress is None,
    )
    results: dict[int, ImageResult] = {}
    lock, failed = threading.Lock(), threading.Event()

    def run(copy: Predictor, part: Sequence[ImageItem]) -> None:
        todo = [item for item in part if item.image_id not in done]
        try:
            for result in predict(copy, todo):
                with lock:
                    results[result.image_id] = result
                    if path is not None:
                        journal.append(path, result)
                    bar.update()
                if failed.is_set():
                    return
        except BaseException:
            failed.set()
            raise

    with bar:
        if len(copies) == 1:
            run(copies[0], parts[0])
        else:
            with ThreadPoolExecutor(len(copies), thread_name_prefix="device") as pool:
                futures = [pool.submit(run, *pair) for pair in zip(copies, parts, strict=True)]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    # Ctrl-C comes to this thread alone; the others end with the image that they have.
                    failed.set()
                    raise
    return results
