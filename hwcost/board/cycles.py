"""Cycles of a systolic array and the traffic of a tiled product.

Cycle formulas: SCALE-Sim v3 (scalesim/compute/systolic_compute_{os,ws,is}.py). A product (M, K) x (K, N) on an array
of R rows and C columns is cut into folds; `Sr` and `Sc` are laid over rows and columns and `T` streams through:

    dataflow             Sr  Sc  T   cycles of a fold
    output stationary    M   N   K   R + C + T - 2
    weight stationary    K   N   M   2R + C + T - 2
    input stationary     K   M   N   2R + C + T - 2

SCALE-Sim's report counts from 0 to the last busy cycle and is therefore one less than the sum over the folds.
"""

from typing import Any, Literal

import numpy as np

from hwcost.counts.costs import Gemm

Dataflow = Literal["os", "ws", "is"]


def fold_count(gemm: Gemm, rows: Any, columns: Any, dataflow: Dataflow, groups: int = 1) -> Any:
    """Folds of all repeats; CAG's `groups` cut K, since each has its own scale."""
    m, k, n = gemm.m, gemm.k, gemm.n
    if dataflow == "os":
        return np.ceil(m / rows) * np.ceil(n / columns) * groups * gemm.repeat
    other = n if dataflow == "ws" else m
    return groups * np.ceil(k / groups / rows) * np.ceil(other / columns) * gemm.repeat


def streamed(gemm: Gemm, dataflow: Dataflow, groups: int = 1) -> float:
    """T: steps for which operands stream through a fold."""
    return {"os": gemm.k / groups, "ws": gemm.m, "is": gemm.n}[dataflow]


def systolic_cycles(
    gemm: Gemm,
    rows: Any,
    columns: Any,
    dataflow: Dataflow,
    *,
    groups: int = 1,
    cores: Any = 1,
    overlap: bool = False,
) -> Any:
    """Cycles of a product.

    Args:
        gemm: the product.
        rows, columns: of each core's array; numbers or arrays that broadcast.
        dataflow: what stays in place.
        groups: parts of K that are accumulated apart.
        cores: equal arrays that share the folds.
        overlap: the next fold's operands enter while this one still drains, as in a double-buffered array: the next
            fold starts after max(T, R) and filling and draining is paid once. Without it the formula is SCALE-Sim's.

    Returns:
        Cycles, of the broadcast shape.
    """
    folds = np.ceil(fold_count(gemm, rows, columns, dataflow, groups) / cores)
    steps = streamed(gemm, dataflow, groups)
    fill = rows + columns - 2 if dataflow == "os" else 2 * rows + columns - 2
    if overlap:
        return (folds - 1) * np.maximum(steps, rows) + steps + fill
    return folds * (steps + fill)


def buffer_reads(gemm: Gemm, rows: Any, columns: Any, dataflow: Dataflow, groups: int = 1) -> tuple[Any, Any, Any]:
    """(left operands read, right operands read, partial sums written or read back) between buffers and arrays."""
    m, k, n, repeat = gemm.m, gemm.k, gemm.n, gemm.repeat
    if dataflow == "os":
        return m * k * np.ceil(n / columns) * repeat, k * n * np.ceil(m / rows) * repeat, m * n * groups * repeat
    folds = groups * np.ceil(k / groups / rows)
    sums = m * n * (2 * folds - 1) * repeat
    if dataflow == "ws":
        return m * k * np.ceil(n / columns) * repeat, k * n * repeat, sums
    return m * k * repeat, k * n * np.ceil(m / columns) * repeat, sums


def tiled_bytes(left: Any, right: Any, buffer: Any, *, left_on_chip: bool, right_on_chip: bool) -> Any:
    """DRAM bytes of a product's two operands when half of the buffer holds a stripe of one of them.

    Either a stripe of the left operand stays while the right one passes once for each stripe, or the other way
    round, whichever moves less. An operand that is made on the chip moves nothing and cannot pass twice.

    Args:
        left, right: bytes of the operands.
        buffer: bytes of on-chip buffer.
    """
    half = buffer / 2
    stripes_left, stripes_right = np.ceil(left / half), np.ceil(right / half)
    if left_on_chip and right_on_chip:
        return 0.0 * half
    if left_on_chip:
        return right * stripes_left
    if right_on_chip:
        return left * stripes_right
    return np.minimum(left + right * stripes_left, right + left * stripes_right)
