"""The papers' FPGA claims beside the estimate, with the assumptions under which the model reaches them.

The papers name no device, clock, array or floating-point baseline, so the model is run under every combination of
what they leave open. Nothing is fitted, and reaching a figure is not reproducing it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants, Values, nominal
from hwcost.board.estimate import Estimate, estimate
from hwcost.study.variants import METHOD, SHOWN_GRIDS, TWO_PATH, Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says of SAM-L at W4A4.

    Attributes:
        paper: which.
        speedup: over "floating point".
        energy_ratio: likewise.
        source: where it was read.
        status: as of a constant.
    """

    paper: str
    speedup: float
    energy_ratio: float
    source: str
    status: str


CLAIMS = (
    Claim(
        paper="AHCPTQ (arXiv 2503.03088 v2, v3; ICCV 2025)", speedup=7.89, energy_ratio=8.64,
        source="Keio-CSG/AHCPTQ README; arxiv.org/html/2503.03088v3", status="source",
    ),
    Claim(
        paper="AHCQ-SAM (arXiv 2503.03088 v4)", speedup=7.12, energy_ratio=6.62,
        source="overfitted.cloud/html/2503.03088v4; wizwand.com/paper/68fa79fe1e209131cea80822", status="secondary",
    ),
)  # fmt: skip

ON_GRID = f"levels on a grid of {SHOWN_GRIDS[0]} bits"
# What the papers leave open -> what it may have been.
LEFT_OPEN: dict[str, tuple[str, ...]] = {
    "baseline": ("fp32", "fp16"),
    "resources": ("as large as fits", "FP32's number of elements"),
    # The grid is not the papers' design; it is here to show what it would reach under the same assumptions.
    "HLUQ and AGQ": ("two-path elements", "passes on plain elements", ON_GRID, "no cost at all"),
    "counted": ("everything", "matrix products alone"),
    "fold": ("overlapped", "drained, as SCALE-Sim"),
    "core side": ("16", "32", "64"),
    "static power": ("counted", "left out"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """One combination of the grid and what the model gives under it."""

    choice: Mapping[str, str]
    speedup: float
    energy_ratio: float

    def reaches(self, claim: Claim) -> bool:
        return self.speedup >= claim.speedup and self.energy_ratio >= claim.energy_ratio

    def distance(self, claim: Claim) -> float:
        """How far the pair is from the claim, as the larger log of a factor."""
        pairs = ((self.speedup, claim.speedup), (self.energy_ratio, claim.energy_ratio))
        return max(abs(float(np.log(ours / theirs))) for ours, theirs in pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A claim and what became of it."""

    claim: Claim
    tried: tuple[Assumptions, ...]
    reached: tuple[Assumptions, ...]  # every combination that reaches it, the nearest first
    nearest: Assumptions
    best_speedup: float
    best_energy_ratio: float

    @property
    def combinations(self) -> int:
        return len(self.tried)

    @property
    def verdict(self) -> str:
        """One sentence."""
        claim = f"{self.claim.speedup}x and {self.claim.energy_ratio}x"
        if not self.reached:
            return (
                f"None of the {self.combinations} combinations reaches {claim} together; the largest are "
                f"{self.best_speedup:.2f}x and {self.best_energy_ratio:.2f}x."
            )
        common = [f"{key}: {value}" for key, value in self.shared().items()]
        shared = f", all with {'; '.join(common)}" if common else ", with no assumption common to all"
        return f"{len(self.reached)} of the {self.combinations} combinations reach {claim} together{shared}."

    def shared(self) -> dict[str, str]:
        """The assumptions that all combinations that reach the claim have in common."""
        sets = {key: {a.choice[key] for a in self.reached} for key in LEFT_OPEN}
        return {key: next(iter(found)) for key, found in sets.items() if len(found) == 1}


def ledger(table: dict[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS) -> list[Entry]:
    """Runs the grid on a board.

    Args:
        table: `hwcost.study.compare.variants` of the model. The claims are about SAM-L at W4A4; other models are only
            set beside them.
        accelerator: the board.
        constants: what it is run with, at their values.
    """
    found = list(_combinations(table, accelerator, nominal(constants)))
    entries = []
    for claim in CLAIMS:
        reached = sorted((a for a in found if a.reaches(claim)), key=lambda a: a.distance(claim))
        entries.append(
            Entry(
                claim=claim,
                tried=tuple(found),
                reached=tuple(reached),
                nearest=min(found, key=lambda a: a.distance(claim)),
                best_speedup=max(a.speedup for a in found),
                best_energy_ratio=max(a.energy_ratio for a in found),
            )
        )
    return entries


def _combinations(table: dict[str, Variant], accelerator: Accelerator, values: Values) -> Iterator[Assumptions]:
    cache: dict[tuple, Estimate] = {}
    fp32_elements = float(estimate(table["fp32"].counts, table["fp32"].design, accelerator, values).elements[0])
    paper = table.get(TWO_PATH, table[METHOD])
    # Without HLUQ, CAG and AGQ there are no levels, and the grid is the method itself.
    grid = (
        table[METHOD]
        if table[METHOD].counts.grid_bits == SHOWN_GRIDS[0]
        else table.get(f"grid_{SHOWN_GRIDS[0]}", paper)
    )
    elements = {"passes on plain elements": "mac", "no cost at all": "ideal"}

    def run(name: str, choice: Mapping[str, str]) -> Estimate:
        # What does not concern a design is no part of its key.
        key = (name, *(choice[k] for k in ("resources", "counted", "fold", "core side")))
        if name == METHOD:
            key += (choice["HLUQ and AGQ"],)
        if key not in cache:
            variant = table[name]
            changes: dict[str, Any] = {}
            if choice["resources"] != LEFT_OPEN["resources"][0]:
                changes["elements"] = fp32_elements
            if name == METHOD:
                variant = grid if choice["HLUQ and AGQ"] == ON_GRID else paper
                changes["element"] = elements.get(choice["HLUQ and AGQ"], variant.design.element)
            board = dataclasses.replace(
                accelerator, side=int(choice["core side"]), overlap=choice["fold"] == "overlapped"
            )
            cache[key] = estimate(
                variant.counts, dataclasses.replace(variant.design, **changes), board, values,
                products_only=choice["counted"] != "everything",
            )  # fmt: skip
        return cache[key]

    for options in itertools.product(*LEFT_OPEN.values()):
        choice = dict(zip(LEFT_OPEN, options, strict=True))
        fp, method = run(choice["baseline"], choice), run(METHOD, choice)
        static = choice["static power"] == "counted"
        joules = [float(e.total_joules[0] - (0 if static else e.joules["static"][0])) for e in (fp, method)]
        yield Assumptions(
            choice=choice,
            speedup=float(fp.seconds[0] / method.seconds[0]),
            energy_ratio=joules[0] / joules[1],
        )
