"""What one number, a constant or a share of codes, does to the method's gain over FP32."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants, nominal
from hwcost.board.estimate import estimate
from hwcost.counts.codes import AssumedCodes, Shares
from hwcost.counts.counts import count
from hwcost.study.compare import Interval
from hwcost.study.variants import METHOD, Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one number does to the method's gain over FP32.

    Attributes:
        name: of the constant, or of a share of codes.
        speedup: nominal and at the ends of its range (`Interval.low` belongs to the range's low end).
        energy_ratio: likewise.
        speedup_halved, speedup_doubled: with half and twice the number, within what is possible.
        energy_halved, energy_doubled: likewise.
    """

    name: str
    speedup: Interval
    energy_ratio: Interval
    speedup_halved: float
    speedup_doubled: float
    energy_halved: float
    energy_doubled: float

    @property
    def weight(self) -> float:
        """Largest change by half or twice the number, as the log of a factor."""
        pairs = (
            (self.speedup_halved, self.speedup.value), (self.speedup_doubled, self.speedup.value),
            (self.energy_halved, self.energy_ratio.value), (self.energy_doubled, self.energy_ratio.value),
        )  # fmt: skip
        return max(abs(float(np.log(changed / base))) for changed, base in pairs)


def sensitivities(
    table: Mapping[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS, form: str = METHOD
) -> list[Sensitivity]:
    """The tornado table: one constant at a time, the one that matters most first.

    Args:
        table: the variants; FP32 and a form of the method are needed.
        accelerator: the board.
        constants: what is varied, around their values.
        form: the variant whose gain is asked for.
    """
    base = nominal(constants)
    settings: list[tuple[str, float]] = []
    for name, c in constants.items():
        settings += [(name, x) for x in (c.low, c.high, c.value / 2, min(2 * c.value, c.most))]
    values = {name: np.full(1 + len(settings), value) for name, value in base.items()}
    for column, (name, value) in enumerate(settings, start=1):
        values[name][column] = value
    fp, method = (estimate(x.counts, x.design, accelerator, values) for x in (table["fp32"], table[form]))
    gains = np.stack([fp.seconds / method.seconds, fp.total_joules / method.total_joules], axis=1).tolist()
    rows = []
    for index, name in enumerate(constants):
        low, high, halved, doubled = gains[1 + 4 * index : 5 + 4 * index]
        rows.append(_row(name, gains[0], low, high, halved, doubled))
    return sorted(rows, key=lambda row: -row.weight)


def all_sensitivities(
    table: Mapping[str, Variant], accelerator: Accelerator, constants: Constants, form: str
) -> list[Sensitivity]:
    """`sensitivities` and `code_sensitivities` of a form together, the largest first."""
    rows = [f(table, accelerator, constants, form) for f in (sensitivities, code_sensitivities)]
    return sorted(itertools.chain(*rows), key=lambda row: -row.weight)


Gains = Sequence[float]  # speed and energy over FP32


def _row(name: str, base: Gains, low: Gains, high: Gains, halved: Gains, doubled: Gains) -> Sensitivity:
    (speed, energy), (low_speed, low_energy), (high_speed, high_energy) = base, low, high
    return Sensitivity(
        name=name,
        speedup=Interval(speed, low_speed, high_speed),
        energy_ratio=Interval(energy, low_energy, high_energy),
        speedup_halved=halved[0],
        speedup_doubled=doubled[0],
        energy_halved=halved[1],
        energy_doubled=doubled[1],
    )


def code_sensitivities(
    table: Mapping[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS, form: str = METHOD
) -> list[Sensitivity]:
    """The same for the assumed shares of codes: half and twice as many, which is also their range.

    Sites with a measured histogram are not in question; they count as assumed here. On the grid, and without HLUQ and
    AGQ, nothing depends on the codes, and there are no rows.
    """
    method, values = table[form], nominal(constants)
    quant_config, base = method.counts.quant_config, method.counts.assumed
    fp = estimate(table["fp32"].counts, table["fp32"].design, accelerator, values)
    if quant_config is None or method.counts.grid_bits:
        return []

    def gains(assumed: AssumedCodes) -> tuple[float, float]:
        counts = count(
            method.counts.sam_config, quant_config,
            prompts=method.counts.prompts, float_bits=method.counts.float_bits, grid_bits=0, assumed=assumed,
        )  # fmt: skip
        result = estimate(counts, method.design, accelerator, values)
        return float((fp.seconds / result.seconds)[0]), float((fp.total_joules / result.total_joules)[0])

    rows, nominal_gains = [], gains(base)
    for name, changed in _changed_codes(quant_config, base).items():
        halved, doubled = (gains(assumed) for assumed in changed)
        rows.append(_row(name, nominal_gains, halved, doubled, halved, doubled))
    return sorted(rows, key=lambda row: -row.weight)


def _changed_codes(quant_config: QuantConfig, base: AssumedCodes) -> dict[str, tuple[AssumedCodes, AssumedCodes]]:
    """What is varied -> the assumed codes with half and with twice as much of it."""

    def both(field: str, name: str) -> tuple[AssumedCodes, AssumedCodes]:
        old = getattr(base, field)
        changed: list[dict[str, Any]] = [{field: _rescaled(old, factor, name)} for factor in (0.5, 2.0)]
        return dataclasses.replace(base, **changed[0]), dataclasses.replace(base, **changed[1])

    changes: dict[str, tuple[AssumedCodes, AssumedCodes]] = {}
    if quant_config.hluq:
        changes["share of HLUQ codes that are zero"] = both("hybrid", "zero")
        changes["share of HLUQ codes that multiply"] = both("hybrid", "multiply")
        halved, doubled = (dataclasses.replace(base, grid_rate=base.grid_rate * f) for f in (0.5, 2.0))
        changes["share of HLUQ's code space that is logarithmic"] = halved, doubled
    if quant_config.agq:
        changes["share of AGQ codes that are zero"] = both("log2", "zero")
        changes["AGQ's levels per octave"] = dataclasses.replace(base, tau=1), dataclasses.replace(base, tau=4)
    return changes


def _rescaled(shares: Shares, factor: float, name: str) -> Shares:
    """The shares with one of them multiplied and the others made to fill what is left."""
    value = min(1.0, getattr(shares, name) * factor)
    others = {n: getattr(shares, n) for n in ("shift", "zero", "multiply") if n != name}
    scale = (1 - value) / max(sum(others.values()), 1e-12)
    return Shares(**{name: value}, **{n: x * scale for n, x in others.items()})
