"""SAM 2's checkpoints: every parameter under its three names, and which published model shapes imply."""

import dataclasses
import re
from typing import Any

from sam_flax.encoders.hiera import LEVELS, PATCH_KERNEL, SAM2_CONFIGS, Sam2Config
from sam_flax.errors import InputError
from sam_flax.files.assembly import Shapes
from sam_flax.files.parameters import Dims, Entry, Table, add_heads, distinct

# What tells the family, under Meta's and Hugging Face's names.
ANCHOR, HF_ANCHOR = "image_encoder.trunk.pos_embed_window", "vision_encoder.backbone.pos_embed_window"
# The memory of earlier frames, which images have none of.
_MEMORY = re.compile(
    r"(memory_attention|memory_encoder|obj_ptr_proj|obj_ptr_tpos_proj|mask_downsample)\..*|maskmem_tpos_enc|no_mem_pos_enc"
    r"|no_obj_ptr|no_obj_embed_spatial"
)
_HF_MEMORY = re.compile(
    r"(memory_|mask_downsample|object_pointer_proj|temporal_positional_encoding_projection_layer).*"
    r"|no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter"
)
# SAM's names of the heads -> SAM 2's.
_META_NAMES = (
    (r"^prompt_encoder", "sam_prompt_encoder"),
    (r"^mask_decoder", "sam_mask_decoder"),
    (r"(transformer\.layers\.\d+\.mlp)\.lin1", r"\1.layers.0"),
    (r"(transformer\.layers\.\d+\.mlp)\.lin2", r"\1.layers.1"),
)
_HF_NAMES = (
    (r"\.out_proj\.", ".o_proj."),
    (r"(transformer\.layers\.\d+\.mlp)\.lin1", r"\1.proj_in"),
    (r"(transformer\.layers\.\d+\.mlp)\.lin2", r"\1.proj_out"),
    (r"point_embed\.\d\.weight", "point_embed.weight"),
)


def used(name: str) -> bool:
    """Whether a tensor of Meta's belongs to the model as it is used on images."""
    return _MEMORY.fullmatch(name) is None


def hf_used(name: str) -> bool:
    """Whether a tensor of Hugging Face's belongs to the model as it is used on images."""
    return _HF_MEMORY.fullmatch(name) is None


def table(config: Sam2Config) -> list[Entry]:
    """Every parameter of a SAM 2 on images."""
    encoder = Table()
    _encoder(encoder, config)
    heads, c = Table(), config.out_chans
    add_heads(heads, Dims.of_heads(config))
    token = "mask_decoder.obj_score_token.weight"
    heads.add("mask_decoder/obj_score_token", token, token, (1, c))
    heads.mlp("mask_decoder/pred_obj_score_head", [c, c, c, 1])
    return encoder.entries + [_renamed(entry) for entry in heads.entries]


def _renamed(entry: Entry) -> Entry:
    def by(rules: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[str, ...]:
        result = []
        for name in names:
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            result.append(name)
        return tuple(dict.fromkeys(result))  # what are four embeddings there is one table here

    return entry._replace(official=by(_META_NAMES, entry.official), hugging_face=by(_HF_NAMES, entry.hugging_face))


def _encoder(result: Table, config: Sam2Config) -> None:
    root, meta, hf = "image_encoder", "image_encoder.trunk", "vision_encoder.backbone"
    width, window, side = config.embed_dim, config.window_sizes[0], config.background_size
    ours, proj, projection = f"{root}/patch_embed", f"{meta}.patch_embed.proj", f"{hf}.patch_embed.projection"
    shape = (PATCH_KERNEL, PATCH_KERNEL, 3, width)
    result.add(f"{ours}/proj/kernel", f"{proj}.weight", f"{projection}.weight", shape, "conv")
    result.add(f"{ours}/bias", f"{proj}.bias", f"{projection}.bias", (width,))
    for name, length in (("pos_embed", side), ("pos_embed_window", window)):
        result.add(f"{ours}/{name}", f"{meta}.{name}", f"{hf}.{name}", (1, length, length, width), "positions")
    firsts = config.first_blocks()
    for i in range(sum(config.depths)):
        stage = sum(first <= i for first in firsts) - 1
        features, before = config.width(stage), config.width(stage - (i in firsts[1:]))
        _block(result, f"{root}/blocks_{i}", f"{meta}.blocks.{i}", f"{hf}.blocks.{i}", before, features, config)
    c = config.out_chans
    for level in range(LEVELS):
        # The official neck counts its convolutions from the coarsest level.
        official, ours = f"neck.convs.{LEVELS - 1 - level}", f"{root}/neck/convs_{level}"
        _pointwise(result, ours, f"image_encoder.{official}.conv", f"vision_encoder.{official}", config.width(level), c)
    for level, features in enumerate((c // 8, c // 4)):
        name = f"mask_decoder.conv_s{level}"
        _pointwise(result, f"{root}/neck/high_res_{level}", f"sam_{name}", name, c, features)
    result.add(f"{root}/neck/no_mem_embed", "no_mem_embed", "no_memory_embedding", (c,), "reshaped")


def _block(result: Table, ours: str, meta: str, hf: str, before: int, features: int, config: Sam2Config) -> None:
    hidden = int(features * config.mlp_ratio)
    result.norm(f"{ours}/norm1", f"{meta}.norm1", f"{hf}.layer_norm1", before)
    result.linear(f"{ours}/attn/qkv", f"{meta}.attn.qkv", f"{hf}.attn.qkv", before, 3 * features)
    result.linear(f"{ours}/attn/proj", f"{meta}.attn.proj", f"{hf}.attn.proj", features, features)
    result.norm(f"{ours}/norm2", f"{meta}.norm2", f"{hf}.layer_norm2", features)
    result.linear(f"{ours}/mlp/lin1", f"{meta}.mlp.layers.0", f"{hf}.mlp.proj_in", features, hidden)
    result.linear(f"{ours}/mlp/lin2", f"{meta}.mlp.layers.1", f"{hf}.mlp.proj_out", hidden, features)
    if before != features:
        result.linear(f"{ours}/proj", f"{meta}.proj", f"{hf}.proj", before, features)


def _pointwise(result: Table, ours: str, meta: str, hf: str, fan_in: int, fan_out: int) -> None:
    """A 1x1 convolution, which is a linear layer here."""
    result.add(f"{ours}/kernel", f"{meta}.weight", f"{hf}.weight", (fan_in, fan_out), "pointwise")
    result.add(f"{ours}/bias", f"{meta}.bias", f"{hf}.bias", (fan_out,))


def infer(shapes: Shapes, hugging_face: bool, heads: dict[str, Any]) -> Sam2Config:
    """The published configuration that names and shapes imply; those of windows and of global blocks show in neither.

    Args:
        shapes: of all tensors by their names.
        hugging_face: whose names these are.
        heads: fields of the configuration that belong to the prompt encoder and the decoder.

    Raises:
        InputError: if it is none of the published models.
    """
    root = "vision_encoder.backbone" if hugging_face else "image_encoder.trunk"
    norm = "layer_norm2" if hugging_face else "norm2"
    count = distinct(shapes, root.replace(".", r"\.") + r"\.blocks\.(\d+)\.")
    widths = [shapes.size(f"{root}.blocks.{i}.{norm}.weight", 0) for i in range(count)]
    depths = tuple(widths.count(width) for width in sorted(set(widths)))
    side = shapes.size(f"{root}.pos_embed", 2)
    for config in SAM2_CONFIGS.values():
        if (config.embed_dim, config.depths, config.background_size) == (widths[0], depths, side):
            return dataclasses.replace(config, **heads)
    raise InputError(
        f"{shapes.source} is a SAM 2 whose encoder begins {widths[0] if widths else 0} channels wide and has {depths} "
        f"blocks, which is none of the published sizes ({', '.join(SAM2_CONFIGS)}): its names and shapes do not show "
        "heads, windows and global blocks; give config=Sam2Config(...)."
    )
