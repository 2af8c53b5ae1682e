"""Which model a state dict or a parameter tree is, by names and shapes alone.

What shapes do not show: `decoder_num_heads` (8 in every published SAM), the pixel statistics and the mask threshold.
Where every encoder block has relative positions as long as the grid, global attention and windows as large as the grid
cannot be told apart; they compute the same, and the configuration says global, with `window_size` equal to the grid.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_flax.config import SamConfig
from sam_flax.files.parameters import HF_POSITIONS, PERMUTATIONS, Dims, Shape, parameter_table
from sam_flax.files.trees import as_float, by_path, check_names, check_shapes, check_tree, check_tree_names, shown


def infer_config(tree: Mapping[str, Any], *, decoder_num_heads: int | None = None) -> SamConfig:
    """The configuration that a state dict or a parameter tree implies by names and shapes alone.

    Args:
        tree: a state dict (as for `convert`) or a tree of our own.
        decoder_num_heads: see `convert`.

    Returns:
        The configuration.

    Raises:
        ValueError: as `convert`.
    """
    if not any(isinstance(value, Mapping) for value in tree.values()):
        return match(tree, decoder_num_heads, "State dict")[0]
    flat = by_path(tree)
    check_tree_names(flat, "Parameter tree")
    config = _infer({k: np.shape(v) for k, v in flat.items()}, decoder_num_heads, "Parameter tree", {})
    check_tree(config, flat, "Parameter tree")
    return config


def match(
    state_dict: Mapping[str, Any], decoder_num_heads: int | None, source: str
) -> tuple[SamConfig, dict[str, tuple[str, ...]], dict[str, Any]]:
    """The configuration, our path -> the names it is made of, and the tensors by those names; all checked."""
    tensors = _strip_prefix(state_dict, source)
    hugging_face = any(name.startswith(("vision_encoder.", HF_POSITIONS[1])) for name in tensors)
    statistics: dict[str, tuple[float, ...]] = {
        name: _statistic(name, tensors.pop(name), source) for name in ("pixel_mean", "pixel_std") if name in tensors
    }
    if hugging_face:
        _merge_tied(tensors, source)

    entries = parameter_table(Dims.from_names(tensors, hugging_face))
    names = {entry.path: entry.hugging_face if hugging_face else entry.official for entry in entries}
    check_names([name for group in names.values() for name in group], tensors, source)

    shapes: dict[str, Shape] = {}
    for entry in entries:
        group = [np.shape(tensors[name]) for name in names[entry.path]]
        for name, shape in zip(names[entry.path], group, strict=True):
            if len(shape) != len(entry.shape) or 0 in shape or shape[1:] != group[0][1:]:
                raise ValueError(
                    f"{source} has {name} of shape {shape} where {len(entry.shape)} non-empty axes belong; "
                    "it is not a SAM checkpoint, or it is damaged."
                )
        joined = (sum(shape[0] for shape in group), *group[0][1:])
        shapes[entry.path] = tuple(joined[i] for i in PERMUTATIONS.get(entry.kind, range(len(joined))))
    config = _infer(shapes, decoder_num_heads, source, statistics)

    wrong = []
    for entry in parameter_table(Dims.from_config(config)):
        for name in names[entry.path]:
            if np.shape(tensors[name]) != entry.official_shape():
                wrong.append(f"{name} expected {entry.official_shape()}, got {np.shape(tensors[name])}")
    check_shapes(wrong, source)
    return config, names, tensors


def _strip_prefix(state_dict: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Drops what stands before `image_encoder.` (or its like) in most names."""
    pattern = re.compile(
        r"(.*?)(?:(?:image_encoder|vision_encoder|prompt_encoder|mask_decoder)\.|shared_image_embedding\.)"
    )
    found = Counter(m[1] for name in state_dict if (m := pattern.match(name)))
    if not found:
        listed = ", ".join(map(shown, sorted(state_dict)[:3]))
        raise ValueError(
            f"{source} is not a SAM state dict: none of its {len(state_dict)} names ({listed}) belongs to "
            "an image encoder, prompt encoder or mask decoder; give a SAM checkpoint."
        )
    prefix = found.most_common(1)[0][0]
    result: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = name.removeprefix(prefix)
        if short in result:
            raise ValueError(
                f"{source} holds {shown(short)} twice, with and without the prefix {prefix!r}; keep one of them."
            )
        result[short] = value
    return result


def _merge_tied(tensors: dict[str, Any], source: str) -> None:
    """transformers saves the Fourier matrix under one or both of two names; keeps the first."""
    kept, other = HF_POSITIONS
    if other not in tensors:
        return
    value = tensors.pop(other)
    if not np.array_equal(tensors.setdefault(kept, value), value):
        raise ValueError(f"{source} has different values in {kept} and {other}, which SAM shares; keep one.")


def _statistic(name: str, value: Any, source: str) -> tuple[float, ...]:
    """Three colour values, such as `pixel_mean`."""
    values = as_float(name, value, source).reshape(-1)
    if values.size != 3 or (name == "pixel_std" and (values <= 0).any()):
        raise ValueError(f"{source} has {name} = {values[:4].tolist()}; three colour values belong there.")
    # The shortest decimal that is this float32: 123.675, not 123.67500305.
    return tuple(float(str(v)) for v in values)


def _infer(
    shapes: Mapping[str, Shape],
    decoder_num_heads: int | None,
    source: str,
    statistics: Mapping[str, tuple[float, ...]],
) -> SamConfig:
    """The configuration from shapes in our layout, whose names and ranks have been checked."""
    grid, width = shapes["image_encoder/pos_embed"][1], shapes["image_encoder/pos_embed"][3]
    patch = shapes["image_encoder/patch_embed/proj/kernel"][0]
    head_dim = shapes["image_encoder/blocks_0/attn/rel_pos_h"][1]
    if width % head_dim:
        raise ValueError(
            f"{source} has relative positions of width {head_dim}, which does not divide the encoder width "
            f"{width}; it is damaged or not a SAM checkpoint."
        )
    counts = Dims.from_paths(shapes)
    lengths = [shapes[f"image_encoder/blocks_{i}/attn/rel_pos_h"][0] for i in range(counts.depth)]
    windows = sorted({(n + 1) // 2 for n in lengths if n != 2 * grid - 1})
    if len(windows) > 1 or any(n % 2 == 0 for n in lengths):
        raise ValueError(
            f"{source} has relative positions of lengths {sorted(set(lengths))} on a {grid}x{grid} grid, "
            f"where only {2 * grid - 1} (global) and one odd window length can be; use a checkpoint at its "
            "native image size."
        )
    chans = shapes["image_encoder/neck/conv1/kernel"][3]
    if decoder_num_heads is not None and decoder_num_heads < 1:
        raise ValueError(f"decoder_num_heads={decoder_num_heads} is no number of heads; give 8, or leave it out.")
    if decoder_num_heads is None:
        decoder_num_heads = 8
        if chans != 256:
            # Another width than every published SAM's: the usual 8 is a guess, and a wrong one is silent.
            warnings.warn(
                f"{source} does not say how many heads its mask decoder has; 8 is assumed, "
                f"pass decoder_num_heads if it differs.",
                stacklevel=5,
            )
    try:
        return SamConfig(
            img_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=counts.depth,
            num_heads=width // head_dim,
            window_size=windows[0] if windows else grid,
            global_attn_indexes=tuple(i for i, n in enumerate(lengths) if n == 2 * grid - 1),
            mlp_ratio=_ratio(shapes["image_encoder/blocks_0/mlp/lin1/kernel"][1], width),
            out_chans=chans,
            mask_in_chans=shapes["prompt_encoder/mask_downscaling/conv2/kernel"][3],
            decoder_depth=counts.decoder_depth,
            decoder_num_heads=decoder_num_heads,
            decoder_mlp_dim=shapes["mask_decoder/transformer/layers_0/mlp/lin1/kernel"][1],
            num_multimask_outputs=counts.num_masks - 1,
            iou_head_depth=counts.iou_depth,
            iou_head_hidden_dim=shapes["mask_decoder/iou_prediction_head/layers_0/kernel"][1],
            **statistics,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ValueError(f"{source} implies an impossible configuration: {error}") from None


def _ratio(hidden: int, width: int) -> float:
    """The ratio that `int(width * ratio)` turns into `hidden`, rounding error or not."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
