"""The study as text."""

from collections.abc import Sequence

from hwcost.board.constants import CONSTANTS
from hwcost.study.compare import BASELINES, METHOD, Interval
from hwcost.study.study import CLAIMED, Study

TOP = 10


def number(value: float) -> str:
    """Three significant digits with a unit prefix: 1310000000000 -> "1.31 T"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def times(interval: Interval) -> str:
    """A ratio with its interval: "5.27x [4.40, 6.68]"."""
    return f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def milliseconds(seconds: float) -> str:
    """Three digits where there are not more before the point."""
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 3}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def padded(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    return "\n".join(map(padded, lines))


def variant_rows(study: Study) -> list[list[str]]:
    """label, elements, ms, J, speedup and energy ratio over FP32."""
    c = study.comparison
    return [
        [
            variant.label,
            f"{c.estimates[name].elements[0]:.0f}",
            milliseconds(float(c.estimates[name].seconds[0])),
            f"{c.estimates[name].total_joules[0]:.3g}",
            times(c.speedup("fp32", name)),
            times(c.energy_ratio("fp32", name)),
        ]
        for name, variant in study.variants.items()
    ]


def ratio_rows(study: Study) -> list[list[str]]:
    """baseline, the method's speedup and energy ratio over it: iso-resource, then iso-array."""
    c = study.comparison
    return [
        [
            study.variants[name].label,
            times(c.speedup(name)),
            times(c.energy_ratio(name)),
            times(c.speedup(name, iso_array=True)),
            times(c.energy_ratio(name, iso_array=True)),
        ]
        for name in BASELINES
    ]


def sensitivity_rows(study: Study, limit: int = TOP) -> list[list[str]]:
    """name, value, status, speedup and energy ratio with half and twice the number."""
    rows = []
    for row in sorted((*study.constant_rows, *study.code_rows), key=lambda row: -row.weight)[:limit]:
        c = study.constants.get(row.name)
        rows.append(
            [
                row.name,
                f"{c.value:g} {'' if c.unit == '1' else c.unit}".strip() if c else "-",
                c.status if c else "measured on MINI",
                f"{row.speedup_halved:.2f}x .. {row.speedup_doubled:.2f}x",
                f"{row.energy_halved:.2f}x .. {row.energy_doubled:.2f}x",
            ]
        )
    return rows


def gains_nothing(study: Study) -> list[str]:
    """Sentences on where the method gains little or nothing, from the figures."""
    c = study.comparison
    found = []
    slower = c.speedup("uniform")
    if slower.value < 1:
        found.append(
            f"Against uniform codes of the same width: {slower.value:.2f}x the speed, "
            f"{c.energy_ratio('uniform').value:.2f}x the energy efficiency."
        )
    if "passes" in c.estimates and c.speedup(METHOD, "passes").value > 1:
        found.append(
            f"Plain elements that take HLUQ and AGQ in several passes are {c.speedup(METHOD, 'passes').value:.2f}x as "
            "fast as dual-path elements on the same board."
        )
    same = c.speedup("fp32", iso_array=True)
    found.append(
        f"With no more elements than FP32 has, the method is {same.value:.2f}x as fast: the gain is the room that "
        "narrow codes leave for more elements."
    )
    small = [f"{name} ({gain:.2f}x)" for name, gain in c.slow_kernels(least=1.0)]
    if small:
        found.append(
            f"{len(small)} kernels are slower than in FP32, since the recipe leaves them in floating point and the "
            f"array for those is small: {', '.join(small[:3])}" + (" and others." if len(small) > 3 else ".")
        )
    return found


def text(study: Study) -> str:
    """All tables."""
    total = study.counts.totals()
    counts = study.counts
    sites = f"{counts.measured_sites} sites measured, {counts.assumed_sites} assumed"
    sites += f" ({counts.assumed.source})" if counts.assumed_sites else ""
    ways = ("int_macs", "float_macs", "shifts", "skipped")
    parts = [
        study.title,
        "",
        f"Counts for one image with {counts.prompts} prompt(s); codes: {sites}",
        f"  MACs {number(total['macs'])}= " + ", ".join(f"{name} {number(total[name])}" for name in ways),
        "  "
        + ", ".join(f"{n} {number(total[n])}" for n in ("dual_adds", "rescales", "elementwise", "transcendentals")),
        "  "
        + ", ".join(
            f"{name.removesuffix('_bytes')} {number(total[name])}B"
            for name in ("weight_bytes", "qparam_bytes", "activation_bytes", "dram_activation_bytes")
        ),
        "",
        "Time and energy for one image, each design as large as the board allows; intervals hold 90 % of the draws",
        table(["", "elements", "ms", "J", "speed over FP32", "energy over FP32"], variant_rows(study)),
        "",
        "The method over its baselines: as large as fits, and all with FP32's number of elements",
        table(["", "speed", "energy", "speed, same array", "energy, same array"], ratio_rows(study)),
        "",
        "Gains little or nothing:",
        *[f"  {line}" for line in gains_nothing(study)],
        "",
        "What moves the gain over FP32 most, if it is half or twice as large",
        table(["", "value", "status", "speed", "energy"], sensitivity_rows(study)),
        "",
        f"Claims of the papers, which are about {CLAIMED}" + ("" if study.is_claimed else " and not about this model"),
        *[f"  {entry.claim.paper} [{entry.claim.status}]: {entry.verdict}" for entry in study.entries],
        "",
        f"Not modelled: {'; '.join(counts.unmodelled)}.",
    ]
    fixed = [name for name, record in study.constants.items() if record != CONSTANTS[name]]
    if fixed:
        parts.insert(1, "Constants given: " + ", ".join(f"{n}={study.constants[n].value:g}" for n in fixed))
    return "\n".join(parts)
