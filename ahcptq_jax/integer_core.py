"""The arithmetic of integer inference; see `ahcptq_jax.integer` for the scheme and the table of widths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantized import QuantizedWeight
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.quantizers.base import negative_power_of_root, negative_power_of_two
from sam_flax.config import SamConfig

ACCUMULATOR_BITS = 32
MAX_GROUPS = 64  # of accumulators for one layer


def octaves(terms: int, w_bits: int) -> int:
    """How many octaves of shifts of `terms` weights of `w_bits` bits fit in one accumulator.

    Raises:
        ValueError: if not even the plain sum fits.
    """
    room = (2 ** (ACCUMULATOR_BITS - 1) - 1) // (max(terms, 1) * (2**w_bits - 1))
    if room == 0:
        raise ValueError(
            f"A sum of {terms} codes of {w_bits} bits does not fit in {ACCUMULATOR_BITS} bits; use fewer bits."
        )
    return room.bit_length()


class Accumulator(NamedTuple):
    """The worst case of one type of accumulator."""

    name: str
    terms: int  # summands
    count: int  # accumulators for one output, groups not counted
    bits: int  # of a two's-complement number that holds any value and any partial result


def accumulators(config: SamConfig, quant_config: QuantConfig, tokens: int = 64) -> list[Accumulator]:
    """Accumulator widths of a model, in the worst case over codes and over what calibration may choose.

    Args:
        config: the model.
        quant_config: its bits.
        tokens: most tokens of one prompt, output tokens included.
    """
    w_bits, a_bits = quant_config.w_bits, quant_config.a_bits
    hidden = max(int(config.embed_dim * config.mlp_ratio), config.decoder_mlp_dim)
    keys = max(config.grid, config.window_size) ** 2

    def plain(name: str, terms: int, other_bits: int, offset: bool = True) -> Accumulator:
        largest = terms * (2**a_bits - 1) * (2**other_bits - 1)
        # With a zero point of the activation the partial results reach twice the sum.
        return Accumulator(name, terms, 1, (largest * (2 if offset else 1)).bit_length() + 1)

    def shifted(name: str, terms: int, other_bits: int, levels: int) -> Accumulator:
        fitting = octaves(terms, other_bits)
        largest = terms * (2**other_bits - 1) << (min(fitting, levels) - 1)
        return Accumulator(name, terms, -(-levels // fitting), largest.bit_length() + 1)

    return [
        plain("linear, uniform or grouped input", max(config.embed_dim, config.out_chans, hidden), w_bits),
        plain("3x3 convolution", 9 * config.out_chans, w_bits),
        shifted("linear, hybrid input, log part", hidden, w_bits, 2 ** (a_bits - 1)),
        plain("linear, hybrid input, uniform part", hidden, w_bits, offset=False),
        plain("q k", max(config.head_dim, config.out_chans // config.decoder_num_heads), a_bits),
        shifted("softmax v", max(keys, tokens), a_bits, 2**a_bits - 1),
    ]


class Plane(NamedTuple):
    """One accumulator's share of an activation: the values `factor * (operand - zero_point)`."""

    operand: jax.Array  # (..., rows) int32, not negative
    rows: slice  # the summands it covers
    factor: jax.Array  # float32 scalar
    zero_point: jax.Array | None = None  # int32 scalar
    group: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["quantizer", "order"], meta_fields=["static"])
@dataclasses.dataclass(frozen=True)
class Coder:
    """An activation quantizer made ready for integer arithmetic.

    The following conditions hold:
      * `order` is a permutation of the channels that makes groups contiguous, None where there are no groups;
      * `static` is () for uniform, the group sizes for grouped, (log_levels,) for hybrid and (tau,) for log2: what
        fixes the number of accumulators must be known when compiling.
    """

    quantizer: Quantizer
    order: jax.Array | None
    static: tuple[int, ...]

    @classmethod
    def prepare(cls, site: str, quantizer: Quantizer) -> Coder:
        """Offline part.

        Raises:
            ValueError: if integers cannot carry the quantizer, in the name of `site`.
        """
        if isinstance(quantizer, Grouped):
            labels, groups = np.asarray(quantizer.groups), np.size(quantizer.scale)
            if groups > MAX_GROUPS:
                raise ValueError(
                    f"Site {site} has {groups} channel groups and integer inference takes one accumulator for each, "
                    f"at most {MAX_GROUPS}; quantize with groups=4."
                )
            order = np.argsort(labels, kind="stable").astype(np.int32)
            return cls(quantizer, jnp.asarray(order), tuple(np.bincount(labels, minlength=groups).tolist()))
        if isinstance(quantizer, Hybrid):
            return cls(quantizer, None, (int(np.asarray(quantizer.log_levels).reshape(())),))
        if isinstance(quantizer, Log2):
            return cls(quantizer, None, (int(np.asarray(quantizer.tau).reshape(())),))
        if np.size(quantizer.scale) != 1:
            raise ValueError(f"Site {site} has a scale for every channel, which no integer product shares; group them.")
        return cls(quantizer, None, ())

    def rows(self, terms: int) -> list[slice]:
        """The summands that share a zero point, in the permuted order; for a tensor of `terms` channels."""
        if not isinstance(self.quantizer, Grouped):
            return [slice(0, terms)]
        ends = np.cumsum((0, *self.static)).tolist()
        return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def permute(self, codes: jax.Array) -> jax.Array:
        """Codes (..., C) in the order of the groups. (On an accelerator the layer before writes them so.)"""
        return codes if self.order is None else jnp.take(codes, self.order, axis=-1)

    def planes(self, codes: jax.Array, w_bits: int) -> list[Plane]:
        """The planes of permuted codes (..., K), to be multiplied with codes of `w_bits` bits."""
        quantizer, terms = self.quantizer, codes.shape[-1]
        everything = slice(0, terms)
        if isinstance(quantizer, Uniform):
            scale, zero = (jnp.reshape(a, ()) for a in (quantizer.scale, quantizer.zero_point))
            return [Plane(codes, everything, scale, _whole(zero))]
        if isinstance(quantizer, Grouped):
            return [
                Plane(codes[..., rows], rows, quantizer.scale[g], _whole(quantizer.zero_point[g]), g)
                for g, rows in enumerate(self.rows(terms))
                if rows.start < rows.stop
            ]
        step = octaves(terms, w_bits)
        if isinstance(quantizer, Hybrid):
            (levels,) = self.static
            scale_log, scale_uniform = (jnp.reshape(a, ()) for a in (quantizer.scale_log, quantizer.scale_uniform))
            k = jnp.where(codes > levels, 0, codes)
            planes = []
            for low in range(0, levels, step):
                top = min(low + step, levels) - 1
                inside = (k >= low) & (k <= top)
                factor = scale_log * negative_power_of_two(jnp.int32(top))
                planes.append(Plane(_power(top - k, inside), everything, factor))
            return [*planes, Plane(jnp.maximum(codes - levels, 0), everything, scale_uniform)]
        (tau,) = self.static
        scale = jnp.reshape(quantizer.scale, ())
        planes = []
        for residue in range(tau):
            octave, mine = codes // tau, (codes % tau == residue) & (codes < quantizer.levels)
            count = -(-(quantizer.levels - residue) // tau)
            for low in range(0, count, step):
                top = min(low + step, count) - 1
                factor = scale * negative_power_of_root(jnp.int32(residue + tau * top), jnp.int32(tau))
                inside = mine & (octave >= low) & (octave <= top)
                planes.append(Plane(_power(top - octave, inside), everything, factor))
        return planes


def _whole(zero_point: jax.Array) -> jax.Array:
    return jnp.round(zero_point).astype(jnp.int32)


def _power(exponent: jax.Array, inside: jax.Array) -> jax.Array:
    """int32 `2^exponent` where `inside`, else 0."""
    return jnp.where(inside, jnp.left_shift(1, jnp.where(inside, exponent, 0)), 0)


def accumulate(plane: Plane, codes: jax.Array, zero_point: jax.Array, column: jax.Array | None = None) -> jax.Array:
    """`sum_k (operand - its zero point) (codes - zero_point)` as int32, (..., M, N).

    Args:
        plane: operand (..., M, rows).
        codes: (..., K, N) int32; the plane's rows are taken.
        zero_point: int32, of the codes; broadcasts to (N,).
        column: `sum over the plane's rows of codes - zero_point`, where known offline.
    """
    codes = codes[..., plane.rows, :]
    total = jnp.matmul(plane.operand, codes, preferred_element_type=jnp.int32)
    total -= zero_point * plane.operand.sum(-1, keepdims=True, dtype=jnp.int32)
    if plane.zero_point is None:
        return total
    if column is None:
        column = codes.sum(-2, keepdims=True, dtype=jnp.int32) - codes.shape[-2] * zero_point
    return total - plane.zero_point * column


def multiply(coder: Coder, codes: jax.Array, other_codes: jax.Array, other: Uniform) -> jax.Array:
    """The product of two activations: codes (..., M, K) of `coder` and codes (..., K, N) of `other`, as float32."""
    zero_point = _whole(jnp.reshape(other.zero_point, ()))
    total = jnp.float32(0.0)
    for plane in coder.planes(codes, other.bits):
        total += plane.factor * accumulate(plane, other_codes, zero_point).astype(jnp.float32)
    return total * jnp.reshape(other.scale, ())


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "columns", "bias", "coder"], meta_fields=["kernel_shape"]
)
@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """A linear or convolution on codes.

    The following conditions hold:
      * `weight` is (K, out), K counting the kernel's positions too, its rows in the order of the coder's groups;
      * `columns` is (groups, out) int32, the sums of `code - zero point` over each group's rows;
      * `bias` is (out,) float32, with the minimum's share of a hybrid input folded in.
    """

    weight: QuantizedWeight
    columns: jax.Array
    bias: jax.Array
    coder: Coder
    kernel_shape: tuple[int, ...]

    @classmethod
    def prepare(cls, layer: str, weight: QuantizedWeight, bias: Any, quantizer: Quantizer | None) -> IntegerLayer:
        """Offline part: permutes the rows, sums the columns, folds the minimum into the bias.

        Raises:
            ValueError: if the layer's input is not quantized, or not so that integers can carry it.
        """
        if quantizer is None:
            raise ValueError(f"The input of {layer} is not quantized, so its product is not one of integers.")
        coder = Coder.prepare(f"{layer}/input", quantizer)
        if weight.shape[0] > 1 and len(weight.shape) == 4 and not isinstance(quantizer, Uniform):
            raise ValueError(f"The convolution {layer} needs a uniform input, whose zero padding has a code.")
        codes = np.asarray(weight.codes()).reshape(-1, weight.shape[-1])
        if coder.order is not None:
            codes = codes[np.asarray(coder.order)]
        zero_point = np.asarray(weight.zero_point).astype(np.int64)
        centred = codes.astype(np.int64) - zero_point
        columns = np.stack([centred[rows].sum(0) for rows in coder.rows(len(codes))]).astype(np.int32)
        bias = np.broadcast_to(np.asarray(bias, np.float32), weight.shape[-1:])
        if isinstance(quantizer, Hybrid):
            bias = bias + np.asarray(quantizer.minimum).reshape(()) * np.asarray(weight.scale) * columns[0]
        packed = QuantizedWeight.from_codes(jnp.asarray(codes), weight.scale, weight.zero_point, weight.bits)
        return cls(packed, jnp.asarray(columns), jnp.asarray(bias, jnp.float32), coder, weight.shape)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float input (..., in) -> float output (..., out), and the int32 codes of the input (..., in)."""
        codes = self.coder.quantizer.encode(x)
        terms = self.coder.permute(codes)
        if len(self.kernel_shape) == 4 and self.kernel_shape[0] > 1:
            terms = _patches(codes, self.kernel_shape[0], self.coder.quantizer)
        weight, zero_point = self.weight.codes().astype(jnp.int32), _whole(self.weight.zero_point)
        total = jnp.float32(0.0)
        for plane in self.coder.planes(terms.reshape(-1, terms.shape[-1]), self.weight.bits):
            share = accumulate(plane, weight, zero_point, self.columns[plane.group])
            total += plane.factor * share.astype(jnp.float32)
        y = total * self.weight.scale + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1]), codes


def _patches(codes: jax.Array, k: int, quantizer: Any) -> jax.Array:
    """Codes (B, H, W, C) -> (B, H, W, k*k*C), padded with the code of zero; the order of `layers.conv_same`."""
    pad = k // 2
    _, height, width, _ = codes.shape
    zero = _whole(jnp.reshape(quantizer.zero_point, ()))
    padded = jnp.pad(codes - zero, ((0, 0), (pad, pad), (pad, pad), (0, 0))) + zero
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(k) for j in range(k)], axis=-1)


def attend(
    coders: Mapping[str, Coder], q: jax.Array, k: jax.Array, v: jax.Array, biases: tuple[jax.Array, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention on codes.

    Args:
        coders: of the sites "q", "k", "v" and "softmax".
        q, k, v: int32 codes (..., M, d), (..., N, d), (..., N, d).
        biases: none, or the encoder's relative-position biases (..., M, H) and (..., M, W), N = H*W.

    Returns:
        float32 (..., M, d), and the int32 codes of the probabilities (..., M, N).
    """
    keys = coders["k"].quantizer
    assert isinstance(keys, Uniform)
    scores = multiply(coders["q"], q, jnp.swapaxes(k, -1, -2), keys) * q.shape[-1] ** -0.5
    if biases:
        bias_h, bias_w = biases
        grid = scores.reshape(*scores.shape[:-1], bias_h.shape[-1], bias_w.shape[-1])
        scores = (grid + bias_h[..., :, None] + bias_w[..., None, :]).reshape(scores.shape)
    codes = coders["softmax"].quantizer.encode(nn.softmax(scores))
    values = coders["v"].quantizer
    assert isinstance(values, Uniform)
    return multiply(coders["softmax"], codes, v, values), codes
