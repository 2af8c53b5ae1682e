"""MobileSAM's checkpoints: every parameter under its two names, and the configuration that shapes imply."""

import re
from typing import Any

from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.files.assembly import Shapes
from sam_flax.files.parameters import Dims, Entry, Table, add_heads, distinct, ratio

# What tells the family.
ANCHOR = "image_encoder.patch_embed.seq.0.c.weight"
# The classifier that TinyViT was trained with, counters, and what is computed from the table of biases.
UNUSED = r"image_encoder\.(norm_head|head)\..*|.*\.num_batches_tracked|.*\.attn\.(ab|attention_bias_idxs)"
# Widths whose merge keeps the grid (PatchMerging).
UNMERGED = (320, 448, 576)
IMG_SIZE = 1024  # no shape shows it, and the official code takes no other


def table(config: MobileSamConfig) -> list[Entry]:
    """Every parameter of a MobileSAM."""
    result = Table()
    root, c = "image_encoder", config
    half = c.embed_dims[0] // 2
    _conv_norm(result, f"{root}/patch_embed/conv1", f"{root}.patch_embed.seq.0", (3, 3, 3, half))
    _conv_norm(result, f"{root}/patch_embed/conv2", f"{root}.patch_embed.seq.2", (3, 3, half, 2 * half))
    first = 0
    for layer, (dim, depth) in enumerate(zip(c.embed_dims, c.depths, strict=True)):
        for i in range(depth):
            ours, meta = f"{root}/blocks_{first + i}", f"{root}.layers.{layer}.blocks.{i}"
            if layer == 0:
                _expanded(result, ours, meta, dim, int(dim * c.expand_ratio), dim)
            else:
                _attention_block(result, ours, meta, config, layer)
        first += depth
        if layer + 1 < len(c.depths):
            width = c.embed_dims[layer + 1]
            meta = f"{root}.layers.{layer}.downsample"
            _expanded(result, f"{root}/merges_{layer}", meta, dim, width, width)
    ours, meta, width = f"{root}/neck", f"{root}.neck", c.embed_dims[-1]
    result.layer(f"{ours}/conv1", f"{meta}.0", "", "conv", (1, 1, width, c.out_chans), bias=False)
    result.norm(f"{ours}/norm1", f"{meta}.1", "", c.out_chans)
    result.layer(f"{ours}/conv2", f"{meta}.2", "", "conv", (3, 3, c.out_chans, c.out_chans), bias=False)
    result.norm(f"{ours}/norm2", f"{meta}.3", "", c.out_chans)
    add_heads(result, Dims.of_heads(config))
    return result.entries


def _conv_norm(result: Table, ours: str, meta: str, shape: tuple[int, ...]) -> None:
    """A convolution and what is left of its batch norm."""
    result.add(f"{ours}/conv/kernel", f"{meta}.c.weight", "", shape, "conv")
    weight, bias, mean, variance = (f"{meta}.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var"))
    width = shape[-1:]
    result.entries.append(Entry(f"{ours}/norm/scale", (weight, variance), (), "norm_scale", width))
    result.entries.append(Entry(f"{ours}/norm/bias", (bias, mean, weight, variance), (), "norm_offset", width))


def _expanded(result: Table, ours: str, meta: str, dim: int, hidden: int, width: int) -> None:
    """The three convolutions of a convolutional block or of a merge."""
    _conv_norm(result, f"{ours}/conv1", f"{meta}.conv1", (1, 1, dim, hidden))
    _conv_norm(result, f"{ours}/conv2", f"{meta}.conv2", (3, 3, 1, hidden))
    _conv_norm(result, f"{ours}/conv3", f"{meta}.conv3", (1, 1, hidden, width))


def _attention_block(result: Table, ours: str, meta: str, config: MobileSamConfig, layer: int) -> None:
    dim, heads, window = config.embed_dims[layer], config.num_heads[layer - 1], config.window_sizes[layer - 1]
    hidden, kernel = int(dim * config.mlp_ratio), config.local_kernel
    result.norm(f"{ours}/norm1", f"{meta}.attn.norm", "", dim)
    result.add(f"{ours}/attn/attention_biases", f"{meta}.attn.attention_biases", "", (heads, window**2))
    for name, shape in (("kernel", (dim, 3 * dim)), ("bias", (3 * dim,))):
        official = f"{meta}.attn.qkv.{'weight' if name == 'kernel' else 'bias'}"
        result.entries.append(Entry(f"{ours}/attn/qkv/{name}", (official,), (), "qkv_by_head", shape, heads))
    result.linear(f"{ours}/attn/proj", f"{meta}.attn.proj", "", dim, dim)
    _conv_norm(result, f"{ours}/local_conv", f"{meta}.local_conv", (kernel, kernel, 1, dim))
    result.norm(f"{ours}/norm2", f"{meta}.mlp.norm", "", dim)
    result.linear(f"{ours}/mlp/lin1", f"{meta}.mlp.fc1", "", dim, hidden)
    result.linear(f"{ours}/mlp/lin2", f"{meta}.mlp.fc2", "", hidden, dim)


def infer(shapes: Shapes, heads: dict[str, Any]) -> MobileSamConfig:
    """The configuration that names and shapes imply.

    Args:
        shapes: of all tensors by their official names.
        heads: fields of the configuration that belong to the prompt encoder and the decoder.

    Raises:
        ValueError: if they imply none.
    """
    root = "image_encoder.layers"
    layers = distinct(shapes, root.replace(".", r"\.") + r"\.(\d+)\.")
    depths = tuple(distinct(shapes, rf"image_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(layers))
    hidden, first = (shapes.size(f"{root}.0.blocks.0.conv1.c.weight", axis) for axis in (0, 1))
    blocks = [f"{root}.{i}.blocks.0" for i in range(1, layers)]
    dims = (first, *(shapes.size(f"{block}.attn.norm.weight", 0) for block in blocks))
    biases = [f"{block}.attn.attention_biases" for block in blocks]
    strides = tuple(1 if width in UNMERGED else 2 for width in dims[1:])
    patch = 4
    for stride in strides:
        patch *= stride
    return MobileSamConfig(
        img_size=IMG_SIZE,
        patch_size=patch,
        embed_dims=dims,
        depths=depths,
        num_heads=tuple(shapes.size(name, 0) for name in biases),
        window_sizes=tuple(round(shapes.size(name, 1) ** 0.5) for name in biases),
        merge_strides=strides,
        mlp_ratio=ratio(shapes.size(f"{blocks[0]}.mlp.fc1.weight", 0), dims[1]) if blocks else 4.0,
        expand_ratio=ratio(hidden, first),
        local_kernel=shapes.size(f"{blocks[0]}.local_conv.c.weight", 3) if blocks else 3,
        **heads,
    )


def used(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model as it is used."""
    return re.fullmatch(UNUSED, name) is None
