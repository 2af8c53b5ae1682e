"""Area of the processing elements in `rtl/`, measured with Yosys; needs the program `yosys`.

    python -m hwcost.board.synthesis      # writes hwcost/data/yosys.json

`synth_xilinx -family xcup` maps to UltraScale+ cells. It neither places nor routes, knows no clock, and packs fewer
products into a DSP48E2 than a designer would; elements are measured in LUTs alone, the DSP forms apart.
"""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from ahcptq_jax.config import GRIDS

RTL = Path(str(files("hwcost") / "rtl"))
DATA = Path(str(files("hwcost") / "data" / "yosys.json"))
FIELD = 22  # bits of the logarithmic sum in the DSP form of the HLUQ element
SUM_LOG2 = 13  # accumulators hold sums of up to 8192 products; SAM-H's longest has 5120
DSP_WIDE, DSP_NARROW = 26, 17  # unsigned bits that the operands of a DSP48E2 hold
SHIFT_CAP = 15  # longer shifts stand for values below 2^-15 of the largest and are dropped


# Lookup tables that a cell of distributed memory takes: all of its slice (UG974: RAM32M16, RAM64M8), or half of it.
_MEMORY = {"RAM32M": 4, "RAM32M16": 8, "RAM64M": 4, "RAM64M8": 8}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of one element: 6-input lookup tables (those used as memory included), flip-flops, DSP48E2."""

    lut: int
    ff: int
    dsp: int


def _luts(cell: str) -> int:
    """Lookup tables in a cell of that name."""
    return _MEMORY.get(cell, 1 if re.fullmatch(r"LUT[1-6]", cell) else 0)


def hluq_max_shift(a_bits: int) -> int:
    """Longest shift of an HLUQ element: half of the codes may be logarithmic."""
    return min(2 ** (a_bits - 1) - 1, SHIFT_CAP)


def agq_octaves(a_bits: int, tau: int) -> int:
    """Octaves that the nonzero codes of AGQ span, at most as many as the shifter reaches."""
    return min(-(-(2**a_bits - 1) // tau), SHIFT_CAP + 1)


def mac_parameters(bits: int) -> dict[str, int]:
    return {"W_BITS": bits, "A_BITS": bits, "ACC_BITS": 2 * bits + SUM_LOG2}


def hluq_parameters(bits: int) -> dict[str, int]:
    shift = hluq_max_shift(bits)
    widths = {"LOG_BITS": bits + shift + SUM_LOG2, "UNI_BITS": 2 * bits + SUM_LOG2}
    return {"W_BITS": bits, "A_BITS": bits, "MAX_SHIFT": shift, **widths}


def agq_parameters(bits: int, tau_log2: int) -> dict[str, int]:
    shift = agq_octaves(bits, 1 << tau_log2) - 1
    accumulator = bits + shift + SUM_LOG2
    return {"V_BITS": bits, "A_BITS": bits, "TAU_LOG2": tau_log2, "MAX_SHIFT": shift, "ACC_BITS": accumulator}


def column_parameters(bits: int, group_bits: int) -> dict[str, int]:
    parameters = {"ROWS": 4, "W_BITS": bits, "A_BITS": bits, "GROUP_BITS": group_bits}
    return parameters | {"ACC_BITS": 2 * bits + SUM_LOG2}


def level_parameters(bits: int, level_bits: int) -> dict[str, int]:
    """Of the plain element that multiplies codes of weights by levels."""
    return {"W_BITS": bits, "A_BITS": level_bits, "ACC_BITS": bits + level_bits + SUM_LOG2}


def packing(bits: int, level_bits: int) -> tuple[int, int]:
    """(columns, rows) whose products share a DSP48E2 without touching: as many products as its two operands hold."""
    step = bits + level_bits
    fits = [
        (columns, rows)
        for columns in range(1, 8)
        for rows in range(1, 8)
        if (columns - 1) * rows * step + bits <= DSP_WIDE and (rows - 1) * step + level_bits <= DSP_NARROW
    ]
    return max(fits, key=lambda pair: pair[0] * pair[1])


def lane_parameters(bits: int, level_bits: int) -> dict[str, int]:
    """Of the element of several products in one DSP48E2."""
    columns, rows = packing(bits, level_bits)
    widths = {"W_BITS": bits, "LEVEL_BITS": level_bits, "ACC_BITS": bits + level_bits + SUM_LOG2}
    return {"LANES": columns, "ROWS": rows, **widths}


def yosys_missing() -> str:
    """Why nothing can be synthesized, or ""."""
    return "" if shutil.which("yosys") else "yosys is not installed (Debian package yosys)"


def synthesize(top: str, parameters: Mapping[str, int], *, dsp: bool = False) -> Cells:
    """Maps one module to UltraScale+ cells.

    Args:
        top: the module.
        parameters: its parameters.
        dsp: whether DSP48E2 may be used.

    Raises:
        RuntimeError: if yosys is absent or fails.
    """
    if missing := yosys_missing():
        raise RuntimeError(f"{missing}; install it to measure areas.")
    sources = " ".join(str(path) for path in sorted(RTL.glob("*.v")))
    chparam = " ".join(f"-set {name} {value}" for name, value in parameters.items())
    commands = [
        f"read_verilog {sources}",
        f"chparam {chparam} {top}",
        f"synth_xilinx -family xcup -nowidelut -flatten {'' if dsp else '-nodsp'} -top {top}",
        "stat",
    ]
    done = subprocess.run(["yosys", "-p", "; ".join(commands)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"yosys failed on {top}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    report = done.stdout[done.stdout.rindex("Printing statistics") :]
    cells = {name: int(count) for name, count in re.findall(r"^\s+([A-Z0-9_]+)\s+(\d+)$", report, re.MULTILINE)}
    return Cells(
        lut=sum(count * _luts(name) for name, count in cells.items()),
        ff=sum(count for name, count in cells.items() if name.startswith("FD")),
        dsp=cells.get("DSP48E2", 0),
    )


def designs() -> dict[str, tuple[str, dict[str, int], bool]]:
    """Everything that is measured: key -> (module, parameters, whether DSPs may be used)."""
    result: dict[str, tuple[str, dict[str, int], bool]] = {}
    for bits in range(2, 9):
        result[f"mac_b{bits}"] = ("int_mac_pe", mac_parameters(bits), False)
        result[f"hluq_b{bits}"] = ("hluq_pe", hluq_parameters(bits), False)
    for tau_log2 in (0, 1, 2):
        result[f"agq_b4_tau{1 << tau_log2}"] = ("agq_pe", agq_parameters(4, tau_log2), False)
    for group_bits in (1, 2, 3, 4):
        result[f"cag_column_b4_g{1 << group_bits}"] = ("cag_column", column_parameters(4, group_bits), False)
    for level_bits in GRIDS:
        for bits in range(2, 9):
            result[f"levels_b{bits}_l{level_bits}"] = ("int_mac_pe", level_parameters(bits, level_bits), False)
        result[f"level_lanes_b4_l{level_bits}"] = ("level_lanes", lane_parameters(4, level_bits), True)
        for address in range(2, 9):
            table = {"A_BITS": address, "GROUP_BITS": 0, "LEVEL_BITS": level_bits}
            result[f"level_table_a{address}_l{level_bits}"] = ("level_table", table, False)
    result["hluq_dsp_b4"] = ("hluq_pe_dsp", {"W_BITS": 4, "OPERAND_BITS": FIELD + 4, "ACC_BITS": 48}, True)
    decoder = {"A_BITS": 4, "MAX_SHIFT": hluq_max_shift(4), "FIELD": FIELD, "OPERAND_BITS": FIELD + 4}
    result["hluq_decode_b4"] = ("hluq_decode", decoder, False)
    return result


def main() -> None:
    """Measures every design and writes `data/yosys.json`."""
    version = subprocess.run(["yosys", "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    table = {
        key: dataclasses.asdict(synthesize(top, parameters, dsp=dsp))
        for key, (top, parameters, dsp) in tqdm(designs().items())
    }
    lines = ",\n".join(f'  "{key}": {json.dumps(cells)}' for key, cells in table.items())
    command = "python -m hwcost.board.synthesis"
    head = f'{{"command": "{command}",\n "tool": "Yosys {version} synth_xilinx -family xcup -nowidelut",\n'
    DATA.write_text(f'{head} "cells": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
