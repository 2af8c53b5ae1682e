"""Times every part that must be fast, prints the table and saves it as JSON and markdown.

    python -m experiments.benchmark
    python -m experiments.benchmark --rows=encoder_b,hluq_search --against=torch --out=runs/benchmark

Each row runs in a process of its own, which gives its peak memory. With `--against=torch` a second process runs the
public PyTorch code (extra `parity`) turn by turn with ours, so that both see the machine in the same state; with
`--against=torch,onnxruntime,openvino` others run its exports (extra `peers`).
"""

import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from ahcptq_jax.command import finish, launch
from experiments.bench.rows import ROWS, Row
from experiments.job.results import write_file, write_json
from sam_flax.errors import InputError

# For PyTorch, what `allocator.keep_pages` is for ours: it would spend most of its time getting pages back.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}
NO_PUBLIC_PACKAGE = "No public package has this function, so there is no ratio."
# What each word of `--against` needs.
PEERS = {
    "torch": ("torch", "segment_anything"),
    "onnxruntime": ("onnx", "onnxruntime", "onnxscript", "torch", "segment_anything"),
    "openvino": ("openvino", "onnx", "onnxscript", "torch", "segment_anything"),
}


class Worker:
    """The process of one row; see `benchmark_rows.serve`."""

    def __init__(self, row: Row, peer: str, toy: bool):
        self.row = row
        words = [row.name, peer or "ours", "toy" if toy else "full"]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.rows", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | (KEEP_PAGES if peer == "torch" else {}),
        )

    def __enter__(self) -> "Worker":
        self.first = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def run(self) -> dict[str, float]:
        """Times the work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self._answer()

    def finish(self) -> dict[str, Any]:
        """Peak memory and what the seconds are divided by."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise InputError(
                f"The process of row {self.row.name} ended with exit code {self.process.returncode} ({last}); "
                "free memory or leave the row out with --rows."
            )
        return json.loads(line)


def measure(row: Row, repeats: int, against: Sequence[str], toy: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """One row of the table.

    Args:
        row: what to time.
        repeats: runs after the first; every number of the row is their median.
        against: words of `PEERS`; none for our side alone.
        toy: toy sizes.
        tick: called after each run.

    Raises:
        InputError: if the row's process fails.
    """
    names = [name for name in row.peers if name.split()[0] in against]
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker(row, peer="", toy=toy))
        theirs = {name: stack.enter_context(Worker(row, peer=name, toy=toy)) for name in names}
        other = None
        if row.beside:
            named = next(each for each in ROWS if each.name == row.beside)
            other = stack.enter_context(Worker(named, peer="", toy=toy))
        runs: list[dict[str, float]] = []
        other_runs: list[dict[str, float]] = []
        peer_runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(repeats):
            runs.append(ours.run())
            for name, worker in theirs.items():
                peer_runs[name].append(worker.run())
            if other is not None:
                other_runs.append(other.run())
            tick()
        last = ours.finish()
        peer_last = {name: worker.finish() for name, worker in theirs.items()}
        other_last = other.finish() if other is not None else {}

    median, parts, flops = statistics.median, last["parts"], last["flops"]
    result: dict[str, Any] = {"name": row.name, "work": row.what, "repeats": repeats}
    result["seconds"] = median([r["seconds"] / parts for r in runs])
    result["cpu_seconds"] = median([r["cpu_seconds"] / parts for r in runs])
    result["all_seconds"] = [r["seconds"] / parts for r in runs]
    result["compile_seconds"] = ours.first["compile_seconds"]
    result["peak_bytes"] = last["peak_bytes"]
    if flops:
        result["gflops"] = median([flops / r["seconds"] / 1e9 for r in runs])
        result["ceiling_gflops"] = median([r["ceiling_gflops"] for r in runs])
        result["ceiling_share"] = median([flops / r["seconds"] / 1e9 / r["ceiling_gflops"] for r in runs])
    result["peers"] = {
        name: {
            "seconds": median([r["seconds"] for r in peer_runs[name]]),
            "cpu_seconds": median([r["cpu_seconds"] for r in peer_runs[name]]),
            "peak_bytes": peer_last[name]["peak_bytes"],
            "ratio": median([t["seconds"] / r["seconds"] for t, r in zip(peer_runs[name], runs, strict=True)]),
        }
        for name in names
    }
    if other is not None:
        result["beside"], result["beside_peak_bytes"] = row.beside, other_last["peak_bytes"]
        for name in ("seconds", "cpu_seconds"):
            result[f"beside_{name}_ratio"] = median([r[name] / o[name] for r, o in zip(runs, other_runs, strict=True)])
    if against and not names:
        result["note"] = NO_PUBLIC_PACKAGE
    return result


def table(document: Mapping[str, Any]) -> str:
    """The results as a markdown table."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    names = list(dict.fromkeys(name for row in document["rows"] for name in row["peers"]))
    titles = ["row", "work", "seconds", "CPU s", "compile s", "peak GiB", "share of product rate"]
    titles += [title for name in names for title in (f"{name} s", f"{name} CPU s", f"{name} GiB", f"{name} / ours")]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in document["rows"]:
        seconds = [cell(row.get(key), ".3g") for key in ("seconds", "cpu_seconds")]
        share = "" if row["name"] == "matmul" else cell(row.get("ceiling_share"), ".0%")
        if row["name"] == "matmul":
            share = cell(row.get("gflops"), ".0f") + " GFLOP/s"
        cells = [
            row["name"],
            row["work"],
            *seconds,
            cell(row["compile_seconds"], ".1f"),
            cell(row["peak_bytes"] / 2**30, ".2f"),
            share,
        ]
        for name in names:
            peer = row["peers"].get(name, {})
            cells += [cell(peer.get(key), ".3g") for key in ("seconds", "cpu_seconds")]
            cells += [f"{peer['peak_bytes'] / 2**30:.2f}" if peer else "", cell(peer.get("ratio"), ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    for row in document["rows"]:
        if "beside" in row:
            lines += ["", _beside(row)]
    machine = document["machine"]
    first, *_, last = machine["load"]
    lines += [
        "",
        f"{machine['cpus']} processors, {machine['platform']}, JAX {machine['jax']} on {machine['backend']}; "
        f"load before the first and after the last row: {first:.1f}, {last:.1f}.",
    ]
    if any("note" in row for row in document["rows"]):
        lines += ["", f"Rows without a ratio: {NO_PUBLIC_PACKAGE}"]
    return "\n".join(lines) + "\n"


def _beside(row: Mapping[str, Any]) -> str:
    """What a row takes in relation to the row of ours that ran turn by turn with it."""
    peak, other = (row[name] / 2**30 for name in ("peak_bytes", "beside_peak_bytes"))
    return (
        f"{row['name']} takes {row['beside_seconds_ratio']:.2f} times the seconds of {row['beside']}, run turn by turn "
        f"({row['beside_cpu_seconds_ratio']:.2f} times the CPU seconds); peak {peak:.2f} against {other:.2f} GiB."
    )


def chosen_rows(names: str) -> list[Row]:
    """The rows that `--rows` names, in the table's order; all for an empty text.

    Raises:
        InputError: if a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - {row.name for row in ROWS})
    if unknown:
        raise InputError(f"--rows names {', '.join(unknown)}; choose of {', '.join(row.name for row in ROWS)}.")
    return [row for row in ROWS if not wanted or row.name in wanted]


def chosen_peers(names: str) -> list[str]:
    """What `--against` names.

    Raises:
        InputError: if a name is unknown, or what it needs is not installed.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in PEERS:
            raise InputError(f"--against names {name}; choose of {', '.join(PEERS)}.")
        missing = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
        if missing:
            extra = "parity" if name == "torch" else "peers"
            raise InputError(
                f"--against={name} needs {' and '.join(missing)}; install them with pip install -e '.[{extra}]'."
            )
    return wanted


def run(
    rows: list[Row], repeats: int, against: Sequence[str], toy: bool, save: Callable[[dict], object]
) -> dict[str, Any]:
    """Measures the rows one after another; `save` gets the document after each."""
    machine: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "load": [os.getloadavg()[0]],
    }
    document: dict[str, Any] = {"machine": machine, "against": list(against), "toy": toy, "rows": []}
    with tqdm(total=len(rows) * repeats, unit="run") as bar:
        for row in rows:
            bar.set_description(row.name)
            document["rows"].append(measure(row, repeats, against, toy, bar.update))
            machine["load"].append(os.getloadavg()[0])
            save(document)
    return document


def define_flags() -> None:
    flags.DEFINE_string("rows", "", "Rows to time, by name, separated by commas; default: all.")
    flags.DEFINE_integer("repeats", 3, "Timed runs of each row after the first; their median counts.", lower_bound=1)
    flags.DEFINE_string(
        "against",
        "",
        "Also time the public SAM, turn by turn with ours: torch, onnxruntime and openvino, separated by commas.",
    )
    flags.DEFINE_bool("toy", False, "Toy sizes: tries the command in seconds; its times mean nothing.")
    flags.DEFINE_string("out", "runs/benchmark", "Folder for benchmark.md and benchmark.json.")
    flags.DEFINE_string("json", "", "Another place for the JSON file.")


def main(argv: list[str]) -> int:
    return finish(argv, _command)


def _command() -> int:
    values = flags.FLAGS
    rows = chosen_rows(values.rows)
    against = chosen_peers(values.against)
    out = Path(values.out)
    file = Path(values.json) if values.json else out / "benchmark.json"

    def save(document: dict[str, Any]) -> None:
        write_json(file, document)
        write_file(out / "benchmark.md", table(document))

    print(table(run(rows, values.repeats, against, values.toy, save)))
    return 0


def cli() -> None:
    """What `python -m experiments.benchmark` runs."""
    define_flags()
    launch(main)


if __name__ == "__main__":
    cli()
