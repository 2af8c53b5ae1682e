"""What a unit's learning is made of: drops, rates, rows from disk, regrouping, methods as records."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.methods import RECONSTRUCTION_METHODS
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.reconstruction import drops, learning, units
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.objectives import LocalError
from ahcptq_jax.reconstruction.regrouping import regroup
from ahcptq_jax.reconstruction.together import Deal
from ahcptq_jax.reconstruction.units import gather
from experiments.bench.learning import float_mlp_step, mlp_step
from sam_flax.layers import Linear


def test_gather_spills_to_disk(tmp_path):
    rows = [(np.full((2, 3), i, np.float32), np.full(4, -i, np.float32)) for i in range(5)]
    inside, outside = gather(rows, 5, 5 * 40, tmp_path), gather(rows, 5, 5 * 40 - 1, tmp_path)
    assert not isinstance(inside[0], np.memmap) and isinstance(outside[0], np.memmap)
    for a, b in zip(inside, outside, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mix(share):
    mixed = drops.mix(jnp.array([1, 2], jnp.uint32), jnp.zeros((100, 100)), jnp.ones((100, 100)), share)
    assert abs(float(mixed.mean()) - share) < 0.02
    assert share not in (0.0, 1.0) or float(mixed.mean()) == share


def test_learned_gradients_are_the_official_ones(golden):
    """Of a step without drops; `test_quantizers` has every quantizer, `test_adaround` the rounding."""
    g = golden("grads_s0")
    labels, zero = jnp.asarray(g["group_labels"]), jnp.asarray(g["group_zp"])
    quantizers = learning.padded(Grouped(g["group_scales"], zero, labels, int(g["bits"])))

    def loss(scale):
        handle = drops.dropping({"input": dataclasses.replace(quantizers, scale=scale)}, jnp.zeros((1, 2)), 0.0)
        return jnp.sum(handle("input", jnp.asarray(g["x"])) * g["grad_out"])

    found = np.asarray(jax.grad(loss)(quantizers.scale))
    groups = len(g["group_scales"])
    np.testing.assert_allclose(found[:groups], g["group_grad_scales"], atol=1e-5)
    assert not found[groups:].any()  # the room for more groups


def test_drops_are_independent():
    """Uniform words, without correlation between neighbours, rows, seeds, or bits."""
    seeds = jax.random.bits(jax.random.key(0), (4, 2), jnp.uint32)
    words = np.stack([np.asarray(drops._random_words(seed, (512, 512))) for seed in seeds])
    signs = (words >> 31).astype(float) * 2 - 1
    limit = 5 / 512  # five deviations of a mean over 512 * 512 signs
    assert np.abs(signs.mean((1, 2))).max() < limit
    for a, b in [
        (signs[:, :, 1:], signs[:, :, :-1]),
        (signs[:, 1:], signs[:, :-1]),
        (signs[1:], signs[:-1]),
        (signs, (words >> 30 & 1) * 2.0 - 1),
    ]:
        assert np.abs((a * b).mean((1, 2))).max() < limit
    counts, _ = np.histogram(words, 256, (0, 2**32))
    assert (np.square(counts - words.size / 256).sum() / (words.size / 256)) < 256 + 5 * 22.6  # chi squared


def test_rates_keep_their_travel_in_few_iterations():
    assert ReconstructionConfig().rates() == (1e-3, 1e-4)
    assert ReconstructionConfig(relative_steps=False).rates() == (1e-3, 4e-5)
    np.testing.assert_allclose(ReconstructionConfig(iterations=200).rates(), (1e-2, 1e-2))
    np.testing.assert_allclose(ReconstructionConfig(iterations=200, relative_steps=False).rates(), (1e-2, 4e-3))
    assert ReconstructionConfig(iterations=1).rates()[1] == 0.05
    assert ReconstructionConfig(iterations=200, rounding_rate=0.5).rates()[0] == 0.5


def learned_scale(unit: float, **changes) -> float:
    """The scale after 20 iterations on a linear layer whose inputs are measured in `unit`."""
    rng = np.random.default_rng(0)
    x, kernel, target = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 1, 8, 4), (4, 3), (2, 1, 8, 3)])
    config = ReconstructionConfig(iterations=20, learn_rounding=False, activation_drop=0, scale_rate=1e-2, **changes)
    params = {"kernel": kernel / unit, "bias": jnp.zeros(3)}
    quantizers = {"input": Uniform.from_range(-2 * unit, 2 * unit, 4)}
    problem, state = learning.start(params, {}, quantizers, config)
    state, _ = learning.advance(
        problem,
        state,
        ((x * unit,), (x * unit,), target, ()),
        jnp.arange(20) % 2,
        jnp.int32(0),
        jnp.int32(20),
        jax.random.key(0),
        how=learning.Learning(units.Operation(Linear(4, 3, parent=None)), LocalError(1), config),
    )
    return float(state.quantizers["input"].scale)


def test_relative_steps_do_not_depend_on_the_unit_of_measure():
    first, second = learned_scale(1.0), learned_scale(64.0)
    assert abs(first / (4 / 15) - 1) > 0.02, "it was learned"
    np.testing.assert_allclose(second / 64, first, rtol=1e-3)
    absolute = [learned_scale(unit, relative_steps=False) / unit for unit in (1.0, 64.0)]
    assert abs(absolute[0] - absolute[1]) > 0.005


def test_chunks_from_disk_fit_the_memory(tmp_path):
    rows = [(np.full((1, 10), i, np.float32),) * 3 for i in range(6)]
    arrays = gather(rows, 6, 0, tmp_path)
    data = units.Dataset(arrays[:1], arrays[1:2], arrays[2])
    feed = units.Feeder(data, 50, Deal(2, 6, None), budget=5 * 120)
    assert feed.chunk == 2  # iterations of two rows of 120 bytes
    (quantized, _, target, _), places = feed(np.array([[2, 1], [1, 1]]))
    assert len(target) == 4
    # The first slot has images 0, 2 and 4 to draw from, the second 1, 3 and 5.
    np.testing.assert_array_equal(quantized[0][places[0]][..., 0, 0], [[4, 3], [2, 3]])
    assert units.Feeder(data, 50, Deal(1, 6, None), budget=1).chunk == 1
    inside = gather(rows, 6, 10**6, tmp_path)
    assert units.Feeder(units.Dataset(inside[:1], inside[1:2], inside[2]), 50, Deal(1, 6, None), budget=1).chunk == 50


def test_regrouping_keeps_the_room_and_sums_the_moments():
    scale = jnp.array([0.1, 0.11, 0.5, 0.52, 0.9, 0.91])
    zero = jnp.array([0.0, 0, 8, 8, 15, 15])
    quantizers = {"input": Grouped(scale, zero, jnp.arange(6), 4), "q": Uniform(jnp.float32(1), jnp.float32(0), 4)}
    _, state = learning.start({}, {}, quantizers, ReconstructionConfig())
    adam, *rest = state.scale_moments
    mu, nu = adam.mu | {"input": {"scale": jnp.arange(6.0)}}, adam.nu | {"input": {"scale": jnp.arange(6.0) ** 2}}
    state = dataclasses.replace(state, scale_moments=(adam._replace(mu=mu, nu=nu), *rest))
    grouped = regroup(state, 3, 2, "normalized")
    found = grouped.quantizers["input"]
    assert jax.tree.map(jnp.shape, grouped) == jax.tree.map(jnp.shape, state)
    labels = np.asarray(found.groups)
    assert len(set(labels)) == 3 and (labels[::2] == labels[1::2]).all()
    np.testing.assert_allclose(found.per_channel().scale, np.repeat([0.105, 0.51, 0.905], 2), rtol=1e-5)
    moments = grouped.scale_moments[0]
    np.testing.assert_allclose(moments.mu["input"]["scale"][labels[::2]], [1, 5, 9], rtol=1e-6)
    np.testing.assert_allclose(moments.nu["input"]["scale"][labels[::2]], [1, 25, 81], rtol=1e-5)
    # A second rung counts a group of several channels once.
    again = regroup(grouped, 2, 2, "normalized")
    assert len(set(np.asarray(again.quantizers["input"].groups))) == 2
    np.testing.assert_allclose(again.scale_moments[0].mu["input"]["scale"].sum(), 15, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": -1}, "iterations"),
        ({"batch": 0}, "batch"),
        ({"input_drop": 1.5}, "input_drop"),
        ({"scale_rate": float("nan")}, "scale_rate"),
        ({"beta_end": 0.5}, "beta_end"),
        ({"parts": ("encoder",)}, "encoder"),
    ],
)
def test_unusable_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**changes)


def test_methods_are_records_of_switches():
    assert set(RECONSTRUCTION_METHODS) == {
        "adaround",
        "brecq",
        "qdrop",
        "ptq4sam_l",
        "ahcptq",
        "ahcptq_mixed",
        "ahcq_sam",
        "saq_sam",
    }
    for method in RECONSTRUCTION_METHODS.values():
        assert method.quant_config(w_bits=5).w_bits == 5
        assert method.reconstruction_config(iterations=7).iterations == 7
    full = RECONSTRUCTION_METHODS["ahcptq"]
    assert full.quant_config() == QuantConfig() and full.reconstruction_config() == ReconstructionConfig()
    assert not RECONSTRUCTION_METHODS["adaround"].reconstruction_config().learn_scales
    assert RECONSTRUCTION_METHODS["brecq"].reconstruction_config().activation_drop == 0
    assert not RECONSTRUCTION_METHODS["ptq4sam_l"].quant_config().cag


@pytest.mark.slow
def test_a_step_costs_little_more_than_a_float_step(capsys):
    """The MLP of SAM-B on 4096 tokens: a step that learns rounding and scales, against plain gradients of weights.

    In processor seconds, which other work on the machine changes little; `experiments.benchmark` has wall seconds.
    """
    steps = [make(768, 3072, 64) for make in (mlp_step, float_mlp_step)]

    def seconds(step):
        began = time.process_time()
        jax.block_until_ready(step())
        return time.process_time() - began

    ours, plain = np.median([[seconds(step) for step in steps] for _ in range(6)][1:], axis=0)
    with capsys.disabled():
        print(f"\nMLP 768-3072-768, 4096 tokens: step {ours:.2f} s, float step {plain:.2f} s, ratio {ours / plain:.2f}")
    assert ours / plain < 2


GRID_CASES = {
    "uniform": Uniform(jnp.float32(0.3), jnp.float32(5), 4),
    "grouped": Grouped(jnp.array([0.31, 0.5, 1.13]), jnp.array([3.0, 8.0, 12.0]), jnp.arange(8) % 3, 4),
    "hybrid": Hybrid.from_range(-0.17, 3.0, 0.3, 0.25, 4),
    "log2": Log2(jnp.float32(0.7), jnp.int32(2), 4),
}


@pytest.mark.parametrize("kind", GRID_CASES)
@pytest.mark.parametrize("bits", [6, 8])
def test_learning_on_the_grid_computes_on_it_and_learns_beside_it(kind, bits):
    """The forward is that of the quantizer on the grid, exactly; gradients are those with respect to its own scales."""
    quantizer = GRID_CASES[kind]
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 3, (5, 8)), jnp.float32)
    expected = kind_named(kind).on_grid(quantizer, bits)
    found = learning.on_grid(quantizer, bits)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    learned = kind_named(kind).learned_values(quantizer)

    def loss(values):
        return jnp.sum(learning.on_grid(dataclasses.replace(quantizer, **values), bits).fake_quant(x) ** 2)

    def loss_there(values):
        return jnp.sum(dataclasses.replace(expected, **values).fake_quant(x) ** 2)

    gradients = jax.grad(loss)(learned)
    there = jax.grad(loss_there)(kind_named(kind).learned_values(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradients, there)


def test_channels_that_are_not_grouped_yet_stay_off_the_grid():
    alone = Grouped(jnp.linspace(0.1, 5.0, 16), jnp.full(16, 7.0), jnp.arange(16), 4)
    assert learning.on_grid(alone, 8) is alone


def test_what_is_finished_is_on_the_grid():
    quantizers = dict(GRID_CASES)
    problem, state = learning.start({}, {}, quantizers, ReconstructionConfig())
    _, found = learning.finish(problem, state, {}, quantizers, 0, 8)
    for kind, quantizer in found.items():
        expected = kind_named(kind).on_grid(quantizers[kind], 8)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), quantizer, expected)
