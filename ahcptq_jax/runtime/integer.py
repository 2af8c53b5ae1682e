"""The widths of integer inference, and a check that a model has integer products alone.

Widths of every intermediate in bits, two's complement from the sums on, for SAM-H at W4A4
(`width_table(widths(VIT_H, W4A4))`): the worst case over all codes and over what calibration may choose, whatever kinds
the recipe names. Products of activations (q k, softmax v) take the levels of k and v for weights.

| intermediate | terms | bits |
|---|---|---|
| weight code | 1 | 4 |
| activation code | 1 | 4 |
| weight less its zero point | 1 | 5 |
| level | 1 | 8 |
| sum of levels, for zero points | 5120 | 22 |
| sum of a column of weights | 5120 | 18 |
| linear | 5120 | 26 |
| 3x3 convolution | 2304 | 25 |
| q k | 80 | 24 |
| softmax v | 4096 | 29 |

Everything behind the sums (rescale, bias, relative positions, softmax, norms, residuals) is float32.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ahcptq_jax.architectures.base import ATTENTION_SITES
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.recipe import weight_path
from ahcptq_jax.runtime.products import attention_sites, on_grid, supports_layer
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.config import SamConfig

SUM_BITS = 32
LEVEL_BITS = 8


def integer_model(quantized: Quantized) -> Quantized:
    """The model on int8 products, all of them.

    Raises:
        ValueError: if a quantizer is not on the grid, and its product therefore one of floats.
    """
    activations, grid_bits = quantized.activations, quantized.quant_config.grid_bits
    for layer, weight in quantized.weights.items():
        if not supports_layer(on_grid(activations.get(f"{layer}/input"), grid_bits), weight.shape):
            raise ValueError(f"The input of {layer} is not quantized so that its product is one of integers.")
    for site in activations:
        parent, _, name = site.rpartition("/")
        sites = {n: activations[f"{parent}/{n}"] for n in ATTENTION_SITES if f"{parent}/{n}" in activations}
        own_layer = weight_path(site)
        if own_layer not in quantized.weights if own_layer else attention_sites(sites, grid_bits) is None:
            raise ValueError(f"Site {site} is quantized in a way that has no integer product.")
    return dataclasses.replace(quantized, carrier="int8")


class Width(NamedTuple):
    """One intermediate, in the worst case over all codes and over what calibration may choose."""

    name: str
    terms: int  # summands
    bits: int  # that hold every value and every partial result


def widths(config: SamConfig, quant_config: QuantConfig, tokens: int = 64) -> list[Width]:
    """The widths of every intermediate of a model on the grid.

    Args:
        config: the model.
        quant_config: its bits.
        tokens: most tokens of one prompt, output tokens included.
    """
    w_bits, a_bits = quant_config.w_bits, quant_config.a_bits
    weight, level = 2**w_bits - 1, 2**LEVEL_BITS - 1
    hidden = max(int(config.embed_dim * config.mlp_ratio), config.decoder_mlp_dim)
    longest = max(config.embed_dim, config.out_chans, hidden)
    keys = max(config.grid**2, config.window_size**2, tokens)
    head = max(config.head_dim, config.out_chans // config.decoder_num_heads)

    def summed(name: str, terms: int, other: int) -> Width:
        return Width(name, terms, (terms * level * other).bit_length() + 1)

    return [
        Width("weight code", 1, w_bits),
        Width("activation code", 1, a_bits),
        Width("weight less its zero point", 1, w_bits + 1),
        Width("level", 1, LEVEL_BITS),
        summed("sum of levels, for zero points", longest, 1),
        Width("sum of a column of weights", longest, (longest * weight).bit_length() + 1),
        summed("linear", longest, weight),
        summed("3x3 convolution", 9 * config.out_chans, weight),
        summed("q k", head, level),
        summed("softmax v", keys, level),
    ]


def width_table(rows: list[Width]) -> str:
    """The rows as the table in this module's docstring."""
    lines = ["| intermediate | terms | bits |", "|---|---|---|"]
    return "\n".join(lines + [f"| {w.name} | {w.terms} | {w.bits} |" for w in rows])
