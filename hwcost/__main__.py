"""What a quantized SAM would cost on an FPGA.

    python -m hwcost --model=vit_l --flagfile=w4a4.flags --device=zcu102
    python -m hwcost --model=mini --device=u280 --results=runs/w4a4/results.json --json=cost.json

Prints the tables and writes report.html, layers.csv and hwcost.json. Runs no model, except for --artefact.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

import ahcptq_jax
from ahcptq_jax.command import finish, launch
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.flags import define_flags
from hwcost.counts.codes import Histogram, load_histograms
from hwcost.counts.measure import measure_histograms
from hwcost.pages import documents, page, tables
from hwcost.study.options import Options, options_from_flags, with_foreign_flags
from hwcost.study.study import Study, study_of
from sam_flax.config import CONFIGS, SamConfig
from sam_flax.errors import InputError
from sam_flax.files.images import read_image
from sam_flax.files.writing import make_folder, write_whole

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


def run(options: Options) -> tuple[Study, list[Path]]:
    """The study, and the files that it was written to.

    Raises:
        InputError, OSError: if a file is unusable, or cannot be written.
    """
    model, config, quant_config, codes = inputs(options)
    study = study_of(
        model,
        config,
        quant_config,
        options.accelerator(),
        codes=codes,
        prompts=options.prompts,
        grid_bits=options.grid_bits,
        constants=options.constants(),
    )
    folder = options.folder(study.title)
    files = {
        Path(options.json) if options.json else folder / "hwcost.json": documents.json_text(study),
        folder / "layers.csv": documents.layers_csv(study),
        folder / "report.html": page.html(study),
    }
    for path, text in files.items():
        make_folder(path.parent)
        write_whole(path, [text.encode()])
    return study, list(files)


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    return finish(argv, _study)


def _study() -> int:
    study, files = run(options_from_flags())
    print(tables.text(study))
    print(f"written: {', '.join(map(str, files))}")
    return 0


def cli() -> NoReturn:
    """What `python -m hwcost` runs."""
    define_flags(Options)
    launch(main, read=with_foreign_flags)


if __name__ == "__main__":
    cli()
