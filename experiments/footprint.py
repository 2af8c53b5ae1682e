"""Peak memory of loading and running a SAM, float32 against its W4A4 artefact, each in a fresh process.

    python -m experiments.footprint --models=vit_b,vit_l --out=runs/footprint

Weights are random and activation ranges made up: neither memory nor time depends on them. The table has the file, the
peak resident memory of the process when its imports are done, when the model is loaded, and when it has embedded one
image and answered eight boxes, with the seconds of that including compilation.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import ahcptq_jax
from ahcptq_jax import Quantized
from ahcptq_jax.command import finish, launch
from experiments.bench.made_up import random_quantized
from experiments.bench.rows import peak_bytes
from experiments.job.results import write_file, write_json
from sam_flax import CONFIGS, Sam, SamModel, load_sam, save_params
from sam_flax.errors import InputError

COLUMNS = ("file", "imports", "loaded", "run")  # in bytes
BOXES = np.array([[100.0, 100, 600, 700]] * 8, np.float32)


def prepare(name: str, folder: Path) -> None:
    """Writes `float.safetensors` and `w4a4.safetensors` of a model into a folder."""
    config = CONFIGS[name]
    params = jax.tree.map(np.asarray, Sam(config).init_params(jax.random.key(0)))
    save_params(folder / "float.safetensors", config, params)
    random_quantized(config, params).save(folder / "w4a4.safetensors")


def measure(path: Path) -> dict[str, float]:
    """Loads and runs one file in this process, which must be fresh, and returns its peaks."""
    found: dict[str, float] = {"file": path.stat().st_size, "imports": peak_bytes()}
    model: SamModel | Quantized
    if path.stem == "float":
        sam, params = load_sam(path)
        model = SamModel(sam, jax.tree.map(jnp.asarray, params))
    else:
        model = ahcptq_jax.load(path)
    jax.block_until_ready(jax.tree.leaves(model if isinstance(model, Quantized) else model.params))
    found["loaded"] = peak_bytes()
    start = time.perf_counter()
    size = model.config.img_size
    image = np.random.default_rng(0).normal(0, 1, (1, size, size, 3)).astype(np.float32)
    boxes = jnp.asarray(BOXES * (size / 1024))
    jax.block_until_ready(model.decode(model.encode_image(jnp.asarray(image)), None, boxes, None, False))
    found["seconds"] = time.perf_counter() - start
    found["run"] = peak_bytes()
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, in MiB."""
    lines = [
        "| model | file | peak after imports | after loading | after running | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{row[column] / 2**20:,.0f}" for column in COLUMNS)
        lines.append(f"| {name} | {cells} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _fresh(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "experiments.footprint", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The process for {' '.join(words)} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def main(argv: list[str]) -> int:
    if argv[1:2] == ["prepare"]:
        prepare(argv[2], Path(argv[3]))
        return 0
    if argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(argv[2]))))
        return 0
    return finish(argv, _command)


def _command() -> int:
    rows: dict[str, dict[str, float]] = {}
    names = flags.FLAGS.models.split(",")
    if unknown := [name for name in names if name not in CONFIGS]:
        raise InputError(f"--models={flags.FLAGS.models} has {unknown[0]!r}; choose of {', '.join(CONFIGS)}.")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: writing its files", file=sys.stderr, flush=True)
            _fresh("prepare", name, folder)
            for kind in ("float", "w4a4"):
                print(f"{name} {kind}", file=sys.stderr, flush=True)
                rows[f"{name} {kind}"] = json.loads(_fresh("measure", str(Path(folder) / f"{kind}.safetensors")))
    write_file(Path(flags.FLAGS.out) / "footprint.md", table(rows))
    write_json(Path(flags.FLAGS.out) / "footprint.json", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("models", "vit_b,vit_l", "Models, of " + ", ".join(CONFIGS) + ".")
    flags.DEFINE_string("out", "runs/footprint", "Folder for footprint.md and footprint.json.")
    launch(main)
