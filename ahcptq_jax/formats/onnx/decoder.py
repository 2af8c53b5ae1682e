"""The prompt encoder and the mask decoder as one graph, with segment_anything's inputs and outputs.

Source of names, shapes and what they mean: segment_anything/utils/onnx.py and scripts/export_onnx_model.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ahcptq_jax.formats.onnx import graph as graphs
from ahcptq_jax.formats.onnx.attention import decoder_attention
from ahcptq_jax.formats.onnx.encoder import feature_shapes
from ahcptq_jax.formats.onnx.graph import FLOAT, INT64, Graph
from ahcptq_jax.formats.onnx.layers import Context, Model, float_kernel, layer_norm, linear, make_one

PROMPTS, POINTS = "num_prompts", "num_points"

Values = dict[str, tuple[str, tuple[int | str, ...]]]  # output -> its value in the graph, and its shape


def decoder_graph(model: Model, single_mask: bool) -> tuple[Graph, list[Any], list[Any]]:
    """Graph, inputs and outputs of the decoder of SAM and MobileSAM.

    | input | shape | |
    |---|---|---|
    | `image_embeddings` | (1, C, g, g) | |
    | `point_coords` | (N, P, 2) | x, y in pixels of the canvas |
    | `point_labels` | (N, P) | 1 object, 0 background, 2 and 3 corners of a box, -1 padding |
    | `mask_input` | (1 or N, 1, 4g, 4g) | logits of an earlier mask |
    | `has_mask_input` | (1,) | 1 or 0: whether `mask_input` counts |
    | `orig_im_size` | (2,) | height and width of the image |

    All of float32. Outputs: `masks` (N, M, height, width) logits, `iou_predictions` (N, M) and `low_res_masks`
    (N, M, 4g, 4g), with M all of the model's masks, or 1: the best by predicted quality, of the single-mask output for
    more than two points and of the others for less.
    """
    context, shapes = begin(model, ("masks", "iou_predictions", "low_res_masks"))
    graph, config = context.graph, model.config
    sparse, dense = embed_points(context), embed_masks(context)
    outputs, image = attended_tokens(context, ("iou_token", "mask_tokens"), "image_embeddings", sparse, dense)
    quality = mlp(context, outputs[0], "mask_decoder/iou_prediction_head", config.iou_head_depth)
    low_res = mask_logits(context, outputs[1:], _upscale(context, image))
    masks = config.num_multimask_outputs + 1
    if single_mask:
        low_res, quality = picked(graph, low_res, quality, _best(graph, quality, masks))
        masks = 1
    full = _to_image(context, low_res)
    return end(context, shapes, masks_of(context, full, quality, low_res, masks))


# ----------------------------------------------------------------------------------- what decoders of all families have


def begin(model: Model, outputs: Sequence[str]) -> tuple[Context, dict[str, tuple[int | str, ...]]]:
    """A graph whose inputs and outputs have their names, and the inputs' shapes, those of the features first."""
    side = model.config.mask_size
    features = feature_shapes(model.config)
    shapes: dict[str, tuple[int | str, ...]] = {
        **features,
        "point_coords": (PROMPTS, POINTS, 2),
        "point_labels": (PROMPTS, POINTS),
        "mask_input": ("num_masks", 1, side, side),
        "has_mask_input": (1,),
        "orig_im_size": (2,),
    }
    graph = Graph()
    for name in (*shapes, *outputs):
        graph.name(name)
    return Context(graph, model, make_one(graph, next(iter(features)), 4)), shapes


def masks_of(context: Context, full: str, quality: str, low_res: str, chosen: int) -> Values:
    """The outputs that segment_anything's export has, of `chosen` masks for each prompt."""
    side = context.model.config.mask_size
    return {
        "masks": (full, (PROMPTS, chosen, "height", "width")),
        "iou_predictions": (quality, (PROMPTS, chosen)),
        "low_res_masks": (low_res, (PROMPTS, chosen, side, side)),
    }


def end(
    context: Context, shapes: dict[str, tuple[int | str, ...]], outputs: Values
) -> tuple[Graph, list[Any], list[Any]]:
    """The finished graph with its inputs and outputs."""
    for name, (found, _) in outputs.items():
        context.graph.nodes.append(graphs.helper.make_node("Identity", [found], [name], name=name))
    return (
        context.graph,
        [graphs.value(name, FLOAT, shape) for name, shape in shapes.items()],
        [graphs.value(name, FLOAT, shape) for name, (_, shape) in outputs.items()],
    )


# ------------------------------------------------------------------------------------------------------- prompts


def _positions(context: Context, coords: str) -> str:
    """Random Fourier features of coordinates in 0..1: (..., 2) -> (..., C)."""
    graph = context.graph
    matrix = context.parameter("prompt_encoder/pe_layer/positional_encoding_gaussian_matrix")
    centred = graph.node("Sub", graph.node("Mul", coords, graph.constant(2.0)), graph.constant(1.0))
    angles = graph.node("Mul", graph.node("MatMul", centred, matrix), graph.constant(2 * math.pi))
    return graph.node("Concat", graph.node("Sin", angles), graph.node("Cos", angles), axis=-1)


def embed_points(context: Context) -> str:
    """Points to (N, P, C)."""
    graph, config = context.graph, context.model.config
    centres = graph.node("Add", "point_coords", graph.constant(0.5))
    places = _positions(context, graph.node("Div", centres, graph.constant(float(config.img_size))))
    labels = graph.node("Unsqueeze", "point_labels", graph.shape(-1))

    def are(label: float) -> str:
        return graph.node("Cast", graph.node("Equal", labels, graph.constant(label)), to=FLOAT)

    padding = are(-1.0)
    points = graph.node("Mul", places, graph.node("Sub", graph.constant(1.0), padding))
    kinds = np.asarray(context.model.params["prompt_encoder/point_embeddings"], np.float32)
    nothing = np.asarray(context.model.params["prompt_encoder/not_a_point_embed"], np.float32).reshape(-1)
    for chosen, embedding in [(padding, nothing), *((are(float(i)), row) for i, row in enumerate(kinds))]:
        points = graph.node("Add", points, graph.node("Mul", chosen, graph.constant(embedding)))
    return points


def embed_masks(context: Context) -> str:
    """The mask prompt, or what stands for none, to (1 or N, g*g, C)."""
    graph, config = context.graph, context.model.config
    path, hidden = "prompt_encoder/mask_downscaling", config.mask_in_chans
    x = graph.reshape("mask_input", -1, config.mask_size, config.mask_size, 1)
    for number, side, channels in ((1, 2 * config.grid, 1), (2, config.grid, hidden // 4)):
        patches = graph.transpose(graph.reshape(x, -1, side, 2, side, 2, channels), 0, 1, 3, 2, 4, 5)
        patches = graph.reshape(patches, -1, side, side, 4 * channels)
        x = layer_norm(context, _product(context, patches, f"{path}/conv{number}"), f"{path}/norm{number}")
        x = graph.node("Gelu", x)
    x = _product(context, x, f"{path}/conv3")
    x = graph.reshape(x, -1, config.grid**2, config.out_chans)
    without = graph.node("Sub", graph.constant(1.0), "has_mask_input")
    nothing = np.asarray(context.model.params["prompt_encoder/no_mask_embed"], np.float32).reshape(-1)
    return graph.node(
        "Add", graph.node("Mul", x, "has_mask_input"), graph.node("Mul", graph.constant(nothing), without)
    )


def _product(context: Context, x: str, path: str) -> str:
    """`x @ kernel + bias` in floating point."""
    y = context.graph.node("MatMul", x, float_kernel(context, path))
    return context.graph.node("Add", y, context.parameter(f"{path}/bias"))


def _dense_positions(context: Context) -> str:
    """Positions of the tokens of the embedding, (1, g*g, C)."""
    graph, grid = context.graph, context.model.config.grid
    centres = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    shape = graph.shape(grid, grid, 1)
    xs = graph.node("Expand", graph.constant(centres.reshape(1, -1, 1)), shape)
    ys = graph.node("Expand", graph.constant(centres.reshape(-1, 1, 1)), shape)
    places = _positions(context, graph.node("Concat", xs, ys, axis=-1))
    return graph.reshape(places, 1, grid * grid, context.model.config.out_chans)


# --------------------------------------------------------------------------------------------------- the decoder


def attended_tokens(
    context: Context, own: Sequence[str], embedding: str, sparse: str, dense: str
) -> tuple[list[str], str]:
    """What the two-way transformer makes of a model's own tokens and of the image.

    Args:
        context: where.
        own: names of the parameters that are the tokens before those of the prompts, in their order.
        embedding: the input (1, C, g, g).
        sparse: (N, P, C).
        dense: (1 or N, g*g, C).

    Returns:
        Every one of the own tokens (N, C), and the image's (N, g*g, C).
    """
    graph, config, params = context.graph, context.model.config, context.model.params
    channels, grid = config.out_chans, config.grid
    count = graph.node("Shape", "point_coords", start=0, end=1)

    def for_all(x: str, rows: int) -> str:  # (1, rows, C) -> (N, rows, C)
        return graph.node("Expand", x, graph.node("Concat", count, graph.shape(rows, channels), axis=0))

    outputs = np.concatenate([np.asarray(params[f"mask_decoder/{name}"], np.float32) for name in own])
    tokens = graph.node("Concat", for_all(graph.constant(outputs[None]), len(outputs)), sparse, axis=1)
    image = graph.transpose(graph.reshape(embedding, 1, channels, grid * grid), 0, 2, 1)
    image = for_all(graph.node("Add", image, dense), grid * grid)
    tokens, image = _transformer(context, image, _dense_positions(context), tokens)
    return [graph.node("Gather", tokens, graph.constant(i, np.int64), axis=1) for i in range(len(outputs))], image


def mask_logits(context: Context, tokens: Sequence[str], upscaled: str) -> str:
    """Logits (N, masks, 4g, 4g) of a token (N, C) for each mask and mask features (N, 16*g*g, C/8)."""
    graph, path, side = context.graph, "mask_decoder/output_hypernetworks_mlps", context.model.config.mask_size
    filters = [
        graph.node("Unsqueeze", mlp(context, token, f"{path}_{i}", 3), graph.shape(1)) for i, token in enumerate(tokens)
    ]
    logits = graph.node("MatMul", graph.node("Concat", *filters, axis=1), graph.transpose(upscaled, 0, 2, 1))
    return graph.reshape(logits, -1, len(tokens), side, side)


def _transformer(context: Context, image: str, positions: str, tokens: str) -> tuple[str, str]:
    """The two-way transformer: tokens (N, T, C) and image (N, g*g, C)."""
    graph, path = context.graph, "mask_decoder/transformer"

    def add(a: str, b: str) -> str:
        return graph.node("Add", a, b)

    queries, keys = tokens, image
    for index in range(context.model.config.decoder_depth):
        layer = f"{path}/layers_{index}"
        if index == 0:
            queries = decoder_attention(context, queries, queries, queries, f"{layer}/self_attn")
        else:
            placed = add(queries, tokens)
            queries = add(queries, decoder_attention(context, placed, placed, queries, f"{layer}/self_attn"))
        queries = layer_norm(context, queries, f"{layer}/norm1", 1e-5)
        placed_keys = add(keys, positions)
        attended = decoder_attention(
            context, add(queries, tokens), placed_keys, keys, f"{layer}/cross_attn_token_to_image"
        )
        queries = layer_norm(context, add(queries, attended), f"{layer}/norm2", 1e-5)
        hidden = graph.node("Relu", linear(context, queries, f"{layer}/mlp/lin1"))
        queries = layer_norm(
            context, add(queries, linear(context, hidden, f"{layer}/mlp/lin2")), f"{layer}/norm3", 1e-5
        )
        attended = decoder_attention(
            context, placed_keys, add(queries, tokens), queries, f"{layer}/cross_attn_image_to_token"
        )
        keys = layer_norm(context, add(keys, attended), f"{layer}/norm4", 1e-5)
    attended = decoder_attention(
        context, add(queries, tokens), add(keys, positions), keys, f"{path}/final_attn_token_to_image"
    )
    return layer_norm(context, add(queries, attended), f"{path}/norm_final_attn", 1e-5), keys


def _upscale(context: Context, image: str) -> str:
    """Image tokens (N, g*g, C) -> mask features (N, 16*g*g, C/8)."""
    graph, config = context.graph, context.model.config
    path = "mask_decoder/output_upscaling"
    x = up_convolution(context, image, f"{path}/conv1", config.grid, config.out_chans // 4)
    x = graph.node("Gelu", layer_norm(context, x, f"{path}/norm1"))
    return graph.node("Gelu", up_convolution(context, x, f"{path}/conv2", 2 * config.grid, config.out_chans // 8))


def up_convolution(context: Context, x: str, path: str, side: int, features: int) -> str:
    """Transposed convolution with stride 2 of (N, side*side, in) -> (N, 4*side*side, features)."""
    graph, params = context.graph, context.model.params
    kernel = np.asarray(params[f"{path}/kernel"], np.float32)  # (2, 2, in, out)
    flat = kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    x = graph.node("MatMul", x, graph.parameter(flat, f"{path}/kernel"))
    x = graph.transpose(graph.reshape(x, -1, side, side, 2, 2, features), 0, 1, 3, 2, 4, 5)
    return graph.node("Add", graph.reshape(x, -1, 4 * side * side, features), context.parameter(f"{path}/bias"))


def mlp(context: Context, x: str, path: str, layers: int) -> str:
    """Linears with ReLU between."""
    for index in range(layers):
        x = linear(context, x, f"{path}/layers_{index}")
        if index < layers - 1:
            x = context.graph.node("Relu", x)
    return x


# --------------------------------------------------------------------------------------------------------- masks


def picked(graph: Graph, logits: str, quality: str, which: str) -> tuple[str, str]:
    """The one mask of each prompt whose number is `which` (N, 1), and its quality."""
    chosen = graph.node("GatherND", logits, which, batch_dims=1)
    return graph.node("Unsqueeze", chosen, graph.shape(1)), graph.node("GatherElements", quality, which, axis=1)


def resized(graph: Graph, x: str, height_and_width: str) -> str:
    """Logits (N, M, height, width) at another size."""
    sizes = graph.node("Concat", graph.node("Shape", x, start=0, end=2), height_and_width, axis=0)
    return graph.node("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel")


def _best(graph: Graph, quality: str, masks: int) -> str:
    """Number of the mask with the best predicted quality, of those that the number of points asks for: (N, 1)."""
    points = graph.node("Cast", graph.node("Shape", "point_coords", start=1, end=2), to=FLOAT)
    first = np.zeros((1, masks), np.float32)
    first[0, 0] = 1000.0
    favour = graph.node("Mul", graph.node("Sub", points, graph.constant(2.5)), graph.constant(first))
    return graph.node("ArgMax", graph.node("Add", quality, favour), axis=1, keepdims=1)


def _to_image(context: Context, logits: str) -> str:
    """Logits (N, M, 4g, 4g) at the size of the image: up to the canvas, cut to the image, to its size."""
    graph, size = context.graph, context.model.config.img_size

    canvas = resized(graph, logits, graph.shape(size, size))
    longest = graph.node("ReduceMax", "orig_im_size", keepdims=0)
    scaled = graph.node("Mul", "orig_im_size", graph.node("Div", graph.constant(float(size)), longest))
    inside = graph.node("Cast", graph.node("Floor", graph.node("Add", scaled, graph.constant(0.5))), to=INT64)
    # A very thin image still has one row or column.
    inside = graph.node("Max", inside, graph.constant(1, np.int64))
    cut = graph.node("Slice", canvas, graph.shape(0, 0), inside, graph.shape(2, 3))
    return resized(graph, cut, graph.node("Cast", "orig_im_size", to=INT64))
