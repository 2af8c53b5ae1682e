"""Layers in a graph: linear ones and convolutions on levels or in floating point, norms, and what they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ahcptq_jax.architectures.sites import flatten
from ahcptq_jax.formats.onnx.encoding import (
    Coded,
    check_plain,
    decode,
    encode,
    is_uniform,
    quantize_dequantize,
    right_type,
)
from ahcptq_jax.formats.onnx.graph import FLOAT, INT8, Graph
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight
from sam_flax.config import SamConfig
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.errors import InputError
from sam_flax.sam import SamModel


@dataclasses.dataclass(frozen=True)
class Model:
    """What a graph is made of.

    Attributes:
        config: of the model.
        params: path -> float32 parameter.
        weights: layer path -> packed weight.
        activations: site path -> quantizer; what is not on the integer grid counts as the nearest that is.
        part_bytes: attention maps larger than this, in bytes, are made in parts.
        plain: quantized tensors are rounded to values by `QuantizeLinear` and `DequantizeLinear`, and products are of
            floats; a compiler may make integers of them.
        vnni: 8-bit right factors of products are int8; see `encoding.right_type`.
    """

    config: SamConfig | MobileSamConfig | Sam2Config
    params: Mapping[str, Any]
    weights: Mapping[str, QuantizedWeight]
    activations: Mapping[str, Quantizer]
    part_bytes: int
    plain: bool = False
    vnni: bool = False

    @classmethod
    def of(cls, model: Quantized | SamModel, part_bytes: int, plain: bool = False, vnni: bool = False) -> Model:
        """The parts of a quantized model, or of one in floating point.

        Raises:
            InputError: if the model is of another family than SAM, MobileSAM and SAM 2, or has quantizers that `plain`
                cannot say.
        """
        config, params = model.config, flatten(model.params)
        if not isinstance(config, SamConfig | MobileSamConfig | Sam2Config):
            raise InputError(
                f"SAM, MobileSAM and SAM 2 are exported to ONNX, not models of the family {config.family!r}; use "
                "formats.stablehlo."
            )
        if isinstance(model, Quantized):
            if plain:
                check_plain(model.activations, {weight.bits for weight in model.weights.values()})
            return cls(config, params, model.weights, model.activations, part_bytes, plain, vnni)
        return cls(config, params, {}, {}, part_bytes)


@dataclasses.dataclass(frozen=True)
class Context:
    """A graph with the model that it is made of.

    Attributes:
        graph: nodes are added to it.
        model: see `Model`.
        one: a scalar of 1 that depends on an input, so that nothing can be computed from it beforehand. ONNX Runtime
            joins a product of integers with its rescale and bias only where the scale is a product that has not been
            folded: 0.7 of the time of a linear layer.
    """

    graph: Graph
    model: Model
    one: str

    def inside(self, body: Graph) -> Context:
        """The same for the body of a loop."""
        return dataclasses.replace(self, graph=body)

    def parameter(self, path: str) -> str:
        """A parameter by its path."""
        return self.graph.parameter(self.model.params[path], path)


def make_one(graph: Graph, x: str, rank: int) -> str:
    """The scalar `Context.one` from any float32 input of this rank."""
    first = graph.node("Slice", x, graph.shape(*[0] * rank), graph.shape(*[1] * rank))
    bound = graph.constant(1.0)
    return graph.node("Reshape", graph.node("Clip", first, bound, bound), graph.constant([], np.int64), name="one")


def layer_norm(context: Context, x: str, path: str, epsilon: float = 1e-6) -> str:
    """Normalised over the last axis."""
    scale, bias = context.parameter(f"{path}/scale"), context.parameter(f"{path}/bias")
    return context.graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def mlp_part(context: Context, x: str, path: str, epsilon: float = 1e-6) -> str:
    """The second half of an encoder's block, its residual included: tokens (..., D) -> (..., D)."""
    graph = context.graph
    hidden = linear(context, layer_norm(context, x, f"{path}/norm2", epsilon), f"{path}/mlp/lin1")
    return graph.node("Add", x, linear(context, graph.node("Gelu", hidden), f"{path}/mlp/lin2"))


# ------------------------------------------------------------------------------------------------------- products


def rescaled_product(context: Context, left: Coded, right: tuple[str, str], scale: Any, bias: Any = None) -> str:
    """float32 `scale * sum_k (left - zero) (right - zero) + bias`.

    Args:
        context: where.
        left: levels (..., M, K).
        right: levels (..., K, N) with their zero point, of one number or (N,).
        scale: a number or (N,).
        bias: (N,), or None.
    """
    graph = context.graph
    zero = graph.constant(left.zero, np.uint8)
    y = graph.node("MatMulInteger", left.levels, right[0], zero, right[1])
    # In this very form ONNX Runtime runs it all as one operation; see `Context.one`.
    y = graph.node("Mul", graph.node("Cast", y, to=FLOAT), graph.node("Mul", context.one, graph.constant(scale)))
    return y if bias is None else graph.node("Add", y, graph.constant(bias))


def weight_levels(context: Context, weight: QuantizedWeight, path: str) -> tuple[str, str]:
    """A kernel's codes (in, out) as the right factor of `MatMulInteger`, and their zero points (out,).

    Up to 4 bits they are kept in 4 bits and cast where they are used; wider ones are of `encoding.right_type`.
    """
    graph = context.graph
    codes = np.asarray(weight.codes()).reshape(-1, weight.shape[-1])
    zero = np.round(np.asarray(weight.zero_point)).astype(np.int16)
    if weight.bits <= 4:
        levels = graph.node("Cast", graph.four_bits(codes, f"{path}/codes"), to=INT8, name=f"{path}/kernel")
        return levels, graph.constant(zero, np.int8, f"{path}/zero")
    if right_type(weight.bits, context.model.vnni) == INT8:
        # Around zero, so that pairs of products fit in 16 bits.
        middle = 2 ** (weight.bits - 1)
        levels = graph.constant(codes.astype(np.int16) - middle, np.int8, f"{path}/codes")
        return levels, graph.constant(zero - middle, np.int8, f"{path}/zero")
    return graph.constant(codes, np.uint8, f"{path}/codes"), graph.constant(zero, np.uint8, f"{path}/zero")


def linear(context: Context, x: str, path: str, out_scale: Any = 1.0, out_shift: Any = 0.0) -> str:
    """`((x @ kernel) + bias) * out_scale + out_shift` for x (..., in), on levels where the layer is quantized.

    Args:
        context: where.
        x: float32, name.
        path: of the layer.
        out_scale, out_shift: numbers or (out,).
    """
    graph, model = context.graph, context.model
    out_bias = np.asarray(model.params.get(f"{path}/bias", 0.0), np.float32) * out_scale + out_shift
    quantizer, weight = model.activations.get(f"{path}/input"), model.weights.get(path)
    if quantizer is not None and weight is not None and not model.plain:
        coded = encode(graph, x, quantizer, f"{path}/input")
        return product_of_levels(context, coded, weight, path, out_scale, out_bias)
    if quantizer is not None:
        x = rounded(context, x, quantizer, f"{path}/input")
    y = graph.node("MatMul", x, float_kernel(context, path, out_scale))
    return graph.node("Add", y, graph.constant(out_bias, name=f"{path}/bias")) if out_bias.any() else y


def rounded(context: Context, x: str, quantizer: Quantizer, site: str) -> str:
    """The float32 values that a quantizer makes of `x`."""
    if context.model.plain:
        return quantize_dequantize(context.graph, x, quantizer, site)
    return decode(context.graph, encode(context.graph, x, quantizer, site))


def float_kernel(context: Context, path: str, out_scale: Any = 1.0) -> str:
    """A kernel (in, out) in floating point, times `out_scale`."""
    graph, weight = context.graph, context.model.weights.get(path)
    if weight is None:
        kernel = np.asarray(context.model.params[f"{path}/kernel"], np.float32)
        return graph.parameter(kernel.reshape(-1, kernel.shape[-1]) * np.float32(out_scale), f"{path}/kernel")
    scale = graph.constant(np.asarray(weight.scale, np.float32) * np.float32(out_scale))
    if weight.bits <= 4:
        codes = np.asarray(weight.codes()).reshape(-1, weight.shape[-1])
        zero = graph.four_bits(np.round(np.asarray(weight.zero_point)), f"{path}/zero")
        return graph.node("DequantizeLinear", graph.four_bits(codes, f"{path}/codes"), scale, zero, axis=1)
    levels, zero = weight_levels(context, weight, path)
    return graph.node("DequantizeLinear", levels, scale, zero, axis=1)


def product_of_levels(
    context: Context, coded: Coded, weight: QuantizedWeight, path: str, out_scale: Any, out_bias: Any
) -> str:
    """A quantized layer on the levels of its input; arguments as in `linear`."""
    scale = np.asarray(weight.scale, np.float32) * np.float32(1) * out_scale
    if coded.shifted:
        codes = np.asarray(weight.codes()).reshape(-1, weight.shape[-1]).astype(np.float64)
        centred = codes - np.asarray(weight.zero_point, np.float64)
        share = np.broadcast_to(np.asarray(coded.offset, np.float64), centred.shape[:1]) @ centred
        out_bias = (out_bias + share * scale).astype(np.float32)
    right = weight_levels(context, weight, path)
    bias = np.broadcast_to(np.asarray(out_bias, np.float32), scale.shape)
    return rescaled_product(context, coded, right, scale * np.float32(coded.step), bias if bias.any() else None)


def conv_3x3(context: Context, x: str, path: str, side: int) -> str:
    """A 3x3 convolution, zero-padded, without a bias, of tokens (side*side, in) in rows -> (side*side, out).

    As one product of the nine shifted copies of its input.
    """
    graph, model = context.graph, context.model
    quantizer, weight = model.activations.get(f"{path}/input"), model.weights.get(path)
    # The border is zero, which has a level.
    on_levels = is_uniform(quantizer) and weight is not None and not model.plain
    if quantizer is not None and on_levels:
        coded = encode(graph, x, quantizer, f"{path}/input")
        x, padding = coded.levels, graph.constant(coded.zero, np.uint8)
    else:
        if quantizer is not None:
            x = rounded(context, x, quantizer, f"{path}/input")
        padding = graph.constant(0.0)
    channels = int(weight.shape[2] if weight is not None else model.params[f"{path}/kernel"].shape[2])
    grid = graph.reshape(x, side, side, channels)
    padded = graph.node("Pad", grid, graph.shape(1, 1, 0, 1, 1, 0), padding)
    axes = graph.shape(0, 1)
    copies = [
        graph.node("Slice", padded, graph.shape(i, j), graph.shape(i + side, j + side), axes)
        for i in range(3)
        for j in range(3)
    ]
    copied = graph.reshape(graph.node("Concat", *copies, axis=-1), side * side, 9 * channels)
    if on_levels:
        assert weight is not None
        copied_levels = dataclasses.replace(coded, levels=copied)
        return product_of_levels(context, copied_levels, weight, path, 1.0, np.float32(0))
    return graph.node("MatMul", copied, float_kernel(context, path))
