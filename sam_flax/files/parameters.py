"""Every parameter of a SAM, under its three names.

One table, `parameter_table`, holds every parameter's path in our tree, its name in Meta's state dict
(segment_anything), its name in transformers' `SamModel`, how its axes are permuted, and its shape. Whatever reads,
checks or writes weights reads that table.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sam_flax.config import SamConfig, SegmenterConfig

Shape = tuple[int, ...]

# Official axes -> ours. conv: OIHW -> HWIO. deconv: (in, out, kh, kw) -> (kh, kw, in, out), not flipped:
# kernel[a, b] is what input pixel (i, j) adds to output pixel (2i + a, 2j + b).
PERMUTATIONS: dict[str, tuple[int, ...]] = {"linear": (1, 0), "conv": (2, 3, 1, 0), "deconv": (2, 3, 0, 1)}
PERMUTATIONS["positions"] = (0, 2, 3, 1)  # a table of positions, channels last
# transformers saves the Fourier matrix under one or both of these names.
HF_POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)


class Entry(NamedTuple):
    """One parameter under its three names."""

    path: str  # ours, '/'-joined
    official: tuple[str, ...]  # Meta's; several names are concatenated along axis 0
    hugging_face: tuple[str, ...]
    kind: str  # key of PERMUTATIONS, "same", or one of `assembly.ASSEMBLIES`
    shape: Shape  # in our layout
    heads: int = 1  # of the attention that a "qkv_by_head" belongs to

    def official_shape(self) -> Shape:
        """Shape of each tensor of an official file that this parameter is made of."""
        if self.kind in PERMUTATIONS:
            return tuple(self.shape[i] for i in np.argsort(PERMUTATIONS[self.kind]))
        return (self.shape[0] // len(self.official), *self.shape[1:])


class Dims(NamedTuple):
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
    def from_config(cls, config: SamConfig) -> "Dims":
        """All of them."""
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

    @classmethod
    def of_heads(cls, config: SegmenterConfig) -> "Dims":
        """Those of the prompt encoder and of the mask decoder, of any family."""
        return cls(
            depth=0,
            decoder_depth=config.decoder_depth,
            num_masks=config.num_multimask_outputs + 1,
            iou_depth=config.iou_head_depth,
            chans=config.out_chans,
            mask_chans=config.mask_in_chans,
            decoder_mlp=config.decoder_mlp_dim,
            iou_hidden=config.iou_head_hidden_dim,
        )

    @classmethod
    def from_names(cls, names: Iterable[str], hugging_face: bool) -> "Dims":
        """The four counts that the names of a state dict show."""
        counts = _distinct_indexes(
            names,
            r"vision_encoder\.layers\.(\d+)\." if hugging_face else r"image_encoder\.blocks\.(\d+)\.",
            r"mask_decoder\.transformer\.layers\.(\d+)\.",
            r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.",
            r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.",
        )
        return cls(*counts[:3], counts[3] + 2 * hugging_face)  # proj_in and proj_out

    @classmethod
    def from_paths(cls, paths: Iterable[str]) -> "Dims":
        """The four counts that the paths of our tree show."""
        return cls(
            *_distinct_indexes(
                paths,
                r"image_encoder/blocks_(\d+)/",
                r"mask_decoder/transformer/layers_(\d+)/",
                r"mask_decoder/output_hypernetworks_mlps_(\d+)/",
                r"mask_decoder/iou_prediction_head/layers_(\d+)/",
            )
        )


def _distinct_indexes(names: Iterable[str], *patterns: str) -> tuple[int, int, int, int]:
    """For each of four patterns the number of distinct indexes, so that an absurd index is one unexpected name."""
    names = list(names)
    # At least one each: a model without any lacks them, and the error should say so.
    first, second, third, fourth = (max(1, distinct(names, pattern)) for pattern in patterns)
    return first, second, third, fourth


def distinct(names: Iterable[str], pattern: str) -> int:
    """How many different first groups a pattern has at the start of names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})


def ratio(hidden: int, width: int) -> float:
    """The ratio that `int(width * ratio)` turns into `hidden`, rounding error or not."""
    value = hidden / width
    return value if int(width * value) == hidden else math.nextafter(value, math.inf)


def parameter_shapes(config: SamConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter of a model."""
    return {entry.path: entry.shape for entry in parameter_table(Dims.from_config(config))}


def parameter_table(d: Dims) -> list[Entry]:
    """Every parameter of the model with dimensions `d`; given the counts alone, shapes are right in rank only."""
    table = Table()
    _image_encoder(table, d)
    add_heads(table, d)
    return table.entries


def add_heads(table: "Table", d: Dims) -> None:
    """Adds every parameter of the prompt encoder and of the mask decoder."""
    _prompt_encoder(table, d)
    _mask_decoder(table, d)


class Table:
    """The entries of a model, added by the names of their layers: our path, Meta's and Hugging Face's name."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, path: str, official: str, hf: str, shape: Shape, kind: str = "same") -> None:
        self.entries.append(Entry(path, (official,), (hf,), kind, shape))

    def norm(self, path: str, official: str, hf: str, width: int) -> None:
        self.add(f"{path}/scale", f"{official}.weight", f"{hf}.weight", (width,))
        self.add(f"{path}/bias", f"{official}.bias", f"{hf}.bias", (width,))

    def layer(self, path: str, official: str, hf: str, kind: str, shape: Shape, bias: bool = True) -> None:
        self.add(f"{path}/kernel", f"{official}.weight", f"{hf}.weight", shape, kind)
        if bias:
            self.add(f"{path}/bias", f"{official}.bias", f"{hf}.bias", shape[-1:])

    def linear(self, path: str, official: str, hf: str, fan_in: int, fan_out: int) -> None:
        self.layer(path, official, hf, "linear", (fan_in, fan_out))

    def mlp(self, path: str, widths: list[int]) -> None:
        # Hugging Face names the first and the last layer apart and counts the ones between.
        dotted, last = path.replace("mlps_", "mlps.").replace("/", "."), len(widths) - 2
        for j, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            hf = "proj_in" if j == 0 else "proj_out" if j == last else f"layers.{j - 1}"
            self.linear(f"{path}/layers_{j}", f"{dotted}.layers.{j}", f"{dotted}.{hf}", fan_in, fan_out)

    def attention(self, path: str, width: int, inner: int) -> None:
        dotted = path.replace("layers_", "layers.").replace("/", ".")
        for name in ("q_proj", "k_proj", "v_proj"):
            self.linear(f"{path}/{name}", f"{dotted}.{name}", f"{dotted}.{name}", width, inner)
        self.linear(f"{path}/out_proj", f"{dotted}.out_proj", f"{dotted}.out_proj", inner, width)


def _image_encoder(table: Table, d: Dims) -> None:
    root, hf_root, c, width = "image_encoder", "vision_encoder", d.chans, d.width
    table.add(f"{root}/pos_embed", f"{root}.pos_embed", f"{hf_root}.pos_embed", (1, d.grid, d.grid, width))
    ours, meta, hf = f"{root}/patch_embed/proj", f"{root}.patch_embed.proj", f"{hf_root}.patch_embed.projection"
    table.layer(ours, meta, hf, "conv", (d.patch, d.patch, 3, width))
    for i, size in enumerate(d.sizes or (1,) * d.depth):
        ours, meta, hf = f"{root}/blocks_{i}", f"{root}.blocks.{i}", f"{hf_root}.layers.{i}"
        table.norm(f"{ours}/norm1", f"{meta}.norm1", f"{hf}.layer_norm1", width)
        for name in ("rel_pos_h", "rel_pos_w"):
            shape = (2 * size - 1, d.head_dim)
            table.add(f"{ours}/attn/{name}", f"{meta}.attn.{name}", f"{hf}.attn.{name}", shape)
        table.linear(f"{ours}/attn/qkv", f"{meta}.attn.qkv", f"{hf}.attn.qkv", width, 3 * width)
        table.linear(f"{ours}/attn/proj", f"{meta}.attn.proj", f"{hf}.attn.proj", width, width)
        table.norm(f"{ours}/norm2", f"{meta}.norm2", f"{hf}.layer_norm2", width)
        table.linear(f"{ours}/mlp/lin1", f"{meta}.mlp.lin1", f"{hf}.mlp.lin1", width, d.mlp)
        table.linear(f"{ours}/mlp/lin2", f"{meta}.mlp.lin2", f"{hf}.mlp.lin2", d.mlp, width)
    ours, meta, hf = f"{root}/neck", f"{root}.neck", f"{hf_root}.neck"
    table.layer(f"{ours}/conv1", f"{meta}.0", f"{hf}.conv1", "conv", (1, 1, width, c), bias=False)
    table.norm(f"{ours}/norm1", f"{meta}.1", f"{hf}.layer_norm1", c)
    table.layer(f"{ours}/conv2", f"{meta}.2", f"{hf}.conv2", "conv", (3, 3, c, c), bias=False)
    table.norm(f"{ours}/norm2", f"{meta}.3", f"{hf}.layer_norm2", c)


def _prompt_encoder(table: Table, d: Dims) -> None:
    root, c, m, half = "prompt_encoder", d.chans, d.mask_chans, d.mask_chans // 4
    gaussian = "positional_encoding_gaussian_matrix"
    table.add(f"{root}/pe_layer/{gaussian}", f"{root}.pe_layer.{gaussian}", HF_POSITIONS[0], (2, c // 2))
    table.entries.append(
        Entry(
            f"{root}/point_embeddings",
            tuple(f"{root}.point_embeddings.{i}.weight" for i in range(4)),
            tuple(f"{root}.point_embed.{i}.weight" for i in range(4)),
            "same",
            (4, c),
        )
    )
    for name in ("not_a_point_embed", "no_mask_embed"):
        table.add(f"{root}/{name}", f"{root}.{name}.weight", f"{root}.{name}.weight", (1, c))
    ours, meta, hf = f"{root}/mask_downscaling", f"{root}.mask_downscaling", f"{root}.mask_embed"
    table.layer(f"{ours}/conv1", f"{meta}.0", f"{hf}.conv1", "conv", (2, 2, 1, half))
    table.norm(f"{ours}/norm1", f"{meta}.1", f"{hf}.layer_norm1", half)
    table.layer(f"{ours}/conv2", f"{meta}.3", f"{hf}.conv2", "conv", (2, 2, half, m))
    table.norm(f"{ours}/norm2", f"{meta}.4", f"{hf}.layer_norm2", m)
    table.layer(f"{ours}/conv3", f"{meta}.6", f"{hf}.conv3", "conv", (1, 1, m, c))


def _mask_decoder(table: Table, d: Dims) -> None:
    root, c = "mask_decoder", d.chans
    for name, count in (("iou_token", 1), ("mask_tokens", d.num_masks)):
        table.add(f"{root}/{name}", f"{root}.{name}.weight", f"{root}.{name}.weight", (count, c))
    for i in range(d.decoder_depth):
        ours, meta = f"{root}/transformer/layers_{i}", f"{root}.transformer.layers.{i}"
        table.attention(f"{ours}/self_attn", c, c)
        table.attention(f"{ours}/cross_attn_token_to_image", c, c // 2)
        table.attention(f"{ours}/cross_attn_image_to_token", c, c // 2)
        for j in range(1, 5):
            table.norm(f"{ours}/norm{j}", f"{meta}.norm{j}", f"{meta}.layer_norm{j}", c)
        table.linear(f"{ours}/mlp/lin1", f"{meta}.mlp.lin1", f"{meta}.mlp.lin1", c, d.decoder_mlp)
        table.linear(f"{ours}/mlp/lin2", f"{meta}.mlp.lin2", f"{meta}.mlp.lin2", d.decoder_mlp, c)
    table.attention(f"{root}/transformer/final_attn_token_to_image", c, c // 2)
    meta = f"{root}.transformer"
    table.norm(f"{root}/transformer/norm_final_attn", f"{meta}.norm_final_attn", f"{meta}.layer_norm_final_attn", c)
    ours, meta = f"{root}/output_upscaling", f"{root}.output_upscaling"
    table.layer(f"{ours}/conv1", f"{meta}.0", f"{root}.upscale_conv1", "deconv", (2, 2, c, c // 4))
    table.norm(f"{ours}/norm1", f"{meta}.1", f"{root}.upscale_layer_norm", c // 4)
    table.layer(f"{ours}/conv2", f"{meta}.3", f"{root}.upscale_conv2", "deconv", (2, 2, c // 4, c // 8))
    for i in range(d.num_masks):
        table.mlp(f"{root}/output_hypernetworks_mlps_{i}", [c, c, c, c // 8])
    table.mlp(f"{root}/iou_prediction_head", [c] + [d.iou_hidden] * (d.iou_depth - 1) + [d.num_masks])
