"""Energy of a layer's operations and buffer accesses, picojoules before the factors of node and fabric."""

from typing import Any

from hwcost.board.accelerator import Design, passes
from hwcost.board.constants import Values
from hwcost.board.cycles import Dataflow, buffer_reads
from hwcost.board.synthesis import SUM_LOG2, hluq_max_shift
from hwcost.counts.costs import Layer


def int_add(bits: int, v: Values) -> Any:
    return bits * v["int_add_pj_per_bit"]


def int_multiply(b1: int, b2: int, v: Values) -> Any:
    return b1 * b2 * v["int_multiply_pj_per_bit2"] + (b1 + b2) / 2 * v["int_multiply_pj_per_bit"]


def float_multiply_add(bits: int, v: Values) -> Any:
    return v[f"fp{bits}_multiply_pj"] + v[f"fp{bits}_add_pj"]


def operations_pj(layer: Layer, design: Design, v: Values) -> Any:
    """Arithmetic of a layer. A code of zero costs nothing where it is skipped, and everything in a plain element."""
    ops, fma = layer.ops, float_multiply_add(design.float_bits, v)
    single = ops.elementwise / 2 + v["transcendental_multiplies"] * ops.transcendentals + ops.encodes + ops.rescales
    total = single * fma
    if layer.a is None or layer.b is None:
        return total
    if layer.is_float:
        return total + ops.float_macs * float_multiply_add(design.bits if design.element == "float" else 16, v)
    w, a = layer.b.product_bits, layer.a.product_bits
    sums = w + a + SUM_LOG2
    mac = int_multiply(w, a, v) + int_add(sums, v)
    total = total + ops.corrections * int_add(sums, v)
    if design.element != "two_path":
        return total + ops.macs * passes(layer, design) * mac
    shifted = w + hluq_max_shift(a)
    shift = v["shift_per_add"] * int_add(shifted, v) + int_add(shifted + SUM_LOG2, v)
    return total + ops.int_macs * mac + ops.shifts * shift + ops.dual_adds * int_add(shifted + SUM_LOG2, v)


def buffer_bits(layer: Layer, design: Design, rows: Any, columns: Any, dataflow: Dataflow) -> Any:
    """Bits read from and written to the on-chip buffers by the arrays (products) or the vector unit (the rest)."""
    if layer.gemm is None or layer.a is None or layer.b is None:
        return sum(t.elements * t.bits for t in (*layer.inputs, *layer.outputs))
    left, right, sums = buffer_reads(layer.gemm, rows, columns, dataflow, column_split(layer, design))
    width = 32 if layer.is_float else layer.a.product_bits + layer.b.product_bits + SUM_LOG2
    # Reading a level from the table at the edge is charged like reading as many bits from a buffer, which is more.
    left_bits = layer.a.bits + layer.a.level_bits
    return passes(layer, design) * (left * left_bits + right * layer.b.bits) + sums * width


def column_split(layer: Layer, design: Design) -> int:
    """Parts into which CAG cuts K: its groups, unless the column tells them apart while it runs."""
    if layer.a is None or not layer.a.has_groups or design.column_groups > 1:
        return 1
    return layer.accumulators
