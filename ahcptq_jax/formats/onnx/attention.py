"""Attention in a graph: on levels where all of its sites are quantized, else in floating point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ahcptq_jax.architectures.base import ATTENTION_SITES
from ahcptq_jax.formats.onnx.encoding import Coded, decode, encode, is_uniform, right_type, softmax_levels
from ahcptq_jax.formats.onnx.graph import FLOAT, INT8, UINT8, Graph, value
from ahcptq_jax.formats.onnx.layers import Context, linear, rescaled_product, rounded
from ahcptq_jax.formats.onnx.windows import Windows
from ahcptq_jax.quantizers.base import Quantizer
from sam_flax.config import SamConfig

Sites = Mapping[str, Quantizer]  # "q", "k", "v", "softmax" -> quantizer


@dataclasses.dataclass(frozen=True)
class Operand:
    """Queries, keys or values: levels with their quantizer, or float32 without one.

    Attributes:
        name: of the tensor.
        dtype: its type; levels are uint8, or int8 where they are the right factor of a product.
        quantizer: uniform, or None.
    """

    name: str
    dtype: int = FLOAT
    quantizer: Any = None

    @property
    def scale(self) -> float:
        return float(np.asarray(self.quantizer.scale).reshape(()))

    @property
    def zero(self) -> int:
        return int(np.asarray(self.quantizer.zero_point).reshape(())) - self.middle

    @property
    def middle(self) -> int:
        """What levels of 8 bits are less than their codes, to fit into int8."""
        return 128 if self.dtype == INT8 and self.quantizer.bits == 8 else 0

    def renamed(self, name: str) -> Operand:
        return dataclasses.replace(self, name=name)

    def right(self, graph: Graph) -> tuple[str, str]:
        """As the right factor of `MatMulInteger`, with the zero point."""
        return self.name, graph.constant(self.zero, np.int8 if self.dtype == INT8 else np.uint8)

    def values(self, graph: Graph) -> str:
        """float32 values."""
        return self.name if self.quantizer is None else decode(graph, Coded(self.name, self.zero, self.scale))


def operand_of_levels(context: Context, levels: str, quantizer: Any, right: bool) -> Operand:
    """An operand of uint8 levels, made int8 if it is to be the right factor of a product that takes such."""
    graph, dtype = context.graph, right_type(quantizer.bits, context.model.vnni) if right else UINT8
    if dtype == UINT8:
        return Operand(levels, dtype, quantizer)
    if quantizer.bits == 8:
        # The highest bit turned is 128 less, once the bits are read as int8.
        levels = graph.node("BitwiseXor", levels, graph.constant(128, np.uint8))
    return Operand(graph.node("Cast", levels, to=dtype), dtype, quantizer)


def sites_of(context: Context, path: str) -> Sites:
    """The quantized sites of an attention."""
    found = context.model.activations
    return {name: found[f"{path}/{name}"] for name in ATTENTION_SITES if f"{path}/{name}" in found}


def on_levels(context: Context, sites: Sites) -> bool:
    """Whether both products of an attention are products of levels."""
    return (
        not context.model.plain
        and len(sites) == len(ATTENTION_SITES)
        and all(is_uniform(sites[name]) for name in "qkv")
    )


def attend(
    context: Context,
    path: str,
    sites: Sites,
    q: Operand,
    k: Operand,
    v: Operand,
    width: int,
    add_biases: Callable[[Graph, str], str] | None = None,
) -> str:
    """Softmax attention.

    Args:
        context: where.
        path: of the attention.
        sites: its quantizers.
        q: (..., M, d).
        k: (..., d, N).
        v: (..., N, d).
        width: d.
        add_biases: adds what is added to scores (..., M, N).

    Returns:
        float32 (..., M, d).
    """
    graph, scale = context.graph, width**-0.5
    whole = on_levels(context, sites)
    if whole:
        queries = Coded(q.name, q.zero, q.scale)
        scores = rescaled_product(context, queries, k.right(graph), q.scale * k.scale * scale)
    else:
        queries_scaled = graph.node("Mul", q.values(graph), graph.constant(scale))
        scores = graph.node("MatMul", queries_scaled, k.values(graph))
    if add_biases is not None:
        scores = add_biases(graph, scores)
    if whole:
        probabilities = softmax_levels(graph, scores, sites["softmax"], f"{path}/softmax")
        return rescaled_product(context, probabilities, v.right(graph), probabilities.step * v.scale)
    if "softmax" in sites and not context.model.plain:
        weights = decode(graph, softmax_levels(graph, scores, sites["softmax"], f"{path}/softmax"))
    else:
        weights = graph.node("Softmax", scores, axis=-1)
        if "softmax" in sites:
            weights = rounded(context, weights, sites["softmax"], f"{path}/softmax")
    return graph.node("MatMul", weights, v.values(graph))


# -------------------------------------------------------------------------------------------------- the encoder's


def encoder_attention(context: Context, config: SamConfig, x: str, path: str, window: int) -> str:
    """Self-attention of tokens (g*g, D) in rows of the grid, in windows or (window 0) all together -> (g*g, D)."""
    graph, sites = context.graph, sites_of(context, path)
    dim, heads = config.embed_dim, config.num_heads
    windows = Windows(config.grid, window or config.grid, heads, dim // heads)
    operands, fill = encoder_projections(context, x, path, sites, dim)
    q, k, v = operands_in_windows(context, operands, fill, windows)
    biases = _relative_biases(context, q.values(graph), path, windows)
    out = attend_in_parts(context, path, sites, (q, k, v), windows, windows.tokens, biases)
    return linear(context, windows.join(graph, out), f"{path}/proj")


def operands_in_windows(
    context: Context, operands: Sequence[Operand], fill: Callable[[int], str], windows: Windows
) -> tuple[Operand, Operand, Operand]:
    """What `encoder_projections` gives, as `attend` takes it: q and v (count, heads, N, d), k (count, heads, d, N)."""
    graph = context.graph
    q, k, v = (
        operand.renamed(graph.transpose(windows.cut(graph, operand.name, partial(fill, part)), *order))
        for part, (operand, order) in enumerate(zip(operands, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True))
    )
    return q, k, v


def encoder_projections(
    context: Context, x: str, path: str, sites: Sites, dim: int
) -> tuple[list[Operand], Callable[[int], str]]:
    """Queries, keys and values (g*g, D), and a function from their number to what padding becomes, (D,)."""
    graph, model = context.graph, context.model
    bias = np.asarray(model.params[f"{path}/qkv/bias"], np.float32).reshape(3, dim)
    if all(is_uniform(sites.get(name)) for name in "qkv") and not model.plain:
        # In units of each quantizer's step, so that one rounding serves all three.
        quantizers: list[Any] = [sites[name] for name in "qkv"]
        scales = np.array([float(np.asarray(q.scale).reshape(())) for q in quantizers])
        zeros = np.array([float(np.asarray(q.zero_point).reshape(())) for q in quantizers])
        inverse, shift = (np.repeat(a, dim).astype(np.float32) for a in (1 / scales, zeros))
        y = linear(context, x, f"{path}/qkv", inverse, shift)
        codes = graph.node("QuantizeLinear", y, graph.constant(1.0), graph.constant(0, np.uint8))
        most = [graph.constant(2**q.bits - 1, np.uint8) for q in quantizers]
        parts = graph.split(codes, -1, [dim] * 3)
        names = [
            graph.node("Min", part, limit, name=f"{path}/{site}/levels")
            for part, limit, site in zip(parts, most, "qkv", strict=True)
        ]

        whole = on_levels(context, sites)
        operands = [
            operand_of_levels(context, name, quantizer, right=whole and site != "q")
            for name, quantizer, site in zip(names, quantizers, "qkv", strict=True)
        ]

        def padding_codes(part: int) -> str:
            codes = np.clip(np.round(bias[part] / scales[part]) + zeros[part], 0, 2 ** quantizers[part].bits - 1)
            return graph.constant(codes - operands[part].middle, np.int8 if operands[part].dtype == INT8 else np.uint8)

        return operands, padding_codes

    parts = graph.split(linear(context, x, f"{path}/qkv"), -1, [dim] * 3)
    operands = []
    for part, site in zip(parts, "qkv", strict=True):
        if site in sites:
            part = rounded(context, part, sites[site], f"{path}/{site}")
        operands.append(Operand(part))

    def padding_values(part: int) -> str:
        value = graph.constant(bias[part])
        if "qkv"[part] in sites:
            value = rounded(context, value, sites["qkv"[part]], f"{path}/{'qkv'[part]}/padding")
        return value

    return operands, padding_values


def _relative_biases(context: Context, q: str, path: str, windows: Windows) -> tuple[str, str]:
    """Biases of queries (count, heads, tokens, width) on rows and columns: two of (count, heads, tokens, side)."""
    graph = context.graph
    count, heads, side = windows.count, windows.heads, windows.side
    index = graph.constant(np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1, np.int64)

    def positions(axis: str) -> str:  # (side, width, side)
        table = context.parameter(f"{path}/rel_pos_{axis}")
        return graph.transpose(graph.node("Gather", table, index, axis=0), 0, 2, 1)

    grid = graph.reshape(q, count, heads, side, side, windows.width)
    bias_h = graph.node("MatMul", grid, positions("h"))
    columns = graph.node("MatMul", graph.transpose(grid, 0, 1, 3, 2, 4), positions("w"))
    bias_w = graph.transpose(columns, 0, 1, 3, 2, 4)
    return graph.reshape(bias_h, count, heads, side * side, side), graph.reshape(bias_w, count, heads, side**2, side)


def attend_in_parts(
    context: Context,
    path: str,
    sites: Sites,
    operands: tuple[Operand, Operand, Operand],
    windows: Windows,
    rows: int,
    biases: tuple[str, str] | None = None,
) -> str:
    """`attend` for all windows, a part of them or of the queries at a time.

    Args:
        context: where.
        path: of the attention.
        sites: its quantizers.
        operands: from `operands_in_windows`; of queries there may be fewer than tokens.
        windows: of the keys.
        rows: queries of a window.
        biases: of queries on the rows and on the columns of a window, each (count, heads, rows, side).

    Returns:
        float32 (count, heads, rows, width).
    """
    graph = context.graph
    count, heads, width, keys, side = windows.count, windows.heads, windows.width, windows.tokens, windows.side
    axis, parts = divide(count, heads, rows, keys, context.model.part_bytes)
    some, queries = (count // parts, rows) if axis == 0 else (count, rows // parts)

    def attend_part(inner: Context, q: Operand, k: Operand, v: Operand, *biases: str) -> str:
        def add_biases(graph: Graph, scores: str) -> str:
            bias_h, bias_w = biases
            grid = graph.reshape(scores, some, heads, queries, side, side)
            grid = graph.node("Add", grid, graph.reshape(bias_h, some, heads, queries, side, 1))
            grid = graph.node("Add", grid, graph.reshape(bias_w, some, heads, queries, 1, side))
            return graph.reshape(grid, some, heads, queries, keys)

        return attend(inner, path, sites, q, k, v, width, add_biases if biases else None)

    if parts == 1:
        return attend_part(context, *operands, *(biases or ()))

    body, taken = Graph(graph), []

    def part_of(operand: Operand, height: int, columns: int) -> Operand:  # (count, heads, height, columns)
        part = (some, heads, height, columns) if axis == 0 else (count, heads, queries, columns)
        stacked = graph.reshape(operand.name, *part[:axis], parts, *part[axis:])
        entry = body.name("part")
        taken.append((stacked, value(entry, operand.dtype, part)))
        return operand.renamed(entry)

    q, k, v = operands
    q = part_of(q, rows, width)
    if axis == 0:
        k, v = part_of(k, width, keys), part_of(v, keys, width)
    parts_of_biases = [part_of(Operand(bias), rows, side).name for bias in biases or ()]
    given = attend_part(context.inside(body), q, k, v, *parts_of_biases)
    stacked = graph.scan(body, taken, value(given, FLOAT, (some, heads, queries, width)), axis)
    return graph.reshape(stacked, count, heads, rows, width)


def divide(count: int, heads: int, queries: int, keys: int, part_bytes: int) -> tuple[int, int]:
    """Along which axis, windows (0) or queries (2), and in how many parts attention maps are made.

    Args:
        count: windows.
        heads: of each.
        queries: of each.
        keys: of each.
        part_bytes: what a part may take in float32, unless one query takes more.
    """
    rows = max(1, part_bytes // (4 * heads * keys))  # queries of a window in a part
    if rows >= queries:
        windows = rows // queries
        return 0, next(n for n in range(1, count + 1) if count % n == 0 and count // n <= windows)
    return 2, next((n for n in range(1, queries + 1) if queries % n == 0 and count * (queries // n) <= rows), queries)


# -------------------------------------------------------------------------------------------------- the decoder's


def decoder_attention(context: Context, q: str, k: str, v: str, path: str) -> str:
    """`mask_decoder.Attention` of q (N, T, C), k and v (N, S, C) -> (N, T, C)."""
    graph, heads, sites = context.graph, context.model.config.decoder_num_heads, sites_of(context, path)
    weight, params = context.model.weights.get(f"{path}/q_proj"), context.model.params
    inner = int(weight.shape[-1] if weight is not None else params[f"{path}/q_proj/kernel"].shape[-1])

    def separate(x: str, site: str, *order: int) -> Operand:
        y = linear(context, x, f"{path}/{site}_proj")
        operand = Operand(y)
        if is_uniform(sites.get(site)) and on_levels(context, sites):
            coded = encode(graph, y, sites[site], f"{path}/{site}")
            operand = operand_of_levels(context, coded.levels, sites[site], right=site != "q")
        elif site in sites:
            operand = Operand(rounded(context, y, sites[site], f"{path}/{site}"))
        apart = graph.reshape(operand.name, 0, 0, heads, inner // heads)
        return operand.renamed(graph.transpose(apart, *order))

    operands = separate(q, "q", 0, 2, 1, 3), separate(k, "k", 0, 2, 3, 1), separate(v, "v", 0, 2, 1, 3)
    out = graph.transpose(attend(context, path, sites, *operands, inner // heads), 0, 2, 1, 3)
    return linear(context, graph.reshape(out, 0, 0, inner), f"{path}/out_proj")
