"""Parameter trees by path, and the sentences with which a tree that does not fit its model is refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.parameters import Dims, Entry, parameter_table
from sam_flax.sam import Params

_MAX_LISTED = 8


@jax.tree_util.register_pytree_with_keys_class
class ParamTree(dict[str, Any]):
    """The parameters of a SAM as a nested dict that also says which SAM's they are.

    `jax.tree.map`, `jax.jit`, gradients and optimisers keep the configuration, since it is the static part of a pytree
    node; so two such trees fit together only if their configurations are equal. What is made from it as from any dict
    (`{**params}`, `params | other`, flattening by path) is a plain dict without it.

    Attributes:
        config: the configuration, with what shapes do not show: decoder heads, pixel statistics, mask threshold.
    """

    def __init__(self, values: Mapping[str, Any], config: SegmenterConfig) -> None:
        super().__init__(values)
        self.config = config

    def tree_flatten_with_keys(
        self,
    ) -> tuple[list[tuple[jax.tree_util.DictKey, Any]], tuple[tuple[str, ...], SegmenterConfig]]:
        """Children in the order of a dict's: sorted by name."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], (names, self.config)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[str, ...], SegmenterConfig], children: Iterable[Any]) -> "ParamTree":
        names, config = static
        return cls(dict(zip(names, children, strict=True)), config)

    def __repr__(self) -> str:
        return f"ParamTree({super().__repr__()}, config={self.config})"


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings -> {path, joined by '/': leaf}."""
    return traverse_util.flatten_dict(_plain(tree), sep="/")


def nested(flat: Mapping[str, Any]) -> Params:
    """The inverse of `by_path`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of any kind, with any keys, as the dicts with names that flax flattens."""
    return {str(key): _plain(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def check_tree_names(flat: Mapping[str, Any], source: str) -> list[Entry]:
    """The entries of the parameters of a flat tree; InputError if it is not a SAM's."""
    entries = parameter_table(Dims.from_paths(flat))
    check_names((entry.path for entry in entries), flat, source)
    return entries


def check_tree(entries: Sequence[Entry], flat: Mapping[str, Any], source: str) -> None:
    """InputError if a flat tree has not exactly the parameters, and their shapes, that a model's table says."""
    check_names((entry.path for entry in entries), flat, source)
    wrong = []
    for entry in entries:
        if np.shape(flat[entry.path]) != entry.shape:
            wrong.append(f"{entry.path} expected {entry.shape}, got {np.shape(flat[entry.path])}")
    check_shapes(wrong, source)


def check_names(expected: Iterable[str], got: Iterable[str], source: str) -> None:
    """InputError that lists missing and unexpected names, if there are any."""
    expected, got = set(expected), set(got)
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        raise InputError(
            f"{source} does not hold the parameters of a SAM: {_listed(missing, 'missing')}; "
            f"{_listed(unexpected, 'unexpected')}; give a plain SAM checkpoint (no adapters, no other "
            "encoder)."
        )


def check_shapes(wrong: list[str], source: str) -> None:
    """InputError that lists the findings about shapes, if there are any."""
    if wrong:
        raise InputError(
            f"{source} has shapes that do not fit together: {_listed(wrong, 'wrong', '; ')}; it is "
            "damaged, or mixes models."
        )


def as_float(name: str, value: Any, source: str, dtype: str = "float32") -> np.ndarray:
    """A value in `dtype`; InputError if it is not real and finite there."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise InputError(f"{source} has {name} of type {array.dtype}; weights must be real numbers.")
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise InputError(
            f"{source} has values in {name} that are NaN, infinite or too large for {dtype}; use a "
            "checkpoint of a model that trained soundly."
        )
    return array


def _listed(names: list[str], what: str, separator: str = ", ") -> str:
    if not names:
        return f"none {what}"
    rest = len(names) - _MAX_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{len(names)} {what} ({separator.join(map(shown, names[:_MAX_LISTED]))}{more})"


def shown(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    name = name if len(name) <= 120 else name[:117] + "..."
    return name if name.isprintable() else ascii(name)
