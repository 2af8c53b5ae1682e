"""The image encoder as a graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from ahcptq_jax.formats.onnx import graph as graphs
from ahcptq_jax.formats.onnx.attention import encoder_attention
from ahcptq_jax.formats.onnx.graph import Graph
from ahcptq_jax.formats.onnx.hiera import hiera
from ahcptq_jax.formats.onnx.layers import Context, Model, conv_3x3, layer_norm, linear, make_one, mlp_part
from ahcptq_jax.formats.onnx.tiny_vit import tiny_vit
from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.encoders.tiny_vit import MobileSamConfig


def feature_shapes(config: SegmenterConfig) -> dict[str, tuple[int, int, int, int]]:
    """Names and shapes (1, channels, side, side) of what an encoder gives and its decoder takes.

    SAM 2's are those of its own image predictor.
    """
    grid, channels = config.grid, config.out_chans
    if isinstance(config, Sam2Config):
        return {
            "image_embed": (1, channels, grid, grid),
            "high_res_feats_0": (1, channels // 8, 4 * grid, 4 * grid),
            "high_res_feats_1": (1, channels // 4, 2 * grid, 2 * grid),
        }
    return {"image_embeddings": (1, channels, grid, grid)}


def encoder_graph(model: Model) -> tuple[Graph, list[Any], list[Any]]:
    """Graph, inputs and outputs: `images` (1, 3, S, S), normalised and on the canvas, -> `feature_shapes`."""
    config, graph = model.config, Graph()
    size, shapes = config.img_size, feature_shapes(config)
    for name in ("images", *shapes):
        graph.name(name)
    context = Context(graph, model, make_one(graph, "images", 4))
    found = hiera(context, config, "images") if isinstance(config, Sam2Config) else (_sam(context, config, "images"),)
    for (name, (_, channels, side, _)), x in zip(shapes.items(), found, strict=True):
        x = graph.transpose(graph.reshape(x, 1, side, side, channels), 0, 3, 1, 2)
        graph.nodes.append(graphs.helper.make_node("Identity", [x], [name], name=name))
    return (
        graph,
        [graphs.value("images", graphs.FLOAT, (1, 3, size, size))],
        [graphs.value(name, graphs.FLOAT, shape) for name, shape in shapes.items()],
    )


def _sam(context: Context, config: SamConfig | MobileSamConfig, images: str) -> str:
    """`images` -> the embedding (g*g, C): one of two bodies, and the neck that both have."""
    x = tiny_vit(context, config, images) if isinstance(config, MobileSamConfig) else _vit(context, config, images)
    x = layer_norm(context, linear(context, x, "image_encoder/neck/conv1"), "image_encoder/neck/norm1")
    x = conv_3x3(context, x, "image_encoder/neck/conv2", config.grid)
    return layer_norm(context, x, "image_encoder/neck/norm2")


def _vit(context: Context, config: SamConfig, images: str) -> str:
    """`images` -> tokens (g*g, D), what the neck takes."""
    graph = context.graph
    x = _embed(context, config, images)
    for index in range(config.depth):
        path = f"image_encoder/blocks_{index}"
        normed = layer_norm(context, x, f"{path}/norm1")
        attended = encoder_attention(context, config, normed, f"{path}/attn", config.block_window(index))
        x = graph.node("Add", x, attended)
        x = mlp_part(context, x, path)
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
