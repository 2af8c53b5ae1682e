"""Which model a state dict or a parameter tree is, by names and shapes, and by what the user says (`Known`).

What shapes do not show: the heads of the mask decoder (8 in every published SAM), the pixel statistics and the mask
threshold. Which encoder blocks attend globally is shown by their tables of relative positions, which are longer than
those of the windowed ones; see `attention_of_blocks` for where that is not enough.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_flax.config import DEFAULT_DECODER_HEADS, VIT_B, SamConfig
from sam_flax.errors import InputError, warn
from sam_flax.files.known import Known
from sam_flax.files.parameters import HF_POSITIONS, PERMUTATIONS, Dims, Shape, parameter_table, ratio
from sam_flax.files.trees import as_float, by_path, check_names, check_shapes, check_tree, check_tree_names, shown

_POSITIONS = "image_encoder/pos_embed"


def infer_config(tree: Mapping[str, Any], *, decoder_num_heads: int | None = None) -> SamConfig:
    """The configuration that a state dict or a parameter tree implies by names and shapes alone.

    Where every block of a tree of our own has relative positions as long as the grid, global attention and windows as
    large as the grid cannot be told apart; they compute the same, and the configuration says global, with
    `window_size` equal to the grid.

    Args:
        tree: a state dict (as for `convert`) or a tree of our own.
        decoder_num_heads: see `convert`.

    Returns:
        The configuration.

    Raises:
        InputError: as `convert`.
    """
    known = Known(decoder_num_heads=decoder_num_heads)
    if not any(isinstance(value, Mapping) for value in tree.values()):
        return match(tree, known, "State dict")[0]
    flat, source = by_path(tree), "Parameter tree"
    check_tree_names(flat, source)
    shapes = {path: np.shape(value) for path, value in flat.items()}
    grid = shapes[_POSITIONS][1]
    # Our own tables are never interpolated at run time: one as long as the grid is a global block's.
    whole = tuple(i for i, pair in enumerate(_table_lengths(shapes)) if pair == (2 * grid - 1,) * 2)
    config = _infer(shapes, dataclasses.replace(known, global_attn_indexes=whole), source, {})
    check_tree(parameter_table(Dims.from_config(config)), flat, source)
    return config


def match(
    state_dict: Mapping[str, Any], known: Known, source: str
) -> tuple[SamConfig, dict[str, tuple[str, ...]], dict[str, Any]]:
    """The configuration, our path -> the names it is made of, and the tensors by those names; all checked.

    Tables of positions are as the file has them: those of another grid than the configuration's remain to be resampled
    (`resamples`).
    """
    tensors = _strip_prefix(state_dict, source)
    hugging_face = any(name.startswith(("vision_encoder.", HF_POSITIONS[1])) for name in tensors)
    statistics: dict[str, tuple[float, ...]] = {
        name: _statistic(name, tensors.pop(name), source) for name in ("pixel_mean", "pixel_std") if name in tensors
    }
    if hugging_face:
        merge_tied(tensors, source)

    entries = parameter_table(Dims.from_names(tensors, hugging_face))
    names = {entry.path: entry.hugging_face if hugging_face else entry.official for entry in entries}
    check_names([name for group in names.values() for name in group], tensors, source)

    shapes: dict[str, Shape] = {}
    for entry in entries:
        group = [np.shape(tensors[name]) for name in names[entry.path]]
        for name, shape in zip(names[entry.path], group, strict=True):
            if len(shape) != len(entry.shape) or 0 in shape or shape[1:] != group[0][1:]:
                raise InputError(
                    f"{source} has {name} of shape {shape} where {len(entry.shape)} non-empty axes belong; "
                    "it is not a SAM checkpoint, or it is damaged."
                )
        joined = (sum(shape[0] for shape in group), *group[0][1:])
        shapes[entry.path] = tuple(joined[i] for i in PERMUTATIONS.get(entry.kind, range(len(joined))))
    config = _infer(shapes, known, source, statistics)
    wrong = []
    for entry in parameter_table(Dims.from_config(config)):
        for name in names[entry.path]:
            got, expected = np.shape(tensors[name]), entry.official_shape()
            if got != expected and not resamples(entry.path, got, expected):
                wrong.append(f"{name} expected {expected}, got {got}")
    check_shapes(wrong, source)
    return config, names, tensors


def resamples(path: str, got: Shape, expected: Shape) -> bool:
    """Whether a parameter is a table of positions for another grid, square, which is resampled to the expected one."""
    if path == _POSITIONS:
        return len(got) == 4 and got[1] == got[2] and got[0] == expected[0] and got[3] == expected[3]
    return path.endswith(("/rel_pos_h", "/rel_pos_w")) and got[1:] == expected[1:]


def _strip_prefix(state_dict: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Drops what stands before `image_encoder.` (or its like) in most names."""
    pattern = re.compile(
        r"(.*?)(?:(?:image_encoder|vision_encoder|prompt_encoder|mask_decoder)\.|shared_image_embedding\.)"
    )
    found = Counter(m[1] for name in state_dict if (m := pattern.match(name)))
    if not found:
        listed = ", ".join(map(shown, sorted(state_dict)[:3]))
        raise InputError(
            f"{source} is not a SAM state dict: none of its {len(state_dict)} names ({listed}) belongs to "
            "an image encoder, prompt encoder or mask decoder; give a SAM checkpoint."
        )
    prefix = found.most_common(1)[0][0]
    result: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = name.removeprefix(prefix)
        if short in result:
            raise InputError(
                f"{source} holds {shown(short)} twice, with and without the prefix {prefix!r}; keep one of them."
            )
        result[short] = value
    return result


def merge_tied(tensors: dict[str, Any], source: str) -> None:
    """transformers saves the Fourier matrix under one or both of two names; keeps the first."""
    kept, other = HF_POSITIONS
    if other not in tensors:
        return
    value = tensors.pop(other)
    if not np.array_equal(tensors.setdefault(kept, value), value):
        raise InputError(f"{source} has different values in {kept} and {other}, which SAM shares; keep one.")


def _statistic(name: str, value: Any, source: str) -> tuple[float, ...]:
    """Three colour values, such as `pixel_mean`."""
    values = as_float(name, value, source).reshape(-1)
    if values.size != 3 or (name == "pixel_std" and (values <= 0).any()):
        raise InputError(f"{source} has {name} = {values[:4].tolist()}; three colour values belong there.")
    # The shortest decimal that is this float32: 123.675, not 123.67500305.
    return tuple(float(str(v)) for v in values)


def _infer(
    shapes: Mapping[str, Shape], known: Known, source: str, statistics: Mapping[str, tuple[float, ...]]
) -> SamConfig:
    """The configuration from shapes in our layout, whose names and ranks have been checked."""
    native, width = shapes[_POSITIONS][1], shapes[_POSITIONS][3]
    patch = shapes["image_encoder/patch_embed/proj/kernel"][0]
    head_dim = shapes["image_encoder/blocks_0/attn/rel_pos_h"][1]
    if width % head_dim:
        raise InputError(
            f"{source} has relative positions of width {head_dim}, which does not divide the encoder width "
            f"{width}; it is damaged or not a SAM checkpoint."
        )
    counts = Dims.from_paths(shapes)
    grid = known.grid(native, patch)
    window_size, global_blocks = attention_of_blocks(_table_lengths(shapes), native, grid, known, source)
    chans = shapes["image_encoder/neck/conv1/kernel"][3]
    heads = known.decoder_num_heads
    if heads is None:
        heads = DEFAULT_DECODER_HEADS
        if chans != VIT_B.out_chans:
            # Another width than every published SAM's: the usual number is a guess, and a wrong one is silent.
            warn(
                f"{source} does not say how many heads its mask decoder has; {heads} are assumed: "
                "give decoder_num_heads if it has others."
            )
    try:
        return SamConfig(
            img_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=counts.depth,
            num_heads=width // head_dim,
            window_size=window_size,
            global_attn_indexes=global_blocks,
            mlp_ratio=ratio(shapes["image_encoder/blocks_0/mlp/lin1/kernel"][1], width),
            out_chans=chans,
            mask_in_chans=shapes["prompt_encoder/mask_downscaling/conv2/kernel"][3],
            decoder_depth=counts.decoder_depth,
            decoder_num_heads=heads,
            decoder_mlp_dim=shapes["mask_decoder/transformer/layers_0/mlp/lin1/kernel"][1],
            num_multimask_outputs=counts.num_masks - 1,
            iou_head_depth=counts.iou_depth,
            iou_head_hidden_dim=shapes["mask_decoder/iou_prediction_head/layers_0/kernel"][1],
            **{**statistics, **known.statistics()},
        )
    except ValueError as error:
        raise InputError(f"{source} implies an impossible configuration: {error}") from None


def _table_lengths(shapes: Mapping[str, Shape]) -> list[tuple[int, int]]:
    """For each encoder block the lengths of its two tables of relative positions."""
    blocks = (f"image_encoder/blocks_{i}/attn" for i in range(Dims.from_paths(shapes).depth))
    return [(shapes[f"{block}/rel_pos_h"][0], shapes[f"{block}/rel_pos_w"][0]) for block in blocks]


def attention_of_blocks(
    lengths: list[tuple[int, int]], native: int, grid: int, known: Known, source: str
) -> tuple[int, tuple[int, ...]]:
    """The window size and the blocks that attend globally.

    A windowed block's tables are 2 * window_size - 1 long. A global one's may be of any length, since the official
    code interpolates them to 2 * grid - 1 (modeling/image_encoder.py get_rel_pos): a SAM fine-tuned at another input
    size keeps those it was made with, 127 long at 1024 pixels. So length alone tells the two only where the shorter
    kind cannot be global, and a wrong answer would be silent.

    Args:
        lengths: of the two tables of each block.
        native: side of the grid of the checkpoint's absolute positions.
        grid: side of the grid it is loaded for.
    """
    if known.global_attn_indexes is not None:
        global_blocks = tuple(known.global_attn_indexes)
    else:
        found = _global_blocks(lengths, native)
        # Blocks that all span the native grid compute the same, windowed or not, but only there.
        if found is None or (len(found) == len(lengths) and grid != native):
            raise InputError(
                f"{source} has relative positions of lengths {sorted({n for pair in lengths for n in pair})} for a "
                f"{native}x{native} grid, which does not tell its windowed encoder blocks from those that attend "
                "globally; give global_attn_indexes, which is (2, 5, 8, 11) for a SAM-B."
            )
        global_blocks = found
    if global_blocks and global_blocks[-1] >= len(lengths):
        raise InputError(
            f"global_attn_indexes={global_blocks} has blocks that {source} lacks: it has {len(lengths)}, counted from "
            "0; give the indexes of this model's global blocks."
        )
    windows = sorted({n for i, pair in enumerate(lengths) if i not in global_blocks for n in pair})
    if len(windows) > 1 or any(n % 2 == 0 for n in windows):
        raise InputError(
            f"{source} has relative positions of lengths {windows} in its windowed encoder blocks, where one odd "
            f"length belongs; give the global_attn_indexes of this model (taken are {global_blocks})."
        )
    return (windows[0] + 1) // 2 if windows else grid, global_blocks


def _global_blocks(lengths: list[tuple[int, int]], native: int) -> tuple[int, ...] | None:
    """The blocks that attend globally, None if the lengths of their tables do not tell."""
    exact = (2 * native - 1, 2 * native - 1)
    kinds = sorted(set(lengths))
    if kinds == [exact]:
        return tuple(range(len(lengths)))
    if len(kinds) != 2:
        return None
    short, long = kinds
    if long == exact:
        return _where(lengths, long)
    # In published SAMs windows are smaller than the grid, global blocks are few, and the first is windowed. A model
    # made for a grid smaller than its window has the two the other way round, and its global tables fit exactly.
    first_is_short, more_short = lengths[0] == short, lengths.count(short) - lengths.count(long)
    if first_is_short and more_short >= 0:
        return _where(lengths, long)
    if short == exact and not first_is_short and more_short <= 0:
        return _where(lengths, short)
    return None


def _where(lengths: list[tuple[int, int]], pair: tuple[int, int]) -> tuple[int, ...]:
    return tuple(i for i, other in enumerate(lengths) if other == pair)
