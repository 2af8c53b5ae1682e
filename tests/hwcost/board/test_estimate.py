"""The accelerator model: what fits, and what time and energy must obey."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hwcost
from ahcptq_jax import W4A4, QuantConfig
from hwcost.board.accelerator import PRESETS, Accelerator, Design, cores, element_count, element_options, passes
from hwcost.board.constants import CONSTANTS, Constant, draws, nominal, yosys_cells
from hwcost.board.estimate import RESOURCES, Estimate, estimate
from hwcost.counts.counts import Counts
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.config import VIT_B

# The paper's form of W4A4, without the grid that is the default.
PAPER = dataclasses.replace(W4A4, grid_bits=0)
ZCU102 = PRESETS["zcu102"]
UNIFORM = QuantConfig(hluq=False, cag=False, agq=False)
FP32 = Design(element="float", bits=32, float_bits=32)
DUAL = Design(element="two_path", bits=4, float_bits=16)
MAC = Design(element="mac", bits=4, float_bits=16)


@pytest.fixture(scope="module")
def mini() -> Counts:
    return hwcost.count(MINI, PAPER, float_bits=16)


@pytest.fixture(scope="module")
def vit_b() -> Estimate:
    return estimate(hwcost.count(VIT_B, PAPER, float_bits=16), DUAL, ZCU102, nominal())


def test_every_constant_says_where_it_is_from() -> None:
    for c in CONSTANTS.values():
        assert c.source and c.unit and c.low <= c.value <= c.high <= c.most
    with pytest.raises(ValueError, match="must lie between"):
        Constant(name="x", value=3, unit="1", low=1, high=2, source="here", status="assumption")


def test_draws_stay_in_their_ranges_and_repeat() -> None:
    first, again = draws(50, 1), draws(50, 1)
    for name, c in CONSTANTS.items():
        assert first[name].shape == (50,) and np.array_equal(first[name], again[name])
        assert c.low <= first[name].min() <= first[name].max() <= c.high


def test_measured_areas_order_as_the_arithmetic_does() -> None:
    cells = yosys_cells()
    for bits in range(2, 9):
        assert cells[f"mac_b{bits}"]["lut"] < cells[f"hluq_b{bits}"]["lut"], "two paths cost more than one"
        if bits > 2:
            assert cells[f"mac_b{bits}"]["lut"] > cells[f"mac_b{bits - 1}"]["lut"]
    taus = [cells[f"agq_b4_tau{tau}"]["ff"] for tau in (1, 2, 4)]
    assert taus == sorted(taus), "an accumulator for each residue"


OPTION = st.tuples(st.integers(1, 40), st.integers(0, 4))


@given(options=st.lists(OPTION, min_size=1, max_size=2), luts=st.integers(1, 200), dsps=st.integers(1, 40))
def test_the_mix_of_elements_is_the_best_one(options: list[tuple[int, int]], luts: int, dsps: int) -> None:
    best = element_count([(float(a), float(b)) for a, b in options], float(luts), float(dsps))
    whole = 0
    for first in range(luts // options[0][0] + 1):
        lut, dsp = luts - first * options[0][0], dsps - first * options[0][1]
        if dsp < 0:
            break
        second = 0
        if len(options) == 2:
            l2, d2 = options[1]
            second = min(lut // l2, dsp // d2 if d2 else 10**9)
        whole = max(whole, first + second)
    assert whole <= best + 1e-9 and best <= whole + 2 + 1e-9, "within rounding to whole elements"


@given(elements=st.integers(1, 20_000), side=st.sampled_from([8, 16, 32, 64]))
def test_cores_use_most_of_the_elements_and_no_more(elements: int, side: int) -> None:
    rows, columns, count = (int(x) for x in cores(float(elements), side))
    assert rows * columns * count <= elements
    assert rows * columns * count >= 0.8 * elements or elements < 64


def test_passes_follow_from_widths(mini: Counts) -> None:
    layers = {layer.path: layer for layer in mini.layers}
    lin2, av = layers["image_encoder/blocks_0/mlp/lin2"], layers["image_encoder/blocks_0/attn/av"]
    qkv = layers["image_encoder/blocks_0/attn/qkv"]
    assert passes(qkv, MAC) == passes(qkv, DUAL) == passes(lin2, DUAL) == 1
    assert lin2.log_levels == 4 and passes(lin2, MAC) == 2, "1, 2, 4, 8 fit in four bits; and the uniform part"
    for tau in (1, 2, 4):
        layer = dataclasses.replace(av, accumulators=tau)
        assert passes(layer, MAC) == 4, "15 octaves by 4 bits, 2 x 8 by 4, 4 x 4 by 4"
        assert passes(layer, DUAL) == {1: 2, 2: 2, 4: 4}[tau]
        assert passes(layer, dataclasses.replace(MAC, element="ideal")) == 1


def test_levels_on_the_grid_take_one_pass_and_a_table_for_each_row(mini: Counts) -> None:
    grid = hwcost.count(MINI, PAPER, float_bits=16, grid_bits=8)
    eight = Design(element="levels", bits=4, level_bits=8, table_address=4, float_bits=16)
    assert {passes(layer, eight) for layer in grid.layers} == {1}
    cells, v = yosys_cells(), nominal()
    assert [cells[f"levels_b4_l{bits}"]["lut"] for bits in (5, 6, 7, 8)] == [53, 60, 67, 74]
    assert cells["mac_b4"]["lut"] < cells["levels_b4_l8"]["lut"] < cells["hluq_b4"]["lut"]
    table = cells["level_table_a4_l8"]["lut"]
    for side in (8, 32):
        packed, plain = element_options(eight, v, side)
        assert plain == (pytest.approx(cells["levels_b4_l8"]["lut"] + table / side), 0)
        assert packed == (pytest.approx(v["int4_dsp_mac_lut"] + 4 + table / side), 0.5)
    grouped = element_options(dataclasses.replace(eight, table_address=6), v)
    assert grouped[1][0] - element_options(eight, v)[1][0] == pytest.approx(
        (cells["level_table_a6_l8"]["lut"] - table) / 32
    )
    widths = [element_options(dataclasses.replace(eight, level_bits=bits), v) for bits in (6, 7, 8)]
    assert widths == sorted(widths), "fewer bits are smaller"
    w8a8 = element_options(Design(element="levels", bits=8, level_bits=8, table_address=8, float_bits=16), v)
    int8 = element_options(Design(element="mac", bits=8, float_bits=16), v)
    assert w8a8[0][1] == int8[0][1] and w8a8[0][0] - int8[0][0] == pytest.approx(cells["level_table_a8_l8"]["lut"] / 32)


def test_groups_in_the_column_cost_area() -> None:
    plain, grouped = (element_options(dataclasses.replace(DUAL, column_groups=g), nominal()) for g in (1, 4))
    assert grouped[0][0] > plain[0][0] and grouped[1][0] > plain[1][0]
    with pytest.raises(ValueError, match="groups=3"):
        element_options(dataclasses.replace(DUAL, column_groups=3), nominal())


def test_bad_boards_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="luts=0"):
        dataclasses.replace(ZCU102, luts=0)
    with pytest.raises(ValueError, match="dataflow="):
        dataclasses.replace(ZCU102, dataflow="xs")


def test_no_estimate_beats_its_peak(vit_b: Estimate) -> None:
    counts = hwcost.count(VIT_B, PAPER, float_bits=16)
    on_array = counts.ops.macs - counts.ops.float_macs
    peak = float(vit_b.elements[0]) * nominal()["clock_mhz"] * 1e6
    assert on_array / peak < vit_b.seconds[0]
    moved = sum(k.dram_bytes[0] for k in vit_b.kernels)
    least = counts.totals()
    assert moved >= least["weight_bytes"] + least["dram_activation_bytes"]
    assert vit_b.seconds[0] == pytest.approx(sum(k.seconds[:, 0].max() for k in vit_b.kernels))
    assert {k.bound for k in vit_b.kernels} <= set(RESOURCES)
    assert sum(k.macs for k in vit_b.kernels) == counts.ops.macs


def test_many_sets_of_constants_are_each_worked_out_alone(mini: Counts) -> None:
    sets = draws(3, 5)
    together = estimate(mini, DUAL, ZCU102, sets)
    for i in range(3):
        alone = estimate(mini, DUAL, ZCU102, {name: float(x[i]) for name, x in sets.items()})
        assert alone.seconds[0] == pytest.approx(together.seconds[i], rel=1e-12)
        assert alone.total_joules[0] == pytest.approx(together.total_joules[i], rel=1e-12)


def test_more_of_a_resource_is_never_slower(mini: Counts) -> None:
    base = estimate(mini, DUAL, ZCU102, nominal())
    larger: dict[str, Accelerator] = {
        name: dataclasses.replace(ZCU102, **{name: getattr(ZCU102, name) * 4}) for name in ("dram_gbps", "buffer_bits")
    }
    for board in larger.values():
        assert estimate(mini, DUAL, board, nominal()).seconds[0] <= base.seconds[0]
    fast = estimate(mini, DUAL, ZCU102, nominal() | {"clock_mhz": 600.0, "fp16_fmax_mhz": 600.0, "dram_efficiency": 1})
    assert fast.seconds[0] < base.seconds[0]


def test_a_slow_memory_becomes_the_bound(mini: Counts) -> None:
    starved = estimate(mini, DUAL, dataclasses.replace(ZCU102, dram_gbps=0.001), nominal())
    assert {k.bound for k in starved.kernels if k.dram_bytes[0] > 0} == {"DRAM"}
    assert starved.seconds[0] == pytest.approx(sum(k.dram_bytes[0] for k in starved.kernels) / 0.75e6, rel=1e-6)


def test_products_alone_cost_less_than_everything(mini: Counts) -> None:
    everything, products = (estimate(mini, DUAL, ZCU102, nominal(), products_only=flag) for flag in (False, True))
    assert products.seconds[0] < everything.seconds[0]
    assert products.total_joules[0] < everything.total_joules[0]


def test_narrower_codes_are_faster_and_cheaper() -> None:
    def run(bits: int) -> Estimate:
        config = dataclasses.replace(UNIFORM, w_bits=bits, a_bits=bits)
        design = Design(element="mac", bits=bits, float_bits=16)
        return estimate(hwcost.count(VIT_B, config, float_bits=16), design, ZCU102, nominal())

    results = [run(bits) for bits in (8, 6, 4, 2)]
    assert [r.seconds[0] for r in results] == sorted((r.seconds[0] for r in results), reverse=True)
    assert [r.total_joules[0] for r in results] == sorted((r.total_joules[0] for r in results), reverse=True)


def test_int8_on_the_k26_is_as_hungry_as_its_published_dpu() -> None:
    """The one absolute anchor: 7.9 W over .25 to .92 TOPS, 17 to 63 pJ for a multiply-accumulate."""
    config = dataclasses.replace(UNIFORM, w_bits=8, a_bits=8)
    counts = hwcost.count(VIT_B, config, float_bits=16)
    result = estimate(counts, Design(element="mac", bits=8, float_bits=16), PRESETS["kv260"], draws(100, 0))
    low, high = np.percentile(result.total_joules / counts.ops.macs * 1e12, [5, 95])
    assert low < 63 and high > 17
