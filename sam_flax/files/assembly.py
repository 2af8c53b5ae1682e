"""How a parameter is made of the tensors of a checkpoint, by the kind of its entry in a table of names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.parameters import PERMUTATIONS, Entry, Shape
from sam_flax.files.trees import as_float, check_names, check_shapes, nested
from sam_flax.segmenter import Params

BATCH_NORM_EPSILON = 1e-5  # torch's default, which TinyViT keeps
Parts = Sequence[np.ndarray]


def _joined(parts: Parts, entry: Entry) -> np.ndarray:
    """Tensors one under the other, their axes in our order."""
    value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return value.transpose(PERMUTATIONS[entry.kind]) if entry.kind in PERMUTATIONS else value


def _norm_scale(parts: Parts, entry: Entry) -> np.ndarray:
    """A batch norm's scale from its weight and running variance."""
    weight, variance = parts
    if (variance < 0).any():
        raise InputError(f"{entry.official[1]} has a negative variance; use a checkpoint that is not damaged.")
    return weight / np.sqrt(variance + BATCH_NORM_EPSILON)


def _norm_offset(parts: Parts, entry: Entry) -> np.ndarray:
    """A batch norm's offset from its bias and running mean, and from what makes its scale."""
    bias, mean, *scale = parts
    return bias - mean * _norm_scale(scale, entry)


def _queries_first(parts: Parts, entry: Entry) -> np.ndarray:
    """A projection whose outputs are q, k and v of one head after the other -> q of all heads, k of all, v of all."""
    value = parts[0]
    by_head = value.reshape(entry.heads, 3, -1, *value.shape[1:])
    ordered = by_head.swapaxes(0, 1).reshape(value.shape)
    return ordered.T if ordered.ndim == 2 else ordered


def _reshaped(parts: Parts, entry: Entry) -> np.ndarray:
    return parts[0].reshape(entry.shape)


def _pointwise(parts: Parts, entry: Entry) -> np.ndarray:
    """A 1x1 convolution (out, in, 1, 1) as a linear layer (in, out)."""
    return parts[0].reshape(entry.shape[::-1]).T


ASSEMBLIES: dict[str, Callable[[Parts, Entry], np.ndarray]] = {
    "norm_scale": _norm_scale,
    "norm_offset": _norm_offset,
    "qkv_by_head": _queries_first,
    "pointwise": _pointwise,
    "reshaped": _reshaped,
}


def official_shapes(entry: Entry, count: int) -> list[Shape] | None:
    """The shape of each of `count` tensors that a parameter is made of; None where only its size is told."""
    if entry.kind == "reshaped":
        return None
    if entry.kind == "pointwise":
        return [(*entry.shape[::-1], 1, 1)]
    if entry.kind == "qkv_by_head":
        return [entry.shape[::-1]]
    if entry.kind in ASSEMBLIES:
        return [entry.shape] * count
    if entry.kind in PERMUTATIONS:
        return [entry.official_shape()] * count
    return [(entry.shape[0] // count, *entry.shape[1:])] * count


def assemble(
    config: SegmenterConfig,
    entries: Sequence[Entry],
    hugging_face: bool,
    tensors: dict[str, Any],
    source: str,
) -> tuple[SegmenterConfig, Params]:
    """Parameters from the tensors of a checkpoint, which is emptied.

    Args:
        config: of the model.
        entries: its table of names.
        hugging_face: which of the names the tensors have.
        tensors: by those names and no others.
        source: what to call the checkpoint in errors.

    Returns:
        The configuration, and the tree of float32 arrays.

    Raises:
        ValueError: if names are missing or unexpected, shapes disagree, or a value is not finite.
    """
    names = {entry.path: entry.hugging_face if hugging_face else entry.official for entry in entries}
    check_names({name for group in names.values() for name in group}, tensors, source)
    wrong = []
    for entry in entries:
        wanted = official_shapes(entry, len(names[entry.path]))
        for index, name in enumerate(names[entry.path]):
            found = np.shape(tensors[name])
            if wanted is None and np.prod(found) != np.prod(entry.shape):
                wrong.append(f"{name} expected {np.prod(entry.shape)} values, got {found}")
            elif wanted is not None and found != wanted[index]:
                wrong.append(f"{name} expected {wanted[index]}, got {found}")
    check_shapes(wrong, source)
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        parts = [as_float(name, tensors[name], source) for name in names[entry.path]]
        value = ASSEMBLIES.get(entry.kind, _joined)(parts, entry)
        flat[entry.path] = np.array(value, np.float32, order="C")
    tensors.clear()
    return config, nested(flat)


class Shapes(dict[str, Shape]):
    """Shapes by name, of a checkpoint whose family is known; a name that it lacks is an error that says so."""

    def __init__(self, tensors: Mapping[str, Any], source: str, family: str) -> None:
        super().__init__({name: np.shape(value) for name, value in tensors.items()})
        self.source, self.family = source, family

    def __missing__(self, name: str) -> Shape:
        raise InputError(f"{self.source} looks like a {self.family} but lacks {name}; use a whole checkpoint.")

    def size(self, name: str, axis: int) -> int:
        """The length of an axis."""
        shape = self[name]
        if len(shape) <= axis or 0 in shape:
            raise InputError(f"{self.source} has {name} of shape {shape}; it is damaged or no {self.family}.")
        return shape[axis]
