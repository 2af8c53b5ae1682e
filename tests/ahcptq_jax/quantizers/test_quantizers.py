"""Quantizers: one table of shared contracts, official values and gradients, properties, failures."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ahcptq_jax import quantizers
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform, base

CHANNELS = 12
ALL_BITS = range(2, 9)
KINDS = ("uniform", "per_channel", "grouped", "log2", "log2_tau1", "log2_tau4", "hybrid", "hybrid_reach")


def make(kind: str, bits: int, factor: float = 1.0):
    """A quantizer of each kind; ``factor`` changes its numbers and nothing else."""
    top = 2**bits - 1
    groups = jnp.arange(CHANNELS) % 3
    return {
        "uniform": lambda: Uniform.from_range(-1.0 * factor, 2.0 * factor, bits),
        "per_channel": lambda: Uniform.from_range(
            -jnp.linspace(0.1, 1, CHANNELS) * factor, jnp.linspace(3, 0.5, CHANNELS), bits
        ),
        "grouped": lambda: Grouped(
            jnp.array([0.1, 0.5, 0.02]) * factor, jnp.array([0.0, top // 2, top], jnp.float32), groups, bits
        ),
        "log2": lambda: Log2(jnp.float32(0.9 * factor), jnp.int32(2), bits),
        "log2_tau1": lambda: Log2(jnp.float32(0.7 * factor), jnp.int32(1), bits),
        "log2_tau4": lambda: Log2(jnp.float32(0.7 * factor), jnp.int32(4), bits),
        "hybrid": lambda: Hybrid.from_range(-0.17 * factor, 4.0, 0.3, 0.25, bits),
        "hybrid_reach": lambda: Hybrid.from_range(-0.17 * factor, 4.0, 0.1, 0.5, bits, reach_maximum=True),
    }[kind]()


def sample(rows: int = 600) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(rows, CHANNELS)).astype(np.float32) * 1.5
    values[0] = 0.0
    values[1] = 1e-30
    values[2] = np.linspace(-100, 100, CHANNELS)
    return values


encode = jax.jit(lambda q, x: q.encode(x))
decode = jax.jit(lambda q, codes: q.decode(codes))
fake_quant = jax.jit(lambda q, x: q.fake_quant(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 6, 7))])
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, bits: int) -> None:
    quantizer, x = make(kind, bits).validate(CHANNELS), sample()
    codes, values = encode(quantizer, x), fake_quant(quantizer, x)
    assert codes.dtype == jnp.int32 and values.dtype == jnp.float32 and codes.shape == values.shape == x.shape
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    np.testing.assert_array_equal(values, decode(quantizer, codes))
    for channel in range(CHANNELS):
        assert len(np.unique(np.asarray(values)[:, channel])) <= 2**bits
    # Every code's value is a fixed point, and keeps its code unless another code has the same value.
    every = jnp.broadcast_to(jnp.arange(2**bits)[:, None], (2**bits, CHANNELS))
    grid = np.asarray(decode(quantizer, every))
    again = encode(quantizer, grid)
    np.testing.assert_array_equal(decode(quantizer, again), grid)
    for channel in range(CHANNELS):
        _, first, counts = np.unique(grid[:, channel], return_index=True, return_counts=True)
        alone = first[counts == 1]
        np.testing.assert_array_equal(again[:, channel][alone], alone)
        assert counts.max() == 1 or kind.startswith(("hybrid", "log2"))


@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_recompile(kind: str) -> None:
    traces = 0

    @jax.jit
    def counted(quantizer, x):
        nonlocal traces
        traces += 1
        return quantizer.fake_quant(x)

    results = [counted(make(kind, 4, factor), sample(8)) for factor in (1.0, 0.5)]
    assert traces == 1
    assert not np.array_equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_kept(kind: str) -> None:
    x = jnp.asarray(sample(8), jnp.bfloat16)
    assert make(kind, 4).fake_quant(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_layers(kind: str) -> None:
    x = sample(8)
    layers = [make(kind, 4, factor) for factor in (1.0, 0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *layers)
    together = jax.vmap(lambda q: q.fake_quant(x))(stacked)
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(together[i], layer.fake_quant(x))


def test_gradients_are_the_official_ones(golden) -> None:
    g = golden("grads_s0")
    bits = int(g["bits"])
    uniform = Uniform(jnp.asarray(g["lsq_scale"]), jnp.asarray(g["lsq_zp"], jnp.float32), bits)
    grouped = Grouped(jnp.asarray(g["group_scales"]), jnp.asarray(g["group_zp"]), jnp.asarray(g["group_labels"]), bits)
    hybrid = Hybrid(
        jnp.asarray(g["hybrid_fp_min"]),
        jnp.asarray(g["hybrid_scale_log"]),
        jnp.asarray(g["hybrid_scale_uni"]),
        jnp.asarray(g["hybrid_grid_rate"] * 2**bits),
        bits,
    )
    for prefix, x, quantizer, scales in (
        ("lsq", g["x"], uniform, {"scale": "lsq_grad_scale"}),
        ("group", g["x"], grouped, {"scale": "group_grad_scales"}),
        (
            "hybrid",
            g["hybrid_x"],
            hybrid,
            {"scale_log": "hybrid_grad_scale_log", "scale_uniform": "hybrid_grad_scale_uni"},
        ),
    ):

        def loss(quantizer, x):
            out = quantizers.fake_quant_lsq(quantizer, x)
            return jnp.sum(out * g["grad_out"]), out

        (grads, grad_x), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))(quantizer, jnp.asarray(x))
        np.testing.assert_allclose(out, g[f"{prefix}_out"], atol=1e-6)
        np.testing.assert_allclose(grad_x, g[f"{prefix}_grad_x"], atol=1e-5)
        for name, key in scales.items():
            np.testing.assert_allclose(getattr(grads, name), g[key], atol=1e-5)


def test_log2_gradients_are_the_official_ones(golden) -> None:
    g = golden("grads_s0")

    def loss(x, scale):
        out = quantizers.log2_fake_quant(x, scale, jnp.asarray(g["agq_tau"]), 2 ** int(g["bits"]))
        return jnp.sum(out * g["agq_grad_out"]), out

    (grad_x, grad_scale), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        jnp.asarray(g["agq_x"]), jnp.asarray(g["agq_scale"])
    )
    np.testing.assert_allclose(out, g["agq_out"], atol=1e-6)
    np.testing.assert_allclose(grad_x, g["agq_grad_x"], atol=1e-5)
    np.testing.assert_allclose(grad_scale, g["agq_grad_scale"], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_uniform_values_are_the_official_ones(bits: int, golden) -> None:
    g = golden("uniform_per_tensor_s0")
    quantizer = Uniform.from_range(g[f"min_val_b{bits}"], g[f"max_val_b{bits}"], bits)
    assert quantizer.zero_point == g[f"zero_point_b{bits}"]
    np.testing.assert_allclose(quantizer.fake_quant(g["x"]), g[f"out_b{bits}"], atol=1e-6)


def test_grouped_values_are_the_official_ones(golden) -> None:
    g = golden("cag_s0")
    quantizer = Uniform.from_range(g["min_val"], g["max_val"], int(g["bits"]))
    np.testing.assert_array_equal(quantizer.zero_point, g["zero_point"])
    np.testing.assert_allclose(quantizer.fake_quant(g["x"][0]), g["out_ungrouped_x0"], atol=1e-6)
    grouped = Grouped(g["grouped_scales_g4"], g["grouped_zero_points_g4"], g["labels_g4"], 4).validate(96)
    np.testing.assert_allclose(grouped.fake_quant(g["x"][0]), g["out_g4_x0"], atol=1e-6)


def test_log2_with_official_levels_gives_the_official_values(golden) -> None:
    g = golden("agq_s0")
    for i, tau in enumerate(g["taus"]):
        out = quantizers.log2_fake_quant(g["attention"][0], g["scales"][i], jnp.int32(tau), 16)
        np.testing.assert_allclose(out, g["out_log_tau"][i], atol=1e-6)
    # The official 4-bit output has 17 values; ours differs from it only in the one that makes way for zero.
    official = quantizers.log2_fake_quant(g["attention"][0], g["scale"], jnp.int32(g["tau"]), 16)
    ours = Log2(g["scale"], g["tau"], 4).fake_quant(g["attention"][0])
    assert len(np.unique(official)) == 17 and len(np.unique(ours)) == 16
    smallest = np.unique(official)[1]
    np.testing.assert_array_equal(ours, np.where(official == smallest, 0.0, official))


@pytest.mark.parametrize("name", ["hluq", "hluq_large"])
def test_hybrid_values_are_the_official_ones(name: str, golden) -> None:
    g = golden(f"{name}_s0")
    intended = g["out" if name == "hluq" else "out_intended"]
    minimum = g["running_min"][-1]
    for i, (range_rate, grid_rate) in enumerate(g["candidates"]):
        quantizer = Hybrid.from_range(minimum, g["running_max"][-1] - minimum, range_rate, grid_rate, 4)
        np.testing.assert_allclose(quantizer.scale_log, g["out_scale_log"][i], rtol=1e-6)
        np.testing.assert_allclose(quantizer.scale_uniform, g["out_scale_uni"][i], rtol=1e-6)
        np.testing.assert_allclose(quantizer.fake_quant(g["x"][0]), intended[i], atol=1e-5)


def test_hybrid_does_not_have_the_official_defect(golden) -> None:
    """The official zero rule also hits large values of the uniform region, which collapse to scale_log."""
    g = golden("hluq_large_s0")
    minimum = g["running_min"][-1]
    collapsed = 0
    for i, (range_rate, grid_rate) in enumerate(g["candidates"]):
        quantizer = Hybrid.from_range(minimum, g["running_max"][-1] - minimum, range_rate, grid_rate, 4)
        ours, defect = np.asarray(quantizer.fake_quant(g["x"][0])), g["defect_mask"][i].astype(bool)
        np.testing.assert_allclose(ours[~defect], g["out"][i][~defect], atol=1e-5)
        np.testing.assert_allclose(g["out"][i][defect], minimum + g["out_scale_log"][i], atol=1e-5)
        # What the rule hits but rounds to the first uniform code is at scale_log anyway.
        moved = ours[defect] - (minimum + g["out_scale_log"][i])
        assert np.all(moved >= -1e-5)
        collapsed += int(np.sum(moved > 0.1))
    assert collapsed > 100


def test_hybrid_code_layout() -> None:
    quantizer = Hybrid(jnp.float32(-1.0), jnp.float32(0.5), jnp.float32(0.25), jnp.float32(3), 3)
    expected = [-0.5, -0.75, -0.875, -1.0, -0.25, 0.0, 0.25, 0.5]
    np.testing.assert_array_equal(decode(quantizer, jnp.arange(8)), expected)
    np.testing.assert_array_equal(encode(quantizer, jnp.array(expected)), np.arange(8))
    # Uniform code 0 coincides with log code 0; below the minimum is zero; above the range is the last code.
    np.testing.assert_array_equal(encode(quantizer, jnp.array([-0.45, -3.0, 9.0])), [0, 3, 7])


def test_log2_zero_is_the_last_code() -> None:
    quantizer = Log2(1.0, 1, 2)
    np.testing.assert_array_equal(decode(quantizer, jnp.arange(4)), [1.0, 0.5, 0.25, 0.0])
    np.testing.assert_array_equal(encode(quantizer, jnp.array([2.0, 0.5, 0.2, 0.1, 0.0, -1.0])), [0, 1, 2, 3, 3, 3])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("grid_rate", [1 / 8, 1 / 4, 1 / 2])
def test_hybrid_from_range_keeps_both_parts(bits: int, grid_rate: float) -> None:
    for reach in (False, True):
        quantizer = Hybrid.from_range(-0.2, 2.0, 0.3, grid_rate, bits, reach).validate()
        assert 1 <= quantizer.log_levels <= 2**bits - 2
        top = float(quantizer.decode(jnp.int32(2**bits - 1)))
        if reach:
            assert top == pytest.approx(1.8, abs=1e-5)
        elif bits >= 3:
            assert top < 1.8 - 1e-4  # The paper's step leaves the top of the range out of reach.


def test_top_of_range_is_cut_unless_the_step_reaches_it() -> None:
    for grid_rate, top in ((1 / 8, 1.88), (1 / 4, 1.86), (1 / 2, 1.79)):
        paper = Hybrid.from_range(0.0, 1.9, 0.1, grid_rate, 4)
        assert float(paper.fake_quant(1.9)) == pytest.approx(top, abs=0.005)
        reaching = Hybrid.from_range(0.0, 1.9, 0.1, grid_rate, 4, reach_maximum=True)
        assert float(reaching.fake_quant(1.9)) == pytest.approx(1.9, abs=1e-6)


def test_hybrid_beats_uniform_on_gelu_tails() -> None:
    x = jax.nn.gelu(jax.random.normal(jax.random.key(0), (4096,)), approximate=False)
    x = x.at[:8].set(jnp.linspace(6.0, 12.0, 8))  # Rare large activations stretch the range.
    low, high = jnp.min(x), jnp.max(x)
    hybrid = Hybrid.from_range(low, high - low, 0.1, 0.5, 4)
    errors = [float(jnp.mean(jnp.square(q.fake_quant(x) - x))) for q in (hybrid, Uniform.from_range(low, high, 4))]
    assert errors[0] < errors[1]


def test_scale_gradient() -> None:
    value, grad = jax.value_and_grad(lambda s: jnp.sum(quantizers.scale_gradient(s, 0.25) ** 2))(jnp.array([3.0]))
    assert value == 9.0 and grad[0] == 1.5
    assert quantizers.lsq_factor(100, 4, 4) == pytest.approx((25 * 15) ** -0.5)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.floats(2.0**-100, 1.0, width=32), min_size=16, max_size=16), st.sampled_from([1, 2, 4]))
def test_octave_rounding_is_that_of_exact_log2(values: list[float], tau: int) -> None:
    ratio = np.array(values, np.float32)
    exact = -tau * np.log2(ratio.astype(np.float64))
    rounded = np.asarray(base.round_to_octave_fraction(jnp.asarray(ratio), jnp.int32(tau)))
    assert np.all(np.abs(rounded - exact) <= 0.5 + 1e-6)
    if tau == 1:
        np.testing.assert_array_equal(base.round_to_octave(jnp.asarray(ratio)), rounded)
    np.testing.assert_allclose(
        base.negative_power_of_root(jnp.asarray(rounded), tau), 2.0 ** (-rounded / tau), rtol=2e-7
    )


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.lists(st.floats(-50, 50, width=32), min_size=16, max_size=16),
)
def test_fake_quant_is_monotonic(kind: str, bits: int, values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    x = np.broadcast_to(ordered[:, None], (16, CHANNELS))
    assert np.all(np.diff(np.asarray(fake_quant(make(kind, bits), x)), axis=0) >= 0)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.floats(-10, 0, width=32), st.floats(0.125, 10, width=32), st.integers(2, 8))
def test_uniform_error_is_at_most_a_step(low: float, high: float, bits: int) -> None:
    quantizer = Uniform.from_range(low, high, bits)
    x = jnp.linspace(low, high, 64)
    # Half a step inside; the rounded zero point moves the ends by as much again.
    assert float(jnp.max(jnp.abs(quantizer.fake_quant(x) - x))) <= 1.001 * float(quantizer.scale)


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, True, "4"])
def test_bad_bits(bits, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the checks of types that only tests have, which would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for build in (
        lambda: Uniform(1.0, 0.0, bits),
        lambda: Grouped(jnp.ones(1), jnp.zeros(1), jnp.zeros(4, jnp.int32), bits),
        lambda: Log2(1.0, 2, bits),
        lambda: Hybrid(0.0, 1.0, 1.0, 2.0, bits),
        lambda: quantizers.qparams_from_range(0.0, 1.0, bits),
    ):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            build()


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (Uniform(jnp.float32(np.nan), 0.0, 4), "scale must be finite and positive"),
        (Uniform(0.0, 0.0, 4), "scale must be finite and positive"),
        (Uniform(jnp.ones(3), jnp.zeros(2), 4), "same shape"),
        (Uniform(1.0, 16.0, 4), "zero_point must hold integers from 0 to 15"),
        (Uniform(1.0, 0.5, 4), "zero_point must hold integers"),
        (Uniform(jnp.ones(3), jnp.zeros(3), 4), "one entry for each channel"),
        (
            Grouped(jnp.ones(2), jnp.zeros(2), jnp.array([0, 1, 2] + [0] * 9), 4),
            "groups must hold integers from 0 to 1",
        ),
        (Grouped(jnp.ones(2), jnp.zeros(2), jnp.zeros(5, jnp.int32), 4), "one label for each of the 12"),
        (Grouped(jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.zeros(12, jnp.int32), 4), r"must both be \(G,\)"),
        (Log2(-1.0, 2, 4), "scale must be finite and positive"),
        (Log2(1.0, 3, 4), "tau must be one of"),
        (Log2(jnp.ones(3), 2, 4), "must be scalars"),
        (Hybrid(np.inf, 1.0, 1.0, 4.0, 4), "minimum must be finite"),
        (Hybrid(0.0, 0.0, 1.0, 4.0, 4), "scale_log must be finite and positive"),
        (Hybrid(0.0, 1.0, np.nan, 4.0, 4), "scale_uniform must be finite and positive"),
        (Hybrid(0.0, 1.0, 1.0, 15.0, 4), "log_levels must hold integers from 0 to 14"),
        (Hybrid(0.0, 1.0, 1.0, 0.0, 4), "log_levels must be finite and positive"),
        (Hybrid(0.0, jnp.ones(2), 1.0, 4.0, 4), "scale_log of a hybrid quantizer must be a scalar"),
    ],
)
def test_validate_refuses(quantizer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer.validate(CHANNELS)


def test_inputs_of_a_wrong_width_are_refused() -> None:
    x = jnp.ones((4, 5))
    with pytest.raises(ValueError, match="last axis must be the channels"):
        make("grouped", 4).fake_quant(x)
    with pytest.raises(ValueError, match="one entry for each channel"):
        make("per_channel", 4).encode(x)
