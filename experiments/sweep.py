"""Runs `experiments.main` for many settings on the same model, images and boxes, and writes one table.

    python -m experiments.sweep --methods=ahcptq,ahcptq-hluq,ahcptq-cag --bits=44,66 --out=runs/sweep

A method may be followed by the parts to switch off: `ahcptq-hluq-cag` is ahcptq without HLUQ and CAG. Finished runs
are not repeated. Writes `<out>/table.md`, `<out>/table.csv` and a folder for every run.
"""

import csv
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from ahcptq_jax.config import METHODS
from experiments import main as main_job
from experiments.options import Options, define_flags, options_from_flags
from experiments.results import write_atomically

SWITCHES = ("hluq", "cag", "big", "agq")
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU", "agreement_mIoU")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table before seeds are averaged."""

    method: str
    off: tuple[str, ...]
    w_bits: int
    a_bits: int

    @property
    def name(self) -> str:
        return "-".join((self.method, *self.off)) + f"_w{self.w_bits}a{self.a_bits}"

    def options(self, base: Options, seed: int, out: Path) -> Options:
        """The run's options: those of the command line with this setting on top."""
        switched: dict[str, Any] = dict.fromkeys(self.off, False)
        return dataclasses.replace(
            base,
            method=self.method,
            w_bits=self.w_bits,
            a_bits=self.a_bits,
            seed=seed,
            out=str(out / f"{self.name}_s{seed}"),
            **switched,
        )


def parse_settings(methods: str, bits: str) -> list[Setting]:
    """The settings named by the flags, bits outermost.

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
            method, *off = text.split("-")
            if method not in METHODS:
                raise ValueError(f"--methods has {method!r}; choose of {', '.join(METHODS)}.")
            unknown = sorted(set(off) - set(SWITCHES))
            if unknown:
                raise ValueError(f"--methods switches off {unknown} in {text!r}; there are {', '.join(SWITCHES)}.")
            settings.append(Setting(method, tuple(off), int(pair[0]), int(pair[1])))
    return settings


def finished(options: Options) -> dict[str, Any] | None:
    """The results of an earlier run with exactly these options."""
    path = Path(options.out) / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it to repeat the run.") from error
    return results if results.get("config") == dataclasses.asdict(options) else None


def row(results: dict[str, Any]) -> dict[str, float | None]:
    """The table's columns of one run."""
    return {**results["quantized"], "agreement_mIoU": results["agreement_mIoU"]}


def _cell(column: str, values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    # APs are percentages, IoUs fractions.
    mean, digits = float(np.mean(known)), 3 if column.endswith("mIoU") else 1
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def table(fp: dict[str, float | None], rows: dict[str, list[dict[str, float | None]]]) -> str:
    """Markdown: floating point first, then every setting, mean ± deviation over seeds."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    everything = {"floating point": [fp], **rows}
    for name, runs in everything.items():
        cells = " | ".join(_cell(column, [r.get(column) for r in runs]) for column in COLUMNS)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def table_csv(rows: dict[str, list[dict[str, float | None]]]) -> str:
    """One line per run and seed."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "seed", *COLUMNS])
    for name, runs in rows.items():
        for seed, values in enumerate(runs):
            writer.writerow([name, seed, *(values.get(column) for column in COLUMNS)])
    return text.getvalue()


def sweep(base: Options, settings: list[Setting], seeds: int, out: Path) -> str:
    """Runs what is missing and returns the table, which is also written after every run."""
    rows: dict[str, list[dict[str, float | None]]] = {}
    text = ""
    for setting in settings:
        for seed in range(seeds):
            options = setting.options(base, seed, out)
            print(f"== {setting.name}, seed {seed}", file=sys.stderr, flush=True)
            results = finished(options)
            if results is None:
                results = main_job.run(options, journal=out / "partial")
            rows.setdefault(setting.name, []).append(row(results))
            text = table(results["fp"], rows)
            write_atomically(out / "table.md", text)
            write_atomically(out / "table.csv", table_csv(rows))
    return text


def main(argv: list[str]) -> int:
    del argv
    try:
        settings = parse_settings(flags.FLAGS.methods, flags.FLAGS.bits)
        base = options_from_flags()
        if base.artefact:
            raise ValueError("--artefact is one finished model and a sweep makes many; give it to experiments.main.")
        print(sweep(base, settings, flags.FLAGS.seeds, Path(base.out)))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    define_flags()
    main_job.use_compilation_cache()
    flags.DEFINE_string("methods", "ahcptq,ptq4sam_s,minmax", "Methods, each with parts to switch off after dashes.")
    flags.DEFINE_string("bits", "44,55,66", "Widths of weights and activations, two digits each.")
    flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, … per setting.", lower_bound=1)
    app.run(main)
