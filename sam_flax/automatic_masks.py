"""`SamAutomaticMaskGenerator`: masks of everything in an image, as segment_anything makes them.

Source: segment_anything/automatic_mask_generator.py and utils/amg.py. The arguments and the fields of the records are
theirs. Needs OpenCV, for the suppression of boxes and for small regions; pycocotools for `output_mode="coco_rle"`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from sam_flax.errors import InputError
from sam_flax.predictor import ArrayLike, MaskModel, SamPredictor
from sam_flax.preprocessing import check_image
from sam_flax.sam import Params, Sam

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the original image
CROP_EDGE = 20.0  # pixels from the edge of a crop within which a mask's box counts as cut off by it


@dataclasses.dataclass
class _Found:
    """One mask in the frame of the original image.

    Attributes:
        counts: lengths of the mask's runs of equal pixels, column after column, the first of them zeros.
        box: its first and last column and row, x0, y0, x1, y1.
        point: x, y of the prompt.
    """

    counts: list[int]
    box: Box
    predicted_iou: float
    point: tuple[float, float]
    stability_score: float
    crop_box: Box


class SamAutomaticMaskGenerator:
    """Prompts a model with a grid of points on an image and on crops of it, and keeps the good and distinct masks.

    Args:
        model: a `SamModel` or a quantized model alone, or a `Sam` together with `params`.
        points_per_side: points along each side of the grid; their number is its square. None with `point_grids`.
        points_per_batch: points answered at once; more are faster and need more memory.
        pred_iou_thresh: masks with a lower predicted IoU are dropped; 0 keeps all.
        stability_score_thresh: masks that change more when the threshold on their logits is moved are dropped; 0 keeps
            all.
        stability_score_offset: how far that threshold is moved, up and down.
        box_nms_thresh: IoU of boxes above which the mask of lower predicted IoU is dropped as a duplicate.
        crop_n_layers: layers of crops; the i-th, counted from 1, has 2**i along each side.
        crop_nms_thresh: IoU of boxes above which a mask of a larger crop is dropped as a duplicate.
        crop_overlap_ratio: overlap of the crops of the first layer, as a share of the image's shorter side.
        crop_n_points_downscale_factor: the grid of layer i has `points_per_side` over this to the power of i points.
        point_grids: for each layer, the image itself first, points (P, 2) in 0..1, in place of `points_per_side`.
        min_mask_region_area: disconnected regions and holes of fewer pixels are removed; 0 leaves all.
        output_mode: "binary_mask" for boolean arrays, "uncompressed_rle" or "coco_rle" for dictionaries.
        params: the parameters of `model` if it is a `Sam`.

    Raises:
        InputError: if an argument is impossible.
        ImportError: if a library that is needed is not installed.
    """

    def __init__(
        self,
        model: Sam | MaskModel,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        *,
        params: Params | None = None,
    ) -> None:
        self.predictor = SamPredictor(model, params)
        if output_mode not in ("binary_mask", "uncompressed_rle", "coco_rle"):
            raise InputError(f"output_mode={output_mode!r} is unknown; use binary_mask, uncompressed_rle or coco_rle.")
        _check_whole("points_per_batch", points_per_batch, 1)
        _check_whole("min_mask_region_area", min_mask_region_area, 0)
        if not 0 <= crop_overlap_ratio < 1:
            raise InputError(f"crop_overlap_ratio={crop_overlap_ratio!r} must be at least 0 and below 1.")
        _opencv()
        if output_mode == "coco_rle":
            _coco_masks()
        self.point_grids = _grids(points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode: OutputMode = output_mode

    def generate(self, image: ArrayLike) -> list[dict[str, Any]]:
        """All masks of an image, the best of the finest crops first.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            For each mask a record: `segmentation` ((H, W) bool, or a dictionary of runs), `area` (pixels), `bbox`
            (x, y, width, height), `predicted_iou`, `point_coords` ([[x, y]], the prompt), `stability_score` and
            `crop_box` (x, y, width, height of the crop it was found in).

        Raises:
            InputError: if the image has another type or shape.
        """
        image = check_image(image)
        size = (image.shape[0], image.shape[1])
        crops, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        found = [mask for crop, layer in zip(crops, layers, strict=True) for mask in self._crop(image, crop, layer)]
        if len(crops) > 1:
            # Of duplicates, those of smaller crops are finer.
            scores = [1 / _area(mask.crop_box) for mask in found]
            found = [found[i] for i in suppress([mask.box for mask in found], scores, self.crop_nms_thresh)]
        if self.min_mask_region_area > 0:
            found = self._without_small_regions(found, size)
        return [self._record(mask, size) for mask in found]

    def _crop(self, image: np.ndarray, crop: Box, layer: int) -> list[_Found]:
        """The distinct masks that one crop shows."""
        x0, y0, x1, y1 = crop
        self.predictor.set_image(image[y0:y1, x0:x1])
        points = self.point_grids[layer] * np.array([x1 - x0, y1 - y0])
        size = (image.shape[0], image.shape[1])
        batches = range(0, len(points), self.points_per_batch)
        found = [mask for i in batches for mask in self._batch(points[i : i + self.points_per_batch], crop, size)]
        self.predictor.reset_image()
        kept = suppress([mask.box for mask in found], [mask.predicted_iou for mask in found], self.box_nms_thresh)
        return [found[i] for i in kept]

    def _batch(self, points: np.ndarray, crop: Box, size: tuple[int, int]) -> Iterator[_Found]:
        """The good masks of a batch of points in pixels of the crop."""
        x0, y0, x1, y1 = crop
        # Always as many points, so that one compilation serves all batches; those added are not looked at.
        padded = np.concatenate([points, np.repeat(points[-1:], self.points_per_batch - len(points), axis=0)])
        coords = self.predictor.transform.apply_coords(padded, (y1 - y0, x1 - x0))[:, None]
        low, iou = self.predictor.low_resolution((coords, np.ones(coords.shape[:2], np.int32)), None, None, True)
        for point, logits_of_point, ious in zip(points, low, iou, strict=False):
            for logits, predicted in zip(logits_of_point, ious, strict=True):
                if self.pred_iou_thresh > 0 and not predicted > self.pred_iou_thresh:
                    continue
                # One mask at a time: all of a batch at the size of a large image would be gigabytes.
                full = self.predictor.at_original_size(logits)
                threshold = self.predictor.model.config.mask_threshold
                stability = calculate_stability_score(full, threshold, self.stability_score_offset)
                if self.stability_score_thresh > 0 and not stability >= self.stability_score_thresh:
                    continue
                mask = full > threshold
                box = mask_to_box(mask)
                box = (box[0] + x0, box[1] + y0, box[2] + x0, box[3] + y0)
                if is_box_near_crop_edge(box, crop, (0, 0, size[1], size[0])):
                    continue
                whole = np.zeros(size, bool)
                whole[y0:y1, x0:x1] = mask
                place = (float(point[0] + x0), float(point[1] + y0))
                yield _Found(mask_to_counts(whole), box, float(predicted), place, stability, crop)

    def _without_small_regions(self, found: list[_Found], size: tuple[int, int]) -> list[_Found]:
        """The masks without small holes and islands, and without the duplicates that this makes."""
        cleaned: list[_Found] = []
        scores: list[float] = []
        for one in found:
            mask, filled = remove_small_regions(counts_to_mask(one.counts, size), self.min_mask_region_area, "holes")
            mask, removed = remove_small_regions(mask, self.min_mask_region_area, "islands")
            changed = filled or removed
            cleaned.append(
                dataclasses.replace(one, counts=mask_to_counts(mask), box=mask_to_box(mask)) if changed else one
            )
            scores.append(float(not changed))  # of duplicates, the one that needed no change is kept
        boxes = [one.box for one in cleaned]
        return [cleaned[i] for i in suppress(boxes, scores, max(self.box_nms_thresh, self.crop_nms_thresh))]

    def _record(self, mask: _Found, size: tuple[int, int]) -> dict[str, Any]:
        segmentation: Any
        if self.output_mode == "binary_mask":
            segmentation = counts_to_mask(mask.counts, size)
        else:
            segmentation = {"size": list(size), "counts": mask.counts}
            if self.output_mode == "coco_rle":
                segmentation = _coco_masks().frPyObjects(segmentation, *size)
                segmentation["counts"] = segmentation["counts"].decode("utf-8")  # so that JSON takes it
        return {
            "segmentation": segmentation,
            "area": sum(mask.counts[1::2]),
            "bbox": _xywh(mask.box),
            "predicted_iou": mask.predicted_iou,
            "point_coords": [list(mask.point)],
            "stability_score": mask.stability_score,
            "crop_box": _xywh(mask.crop_box),
        }


# ------------------------------------------------------------------------------------------------ points and crops


def build_point_grid(n_per_side: int) -> np.ndarray:
    """(n * n, 2) points x, y evenly spaced in 0..1, row after row."""
    offset = 1 / (2 * n_per_side) if n_per_side else 0.0
    line = np.linspace(offset, 1 - offset, n_per_side)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def _grids(
    points_per_side: int | None, point_grids: Sequence[ArrayLike] | None, n_layers: int, downscale_factor: int
) -> list[np.ndarray]:
    """The points (P, 2) of each layer in 0..1, those of the image itself first."""
    _check_whole("crop_n_layers", n_layers, 0)
    _check_whole("crop_n_points_downscale_factor", downscale_factor, 1)
    if (points_per_side is None) == (point_grids is None):
        raise InputError("Exactly one of points_per_side and point_grids must be given; leave the other None.")
    if point_grids is None:
        _check_whole("points_per_side", points_per_side, 1)
        assert points_per_side is not None
        return [build_point_grid(int(points_per_side / downscale_factor**i)) for i in range(n_layers + 1)]
    grids = [_checked_grid(grid) for grid in point_grids]
    if len(grids) <= n_layers or not len(grids[0]):
        raise InputError(
            f"point_grids has {len(grids)} grids for {n_layers + 1} layers, the image itself first; give one for each, "
            "the first of at least one point."
        )
    return grids


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")


def _checked_grid(grid: ArrayLike) -> np.ndarray:
    try:
        points = np.asarray(grid, np.float64)
    except (TypeError, ValueError):
        points = np.array(np.nan)
    if points.ndim != 2 or points.shape[1] != 2 or not ((points >= 0) & (points <= 1)).all():
        raise InputError(
            f"point_grids has a grid of shape {points.shape} or with points outside of 0..1; give arrays (P, 2) of "
            "x, y as shares of the image's width and height."
        )
    return points


def generate_crop_boxes(size: tuple[int, int], n_layers: int, overlap_ratio: float) -> tuple[list[Box], list[int]]:
    """The image's own box and those of overlapping crops, (2**i)**2 of them in layer i, with the layer of each."""
    height, width = size
    boxes: list[Box] = [(0, 0, width, height)]
    layers = [0]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        crop_w, crop_h = (math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height))
        lefts, tops = ([int((side - overlap) * i) for i in range(per_side)] for side in (crop_w, crop_h))
        for x0, y0 in itertools.product(lefts, tops):
            box = (x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height))
            if x0 < width and y0 < height:  # crops of a few pixels' image may lie outside of it
                boxes.append(box)
                layers.append(layer)
    return boxes, layers


def is_box_near_crop_edge(box: Box, crop: Box, image: Box) -> bool:
    """Whether a box ends close to an edge of its crop that is no edge of the image: its object was cut."""
    return any(
        abs(side - edge) <= CROP_EDGE and abs(side - outer) > CROP_EDGE
        for side, edge, outer in zip(box, crop, image, strict=True)
    )


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# ----------------------------------------------------------------------------------------------------------- masks


def calculate_stability_score(logits: np.ndarray, threshold: float, offset: float) -> float:
    """IoU of the masks at a threshold raised and lowered by `offset`; NaN where even the larger one is empty."""
    larger = np.count_nonzero(logits > threshold - offset)
    return float(np.count_nonzero(logits > threshold + offset) / larger) if larger else math.nan


def mask_to_box(mask: np.ndarray) -> Box:
    """First and last column and row of a mask (H, W) as x0, y0, x1, y1; zeros for an empty one."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))


def mask_to_counts(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (H, W), column after column, the first of them zeros (COCO's uncompressed RLE)."""
    flat = mask.ravel(order="F")
    ends = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    return [0] * bool(flat[0]) + np.diff(ends).tolist()


def counts_to_mask(counts: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The inverse of `mask_to_counts`, (H, W) bool."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def remove_small_regions(
    mask: np.ndarray, area_thresh: float, mode: Literal["holes", "islands"]
) -> tuple[np.ndarray, bool]:
    """A mask (H, W) without its holes or islands of fewer pixels, and whether it had any.

    If all islands are small, the largest stays.
    """
    holes = mode == "holes"
    _, regions, statistics, _ = _opencv().connectedComponentsWithStats((holes ^ mask).astype(np.uint8), connectivity=8)
    areas = statistics[1:, -1]  # the first region is the background
    small = np.flatnonzero(areas < area_thresh) + 1
    if not len(small):
        return mask, False
    if holes:
        return np.isin(regions, [0, *small]), True
    large = np.flatnonzero(areas >= area_thresh) + 1
    return np.isin(regions, large if len(large) else [int(np.argmax(areas)) + 1]), True


def suppress(boxes: Sequence[Box], scores: Sequence[float], iou_threshold: float) -> list[int]:
    """Indexes of the boxes x0, y0, x1, y1 that overlap none of a higher score by more than a threshold, best first."""
    order = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    wide = [i for i in order if _area(boxes[i]) > 0]
    kept = set(order) - set(wide)  # of masks one pixel wide: OpenCV takes them for equal, and they overlap nothing
    if wide:
        rectangles = [tuple(map(float, _xywh(boxes[i]))) for i in wide]
        ranks = [float(rank) for rank in range(len(wide), 0, -1)]  # in place of scores, of which it takes none below 0
        chosen = _opencv().dnn.NMSBoxes(rectangles, ranks, 0.0, iou_threshold)
        kept |= {wide[i] for i in np.asarray(chosen, np.int64).reshape(-1)}
    return [i for i in order if i in kept]


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "SamAutomaticMaskGenerator needs OpenCV; install it with pip install opencv-python-headless."
        ) from error
    return cv2


def _coco_masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "output_mode='coco_rle' needs pycocotools; install it with pip install pycocotools."
        ) from error
    return mask
