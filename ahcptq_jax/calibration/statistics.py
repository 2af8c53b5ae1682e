"""The statistics of one quantized site: what its kind keeps of a batch, and the quantizer that comes of it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Grouped, Quantizer, Uniform, searches
from ahcptq_jax.quantizers.searches import grouping
from ahcptq_jax.quantizers.searches import percentile as percentiles
from ahcptq_jax.recipe import Kind
from sam_flax.encoders.vit import attention_probabilities
from sam_flax.sam import Params

# Of `hluq_fine`.
FINE_RANGE_RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
FINE_GRID_RATES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8)


def draw_rows(available: int, rows: int, key: jax.Array) -> jax.Array | None:
    """`rows` of `available` rows (rows,), in order; None if that is all of them, or `rows` is 0."""
    if not 0 < rows < available:
        return None
    return jnp.sort(jax.random.choice(key, available, (rows,), replace=False))


def draws_queries(kind: Kind, config: QuantConfig) -> bool:
    """Whether a softmax's statistics are of drawn queries. A plain minimum and maximum leaves none out."""
    return kind != "uniform" or config.act_range != "minmax"


def attention_map(operands: tuple[jax.Array, ...], rows: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities and values of an attention, for at most `rows` queries drawn by `key` (0: all).

    Args:
        operands: what the `operands` site sees: (q, k, v) of the decoder with q (N, heads, T, d), or
            (q, k, v, bias_h, bias_w) of the encoder with q (G, T, d).

    Returns:
        (..., M, T) probabilities, (..., T, d) values.
    """
    q, k, v, *biases = operands
    picked = draw_rows(q.shape[-2], rows, key)
    if picked is not None:
        q, biases = q[..., picked, :], [b[..., picked, :] for b in biases]
    if biases:
        return attention_probabilities(q, k, *biases), v
    return nn.softmax(q @ jnp.swapaxes(k, -1, -2)), v


def _kernel_of(params: Params, layer: str) -> jax.Array:
    node: Any = params
    for name in layer.split("/"):
        node = node[name]
    return node["kernel"]


def breakpoints(config: QuantConfig) -> np.ndarray:
    """HLUQ's candidates (N, 2), see `searches.hybrid_candidates`: the paper's, or a finer grid that has them."""
    if not config.hluq_fine:
        return searches.hybrid_candidates(config.a_bits)
    return searches.hybrid_candidates(config.a_bits, FINE_RANGE_RATES, FINE_GRID_RATES)


def _update_uniform(state: Any, x: jax.Array, config: QuantConfig) -> Any:
    if config.act_range == "percentile":
        return percentiles.percentile_update(state, x, config.a_bits)
    if config.act_range == "mse":
        return searches.uniform_mse_update(state, x, config.a_bits)
    return searches.range_update(state, x)


def init_statistics(kind: Kind, shape: tuple[int, ...], config: QuantConfig) -> Any:
    """Statistics of a site of this kind and shape before the first batch."""
    if kind == "hybrid":
        return searches.hybrid_init(breakpoints(config))
    if kind == "log2":
        return searches.softmax_init()
    if kind == "uniform" and config.act_range == "percentile":
        return percentiles.percentile_init()
    return searches.range_init(shape[-1] if kind == "grouped" else None)


def update_statistics(
    state: Any, path: str, kind: Kind, captured: Mapping[str, Any], params: Params, key: jax.Array, config: QuantConfig
) -> Any:
    """Adds a batch to the statistics of a site; `captured` holds what the sites saw, by path."""
    bits = config.a_bits
    if path.endswith("/softmax"):
        operands = captured[path.removesuffix("softmax") + "operands"]
        rows = config.softmax_rows if draws_queries(kind, config) else 0
        probabilities, values = attention_map(operands, rows, key)
        if kind == "log2":
            return searches.softmax_update(state, probabilities, values, 2**bits - 1)
        return _update_uniform(state, probabilities, config)
    x = captured[path]
    if kind == "hybrid":
        kernel = _kernel_of(params, path.removesuffix("/input"))
        picked = draw_rows(x.size // x.shape[-1], config.hluq_rows, key)
        return searches.hybrid_update(
            state, x, kernel, breakpoints(config), bits, config.hluq_reach_maximum, picked=picked
        )
    return searches.range_update(state, x) if kind == "grouped" else _update_uniform(state, x, config)


def finalize(statistics: Mapping[str, Any], kinds: Mapping[str, Kind], config: QuantConfig) -> dict[str, Quantizer]:
    """Statistics by site -> quantizers by site."""
    bits = config.a_bits
    candidates = breakpoints(config)
    quantizers: dict[str, Quantizer] = {}
    per_channel: dict[str, Uniform] = {}
    for path, kind in kinds.items():
        state = statistics[path]
        if kind == "hybrid":
            found = searches.hybrid_finalize(state, candidates, bits, config.hluq_reach_maximum)
            quantizers[path] = found.quantizer
        elif kind == "log2":
            quantizers[path] = searches.softmax_finalize(state, bits)
        elif isinstance(state, percentiles.PercentileState):
            quantizers[path] = percentiles.percentile_finalize(state, bits)
        elif kind == "uniform":
            quantizers[path] = state.quantizer(bits)
        else:
            per_channel[path] = state.quantizer(bits)
    return quantizers | group_channels(per_channel, config)


def group_channels(per_channel: Mapping[str, Uniform], config: QuantConfig) -> dict[str, Quantizer]:
    """CAG without reconstruction: down the ladder 8G, 4G, 2G, G at once (paper section on CAG).

    All sites of one width are grouped in one call.
    """
    grouped: dict[str, Quantizer] = {}
    by_width: dict[int, list[str]] = {}
    for path, quantizer in per_channel.items():
        by_width.setdefault(quantizer.scale.shape[0], []).append(path)
    for channels, paths in by_width.items():
        scales, zeros = (
            jnp.stack([getattr(per_channel[path], name) for path in paths]) for name in ("scale", "zero_point")
        )
        if config.groups == 0 or config.groups >= channels:
            labels = jnp.broadcast_to(jnp.arange(channels), scales.shape)
        else:
            scales, zeros, labels = grouping.ladder(scales, zeros, config.groups, config.group_metric, config.a_bits)[
                -1
            ]
        for path, scale, zero, label in zip(
            paths, np.asarray(scales), np.asarray(zeros), np.asarray(labels), strict=True
        ):
            grouped[path] = Grouped(jnp.asarray(scale), jnp.asarray(zero), jnp.asarray(label), config.a_bits)
    return grouped
