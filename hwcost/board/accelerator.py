"""FPGA boards, and the arrays that fit on them at each precision."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from ahcptq_jax.settings import at_least, check_settings, setting
from hwcost.board.constants import Values, yosys_cells
from hwcost.board.cycles import Dataflow
from hwcost.board.synthesis import agq_octaves, hluq_max_shift, packing
from hwcost.counts.costs import Layer
from sam_flax.errors import InputError

KBIT = 1024
BRAM36, URAM = 36 * KBIT, 288 * KBIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A board and how an accelerator on it is organised.

    Attributes:
        name: of the board.
        luts: 6-input lookup tables open to the design.
        dsps: DSP48E2 slices.
        buffer_bits: block RAM and UltraRAM, bits.
        dram_gbps: peak bandwidth of the external memory, 1e9 bytes per second.
        dram: kind of that memory.
        source: where these numbers are from.
        dataflow: what stays in the array; the elements in rtl/ accumulate in place, which is output stationary.
        side: rows and columns of a core; elements beyond it make further cores.
        overlap: whether a fold is filled while the one before drains (see `cycles.systolic_cycles`).
    """

    name: str
    luts: int
    dsps: int
    buffer_bits: int
    dram_gbps: float
    dram: Literal["ddr4", "hbm2"]
    source: str
    dataflow: Dataflow = setting(
        "os", "What stays in the array: outputs (os), weights (ws), inputs (is).", choices=get_args(Dataflow)
    )
    side: int = setting(32, "Rows and columns of a core of the array.", check=at_least(1))
    overlap: bool = setting(True, "Fill a fold while the one before drains; off is SCALE-Sim's formula.")

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("luts", "dsps", "buffer_bits", "dram_gbps"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} of {self.name} must be positive.")
        if self.dram not in ("ddr4", "hbm2"):
            raise InputError(f"dram={self.dram!r} of {self.name} must be ddr4 or hbm2.")


_FINN = "Xilinx/finn util/platforms.py, after UG1120: what the shell leaves"
PRESETS: dict[str, Accelerator] = {
    "zcu102": Accelerator(
        name="ZCU102", luts=274_080, dsps=2_520, buffer_bits=912 * BRAM36, dram_gbps=17.1, dram="ddr4",
        source="resources: Xilinx/finn util/platforms.py; DDR4-2133, 64 bits (UG1182), not retrieved",
    ),
    "kv260": Accelerator(
        name="KV260 (K26)", luts=117_120, dsps=1_248, buffer_bits=144 * BRAM36 + 64 * URAM, dram_gbps=19.2,
        dram="ddr4", source="xilinx.github.io/kria-apps-docs; memory of 64 bits at 2400 Mb/s: DS987 v1.1",
    ),
    "u50": Accelerator(
        name="Alveo U50", luts=730_000, dsps=5_160, buffer_bits=1_128 * BRAM36 + 608 * URAM, dram_gbps=316.0,
        dram="hbm2", source=f"{_FINN}; bandwidth DS965, not retrieved",
    ),
    "u280": Accelerator(
        name="Alveo U280", luts=1_069_000, dsps=8_490, buffer_bits=1_487 * BRAM36 + 960 * URAM, dram_gbps=460.0,
        dram="hbm2", source=f"{_FINN}; bandwidth UG1393",
    ),
}  # fmt: skip

# What a processing element is:
#   "float"      multiplies floats;
#   "levels"     multiplies codes of weights by levels on the grid, whatever the quantizer;
#   "mac"        multiplies codes by codes, with HLUQ and AGQ in several passes;
#   "two_path"  is the HLUQ element;
#   "ideal"      is "mac" in which every code takes one pass: arithmetic no worse than uniform.
Element = Literal["float", "levels", "mac", "two_path", "ideal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is built on a board.

    Attributes:
        element: the processing element.
        bits: width of its codes (the wider of weights and activations); 16 or 32 for floats.
        float_bits: width of everything that is not codes.
        column_groups: above 1, CAG's groups are told apart in the column while it runs (rtl/cag_column.v); otherwise
            the channels are sorted by group beforehand and cost folds and rescales alone.
        level_bits: width of the levels of the "levels" element.
        table_address: bits of the address of its tables: of a code, and of the part that a group of channels reads.
        elements: number of processing elements, instead of as many as fit (iso-array comparisons).
    """

    element: Element
    bits: int
    float_bits: int
    column_groups: int = 1
    level_bits: int = 0
    table_address: int = 0
    elements: float | None = None


def element_options(design: Design, v: Values, side: int = 32) -> list[tuple[Any, Any]]:
    """(LUTs, DSPs) of one element in each form that it can take, two at most.

    Args:
        design: what is built.
        v: the constants.
        side: elements of a row, which share a table of levels at the edge of the array.

    Raises:
        ValueError: if the column or the table was not measured for the groups.
    """
    if design.element == "float":
        if design.bits == 32:
            return [(v["fp32_add_lut"] + v["fp32_multiply_lut"], v["fp32_add_dsp"] + v["fp32_multiply_dsp"])]
        # The measured element, or an FP16 product before FP32's adder; its product needs one DSP.
        adder = (v["fp32_add_lut"] + v["fp32_multiply_lut"], v["fp32_add_dsp"] + 1)
        return [(v["fp16_mac_lut"], v["fp16_mac_dsp"]), adder]
    cells, factor, bits = yosys_cells(), v["yosys_lut_factor"], design.bits
    if design.element == "levels":
        return _level_options(design, v, side)
    column = 0.0
    if design.column_groups > 1:
        key = f"cag_column_b4_g{design.column_groups}"
        if key not in cells:
            raise ValueError(f"groups={design.column_groups} in a column was not measured; take 2, 4, 8 or 16.")
        # Measured with four rows of 4-bit elements; what they would take without groups is taken off.
        column = (cells[key]["lut"] / 4 - cells["mac_b4"]["lut"]) * factor
    if design.element == "two_path":
        options = [(cells[f"hluq_b{bits}"]["lut"] * factor + column, 0.0)]
        # The DSP form holds both sums in 48 bits for 4-bit codes only.
        return [(v["hluq_dsp_lut"] + column, 1.0), *options] if bits <= 4 else options
    packed = ("int4_dsp_mac_lut", "int4_mac_dsp") if bits <= 4 else ("int8_mac_lut", "int8_mac_dsp")
    return [(v[packed[0]] + column, v[packed[1]]), (cells[f"mac_b{bits}"]["lut"] * factor + column, 0.0)]


def _level_options(design: Design, v: Values, side: int) -> list[tuple[Any, Any]]:
    """The element on the grid: packed into a DSP, and in LUTs alone; each with its share of its row's table.

    The packed form is charged as the one of plain codes, of whose accumulator its own is so many bits wider.
    """
    cells, factor, bits, wider = yosys_cells(), v["yosys_lut_factor"], design.bits, design.level_bits - design.bits
    table = cells[f"level_table_a{design.table_address}_l{design.level_bits}"]["lut"] * factor / side
    if bits <= 4:
        columns, rows = packing(bits, design.level_bits)
        packed = (v["int4_dsp_mac_lut"] + wider, 1 / (columns * rows))
    else:
        packed = (v["int8_mac_lut"], v["int8_mac_dsp"])
    plain = cells[f"levels_b{bits}_l{design.level_bits}"]["lut"] * factor
    return [(packed[0] + table, packed[1]), (plain + table, 0.0)]


def element_count(options: list[tuple[Any, Any]], luts: Any, dsps: Any) -> Any:
    """Elements of the best mix of one or two forms, (LUTs, DSPs) each, within a budget.

    The best of a linear programme lies in a corner: one form alone, or both with nothing of the budget left.
    """

    def alone(lut: Any, dsp: Any) -> Any:
        by_dsp = np.where(np.asarray(dsp) > 0, dsps / np.maximum(dsp, 1e-9), np.inf)
        return np.minimum(luts / np.maximum(lut, 1e-9), by_dsp)

    if len(options) == 1:
        return alone(*options[0])
    (l1, d1), (l2, d2) = options
    determinant = l1 * d2 - l2 * d1
    safe = np.where(determinant == 0, 1.0, determinant)
    x1, x2 = (luts * d2 - l2 * dsps) / safe, (l1 * dsps - luts * d1) / safe
    both = np.where((determinant != 0) & (x1 >= 0) & (x2 >= 0), x1 + x2, 0.0)
    return np.maximum(np.maximum(alone(l1, d1), alone(l2, d2)), both)


def cores(elements: Any, side: int) -> tuple[Any, Any, Any]:
    """(rows, columns, cores): cores of about `side` x `side`, as near to `elements` in all as rectangles allow."""
    elements = np.maximum(np.floor(elements), 1.0)
    count = np.maximum(np.round(elements / side**2), 1.0)
    each = elements / count
    rows = np.floor(np.sqrt(each))
    return rows, np.floor(each / rows), count


def passes(layer: Layer, design: Design) -> int:
    """How often a product must run through the array.

    Levels on the grid take one pass, whatever they stand for. Without it a plain element multiplies by codes of `bits`,
    and a sum of powers of two wider than that takes several passes; the HLUQ element shifts by at most
    `hluq_max_shift`; AGQ's residues mod tau are summed apart, one after the other.
    """
    if layer.a is None or design.element in ("float", "ideal") or layer.a.arithmetic in ("float", "multiply"):
        return 1
    bits = layer.a.bits
    if layer.a.arithmetic == "shift_or_multiply":
        return 1 if design.element == "two_path" else 1 + -(-min(layer.log_levels, hluq_max_shift(bits) + 1) // bits)
    octaves = agq_octaves(bits, layer.accumulators)
    reach = hluq_max_shift(bits) + 1 if design.element == "two_path" else bits
    return layer.accumulators * -(-octaves // reach)
