"""Products of quantized tensors: whole levels, one sum of integers, one rescale.

On the grid (`kinds.registry.Levels`) a quantized value is ``step * level + offset`` with a level of 8 bits, and a
weight ``scale[n] * (code - zero[n])``. So a product of quantized tensors is one product of int8 with int32 sums:

    y[n] = step * scale[n] * (sum_k level[k] (q[k, n] - z[n])) + offset * scale[n] * sum_k (q[k, n] - z[n])

Levels 0..255 (logarithmic and hybrid codes) are taken less 128, and codes of 8-bit weights too; what that leaves out of
the sum is whole and added to it. The second term is a constant of the layer, and most kinds have none.

Two carriers compute the sums: "int8", int8 operands with int32 sums, and "float32", where float32 products of at most
2^24 in magnitude, which are exact in any order, are added up as integers. Both give the same int32 numbers, and all
that follows is one expression: the same codes at every site, the same masks, bit for bit.

XLA's product of int8 takes about half the time of float32's on CPUs (4096x3072x768, AVX-512: 62 against 114 ms), and
int32's twice as much, so nothing is widened before it.

What is not on the grid (the paper's own form, or a step for every channel) is no affair of this file: it is decoded,
and multiplied in float32 by the module itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.base import ATTENTION_SITES
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import Levels, kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from sam_flax.encoders.vit import weights_of_scores
from sam_flax.layers import shifted_copies, taps

Carrier = Literal["int8", "float32"]
CARRIERS: tuple[Carrier, ...] = ("int8", "float32")
EXACT = 2**24  # Float32 holds every integer up to it, and so every sum that stays below, in whatever order.
LARGEST = 128  # magnitude of an int8


class GridSite(NamedTuple):
    """A quantizer as its products see it: ``value = step * (level + shift) + offset``, `level` being an int8.

    Attributes:
        quantizer: on the grid.
        levels: of the quantizer.
        step: float32 scalar.
        offset: float32 scalar or (C,); None where there is none.
    """

    quantizer: Quantizer
    levels: Levels
    step: jax.Array
    offset: jax.Array | None

    @property
    def shift(self) -> int:
        """What is taken from the levels so that they fit in int8."""
        return LARGEST if kind_of(self.quantizer).unsigned else 0

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int8 levels less the shift, and int32 codes, of values (..., C)."""
        codes = self.quantizer.encode(x)
        level = kind_of(self.quantizer).level_of(self.quantizer, self.levels, codes)
        return (level - self.shift).astype(jnp.int8), codes

    def decode(self, level: jax.Array) -> jax.Array:
        """float32 values of int8 levels."""
        value = unfused(self.step * (level.astype(jnp.int32) + self.shift).astype(jnp.float32))
        return value if self.offset is None else value + self.offset

    def zero(self) -> jax.Array:
        """int8 level of the value zero."""
        level = jnp.float32(0) if self.offset is None else jnp.round(-self.offset / self.step)
        return (level.astype(jnp.int32) - self.shift).astype(jnp.int8)


def on_grid(quantizer: Quantizer | None, grid_bits: int) -> GridSite | None:
    """The quantizer for products on levels, or None if it has none: it is off the grid, or has a step for each channel.

    Args:
        quantizer: one that calibration put on the grid if `grid_bits` says so.
        grid_bits: of the model; 0 for the paper's form, where some kinds are on the grid all the same.
    """
    if quantizer is None or not (grid_bits or kind_of(quantizer).always_on_grid):
        return None
    kind = kind_of(quantizer)
    levels = kind.levels(quantizer)
    if np.ndim(levels.step):
        return None
    # Behind the barrier both carriers compute the same program, whatever it is that uses these numbers.
    step, offset = jax.lax.optimization_barrier((levels.step, levels.offset))
    return GridSite(quantizer, levels, step, offset if kind.has_offset(quantizer.bits) else None)


def supports_layer(site: GridSite | None, kernel_shape: tuple[int, ...]) -> bool:
    """Whether `layer` takes such an input and kernel; the border of a convolution must have a level."""
    has_border = len(kernel_shape) == 4 and kernel_shape[0] > 1
    return site is not None and (not has_border or kind_of(site.quantizer).has_zero)


def attention_sites(quantizers: Mapping[str, Quantizer], grid_bits: int) -> dict[str, GridSite] | None:
    """The quantizers of `ATTENTION_SITES` as `attend` takes them; None if it does not."""
    found = {name: on_grid(quantizer, grid_bits) for name, quantizer in quantizers.items()}
    sites = {name: site for name, site in found.items() if site is not None and np.ndim(site.levels.offset) == 0}
    return sites if set(sites) == set(ATTENTION_SITES) else None


# --------------------------------------------------------------------------------------------------------- the sums


def integer_sum(left: jax.Array, right: jax.Array, carrier: Carrier, largest: int = LARGEST) -> jax.Array:
    """int32 ``sum_k left[..., m, k] right[..., k, n]`` of int8, exact.

    Args:
        left: (..., M, K).
        right: (..., K, N), the leading axes as those of `left`.
        carrier: what computes it.
        largest: magnitude of `right`; smaller ones make longer exact sums in float32.
    """
    if carrier == "int8":
        return jnp.matmul(left, right, preferred_element_type=jnp.int32)
    terms, room = left.shape[-1], (EXACT - 1) // (LARGEST * largest)
    total = jnp.int32(0)
    for start in range(0, terms, room):
        one, other = left[..., start : start + room], right[..., start : start + room, :]
        total += _to_int(jnp.matmul(one.astype(jnp.float32), other.astype(jnp.float32), precision="highest"))
    return total


def _to_int(sums: jax.Array) -> jax.Array:
    """Whole float32 as int32, in a branch of their own.

    A compiler fuses nothing across a branch that depends on data, so that all behind it is compiled as it is behind a
    product of integers; a sum over channels would else be vectorised otherwise, and rounded otherwise.
    """
    always = jnp.reshape(sums, -1)[0] >= -2 * EXACT
    return jax.lax.cond(always, lambda s: s.astype(jnp.int32), lambda s: jnp.zeros(s.shape, jnp.int32), sums)


def unfused(product: jax.Array) -> jax.Array:
    """A product, rounded to float32 before anything is added to it.

    A compiler may fuse a product and the sum behind it into one operation that rounds once, and whether it does depends
    on what stands around them. The maximum removes nothing finite and keeps it from fusing.
    """
    return jnp.maximum(product, np.finfo(np.float32).min)


def whole_weight(weight: QuantizedWeight) -> tuple[jax.Array, jax.Array | None]:
    """int8 (K, N), and what is to be added to each column, int32 (N,); None where nothing is.

    Codes less their zero points, which at 8 bits take 9: they are then taken less 128.
    """
    codes = weight.codes().reshape(-1, weight.shape[-1])
    zero = jnp.round(weight.zero_point).astype(jnp.int32)
    if weight.bits < 8:
        return codes.astype(jnp.int8) - zero.astype(jnp.int8), None
    return (codes ^ 128).astype(jnp.int8), LARGEST - zero


# --------------------------------------------------------------------------------------------- layers and attention


def layer(
    level: jax.Array,
    site: GridSite,
    weight: QuantizedWeight,
    carrier: Carrier,
    stride: int = 1,
    padding: int | None = None,
) -> jax.Array:
    """A linear without its bias, or a convolution, on the levels of its input, as float32.

    Args:
        level: int8 (..., in), or (B, H, W, in) for a convolution, as `GridSite.encode` makes them.
        site: of the input, which `supports_layer` accepts.
        weight: kernel (in, out), or (k, k, in, out).
        carrier: what carries the sums.
        stride: of a convolution.
        padding: of a convolution, on each side; None keeps the size at stride 1.
    """
    if len(weight.shape) == 4 and weight.shape[0] > 1:
        zero = site.zero()  # int8 wraps around and back.
        level = shifted_copies(level - zero, weight.shape[0], stride, padding) + zero
    kernel, more = whole_weight(weight)
    rows = level.reshape(-1, level.shape[-1])
    sums = integer_sum(rows, kernel, carrier, LARGEST if weight.bits == 8 else 2**weight.bits - 1)
    if more is not None:
        sums += more * rows.sum(-1, keepdims=True, dtype=jnp.int32)
    if site.shift:
        sums += site.shift * _column_sums(kernel, more)
    rescale = jax.lax.optimization_barrier(site.step * weight.scale)
    y = unfused(sums.astype(jnp.float32) * rescale)
    if site.offset is not None:
        y = y + jax.lax.optimization_barrier(_of_offset(site.offset, kernel, more) * weight.scale)
    return y.reshape(*level.shape[:-1], y.shape[-1])


def depthwise(
    level: jax.Array, site: GridSite, weight: QuantizedWeight, carrier: Carrier, stride: int = 1
) -> jax.Array:
    """A convolution of every channel by itself, on the levels of its input, as float32.

    A few products for each number are no matrix product: the int8 carrier widens them to int32, and both add them up
    copy by copy, without a loss as long as the kernel has at most `EXACT` / 2^15 taps (22 x 22).

    Args:
        level: int8 (B, H, W, C).
        site: of the input, which `supports_layer` accepts.
        weight: kernel (k, k, 1, C), k odd; k // 2 levels of zero stand on each side.
        carrier: what carries the sums.
        stride: pixels from one output to the next.
    """
    side = weight.shape[0]
    kernel = weight.codes().astype(jnp.int32) - jnp.round(weight.zero_point).astype(jnp.int32)
    zero = site.zero()  # int8 wraps around and back.
    wide = jnp.int32 if carrier == "int8" or side**2 * LARGEST * 2**weight.bits > EXACT else jnp.float32
    rows, total = kernel.reshape(side**2, -1).astype(wide), jnp.zeros((), wide)
    for row, copy in zip(rows, taps(level - zero, side, stride), strict=True):
        total = total + (copy + zero).astype(wide) * row
    sums = total if wide == jnp.int32 else _to_int(total)
    of_taps = kernel.sum((0, 1, 2))
    if site.shift:
        sums += site.shift * of_taps
    y = unfused(sums.astype(jnp.float32) * jax.lax.optimization_barrier(site.step * weight.scale))
    if site.offset is not None:
        y = y + jax.lax.optimization_barrier(site.offset * of_taps.astype(jnp.float32) * weight.scale)
    return y


def _column_sums(kernel: jax.Array, more: jax.Array | None) -> jax.Array:
    """int32 (N,): sums of the columns of `whole_weight`."""
    sums = kernel.sum(0, dtype=jnp.int32)
    return sums if more is None else sums + kernel.shape[0] * more


def _of_offset(offset: jax.Array, kernel: jax.Array, more: jax.Array | None) -> jax.Array:
    """float32 (N,): ``sum_k offset[k] weight[k, n]``."""
    if offset.ndim == 0:
        return offset * _column_sums(kernel, more).astype(jnp.float32)
    # A convolution of one point, or a linear: whatever has neighbours has an offset for all channels.
    weight = kernel.astype(jnp.float32) + (0.0 if more is None else more.astype(jnp.float32))
    return jnp.sum(offset[:, None] * weight, axis=0)


def attend(
    sites: Mapping[str, GridSite],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    biases: tuple[jax.Array, ...],
    carrier: Carrier,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention on levels.

    Args:
        sites: of "q", "k", "v" and "softmax".
        q, k, v: int8 levels (..., M, d), (..., d, N), (..., N, d).
        biases: none; one that is added to the scores, (heads, M, N) for instance; or the encoder's relative-position
            biases (..., M, H) and (..., M, W), N = H*W.
        carrier: what carries the sums.

    Returns:
        float32 (..., M, d), and the int32 codes of the probabilities (..., M, N).
    """
    scores = unfused(integer_sum(q, k, carrier).astype(jnp.float32) * _score_step(sites, q))
    keys = _of_queries_offset(sites, k, q.shape[-1])
    if keys is not None:
        scores = scores + keys
    if len(biases) == 1:
        scores, biases = scores + biases[0], ()
    weights, total = weights_of_scores(scores, *biases)
    level, codes = sites["softmax"].encode(weights / total)
    sums = integer_sum(level, v, carrier)
    if sites["softmax"].shift:
        sums += sites["softmax"].shift * v.sum(-2, keepdims=True, dtype=jnp.int32)
    out = unfused(sums.astype(jnp.float32) * jax.lax.optimization_barrier(sites["softmax"].step * sites["v"].step))
    return _with_offsets(out, sites, level, v), codes


def across(site: GridSite, keys: jax.Array) -> jax.Array:
    """int8 levels of keys (..., N, d) as the right operand (..., d, N) of their product.

    In a branch that depends on data. Of a transposition that it sees, even through a barrier or an elementwise
    function, XLA on CPUs makes a product of rows by rows, for which it has no int8 code, only some of int32, four times
    slower.
    """
    turned = jnp.swapaxes(keys, -1, -2)
    return jax.lax.cond(site.step > 0, lambda: turned, lambda: jnp.zeros_like(turned))


def _score_step(sites: Mapping[str, GridSite], q: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(sites["q"].step * sites["k"].step * q.shape[-1] ** -0.5)


def _of_queries_offset(sites: Mapping[str, GridSite], k: jax.Array, width: int) -> jax.Array | None:
    """float32 (..., 1, N): what an offset (or shift) of the queries adds to the score of a key.

    That of the keys adds the same to all scores of a query, which is nothing to a softmax.
    """
    queries, keys = sites["q"], sites["k"]
    if queries.offset is None and not queries.shift:
        return None
    constant = queries.step * queries.shift + (0.0 if queries.offset is None else queries.offset)
    sums = k.sum(-2, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    return jax.lax.optimization_barrier(constant * keys.step * width**-0.5 * sums)


def _with_offsets(out: jax.Array, sites: Mapping[str, GridSite], level: jax.Array, v: jax.Array) -> jax.Array:
    """The output of an attention with what offsets add to it."""
    softmax, values = sites["softmax"], sites["v"]
    constant = None if values.offset is None and not values.shift else values.step * values.shift
    if constant is not None and values.offset is not None:
        constant = constant + values.offset
    if constant is not None:
        total = level.sum(-1, keepdims=True, dtype=jnp.int32) + level.shape[-1] * softmax.shift
        out = out + unfused(jax.lax.optimization_barrier(total).astype(jnp.float32) * (softmax.step * constant))
    if softmax.offset is not None:
        out = out + jax.lax.optimization_barrier(softmax.offset * values.decode(v).sum(-2, keepdims=True))
    return out
