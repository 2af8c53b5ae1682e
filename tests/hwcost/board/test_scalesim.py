"""Cycle formulas against SCALE-Sim 3.0.0, which simulates the array cycle by cycle.

It lives in an environment of its own, since it needs an older NumPy:

    python3 -m venv scalesim && scalesim/bin/pip install scalesim==3.0.0 'numpy<2.4'
    SCALESIM_PYTHON=scalesim/bin/python pytest tests/hwcost/test_scalesim.py
"""

import csv
import os
import subprocess
from pathlib import Path

import pytest

import hwcost
from hwcost.board.cycles import Dataflow, systolic_cycles
from hwcost.counts.costs import Gemm
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.config import VIT_B

PYTHON = os.environ.get("SCALESIM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SCALESIM_PYTHON names no Python with scalesim==3.0.0")

CONFIG = """
[general]
run_name = run
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {columns}
ifmapsramszkB = 1024
filtersramszkB = 1024
ofmapsramszkB = 1024
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = {dataflow}
Bandwidth = 100
ReadRequestBuffer = 64
WriteRequestBuffer = 64
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
"""


def simulate(folder: Path, gemms: list[Gemm], rows: int, columns: int, dataflow: Dataflow) -> list[int]:
    """Total cycles that SCALE-Sim reports for one repeat of each product."""
    (folder / "x.cfg").write_text(CONFIG.format(rows=rows, columns=columns, dataflow=dataflow))
    lines = [f"g{i}, {g.m}, {g.n}, {g.k}," for i, g in enumerate(gemms)]
    for name in ("gemms.csv", "layout.csv"):
        (folder / name).write_text("\n".join(["Layer, M, N, K,", *lines]) + "\n")
    command = [PYTHON, "-m", "scalesim.scale", "-c", "x.cfg", "-t", "gemms.csv", "-i", "gemm", "-l", "layout.csv"]
    done = subprocess.run([*command, "-p", "out"], cwd=folder, capture_output=True, text=True)
    report = folder / "out" / "run" / "COMPUTE_REPORT.csv"
    assert report.exists(), (done.stdout + done.stderr)[-2000:]
    rows_ = list(csv.DictReader(report.read_text().splitlines(), skipinitialspace=True))
    assert len(rows_) == len(gemms) and all(float(row["Stall Cycles"]) == 0 for row in rows_)
    return [int(float(row["Total Cycles"])) for row in rows_]


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_small_products(dataflow: Dataflow, tmp_path: Path) -> None:
    gemms = [Gemm(20, 32, 24), Gemm(49, 16, 49), Gemm(7, 64, 9), Gemm(33, 31, 65)]
    for rows, columns in ((8, 8), (16, 4)):
        folder = tmp_path / f"{rows}x{columns}"
        folder.mkdir()
        for gemm, reported in zip(gemms, simulate(folder, gemms, rows, columns, dataflow), strict=True):
            ours = systolic_cycles(gemm, rows, columns, dataflow)
            assert reported == ours - 1, "its report counts from 0 to the last busy cycle"
            assert reported == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_one_block_of_a_sam(dataflow: Dataflow, tmp_path: Path) -> None:
    """Every product of MINI's first encoder block, and the attention products of SAM-B's, on 32 x 32 elements."""
    block = [x for x in hwcost.count(MINI).layers if x.path.startswith("image_encoder/blocks_0/")]
    large = [x for x in hwcost.count(VIT_B).layers if x.path.startswith("image_encoder/blocks_0/attn/")]
    chosen = [x.gemm for x in block if x.gemm] + [x.gemm for x in large if x.gemm and x.kind == "attention"]
    assert len(chosen) == 8 + 2, "qkv, two relative positions, qk, av, proj, lin1, lin2"
    reported = simulate(tmp_path, chosen, 32, 32, dataflow)
    ours = [systolic_cycles(g, 32, 32, dataflow) for g in chosen]
    # A repeat is another run of the same product; each report is one less.
    ratios = [s * g.repeat / o for s, g, o in zip(reported, chosen, ours, strict=True)]
    one = [o / g.repeat for o, g in zip(ours, chosen, strict=True)]
    print(dataflow, [f"{r:.5f}" for r in ratios])
    assert reported == [o - 1 for o in one]
    total = sum(s * g.repeat for s, g in zip(reported, chosen, strict=True)) / sum(ours)
    assert total == pytest.approx(1, abs=0.01)
