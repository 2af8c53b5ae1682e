"""MobileSAM's image encoder as a graph.

Images and grids are tokens (H*W, C) in rows, as linears take them. Linears and convolutions of one pixel are products
on levels; strided and depthwise convolutions are `Conv` of the values that their levels and codes stand for.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ahcptq_jax.formats.onnx.attention import attend, encoder_projections, operands_in_windows, sites_of
from ahcptq_jax.formats.onnx.graph import Graph
from ahcptq_jax.formats.onnx.layers import Context, float_kernel, layer_norm, linear, mlp_part, rounded
from ahcptq_jax.formats.onnx.windows import Windows
from sam_flax.encoders.tiny_vit import MobileSamConfig, bias_indexes


def tiny_vit(context: Context, config: MobileSamConfig, images: str) -> str:
    """`images` (1, 3, S, S) -> tokens (g*g, D), what the neck takes."""
    graph, prefix = context.graph, "image_encoder"
    side = config.img_size
    x = graph.reshape(graph.transpose(images, 0, 2, 3, 1), side * side, 3)
    x = _conv_norm(context, x, f"{prefix}/patch_embed/conv1", side, 2)
    x = _conv_norm(context, graph.node("Gelu", x), f"{prefix}/patch_embed/conv2", side // 2, 2)
    block = 0
    for layer, depth in enumerate(config.depths):
        side = config.layer_grid(layer)
        for _ in range(depth):
            path = f"{prefix}/blocks_{block}"
            x = _conv_block(context, x, path, side) if layer == 0 else _attention_block(context, config, x, path, layer)
            block += 1
        if layer + 1 < len(config.depths):
            x = _three_convs(context, x, f"{prefix}/merges_{layer}", side, config.merge_strides[layer])
    return x


def _three_convs(context: Context, x: str, path: str, side: int, stride: int) -> str:
    graph = context.graph
    x = graph.node("Gelu", _conv_norm(context, x, f"{path}/conv1", side))
    x = graph.node("Gelu", _conv_norm(context, x, f"{path}/conv2", side, stride))
    return _conv_norm(context, x, f"{path}/conv3", -(-side // stride))


def _conv_block(context: Context, x: str, path: str, side: int) -> str:
    return context.graph.node("Gelu", context.graph.node("Add", x, _three_convs(context, x, path, side, 1)))


def _attention_block(context: Context, config: MobileSamConfig, x: str, path: str, layer: int) -> str:
    side, graph = config.layer_grid(layer), context.graph
    x = graph.node("Add", x, _attention(context, config, x, path, layer))
    x = _conv_norm(context, x, f"{path}/local_conv", side)
    return mlp_part(context, x, path, 1e-5)


def _attention(context: Context, config: MobileSamConfig, x: str, block: str, layer: int) -> str:
    """Attention in windows of tokens (H*W, D), the norm before it included -> (H*W, D)."""
    graph, path = context.graph, f"{block}/attn"
    grid, dim, heads = config.layer_grid(layer), config.embed_dims[layer], config.num_heads[layer - 1]
    windows = Windows(grid, config.window_sizes[layer - 1], heads, dim // heads)
    whole = windows.rows * windows.side
    if whole > grid:
        # Zeros stand before the norm, which makes its offset of them.
        x = graph.node("Pad", graph.reshape(x, grid, grid, dim), graph.shape(0, 0, 0, whole - grid, whole - grid, 0))
        x = graph.reshape(x, whole * whole, dim)
    x = layer_norm(context, x, f"{block}/norm1", 1e-5)
    sites = sites_of(context, path)
    operands, fill = encoder_projections(context, x, path, sites, dim)
    padded = dataclasses.replace(windows, grid=whole)
    q, k, v = operands_in_windows(context, operands, fill, padded)
    table = np.asarray(context.model.params[f"{path}/attention_biases"])[:, bias_indexes(windows.side)]
    bias = graph.parameter(table, f"{path}/biases")
    out = attend(context, path, sites, q, k, v, windows.width, lambda inner, scores: inner.node("Add", scores, bias))
    return linear(context, windows.join(graph, out), f"{path}/proj")


def _conv_norm(context: Context, x: str, path: str, side: int, stride: int = 1) -> str:
    """A convolution and its batch norm, of tokens (side*side, in) -> (rows*rows, out)."""
    graph, params = context.graph, context.model.params
    x = _conv(context, x, f"{path}/conv", side, stride)
    scale, bias = (np.asarray(params[f"{path}/norm/{name}"], np.float32) for name in ("scale", "bias"))
    if (scale != 1).any():
        x = graph.node("Mul", x, context.parameter(f"{path}/norm/scale"))
    return graph.node("Add", x, graph.parameter(bias, f"{path}/norm/bias"))


def _conv(context: Context, x: str, path: str, side: int, stride: int) -> str:
    graph, model = context.graph, context.model
    weight = model.weights.get(path)
    kernel = weight.shape if weight is not None else np.shape(model.params[f"{path}/kernel"])
    size, _, inner, out = (int(n) for n in kernel)
    if size == 1 and stride == 1:
        return linear(context, x, path)
    quantizer = model.activations.get(f"{path}/input")
    if quantizer is not None:
        x = rounded(context, x, quantizer, f"{path}/input")
    channels = out if inner == 1 else inner  # one input channel for each output: every channel by itself
    image = graph.reshape(graph.transpose(graph.reshape(x, side, side, channels), 2, 0, 1), 1, channels, side, side)
    taps = _as_taps(graph, float_kernel(context, path), size, inner, out)
    image = graph.node("Conv", image, taps, pads=[size // 2] * 4, strides=[stride] * 2, group=out if inner == 1 else 1)
    rows = -(-side // stride)
    return graph.reshape(graph.transpose(image, 0, 2, 3, 1), rows * rows, out)


def _as_taps(graph: Graph, kernel: str, size: int, inner: int, out: int) -> str:
    """A kernel (size*size*in, out) as `Conv` takes it, (out, in, size, size)."""
    return graph.transpose(graph.reshape(kernel, size, size, inner, out), 3, 2, 0, 1)
