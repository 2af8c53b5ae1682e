"""Every number that the estimates rest on, as a named record with its source.

Status of a source:
    "source"      read at the source that is named
    "measured"    measured; the source names the command
    "secondary"   read in a secondary source or an abstract
    "assumption"  chosen, for the reason given; nothing was found that fixes it
    "unverified"  believed, but the source was not retrieved
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from sam_flax.errors import InputError

Status = Literal["source", "measured", "secondary", "assumption", "unverified"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """A number with its origin and the range in which it is believed to lie.

    Attributes:
        name: its key.
        value: nominal.
        unit: "1" for ratios.
        low: smallest plausible value.
        high: largest.
        source: where it was read, or why it was chosen.
        status: how firm that is; see the module's head.
        node: process node, "" where none applies.
        most: no more than this is possible, as of a share.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    source: str
    status: Status
    node: str = ""
    most: float = np.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= self.most:
            raise ValueError(f"{self.name}: {self.value} must lie between low={self.low} and high={self.high}.")


def _spread(name: str, value: float, factor: float, unit: str, source: str, status: Status, node: str = "") -> Constant:
    """A constant believed within a factor either way."""
    return _ranged(name, value, value / factor, value * factor, unit, source, status, node)


def _ranged(
    name: str, value: float, low: float, high: float, unit: str, source: str, status: Status, node: str = ""
) -> Constant:
    return Constant(name=name, value=value, unit=unit, low=low, high=high, source=source, status=status, node=node)


def _share(name: str, value: float, low: float, high: float, source: str) -> Constant:
    return Constant(
        name=name, value=value, unit="1", low=low, high=high, source=source, status="assumption", most=1.0
    )  # fmt: skip


_HOROWITZ = (
    "M. Horowitz, ISSCC 2014, as tabled in google/qkeras qtools/config_public.py and stillwater-sc/esim energy.py"
)
_QKERAS = "google/qkeras qtools/config_public.py: fit of Horowitz's numbers, an extrapolation below 8 bits"
_XTRAMAC = "Xtra-Computing/XtraMAC synth_all.csv (Vivado, xcu55c)"

# pJ per operation in an ASIC of the node; `node_45_to_16` and `fpga_*_per_asic` bring them to a 16 nm FPGA.
_ENERGY = (
    _spread("fp32_multiply_pj", 3.7, 1.3, "pJ", _HOROWITZ, "source", "45 nm"),
    _spread("fp32_add_pj", 0.9, 1.3, "pJ", _HOROWITZ, "source", "45 nm"),
    _spread("fp16_multiply_pj", 1.1, 1.3, "pJ", _HOROWITZ, "source", "45 nm"),
    _spread("fp16_add_pj", 0.4, 1.3, "pJ", _HOROWITZ, "source", "45 nm"),
    # A b1 x b2 multiplier: quadratic*b1*b2 + linear*(b1+b2)/2.
    _spread("int_multiply_pj_per_bit2", 0.0029948, 2.0, "pJ/bit^2", _QKERAS, "source", "45 nm"),
    _spread("int_multiply_pj_per_bit", 0.0010417, 2.0, "pJ/bit", _QKERAS, "source", "45 nm"),
    _spread("int_add_pj_per_bit", 0.003125, 1.3, "pJ/bit", _HOROWITZ + "; 0.1 pJ for 32 bits", "source", "45 nm"),
    _ranged(
        "shift_per_add", 1.0, 0.5, 2.0, "1",
        "google/qkeras charges a shifter as an adder of its width; a 16-bit NPE measured 0.3 pJ for a shift and for "
        "two INT8 operations alike (PMC10326429 table 8)", "source",
    ),
    _ranged(
        "transcendental_multiplies", 4.0, 2.0, 10.0, "multiply-adds",
        "a piecewise quadratic: two multiply-adds, a table and range reduction; also its cycles on a lane",
        "assumption",
    ),
    _ranged(
        "sram_pj_per_bit", 0.3125, 0.15625, 1.5625, "pJ/bit",
        _HOROWITZ + ": 20 pJ per 64 bits of a 32 kB memory; low 8 kB, high 1 MB", "source", "45 nm",
    ),
    _ranged(
        "ddr4_pj_per_bit", 9.4, 5.6, 20.3125, "pJ/bit",
        "PyPI energydram 0.4.0 with Ramulator2 IDDs, DDR4-2400: 5.6 core and 3.8 background, no I/O; high: Horowitz",
        "measured",
    ),
    _ranged(
        "hbm2_pj_per_bit", 3.9, 2.8, 7.0, "pJ/bit",
        "accelergy-cacti-plug-in cacti_wrapper.py; the range is assumed", "source",
    ),
    _ranged(
        "node_45_to_16", 0.35, 0.2, 0.6, "1",
        "dynamic energy of 16 nm FinFET logic over 45 nm, after the trend in Stillmaker and Baas, Integration 2017; "
        "the value itself was not retrieved", "unverified", "45 to 16 nm",
    ),
    _ranged(
        "fpga_logic_per_asic", 14.0, 5.0, 20.0, "1",
        "Kuon and Rose, IEEE TCAD 26(2) 2007, abstract: dynamic power of FPGA over ASIC about 14 times, less with hard "
        "blocks", "secondary", "90 nm",
    ),
    _ranged(
        "fpga_sram_per_asic", 1.5, 1.0, 4.0, "1", "block RAM is a hard macro; ports and routing are not", "assumption"
    ),
    _ranged(
        "static_watts_per_klut", 0.027, 0.01, 0.06, "W/kLUT",
        "40 % (15 to 90 %) of the 7.9 W estimated for the K26 with a DPU (xilinx.github.io/kria-apps-docs, "
        "NLP-SmartVision) over its 117 kLUT; the share is assumed", "assumption", "16 nm",
    ),
)  # fmt: skip

# LUTs and DSPs per processing element; MHz.
_AREA = (
    _ranged(
        "yosys_lut_factor", 1.0, 0.55, 1.1, "1",
        "LUTs of a real implementation over those that Yosys measures in hwcost/rtl (hwcost/data/yosys.json); low: a "
        "hand-made INT4 multiplier takes 11 LUTs (arXiv 2510.21533) where Yosys takes 20", "source",
    ),
    _ranged(
        "fp32_add_lut", 226, 150, 350, "LUT", "Vitis HLS report of a U280-sized part, repository not named", "source"
    ),
    _ranged("fp32_add_dsp", 2, 2, 2, "DSP", "Vitis HLS report of a U280-sized part", "source"),
    _ranged("fp32_multiply_lut", 100, 50, 200, "LUT", "believed of the Xilinx core; row not retrieved", "unverified"),
    _ranged("fp32_multiply_dsp", 3, 2, 3, "DSP", "believed of the Xilinx core; row not retrieved", "unverified"),
    _ranged("fp32_fmax_mhz", 300, 200, 450, "MHz", "no timed report found; set to the system clock", "assumption"),
    _spread("fp16_mac_lut", 542, 1.3, "LUT", _XTRAMAC + ", FP16 into FP32 accumulation", "source"),
    _ranged("fp16_mac_dsp", 1, 1, 1, "DSP", _XTRAMAC, "source"),
    _ranged("fp16_fmax_mhz", 270, 220, 320, "MHz", _XTRAMAC + "; high: FP16 accumulation", "source"),
    _spread("int8_mac_lut", 46.5, 1.3, "LUT", _XTRAMAC + ", two lanes in 93 LUT and one DSP", "source"),
    _ranged("int8_mac_dsp", 0.5, 0.5, 1.0, "DSP", "WP486: two multiplications share a DSP48E2", "secondary"),
    _ranged(
        "int4_mac_dsp", 0.25, 0.25, 0.5, "DSP",
        "arXiv 2203.11028 and Xilinx/finn mvu_4sx4u.sv: four 4-bit multiplications in a DSP48E2", "source",
    ),
    _ranged(
        "int4_dsp_mac_lut", 27, 21, 47, "LUT",
        "a 21-bit accumulator beside the packed DSP, one LUT a bit, and six for the correction; high: the accumulator "
        "by Yosys", "assumption",
    ),
    _ranged(
        "hluq_dsp_lut", 1, 0, 48, "LUT",
        "both sums in one DSP48E2 (hwcost/rtl/hluq_pe_dsp.v) and the decoder's 21 LUTs once per row of 32; high: "
        "Yosys leaves the 48-bit accumulator outside the DSP", "assumption",
    ),
    _share("usable_lut", 0.7, 0.5, 0.85, "share of LUTs before routing fails; 0.62 to 0.75 in public designs"),
    _share("usable_dsp", 0.85, 0.6, 0.95, "share of DSPs in use"),
    _share("usable_bram", 0.8, 0.6, 0.95, "share of block RAM and UltraRAM used as buffers"),
    _ranged(
        "vector_lane_lut", 400, 250, 800, "LUT",
        "an FP16 multiply-add with tables (XtraMAC FP16: 215 to 542); twice as many for FP32", "assumption",
    ),
    _ranged("clock_mhz", 300, 200, 400, "MHz", "the DPU of the K26 runs at 300 MHz (kria-apps-docs)", "source"),
    _share("dram_efficiency", 0.75, 0.6, 0.9, "share of the peak bandwidth that long bursts reach"),
)  # fmt: skip

CONSTANTS: dict[str, Constant] = {record.name: record for record in (*_ENERGY, *_AREA)}

# Numbers by name: floats, or arrays of samples that broadcast against each other.
Values = Mapping[str, Any]


Constants = Mapping[str, Constant]


def nominal(constants: Constants = CONSTANTS) -> dict[str, float]:
    """The constants' values."""
    return {name: record.value for name, record in constants.items()}


def draws(count: int, seed: int, constants: Constants = CONSTANTS) -> dict[str, np.ndarray]:
    """`count` random sets of constants: each from a triangle over its range with the peak at its value; (count,)."""
    rng = np.random.default_rng(seed)
    return {
        name: np.full(count, c.value) if c.low == c.high else rng.triangular(c.low, c.value, c.high, count)
        for name, c in constants.items()
    }


def with_values(pairs: Mapping[str, float]) -> dict[str, Constant]:
    """The constants with some of them fixed to given values.

    Raises:
        InputError: if a name is unknown or a value impossible.
    """
    constants = dict(CONSTANTS)
    for name, value in pairs.items():
        if name not in CONSTANTS:
            raise InputError(f"There is no constant {name!r}; known are {', '.join(CONSTANTS)}.")
        if not 0 < value <= CONSTANTS[name].most:
            raise InputError(f"{name}={value} must lie above 0 and be at most {CONSTANTS[name].most}.")
        fixed = {"value": value, "low": value, "high": value, "source": "given by the user", "status": "assumption"}
        constants[name] = dataclasses.replace(CONSTANTS[name], **fixed)  # type: ignore[arg-type]
    return constants


@functools.cache
def yosys_cells() -> dict[str, dict[str, int]]:
    """LUTs, flip-flops and DSPs by design, as `python -m hwcost.board.synthesis` measured them."""
    return json.loads((files("hwcost") / "data" / "yosys.json").read_text(encoding="utf-8"))["cells"]
