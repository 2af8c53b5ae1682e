"""What the page does, without the page: prompts, two models on one image, their masks, pictures and figures."""

from __future__ import annotations

import colorsys
import dataclasses
import time
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import Bool, UInt8

from ahcptq_jax import METHODS, QuantConfig, Quantized, quantize
from experiments.scenes.scenes import CALIB_SEED, boxes_xyxy, make_scene
from sam_flax import SamAutomaticMaskGenerator, SamPredictor
from sam_flax.errors import InputError
from sam_flax.predictor import MaskModel
from sam_flax.sam import Params, Sam

Image = UInt8[np.ndarray, "h w 3"]
Mask = Bool[np.ndarray, "h w"]

CALIBRATION_SCENES = 8
# A gesture that moves less than this share of the image is a click, else a box.
CLICK_SHARE = 0.02
# Less strict than segment_anything's, whose thresholds suit models that are surer of their masks than MINI.
EVERYTHING = {"points_per_side": 12, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.7}
_COLOUR = (30, 144, 255)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked for, in pixels of the image.

    Attributes:
        points: x, y and label (1 object, 0 background) of each click.
        box: x0, y0, x1, y1, or None.
        everything: whether all objects are asked for, whatever the prompts are.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    everything: bool = False

    @property
    def empty(self) -> bool:
        return not self.points and self.box is None and not self.everything

    def after(self, gesture: str, width: int, height: int, label: int) -> Prompts:
        """The prompts after a click or a drag on the image.

        Args:
            gesture: "x0,y0,x1,y1", where it began and ended, as shares of the width and height.
            width, height: of the image.
            label: of a click.

        Raises:
            InputError: if the gesture is none.
        """
        try:
            x0, y0, x1, y1 = (min(max(float(part), 0.0), 1.0) for part in gesture.split(",")[:4])
        except ValueError:
            raise InputError(f"The gesture {gesture[:40]!r} is not four numbers; click or drag on an image.") from None
        if max(abs(x1 - x0), abs(y1 - y0)) < CLICK_SHARE:
            return Prompts((*self.points, (x1 * width, y1 * height, label)), self.box)
        box = (min(x0, x1) * width, min(y0, y1) * height, max(x0, x1) * width, max(y0, y1) * height)
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            raise InputError("The box has no area; drag from one corner of the object to the opposite one.")
        # Points were meant for another object.
        return Prompts(box=box)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one model makes of the prompts.

    Attributes:
        masks: one, or those of everything, the largest first.
        quality: the IoU that the model predicts for its mask; None for everything.
        milliseconds: that the decoder took without a compilation, or everything with one.
    """

    masks: tuple[Mask, ...]
    quality: float | None
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Side:
    """A model, and how it has taken the image.

    Attributes:
        name: for the page.
        nbytes: of its file.
        predictor: holds the image's embedding.
        milliseconds: that the encoder took, a compilation not counted.
    """

    name: str
    nbytes: int
    predictor: SamPredictor
    milliseconds: float


def size_of(model: Any) -> int:
    """Bytes of a model's file: float32 for a floating-point one."""
    if isinstance(model, Quantized):
        return model.summary().nbytes
    return 4 * sum(int(leaf.size) for leaf in jax.tree.leaves(model.params))


def look(name: str, model: MaskModel, image: Image) -> Side:
    """A model that has embedded the image; it does so twice, since the first time may compile."""
    predictor = SamPredictor(model)
    predictor.set_image(image)
    jax.block_until_ready(predictor.features)
    begin = time.perf_counter()
    predictor.set_image(image)
    jax.block_until_ready(predictor.features)
    return Side(name, size_of(model), predictor, 1000 * (time.perf_counter() - begin))


def answer(side: Side, image: Image, prompts: Prompts) -> Answer:
    """The masks that a model gives for the prompts, which are not empty."""
    begin = time.perf_counter()
    if prompts.everything:
        records = SamAutomaticMaskGenerator(side.predictor.model, **EVERYTHING).generate(image)  # type: ignore[arg-type]
        found = sorted((record["segmentation"] for record in records), key=lambda mask: -mask.sum())
        return Answer(tuple(found), None, 1000 * (time.perf_counter() - begin))
    points = np.array([point[:2] for point in prompts.points]) if prompts.points else None
    labels = np.array([point[2] for point in prompts.points]) if prompts.points else None
    # One point may mean a part or the whole: the best of three masks. More prompts mean one object.
    several = prompts.box is None and len(prompts.points) == 1
    box = None if prompts.box is None else np.array(prompts.box)
    side.predictor.predict(points, labels, box, multimask_output=several)  # which may compile
    begin = time.perf_counter()
    masks, quality, _ = side.predictor.predict(points, labels, box, multimask_output=several)
    best = int(np.argmax(quality))
    return Answer((masks[best],), float(quality[best]), 1000 * (time.perf_counter() - begin))


def agreement(first: Answer, second: Answer) -> float:
    """Mean over the first answer's masks of the IoU with the second's that fits best; 1 where both have none."""
    if not first.masks:
        return float(not second.masks)
    best = [max((_iou(a, b) for b in second.masks), default=0.0) for a in first.masks]
    return float(np.mean(best))


def _iou(a: Mask, b: Mask) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def picture(image: Image, prompts: Prompts, found: Answer | None) -> Image:
    """The image with masks and prompts drawn on it."""
    drawn = image.astype(np.float32)
    masks = found.masks if found else ()
    for number, mask in enumerate(masks):
        hue = colorsys.hsv_to_rgb(0.618 * number % 1, 0.75, 1.0)
        colour = np.array(_COLOUR if len(masks) == 1 else [255 * part for part in hue])
        drawn[mask] = 0.45 * drawn[mask] + 0.55 * colour
    out = np.ascontiguousarray(drawn.round().astype(np.uint8))
    unit = max(1, round(max(image.shape[:2]) / 250))
    if prompts.box is not None:
        x0, y0, x1, y1 = (round(value) for value in prompts.box)
        cv2.rectangle(out, (x0, y0), (x1, y1), (255, 255, 255), unit)
    for x, y, label in prompts.points:
        place = (round(x), round(y))
        cv2.circle(out, place, 3 * unit, (255, 255, 255), -1)
        cv2.circle(out, place, 2 * unit, (0, 160, 0) if label else (220, 0, 0), -1)
    return out


def figures(first: Side, second: Side, answers: tuple[Answer, Answer] | None) -> str:
    """A markdown table of both models: bytes, milliseconds, predicted quality, and how much their masks agree."""
    lines = ["| | file, MB | encoder, ms | mask, ms | predicted IoU |", "|---|---|---|---|---|"]
    for number, side in enumerate((first, second)):
        one = answers[number] if answers else None
        taken = f"{one.milliseconds:.0f}" if one else ""
        quality = f"{one.quality:.2f}" if one and one.quality is not None else ""
        lines.append(f"| {side.name} | {side.nbytes / 1e6:.2f} | {side.milliseconds:.0f} | {taken} | {quality} |")
    if answers:
        count = f", {len(answers[0].masks)} and {len(answers[1].masks)} masks" if len(answers[0].masks) != 1 else ""
        lines += ["", f"**Agreement (IoU of the masks): {agreement(*answers):.3f}**{count}"]
    return "\n".join(lines)


def quantize_now(sam: Sam, params: Params, method: str, bits: str) -> Quantized:
    """The model quantized by statistics of a few generated scenes; `bits` is like "w4a4"."""
    widths: dict[str, Any] = {"w_bits": int(bits[1]), "a_bits": int(bits[3])}
    switches: dict[str, Any] = dict(METHODS[method])
    size = max(64, min(512, sam.config.img_size))
    scenes = [make_scene(CALIB_SEED, index, size) for index in range(CALIBRATION_SCENES)]
    calib = [(scene.image, boxes_xyxy(scene.masks)) for scene in scenes]
    return quantize(params, calib, QuantConfig(**widths, **switches), sam=sam, progress=True)
