"""Images per second and peak memory of SAM's image encoder on an accelerator, in floating point and quantized.

    python -m experiments.accelerator --models=vit_b,vit_l,vit_h --batch=1,8 --out=runs/accelerator

Weights are random and activation ranges made up: neither speed nor memory depends on them. Each form of a model runs in
a process of its own, which gives its peak memory; all of them compile at the same time, and are then timed one after
the other, so that no timing shares the device with anything. Floating-point forms differ in the precision of their
matrix products, quantized ones in their widths.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from ahcptq_jax import QuantConfig, Quantized
from ahcptq_jax.command import finish, launch
from experiments.bench.made_up import random_quantized
from experiments.job.results import write_file, write_json
from sam_flax import CONFIGS, Sam, SamModel
from sam_flax.errors import InputError

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
WIDTHS = {"w8a8": QuantConfig(w_bits=8, a_bits=8), "w4a4": QuantConfig(w_bits=4, a_bits=4)}
FORMS = (*PRECISIONS, *WIDTHS)
# Long enough for a median, short enough for a lent machine.
SECONDS_EACH = 1.5
FEWEST_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table: a form of a model at a batch size."""

    model: str
    form: str
    batch: int

    @property
    def words(self) -> list[str]:
        """The arguments of the row's process."""
        return ["serve", self.model, self.form, str(self.batch)]


def build(model: str, form: str) -> SamModel | Quantized:
    """A model with random weights in one of `FORMS`."""
    config = CONFIGS[model]
    params = Sam(config).init_params(jax.random.key(0))
    if form in WIDTHS:
        return random_quantized(config, params, WIDTHS[form])
    return SamModel(Sam(config), params, form)  # type: ignore[arg-type]


def device_peak_bytes() -> int | None:
    """The most device memory that this process has held; None where the backend does not say, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def serve(task: Task) -> None:
    """Compiles a row, answers, waits for a line on stdin, times it and answers again, in JSON lines."""
    start = time.perf_counter()
    model = build(task.model, task.form)
    size = model.config.img_size
    images = jax.random.normal(jax.random.key(1), (task.batch, size, size, 3), jnp.float32)
    jax.block_until_ready(model.encode_image(images))
    print(json.dumps({"first_seconds": time.perf_counter() - start}), flush=True)
    sys.stdin.readline()
    runs: list[float] = []
    while len(runs) < FEWEST_RUNS or sum(runs) < SECONDS_EACH:
        begin = time.perf_counter()
        jax.block_until_ready(model.encode_image(images))
        runs.append(time.perf_counter() - begin)
    seconds = statistics.median(runs)
    answer = {"seconds": seconds, "runs": len(runs), "images_per_second": task.batch / seconds}
    print(json.dumps(answer | {"peak_bytes": device_peak_bytes()}), flush=True)


class Worker:
    """The process of one row."""

    def __init__(self, task: Task):
        self.task = task
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.accelerator", *task.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """The next JSON line; an `error` with the last line of its messages if the process has died."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        return {"error": (self.errors.read().strip().splitlines() or ["no message"])[-1]}

    def run(self) -> dict[str, Any]:
        """Lets the process time its row."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends the process and frees its device memory."""
        self.process.kill()
        self.process.wait()
        self.errors.close()


def measure(tasks: list[Task], together: int) -> list[dict[str, Any]]:
    """The rows of the table, compiled `together` at a time and timed one by one."""
    rows = []
    for first in range(0, len(tasks), together):
        workers = [Worker(task) for task in tasks[first : first + together]]
        ready = [worker.answer() for worker in workers]
        for worker, begun in zip(workers, ready, strict=True):
            row = dataclasses.asdict(worker.task) | begun
            rows.append(row if "error" in begun else row | worker.run())
            worker.close()
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Markdown, with the ratio of each row to the same model and batch in float32."""
    base = {(r["model"], r["batch"]): r.get("seconds") for r in rows if r["form"] == "float32"}
    lines = [
        f"On one {device}, JAX {jax.__version__}, 1024x1024 images; medians.",
        "",
        "| model | form | batch | ms | images/s | times float32 | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| {row['model']} | {row['form']} | {row['batch']} |"
        if "error" in row:
            lines.append(f"{name} {row['error'][:100]} | | | |")
            continue
        own = base.get((row["model"], row["batch"]))
        ratio = f"{own / row['seconds']:.2f}" if own else ""
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else ""
        lines.append(f"{name} {1000 * row['seconds']:.1f} | {row['images_per_second']:.1f} | {ratio} | {peak} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """The command."""
    return finish(argv, _command)


def _command() -> int:
    values = flags.FLAGS
    models, forms = values.models.split(","), values.forms.split(",")
    for name, given, known in (("models", models, CONFIGS), ("forms", forms, FORMS)):
        if unknown := [word for word in given if word not in known]:
            raise InputError(f"--{name} has {unknown[0]!r}; choose of {', '.join(known)}.")
    if not all(word.isdecimal() and int(word) for word in values.batch.split(",")):
        raise InputError(f"--batch={values.batch} must be whole numbers above zero, separated by commas.")
    batches = [int(word) for word in values.batch.split(",")]
    tasks = [Task(model, form, batch) for model in models for batch in batches for form in forms]
    rows = measure(tasks, values.together)
    text = table(rows, jax.local_devices()[0].device_kind)
    write_json(Path(values.out) / "accelerator.json", {"rows": rows})
    write_file(Path(values.out) / "accelerator.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Task(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        sys.exit()
    flags.DEFINE_string("models", "vit_b", "Models, of " + ", ".join(CONFIGS) + ".")
    flags.DEFINE_string("forms", ",".join(FORMS), "Forms of each model.")
    flags.DEFINE_string("batch", "1", "Images in a batch; several numbers separated by commas.")
    flags.DEFINE_integer("together", 6, "Processes that compile at the same time.", lower_bound=1)
    flags.DEFINE_string("out", "runs/accelerator", "Folder for accelerator.md and accelerator.json.")
    launch(main)
