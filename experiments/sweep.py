"""Runs `experiments.main` for many settings on the same model, images and boxes, and writes one table.

    python -m experiments.sweep --methods=minmax,qdrop,ahcptq,ahcptq-cag,ahcptq+groups=8 --bits=44,66 --seeds=3 \\
        --iterations=200 --out=runs/sweep

A method may be followed by what to switch off (`-cag`), on (`+hluq_fine`) or set (`+groups=8`): `ahcptq-hluq-cag` is
ahcptq without HLUQ and CAG. `--method`, `--w_bits`, `--a_bits` and `--seed` are the settings' own; every other flag of
`experiments.main` holds for all of them. Runs that `--records` (by default `<out>/records.jsonl`) has are not repeated,
and one that was killed goes on. Writes `<out>/table.md`, whose second table has a column for each pair of widths,
`<out>/table.csv`, `<out>/table.png` and a folder for every run, with its quantized model and, by `--reports`, its
report. Every row says which model it is of.
"""

import csv
import dataclasses
import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.config import METHODS
from experiments import main as main_job
from experiments.job import options as options_module
from experiments.job import records
from experiments.job.allocator import keep_pages
from experiments.job.command import finish
from experiments.job.options import Options, define_flags, options_from_flags
from experiments.job.results import write_atomically
from experiments.job.sweep_figure import draw

# What a method's name may switch or set, and the type of its value.
SWITCHES = ("hluq", "cag", "big", "agq", "hluq_fine", "hluq_reach_maximum", "weight_search")
NUMBERS: dict[str, type] = {
    "groups": int,
    "group_metric": str,
    "hluq_rows": int,
    "softmax_rows": int,
    "act_range": str,
    "iterations": int,
    "rounding_rate": float,
    "scale_rate": float,
    "granularity": str,
    "loss_power": float,
    "harder": float,
}
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU", "agreement_mIoU")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table before seeds are averaged.

    Attributes:
        text: the method as it was given, "ahcptq-cag+groups=8".
        method: its first part.
        changes: fields of `Options` and their values.
    """

    text: str
    method: str
    changes: tuple[tuple[str, Any], ...]
    w_bits: int
    a_bits: int

    @property
    def name(self) -> str:
        return f"{self.text}_w{self.w_bits}a{self.a_bits}"

    @property
    def bits(self) -> str:
        return f"W{self.w_bits}A{self.a_bits}"

    def options(self, base: Options, seed: int, out: Path) -> Options:
        """The run's options: those of the command line with this setting on top."""
        fixed: dict[str, Any] = {"method": self.method, "w_bits": self.w_bits, "a_bits": self.a_bits, "seed": seed}
        return dataclasses.replace(base, **fixed, out=str(out / f"{self.name}_s{seed}"), **dict(self.changes))


def parse_method(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """ "ahcptq-cag+groups=8" -> its method and its changes.

    Raises:
        ValueError: if the method, a switch or a value is unknown.
    """
    # Not at the sign of an exponent, as in +scale_rate=1e-3.
    method, *parts = re.split(r"(?<!\de)(?=[-+])", text)
    if method not in METHODS:
        raise ValueError(f"--methods has {method!r}; choose of {', '.join(METHODS)}.")
    changes: list[tuple[str, Any]] = []
    for part in parts:
        name, equals, value = part[1:].partition("=")
        if name in SWITCHES and not equals:
            changes.append((name, part[0] == "+"))
        elif name in NUMBERS and equals and part[0] == "+":
            try:
                changes.append((name, NUMBERS[name](value)))
            except ValueError:
                raise ValueError(f"--methods has {part!r} in {text!r}; {name} is a number.") from None
        else:
            raise ValueError(
                f"--methods has {part!r} in {text!r}; switch with - or + one of {', '.join(SWITCHES)}, or set with "
                f"+name=value one of {', '.join(NUMBERS)}."
            )
    return method, tuple(changes)


def parse_settings(methods: str, bits: str) -> list[Setting]:
    """The settings named by the flags, each once, bits outermost.

    Args:
        methods: e.g. "ahcptq,ahcptq-hluq-cag,minmax".
        bits: e.g. "44,88": two digits each, weights and activations.

    Raises:
        ValueError: if a method, a switch or a width is unknown.
    """
    settings = []
    for pair in bits.split(","):
        if len(pair) != 2 or not pair.isdigit():
            raise ValueError(f"--bits has {pair!r}; give two digits for each, weights and activations, like 44,66.")
        for text in methods.split(","):
            settings.append(Setting(text, *parse_method(text), int(pair[0]), int(pair[1])))
    return list(dict.fromkeys(settings))


def row(results: dict[str, Any]) -> Row:
    """The table's columns of one run."""
    return {**results["quantized"], "agreement_mIoU": results["agreement_mIoU"], "model": results["model"]}


def _cell(column: str, values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    # APs are percentages, IoUs fractions.
    mean, digits = float(np.mean(known)), 3 if column.endswith("mIoU") else 1
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def table(rows: dict[str, list[Row]]) -> str:
    """Markdown: every setting, mean ± deviation over seeds, "floating point" being one of each model."""
    lines = ["| model | run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, runs in rows.items():
        cells = " | ".join(_cell(column, [r.get(column) for r in runs]) for column in COLUMNS)
        lines.append(f"| {runs[0]['model']} | {name.split(':')[0]} | {cells} |")
    return "\n".join(lines) + "\n"


def table_by_bits(settings: list[Setting], rows: dict[str, list[Row]]) -> str:
    """Markdown: AP and agreement of every method, a column for each pair of widths."""
    widths = list(dict.fromkeys(setting.bits for setting in settings))
    lines = ["| model | method | " + " | ".join(f"{w}, AP | agreement" for w in widths) + " |"]
    lines.append("|---" * (2 + 2 * len(widths)) + "|")
    models: list[str] = []
    for text in dict.fromkeys(setting.text for setting in settings):
        found = {s.bits: rows[s.name] for s in settings if s.text == text and s.name in rows}
        if not found:
            continue
        model = next(iter(found.values()))[0]["model"]
        if model not in models:
            models.append(model)
            floating = _cell("AP", [run["AP"] for run in rows[f"floating point:{model}"]])
            cells = " | ".join(f"{floating} | –" for _ in widths)
            lines.append(f"| {model} | floating point | {cells} |")
        cells = " | ".join(
            _cell(column, [run.get(column) for run in found.get(width, [])])
            for width in widths
            for column in ("AP", "agreement_mIoU")
        )
        lines.append(f"| {model} | {text} | {cells} |")
    return "\n".join(lines) + "\n"


def table_csv(rows: dict[str, list[Row]]) -> str:
    """One line per run and seed."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["model", "run", "seed", *COLUMNS])
    for name, runs in rows.items():
        for seed, values in enumerate(runs):
            cells = (values.get(column) for column in COLUMNS)
            writer.writerow([values["model"], name.split(":")[0], seed, *cells])
    return text.getvalue()


def sweep(
    base: Options,
    settings: list[Setting],
    seeds: int,
    out: Path,
    records_file: Path | None = None,
    reports: bool = False,
) -> str:
    """Runs what is missing and returns the table, which is also written after every run.

    Seeds are outermost, so that settings that share calibration images follow one another and share what was observed
    on them.

    Args:
        records_file: of the runs that are done, see `records`; by default in `out`.
        reports: makes every run's report.

    Raises:
        ValueError, FileNotFoundError: before the first run, if a setting has a value that cannot be, the records are
            damaged or a folder cannot be written; else as `experiments.main.run`.
    """
    records_file = out / "records.jsonl" if records_file is None else records_file
    done = records.read(records_file)
    runs = [(seed, setting, _options(setting, base, seed, out)) for seed in range(seeds) for setting in settings]
    main_job.check_writable(out, "--out")
    main_job.check_writable(records_file.parent, "--records")
    kept = sum(records.key(options) in done for _, _, options in runs)
    print(f"{kept} of {len(runs)} runs are in {records_file}.", file=sys.stderr, flush=True)
    rows: dict[str, list[Row]] = {}
    cache = StatisticsCache()
    for seed, setting, options in runs:
        results = done.get(records.key(options))
        if missing := results is None:
            print(f"== {setting.name}, seed {seed}", file=sys.stderr, flush=True)
            found = main_job.run(options, journal=out / "partial", cache=cache, with_report=reports)
            results = records.add(records_file, options, found)
        # A model's floating-point row stands before its first setting.
        rows.setdefault(f"floating point:{results['model']}", [{**results["fp"], "model": results["model"]}])
        rows.setdefault(setting.name, []).append(row(results))
        if missing:
            _write_tables(out, settings, rows)
    if kept < len(runs):
        # What evaluations left serves interrupted sweeps only: a later one may be of other code.
        shutil.rmtree(out / "partial", ignore_errors=True)
    return _write_tables(out, settings, rows)


def _options(setting: Setting, base: Options, seed: int, out: Path) -> Options:
    try:
        return setting.options(base, seed, out)
    except ValueError as error:
        raise ValueError(f"--methods or --bits ask for {setting.name}: {error}") from error


def _write_tables(out: Path, settings: list[Setting], rows: dict[str, list[Row]]) -> str:
    text = table(rows) + "\n" + table_by_bits(settings, rows)
    write_atomically(out / "table.md", text)
    write_atomically(out / "table.csv", table_csv(rows))
    write_atomically(out / "table.png", draw(rows))
    return text


def main(argv: list[str]) -> int:
    return finish(argv, _command)


def _command() -> int:
    values = flags.FLAGS
    settings = parse_settings(values.methods, values.bits)
    base = options_from_flags()
    if base.artefact:
        raise ValueError("--artefact is one finished model and a sweep makes many; give it to experiments.main.")
    records_file = Path(values.records) if values.records else None
    print(sweep(base, settings, values.seeds, Path(base.out), records_file, values.reports))
    return 0


if __name__ == "__main__":
    define_flags()
    flags.adopt_module_key_flags(options_module)
    main_job.use_compilation_cache()
    keep_pages()
    flags.DEFINE_string("methods", ",".join(METHODS), "Methods, each with what to switch or set behind it.")
    flags.DEFINE_string("bits", "44,55,66", "Widths of weights and activations, two digits each.")
    flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, … per setting.", lower_bound=1)
    flags.DEFINE_string("records", "", "File of the runs that are done; default: records.jsonl in --out.")
    flags.DEFINE_bool("reports", False, "Make report.html, with histograms of codes, for every run.")
    app.run(main)
