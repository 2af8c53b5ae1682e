"""Levels: every kind is a codebook of whole numbers on one step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, LogNonlinear, Uniform
from ahcptq_jax.quantizers.kinds import kind_named, kind_of
from ahcptq_jax.quantizers.log_nonlinear import ALPHAS

CHANNELS = 11
GRIDS = (5, 6, 7, 8)


def scales(least=2e-3, most=30.0):
    return st.floats(least, most).map(np.float32)


@st.composite
def quantizers(draw, bits):
    """Any sound quantizer of any built-in kind."""
    kind = draw(st.sampled_from(["uniform", "grouped", "log2", "hybrid", "log_nonlinear"]))
    zeros = st.integers(0, 2**bits - 1).map(np.float32)
    if kind == "uniform":
        return Uniform(draw(scales()), draw(zeros), bits)
    if kind == "log2":
        return Log2(draw(scales()), np.int32(draw(st.sampled_from([1, 2, 4]))), bits)
    if kind == "log_nonlinear":
        return LogNonlinear(np.float32(draw(st.sampled_from(ALPHAS))), draw(scales()), bits)
    if kind == "grouped":
        groups = draw(st.integers(1, 6))
        scale, zero = ([draw(of) for _ in range(groups)] for of in (scales(0.1, 3.0), zeros))
        labels = draw(st.lists(st.integers(0, groups - 1), min_size=CHANNELS, max_size=CHANNELS))
        return Grouped(np.array(scale, np.float32), np.array(zero, np.float32), np.array(labels, np.int32), bits)
    log_levels = np.float32(draw(st.integers(1, 2**bits - 2)))
    return Hybrid(np.float32(draw(st.floats(-1, 0))), draw(scales()), draw(scales()), log_levels, bits)


def all_codes(quantizer):
    """Every code, at every channel where channels differ."""
    codes = np.arange(2**quantizer.bits)
    return np.broadcast_to(codes[:, None], (len(codes), CHANNELS)) if isinstance(quantizer, Grouped) else codes


@pytest.mark.parametrize("bits", [2, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 5, 6, 7))])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_levels_of_a_quantizer_on_the_grid_are_its_values(bits, data):
    quantizer = data.draw(quantizers(bits))
    kind = kind_of(quantizer)
    grid_bits = data.draw(st.sampled_from([g for g in GRIDS if g >= bits]))
    on_grid = kind.on_grid(quantizer, grid_bits).validate(CHANNELS)
    levels, codes = kind.levels(on_grid), all_codes(quantizer)
    table = np.asarray(levels.table)
    signed = -128 <= table.min() and table.max() <= 127
    assert table.dtype == np.int32 and (signed or (table.min() >= 0 and table.max() <= 255))
    assert isinstance(quantizer, Uniform | Grouped) or table.max() < 2**grid_bits
    values = np.asarray(on_grid.decode(codes))
    tolerance = 3e-6 * np.abs(np.asarray(levels.step) * np.maximum(np.abs(table).max(), 128)).max()
    np.testing.assert_allclose(levels.decode(codes), values, rtol=3e-6, atol=tolerance)
    # What is on the grid stays as it is.
    again = kind.on_grid(on_grid, grid_bits)
    np.testing.assert_allclose(again.decode(codes), values, rtol=1e-5, atol=tolerance)
    np.testing.assert_array_equal(kind.levels(again).table, table)


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_levels_of_a_quantizer_off_the_grid_are_those_of_the_nearest(bits, data):
    quantizer = data.draw(quantizers(bits))
    kind = kind_of(quantizer)
    np.testing.assert_array_equal(kind.levels(quantizer).table, kind.levels(kind.on_grid(quantizer, 8)).table)


@pytest.mark.parametrize(
    "quantizer",
    [
        Uniform(jnp.float32(0.3), jnp.float32(7), 4),
        Grouped(jnp.array([0.3, 0.5, 1.1]), jnp.array([3.0, 8.0, 15.0]), jnp.arange(CHANNELS) % 3, 4),
        Log2(jnp.float32(0.7), jnp.int32(2), 4),
        LogNonlinear(jnp.float32(20), jnp.float32(0.7), 4),
        Hybrid.from_range(-0.17, 4.0, 0.3, 0.25, 4),
    ],
    ids=lambda q: type(q).__name__,
)
def test_the_grid_is_traceable(quantizer):
    """Learning puts scales on the grid in every step; values may differ by how a compiler orders products."""
    kind = kind_of(quantizer)
    plain, traced = kind.on_grid(quantizer, 8), jax.jit(lambda q: kind.on_grid(q, 8))(quantizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, traced)
    np.testing.assert_array_equal(jax.jit(kind.levels)(plain).table, kind.levels(plain).table)


@pytest.mark.parametrize("seed", range(5))
def test_scales_move_as_little_as_the_trial_has_it(seed):
    """At 4 bits on 8: hybrid scales by 2 %, group scales by about 10 %."""
    rng = np.random.default_rng(seed)
    for range_rate in (0.1, 0.3, 0.5):
        for grid_rate in (1 / 8, 1 / 4, 1 / 2):
            hybrid = Hybrid.from_range(-0.17, rng.uniform(1, 20), range_rate, grid_rate, 4)
            on_grid = kind_named("hybrid").on_grid(hybrid, 8)
            if grid_rate == 1 / 2:
                # Eight octaves need all of 8 bits: where the uniform part finds no room, the lowest are given up.
                assert on_grid.log_levels <= hybrid.log_levels
            else:
                assert on_grid.log_levels == hybrid.log_levels
                for name in ("scale_log", "scale_uniform"):
                    moved = float(getattr(on_grid, name)) / float(getattr(hybrid, name))
                    assert moved == pytest.approx(1, rel=0.04), (range_rate, grid_rate)
            last = 2**4 - 1
            np.testing.assert_allclose(on_grid.decode(last), hybrid.decode(last), rtol=1e-5)
    groups = Grouped(rng.uniform(0.2, 1, 4).astype(np.float32), np.full(4, 7.0), np.arange(32) % 4, 4)
    moved = kind_named("grouped").on_grid(groups, 8).scale / groups.scale
    assert np.abs(moved - 1).max() < 0.15


def test_room_without_channels_does_not_move_the_grid():
    groups = Grouped(np.array([0.3, 0.5, 1.1], np.float32), np.full(3, 7.0), np.arange(6) % 3, 4)
    kind = kind_named("grouped")
    assert kind.channel_groups is not None
    padded = dataclasses.replace(groups, scale=np.append(groups.scale, [9.0]), zero_point=np.full(4, 0.0))
    padded = dataclasses.replace(padded, zero_point=np.append(groups.zero_point, 0.0))
    np.testing.assert_allclose(kind.on_grid(padded, 8).scale[:3], kind.on_grid(groups, 8).scale, rtol=1e-6)


def test_a_grid_too_narrow_for_the_codes_is_refused_where_nothing_fits():
    with pytest.raises(ValueError, match="do not fit on a grid"):
        kind_named("hybrid").on_grid(Hybrid.from_range(0.0, 1.0, 0.3, 0.25, 8), 6)
