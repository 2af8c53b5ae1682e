"""Quantizes a SAM, evaluates it before and after, and reports.

    python -m experiments.main --flagfile=w4a4.flags
    python -m experiments.main --flagfile=w4a4.flags --artefact=runs/w4a4/quantized.safetensors --out=runs/again
    python -m experiments.main --flagfile=w4a4.flags --checkpoint=sam_vit_b_01ec64.pth \
        --images=coco/val2017 --annotations=coco/annotations/instances_val2017.json \
        --calib_images=coco/train2017 --calib_annotations=coco/annotations/instances_train2017.json
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

import ahcptq_jax
from ahcptq_jax.api import quantize_model
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.reconstruction.run import UnitReport, quantize_reconstructed
from ahcptq_jax.runtime.quantized import Quantized
from ahcptq_jax.transforms.harder import make_harder
from experiments import coco, evaluate, report
from experiments.job import devices
from experiments.job import options as options_module
from experiments.job.allocator import keep_pages
from experiments.job.command import finish
from experiments.job.options import Options, define_flags, options_from_flags
from experiments.job.results import write_atomically, write_json
from experiments.report import panels
from experiments.scenes.scenes import CALIB_SEED, EVAL_SEED, scene_dataset, to_coco
from hwcost.counts.codes import to_json
from hwcost.counts.measure import measure_histograms
from sam_flax import SamModel, load_sam
from sam_flax.config import SamConfig
from sam_flax.sam import Params, Sam

# A generated scene is never larger than this: its shapes hold no finer detail.
MAX_SCENE_SIZE = 320
# Scenes for calibration start at seed * num_calib; those held back for `--scenes=train` are far behind.
HELD_BACK_START = 1_000_000
# Evaluation images on which code histograms are counted, for `python -m hwcost --results=`.
HISTOGRAM_IMAGES = 8


def evaluation_set(options: Options, config: SamConfig) -> coco.CocoDataset:
    """The images to evaluate on: a COCO folder, or generated scenes that no training has seen."""
    limit = options.limit or None
    if options.images:
        return coco.load_coco(options.images, options.annotations, limit)
    count = min(options.num_scenes, limit or options.num_scenes)
    stream, start = (EVAL_SEED, 0) if options.scenes == "val" else (CALIB_SEED, HELD_BACK_START)
    return _scenes_as_coco(stream, count, _scene_size(config), start)


@functools.lru_cache(maxsize=1)
def _scenes_as_coco(stream: int, count: int, size: int, start: int) -> coco.CocoDataset:
    """Kept, since drawing scenes takes a sweep's run a tenth of its time."""
    return coco.CocoDataset.from_memory(*to_coco(scene_dataset(stream, count, size, start=start)))


def calibration_set(options: Options, config: SamConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """`num_calib` images with their annotated boxes, chosen by seed.

    Returns:
        [(uint8 (H, W, 3), float (N, 4) xyxy)], images without a usable box left out.

    Raises:
        ValueError: if there are fewer usable images than asked for.
    """
    if not options.calib_images:
        start = options.seed * options.num_calib
        scenes = scene_dataset(CALIB_SEED, options.num_calib, _scene_size(config), start=start)
        return [(scene.image, scene.boxes) for scene in scenes]
    dataset = coco.load_coco(
        options.calib_images,
        options.calib_annotations,
        images_flag="--calib_images",
        annotations_flag="--calib_annotations",
        require_masks=False,
    )
    boxes = coco.annotated_boxes(dataset).per_image
    usable = [item for item in dataset.items if len(boxes[item.image_id])]
    if len(usable) < options.num_calib:
        raise ValueError(
            f"{dataset.source} has {len(usable)} images with a usable box but --num_calib={options.num_calib}; "
            "lower --num_calib or give more images."
        )
    chosen = np.random.default_rng(options.seed).permutation(len(usable))[: options.num_calib]
    items = [usable[i] for i in sorted(chosen)]
    return [(image, boxes[item.image_id].boxes) for item, image in coco.stream_images(dataset, items)]


def _scene_size(config: SamConfig) -> int:
    return min(config.img_size, MAX_SCENE_SIZE)


def run(
    options: Options,
    journal: Path | None = None,
    cache: StatisticsCache | None = None,
    with_report: bool = True,
) -> dict[str, Any]:
    """Does everything the command does and returns what it writes to `results.json`.

    Args:
        options: the run.
        journal: folder of partial results; runs that share it evaluate the float model once.
        cache: calibration passes; runs that share it make equal ones once.
        with_report: makes `report.html` and counts the histograms of codes for it.

    Raises:
        ValueError, FileNotFoundError: if an input is unusable; nothing but resumable partial results is left.
    """
    out = Path(options.out)
    seconds: dict[str, float] = {}
    # Every input is looked at before the first long stage.
    check_writable(out, "--out")
    with _timed(seconds, "load"):
        sam, loaded = load_sam(options.checkpoint)
        params = make_harder(loaded, sam.config, options.harder)
        dataset = evaluation_set(options, sam.config)
        boxes = coco.load_boxes(options.boxes, dataset)
        saved = ahcptq_jax.load(options.artefact, sam.config) if options.artefact else None
        calib = calibration_set(options, sam.config) if options.method != "fp" and saved is None else []
        _check_images(dataset)
    _say(
        f"{options.checkpoint}: {sum(a.size for a in jax.tree.leaves(params)):,} parameters; "
        f"evaluation on {len(dataset.items)} {_origin(options.images)} with {len(boxes)} boxes"
        + (f"; calibration on {len(calib)} {_origin(options.calib_images)}." if calib else ".")
    )
    notes = [*dataset.notes(), *boxes.notes]
    if calib and options.images and not options.calib_images:
        notes.append(
            "calibrated on generated scenes but evaluated on photographs; for theirs, give --calib_images and "
            "--calib_annotations."
        )
        _say(f"Note: {notes[-1]}")
    model_id = _fingerprint([np.asarray(leaf) for leaf in jax.tree.leaves(params)])
    fp_id = f"{model_id} {options.precision}"
    partial: list[Path] = []
    state: Path | None = None

    def score(name: str, model: Any, identity: str, blank: bool = False) -> evaluate.EvaluationResult:
        label = f"{name} (blank images)" if blank else name
        # The name tells everything apart, so that another run into the same folder starts its own file.
        where = _short(f"{identity} {dataset.fingerprint} {boxes.fingerprint}")
        file = (journal or out / "partial") / f"{name}-{'blank' if blank else 'real'}-{where}.jsonl"
        partial.append(file)
        return evaluate.evaluate(
            devices.predictors(model),
            dataset,
            boxes,
            blank=blank,
            partial_results=file,
            model_fingerprint=identity,
            progress=f"evaluate {label}",
        )

    fp_model = SamModel(sam, params, options.precision)
    with _timed(seconds, "evaluate_fp"):
        fp = score("fp", fp_model, fp_id)
    results: dict[str, Any] = {"config": dataclasses.asdict(options), "fp": dict(fp.metrics)}
    results["model"] = options.model_name()
    results["bytes"] = {"fp32": 4 * sum(a.size for a in jax.tree.leaves(params))}
    examples: list[report.Example] = []
    layers: list[report.HybridPanel | report.GroupPanel] = []
    if options.method != "fp":
        artefact = Path(options.artefact or out / "quantized.safetensors")
        if saved is None:
            with _timed(seconds, "quantize"):
                state = out / "partial" / _state_name(options, calib, model_id)
                quantized, units = _quantize(options, sam, params, calib, state, cache)
                results["units"] = [dataclasses.asdict(unit) for unit in units]
                out.mkdir(parents=True, exist_ok=True)
                for old in ("results.json", "report.html", "flags.txt"):
                    # Of an earlier run, whose model is overwritten here.
                    (out / old).unlink(missing_ok=True)
                quantized.save(artefact)
            # What is scored is what the file holds, its float part rounded as in the file.
            saved = ahcptq_jax.load(artefact)
        quantized, quant_config = saved, saved.quant_config
        if options.artefact:
            bits = {"w_bits": quant_config.w_bits, "a_bits": quant_config.a_bits}
            results["config"] |= {"method": "artefact", **bits}
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(quantized)]
        quantized_id = _fingerprint([*arrays, np.array(repr(quant_config))])
        with _timed(seconds, "evaluate_quantized"):
            scored = score("quantized", quantized, quantized_id)
        results["quantized"] = dict(scored.metrics)
        results["agreement_mIoU"] = evaluate.agreement_miou(fp.images, scored.images)
        results["bytes"]["quantized"] = artefact.stat().st_size
        results["quant_config"] = dataclasses.asdict(quant_config)
        if with_report:
            with _timed(seconds, "histograms"):
                results["code_histograms"] = code_histograms(quantized, dataset, boxes)
        if options.blank:
            with _timed(seconds, "evaluate_blank"):
                results["quantized_blank"] = dict(score("quantized", quantized, quantized_id, blank=True).metrics)
        if with_report:
            with _timed(seconds, "report"):
                examples = report.make_examples(dataset, boxes, fp, scored)
                if calib:
                    layers = panels.layer_panels(quantized, SamModel(sam, params), calib)
    if options.blank:
        with _timed(seconds, "evaluate_blank"):
            results["fp_blank"] = dict(score("fp", fp_model, fp_id, blank=True).metrics)
    results["baselines"] = evaluate.evaluate_baselines(dataset, boxes)
    results["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    results["mIoU_note"] = fp.miou_note
    results["versions"] = {"ahcptq_jax": ahcptq_jax.__version__, "jax": jax.__version__, "numpy": np.__version__}

    write_atomically(out / "flags.txt", _flag_lines(options))
    if with_report:
        title = _title(options.model_name(), results["config"])
        report.write_report(out, results, examples, layers, title=title, notes=notes)
    write_json(out / "results.json", results)
    if journal is None:
        # They serve interrupted runs only: a later run may be one of other code.
        for file in partial:
            file.unlink(missing_ok=True)
    if state is not None:
        # Its own alone: another run into this folder may be under way, or waiting to go on.
        shutil.rmtree(state, ignore_errors=True)
    if (out / "partial").exists() and not any((out / "partial").iterdir()):
        (out / "partial").rmdir()
    return results


def code_histograms(model: Quantized, dataset: coco.CocoDataset, boxes: coco.BoxSet) -> dict[str, Any]:
    """How often each code of a hybrid or log2 site occurs on the first images that have a box; {} where none has."""
    prompts = {image_id: of_image.boxes for image_id, of_image in boxes.per_image.items() if len(of_image)}
    items = [item for item in dataset.items if item.image_id in prompts][:HISTOGRAM_IMAGES]
    if not items:
        return {}
    images = [image for _, image in coco.stream_images(dataset, items)]
    return to_json(measure_histograms(model, images, [prompts[item.image_id] for item in items]))


def _state_name(options: Options, calib: list[Any], model_id: str) -> str:
    """Of the folder of a run's state. It tells everything apart, so that a run that differs in anything starts anew."""
    config, reconstruction = options.quant_config(), options.reconstruction_config()
    images = _fingerprint([np.asarray(array) for item in calib for array in item])
    parts = f"{saved_state.code_version()} {model_id} {images} {config} {reconstruction}"
    return f"{'calibration' if reconstruction is None else 'reconstruction'}-{_short(parts)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _quantize(
    options: Options,
    sam: Sam,
    params: Params,
    calib: list[Any],
    state: Path,
    cache: StatisticsCache | None = None,
) -> tuple[Quantized, list[UnitReport]]:
    """The quantized model and, where the method learns, how each unit went; a killed run goes on in `state`."""
    config, reconstruction = options.quant_config(), options.reconstruction_config()
    if reconstruction is None:
        return quantize_model(sam, params, calib, config, progress=True, state_dir=state, cache=cache), []
    units: list[UnitReport] = []
    quantized = quantize_reconstructed(
        sam,
        params,
        calib,
        config,
        reconstruction,
        progress=True,
        state_dir=state,
        on_unit=units.append,
        cache=cache,
    )
    return quantized, units


def check_writable(folder: Path, flag: str) -> None:
    """Raises ValueError if nothing can be written to the folder that a flag names; leaves nothing behind."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{flag}={folder} cannot be written ({error.strerror}); choose a writable folder.") from error


def _check_images(dataset: coco.CocoDataset) -> None:
    """Decodes every image file once, so that a damaged one shows now and not after hours."""
    files = [item for item in dataset.items if item.path is not None]
    images = coco.stream_images(dataset, files)
    for _ in tqdm(images, desc="check images", total=len(files), disable=not files, mininterval=1):
        pass


def _title(model: str, config: dict[str, Any]) -> str:
    if config["method"] == "fp":
        return f"{model}, floating point"
    return f"{model}, W{config['w_bits']}A{config['a_bits']} {config['method']}"


def _flag_lines(options: Options) -> str:
    """The resolved flags, readable by --flagfile."""
    lines = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in dataclasses.asdict(options).items()
        if value is not None
    ]
    return "\n".join(lines) + "\n"


def _fingerprint(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _origin(folder: str) -> str:
    return f"images of {folder}" if folder else "generated scenes"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def summary(results: dict[str, Any]) -> str:
    """The scores as a small table."""
    rows = [(k, results[k]) for k in ("fp", "quantized", "fp_blank", "quantized_blank") if k in results]
    rows = list(itertools.chain(rows, results.get("baselines", {}).items()))
    names = list(rows[0][1])
    lines = [" " * 18 + "".join(f"{name:>8}" for name in names)]
    for key, metrics in rows:
        cells = ("-" if metrics[n] is None else f"{metrics[n]:.{3 if n == 'mIoU' else 1}f}" for n in names)
        lines.append(f"{key:<18}" + "".join(f"{cell:>8}" for cell in cells))
    if results.get("agreement_mIoU") is not None:
        lines.append(f"agreement of quantized and fp masks (mIoU): {results['agreement_mIoU']:.3f}")
    if "quantized" in results:
        sizes = results["bytes"]
        share = sizes["quantized"] / sizes["fp32"]
        lines.append(f"bytes: {sizes['fp32']:,} -> {sizes['quantized']:,} ({100 * share:.1f} %)")
    lines.append("seconds: " + json.dumps(results["seconds"]))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    # absl shows INFO, at which JAX tells of every accelerator that is absent.
    logging.getLogger("jax").setLevel(logging.WARNING)
    return finish(argv, _command)


def _command() -> int:
    values = flags.FLAGS
    options = options_from_flags()
    devices.connect(values.coordinator, values.num_processes, values.process_id)
    if helper := jax.process_index():
        # All processes do all but the evaluation, whose images they share; process 0 alone leaves files.
        options = dataclasses.replace(options, out=str(Path(options.out) / f"process_{helper}"))
    results = run(options)
    if helper:
        shutil.rmtree(options.out)
        return 0
    print(summary(results))
    print(f"report: {Path(options.out) / 'report.html'}")
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs of the command line, unless JAX is told otherwise."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ahcptq_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def cli() -> None:
    """What `python -m experiments.main` runs."""
    define_flags()
    devices.define_flags()
    for module in (options_module, devices):
        # Else --help would not show their flags.
        flags.adopt_module_key_flags(module)
    use_compilation_cache()
    keep_pages()
    app.run(main)


if __name__ == "__main__":
    cli()
