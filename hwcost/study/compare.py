"""Variants on one board, with intervals that the constants' ranges give."""

import dataclasses

import numpy as np

from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants, draws, nominal
from hwcost.board.estimate import Estimate, estimate
from hwcost.study.variants import BASELINES, METHOD, Variant, forms

SAMPLES = 200
SEED = 0
INTERVAL = (5.0, 95.0)  # percentiles of the draws


@dataclasses.dataclass(frozen=True)
class Interval:
    """A nominal value with the range that the constants' ranges carry it over."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Interval":
        """From (1 + draws,): the nominal first."""
        low, high = np.percentile(samples[1:], INTERVAL)
        return cls(float(samples[0]), float(low), float(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants on one board under the same sets of constants: the nominal one first, then the draws.

    Attributes:
        accelerator: the board.
        variants: what was compared.
        estimates: by variant, every design as large as fits (iso-resource).
        same_array: by variant, for the baselines and both forms of the method, all with FP32's number of elements
            (iso-array).
    """

    accelerator: Accelerator
    variants: dict[str, Variant]
    estimates: dict[str, Estimate]
    same_array: dict[str, Estimate]

    def speedup(self, over: str, of: str = METHOD, *, iso_array: bool = False) -> Interval:
        """How many times faster `of` is than `over`."""
        table = self.same_array if iso_array else self.estimates
        return Interval.of(table[over].seconds / table[of].seconds)

    def energy_ratio(self, over: str, of: str = METHOD, *, iso_array: bool = False) -> Interval:
        """How many times less energy `of` needs than `over`."""
        table = self.same_array if iso_array else self.estimates
        return Interval.of(table[over].total_joules / table[of].total_joules)

    def slow_kernels(self, over: str = "fp32", least: float = 1.5) -> list[tuple[str, float]]:
        """Kernels that the method speeds up by less than `least`, the longest first: (name, speedup)."""
        pairs = zip(self.estimates[over].kernels, self.estimates[METHOD].kernels, strict=True)
        rows = [(b.name, a.seconds[:, 0].max() / b.seconds[:, 0].max(), b.seconds[:, 0].max()) for a, b in pairs]
        return [(name, float(gain)) for name, gain, _ in sorted(rows, key=lambda row: -row[2]) if gain < least]


def compare(table: dict[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS) -> Comparison:
    """Estimates every variant on a board."""
    base, drawn = nominal(constants), draws(SAMPLES, SEED, constants)
    values = {name: np.concatenate([[base[name]], drawn[name]]) for name in base}
    estimates = {name: estimate(x.counts, x.design, accelerator, values) for name, x in table.items()}
    elements = float(estimates["fp32"].elements[0])
    same = {
        name: estimate(
            table[name].counts, dataclasses.replace(table[name].design, elements=elements), accelerator, values
        )
        for name in (*BASELINES, *forms(table))
    }
    return Comparison(accelerator=accelerator, variants=table, estimates=estimates, same_array=same)
