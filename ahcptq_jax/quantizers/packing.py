"""Packing of b-bit codes into bytes: a tight little-endian bit stream.

Code ``i`` occupies bits ``i*b .. i*b+b-1`` of the stream, lowest bit first, and bit ``j`` of the stream is bit
``j % 8`` of byte ``j // 8``. At 4 bits a byte holds two codes, the earlier one in its low half. The last byte is
padded with zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers.base import check_bits


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` take."""
    return (count * bits + 7) // 8


def pack(codes: jax.Array | np.ndarray, bits: int) -> jax.Array:
    """Packs integer codes of any shape (in C order) into a uint8 vector of ``packed_size`` bytes.

    Raises:
        ValueError: if ``bits`` is not 2 to 8, the codes are not integers or (when concrete) out of range.
    """
    check_bits(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers to be packed, got {codes.dtype}; encode the values first")
    if not isinstance(codes, jax.core.Tracer) and codes.size:
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 2**bits:
            raise ValueError(f"codes from {low} to {high} do not fit in {bits} bits; encode with the same bits")
    return _pack(codes, bits)


@functools.partial(jax.jit, static_argnames="bits")
def _pack(codes: jax.Array, bits: int) -> jax.Array:
    flat = codes.reshape(-1).astype(jnp.uint8)
    if bits == 8 or flat.size == 0:
        return flat
    if bits == 4:
        pairs = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 4)
    stream = jnp.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")  # (N, bits)
    return jnp.packbits(stream.reshape(-1), bitorder="little")


def unpack(packed: jax.Array | np.ndarray, bits: int, shape: Sequence[int]) -> jax.Array:
    """Inverse of ``pack``: uint8 codes of ``shape``.

    Raises:
        ValueError: if ``bits`` is not 2 to 8, or ``packed`` is not a uint8 vector of the size that ``shape`` needs.
    """
    check_bits(bits)
    shape = tuple(int(n) for n in shape)
    needed = packed_size(math.prod(shape), bits)
    if packed.dtype != jnp.uint8 or packed.shape != (needed,):
        raise ValueError(
            f"packed codes of shape {shape} at {bits} bits take {needed} uint8 bytes, got {packed.dtype} "
            f"{tuple(packed.shape)}; the data is truncated or belongs to another tensor"
        )
    return _unpack(packed, bits, shape)


@functools.partial(jax.jit, static_argnames=("bits", "shape"))
def _unpack(packed: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    count = math.prod(shape)
    if bits == 8 or count == 0:
        return jnp.asarray(packed).reshape(shape)
    if bits == 4:
        pairs = jnp.stack([packed & 15, packed >> 4], axis=1)
        return pairs.reshape(-1)[:count].reshape(shape)
    stream = jnp.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return jnp.packbits(stream, axis=1, bitorder="little").reshape(shape)
