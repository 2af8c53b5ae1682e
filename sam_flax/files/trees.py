"""Parameter trees by path, and the sentences with which a tree that does not fit its model is refused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sam_flax.config import SamConfig
from sam_flax.files.parameters import Dims, Entry, parameter_table
from sam_flax.sam import Params

_MAX_LISTED = 8


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings -> {path, joined by '/': leaf}."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(tree, ""))


def nest(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def check_tree_names(flat: Mapping[str, Any], source: str) -> list[Entry]:
    """The entries of the parameters of a flat tree; ValueError if it is not a SAM's."""
    entries = parameter_table(Dims.from_paths(flat))
    check_names((entry.path for entry in entries), flat, source)
    return entries


def check_tree(config: SamConfig, flat: Mapping[str, Any], source: str) -> None:
    """ValueError if a flat tree has not exactly the parameters, and their shapes, that `config` says."""
    entries = parameter_table(Dims.from_config(config))
    check_names((entry.path for entry in entries), flat, source)
    wrong = []
    for entry in entries:
        if np.shape(flat[entry.path]) != entry.shape:
            wrong.append(f"{entry.path} expected {entry.shape}, got {np.shape(flat[entry.path])}")
    check_shapes(wrong, source)


def check_names(expected: Iterable[str], got: Iterable[str], source: str) -> None:
    """ValueError that lists missing and unexpected names, if there are any."""
    expected, got = set(expected), set(got)
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        raise ValueError(
            f"{source} does not hold the parameters of a SAM: {_listed(missing, 'missing')}; "
            f"{_listed(unexpected, 'unexpected')}; give a plain SAM checkpoint (no adapters, no other "
            "encoder)."
        )


def check_shapes(wrong: list[str], source: str) -> None:
    """ValueError that lists the findings about shapes, if there are any."""
    if wrong:
        raise ValueError(
            f"{source} has shapes that do not fit together: {_listed(wrong, 'wrong', '; ')}; it is "
            "damaged, or mixes models."
        )


def as_float(name: str, value: Any, source: str, dtype: str = "float32") -> np.ndarray:
    """A value in `dtype`; ValueError if it is not real and finite there."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise ValueError(f"{source} has {name} of type {array.dtype}; weights must be real numbers.")
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(
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
