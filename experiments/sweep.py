"""Runs `experiments.main` for many settings on the same model, images and boxes, and writes one table.

    python -m experiments.sweep --methods=minmax,qdrop,ahcptq,ahcptq-cag,ahcptq+groups=8 --bits=44,66 --seeds=3 \\
        --iterations=200 --out=runs/sweep

A method may be followed by what to switch off (`-cag`), on (`+hluq_fine`) or set (`+groups=8`): `ahcptq-hluq-cag` is
ahcptq without HLUQ and CAG. `--method`, `--w_bits`, `--a_bits` and `--seed` are the settings' own; every other flag of
`experiments.main` holds for all of them. Runs that `--records` (by default `<out>/records.jsonl`) has are not repeated,
and one that was killed goes on. A line above the table says how many rows other code than this has made;
`--stale=repeat` makes them anew. Writes `<out>/table.md`, whose second table has a column for each pair of widths,
`<out>/table.csv`, `<out>/table.png` and a folder for every run, with its quantized model and, by `--reports`, its
report. Every row says which model it is of.
"""

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.command import finish, launch, use_compilation_cache
from ahcptq_jax.config import METHODS
from ahcptq_jax.flags import define_flags, values
from experiments.job import records
from experiments.job import run as one_run
from experiments.job.allocator import keep_pages
from experiments.job.code import code_version
from experiments.job.folder import check_writable, claimed
from experiments.job.forecast import forecast, in_words, product_rate
from experiments.job.options import Options, switches
from experiments.job.plan import read_inputs
from experiments.job.results import write_file
from experiments.job.sharing import in_turn
from experiments.job.stages import LINES, Stages
from experiments.job.sweep_figure import draw
from sam_flax.errors import InputError
from sam_flax.files.writing import printable_path

# What to do with runs that other code has made.
STALE = ("keep", "repeat")
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
        InputError: if the method, a switch or a value is unknown.
    """
    # Not at the sign of an exponent, as in +scale_rate=1e-3.
    method, *parts = re.split(r"(?<!\de)(?=[-+])", text)
    if method not in METHODS:
        raise InputError(f"--methods has {method!r}; choose of {', '.join(METHODS)}.")
    known = switches()
    changes: list[tuple[str, Any]] = []
    for part in parts:
        name, equals, value = part[1:].partition("=")
        setting = known.get(name)
        if setting is not None and setting.type is bool and not equals:
            changes.append((name, part[0] == "+"))
        elif setting is not None and setting.type is not bool and equals and part[0] == "+":
            try:
                changes.append((name, setting.type(value)))
            except ValueError:
                raise InputError(f"--methods has {part!r} in {text!r}; {name} is a number.") from None
        else:
            raise InputError(
                f"--methods has {part!r} in {text!r}; switch with - or + one of "
                f"{', '.join(n for n, s in known.items() if s.type is bool)}, or set with +name=value one of "
                f"{', '.join(n for n, s in known.items() if s.type is not bool)}."
            )
    return method, tuple(changes)


def parse_settings(methods: str, bits: str) -> list[Setting]:
    """The settings named by the flags, each once, bits outermost.

    Args:
        methods: e.g. "ahcptq,ahcptq-hluq-cag,minmax".
        bits: e.g. "44,88": two digits each, weights and activations.

    Raises:
        InputError: if a method, a switch or a width is unknown.
    """
    settings = []
    for pair in bits.split(","):
        if len(pair) != 2 or not pair.isdigit():
            raise InputError(f"--bits has {pair!r}; give two digits for each, weights and activations, like 44,66.")
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
        for seed, scores in enumerate(runs):
            cells = (scores.get(column) for column in COLUMNS)
            writer.writerow([scores["model"], name.split(":")[0], seed, *cells])
    return text.getvalue()


def sweep(
    base: Options,
    settings: list[Setting],
    seeds: int,
    out: Path,
    records_file: Path | None = None,
    reports: bool = False,
    stale: str = STALE[0],
    verbosity: int = LINES,
    share: bool = False,
) -> str:
    """Runs what is missing and returns the table, which is also written after every run, or at the end if shared.

    Seeds are outermost, so that settings that share calibration images follow one another and share what was observed
    on them.

    Args:
        records_file: of the runs that are done, see `records`; by default in `out`.
        reports: makes every run's report.
        stale: "keep" takes records that other code has made, "repeat" makes those runs anew.
        verbosity: see `Stages`.
        share: other processes may work on the same sweep at the same time, each on runs of its own; see
            `job.sharing`. All return the same table.

    Raises:
        InputError, OSError: before the first run, if a setting has a value that cannot be, the records are damaged or a
            folder cannot be written; else as `one_run.run`.
    """
    records_file = out / "records.jsonl" if records_file is None else records_file
    done = records.read(records_file)
    if stale == "repeat":
        done = {options: record for options, record in done.items() if not records.is_stale(record)}
    runs = [(seed, setting, _options(setting, base, seed, out)) for seed in range(seeds) for setting in settings]
    check_writable(out, "--out")
    check_writable(records_file.parent, "--records")
    kept = sum(records.key(options) in done for _, _, options in runs)
    tell = Stages(verbosity).say
    tell(f"{kept} of {len(runs)} runs are in {printable_path(records_file)}.")
    rows: dict[str, list[Row]] = {}
    cache = StatisticsCache()
    found: list[records.Record] = []
    if share:

        def is_done(run: tuple[int, Setting, Options]) -> bool:
            known = records.read(records_file).get(records.key(run[2]))
            return known is not None and not (stale == "repeat" and records.is_stale(known))

        def do(run: tuple[int, Setting, Options]) -> None:
            tell(f"== {run[1].name}, seed {run[0]}")
            results = one_run.run(run[2], cache=cache, with_report=reports, verbosity=verbosity)
            records.add(records_file, run[2], results)

        in_turn(runs, lambda run: Path(run[2].out).name, out / "partial" / "taken", is_done, do, tell)
        done = records.read(records_file)
        for _, setting, options in runs:
            _add_row(rows, found, setting, done[records.key(options)])
        return _write_tables(out, settings, rows, found)
    with claimed(out, "--out"):
        for seed, setting, options in runs:
            record = done.get(records.key(options))
            if missing := record is None:
                tell(f"== {setting.name}, seed {seed}")
                results = one_run.run(
                    options, journal=out / "partial", cache=cache, with_report=reports, verbosity=verbosity
                )
                record = records.add(records_file, options, results)
            _add_row(rows, found, setting, record)
            if missing:
                _write_tables(out, settings, rows, found)
        if kept < len(runs):
            # What evaluations left serves interrupted sweeps only.
            for file in (out / "partial").glob("*.jsonl"):
                file.unlink()
        return _write_tables(out, settings, rows, found)


def _add_row(rows: dict[str, list[Row]], found: list[records.Record], setting: Setting, record: records.Record) -> None:
    """Adds a finished run to the rows of the tables, and to the records that they are made of."""
    found.append(record)
    # A model's floating-point row stands before its first setting.
    rows.setdefault(f"floating point:{record['model']}", [{**record["fp"], "model": record["model"]}])
    rows.setdefault(setting.name, []).append(row(record))


def dry_run(
    base: Options, settings: list[Setting], seeds: int, out: Path, records_file: Path, stale: str, bars: bool = True
) -> str:
    """What `sweep` would run and about how long it would take; nothing is run or written.

    Raises:
        InputError, OSError: as `sweep`, before its first run.
    """
    done = records.read(records_file)
    runs = [_options(setting, base, seed, out) for seed in range(seeds) for setting in settings]
    check_writable(out, "--out")
    missing = [
        options
        for options in runs
        if (record := done.get(records.key(options))) is None or (stale == "repeat" and records.is_stale(record))
    ]
    lines = [f"{len(missing)} of {len(runs)} runs are missing in {printable_path(records_file)}."]
    if missing:
        inputs, speed = read_inputs(missing[0], bars), product_rate()
        # The floating-point model is evaluated once; settings of one seed share what they can of a calibration.
        found = [forecast(inputs, options, speed) for options in missing]
        total = found[0].seconds["evaluate_fp"]
        for one in found:
            total += one.total - one.seconds["evaluate_fp"]
        memory = max(one.memory for one in found)
        lines += [f"  {Path(o.out).name:<60}{in_words(f.total):>10}" for o, f in zip(missing, found, strict=True)]
        lines.append(f"all of them: about {in_words(total)} and {memory / 2**30:.1f} GiB; nothing was run or written.")
    return "\n".join(lines)


def _options(setting: Setting, base: Options, seed: int, out: Path) -> Options:
    try:
        return setting.options(base, seed, out)
    except InputError as error:
        raise InputError(f"--methods or --bits ask for {setting.name}: {error}") from error


def _write_tables(out: Path, settings: list[Setting], rows: dict[str, list[Row]], found: list[records.Record]) -> str:
    text = "\n".join([*_caption(found), "", table(rows), table_by_bits(settings, rows)])
    write_file(out / "table.md", text)
    write_file(out / "table.csv", table_csv(rows))
    write_file(out / "table.png", draw(rows))
    return text


def _caption(found: list[records.Record]) -> list[str]:
    """The protocol of all rows, and a line about rows that other code than this has made, if there are any."""
    lines = list(dict.fromkeys(Options(**record["config"]).protocol().describe() for record in found))
    stale = [record for record in found if records.is_stale(record)]
    if not stale:
        return lines
    versions = sorted({record.get("code") or "an earlier version" for record in stale})
    return [
        *lines,
        f"rows of other code: {len(stale)} of {len(found)} (made by {', '.join(versions)}; this is {code_version()}); "
        "--stale=repeat makes them anew.",
    ]


def main(argv: list[str]) -> int:
    return finish(argv, _command, kept)


def _command() -> int:
    found = flags.FLAGS
    settings = parse_settings(found.methods, found.bits)
    base = Options(**values(Options))
    if base.artefact:
        raise InputError("--artefact is one finished model and a sweep makes many; give it to experiments.main.")
    records_file = Path(found.records) if found.records else None
    if found.dry_run:
        file = records_file or Path(base.out) / "records.jsonl"
        print(dry_run(base, settings, found.seeds, Path(base.out), file, found.stale, found.verbosity >= LINES))
        return 0
    how = (found.reports, found.stale, found.verbosity, found.share)
    print(sweep(base, settings, found.seeds, Path(base.out), records_file, *how))
    return 0


def kept() -> str:
    """The end of the line after Ctrl-C."""
    found = flags.FLAGS
    place = found.records or Path(found.out) / "records.jsonl"
    return f"finished runs are kept in {place}; give the same command again to go on with the one that was under way."


if __name__ == "__main__":
    define_flags(Options)
    use_compilation_cache()
    keep_pages()
    flags.DEFINE_string("methods", ",".join(METHODS), "Methods, each with what to switch or set behind it.")
    flags.DEFINE_string("bits", "44,55,66", "Widths of weights and activations, two digits each.")
    flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, … per setting.", lower_bound=1)
    flags.DEFINE_string("records", "", "File of the runs that are done; default: records.jsonl in --out.")
    flags.DEFINE_enum("stale", STALE[0], STALE, "Keep, or repeat, runs that other code than this has made.")
    flags.DEFINE_bool("share", False, "Share the runs with other processes, or hosts, that give the same command.")
    flags.DEFINE_bool("dry_run", False, "Print what is missing and about how long it takes, only.")
    flags.DEFINE_bool("reports", False, "Make report.html, with histograms of codes, for every run.")
    launch(main)
