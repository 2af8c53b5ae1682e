"""`SamPredictor`: segment_anything's interface over any SAM of this package, floating point or quantized."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sam_flax import preprocessing
from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.preprocessing import transform_of
from sam_flax.sam import SamModel
from sam_flax.segmenter import Params, Points, Segmenter

# No picture has such pixels, and what is computed of larger ones means nothing; logits only must not overflow.
LARGEST_COORDINATE = 1e6
LARGEST_LOGIT = 1e12


# Of numbers: lists, NumPy's, JAX's and PyTorch's arrays.
ArrayLike = Any


class MaskModel(Protocol):
    """What the predictor needs of a model; `SamModel` and `ahcptq_jax.Quantized` provide it."""

    @property
    def config(self) -> SegmenterConfig: ...

    def encode_image(self, images: jax.Array) -> Any: ...

    def decode(
        self,
        image_embeddings: Any,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]: ...


class SamPredictor:
    """Embeds an image once and answers any number of prompts on it (segment_anything/predictor.py).

    Args:
        model: a `Segmenter`, such as `Sam`, together with `params`, or alone a `SamModel` or a quantized model.
        params: the parameters of `model` if it is a `Segmenter`.

    Raises:
        TypeError: if a `Sam` comes without parameters or a complete model with them.
    """

    def __init__(self, model: Segmenter | MaskModel, params: Params | None = None):
        complete = all(hasattr(model, name) for name in ("config", "encode_image", "decode"))
        if isinstance(model, Segmenter) != (params is not None) or not complete:
            raise TypeError(
                f"SamPredictor takes a Sam with its params, SamPredictor(sam, params), or a complete model "
                f"(quantized, SamModel) alone, but got {type(model).__name__} with"
                f"{'out' if params is None else ''} params."
            )
        if isinstance(model, Segmenter):
            assert params is not None
            model = SamModel(model, params)
        self.model: MaskModel = model
        self.transform = transform_of(model.config)
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the current image."""
        self.features: Any = None
        self.original_size: tuple[int, int] = (0, 0)
        self.input_size: tuple[int, int] = (0, 0)

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Embeds an image.

        Args:
            image: (H, W, 3) uint8.
            image_format: "RGB" or "BGR", the order of the channels.

        Raises:
            InputError: if the image has another type or shape, or the format is unknown.
        """
        # First of all: after a failure no prompt may be answered on the image before.
        self.reset_image()
        if image_format not in ("RGB", "BGR"):
            raise InputError(f"image_format must be 'RGB' or 'BGR' but is {image_format!r}.")
        image = preprocessing.check_image(image)
        if image_format == "BGR":
            image = np.ascontiguousarray(image[..., ::-1])
        self._embed(self.transform.apply_image(image), (image.shape[0], image.shape[1]))

    def set_torch_image(self, transformed_image: ArrayLike, original_image_size: tuple[int, int]) -> None:
        """Embeds an image that is resized already, in segment_anything's layout; PyTorch is not needed.

        Args:
            transformed_image: (1, 3, h, w) RGB on the scale 0..255, its longer side that of the model's canvas.
            original_image_size: (height, width) of the image before it was resized.

        Raises:
            InputError: if the image has another shape, or not the size that this original has on the canvas.
        """
        self.reset_image()
        image = _check("transformed_image", transformed_image, (1, 3, None, None))[0].transpose(1, 2, 0)
        height, width = original_image_size
        wanted = self.transform.canvas_size((height, width))
        if image.shape[:2] != wanted:
            raise InputError(
                f"transformed_image is {image.shape[0]}x{image.shape[1]} pixels where an image of {height}x{width} is "
                f"resized to {wanted[0]}x{wanted[1]}; resize it with transform.apply_image."
            )
        self._embed(image, (height, width))

    def _embed(self, resized: np.ndarray, original_size: tuple[int, int]) -> None:
        canvas = preprocessing.normalize_and_pad(resized, self.model.config)
        self.input_size = (resized.shape[0], resized.shape[1])
        self.original_size = original_size
        self.features = self.model.encode_image(jnp.asarray(canvas[None]))

    def get_image_embedding(self) -> np.ndarray:
        """The embedding of the current image in segment_anything's layout, (1, C, g, g)."""
        features = self._features()
        return np.array(getattr(features, "embedding", features)).transpose(0, 3, 1, 2)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt on the current image, in pixels of the original image.

        Args:
            point_coords: (P, 2) x, y.
            point_labels: (P,) 1 object, 0 background.
            box: (4,) x0, y0, x1, y1.
            mask_input: (1, 4g, 4g) logits of an earlier prediction.
            multimask_output: three masks instead of one.
            return_logits: logits instead of booleans.

        Returns:
            masks (M, H, W), predicted IoU (M,), low-resolution logits (M, 4g, 4g).

        Raises:
            RuntimeError: if no image is set.
            InputError: if a prompt has a wrong shape, is not finite, or lies outside the image.
        """
        self._features()
        size = self.model.config.mask_size
        if box is not None:
            box = _numbers("box", box)
            box = box[0] if box.shape == (1, 4) else box  # segment_anything takes it too

        def one(name: str, array: ArrayLike | None, shape: tuple[int | None, ...]) -> np.ndarray | None:
            return None if array is None else _check(name, array, shape)[None]

        coords = one("point_coords", point_coords, (None, 2))
        masks, iou, low_res = self.predict_batch(
            boxes=one("box", box, (4,)),
            point_coords=coords,
            point_labels=one("point_labels", point_labels, (None if coords is None else coords.shape[1],)),
            mask_input=one("mask_input", mask_input, (1, size, size)),
            multimask_output=multimask_output,
            return_logits=return_logits,
        )
        return masks[0], iou[0], low_res[0]

    def predict_batch(
        self,
        boxes: ArrayLike | None = None,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N prompts on the current image at once, in pixels of the original image; see `predict`.

        Args:
            boxes: (N, 4).
            point_coords: (N, P, 2).
            point_labels: (N, P), -1 for padding.
            mask_input: (N, 1, 4g, 4g).

        Returns:
            masks (N, M, H, W), predicted IoU (N, M), low-resolution logits (N, M, 4g, 4g).

        Raises:
            RuntimeError: if no image is set.
            InputError: if a prompt has a wrong shape, is not finite, or lies outside the image.
        """
        self._features()
        points = self._checked_points(point_coords, point_labels)
        if points is not None:
            check_inside(points, self.original_size)
            points = (self.transform.apply_coords(points[0], self.original_size), points[1])
        if boxes is not None:
            boxes = _check("boxes", boxes, (None, 4))
            check_boxes(boxes, self.original_size)
            boxes = self.transform.apply_boxes(boxes, self.original_size)
        return self._predict(points, boxes, mask_input, multimask_output, return_logits)

    def predict_torch(
        self,
        point_coords: ArrayLike | None,
        point_labels: ArrayLike | None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N prompts in pixels of the model's canvas, as `transform` gives them; see `predict_batch`.

        The name and arguments are segment_anything's; PyTorch is not needed. Arrays of any library are taken, and those
        returned are NumPy's.
        """
        self._features()
        points = self._checked_points(point_coords, point_labels)
        if boxes is not None:
            boxes = _check("boxes", boxes, (None, 4))
        return self._predict(points, boxes, mask_input, multimask_output, return_logits)

    def low_resolution(
        self,
        points: tuple[np.ndarray, np.ndarray] | None,
        boxes: np.ndarray | None,
        masks: np.ndarray | None,
        multimask_output: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (N, M, 4g, 4g) and predicted IoU (N, M) of checked prompts in pixels of the canvas."""
        low, iou = self.model.decode(
            self._features(),
            None if points is None else (jnp.asarray(points[0], jnp.float32), jnp.asarray(points[1], jnp.int32)),
            None if boxes is None else jnp.asarray(boxes, jnp.float32),
            None if masks is None else jnp.moveaxis(jnp.asarray(masks, jnp.float32), 1, -1),
            multimask_output,
        )
        return np.array(low), np.array(iou)  # copies: NumPy views of JAX arrays are read-only

    def at_original_size(self, logits: np.ndarray) -> np.ndarray:
        """Low-resolution logits (..., 4g, 4g) at the size of the current image, (..., H, W) float32."""
        return self.transform.restore(logits, self.original_size)

    def _checked_points(
        self, coords: ArrayLike | None, labels: ArrayLike | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        if (coords is None) != (labels is None):
            missing = "point_coords" if coords is None else "point_labels"
            raise InputError(f"point_coords and point_labels must be given together; {missing} is missing.")
        if coords is None:
            return None
        coords = _check("point_coords", coords, (None, None, 2))
        labels = _check("point_labels", labels, coords.shape[:2])
        if not np.isin(labels, (-1, 0, 1)).all():
            raise InputError("point_labels must be 1 (object), 0 (background) or -1 (padding).")
        return coords, labels

    def _predict(
        self,
        points: tuple[np.ndarray, np.ndarray] | None,
        boxes: np.ndarray | None,
        mask_input: ArrayLike | None,
        multimask_output: bool,
        return_logits: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = self.model.config.mask_size
        masks = None if mask_input is None else _check("mask_input", mask_input, (None, 1, size, size))
        lengths = {len(a) for a in (None if points is None else points[0], boxes, masks) if a is not None}
        if not lengths:
            raise InputError("No prompt was given; give point_coords with point_labels, a box, or a mask_input.")
        if len(lengths) > 1:
            raise InputError(
                f"Points, boxes and masks must be as many as each other but number {sorted(lengths)}; give "
                "each kind of prompt once for every object, or leave that kind out."
            )
        low, iou = self.low_resolution(points, boxes, masks, multimask_output)
        out = np.empty((*low.shape[:2], *self.original_size), np.float32 if return_logits else np.bool_)
        # One prompt at a time: all logits of a large image at once would be gigabytes.
        for place, logits in zip(out, low, strict=True):
            full = self.at_original_size(logits)
            place[...] = full if return_logits else full > self.model.config.mask_threshold
        limit = self.model.config.logit_limit
        return out, iou, low if limit is None else np.clip(low, -limit, limit)

    def _features(self) -> Any:
        if self.features is None:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")
        return self.features


def check_inside(points: tuple[np.ndarray, np.ndarray], size: tuple[int, int]) -> None:
    """Raises InputError if a point that is no padding lies outside an image of `size`, (height, width)."""
    coords, labels = points
    height, width = size
    inside = ((coords >= 0) & (coords <= [width, height])).all(-1) | (labels < 0)
    if not inside.all():
        raise InputError(
            f"point_coords {coords[~inside][0].tolist()} lies outside the image of {width}x{height} "
            "pixels; give x, y in pixels of the original image."
        )


def check_boxes(boxes: np.ndarray, size: tuple[int, int]) -> None:
    """Raises InputError if a box is empty or lies outside an image of `size`, (height, width)."""
    height, width = size
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(-1)
    if empty.any():
        raise InputError(
            f"box {boxes[empty][0].tolist()} has x1 <= x0 or y1 <= y0; give corners as x0, y0, x1, y1 in pixels."
        )
    outside = (boxes[:, :2] >= [width, height]).any(-1) | (boxes[:, 2:] <= 0).any(-1)
    if outside.any():
        raise InputError(
            f"box {boxes[outside][0].tolist()} lies outside the image of {width}x{height} pixels; "
            "give x0, y0, x1, y1 in pixels of the original image."
        )


def _check(name: str, array: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """The argument as numbers that float32 holds, if its shape fits (None: any size but zero)."""
    array = _numbers(name, array)
    fits = array.ndim == len(shape) and all(m > 0 and n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(
            f"{name} has shape {array.shape} but must be ({wanted}{',' * (len(shape) == 1)}), none of them 0."
        )
    if not np.isfinite(array).all():
        raise InputError(f"{name} contains NaN or infinity; remove those prompts.")
    limit, remedy = LARGEST_COORDINATE, "pixels of the original image"
    if name == "mask_input":
        limit, remedy = LARGEST_LOGIT, "logits of an earlier prediction"
    if (largest := np.abs(array.astype(np.float64)).max()) > limit:
        raise InputError(f"{name} contains {largest:.3g}, beyond {limit:.0e}; give {remedy}.")
    return array


def _numbers(name: str, array: Any) -> np.ndarray:
    """The argument as an array of real numbers of one of NumPy's own types."""
    try:
        array = np.asarray(array)
    except (ValueError, OverflowError):  # rows of different lengths, an integer of hundreds of digits
        array = np.array(None)
    if array.dtype.kind == "V" and jnp.issubdtype(array.dtype, jnp.number):  # bfloat16 and its like
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} is not an array of numbers; give a NumPy array of int or float.")
    return array
