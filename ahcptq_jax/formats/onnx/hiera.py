"""SAM 2's image encoder as a graph: Hiera, whose grids are halved three times, and its pyramid neck.

Grids are tokens (H*W, C) in rows, as linears take them.
"""

from __future__ import annotations

import numpy as np

from ahcptq_jax.formats.onnx.attention import attend_in_parts, encoder_projections, operands_in_windows, sites_of
from ahcptq_jax.formats.onnx.graph import Graph
from ahcptq_jax.formats.onnx.layers import Context, layer_norm, linear, mlp_part
from ahcptq_jax.formats.onnx.windows import Windows
from sam_flax.encoders.hiera import PATCH_KERNEL, PATCH_STRIDE, Sam2Config, cubic_matrix, make_block

_PREFIX = "image_encoder"


def hiera(context: Context, config: Sam2Config, images: str) -> tuple[str, str, str]:
    """`images` (1, 3, S, S) -> `encoders.hiera.Features` as tokens: (g*g, C), (16*g*g, C/8), (4*g*g, C/4)."""
    x, side, levels = _embed(context, config, images), config.img_size // PATCH_STRIDE, []
    ends = np.cumsum(config.depths)
    for index in range(sum(config.depths)):
        block, path = make_block(config, index), f"{_PREFIX}/blocks_{index}"
        windows = Windows(side, block.window or side, block.num_heads, block.features // block.num_heads)
        x = mlp_part(context, _attention_part(context, x, path, windows, block.pool, block.dim), path)
        side //= 2 if block.pool else 1
        if index + 1 in ends:
            levels.append(x)
    return _neck(context, levels, side)


def _embed(context: Context, config: Sam2Config, images: str) -> str:
    """Tokens of four pixels with their positions: a small table stretched over the grid, and one for each window."""
    graph, params, path = context.graph, context.model.params, f"{_PREFIX}/patch_embed"
    grid, dim, small = config.img_size // PATCH_STRIDE, config.embed_dim, config.background_size
    kernel = np.asarray(params[f"{path}/proj/kernel"]).transpose(3, 2, 0, 1)
    pads = [PATCH_KERNEL // 2] * 4
    x = graph.node(
        "Conv", images, graph.parameter(kernel, path), context.parameter(f"{path}/bias"),
        pads=pads, strides=[PATCH_STRIDE] * 2,
    )  # fmt: skip
    x = graph.transpose(x, 0, 2, 3, 1)
    stretch = graph.constant(cubic_matrix(grid, small), name=f"{path}/stretch")
    table = graph.parameter(np.asarray(params[f"{path}/pos_embed"]).reshape(small, small * dim), f"{path}/pos_embed")
    rows = graph.reshape(graph.node("MatMul", stretch, table), grid, small, dim)
    x = graph.node("Add", x, graph.node("MatMul", stretch, rows))
    times = grid // config.window_sizes[0]
    tiled = graph.node("Tile", context.parameter(f"{path}/pos_embed_window"), graph.shape(1, times, times, 1))
    return graph.reshape(graph.node("Add", x, tiled), grid * grid, dim)


def _attention_part(context: Context, x: str, path: str, windows: Windows, pool: bool, dim: int) -> str:
    """The first half of a block, its residual included: (H*W, dim) -> (H'*W', features)."""
    graph = context.graph
    normed = layer_norm(context, x, f"{path}/norm1")
    if dim != windows.features:
        x = linear(context, normed, f"{path}/proj")
        x = _pooled(graph, x, windows.grid, windows.features) if pool else x
    return graph.node("Add", x, _attention(context, normed, f"{path}/attn", windows, pool))


def _attention(context: Context, x: str, path: str, windows: Windows, pool: bool) -> str:
    """Self-attention in windows; with `pool` every four queries are one. (H*W, dim) -> (H'*W', features)."""
    graph, sites = context.graph, sites_of(context, path)
    operands, fill = encoder_projections(context, x, path, sites, windows.features)
    q, k, v = operands_in_windows(context, operands, fill, windows)
    asked = windows
    if pool:
        # Rounding keeps the order of values, so that the largest level is the level of the largest value.
        asked = Windows(windows.grid // 2, windows.side // 2, windows.heads, windows.width)
        one = _pooled(graph, q.name, windows.side, windows.width, windows.count * windows.heads)
        q = q.renamed(graph.reshape(one, windows.count, windows.heads, asked.tokens, windows.width))
    out = attend_in_parts(context, path, sites, (q, k, v), windows, asked.tokens)
    return linear(context, asked.join(graph, out), f"{path}/proj")


def _pooled(graph: Graph, x: str, side: int, channels: int, count: int = 1) -> str:
    """The largest of every four neighbours of `count` grids of side*side tokens -> (count*side*side/4, channels)."""
    half = side // 2
    pairs = graph.split(graph.reshape(x, count * half, 2, half, 2, channels), 1, [1, 1])
    pairs = graph.split(graph.node("Max", *pairs), 3, [1, 1])
    return graph.reshape(graph.node("Max", *pairs), count * half * half, channels)


def _neck(context: Context, levels: list[str], last_side: int) -> tuple[str, str, str]:
    """All levels at the decoder's width; the third has the fourth added to it, the first two are made narrower."""
    graph, path = context.graph, f"{_PREFIX}/neck"
    first, second, third, fourth = (linear(context, x, f"{path}/convs_{i}") for i, x in enumerate(levels))
    channels = context.model.config.out_chans
    apart = graph.reshape(fourth, last_side, 1, last_side, 1, channels)
    copied = graph.node("Expand", apart, graph.shape(last_side, 2, last_side, 2, channels))
    upsampled = graph.reshape(copied, 4 * last_side**2, channels)
    embedding = graph.node("Add", graph.node("Add", third, upsampled), context.parameter(f"{path}/no_mem_embed"))
    quarter, eighth = (linear(context, x, f"{path}/high_res_{i}") for i, x in enumerate((first, second)))
    return embedding, quarter, eighth
