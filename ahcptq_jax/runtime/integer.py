"""Integer inference: every quantized linear and attention product on integer codes, as an accelerator would.

`integer_model` makes a `Quantized` model run with int32 accumulators in place of float32 sums (`products`):
multiplications by powers of two are shifts, zero points are folded, channel groups have an accumulator each, and
floating point appears only where an accumulator is rescaled. What depends on weights alone (the order of channels by
group, sums of columns, the share of HLUQ's minimum in the bias) is computed where the weights are unpacked; an
accelerator would have it done once.

Up to 5 bits it equals the model as it was, bit for bit: the same codes at every site, the same masks. Above, each
layer agrees to float32 rounding (`products` says why).

Widths of every intermediate in bits, two's complement from the accumulators on, for SAM-H at W4A4
(`width_table(widths(VIT_H, W4A4))`): the worst case over all codes and over what calibration may choose. Products of
activations (q k, softmax v) take the codes of k and v for weights.

| intermediate | terms | accumulators | bits |
|---|---|---|---|
| weight code | 1 | 1 | 4 |
| activation code | 1 | 1 | 4 |
| shifted weight code (HLUQ) | 1 | 1 | 11 |
| shifted value code (AGQ) | 1 | 2 to 4 | 12 |
| sum of input codes, for zero points | 5120 | 1 a group | 17 |
| sum of shifts, for zero points (HLUQ) | 5120 | 1 | 20 |
| sum of shifts, for zero points (AGQ) | 4096 | 2 to 4 | 21 |
| linear, uniform or grouped input | 5120 | 1 a group | 23 |
| 3x3 convolution | 2304 | 1 | 21 |
| linear, hybrid input, log part | 5120 | 1 | 25 |
| linear, hybrid input, uniform part | 5120 | 1 | 22 |
| q k | 80 | 1 | 17 |
| softmax v | 4096 | 2 to 4 | 25 |

Everything behind the accumulators (rescale, bias, relative positions, softmax, norms, residuals) is float32.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ahcptq_jax.architectures.base import ATTENTION_SITES
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.recipe import weight_path
from ahcptq_jax.runtime.products import octave_ranges, supports_attention, supports_layer
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.config import SamConfig

ACCUMULATOR_BITS = 32


def integer_model(quantized: Quantized) -> Quantized:
    """The model on integer arithmetic, usable wherever the given one is.

    Raises:
        ValueError: if a quantizer has no integer product, such as one with a scale for every channel.
    """
    activations = quantized.activations
    for layer, weight in quantized.weights.items():
        if not supports_layer(activations.get(f"{layer}/input"), weight.shape):
            raise ValueError(f"The input of {layer} is not quantized so that its product is one of integers.")
    for site in activations:
        parent, _, name = site.rpartition("/")
        sites = {n: activations[f"{parent}/{n}"] for n in ATTENTION_SITES if f"{parent}/{n}" in activations}
        own_layer = weight_path(site)
        if own_layer not in quantized.weights if own_layer else not supports_attention(sites):
            raise ValueError(f"Site {site} is quantized in a way that has no integer product.")
    return dataclasses.replace(quantized, carrier="int32")


class Width(NamedTuple):
    """One intermediate, in the worst case over all codes and over what calibration may choose."""

    name: str
    terms: int  # summands
    accumulators: str  # of one output
    bits: int  # that hold every value and every partial result


def widths(config: SamConfig, quant_config: QuantConfig, tokens: int = 64) -> list[Width]:
    """The widths of every intermediate of a model, from the ranges that `products` divides shifts into.

    Args:
        config: the model.
        quant_config: its bits.
        tokens: most tokens of one prompt, output tokens included.
    """
    w_bits, a_bits = quant_config.w_bits, quant_config.a_bits
    weight, code = 2**w_bits - 1, 2**a_bits - 1
    hidden = max(int(config.embed_dim * config.mlp_ratio), config.decoder_mlp_dim)
    longest = max(config.embed_dim, config.out_chans, hidden)
    keys = max(config.grid**2, config.window_size**2, tokens)
    head = max(config.head_dim, config.out_chans // config.decoder_num_heads)
    log_ranges = octave_ranges(2 ** (a_bits - 1), hidden, w_bits, "int32")
    tau_ranges = {
        tau: [r for i in range(tau) for r in octave_ranges(-(-(code - i) // tau), keys, a_bits, "int32")]
        for tau in (1, 2, 4)
    }
    log_shift = max(high - low for low, high in log_ranges) - 1
    tau_shift = max(high - low for ranges in tau_ranges.values() for low, high in ranges) - 1
    log_count = str(len(log_ranges))
    tau_counts = [len(ranges) for ranges in tau_ranges.values()]
    tau_count = f"{min(tau_counts)} to {max(tau_counts)}" if len(set(tau_counts)) > 1 else str(tau_counts[0])

    def unsigned(largest: int) -> int:
        return largest.bit_length()

    def signed(largest: int) -> int:
        return largest.bit_length() + 1

    def centred(terms: int, other: int) -> int:
        # The sum of products, less the share of the input's zero point, as large again.
        return signed(2 * terms * code * other)

    return [
        Width("weight code", 1, "1", w_bits),
        Width("activation code", 1, "1", a_bits),
        Width("shifted weight code (HLUQ)", 1, log_count, unsigned(weight << log_shift)),
        Width("shifted value code (AGQ)", 1, tau_count, unsigned(code << tau_shift)),
        Width("sum of input codes, for zero points", longest, "1 a group", unsigned(longest * code)),
        Width("sum of shifts, for zero points (HLUQ)", hidden, log_count, unsigned(hidden << log_shift)),
        Width("sum of shifts, for zero points (AGQ)", keys, tau_count, unsigned(keys << tau_shift)),
        Width("linear, uniform or grouped input", longest, "1 a group", centred(longest, weight)),
        Width("3x3 convolution", 9 * config.out_chans, "1", centred(9 * config.out_chans, weight)),
        Width("linear, hybrid input, log part", hidden, log_count, signed(hidden * weight << log_shift)),
        Width("linear, hybrid input, uniform part", hidden, "1", signed(hidden * code * weight)),
        Width("q k", head, "1", centred(head, code)),
        Width("softmax v", keys, tau_count, signed(keys * code << tau_shift)),
    ]


def width_table(rows: list[Width]) -> str:
    """The rows as the table in this module's docstring."""
    lines = ["| intermediate | terms | accumulators | bits |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {w.name} | {w.terms} | {w.accumulators} | {w.bits} |" for w in rows])
