"""The image encoder as a graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from ahcptq_jax.formats.onnx import graph as graphs
from ahcptq_jax.formats.onnx.attention import encoder_attention
from ahcptq_jax.formats.onnx.graph import Graph
from ahcptq_jax.formats.onnx.layers import Context, Model, conv_3x3, layer_norm, linear, make_one
from ahcptq_jax.formats.onnx.tiny_vit import tiny_vit
from sam_flax.config import SamConfig
from sam_flax.encoders.tiny_vit import MobileSamConfig


def encoder_graph(model: Model) -> tuple[Graph, list[Any], list[Any]]:
    """Graph, inputs and outputs: `images` (1, 3, S, S), normalised and padded -> `image_embeddings` (1, C, g, g)."""
    config, graph = model.config, Graph()
    size, grid = config.img_size, config.grid
    images, embeddings = graph.name("images"), graph.name("image_embeddings")
    context = Context(graph, model, make_one(graph, images, 4))

    x = tiny_vit(context, config, images) if isinstance(config, MobileSamConfig) else _vit(context, config, images)
    x = layer_norm(context, linear(context, x, "image_encoder/neck/conv1"), "image_encoder/neck/norm1")
    x = layer_norm(context, conv_3x3(context, x, "image_encoder/neck/conv2", grid), "image_encoder/neck/norm2")
    x = graph.transpose(graph.reshape(x, 1, grid, grid, config.out_chans), 0, 3, 1, 2)
    graph.nodes.append(graphs.helper.make_node("Identity", [x], [embeddings], name=embeddings))
    return (
        graph,
        [graphs.value(images, graphs.FLOAT, (1, 3, size, size))],
        [graphs.value(embeddings, graphs.FLOAT, (1, config.out_chans, grid, grid))],
    )


def _vit(context: Context, config: SamConfig, images: str) -> str:
    """`images` -> tokens (g*g, D), what the neck takes."""
    graph = context.graph
    x = _embed(context, config, images)
    for index in range(config.depth):
        path = f"image_encoder/blocks_{index}"
        normed = layer_norm(context, x, f"{path}/norm1")
        attended = encoder_attention(context, config, normed, f"{path}/attn", config.block_window(index))
        x = graph.node("Add", x, attended)
        hidden = linear(context, layer_norm(context, x, f"{path}/norm2"), f"{path}/mlp/lin1")
        x = graph.node("Add", x, linear(context, graph.node("Gelu", hidden), f"{path}/mlp/lin2"))
    return x


def _embed(context: Context, config: SamConfig, images: str) -> str:
    """Tokens (g*g, D) of the patches with their positions."""
    graph, params = context.graph, context.model.params
    grid, patch, dim = config.grid, config.patch_size, config.embed_dim
    x = graph.transpose(graph.reshape(images, 3, grid, patch, grid, patch), 1, 3, 2, 4, 0)
    kernel = np.asarray(params["image_encoder/patch_embed/proj/kernel"]).reshape(-1, dim)
    x = graph.node("MatMul", graph.reshape(x, grid * grid, patch * patch * 3), graph.parameter(kernel, "patch_embed"))
    x = graph.node("Add", x, context.parameter("image_encoder/patch_embed/proj/bias"))
    positions = np.asarray(params["image_encoder/pos_embed"]).reshape(grid * grid, dim)
    return graph.node("Add", x, graph.parameter(positions, "pos_embed"))
