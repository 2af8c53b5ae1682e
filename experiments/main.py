"""Quantizes a SAM, evaluates it before and after, and reports.

    python -m experiments.main --flagfile=w4a4.flags
    python -m experiments.main --flagfile=w4a4.flags --artefact=runs/w4a4/quantized.safetensors --out=runs/again
    python -m experiments.main --flagfile=w4a4.flags --checkpoint=sam_vit_b_01ec64.pth \
        --images=coco/val2017 --annotations=coco/annotations/instances_val2017.json \
        --calib_images=coco/train2017 --calib_annotations=coco/annotations/instances_train2017.json

`--dry_run` prints the plan with estimates of time and memory; `--verbosity=-1` prints warnings and results alone.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import jax
from absl import flags

from ahcptq_jax.command import finish, launch, use_compilation_cache
from ahcptq_jax.flags import define_flags, values
from experiments.job import devices
from experiments.job.allocator import keep_pages
from experiments.job.options import Options
from experiments.job.run import dry_run, run
from experiments.job.summary import summary


def main(argv: list[str]) -> int:
    return finish(argv, _command, kept)


def _command() -> int:
    found = flags.FLAGS
    options = Options(**values(Options))
    devices.connect(found.coordinator, found.num_processes, found.process_id)
    options = dataclasses.replace(options, out=str(devices.folder(Path(options.out))))
    if found.dry_run:
        print(dry_run(options, found.verbosity))
        return 0
    results = run(options, verbosity=found.verbosity)
    if jax.process_index():
        shutil.rmtree(options.out)
        return 0
    print(summary(results))
    print(f"report: {Path(options.out) / 'report.html'}")
    return 0


def kept() -> str:
    """The end of the line after Ctrl-C."""
    partial = Path(flags.FLAGS.out) / "partial"
    if not partial.is_dir():
        return "nothing was finished that could be kept."
    return f"what is done is kept in {partial}; give the same command again to go on from there."


def cli() -> None:
    """What `python -m experiments.main` and the command `ahcptq-jax` run."""
    define_flags(Options)
    flags.DEFINE_bool("dry_run", False, "Check every input and print the plan with estimates of time and memory, only.")
    devices.define_flags()
    # Else --help would not show its flags.
    flags.adopt_module_key_flags(devices)
    if __name__ != "__main__":
        # absl's --help shows the flags of the program, which is here the script that pip has made.
        for flag in flags.FLAGS.get_key_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    use_compilation_cache()
    keep_pages()
    launch(main)


if __name__ == "__main__":
    cli()
