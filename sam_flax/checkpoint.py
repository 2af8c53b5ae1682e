"""Reads and writes SAM weights: Meta's and Hugging Face's files, and our own.

Nothing here needs PyTorch, and nothing in a file is ever executed (`sam_flax.torch_pickle`). One table,
`_table`, holds every parameter's path in our tree, its name in Meta's state dict (segment_anything), its
name in transformers' `SamModel`, how its axes are permuted, and its shape; every conversion reads that
table.

What a state dict's shapes do not show: `decoder_num_heads` (8 in every published SAM), the pixel statistics
and the mask threshold. Our own files carry the whole configuration in their metadata. Where every encoder
block has relative positions as long as the grid, global attention and windows as large as the grid cannot
be told apart; they compute the same, and the configuration says global, with `window_size` equal to the
grid.
"""

import json
import math
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as _serialize

from sam_flax.config import SamConfig
from sam_flax.torch_pickle import LEGACY_MAGIC, is_torch_zip, read_torch_file, widen_bfloat16

if TYPE_CHECKING:
    from sam_flax.sam import Sam

Params = dict[str, Any]  # nested, leaves are arrays
Shape = tuple[int, ...]
PathLike = str | os.PathLike[str]

MINI_WEIGHTS = Path(__file__).parent / "weights" / "mini.safetensors"
FORMAT = "sam_flax"
VERSION = "1"
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format

# Official axes -> ours. conv: OIHW -> HWIO. deconv: (in, out, kh, kw) -> (kh, kw, in, out), not flipped:
# kernel[a, b] is what input pixel (i, j) adds to output pixel (2i + a, 2j + b).
_PERMUTATIONS: dict[str, tuple[int, ...]] = {"linear": (1, 0), "conv": (2, 3, 1, 0), "deconv": (2, 3, 0, 1)}
_HF_POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
_SAFETENSORS_DTYPES = frozenset(("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"))
_MAX_LISTED = 8


class _Entry(NamedTuple):
    """One parameter under its three names."""

    path: str  # ours, '/'-joined
    official: tuple[str, ...]  # Meta's; several names are concatenated along axis 0
    hugging_face: tuple[str, ...]
    kind: str  # key of _PERMUTATIONS, or "same"
    shape: Shape  # in our layout

    def official_shape(self) -> Shape:
        if self.kind in _PERMUTATIONS:
            return tuple(self.shape[i] for i in np.argsort(_PERMUTATIONS[self.kind]))
        return (self.shape[0] // len(self.official), *self.shape[1:])


class _Dims(NamedTuple):
    """The integers that fix names (the first four) and shapes (the rest)."""

    depth: int
    decoder_depth: int
    num_masks: int
    iou_depth: int
    grid: int = 0
    patch: int = 0
    width: int = 0
    head_dim: int = 0
    mlp: int = 0
    sizes: tuple[int, ...] = ()  # per encoder block: side of its attention, tokens
    chans: int = 0
    mask_chans: int = 0
    decoder_mlp: int = 0
    iou_hidden: int = 0

    @classmethod
    def from_config(cls, config: SamConfig) -> "_Dims":
        return cls(
            depth=config.depth,
            decoder_depth=config.decoder_depth,
            num_masks=config.num_multimask_outputs + 1,
            iou_depth=config.iou_head_depth,
            grid=config.grid,
            patch=config.patch_size,
            width=config.embed_dim,
            head_dim=config.embed_dim // config.num_heads,
            mlp=int(config.embed_dim * config.mlp_ratio),
            sizes=tuple(
                config.grid if i in config.global_attn_indexes or not config.window_size else config.window_size
                for i in range(config.depth)
            ),
            chans=config.out_chans,
            mask_chans=config.mask_in_chans,
            decoder_mlp=config.decoder_mlp_dim,
            iou_hidden=config.iou_head_hidden_dim,
        )


def _table(d: _Dims) -> list[_Entry]:
    """Every parameter of the model with dimensions `d`; given the counts alone, shapes are right "
    "in rank only."""
    entries: list[_Entry] = []

    def add(path: str, official: str, hf: str, kind: str, shape: Shape) -> None:
        entries.append(_Entry(path, (official,), (hf,), kind, shape))

    def norm(path: str, official: str, hf: str, width: int) -> None:
        add(f"{path}/scale", f"{official}.weight", f"{hf}.weight", "same", (width,))
        add(f"{path}/bias", f"{official}.bias", f"{hf}.bias", "same", (width,))

    def layer(path: str, official: str, hf: str, kind: str, shape: Shape, bias: bool = True) -> None:
        add(f"{path}/kernel", f"{official}.weight", f"{hf}.weight", kind, shape)
        if bias:
            add(f"{path}/bias", f"{official}.bias", f"{hf}.bias", "same", shape[-1:])

    def mlp(path: str, widths: list[int]) -> None:
        # Hugging Face names the first and the last layer apart and counts the ones between.
        dotted, last = path.replace("mlps_", "mlps.").replace("/", "."), len(widths) - 2
        for j, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            hf = "proj_in" if j == 0 else "proj_out" if j == last else f"layers.{j - 1}"
            layer(f"{path}/layers_{j}", f"{dotted}.layers.{j}", f"{dotted}.{hf}", "linear", (fan_in, fan_out))

    def attention(path: str, inner: int) -> None:
        dotted = path.replace("layers_", "layers.").replace("/", ".")
        for name in ("q_proj", "k_proj", "v_proj"):
            layer(f"{path}/{name}", f"{dotted}.{name}", f"{dotted}.{name}", "linear", (d.chans, inner))
        layer(f"{path}/out_proj", f"{dotted}.out_proj", f"{dotted}.out_proj", "linear", (inner, d.chans))

    enc, hf_enc = "image_encoder", "vision_encoder"
    c, width = d.chans, d.width
    add(f"{enc}/pos_embed", f"{enc}.pos_embed", f"{hf_enc}.pos_embed", "same", (1, d.grid, d.grid, width))
    patch = (d.patch, d.patch, 3, width)
    layer(
        f"{enc}/patch_embed/proj",
        f"{enc}.patch_embed.proj",
        f"{hf_enc}.patch_embed.projection",
        "conv",
        patch,
    )
    sizes = d.sizes or (1,) * d.depth
    for i in range(d.depth):
        ours, meta, hf = f"{enc}/blocks_{i}", f"{enc}.blocks.{i}", f"{hf_enc}.layers.{i}"
        norm(f"{ours}/norm1", f"{meta}.norm1", f"{hf}.layer_norm1", width)
        for name in ("attn/rel_pos_h", "attn/rel_pos_w"):
            dotted = name.replace("/", ".")
            add(f"{ours}/{name}", f"{meta}.{dotted}", f"{hf}.{dotted}", "same", (2 * sizes[i] - 1, d.head_dim))
        layer(f"{ours}/attn/qkv", f"{meta}.attn.qkv", f"{hf}.attn.qkv", "linear", (width, 3 * width))
        layer(f"{ours}/attn/proj", f"{meta}.attn.proj", f"{hf}.attn.proj", "linear", (width, width))
        norm(f"{ours}/norm2", f"{meta}.norm2", f"{hf}.layer_norm2", width)
        layer(f"{ours}/mlp/lin1", f"{meta}.mlp.lin1", f"{hf}.mlp.lin1", "linear", (width, d.mlp))
        layer(f"{ours}/mlp/lin2", f"{meta}.mlp.lin2", f"{hf}.mlp.lin2", "linear", (d.mlp, width))
    neck = f"{enc}/neck"
    layer(f"{neck}/conv1", f"{enc}.neck.0", f"{hf_enc}.neck.conv1", "conv", (1, 1, width, c), bias=False)
    norm(f"{neck}/norm1", f"{enc}.neck.1", f"{hf_enc}.neck.layer_norm1", c)
    layer(f"{neck}/conv2", f"{enc}.neck.2", f"{hf_enc}.neck.conv2", "conv", (3, 3, c, c), bias=False)
    norm(f"{neck}/norm2", f"{enc}.neck.3", f"{hf_enc}.neck.layer_norm2", c)

    pe = "prompt_encoder"
    gaussian = "pe_layer/positional_encoding_gaussian_matrix"
    add(f"{pe}/{gaussian}", f"{pe}.{gaussian.replace('/', '.')}", _HF_POSITIONS[0], "same", (2, c // 2))
    entries.append(
        _Entry(
            f"{pe}/point_embeddings",
            tuple(f"{pe}.point_embeddings.{i}.weight" for i in range(4)),
            tuple(f"{pe}.point_embed.{i}.weight" for i in range(4)),
            "same",
            (4, c),
        )
    )
    for name in ("not_a_point_embed", "no_mask_embed"):
        add(f"{pe}/{name}", f"{pe}.{name}.weight", f"{pe}.{name}.weight", "same", (1, c))
    m, half = d.mask_chans, d.mask_chans // 4
    ours, meta, hf = f"{pe}/mask_downscaling", f"{pe}.mask_downscaling", f"{pe}.mask_embed"
    layer(f"{ours}/conv1", f"{meta}.0", f"{hf}.conv1", "conv", (2, 2, 1, half))
    norm(f"{ours}/norm1", f"{meta}.1", f"{hf}.layer_norm1", half)
    layer(f"{ours}/conv2", f"{meta}.3", f"{hf}.conv2", "conv", (2, 2, half, m))
    norm(f"{ours}/norm2", f"{meta}.4", f"{hf}.layer_norm2", m)
    layer(f"{ours}/conv3", f"{meta}.6", f"{hf}.conv3", "conv", (1, 1, m, c))

    dec = "mask_decoder"
    add(f"{dec}/iou_token", f"{dec}.iou_token.weight", f"{dec}.iou_token.weight", "same", (1, c))
    add(
        f"{dec}/mask_tokens",
        f"{dec}.mask_tokens.weight",
        f"{dec}.mask_tokens.weight",
        "same",
        (d.num_masks, c),
    )
    for i in range(d.decoder_depth):
        ours, meta = f"{dec}/transformer/layers_{i}", f"{dec}.transformer.layers.{i}"
        attention(f"{ours}/self_attn", c)
        attention(f"{ours}/cross_attn_token_to_image", c // 2)
        attention(f"{ours}/cross_attn_image_to_token", c // 2)
        for j in range(1, 5):
            norm(f"{ours}/norm{j}", f"{meta}.norm{j}", f"{meta}.layer_norm{j}", c)
        layer(f"{ours}/mlp/lin1", f"{meta}.mlp.lin1", f"{meta}.mlp.lin1", "linear", (c, d.decoder_mlp))
        layer(f"{ours}/mlp/lin2", f"{meta}.mlp.lin2", f"{meta}.mlp.lin2", "linear", (d.decoder_mlp, c))
    attention(f"{dec}/transformer/final_attn_token_to_image", c // 2)
    meta = f"{dec}.transformer"
    norm(f"{dec}/transformer/norm_final_attn", f"{meta}.norm_final_attn", f"{meta}.layer_norm_final_attn", c)
    ours, meta = f"{dec}/output_upscaling", f"{dec}.output_upscaling"
    layer(f"{ours}/conv1", f"{meta}.0", f"{dec}.upscale_conv1", "deconv", (2, 2, c, c // 4))
    norm(f"{ours}/norm1", f"{meta}.1", f"{dec}.upscale_layer_norm", c // 4)
    layer(f"{ours}/conv2", f"{meta}.3", f"{dec}.upscale_conv2", "deconv", (2, 2, c // 4, c // 8))
    for i in range(d.num_masks):
        mlp(f"{dec}/output_hypernetworks_mlps_{i}", [c, c, c, c // 8])
    mlp(f"{dec}/iou_prediction_head", [c] + [d.iou_hidden] * (d.iou_depth - 1) + [d.num_masks])
    return entries


def parameter_shapes(config: SamConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter of a model."""
    return {entry.path: entry.shape for entry in _table(_Dims.from_config(config))}


# ---------------------------------------------------------------------------------------------- reading files


def read_state_dict(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a `torch.save` file or a safetensors file, told apart by content.

    Neither imports PyTorch nor executes anything from the file.

    Args:
        path: official `.pth`, or `.safetensors`.

    Returns:
        name -> array as the file has it (bfloat16 is widened to float32); arrays may be read-only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if _sniff(path) == "torch":
        return read_torch_file(path)
    return _read_safetensors(path)[0]


def _sniff(path: Path) -> Literal["torch", "safetensors"]:
    """Which of the two formats a file has, by its first bytes."""
    remedy = "give an official SAM .pth or a .safetensors file"
    if path.is_dir():
        raise ValueError(f"Checkpoint {path} is a directory, not a file; {remedy}.")
    if not path.exists():
        raise FileNotFoundError(
            f"Checkpoint {path} does not exist; check the path, or use 'mini' for the model that ships."
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"Checkpoint {path} cannot be read ({error.strerror}); check its permissions.") from None
    if not head:
        raise ValueError(f"Checkpoint {path} is empty; download or copy it again.")
    if is_torch_zip(head):
        return "torch"
    if head.startswith(LEGACY_MAGIC) or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        raise ValueError(
            f"Checkpoint {path} is a bare pickle (torch.save before PyTorch 1.6, or not PyTorch at all), "
            "which is not read here; re-save it once with torch.save(torch.load(path, weights_only=True), "
            "new_path)."
        )
    if len(head) > 9 and head[8:9] == b"{":
        header = struct.unpack("<Q", head[:8])[0]
        if header > MAX_HEADER_BYTES or 8 + header > size:
            raise ValueError(
                f"Checkpoint {path} declares a safetensors header of {header} bytes in a file of {size} "
                "bytes; it is truncated or damaged, download or copy it again."
            )
        return "safetensors"
    raise ValueError(f"Checkpoint {path} is neither a torch.save file nor a safetensors file; {remedy}.")


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with path.open("rb") as file:
        raw = file.read(struct.unpack("<Q", file.read(8))[0])
    try:
        # The package keeps the last of two equal keys; this pass is only for refusing them.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        with safe_open(path, framework="np") as file:
            tensors: dict[str, np.ndarray] = {}
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype == "BF16":  # not a NumPy type; the package has checked the offsets by now
                    start, end = header[name]["data_offsets"]
                    bits = np.fromfile(path, "<u2", (end - start) // 2, offset=8 + len(raw) + start)
                    tensors[name] = widen_bfloat16(bits).reshape(header[name]["shape"])
                elif dtype in _SAFETENSORS_DTYPES:
                    tensors[name] = file.get_tensor(name)
                else:
                    raise ValueError(f"tensor {name[:80]!r} is of type {dtype}, which is not read")
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0][:160].rstrip(".")
        raise ValueError(
            f"Checkpoint {path} is not a sound safetensors file ({reason}); download it again or re-save it."
        ) from None
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return result


# ---------------------------------------------------------------------------------- state dict <-> parameters


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
    return _convert(dict(state_dict), decoder_num_heads, source)


def _convert(state_dict: dict[str, Any], decoder_num_heads: int | None, source: str) -> tuple[SamConfig, Params]:
    """`convert` on a dict that it consumes, so that source and result need not both fit in memory."""
    config, names, tensors = _match(state_dict, decoder_num_heads, source)
    state_dict.clear()
    flat: dict[str, np.ndarray] = {}
    for entry in _table(_Dims.from_config(config)):
        parts = [_as_float(name, tensors.pop(name), source) for name in names[entry.path]]
        value = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if entry.kind in _PERMUTATIONS:
            value = value.transpose(_PERMUTATIONS[entry.kind])
        flat[entry.path] = np.array(value, order="C")
    return config, _nest(flat)


def _match(
    state_dict: Mapping[str, Any], decoder_num_heads: int | None, source: str
) -> tuple[SamConfig, dict[str, tuple[str, ...]], dict[str, Any]]:
    """The configuration, our path -> the names it is made of, and the tensors by those names; all checked."""
    tensors = _strip_prefix(state_dict, source)
    hugging_face = any(name.startswith(("vision_encoder.", _HF_POSITIONS[1])) for name in tensors)
    statistics: dict[str, tuple[float, ...]] = {
        name: _statistic(name, tensors.pop(name), source) for name in ("pixel_mean", "pixel_std") if name in tensors
    }
    if hugging_face:
        _merge_tied(tensors, source)

    entries = _table(_count(tensors, hugging_face))
    names = {entry.path: entry.hugging_face if hugging_face else entry.official for entry in entries}
    _check_names([name for group in names.values() for name in group], tensors, source)

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
        shapes[entry.path] = tuple(joined[i] for i in _PERMUTATIONS.get(entry.kind, range(len(joined))))
    config = _infer(shapes, decoder_num_heads, source, statistics)

    wrong = []
    for entry in _table(_Dims.from_config(config)):
        for name in names[entry.path]:
            if np.shape(tensors[name]) != entry.official_shape():
                wrong.append(f"{name} expected {entry.official_shape()}, got {np.shape(tensors[name])}")
    _check_shapes(wrong, source)
    return config, names, tensors


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
        return _match(tree, decoder_num_heads, "State dict")[0]
    flat = _flatten(tree)
    _check_tree_names(flat, "Parameter tree")
    config = _infer({k: np.shape(v) for k, v in flat.items()}, decoder_num_heads, "Parameter tree", {})
    _check_tree_shapes(config, flat, "Parameter tree")
    return config


def export_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The exact inverse of `convert`: Meta's names and layouts, for `segment_anything` in PyTorch.

    Args:
        params: our tree.

    Returns:
        name -> contiguous float32 array, in the order of our tree.

    Raises:
        ValueError: if the tree lacks parameters or has others.
    """
    flat = _flatten(params)
    result: dict[str, np.ndarray] = {}
    for entry in _check_tree_names(flat, "Parameter tree"):
        value = np.asarray(flat[entry.path], np.float32)
        if value.ndim != len(entry.shape):
            raise ValueError(
                f"Parameter tree has {entry.path} of shape {value.shape} where {len(entry.shape)} axes "
                "belong; pass the tree of one SAM."
            )
        if entry.kind in _PERMUTATIONS:
            value = value.transpose(np.argsort(_PERMUTATIONS[entry.kind]))
        for name, part in zip(entry.official, np.split(value, len(entry.official)), strict=True):
            result[name] = np.array(part, order="C")
    return result


def _strip_prefix(state_dict: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Drops what stands before `image_encoder.` (or its like) in most names."""
    pattern = re.compile(
        r"(.*?)(?:(?:image_encoder|vision_encoder|prompt_encoder|mask_decoder)\.|shared_image_embedding\.)"
    )
    found = Counter(match[1] for name in state_dict if (match := pattern.match(name)))
    if not found:
        listed = ", ".join(map(_shown, sorted(state_dict)[:3]))
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
                f"{source} holds {_shown(short)} twice, with and without the prefix {prefix!r}; keep one of them."
            )
        result[short] = value
    return result


def _merge_tied(tensors: dict[str, Any], source: str) -> None:
    """transformers saves the Fourier matrix under one or both of two names; keeps the first."""
    kept, other = _HF_POSITIONS
    if other not in tensors:
        return
    value = tensors.pop(other)
    if not np.array_equal(tensors.setdefault(kept, value), value):
        raise ValueError(f"{source} has different values in {kept} and {other}, which SAM shares; keep one.")


def _count(names: Iterable[str], hugging_face: bool) -> _Dims:
    """The four counts: the number of distinct indexes, so that an absurd index is just one "
    "unexpected name."""
    blocks = r"vision_encoder\.layers" if hugging_face else r"image_encoder\.blocks"
    patterns = (
        rf"{blocks}\.(\d+)\.",
        r"mask_decoder\.transformer\.layers\.(\d+)\.",
        r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.",
        r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.",
    )
    depth, decoder_depth, num_masks, iou_depth = _distinct(names, patterns)
    return _Dims(depth, decoder_depth, num_masks, iou_depth + 2 * hugging_face)  # proj_in and proj_out


def _count_tree(paths: Iterable[str]) -> _Dims:
    patterns = (
        r"image_encoder/blocks_(\d+)/",
        r"mask_decoder/transformer/layers_(\d+)/",
        r"mask_decoder/output_hypernetworks_mlps_(\d+)/",
        r"mask_decoder/iou_prediction_head/layers_(\d+)/",
    )
    depth, decoder_depth, num_masks, iou_depth = _distinct(paths, patterns)
    return _Dims(depth, decoder_depth, num_masks, iou_depth)


def _distinct(names: Iterable[str], patterns: tuple[str, ...]) -> list[int]:
    names = list(names)
    # At least one each: a model without any lacks them, and the error should say so.
    return [max(1, len({m[1] for name in names if (m := re.match(p, name))})) for p in patterns]


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
    counts = _count_tree(shapes)
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


def _statistic(name: str, value: Any, source: str) -> tuple[float, ...]:
    values = _as_float(name, value, source).reshape(-1)
    if values.size != 3 or (name == "pixel_std" and (values <= 0).any()):
        raise ValueError(f"{source} has {name} = {values[:4].tolist()}; three colour values belong there.")
    # The shortest decimal that is this float32: 123.675, not 123.67500305.
    return tuple(float(str(v)) for v in values)


def _as_float(name: str, value: Any, source: str, dtype: str = "float32") -> np.ndarray:
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


# ----------------------------------------------------------------------------------------------------- checks


def _check_names(expected: Iterable[str], got: Iterable[str], source: str) -> None:
    expected, got = set(expected), set(got)
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        raise ValueError(
            f"{source} does not hold the parameters of a SAM: {_listed(missing, 'missing')}; "
            f"{_listed(unexpected, 'unexpected')}; give a plain SAM checkpoint (no adapters, no other "
            "encoder)."
        )


def _check_shapes(wrong: list[str], source: str) -> None:
    if wrong:
        raise ValueError(
            f"{source} has shapes that do not fit together: {_listed(wrong, 'wrong', '; ')}; it is "
            "damaged, or mixes models."
        )


def _listed(names: list[str], what: str, separator: str = ", ") -> str:
    if not names:
        return f"none {what}"
    rest = len(names) - _MAX_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{len(names)} {what} ({separator.join(map(_shown, names[:_MAX_LISTED]))}{more})"


def _shown(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    name = name if len(name) <= 120 else name[:117] + "..."
    return name if name.isprintable() else ascii(name)


def _check_tree_names(flat: Mapping[str, Any], source: str) -> list[_Entry]:
    entries = _table(_count_tree(flat))
    _check_names((entry.path for entry in entries), flat, source)
    return entries


def _check_tree_shapes(config: SamConfig, flat: Mapping[str, Any], source: str) -> None:
    wrong = []
    for entry in _table(_Dims.from_config(config)):
        if np.shape(flat[entry.path]) != entry.shape:
            wrong.append(f"{entry.path} expected {entry.shape}, got {np.shape(flat[entry.path])}")
    _check_shapes(wrong, source)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(tree, ""))


def _nest(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


# ---------------------------------------------------------------------------------------------- our own files


def save_params(
    path: PathLike,
    config: SamConfig,
    params: Mapping[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a parameter tree and its configuration as one safetensors file, whole or not at all.

    The same arguments give the same bytes. Tensors are named by their path in the tree, joined by '/'; the
    metadata holds `format`, `version` and the configuration as JSON.

    Args:
        path: the file to write; an existing one is replaced.
        config: the configuration of `params`.
        params: our tree.
        dtype: type on disk; float16 halves the file and rounds the weights.

    Raises:
        ValueError: if the tree does not fit `config`, a value is not finite in `dtype`, or `path` is no place
            for a file.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"save_params cannot write {path}; give a file name in an existing directory.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"save_params got dtype={dtype!r}; use 'float32' or 'float16'.")
    flat = _flatten(params)
    source = f"Parameter tree for {path}"
    _check_names((entry.path for entry in _table(_Dims.from_config(config))), flat, source)
    _check_tree_shapes(config, flat, source)
    tensors = {k: np.ascontiguousarray(_as_float(k, v, source, dtype)) for k, v in sorted(flat.items())}
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict(), sort_keys=True)}
    data = _serialize(tensors, metadata)
    # The package writes metadata in random order; sorted, equal models are equal files.
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.write(memoryview(data)[8 + length :])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_params(path: PathLike) -> tuple[SamConfig, Params]:
    """Reads what `save_params` wrote.

    Args:
        path: the file.

    Returns:
        The configuration and the tree of float32 arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or its tensors do not fit its configuration.
    """
    path = Path(path)
    if _sniff(path) == "torch":
        raise ValueError(f"Checkpoint {path} was written by torch.save, not by save_params; use load_sam.")
    tensors, metadata = _read_safetensors(path)
    return _from_own(path, tensors, metadata)


def _from_own(path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[SamConfig, Params]:
    source = f"Checkpoint {path}"
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} was not written by save_params; use load_sam for other people's weights.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{source} is of format version {metadata.get('version')!r} and this package reads "
            f"{VERSION!r}; use the package version that wrote it."
        )
    config = parse_config(metadata.get("config", ""), source)
    counts = (config.depth, config.decoder_depth, config.num_multimask_outputs, config.iou_head_depth)
    if max(counts) > len(tensors):
        raise ValueError(f"{source} has a configuration of more layers than its {len(tensors)} tensors; save it again.")
    _check_names((entry.path for entry in _table(_Dims.from_config(config))), tensors, source)
    _check_tree_shapes(config, tensors, source)
    return config, _nest({k: _as_float(k, v, source) for k, v in tensors.items()})


def parse_config(text: str, source: str) -> SamConfig:
    """The configuration in a file's metadata, with its types checked: the file may come from anywhere.

    Raises:
        ValueError: if it is no configuration; the sentence starts with `source`.
    """
    remedy = "save it again with save_params"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{source} has no readable configuration in its metadata; {remedy}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} has a configuration that is not a JSON object; {remedy}.")
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        real = name in ("mlp_ratio", "mask_threshold", "pixel_mean", "pixel_std")
        listed = name in ("global_attn_indexes", "pixel_mean", "pixel_std")
        smallest = 0 if listed or name in ("window_size", "num_multimask_outputs") else 1
        sound = isinstance(value, list) == listed and all(
            -1e6 < item < 1e6 if real and type(item) is float else type(item) is int and abs(item) < 1 << 31
            for item in items
        )
        if (
            not sound
            or (not real and min(items, default=smallest) < smallest)
            or (name.startswith("pixel") and len(items) != 3)
        ):
            raise ValueError(f"{source} has {name[:40]} = {str(value)[:40]} in its configuration; {remedy}.")
    try:
        return SamConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source} has an unusable configuration: {error}") from None


def load_sam(path: PathLike, *, decoder_num_heads: int | None = None) -> "tuple[Sam, Params]":
    """Loads a Segment Anything model.

    Args:
        path: an official `.pth`, a `.safetensors` with Meta's or Hugging Face's names, a file by
            `save_params`, or "mini" for the model that ships. The content decides, not the extension.
        decoder_num_heads: heads of the mask decoder, for weights that are not ours and not a published SAM's.

    Returns:
        The Linen module, with its configuration, and its parameters as JAX arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, harmful, of another kind, or not a SAM; the sentence says which.
    """
    # Reading and converting weights needs NumPy only; JAX comes in here.
    import jax
    import jax.numpy as jnp

    from sam_flax.sam import Sam

    if path == "mini":
        path = MINI_WEIGHTS
        if not path.exists():
            raise FileNotFoundError(
                f"The packaged weights {path} are missing; reinstall the package or run experiments.train_mini."
            )
    path = Path(path)
    source = f"Checkpoint {path}"
    if _sniff(path) == "torch":
        config, params = _convert(read_torch_file(path), decoder_num_heads, source)
    else:
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == FORMAT:
            config, params = _from_own(path, tensors, metadata)
            if decoder_num_heads not in (None, config.decoder_num_heads):
                raise ValueError(
                    f"{source} was saved with decoder_num_heads={config.decoder_num_heads}, not "
                    f"{decoder_num_heads}; leave the argument out."
                )
        elif metadata.get("format") == "ahcptq_jax":
            raise ValueError(f"{source} is a quantized model; load it with ahcptq_jax.load.")
        else:
            config, params = _convert(tensors, decoder_num_heads, source)
    return Sam(config), jax.tree.map(jnp.asarray, params)
