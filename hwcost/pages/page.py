"""The study as one self-contained HTML page."""

import math
import re
from collections.abc import Sequence
from html import escape

from hwcost.board.estimate import RESOURCES
from hwcost.pages import charts, tables
from hwcost.pages.charts import PALETTE, Frame, legend, linear_ticks, log_ticks
from hwcost.study.ledger import Entry
from hwcost.study.study import CLAIMED, Study, kernel_rows
from hwcost.study.variants import BASELINES, METHOD, SHOWN_GRIDS, TWO_PATH

COLOURS = dict(zip(RESOURCES, PALETTE, strict=False))
ENERGY = {"compute": PALETTE[0], "buffers": PALETTE[2], "DRAM": PALETTE[3], "static": PALETTE[5]}
SHOWN = (*BASELINES, METHOD, TWO_PATH, *(f"grid_{bits}" for bits in SHOWN_GRIDS), "passes")
TOP_KERNELS = 12
TOP_CHANGES = 10
GRID_NOTE = (
    "On the grid every code of every quantizer stands for a whole level on one step, so that each product is one "
    "integer product with one sum: a plain element, a small table at the edge of the array for each row, no second "
    "sum, no sum for each group, one rescale for each output."
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1040px; margin: 32px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 6px; }
p { margin: 6px 0; max-width: 78ch; } .lead { color: #5b6773; }
table { border-collapse: collapse; font-size: 13px; margin: 10px 0; width: 100%; }
td, th { padding: 4px 8px; border-bottom: 1px solid #e3e7ec; text-align: right; vertical-align: top; }
td:first-child, th:first-child, td.text, th.text, td.long { text-align: left; }
td.text { white-space: nowrap; } th { color: #5b6773; font-weight: 600; }
tr.own td { background: #eef4fb; font-weight: 600; }
svg { width: 100%; height: auto; display: block; font-family: inherit; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.cards div { flex: 1 1 120px; border: 1px solid #e3e7ec; border-radius: 8px; padding: 10px 12px; }
.cards b { display: block; font-size: 22px; } .cards span { color: #5b6773; font-size: 13px; }
.legend span { margin-right: 18px; font-size: 13px; color: #5b6773; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
small, .note { color: #5b6773; font-size: 13px; } .scroll { overflow-x: auto; }
"""


def html(study: Study) -> str:
    """The page: counts, comparison, kernels, roofline, energy, sensitivity, ledger, assumptions."""
    gains = tables.grid_gains(study)
    sections = [
        _head(study),
        *([_section("What the grid gains", _list(gains), GRID_NOTE)] if gains else []),
        _section("Side by side", _variants(study), "One image. Every design is as large as the board allows."),
        _section(
            "The method over its baselines",
            _table(tables.RATIO_HEAD, tables.ratio_rows(study)),
            "Both forms of the method. Left: every design as large as fits. Right, \"same array\": all with as many "
            "processing elements as FP32 has, so that only width and traffic differ.",
        ),
        _section("Where it gains little or nothing", _list(tables.gains_nothing(study))),
        _section(
            f"Time, kernel by kernel: {tables.short_form(study, METHOD)}", _kernel_bars(study),
            "In forward order; the colour names what bounds it.",
        ),
        _section("Longest kernels", _kernel_table(study)),
        _section(
            "Roofline", _roofline(study),
            f"One dot for each kernel with products; filled: the method ({tables.short_form(study, METHOD)}), hollow: "
            "FP32. Lines are the roofs of the designs, the fine one that of the method's other form. Dots below their "
            "roof wait for another unit, or for folds that fill the array in part.",
        ),
        _section("Energy", _energy(study), "Joules for one image."),
        _section(
            "What the gain over FP32 depends on", _tornado(study),
            "Speed and energy over FP32 if one number is half or twice as large, within what is possible. The charts "
            f"are those of the method ({tables.short_form(study, METHOD)}).",
        ),
        _section("Claim ledger", _ledger(study)),
        _section("Constants", _constants(study)),
        _section("Not modelled", _list(study.counts.unmodelled)),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(study.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"{''.join(sections)}</body></html>\n"
    )


def _section(title: str, content: str, note: str = "") -> str:
    return f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "") + content


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, own: int = -1, text: Sequence[int] = ()) -> str:
    """A table; row `own` stands out, columns `text` hold words."""

    def cell(tag: str, i: int, value: str) -> str:
        kind = ' class="long"' if len(value) > 40 else ' class="text"' if i in text else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, h) for i, h in enumerate(head)) + "</tr>"]
    for j, row in enumerate(rows):
        lines.append(
            f"<tr{' class=own' if j == own else ''}>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>"
        )
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _head(study: Study) -> str:
    c, total, counts = study.comparison, study.counts.totals(), study.counts
    speed, energy = c.speedup("fp32"), c.energy_ratio("fp32")
    way, what = ("int_macs", "integer products") if counts.grid_bits else ("shifts", "shifts")
    cards = [
        (f"{speed.value:.2f}x", f"speed over FP32 [{speed.low:.2f}, {speed.high:.2f}]"),
        (f"{energy.value:.2f}x", f"energy over FP32 [{energy.low:.2f}, {energy.high:.2f}]"),
        (
            f"{tables.milliseconds(float(c.estimates[METHOD].seconds[0]))} ms",
            f"an image with {counts.prompts} prompt(s)",
        ),
        (f"{tables.number(total['macs'])}MAC", f"{tables.number(total[way]).strip()} of them {what}"),
        (f"{tables.number(total['weight_bytes'])}B", "weights"),
    ]
    if TWO_PATH in study.variants:
        gain = c.speedup(TWO_PATH)
        cards.insert(2, (f"{gain.value:.2f}x", f"speed over the paper's form [{gain.low:.2f}, {gain.high:.2f}]"))
    boxes = "".join(f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in cards)
    return (
        f"<h1>{escape(study.title)}</h1>"
        f'<p class="lead">An estimate, not a measurement: every constant below has a source and a range, and the '
        f"intervals hold 90 % of what those ranges give. Code histograms, which decide the "
        f"arithmetic of the paper's form alone: {escape(tables.codes_note(study))}.</p>"
        f'<div class="cards">{boxes}</div>'
    )


def _variants(study: Study) -> str:
    own = list(study.variants).index(METHOD)
    return _table(tables.VARIANT_HEAD, tables.variant_rows(study), own=own)


def _kernel_bars(study: Study) -> str:
    rows = kernel_rows(study)
    top = max(row["seconds"] for row in rows) * 1e3
    frame = Frame(1000, 280, (0, len(rows)), (0, top * 1.05))
    frame.axes("kernels in forward order: encoder, then decoder", "ms", y_ticks=linear_ticks(top))
    for i, row in enumerate(rows):
        ms = row["seconds"] * 1e3
        x, y = frame.px(i), frame.py(ms)
        tip = f"{row['kernel']}: {ms:.3g} ms, {row['bound']}, {row['speedup_over_fp32']:.2f}x FP32"
        frame.bar(x, y, frame.px(i + 1) - x - 0.6, frame.py(0) - y, COLOURS[row["bound"]], tip)
    border = next((i for i, row in enumerate(rows) if row["part"] == "decoder"), len(rows))
    frame.line([(border, 0), (border, top * 1.05)], charts.MUTED, dashed=True)
    return frame.svg("Time of each kernel") + legend(list(COLOURS.items()))


def _kernel_table(study: Study) -> str:
    """Kernels of one kind and one time in one row."""
    alike: dict[tuple, list[dict]] = {}
    for row in kernel_rows(study):
        name = re.sub(r"_\d+/", "_*/", row["kernel"])
        alike.setdefault((name, row["bound"], f"{row['seconds']:.6g}"), []).append(row)
    over = {"fp32": "over FP32", **{name: f"over {tables.short_form(study, name)}" for name in study.forms[1:]}}
    longest = sorted(alike.items(), key=lambda item: -sum(row["seconds"] for row in item[1]))[:TOP_KERNELS]
    cells = [
        [
            name, bound, str(len(rows)), tables.milliseconds(sum(row["seconds"] for row in rows)),
            *(tables.milliseconds(value) for value in rows[0]["seconds_by_resource"].values()),
            *(f"{rows[0][f'speedup_over_{base}']:.2f}x" for base in over),
        ]
        for (name, bound, _), rows in longest
    ]  # fmt: skip
    units = (f"{name}, ms each" for name in RESOURCES)
    return _table(("kernel", "bound by", "times", "ms in all", *units, *over.values()), cells, text=(1,))


def _roofline(study: Study) -> str:
    c, board = study.comparison, study.accelerator
    clock, efficiency = study.constants["clock_mhz"].value * 1e6, study.constants["dram_efficiency"].value
    fmax = min(clock, study.constants["fp32_fmax_mhz"].value * 1e6)
    bandwidth = efficiency * board.dram_gbps * 1e9
    elements = {name: float(c.estimates[name].elements[0]) for name in ("fp32", *study.forms)}
    peaks = {name: count * (fmax if name == "fp32" else clock) for name, count in elements.items()}
    points = {
        name: [
            (k.macs / float(k.dram_bytes[0]), k.macs / float(k.seconds[:, 0].max()), k)
            for k in c.estimates[name].kernels
            if k.macs and k.dram_bytes[0]
        ]
        for name in ("fp32", METHOD)
    }
    xs = [intensity for group in points.values() for intensity, _, _ in group]
    ys = [rate for group in points.values() for _, rate, _ in group]
    x = (10 ** math.floor(math.log10(min(xs))), 10 ** math.ceil(math.log10(max(xs))))
    y = (10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(*peaks.values(), *ys))))
    frame = Frame(1000, 380, x, y, log=True)
    frame.axes(
        "multiply-accumulates per byte of DRAM traffic", "multiply-accumulates per second",
        x_ticks=log_ticks(*x), y_ticks=log_ticks(*y),
    )  # fmt: skip
    for name in peaks:
        knee = peaks[name] / bandwidth
        start = max(x[0], y[0] / bandwidth)
        roof = [(start, start * bandwidth), (min(knee, x[1]), min(knee, x[1]) * bandwidth)]
        if knee < x[1]:
            roof.append((x[1], peaks[name]))
        is_other = name not in points
        frame.line(
            roof, charts.MUTED if is_other else charts.INK, dashed=name == "fp32", width=0.8 if is_other else 1.6
        )
        label = study.variants[name].label if name == "fp32" else tables.short_form(study, name)
        label = f"{label}: {tables.number(peaks[name])}MAC/s"
        # Roofs lie close together: the higher one is named above, the lower one below its line.
        lift = 14 if peaks[name] < max(peaks.values()) and name != "fp32" else -6
        frame.text(frame.px(x[1]) - 4, frame.py(peaks[name]) + lift, label, anchor="end", fill=charts.INK)
        for intensity, rate, k in points.get(name, []):
            tip = f"{k.name}: {tables.number(rate)}MAC/s at {intensity:.3g} MAC/B, {k.bound}"
            frame.dot(intensity, rate, COLOURS[k.bound], tip, hollow=name == "fp32")
    return frame.svg("Roofline") + legend(list(COLOURS.items()))


def _energy(study: Study) -> str:
    estimates = study.comparison.estimates
    names = [name for name in SHOWN if name in estimates]
    top = max(float(estimates[name].total_joules[0]) for name in names)
    frame = Frame(1000, 34 * len(names) + 70, (0, top * 1.02), (0, len(names)), left=330)
    frame.axes("joules", "", x_ticks=linear_ticks(top))
    for i, name in enumerate(names):
        y, x = frame.py(len(names) - i) + 5, 0.0
        frame.text(frame.left - 8, y + 16, study.variants[name].label, anchor="end", fill=charts.INK)
        for kind, joules in estimates[name].joules.items():
            value = float(joules[0])
            frame.bar(frame.px(x), y, frame.px(x + value) - frame.px(x), 22, ENERGY[kind], f"{kind}: {value:.3g} J")
            x += value
    return frame.svg("Energy by kind") + legend(list(ENERGY.items()))


def _tornado(study: Study) -> str:
    own = study.sensitivities[METHOD]
    speed = [(row.name, row.speedup.value, row.speedup_halved, row.speedup_doubled) for row in own]
    energy = [(row.name, row.energy_ratio.value, row.energy_halved, row.energy_doubled) for row in own]
    table = _table(tables.sensitivity_head(study), tables.sensitivity_rows(study, 14), text=(2,))
    charts_ = _changes("speed over FP32", speed) + _changes("energy over FP32", energy)
    return charts_ + legend((("half", PALETTE[1]), ("twice", PALETTE[0]))) + table


def _changes(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Bars from the nominal ratio to those with (name, nominal, half, twice) the number, the longest first."""
    rows = sorted(rows, key=lambda r: -max(abs(math.log(r[2] / r[1])), abs(math.log(r[3] / r[1]))))[:TOP_CHANGES]
    top, base = max(max(row[1:]) for row in rows) * 1.05, rows[0][1]
    frame = Frame(1000, 24 * len(rows) + 70, (0, top), (0, len(rows)), left=330)
    frame.axes(title, "", x_ticks=linear_ticks(top))
    for i, (name, _, half, twice) in enumerate(rows):
        y = frame.py(len(rows) - i) + 3
        frame.text(frame.left - 8, y + 13, name, anchor="end", fill=charts.INK)
        for value, colour, what in ((half, PALETTE[1], "half"), (twice, PALETTE[0], "twice")):
            left, right = sorted((frame.px(value), frame.px(base)))
            frame.bar(left, y, right - left, 17, colour, f"{name}, {what}: {value:.2f}x")
    frame.line([(base, 0), (base, len(rows))], charts.INK)
    return frame.svg(f"Sensitivity of the {title}")


def _ledger(study: Study) -> str:
    about = "" if study.is_claimed else f"The claims are about {CLAIMED}, not about this model. "
    note = (
        f'<p class="note">{escape(about)}The papers name no device, clock, array or floating-point baseline. Each '
        "dot is one combination of what they leave open; nothing is fitted, and reaching a figure is not reproducing "
        "it.</p>"
    )
    rows = [
        [
            entry.claim.paper, f"{entry.claim.speedup}x", f"{entry.claim.energy_ratio}x", entry.claim.status,
            f"{len(entry.reached)} of {entry.combinations}",
            f"{entry.nearest.speedup:.2f}x and {entry.nearest.energy_ratio:.2f}x",
        ]
        for entry in study.entries
    ]  # fmt: skip
    head = ("claim", "speed", "energy", "read at", "reached by", "nearest")
    verdicts = "".join(
        f"<p><b>{escape(entry.claim.paper)}.</b> {escape(entry.verdict)} Nearest: {escape(_choice(entry))}.</p>"
        for entry in study.entries
    )
    return note + _ledger_chart(study) + _table(head, rows, text=(3,)) + verdicts


def _choice(entry: Entry) -> str:
    return "; ".join(f"{key}: {value}" for key, value in entry.nearest.choice.items())


def _ledger_chart(study: Study) -> str:
    tried = study.entries[0].tried
    claims = [entry.claim for entry in study.entries]
    right = 1.05 * max(*(a.speedup for a in tried), *(c.speedup for c in claims))
    top = 1.05 * max(*(a.energy_ratio for a in tried), *(c.energy_ratio for c in claims))
    frame = Frame(1000, 360, (0, right), (0, top))
    frame.axes(
        "speed over floating point",
        "energy over floating point",
        x_ticks=linear_ticks(right),
        y_ticks=linear_ticks(top),
    )
    kinds = dict(zip(("everything", "matrix products alone"), (PALETTE[0], PALETTE[2]), strict=True))
    for a in tried:
        tip = f"{a.speedup:.2f}x, {a.energy_ratio:.2f}x: " + "; ".join(f"{k}: {v}" for k, v in a.choice.items())
        frame.dot(a.speedup, a.energy_ratio, kinds[a.choice["counted"]], tip, radius=3)
    for claim in claims:
        x, y = frame.px(claim.speedup), frame.py(claim.energy_ratio)
        frame.parts.append(
            f'<path d="M{x - 7:.1f} {y:.1f}h14M{x:.1f} {y - 7:.1f}v14" stroke="{PALETTE[4]}" stroke-width="2.6"/>'
        )
        frame.text(x + 11, y + 4, f"{claim.speedup}x, {claim.energy_ratio}x", fill=PALETTE[4])
    entries = [*kinds.items(), ("claim", PALETTE[4])]
    return frame.svg("Claims and combinations of assumptions") + legend(entries)


def _constants(study: Study) -> str:
    rows = [
        [c.name, f"{c.value:g}", f"{c.low:g} .. {c.high:g}", c.unit, c.node or "-", c.status, c.source]
        for c in study.constants.values()
    ]
    board = study.accelerator
    lines = (
        f"{board.name}: {board.luts:,} LUT, {board.dsps:,} DSP, {board.buffer_bits / 8 / 2**20:.1f} MiB of buffers, "
        f"{board.dram_gbps:g} GB/s {board.dram.upper()}. {board.source}. Dataflow {board.dataflow.upper()}, cores of "
        f"about {board.side} x {board.side}."
    )
    head = ("constant", "value", "range", "unit", "node", "status", "source")
    return f"<p>{escape(lines)}</p>" + _table(head, rows, text=(4, 5, 6))
