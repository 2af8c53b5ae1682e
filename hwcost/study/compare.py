"""The method beside its baselines and without its parts, on one board, with intervals and sensitivities."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Accelerator, Design
from hwcost.board.constants import CONSTANTS, Constants, draws, nominal
from hwcost.board.estimate import Estimate, estimate
from hwcost.counts.codes import AssumedCodes, Histogram, Shares, histograms
from hwcost.counts.counts import Counts, count
from hwcost.counts.formats import site_format
from sam_flax.config import SamConfig

SAMPLES = 200
SEED = 0
INTERVAL = (5.0, 95.0)  # percentiles of the draws
GROUPS = (1, 2, 4, 8, 16)
METHOD = "method"
BASELINES = ("fp32", "fp16", "int8", "uniform")


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
class Variant:
    """Something to build: a model at a precision and the design for it."""

    name: str
    label: str
    counts: Counts
    design: Design


def variants(
    sam_config: SamConfig,
    quant_config: QuantConfig,
    codes: Mapping[str, Any] | None = None,
    *,
    prompts: int = 1,
    assumed: AssumedCodes | None = None,
) -> dict[str, Variant]:
    """The method, its baselines and its ablations, by name.

    What the quantized designs leave in floating point is FP16.

    Args:
        sam_config: the model.
        quant_config: the quantization of the method.
        codes: measured histograms in any form of `hwcost.counts.codes.histograms`. The method uses all of them; a
            variant uses those whose site has the same kind of codes there, at the same width.
        prompts: boxes decoded for the image.
        assumed: what sites without a histogram take.

    Raises:
        InputError: if a histogram fits no site of the method.
    """
    measured = histograms(codes or {})
    bits = max(quant_config.w_bits, quant_config.a_bits)
    tag = f"W{quant_config.w_bits}A{quant_config.a_bits}"
    uniform: dict[str, Any] = {"hluq": False, "cag": False, "agq": False}

    def counted(config: QuantConfig | None, float_bits: int) -> Counts:
        kept = measured if config == quant_config else _fitting(measured, config)
        return count(sam_config, config, kept, prompts=prompts, float_bits=float_bits, assumed=assumed)

    result: dict[str, Variant] = {}

    def add(name: str, label: str, counts: Counts, **design: Any) -> None:
        made = Design(float_bits=counts.float_bits, **{"bits": bits, **design})
        result[name] = Variant(name=name, label=label, counts=counts, design=made)

    def changed(**switches: Any) -> Counts:
        return counted(dataclasses.replace(quant_config, **switches), 16)

    # The HLUQ element serves AGQ's shifts as well; without either, plain elements do.
    element = "dual_path" if quant_config.hluq or quant_config.agq else "mac"
    add("fp32", "FP32", counted(None, 32), element="float", bits=32)
    add("fp16", "FP16", counted(None, 16), element="float", bits=16)
    add("int8", "INT8 uniform", counted(QuantConfig(w_bits=8, a_bits=8, **uniform), 16), element="mac", bits=8)
    add("uniform", f"{tag} uniform", changed(**uniform), element="mac")
    method = counted(quant_config, 16)
    add(METHOD, f"{tag} as configured, dual-path elements", method, element=element)
    add("passes", f"{tag}, HLUQ and AGQ in passes on plain elements", method, element="mac")
    if quant_config.hluq:
        add("no_hluq", f"{tag} without HLUQ, AGQ in passes", changed(hluq=False), element="mac")
    if quant_config.agq:
        add("no_agq", f"{tag} without AGQ", changed(agq=False), element="dual_path" if quant_config.hluq else "mac")
    if quant_config.cag:
        add("no_cag", f"{tag} without CAG", changed(cag=False), element=element)
        for groups in GROUPS:
            add(
                f"groups_{groups}",
                f"{tag}, {groups} group{'s' if groups > 1 else ''}",
                changed(groups=groups),
                element=element,
            )
            if groups > 1:
                label = f"{tag}, {groups} groups told apart in the column"
                add(
                    f"column_{groups}", label, changed(groups=groups), element=element, column_groups=groups
                )  # fmt: skip
    return result


def _fitting(measured: Mapping[str, Histogram], config: QuantConfig | None) -> dict[str, Histogram]:
    """The histograms of sites whose codes have a histogram's kind and width at this precision."""

    def fits(path: str, histogram: Histogram) -> bool:
        site = site_format(path, config, 16)
        return site.cost is not None and site.cost.depends_on_codes and len(histogram.counts) == 2**site.bits

    return {path: histogram for path, histogram in measured.items() if fits(path, histogram)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants on one board under the same sets of constants: the nominal one first, then the draws.

    Attributes:
        accelerator: the board.
        variants: what was compared.
        estimates: by variant, every design as large as fits (iso-resource).
        same_array: by variant, for the baselines and the method, all with FP32's number of elements (iso-array).
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
        for name in (*BASELINES, METHOD)
    }
    return Comparison(accelerator=accelerator, variants=table, estimates=estimates, same_array=same)


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
    table: dict[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS
) -> list[Sensitivity]:
    """The tornado table: one constant at a time, the one that matters most first."""
    base = nominal(constants)
    settings: list[tuple[str, float]] = []
    for name, c in constants.items():
        settings += [(name, x) for x in (c.low, c.high, c.value / 2, min(2 * c.value, c.most))]
    values = {name: np.full(1 + len(settings), value) for name, value in base.items()}
    for column, (name, value) in enumerate(settings, start=1):
        values[name][column] = value
    fp, method = (estimate(x.counts, x.design, accelerator, values) for x in (table["fp32"], table[METHOD]))
    speed, energy = fp.seconds / method.seconds, fp.total_joules / method.total_joules
    rows = []
    for index, name in enumerate(constants):
        s, e = speed[1 + 4 * index : 5 + 4 * index], energy[1 + 4 * index : 5 + 4 * index]
        rows.append(
            Sensitivity(
                name=name,
                speedup=Interval(float(speed[0]), float(s[0]), float(s[1])),
                energy_ratio=Interval(float(energy[0]), float(e[0]), float(e[1])),
                speedup_halved=float(s[2]),
                speedup_doubled=float(s[3]),
                energy_halved=float(e[2]),
                energy_doubled=float(e[3]),
            )
        )
    return sorted(rows, key=lambda row: -row.weight)


def code_sensitivities(
    table: dict[str, Variant], accelerator: Accelerator, constants: Constants = CONSTANTS
) -> list[Sensitivity]:
    """The same for the assumed shares of codes: half and twice as many, which is also their range.

    Sites with a measured histogram are not in question; they count as assumed here.
    """
    method, values = table[METHOD], nominal(constants)
    quant_config, base = method.counts.quant_config, method.counts.assumed
    fp = estimate(table["fp32"].counts, table["fp32"].design, accelerator, values)
    if quant_config is None:
        return []

    def shares(old: Shares, factor: float, name: str) -> Shares:
        value = min(1.0, getattr(old, name) * factor)
        others = {n: getattr(old, n) for n in ("shift", "zero", "multiply") if n != name}
        scale = (1 - value) / max(sum(others.values()), 1e-12)
        return Shares(**{name: value}, **{n: x * scale for n, x in others.items()})

    def gains(assumed: AssumedCodes) -> tuple[float, float]:
        counts = count(
            method.counts.sam_config, quant_config,
            prompts=method.counts.prompts, float_bits=method.counts.float_bits, assumed=assumed,
        )  # fmt: skip
        result = estimate(counts, method.design, accelerator, values)
        return float((fp.seconds / result.seconds)[0]), float((fp.total_joules / result.total_joules)[0])

    changes: dict[str, list[AssumedCodes]] = {}
    factors = (0.5, 2.0)
    if quant_config.hluq:
        for name in ("zero", "multiply"):
            changes[f"share of HLUQ codes that {'are zero' if name == 'zero' else 'multiply'}"] = [
                dataclasses.replace(base, hybrid=shares(base.hybrid, f, name)) for f in factors
            ]
        changes["share of HLUQ's code space that is logarithmic"] = [
            dataclasses.replace(base, grid_rate=base.grid_rate * f) for f in factors
        ]
    if quant_config.agq:
        changes["share of AGQ codes that are zero"] = [
            dataclasses.replace(base, log2=shares(base.log2, f, "zero")) for f in factors
        ]
        changes["AGQ's levels per octave"] = [dataclasses.replace(base, tau=t) for t in (1, 4)]
    if not changes:
        return []
    nominal_speed, nominal_energy = gains(base)
    rows = []
    for name, (halved, doubled) in changes.items():
        (s1, e1), (s2, e2) = gains(halved), gains(doubled)
        rows.append(
            Sensitivity(
                name=name,
                speedup=Interval(nominal_speed, s1, s2),
                energy_ratio=Interval(nominal_energy, e1, e2),
                speedup_halved=s1,
                speedup_doubled=s2,
                energy_halved=e1,
                energy_doubled=e2,
            )  # fmt: skip
        )
    return sorted(rows, key=lambda row: -row.weight)
