"""State dicts of Meta's and Hugging Face's SAM <-> our parameter tree."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.families import convert_other, told
from sam_flax.files.infer import attention_of_blocks, match
from sam_flax.files.known import Known
from sam_flax.files.parameters import PERMUTATIONS, Dims, parameter_shapes, parameter_table
from sam_flax.files.trees import as_float, by_path, check_tree_names, nested
from sam_flax.preprocessing import resample
from sam_flax.sam import Params


def convert(
    state_dict: Mapping[str, Any],
    *,
    decoder_num_heads: int | None = None,
    img_size: int | None = None,
    global_attn_indexes: Sequence[int] | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    config: SegmenterConfig | None = None,
    source: str = "State dict",
) -> tuple[Any, Params]:
    """Turns a state dict of any family of models into our configuration and parameter tree.

    Meta's names and those of transformers' `SamModel` are accepted, and MobileSAM's, with or without a common prefix
    such as `module.` or `model.`. `pixel_mean` and `pixel_std`, where present, go into the configuration. Tables of
    relative positions of another length than the model's grid needs are interpolated as the official code does when it
    runs.

    Args:
        state_dict: name -> array, as `read_state_dict` returns it.
        decoder_num_heads, img_size, global_attn_indexes, pixel_mean, pixel_std: what names and shapes do not show, as
            for `load_sam`.
        config: as for `load_sam`.
        source: what to call the state dict in errors.

    Returns:
        The configuration, inferred from shapes, and the tree of float32 arrays.

    Raises:
        InputError: if names are missing or unexpected, shapes disagree, or a value is not finite.

    Warns:
        InputWarning: if the decoder's heads are assumed for a model of unusual width.
    """
    known = Known(
        decoder_num_heads=decoder_num_heads,
        img_size=img_size,
        global_attn_indexes=global_attn_indexes,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    return convert_freeing(dict(state_dict), known, source, config)


def convert_freeing(
    state_dict: dict[str, Any], known: Known, source: str, config: SegmenterConfig | None = None
) -> tuple[Any, Params]:
    """`convert` on a dict that it empties, so that source and result need not both fit in memory."""
    if (other := convert_other(state_dict, config, known, source)) is not None:
        return other
    if config is not None:
        raise InputError(f"{source} is a plain SAM, whose configuration its names and shapes show; leave config out.")
    config, names, tensors = match(state_dict, known, source)
    state_dict.clear()
    flat: dict[str, np.ndarray] = {}
    # Names that show one view of one storage share an array here too: else a small file fills any memory.
    names_of_view = Counter(view for value in tensors.values() if (view := _read_only_view(value)))
    shared: dict[tuple[Any, ...], tuple[Any, np.ndarray]] = {}
    for entry in parameter_table(Dims.from_config(config)):
        sources = [tensors.pop(name) for name in names[entry.path]]
        view = _read_only_view(sources[0]) if len(sources) == 1 else None
        key = (view, entry.kind, entry.shape)
        if key in shared:
            flat[entry.path] = shared[key][1]
            continue
        parts = [as_float(name, value, source) for name, value in zip(names[entry.path], sources, strict=True)]
        value = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if entry.kind in PERMUTATIONS:
            value = value.transpose(PERMUTATIONS[entry.kind])
        flat[entry.path] = np.array(resample(value, entry.shape), order="C")
        if view is not None and names_of_view[view] > 1:
            # The source is held too, so that no other array can come to lie at its address.
            shared[key] = (sources[0], flat[entry.path])
    return config, nested(flat)


def _read_only_view(array: Any) -> tuple[Any, ...] | None:
    """What two read-only views of the same numbers in memory have in common; None for other arrays."""
    if not isinstance(array, np.ndarray) or array.flags.writeable:
        return None
    return (array.__array_interface__["data"][0], array.dtype.str, array.shape, array.strides)


def adapt(config: SegmenterConfig, params: Params, known: Known, source: str) -> tuple[SegmenterConfig, Params]:
    """A model of our own file with what the user says of it: other pixel statistics, another canvas.

    Raises:
        InputError: if the file says something else, or does not tell global blocks where they matter.
    """
    known.check_own(config, source)
    if not isinstance(config, SamConfig):
        return told(config, known), params
    config = dataclasses.replace(config, **known.statistics())
    grid, blocks = known.grid(config.grid, config.patch_size), known.global_attn_indexes
    if grid == config.grid and blocks in (None, config.global_attn_indexes):
        return config, params
    if blocks is None and len(config.global_attn_indexes) < config.depth:
        blocks = config.global_attn_indexes
    lengths = [(2 * size - 1, 2 * size - 1) for size in Dims.from_config(config).sizes]
    known = dataclasses.replace(known, global_attn_indexes=blocks)
    window_size, blocks = attention_of_blocks(lengths, config.grid, grid, known, source)
    config = dataclasses.replace(
        config, img_size=grid * config.patch_size, window_size=window_size, global_attn_indexes=blocks
    )
    shapes = parameter_shapes(config)
    return config, nested({path: resample(value, shapes[path]) for path, value in by_path(params).items()})


def export_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The exact inverse of `convert`: Meta's names and layouts, for `segment_anything` in PyTorch.

    Args:
        params: our tree.

    Returns:
        name -> contiguous float32 array, in the order of our tree.

    Raises:
        InputError: if the tree lacks parameters or has others.
    """
    flat = by_path(params)
    result: dict[str, np.ndarray] = {}
    for entry in check_tree_names(flat, "Parameter tree"):
        value = np.asarray(flat[entry.path], np.float32)
        if value.ndim != len(entry.shape):
            raise InputError(
                f"Parameter tree has {entry.path} of shape {value.shape} where {len(entry.shape)} axes "
                "belong; pass the tree of one SAM."
            )
        if entry.kind in PERMUTATIONS:
            value = value.transpose(np.argsort(PERMUTATIONS[entry.kind]))
        for name, part in zip(entry.official, np.split(value, len(entry.official)), strict=True):
            result[name] = np.array(part, order="C")
    return result
