"""Cycle formulas and tiling against counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwcost.board.cycles import buffer_reads, fold_count, systolic_cycles, tiled_bytes
from hwcost.counts.costs import Gemm

SIZES = st.integers(1, 60)
FLOWS = st.sampled_from(["os", "ws", "is"])


def _by_hand(gemm: Gemm, rows: int, columns: int, dataflow: str, groups: int) -> int:
    """The sum over folds, written as the loops that a controller would run; K divides by `groups`."""
    cycles = 0
    for _ in range(gemm.repeat):
        for _ in range(groups):
            k = gemm.k // groups
            over_rows, over_columns, steps = {
                "os": (gemm.m, gemm.n, k), "ws": (k, gemm.n, gemm.m), "is": (k, gemm.m, gemm.n)
            }[dataflow]  # fmt: skip
            for _ in range(0, over_rows, rows):
                for _ in range(0, over_columns, columns):
                    load = rows if dataflow != "os" else 0
                    cycles += load + (rows - 1) + (columns - 1) + steps
    return cycles


@given(m=SIZES, k=SIZES, n=SIZES, rows=st.integers(1, 16), columns=st.integers(1, 16), flow=FLOWS,
       groups=st.sampled_from([1, 2, 4]), repeat=st.integers(1, 3))  # fmt: skip
def test_cycles_are_the_sum_over_folds(m, k, n, rows, columns, flow, groups, repeat) -> None:
    gemm = Gemm(m, k * groups, n, repeat)
    assert systolic_cycles(gemm, rows, columns, flow, groups=groups) == _by_hand(gemm, rows, columns, flow, groups)


@given(m=SIZES, k=SIZES, n=SIZES, side=st.integers(1, 16), flow=FLOWS, cores=st.integers(1, 4))
def test_no_array_beats_its_elements(m, k, n, side, flow, cores) -> None:
    gemm = Gemm(m, k, n)
    drained = systolic_cycles(gemm, side, side, flow, cores=cores)
    overlapped = systolic_cycles(gemm, side, side, flow, cores=cores, overlap=True)
    assert gemm.macs / (side**2 * cores) <= overlapped <= drained


def test_grouping_costs_folds_where_rows_hold_channels() -> None:
    gemm = Gemm(64, 96, 64)
    one, four = (fold_count(gemm, 32, 32, "ws", groups) for groups in (1, 4))
    assert (one, four) == (6, 8), "24 channels of a group leave a fold of 32 rows part empty"
    assert fold_count(gemm, 32, 32, "os", 4) == 4 * fold_count(gemm, 32, 32, "os", 1)
    assert systolic_cycles(gemm, 32, 32, "os", groups=4) > systolic_cycles(gemm, 32, 32, "os")


def test_buffer_reads_count_every_operand_of_every_fold() -> None:
    left, right, sums = buffer_reads(Gemm(10, 7, 9), 4, 4, "os")
    assert (left, right, sums) == (10 * 7 * 3, 7 * 9 * 3, 90)
    left, right, sums = buffer_reads(Gemm(10, 7, 9), 4, 4, "ws")
    assert (left, right, sums) == (10 * 7 * 3, 7 * 9, 90 * 3), "two folds of K: written, read back and written again"


@given(left=st.integers(1, 10**6), right=st.integers(1, 10**6), buffer=st.integers(2, 10**6))
def test_tiling_never_moves_less_than_once_and_a_larger_buffer_never_more(left, right, buffer) -> None:
    moved = tiled_bytes(left, right, buffer, left_on_chip=False, right_on_chip=False)
    assert moved >= left + right
    assert tiled_bytes(left, right, 2 * buffer, left_on_chip=False, right_on_chip=False) <= moved
    if min(left, right) <= buffer / 2:
        assert moved == left + right
    assert tiled_bytes(left, right, buffer, left_on_chip=True, right_on_chip=True) == 0


def test_formulas_take_arrays() -> None:
    rows = np.array([[4.0], [8.0]])
    cycles = systolic_cycles(Gemm(32, 16, 32), rows, rows, "os")
    assert cycles[:, 0].tolist() == [systolic_cycles(Gemm(32, 16, 32), r, r, "os") for r in (4, 8)]
    assert pytest.approx(cycles[0, 0]) == 64 * (4 + 4 + 16 - 2)
