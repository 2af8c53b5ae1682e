"""State dicts of Meta's and Hugging Face's SAM <-> our parameter tree."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_flax.config import SamConfig
from sam_flax.files.infer import match
from sam_flax.files.parameters import PERMUTATIONS, Dims, parameter_table
from sam_flax.files.trees import as_float, by_path, check_tree_names, nested
from sam_flax.sam import Params


def convert(
    state_dict: Mapping[str, Any],
    *,
    decoder_num_heads: int | None = None,
    source: str = "State dict",
) -> tuple[SamConfig, Params]:
    """Turns a SAM state dict into our configuration and parameter tree.

    Meta's names and those of transformers' `SamModel` are accepted, with or without a common prefix such as
    `module.` or `model.`. `pixel_mean` and `pixel_std`, where present, go into the configuration.

    Args:
        state_dict: name -> array, as `read_state_dict` returns it.
        decoder_num_heads: heads of the mask decoder, which shapes do not show; 8 unless given.
        source: what to call the state dict in errors.

    Returns:
        The configuration, inferred from shapes, and the tree of float32 arrays.

    Raises:
        ValueError: if names are missing or unexpected, shapes disagree, or a value is not finite.
    """
    return convert_freeing(dict(state_dict), decoder_num_heads, source)


def convert_freeing(state_dict: dict[str, Any], decoder_num_heads: int | None, source: str) -> tuple[SamConfig, Params]:
    """`convert` on a dict that it empties, so that source and result need not both fit in memory."""
    config, names, tensors = match(state_dict, decoder_num_heads, source)
    state_dict.clear()
    flat: dict[str, np.ndarray] = {}
    for entry in parameter_table(Dims.from_config(config)):
        parts = [as_float(name, tensors.pop(name), source) for name in names[entry.path]]
        value = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if entry.kind in PERMUTATIONS:
            value = value.transpose(PERMUTATIONS[entry.kind])
        flat[entry.path] = np.array(value, order="C")
    return config, nested(flat)


def export_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The exact inverse of `convert`: Meta's names and layouts, for `segment_anything` in PyTorch.

    Args:
        params: our tree.

    Returns:
        name -> contiguous float32 array, in the order of our tree.

    Raises:
        ValueError: if the tree lacks parameters or has others.
    """
    flat = by_path(params)
    result: dict[str, np.ndarray] = {}
    for entry in check_tree_names(flat, "Parameter tree"):
        value = np.asarray(flat[entry.path], np.float32)
        if value.ndim != len(entry.shape):
            raise ValueError(
                f"Parameter tree has {entry.path} of shape {value.shape} where {len(entry.shape)} axes "
                "belong; pass the tree of one SAM."
            )
        if entry.kind in PERMUTATIONS:
            value = value.transpose(np.argsort(PERMUTATIONS[entry.kind]))
        for name, part in zip(entry.official, np.split(value, len(entry.official)), strict=True):
            result[name] = np.array(part, order="C")
    return result
