"""The study as text."""

from collections.abc import Sequence

from hwcost.board.constants import CONSTANTS
from hwcost.counts.counts import Counts
from hwcost.study.compare import Interval
from hwcost.study.study import CLAIMED, Study
from hwcost.study.variants import METHOD, TWO_PATH, baselines

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


VARIANT_HEAD = ("", "elements", "ms", "J", "speed over FP32", "energy over FP32")


def variant_rows(study: Study) -> list[list[str]]:
    """The cells under `VARIANT_HEAD`, a row for each variant."""
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


RATIO_HEAD = ("", "speed", "energy", "speed, same array", "energy, same array")


def ratio_rows(study: Study) -> list[list[str]]:
    """The cells under `RATIO_HEAD`: each form of the method over each baseline, iso-resource, then iso-array."""
    c = study.comparison
    return [
        [
            f"{short_form(study, form)} over {short_label(study, base)}",
            times(c.speedup(base, form)),
            times(c.energy_ratio(base, form)),
            times(c.speedup(base, form, iso_array=True)),
            times(c.energy_ratio(base, form, iso_array=True)),
        ]
        for form in study.forms
        for base in baselines(study.variants)
        if base != form
    ]


def short_form(study: Study, name: str) -> str:
    """What tells a form of the method from the other: "8-bit grid" or "paper's form"."""
    bits = study.variants[name].counts.grid_bits
    return f"{bits}-bit grid" if bits else "paper's form"


def short_label(study: Study, name: str) -> str:
    """A baseline's label; the paper's form without its bits and elements."""
    return "the paper's form" if name == TWO_PATH else study.variants[name].label


def sensitivity_head(study: Study) -> list[str]:
    """Over the columns of `sensitivity_rows`: each form's speed and energy over FP32."""
    return [
        "", "value", "status",
        *(f"{what}, {short_form(study, form)}" for form in study.forms for what in ("speed", "energy")),
    ]  # fmt: skip


def sensitivity_rows(study: Study, limit: int = TOP) -> list[list[str]]:
    """name, value, status; each form's speedup and energy ratio with half and twice the number.

    The rows are those that matter most to either form; on the grid nothing depends on the shares of codes.
    """
    by_form = {form: {row.name: row for row in rows} for form, rows in study.sensitivities.items()}
    weights: dict[str, float] = {}
    for known in by_form.values():
        for name, row in known.items():
            weights[name] = max(weights.get(name, 0.0), row.weight)
    rows = []
    for name in sorted(weights, key=lambda name: -weights[name])[:limit]:
        c = study.constants.get(name)
        cells: list[str] = []
        for known in by_form.values():
            found = known.get(name)
            cells += (
                [
                    f"{found.speedup_halved:.2f}x .. {found.speedup_doubled:.2f}x",
                    f"{found.energy_halved:.2f}x .. {found.energy_doubled:.2f}x",
                ]
                if found
                else ["-", "-"]
            )
        value = f"{c.value:g} {'' if c.unit == '1' else c.unit}".strip() if c else "-"
        rows.append([name, value, c.status if c else "measured on mini-scenes", *cells])
    return rows


def grid_gains(study: Study) -> list[str]:
    """Sentences on what the grid gains over what would be built without it, from the figures; none without a grid."""
    c, grid = study.comparison, next((name for name in study.forms if study.variants[name].counts.grid_bits), "")
    paper = next((name for name in study.forms if name != grid), "")
    if not grid or not paper:
        return []
    elements = {name: float(c.estimates[name].elements[0]) for name in ("uniform", paper, grid)}
    return [
        f"Over the paper's form: {times(c.speedup(paper, grid))} the speed, {times(c.energy_ratio(paper, grid))} the "
        f"energy efficiency; {elements[grid] / elements[paper]:.2f}x as many elements fit.",
        f"Over uniform codes of the same width, the bound of any such design: {times(c.speedup('uniform', grid))} the "
        f"speed, {times(c.energy_ratio('uniform', grid))} the energy efficiency.",
        f"Over uniform INT8: {times(c.speedup('int8', grid))} the speed, {times(c.energy_ratio('int8', grid))} the "
        "energy efficiency.",
    ]


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
    paper = study.forms[-1] if study.counts.grid_bits else METHOD
    if "passes" in c.estimates and c.speedup(paper, "passes").value > 1:
        found.append(
            f"Plain elements that take HLUQ and AGQ in several passes are {c.speedup(paper, 'passes').value:.2f}x as "
            "fast as two-path elements on the same board."
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


def _counts(counts: Counts) -> list[str]:
    """Operations and bytes of one form."""
    total = counts.totals()
    ways = ("int_macs", "float_macs", "shifts", "skipped")
    rest = ("dual_adds", "rescales", "elementwise", "transcendentals")
    sizes = ("weight_bytes", "qparam_bytes", "activation_bytes", "dram_activation_bytes")
    return [
        f"  MACs {number(total['macs'])}= " + ", ".join(f"{name} {number(total[name])}" for name in ways),
        "  " + ", ".join(f"{name} {number(total[name])}" for name in rest),
        "  " + ", ".join(f"{name.removesuffix('_bytes')} {number(total[name])}B" for name in sizes),
    ]


def codes_note(study: Study) -> str:
    """Where the shares of codes are from, on which the arithmetic of the paper's form depends."""
    counts = study.paper_counts
    sites = f"{counts.measured_sites} sites measured, {counts.assumed_sites} assumed"
    return sites + (f" ({counts.assumed.source})" if counts.assumed_sites else "")


def text(study: Study) -> str:
    """All tables."""
    parts = [study.title]
    fixed = [name for name, record in study.constants.items() if record != CONSTANTS[name]]
    if fixed:
        parts.append("Constants given: " + ", ".join(f"{n}={study.constants[n].value:g}" for n in fixed))
    parts += ["", f"Counts for one image with {study.counts.prompts} prompt(s)"]
    for form in study.forms:
        variant = study.variants[form]
        codes = "" if variant.counts.grid_bits else f"; codes: {codes_note(study)}"
        parts += [f" {variant.label}{codes}", *_counts(variant.counts)]
    gains = grid_gains(study)
    parts += [
        "",
        "Time and energy for one image, each design as large as the board allows; intervals hold 90 % of the draws",
        table(VARIANT_HEAD, variant_rows(study)),
        "",
        "The method over its baselines: as large as fits, and all with FP32's number of elements",
        table(RATIO_HEAD, ratio_rows(study)),
        *(["", "What the grid gains:", *(f"  {line}" for line in gains)] if gains else []),
        "",
        "Gains little or nothing:",
        *[f"  {line}" for line in gains_nothing(study)],
        "",
        "What moves the gain over FP32 most, if it is half or twice as large",
        table(sensitivity_head(study), sensitivity_rows(study)),
        "",
        f"Claims of the papers, which are about {CLAIMED}" + ("" if study.is_claimed else " and not about this model"),
        *[f"  {entry.claim.paper} [{entry.claim.status}]: {entry.verdict}" for entry in study.entries],
        "",
        f"Not modelled: {'; '.join(study.counts.unmodelled)}.",
    ]
    return "\n".join(parts)
