"""Comparisons, sensitivities and the claim ledger."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from ahcptq_jax import W4A4, QuantConfig
from hwcost.board.accelerator import PRESETS
from hwcost.board.constants import CONSTANTS
from hwcost.counts.codes import Histogram, mini_codes
from hwcost.study.compare import Comparison, Interval, compare
from hwcost.study.ledger import CLAIMS, LEFT_OPEN, ON_GRID, Entry, ledger
from hwcost.study.sensitivity import code_sensitivities, sensitivities
from hwcost.study.variants import BASELINES, METHOD, SHOWN_GRIDS, TWO_PATH, Variant, baselines, forms, variants
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.config import VIT_L
from sam_flax.errors import InputError

# The paper's form of W4A4, without the grid that is the default.
PAPER = dataclasses.replace(W4A4, grid_bits=0)
ZCU102 = PRESETS["zcu102"]


@pytest.fixture(scope="module")
def table() -> dict[str, Variant]:
    return variants(VIT_L, PAPER)


@pytest.fixture(scope="module")
def comparison(table: dict[str, Variant]) -> Comparison:
    return compare(table, ZCU102)


def test_fewer_bits_run_faster_and_the_method_pays_for_its_codes(comparison: Comparison) -> None:
    seconds = {name: e.seconds[0] for name, e in comparison.estimates.items()}
    assert seconds["uniform"] < seconds["int8"] < seconds["fp16"] < seconds["fp32"]
    assert seconds["uniform"] < seconds[METHOD] < seconds["fp16"]
    assert comparison.speedup("uniform").value < 1, "HLUQ's and AGQ's elements are larger"
    assert comparison.speedup("fp32").value > 3


def test_with_equal_elements_width_alone_gains_no_time(comparison: Comparison) -> None:
    assert comparison.speedup("fp32", iso_array=True).value < 0.5 * comparison.speedup("fp32").value
    elements = {float(e.elements[0]) for e in comparison.same_array.values()}
    assert len(elements) == 1


def test_groups_in_the_column_cost_more_than_sorted_channels(comparison: Comparison) -> None:
    seconds = {name: e.seconds[0] for name, e in comparison.estimates.items()}
    columns = [seconds[f"column_{g}"] for g in (2, 4, 8, 16)]
    assert columns == sorted(columns) and columns[0] > seconds["groups_2"]
    assert seconds["groups_4"] == pytest.approx(seconds["no_cag"], rel=0.02)


def test_intervals_hold_the_draws(comparison: Comparison) -> None:
    for base in BASELINES:
        for interval in (comparison.speedup(base), comparison.energy_ratio(base)):
            assert 0 < interval.low < interval.high
    assert Interval.of(np.array([5.0, *range(101)])) == Interval(5.0, 5.0, 95.0)
    assert compare({n: comparison.variants[n] for n in (*BASELINES, METHOD)}, ZCU102).speedup("fp32") == (
        comparison.speedup("fp32")
    ), "the draws are seeded"


def test_slow_kernels_are_those_the_recipe_leaves_alone(comparison: Comparison) -> None:
    names = [name for name, gain in comparison.slow_kernels() if gain < 1.5]
    assert any("patch_embed" in name for name in names)
    assert not any(name.endswith(("qkv", "mlp/lin1", "mlp/lin2")) and "encoder" in name for name in names)


def test_without_codes_their_variants_are_absent() -> None:
    plain = variants(MINI, QuantConfig(hluq=False, cag=False, agq=False))
    assert set(plain) == {*BASELINES, METHOD, "passes"}
    assert plain[METHOD].design.element == "mac"


def test_histograms_go_only_where_their_codes_exist() -> None:
    site = "image_encoder/blocks_0/mlp/lin2/input"
    codes = {site: Histogram(counts=(1,) * 16, log_levels=4)}
    table = variants(MINI, PAPER, codes)
    assert table[METHOD].counts.measured_sites == 1
    assert table["no_hluq"].counts.measured_sites == table["int8"].counts.measured_sites == 0


HYBRID, LOG2 = "image_encoder/blocks_0/mlp/lin2/input", "image_encoder/blocks_0/attn/softmax"
COUNTS = [*range(1, 16), 40]
# Every form that `hwcost.counts.codes.histograms` takes, of one and the same histogram.
FORMS: dict[str, tuple[str, Any]] = {
    "record, hybrid": (HYBRID, Histogram(counts=tuple(COUNTS), log_levels=4)),
    "mapping, hybrid": (HYBRID, {"counts": COUNTS, "log_levels": 4}),
    "mapping of an array, hybrid": (HYBRID, {"counts": np.array(COUNTS), "log_levels": np.int64(4)}),
    "record, log2": (LOG2, Histogram(counts=tuple(COUNTS), tau=2)),
    "mapping, log2": (LOG2, {"counts": COUNTS, "tau": 2}),
    "mapping without tau": (LOG2, {"counts": COUNTS}),
    "record without tau": (LOG2, Histogram(counts=tuple(COUNTS))),
    "list": (LOG2, COUNTS),
    "tuple": (LOG2, tuple(COUNTS)),
    "array": (LOG2, np.array(COUNTS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_histogram_in_every_form_is_used_in_every_variant_that_has_its_codes(form: str) -> None:
    site, histogram = FORMS[form]
    table = variants(MINI, PAPER, {site: histogram})
    without = "no_hluq" if site == HYBRID else "no_agq"
    for name, variant in table.items():
        used = name not in (*BASELINES, without)
        assert variant.counts.measured_sites == used, name
    # Without a tau the assumed one is taken, as at sites without a histogram.
    has_tau = form in ("record, log2", "mapping, log2")
    measured = Histogram(
        counts=tuple(COUNTS), **({"log_levels": 4} if site == HYBRID else {"tau": 2 if has_tau else mini_codes().tau})
    )
    assert table[METHOD].counts.layers == variants(MINI, PAPER, {site: measured})[METHOD].counts.layers
    assert table[METHOD].counts.layers != variants(MINI, PAPER)[METHOD].counts.layers


@pytest.mark.parametrize(
    ("site", "histogram", "sentence"),
    [
        (HYBRID, COUNTS, "needs log_levels"),
        (HYBRID, {"counts": COUNTS}, "needs log_levels"),
        (HYBRID, {"counts": COUNTS, "tau": 2}, "codes need log_levels"),
        (LOG2, {"counts": COUNTS, "log_levels": 4}, "codes need tau"),
        (LOG2, {"counts": COUNTS[:8], "tau": 2}, "8 codes, not 2\\^4"),
        (LOG2, [1] * 32, "32 codes, not 2\\^4"),
        (HYBRID, Histogram(counts=(1,) * 8, log_levels=2), "8 codes, not 2\\^4"),
        ("image_encoder/blocks_0/attn/q", COUNTS, "belongs to no"),
        ("image_encoder/blocks_99/attn/softmax", {"counts": COUNTS, "tau": 2}, "belongs to no"),
        (LOG2, {"tau": 2}, "needs counts"),
        (LOG2, "4" * 16, "give a list of counts"),
        (LOG2, 16, "give a list of counts"),
    ],
)
def test_a_histogram_that_cannot_be_used_is_refused(site: str, histogram: Any, sentence: str) -> None:
    for grid_bits in (0, 8):
        with pytest.raises(InputError, match=sentence):
            variants(MINI, W4A4, {site: histogram}, grid_bits=grid_bits)


@pytest.fixture(scope="module")
def on_grid() -> Comparison:
    return compare(variants(VIT_L, PAPER, grid_bits=8), ZCU102)


def test_the_grid_lies_between_uniform_codes_and_the_papers_form(on_grid: Comparison, comparison: Comparison) -> None:
    assert forms(on_grid.variants) == (METHOD, TWO_PATH) and baselines(on_grid.variants) == (*BASELINES, TWO_PATH)
    assert forms(comparison.variants) == (METHOD, "grid_8") and baselines(comparison.variants) == BASELINES
    seconds = {name: float(e.seconds[0]) for name, e in on_grid.estimates.items()}
    joules = {name: float(e.total_joules[0]) for name, e in on_grid.estimates.items()}
    for figure in (seconds, joules):
        assert figure["uniform"] < figure["grid_6"] < figure["grid_7"] < figure[METHOD] < figure[TWO_PATH]
        assert figure[METHOD] < figure["int8"]
    # With as many elements the grid takes the time of uniform codes: it is the same product.
    assert on_grid.speedup("uniform", iso_array=True).value == pytest.approx(1, rel=0.01)
    assert on_grid.speedup(TWO_PATH, iso_array=True).value > 1.05
    # Which form comes first changes none of the figures.
    assert seconds[TWO_PATH] == comparison.estimates[METHOD].seconds[0]
    assert seconds[METHOD] == comparison.estimates["grid_8"].seconds[0]


def test_on_the_grid_measured_codes_change_nothing_but_the_other_form() -> None:
    codes = {HYBRID: {"counts": COUNTS, "log_levels": 4}}
    measured, assumed = (variants(MINI, PAPER, c, grid_bits=8) for c in (codes, None))
    assert measured[METHOD].counts.layers == assumed[METHOD].counts.layers
    assert measured[TWO_PATH].counts.measured_sites == measured[METHOD].counts.measured_sites == 1
    assert measured[TWO_PATH].counts.layers != assumed[TWO_PATH].counts.layers
    assert not code_sensitivities(measured, ZCU102) and code_sensitivities(measured, ZCU102, form=TWO_PATH)


def test_without_levels_there_is_no_grid() -> None:
    plain = variants(MINI, QuantConfig(hluq=False, cag=False, agq=False), grid_bits=8)
    assert set(plain) == {*BASELINES, METHOD, "passes"} and forms(plain) == (METHOD,)
    wide = variants(MINI, QuantConfig(w_bits=8, a_bits=8), grid_bits=8)
    assert not {f"grid_{bits}" for bits in SHOWN_GRIDS} & set(wide), "8-bit codes do not fit in fewer"
    for bits in ((8, 2), (2, 6), (7, 4), (8, 8)):
        mixed = variants(MINI, QuantConfig(w_bits=bits[0], a_bits=bits[1]), grid_bits=8)
        assert compare(mixed, ZCU102).estimates[METHOD].seconds[0] > 0, bits
    with pytest.raises(InputError, match="no room for the 8-bit codes"):
        variants(MINI, QuantConfig(w_bits=8, a_bits=8), grid_bits=7)


def test_sensitivities_cover_every_constant_and_come_sorted(table: dict[str, Variant]) -> None:
    rows = sensitivities(table, ZCU102)
    assert {row.name for row in rows} == set(CONSTANTS)
    assert [row.weight for row in rows] == sorted((row.weight for row in rows), reverse=True)
    by_name = {row.name: row for row in rows}
    assert by_name["static_watts_per_klut"].speedup_doubled == by_name["static_watts_per_klut"].speedup.value
    assert by_name["yosys_lut_factor"].speedup_doubled < by_name["yosys_lut_factor"].speedup.value
    assert by_name["fp32_add_lut"].speedup_doubled > by_name["fp32_add_lut"].speedup.value


def test_more_zero_codes_cost_less_energy() -> None:
    rows = {row.name: row for row in code_sensitivities(variants(MINI, PAPER), ZCU102)}
    zero = rows["share of HLUQ codes that are zero"]
    assert zero.energy_halved < zero.energy_ratio.value < zero.energy_doubled
    plain = variants(MINI, QuantConfig(hluq=False, cag=False, agq=False))
    assert not code_sensitivities(plain, ZCU102)


@pytest.fixture(scope="module")
def entries(table: dict[str, Variant], comparison: Comparison) -> list[Entry]:
    """The papers' claims, one that nothing reaches, and the comparison's own figures as a claim."""
    speed, energy = comparison.speedup("fp32").value, comparison.energy_ratio("fp32").value
    own = [
        dataclasses.replace(CLAIMS[0], speedup=s, energy_ratio=e) for s, e in ((1e6, 1e6), (speed, energy))
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwcost.study.ledger.CLAIMS", (*CLAIMS, *own))
        return ledger(table, ZCU102)


def test_the_ledger_says_what_reaches_the_claims(entries: list[Entry]) -> None:
    assert [entry.claim for entry in entries[:2]] == list(CLAIMS)
    for entry in entries:
        assert entry.combinations == np.prod([len(options) for options in LEFT_OPEN.values()])
        for a in entry.reached:
            assert a.speedup >= entry.claim.speedup and a.energy_ratio >= entry.claim.energy_ratio
            assert all(a.choice[key] == value for key, value in entry.shared().items())
        assert str(entry.claim.speedup) in entry.verdict
    assert entries[2].verdict.startswith("None of the ") and not entries[2].reached


def test_the_grid_holds_the_comparison_itself(entries: list[Entry]) -> None:
    assert {a.choice["HLUQ and AGQ"] for a in entries[3].tried} > {ON_GRID}
    own = entries[3]
    assert own.nearest.distance(own.claim) < 1e-9
    assert own.nearest.choice["counted"] == "everything" and own.nearest.choice["baseline"] == "fp32"
