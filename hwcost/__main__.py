"""What a quantized SAM would cost on an FPGA.

    python -m hwcost --model=vit_l --flagfile=w4a4.flags --device=zcu102
    python -m hwcost --model=mini --device=u280 --results=runs/w4a4/results.json --json=cost.json

Prints the tables and writes report.html, layers.csv and hwcost.json. Runs no model, except for --artefact.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import app, flags

import ahcptq_jax
from ahcptq_jax.config import QuantConfig
from hwcost.counts.codes import Histogram, load_histograms
from hwcost.counts.measure import measure_histograms
from hwcost.pages import page, tables
from hwcost.study import options as options_module
from hwcost.study import study
from hwcost.study.options import Options, define_flags, options_from_flags, with_foreign_flags
from sam_flax.config import CONFIGS, SamConfig
from sam_flax.errors import InputError
from sam_flax.files.images import read_image

IMAGES = 8
SUFFIXES = {".jpg", ".jpeg", ".png"}


def inputs(options: Options) -> tuple[str, SamConfig, QuantConfig, Mapping[str, Histogram]]:
    """(name of the model, the model, its quantization, measured histograms).

    Raises:
        InputError, OSError: if a file is unusable.
    """
    if options.artefact:
        quantized = ahcptq_jax.load(options.artefact)
        name = next((n for n, config in CONFIGS.items() if config == quantized.config), Path(options.artefact).stem)
        images = _photographs(options.images)
        boxes = [np.array([[0.0, 0.0, image.shape[1], image.shape[0]]]) for image in images]
        return name, quantized.config, quantized.quant_config, measure_histograms(quantized, images, boxes)
    codes = load_histograms(options.results) if options.results else {}
    return options.model, CONFIGS[options.model], options.quant_config(), codes


def _photographs(folder: str) -> list[np.ndarray]:
    """The first images of a folder, (H, W, 3) uint8."""
    root = Path(folder)
    paths = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)[:IMAGES] if root.is_dir() else []
    if not paths:
        raise InputError(f"--images={folder} has no .jpg or .png file; give a folder of photographs.")
    return [read_image(path) for path in paths]


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        print(f"Error: unexpected argument {argv[1]!r}; every option is a --flag.", file=sys.stderr)
        return 2
    try:
        options = options_from_flags()
        model, config, quant_config, codes = inputs(options)
        result = study.run(
            model,
            config,
            quant_config,
            options.accelerator(),
            codes=codes,
            prompts=options.prompts,
            constants=options.constants(),
        )
        folder = options.folder(result.title)
        json_path = Path(options.json) if options.json else folder / "hwcost.json"
        files = {
            json_path: json.dumps(study.document(result), indent=1, allow_nan=False) + "\n",
            folder / "layers.csv": study.layers_csv(result),
            folder / "report.html": page.html(result),
        }
        for path, content in files.items():
            write(path, content)
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(tables.text(result))
    print(f"written: {', '.join(str(path) for path in files)}")
    return 0


def cli() -> None:
    """What `python -m hwcost` runs."""
    define_flags()
    flags.adopt_module_key_flags(options_module)  # else --help would not show them
    app.run(main, argv=with_foreign_flags(sys.argv))


if __name__ == "__main__":
    cli()
