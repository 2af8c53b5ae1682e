"""Products of quantized tensors, computed on their codes.

A quantized value is a float factor times an integer, so a product of quantized tensors is a sum of a few factors times
sums of integers:

    y[n] = s[n] * sum_p factor_p * A_p[n] + bias[n],    A_p[n] = sum_k operand_p[k] (q[k, n] - z[n]),

`q`, `z` and `s` being the weights' codes, zero points and scales. The planes `p` of an activation are:

| quantizer | planes | operand | factor |
|---|---|---|---|
| uniform | 1 | `code - zero point` | scale |
| grouped (CAG) | one a group, over its channels alone | `code - zero point` of the group | scale of the group |
| hybrid (HLUQ) | log part | `2^(top - k)`, 0 for the zero code; k = 0 for uniform codes | `s_l 2^-top` |
| | uniform part | n | `s_u` |
| log2 (AGQ) | one for each `r = k mod tau` | `2^(top - k div tau)`, 0 for the zero code | `s 2^(-r/tau) 2^-top` |

(and `minimum * s * sum_k (q - z)` belongs to the bias of a hybrid input). Every `A_p` is one accumulator, and two
carriers compute it: float32, which is what CPUs and GPUs are fast at, and int32, as an accelerator would, with shifts
for the powers of two and the zero points folded (`carrier`). Float32 holds every integer up to 2^24 exactly, and so are
all sums of integers that stay below it, in whatever order. The range of the powers of two is divided among
accumulators so that this holds (`octave_ranges`); then both carriers give the same numbers, and since all that follows
is one and the same expression, the same codes at every site and the same masks, bit for bit.

It holds up to 5 bits for all published SAMs. Above, where powers of two would take more than `MAX_PLANES`
accumulators, float32 multiplies decoded values instead, and sums may leave the exact range: the carriers then agree to
float rounding.

Sources: paper, sections on HLUQ and CAG; PTQ4SAM, section on AGQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.base import ATTENTION_SITES
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.quantizers.base import negative_power_of_two, positive_power_of_two
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from sam_flax.layers import shifted_copies

Carrier = Literal["float32", "int32"]
EXACT_BITS = {"float32": 24, "int32": 31}  # of the magnitude of a sum
MAX_PLANES = 4  # products in place of one, for powers of two
MAX_GROUPS = 16  # of channels that have an accumulator of their own


class Operand(NamedTuple):
    """The right factor of a product.

    The following conditions hold:
      * `codes` is (..., K, N), integers of `bits` bits; `zero_point` is () or (N,).
    """

    codes: jax.Array
    zero_point: jax.Array
    bits: int

    def centred(self) -> jax.Array:
        """float32 integers `codes - zero_point`."""
        return self.codes.astype(jnp.float32) - self.zero_point

    def whole(self) -> tuple[jax.Array, jax.Array]:
        """Codes and zero point as int32."""
        return self.codes.astype(jnp.int32), jnp.round(self.zero_point).astype(jnp.int32)


def octave_ranges(octaves: int, terms: int, bits: int, carrier: Carrier) -> list[tuple[int, int]]:
    """Divides shifts by `0..octaves-1` among accumulators that hold any sum of `terms` codes of `bits` bits.

    Both carriers take the ranges that float32 holds exactly, unless there are more than `MAX_PLANES`; int32 then takes
    its own.
    """
    for limit in (EXACT_BITS["float32"], EXACT_BITS[carrier]):
        room = (2**limit - 1) // (terms * (2**bits - 1))
        if room == 0:
            raise ValueError(f"A sum of {terms} codes of {bits} bits does not fit in {limit} bits; use fewer bits.")
        step = room.bit_length()
        if -(-octaves // step) <= MAX_PLANES:
            break
    return [(low, min(low + step, octaves)) for low in range(0, octaves, step)]


def accumulate(codes: jax.Array, zero_point: Any, right: Operand, carrier: Carrier) -> jax.Array:
    """`sum_k (codes - zero_point) (right - its zero point)` as float32: (..., M, K) by (..., K, N)."""
    if carrier == "float32":
        return (codes.astype(jnp.float32) - zero_point) @ right.centred()
    other, other_zero = right.whole()
    zero = jnp.round(zero_point).astype(jnp.int32)
    column = other.sum(-2, keepdims=True) - other.shape[-2] * other_zero  # Depends on weights alone, where they are.
    return _to_float(_integer_sum(codes, other, other_zero) - zero * column, right.zero_point)


def accumulate_powers(
    k: jax.Array, inside: jax.Array, octaves: tuple[int, int], right: Operand, carrier: Carrier
) -> jax.Array:
    """`sum_k 2^(top - k) (right - its zero point)` over the terms `inside` whose `k` is in the range, as float32.

    Args:
        k: (..., M, K) int32, not negative.
        inside: bool, of the shape of `k`.
        octaves: the range of k from the first to before the second; `top` is its last.
        right: (..., K, N).
        carrier: what carries the sums.
    """
    low, high = octaves
    inside &= (k >= low) & (k < high)
    shift = jnp.where(inside, high - 1 - k, 0)
    if carrier == "float32":
        return jnp.where(inside, positive_power_of_two(shift), 0.0) @ right.centred()
    sums = _integer_sum(jnp.where(inside, jnp.left_shift(1, shift), 0), *right.whole())
    return _to_float(sums, right.zero_point)


def unfused(product: jax.Array) -> jax.Array:
    """A product, rounded to float32 before anything is added to it.

    A compiler may fuse a product and the sum behind it into one operation that rounds once, and whether it does depends
    on what stands around them, in which the two carriers differ. The maximum removes nothing finite and keeps it from
    fusing.
    """
    return jnp.maximum(product, np.finfo(np.float32).min)


def _integer_sum(operand: jax.Array, codes: jax.Array, zero_point: jax.Array) -> jax.Array:
    """`sum_k operand (codes - zero_point)` as int32, the zero point folded: its share is a sum of the operand alone."""
    total = jnp.matmul(operand, codes, preferred_element_type=jnp.int32)
    return total - zero_point * operand.sum(-1, keepdims=True, dtype=jnp.int32)


def _to_float(sums: jax.Array, data: jax.Array) -> jax.Array:
    """Integer sums as float32, in a branch of their own.

    A compiler fuses nothing across a branch that depends on data, so that all behind it is compiled as it is behind a
    product of floats.
    """
    always = jnp.reshape(data, -1)[0] >= -1
    return jax.lax.cond(always, lambda s: s.astype(jnp.float32), lambda s: jnp.zeros(s.shape, jnp.float32), sums)


# --------------------------------------------------------------------------------------- one product, by quantizer


def supports(quantizer: Quantizer | None) -> bool:
    """Whether a quantizer has a product on codes here.

    A scale for every channel, or more groups than `MAX_GROUPS`, would take too many planes.
    """
    if isinstance(quantizer, Grouped):
        return np.size(quantizer.scale) <= MAX_GROUPS
    if isinstance(quantizer, Uniform):
        return np.size(quantizer.scale) == 1
    return isinstance(quantizer, Hybrid | Log2)


def supports_layer(quantizer: Quantizer | None, kernel_shape: tuple[int, ...]) -> bool:
    """Whether `layer` takes such an input and kernel; the border of a convolution must have a code."""
    has_border = len(kernel_shape) == 4 and kernel_shape[0] > 1
    return supports(quantizer) and (isinstance(quantizer, Uniform) or not has_border)


def supports_attention(sites: Mapping[str, Quantizer]) -> bool:
    """Whether `attend` takes these quantizers, of `ATTENTION_SITES`."""
    return (
        set(sites) == set(ATTENTION_SITES)
        and all(supports(quantizer) for quantizer in sites.values())
        and all(isinstance(sites[name], Uniform) for name in "qkv")
        and isinstance(sites["softmax"], Uniform | Log2)
    )


def multiply(quantizer: Quantizer, codes: jax.Array, right: Operand, carrier: Carrier) -> jax.Array:
    """Values of `codes` (..., M, K) by `right` minus its zero point (..., K, N), as float32 (..., M, N).

    The minimum of a hybrid quantizer is left out.
    """
    if isinstance(quantizer, Uniform):
        return _scalar(quantizer.scale) * accumulate(codes, _scalar(quantizer.zero_point), right, carrier)
    if isinstance(quantizer, Grouped):
        return _multiply_groups(quantizer, codes, right, carrier)
    if isinstance(quantizer, Hybrid):
        return _multiply_hybrid(quantizer, codes, right, carrier)
    if isinstance(quantizer, Log2):
        return _multiply_log2(quantizer, codes, right, carrier)
    raise ValueError(f"{type(quantizer).__name__} has no product on codes; ask supports first.")


def _multiply_groups(quantizer: Grouped, codes: jax.Array, right: Operand, carrier: Carrier) -> jax.Array:
    """One accumulator a group."""
    labels, scales = jnp.asarray(quantizer.groups), jnp.asarray(quantizer.scale, jnp.float32)
    zeros = jnp.asarray(quantizer.zero_point, jnp.float32)
    rows = codes.reshape(-1, len(labels))
    if carrier == "float32":
        rows = rows.astype(jnp.float32) - zeros[labels]
        sums = _group_sums(rows, right.centred(), jnp.float32(0), labels, len(scales))
        total = sums(lambda group, share, total: total + unfused(scales[group] * share))
    else:
        other, other_zero = right.whole()
        own = (labels == jnp.arange(len(scales))[:, None]).astype(jnp.int32)
        columns = own @ other - own.sum(1, keepdims=True) * other_zero  # (G, N), of weights alone
        offsets = jnp.round(zeros).astype(jnp.int32)[:, None] * columns
        sums = _group_sums(rows, other, other_zero, labels, len(scales))
        total = sums(
            lambda group, share, total: (
                total + unfused(scales[group] * _to_float(share - offsets[group], right.zero_point))
            )
        )
    return total.reshape(*codes.shape[:-1], -1)


def _group_sums(
    rows: jax.Array, other: jax.Array, other_zero: jax.Array, labels: jax.Array, groups: int
) -> Callable[[Callable], jax.Array]:
    """Folds `step(group, sums, total)` over the groups, `sums` being a group's share of `rows (other - other_zero)`.

    Args:
        rows: (M, K) float32 or int32.
        other: (K, N) of the same type.
        other_zero: () or (N,), zero for float32.
        labels: (K,) group of each channel.
        groups: number of groups.

    Returns:
        A function of `step`, which returns the total, float32 (M, N) from zero.
    """
    channels, features = other.shape
    nothing = jnp.zeros((rows.shape[0], features), jnp.float32)
    whole = rows.dtype == jnp.int32

    if features <= channels:
        # Narrow: all groups side by side in one product, each on its own rows of the weight.
        own = (labels[:, None] == jnp.arange(groups)).astype(rows.dtype)  # (K, G)
        wide = (own[:, :, None] * other[:, None, :]).reshape(channels, -1)
        sums = (rows @ wide).reshape(-1, groups, features)
        if whole:
            sums -= (rows @ own)[:, :, None] * other_zero

        def fold_side_by_side(step: Callable) -> jax.Array:
            total = nothing
            for group in range(groups):
                total = step(group, sums[:, group], total)
            return total

        return fold_side_by_side

    # Wide: group by group. The sizes of the groups are data, and one compilation serves all of them: a group's channels
    # fill whole blocks, and a product is compiled for every number of blocks.
    block = max(8, channels // 8)
    index, starts = group_blocks(labels, groups, block)
    rows = jnp.take(rows, index, axis=1, mode="fill", fill_value=0)
    other = jnp.take(other, index, axis=0, mode="fill", fill_value=0)

    def branch(blocks: int) -> Callable[[jax.Array], jax.Array]:
        def product(start: jax.Array) -> jax.Array:
            if blocks == 0:
                return jnp.zeros((rows.shape[0], features), rows.dtype)
            left = jax.lax.dynamic_slice_in_dim(rows, start * block, blocks * block, axis=1)
            right = jax.lax.dynamic_slice_in_dim(other, start * block, blocks * block, axis=0)
            return _integer_sum(left, right, other_zero) if whole else left @ right

        return product

    branches = [branch(blocks) for blocks in range(-(-channels // block) + 1)]

    def fold_one_by_one(step: Callable) -> jax.Array:
        def body(group: jax.Array, total: jax.Array) -> jax.Array:
            return step(group, jax.lax.switch(starts[group + 1] - starts[group], branches, starts[group]), total)

        return jax.lax.fori_loop(0, groups, body, nothing)

    return fold_one_by_one


def group_blocks(labels: jax.Array, groups: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The permutation that makes groups contiguous, each padded to whole blocks.

    Args:
        labels: (K,) group of each channel.
        groups: number of groups G.
        block: channels in a block.

    Returns:
        index: (blocks * block,) channel at each place, K for padding.
        starts: (G + 1,) first block of each group, and the end.
    """
    channels = len(labels)
    counts = jnp.bincount(labels, length=groups)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-counts // block)).astype(jnp.int32)])
    order = jnp.argsort(labels, stable=True)
    label = labels[order]
    place = starts[label] * block + jnp.arange(channels) - (jnp.cumsum(counts) - counts)[label]
    size = (channels // block + groups) * block
    return jnp.full(size, channels).at[place].set(order), starts


def _multiply_hybrid(quantizer: Hybrid, codes: jax.Array, right: Operand, carrier: Carrier) -> jax.Array:
    log_levels, terms = _scalar(quantizer.log_levels).astype(jnp.int32), codes.shape[-1]
    # Uniform codes count as k = 0: s_l is the foot of the uniform part.
    k = jnp.where(codes > log_levels, 0, codes)

    def branch(octaves: int) -> Callable[..., jax.Array]:
        ranges = octave_ranges(octaves, terms, right.bits, carrier)

        def log_part(k: jax.Array, right_codes: jax.Array, right_zero: jax.Array) -> jax.Array:
            own, inside = Operand(right_codes, right_zero, right.bits), k != log_levels  # the zero code
            if carrier == "float32" and len(ranges) > MAX_PLANES:
                return jnp.where(inside, negative_power_of_two(k), 0.0) @ own.centred()
            return _weighted(
                [(2.0 ** (1 - part[1]), accumulate_powers(k, inside, part, own, carrier)) for part in ranges]
            )

        return log_part

    # The recipe's grid rates make at most half of the codes logarithmic, which takes fewer accumulators.
    half, most = 2 ** (quantizer.bits - 1), 2**quantizer.bits - 2
    log_part = jax.lax.cond(log_levels <= half, branch(half), branch(most), k, right.codes, right.zero_point)
    uniform_part = accumulate(jnp.maximum(codes - log_levels, 0), jnp.float32(0), right, carrier)
    return unfused(_scalar(quantizer.scale_log) * log_part) + unfused(_scalar(quantizer.scale_uniform) * uniform_part)


def _multiply_log2(quantizer: Log2, codes: jax.Array, right: Operand, carrier: Carrier) -> jax.Array:
    if quantizer.grid_bits:
        on_grid = kind_of(quantizer).levels(quantizer)
        return on_grid.step * accumulate(on_grid.of(codes), jnp.float32(0), right, carrier)
    levels, terms = quantizer.levels, codes.shape[-1]

    def branch(tau: int) -> Callable[..., jax.Array]:
        shift = tau.bit_length() - 1
        ranges = [octave_ranges(-(-(levels - r) // tau), terms, right.bits, carrier) for r in range(tau)]

        def planes(codes: jax.Array, right_codes: jax.Array, right_zero: jax.Array) -> jax.Array:
            own = Operand(right_codes, right_zero, right.bits)
            if carrier == "float32" and sum(map(len, ranges)) > MAX_PLANES:
                return Log2(jnp.float32(1), jnp.int32(tau), quantizer.bits).decode(codes) @ own.centred()
            octave, sums = codes >> shift, []
            for r in range(min(tau, levels)):
                mine = ((codes & (tau - 1)) == r) & (codes < levels)
                for part in ranges[r]:
                    factor = 2.0 ** (-r / tau + 1 - part[1])
                    sums.append((factor, accumulate_powers(octave, mine, part, own, carrier)))
            return _weighted(sums)

        return planes

    # One compilation serves every tau; only its own branch runs.
    index = _scalar(quantizer.tau).astype(jnp.int32) >> 1
    total = jax.lax.switch(index, [branch(1), branch(2), branch(4)], codes, right.codes, right.zero_point)
    return _scalar(quantizer.scale) * total


def _weighted(sums: list[tuple[float, jax.Array]]) -> jax.Array:
    """The sum of the arrays times their factors, in this order."""
    products = [unfused(np.float32(factor) * part) for factor, part in sums]
    return sum(products[1:], start=products[0])


def _scalar(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32).reshape(())


# ------------------------------------------------------------------------------------------------------ layers


def layer(codes: jax.Array, quantizer: Quantizer, weight: QuantizedWeight, carrier: Carrier) -> jax.Array:
    """A linear without its bias, or a convolution, on the codes of its input, as float32.

    Args:
        codes: (..., in), or (B, H, W, in) for a convolution; int32 codes of `quantizer`, which `supports` accepts.
        quantizer: of the input.
        weight: kernel (in, out), or (k, k, in, out).
        carrier: what carries the sums.
    """
    if len(weight.shape) == 4 and weight.shape[0] > 1:
        assert isinstance(quantizer, Uniform)
        # The border is zero, which has a code.
        zero = jnp.round(_scalar(quantizer.zero_point)).astype(jnp.int32)
        codes = shifted_copies(codes - zero, weight.shape[0]) + zero
    right = Operand(weight.codes().reshape(-1, weight.shape[-1]), weight.zero_point, weight.bits)
    total = multiply(quantizer, codes.reshape(-1, codes.shape[-1]), right, carrier)
    y = unfused(total * weight.scale)
    if isinstance(quantizer, Hybrid):
        y = y + unfused(_scalar(quantizer.minimum) * weight.scale * right.centred().sum(0))
    return y.reshape(*codes.shape[:-1], y.shape[-1])


def attend(
    sites: Mapping[str, Quantizer],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    biases: tuple[jax.Array, ...],
    carrier: Carrier,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention on codes.

    Args:
        sites: quantizers of "q", "k", "v" (uniform) and "softmax".
        q, k, v: int32 codes (..., M, d), (..., N, d), (..., N, d).
        biases: none, or the encoder's relative-position biases (..., M, H) and (..., M, W), N = H*W.
        carrier: what carries the sums.

    Returns:
        float32 (..., M, d), and the int32 codes of the probabilities (..., M, N).
    """
    keys, values = sites["k"], sites["v"]
    assert isinstance(keys, Uniform) and isinstance(values, Uniform)
    right = Operand(jnp.swapaxes(k, -1, -2), _scalar(keys.zero_point), keys.bits)
    scores = unfused(multiply(sites["q"], q, right, carrier) * (_scalar(keys.scale) * q.shape[-1] ** -0.5))
    if biases:
        bias_h, bias_w = biases
        grid = scores.reshape(*scores.shape[:-1], bias_h.shape[-1], bias_w.shape[-1])
        scores = (grid + bias_h[..., :, None] + bias_w[..., None, :]).reshape(scores.shape)
    codes = sites["softmax"].encode(nn.softmax(scores))
    right = Operand(v, _scalar(values.zero_point), values.bits)
    return unfused(multiply(sites["softmax"], codes, right, carrier) * _scalar(values.scale)), codes
