"""Partial results of an evaluation: a line of JSON for each finished image, from which a killed run goes on."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.coco import BoxSet, CocoDataset, ImageItem
from experiments.evaluate.predictions import ImageResult
from experiments.job.protocol import AHCPTQ_PROTOCOL, EvaluationProtocol
from experiments.job.results import write_file
from sam_flax.errors import InputError
from sam_flax.files.writing import unwritable

FORMAT = 1


def resume(
    path: Path,
    dataset: CocoDataset,
    boxes: BoxSet,
    blank: bool,
    model_fingerprint: str,
    code: str,
    protocol: EvaluationProtocol = AHCPTQ_PROTOCOL,
) -> dict[int, ImageResult]:
    """Reads the finished images of an interrupted run, or starts the file.

    A last line that a killed run left incomplete is cut off. What other code has written is not taken over: the file
    is started anew.

    Args:
        path: the file.
        dataset: the images.
        boxes: the prompts.
        blank: whether images are replaced by blank ones.
        model_fingerprint: identifies the model and its quantization.
        code: version of the code that predicts.
        protocol: how the model is prompted and which of its masks counts; what ranks them is worked out later.

    Raises:
        InputError: if the file belongs to another evaluation or is damaged elsewhere than at its end.
        OSError: if it cannot be written.
    """
    if not model_fingerprint:
        raise ValueError("Partial results need a model_fingerprint, so that another model's are not taken over.")
    header = {
        "format": FORMAT,
        "model": model_fingerprint,
        "dataset": dataset.fingerprint,
        "boxes": boxes.fingerprint,
        "blank": blank,
        "masks": f"{protocol.multimask} {protocol.prompt}",
        "code": code,
    }
    if not path.exists() or path.stat().st_size == 0:
        write_file(path, json.dumps(header) + "\n")
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    found = _parse_line(lines[0]) if lines else None
    if found is None or "format" not in found:
        raise InputError(f"{path} does not hold partial results: remove it or name another file.")
    different = [key for key in header if found.get(key) != header[key]]
    if different == ["code"]:
        print(f"{path} holds partial results of other code, which are left out.", file=sys.stderr, flush=True)
        write_file(path, json.dumps(header) + "\n")
        return {}
    if different:
        raise InputError(
            f"{path} holds partial results of another evaluation (different {', '.join(different)}): "
            "remove it or choose another --out."
        )
    done, valid = _finished(path, lines, dataset, boxes)
    if valid < len(data):
        os.truncate(path, valid)
    return done


def _finished(
    path: Path, lines: list[bytes], dataset: CocoDataset, boxes: BoxSet
) -> tuple[dict[int, ImageResult], int]:
    """The images in the lines below the header, and how many bytes of the file hold whole lines."""
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
            raise InputError(f"Line {number} of {path} is damaged: remove the file to start this evaluation again.")
        done[result.image_id] = result
        valid += len(line) + 1
    return done, valid


def append(path: Path, result: ImageResult) -> None:
    """Adds one line, of which a killed run leaves at most a part at the end of the file.

    Raises:
        OSError: if there is no room for it; the file then ends with the line before.
    """
    line = (json.dumps(to_record(result)) + "\n").encode()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            size = os.fstat(handle).st_size
            written = 0
            try:
                while written < len(line):
                    # A disk that fills up may take a part of the line before it refuses the rest.
                    written += os.write(handle, line[written:])
            except OSError:
                if written:
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritable(path, error) from error


def to_record(result: ImageResult) -> dict[str, Any]:
    """The predictions as JSON; floats keep every bit."""
    return {
        "image_id": result.image_id,
        "counts": result.counts,
        "predicted_iou": result.predicted_iou.tolist(),
    }


def from_record(record: Mapping[str, Any], item: ImageItem) -> ImageResult:
    """Inverse of `to_record`."""
    iou = np.array(record["predicted_iou"], np.float64)
    return ImageResult(item.image_id, (item.height, item.width), tuple(record["counts"]), iou)


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
    return from_record(record, items[image_id])
