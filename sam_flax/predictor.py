"""`SamPredictor`: segment_anything's interface over any SAM of this package, floating point or quantized."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sam_flax import preprocessing
from sam_flax.config import SamConfig
from sam_flax.errors import InputError
from sam_flax.sam import Params, Points, Sam, SamModel

# No picture has such pixels, and what is computed of larger ones means nothing; logits only must not overflow.
LARGEST_COORDINATE = 1e6
LARGEST_LOGIT = 1e12


class MaskModel(Protocol):
    """What the predictor needs of a model; `SamModel` and `ahcptq_jax.Quantized` provide it."""

    @property
    def config(self) -> SamConfig: ...

    def encode_image(self, images: jax.Array) -> jax.Array: ...

    def decode(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]: ...


class SamPredictor:
    """Embeds an image once and answers any number of prompts on it (segment_anything/predictor.py).

    Args:
        model: a `Sam` together with `params`, or alone a `SamModel` or a quantized model.
        params: the parameters of `model` if it is a `Sam`.

    Raises:
        TypeError: if a `Sam` comes without parameters or a complete model with them.
    """

    def __init__(self, model: Sam | MaskModel, params: Params | None = None):
        complete = all(hasattr(model, name) for name in ("config", "encode_image", "decode"))
        if isinstance(model, Sam) != (params is not None) or not complete:
            raise TypeError(
                f"SamPredictor takes a Sam with its params, SamPredictor(sam, params), or a complete model "
                f"(quantized, SamModel) alone, but got {type(model).__name__} with"
                f"{'out' if params is None else ''} params."
            )
        if isinstance(model, Sam):
            assert params is not None
            model = SamModel(model, params)
        self.model: MaskModel = model
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the current image."""
        self.features: jax.Array | None = None
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
        canvas, self.input_size = preprocessing.prepare_image(image, self.model.config)
        self.original_size = (image.shape[0], image.shape[1])
        self.features = self.model.encode_image(jnp.asarray(canvas[None]))

    def get_image_embedding(self) -> np.ndarray:
        """The embedding of the current image in segment_anything's layout, (1, C, g, g)."""
        return np.array(self._features()).transpose(0, 3, 1, 2)

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
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

        def one(name: str, array: np.ndarray | None, shape: tuple[int | None, ...]) -> np.ndarray | None:
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
        boxes: np.ndarray | None = None,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = False,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N prompts on the current image at once; see `predict`.

        Args:
            boxes: (N, 4).
            point_coords: (N, P, 2).
            point_labels: (N, P), -1 for padding.
            mask_input: (N, 1, 4g, 4g).

        Returns:
            masks (N, M, H, W), predicted IoU (N, M), low-resolution logits (N, M, 4g, 4g).
        """
        features = self._features()
        config = self.model.config
        points = None
        if (point_coords is None) != (point_labels is None):
            missing = "point_coords" if point_coords is None else "point_labels"
            raise InputError(f"point_coords and point_labels must be given together; {missing} is missing.")
        if point_coords is not None and point_labels is not None:
            coords = _check("point_coords", point_coords, (None, None, 2))
            labels = _check("point_labels", point_labels, coords.shape[:2])
            if not np.isin(labels, (-1, 0, 1)).all():
                raise InputError("point_labels must be 1 (object), 0 (background) or -1 (padding).")
            height, width = self.original_size
            inside = ((coords >= 0) & (coords <= [width, height])).all(-1) | (labels < 0)
            if not inside.all():
                raise InputError(
                    f"point_coords {coords[~inside][0].tolist()} lies outside the image of {width}x{height} "
                    "pixels; give x, y in pixels of the original image."
                )
            moved = preprocessing.apply_coords(coords, self.original_size, config.img_size)
            points = (jnp.asarray(moved), jnp.asarray(labels, jnp.int32))
        box_array = None
        if boxes is not None:
            boxes = _check("boxes", boxes, (None, 4))
            empty = (boxes[:, 2:] <= boxes[:, :2]).any(-1)
            if empty.any():
                raise InputError(
                    f"box {boxes[empty][0].tolist()} has x1 <= x0 or y1 <= y0; give corners as x0, y0, x1, y1 in "
                    "pixels."
                )
            height, width = self.original_size
            outside = (boxes[:, :2] >= [width, height]).any(-1) | (boxes[:, 2:] <= 0).any(-1)
            if outside.any():
                raise InputError(
                    f"box {boxes[outside][0].tolist()} lies outside the image of {width}x{height} pixels; "
                    "give x0, y0, x1, y1 in pixels of the original image."
                )
            moved = preprocessing.apply_boxes(boxes, self.original_size, config.img_size)
            box_array = jnp.asarray(moved)
        mask_array = None
        if mask_input is not None:
            size = config.mask_size
            mask_array = jnp.asarray(_check("mask_input", mask_input, (None, 1, size, size)))
            mask_array = jnp.moveaxis(mask_array.astype(jnp.float32), 1, -1)
        coordinates = None if points is None else points[0]
        lengths = {len(a) for a in (coordinates, box_array, mask_array) if a is not None}
        if not lengths:
            raise InputError("No prompt was given; give point_coords with point_labels, a box, or a mask_input.")
        if len(lengths) > 1:
            raise InputError(
                f"Points, boxes and masks must be as many as each other but number {sorted(lengths)}; give "
                "each kind of prompt once for every object, or leave that kind out."
            )

        low_res, iou = self.model.decode(features, points, box_array, mask_array, multimask_output)
        low = np.array(low_res)  # copies: NumPy views of JAX arrays are read-only
        dtype = np.float32 if return_logits else np.bool_
        masks = np.empty((*low.shape[:2], *self.original_size), dtype)
        # One prompt at a time: all logits of a large image at once would be gigabytes.
        for out, logits in zip(masks, low, strict=True):
            full = preprocessing.postprocess_masks(logits, self.input_size, self.original_size, config.img_size)
            out[...] = full if return_logits else full > config.mask_threshold
        return masks, np.array(iou), low

    def _features(self) -> jax.Array:
        if self.features is None:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")
        return self.features


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
