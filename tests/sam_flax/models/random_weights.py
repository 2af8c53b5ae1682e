"""Seeded weights and prompts for the models of the zoo, the same under PyTorch and here: NumPy makes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]
# Below 1, so that attention stays unsaturated: elsewhere float32's last bits would grow to whole digits.
GAIN = 0.7


def random_state(shapes: Mapping[str, Shape], seed: int) -> dict[str, np.ndarray]:
    """Values for every tensor of a state dict, with which every part of the graph matters."""
    rng = np.random.default_rng(seed)
    return {name: _values(name, tuple(shapes[name]), rng) for name in sorted(shapes)}


def _values(name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    leaf, owner = name.split(".")[-1], name.split(".")[-2] if "." in name else ""
    if leaf == "num_batches_tracked":
        return np.array(7)
    normal = rng.standard_normal(shape)
    if leaf == "running_var":
        value = 0.5 + rng.random(shape)
    elif leaf == "running_mean":
        value = 0.3 * normal
    elif leaf in ("positional_encoding_gaussian_matrix", "positional_embedding"):
        value = normal
    elif len(shape) < 2:
        value = 1 + 0.2 * normal if leaf == "weight" else 0.1 * normal
    elif leaf == "attention_biases" or "embed" in leaf or "embed" in owner or "token" in owner:
        value = 0.5 * normal
    else:
        transposed = "upscal" in name  # (in, out, 2, 2), whose patches do not overlap
        fan_in = shape[0] if transposed else int(np.prod(shape[1:]))
        value = normal * (GAIN / fan_in**0.5)
    return value.astype(np.float32)


def random_prompts(img_size: int, mask_size: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Two prompts of every kind and combination, by name: points, boxes, masks (N, m, m, 1)."""
    rng = np.random.default_rng(seed)
    coords = (rng.random((2, 3, 2)) * img_size).astype(np.float32)
    labels = np.array([[1, 0, -1], [1, 1, 0]], np.int32)
    corner = rng.random((2, 2)) * img_size / 2
    boxes = np.concatenate([corner, corner + 4 + rng.random((2, 2)) * img_size / 3], axis=1).astype(np.float32)
    masks = rng.standard_normal((2, mask_size, mask_size, 1)).astype(np.float32)
    points = {"coords": coords, "labels": labels}
    return {
        "points": points,
        "boxes": {"boxes": boxes},
        "points and boxes": points | {"boxes": boxes},
        "points and masks": points | {"masks": masks},
        "masks": {"masks": masks},
    }


def random_image(img_size: int, seed: int) -> np.ndarray:
    """(1, S, S, 3), normalised."""
    return np.random.default_rng(seed).standard_normal((1, img_size, img_size, 3)).astype(np.float32)


def relative_error(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())
