"""SAM 2's prompt encoder and mask decoder as one graph, with the names of its own image predictor.

Source of what the inputs and outputs mean: sam2/sam2_image_predictor.py and modeling/sam/mask_decoder.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ahcptq_jax.formats.onnx import decoder
from ahcptq_jax.formats.onnx.graph import FLOAT, INT64, Graph
from ahcptq_jax.formats.onnx.layers import Context, Model, layer_norm
from sam_flax.encoders.hiera import Sam2Config


def sam2_decoder_graph(model: Model, single_mask: bool) -> tuple[Graph, list[Any], list[Any]]:
    """Graph, inputs and outputs.

    Inputs are `image_embed` (1, C, g, g), `high_res_feats_0` (1, C/8, 4g, 4g) and `high_res_feats_1` (1, C/4, 2g, 2g),
    and what follows them in `decoder.decoder_graph`, with coordinates in pixels of the canvas to which an image is
    stretched. The point of padding that SAM 2 adds to points and boxes is added here.

    Outputs as there, with `object_score_logits` (N, 1): below 0 the object is hidden, or there is none. `single_mask`
    gives the single-mask output where it is stable, elsewhere the best of the others by predicted quality.
    `low_res_masks` are cut to -32 to 32.
    """
    config = model.config
    assert isinstance(config, Sam2Config)
    context, shapes = decoder.begin(model, ("masks", "iou_predictions", "low_res_masks", "object_score_logits"))
    graph = context.graph
    own = ("obj_score_token", "iou_token", "mask_tokens")
    sparse, dense = _embed_points(context), decoder.embed_masks(context)
    outputs, image = decoder.attended_tokens(context, own, "image_embed", sparse, dense)
    quality = decoder.mlp(context, outputs[1], "mask_decoder/iou_prediction_head", config.iou_head_depth)
    quality = graph.node("Sigmoid", quality)
    score = decoder.mlp(context, outputs[0], "mask_decoder/pred_obj_score_head", 3)
    low_res = decoder.mask_logits(context, outputs[2:], _upscale(context, image))
    masks = config.num_multimask_outputs + 1
    if single_mask:
        low_res, quality = decoder.picked(graph, low_res, quality, _stable_or_best(context, config, low_res, quality))
        masks = 1
    full = decoder.resized(graph, low_res, graph.node("Cast", "orig_im_size", to=INT64))
    if config.logit_limit is not None:
        limits = (graph.constant(-config.logit_limit), graph.constant(config.logit_limit))
        low_res = graph.node("Clip", low_res, *limits)
    found = decoder.masks_of(context, full, quality, low_res, masks)
    return decoder.end(context, shapes, {**found, "object_score_logits": (score, (decoder.PROMPTS, 1))})


def _embed_points(context: Context) -> str:
    """Points and one of padding, (N, P + 1, C)."""
    graph, points = context.graph, decoder.embed_points(context)
    padding = np.asarray(context.model.params["prompt_encoder/not_a_point_embed"], np.float32).reshape(1, 1, -1)
    count = graph.node("Shape", "point_coords", start=0, end=1)
    shape = graph.node("Concat", count, graph.shape(1, padding.size), axis=0)
    return graph.node("Concat", points, graph.node("Expand", graph.constant(padding), shape), axis=1)


def _upscale(context: Context, image: str) -> str:
    """Image tokens (N, g*g, C) -> mask features (N, 16*g*g, C/8), with the encoder's features at both resolutions."""
    graph, config, path = context.graph, context.model.config, "mask_decoder/output_upscaling"
    grid, channels = config.grid, config.out_chans

    def tokens(name: str, side: int, channels: int) -> str:
        return graph.transpose(graph.reshape(name, 1, channels, side * side), 0, 2, 1)

    x = decoder.up_convolution(context, image, f"{path}/conv1", grid, channels // 4)
    x = graph.node("Add", x, tokens("high_res_feats_1", 2 * grid, channels // 4))
    x = graph.node("Gelu", layer_norm(context, x, f"{path}/norm1"))
    x = decoder.up_convolution(context, x, f"{path}/conv2", 2 * grid, channels // 8)
    return graph.node("Gelu", graph.node("Add", x, tokens("high_res_feats_0", 4 * grid, channels // 8)))


def _stable_or_best(context: Context, config: Sam2Config, logits: str, quality: str) -> str:
    """Number of the mask that `sam2_heads.single_mask` gives for each prompt: (N, 1)."""
    graph = context.graph
    first = graph.node("Slice", logits, graph.shape(0), graph.shape(1), graph.shape(1))

    def area(cut: float) -> str:  # (N, 1)
        above = graph.node("Cast", graph.node("Greater", first, graph.constant(cut)), to=FLOAT)
        return graph.node("ReduceSum", above, graph.shape(2, 3), keepdims=0)

    inner, outer = area(config.stability_delta), area(-config.stability_delta)
    empty = graph.node("Cast", graph.node("Equal", outer, graph.constant(0.0)), to=FLOAT)  # counts as stable
    overlap = graph.node("Div", graph.node("Add", inner, empty), graph.node("Max", outer, graph.constant(1.0)))
    unstable = graph.node("Cast", graph.node("Less", overlap, graph.constant(config.stability_threshold)), to=INT64)
    others = graph.node("Slice", quality, graph.shape(1), graph.shape(config.num_multimask_outputs + 1), graph.shape(1))
    best = graph.node("Add", graph.node("ArgMax", others, axis=1, keepdims=1), graph.constant(1, np.int64))
    return graph.node("Mul", unstable, best)
