"""Packing: exact round trips, the documented layout, refusals."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.quantizers import packing


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.integers(2, 8), st.sampled_from([(0,), (1,), (7,), (8,), (3, 5), (2, 3, 4, 5)]), st.integers(0, 99)
)
def test_round_trip_is_exact_and_tight(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.int32)
    packed = packing.pack(codes, bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (-(-codes.size * bits // 8),)
    unpacked = packing.unpack(packed, bits, shape)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 13)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    expected = stream.to_bytes(packing.packed_size(13, bits), "little")
    assert bytes(np.asarray(packing.pack(codes, bits))) == expected


def test_two_codes_of_four_bits_share_a_byte() -> None:
    np.testing.assert_array_equal(packing.pack(jnp.array([1, 15, 7]), 4), [0xF1, 0x07])


def test_works_under_jit() -> None:
    codes = jnp.arange(30).reshape(5, 6) % 8
    again = jax.jit(lambda codes: packing.unpack(packing.pack(codes, 3), 3, (5, 6)))(codes)
    np.testing.assert_array_equal(again, codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not fit in 4 bits"):
        packing.pack(np.array([16]), 4)
    with pytest.raises(ValueError, match="do not fit"):
        packing.pack(np.array([-1]), 4)
    with pytest.raises(ValueError, match="codes must be integers"):
        packing.pack(np.array([1.0]), 4)
    with pytest.raises(ValueError, match="bits must be"):
        packing.pack(np.array([1]), 9)
    with pytest.raises(ValueError, match="truncated"):
        packing.unpack(np.zeros(3, np.uint8), 4, (8,))
    with pytest.raises(ValueError, match="uint8"):
        packing.unpack(np.zeros(4, np.int32), 4, (8,))
