"""One run of the main job, stage after stage: read, score the float model, quantize, score again, report."""

import dataclasses
import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ahcptq_jax
from ahcptq_jax.api import quantize
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.flags import as_lines
from ahcptq_jax.reconstruction.run import UnitReport
from ahcptq_jax.runtime.quantized import Quantized
from experiments import coco, evaluate, report
from experiments.job import devices, plan
from experiments.job.code import code_version
from experiments.job.folder import check_writable, claimed
from experiments.job.forecast import describe, forecast, product_rate
from experiments.job.options import FLOAT, Options
from experiments.job.plan import Inputs, fingerprint
from experiments.job.results import write_file, write_json
from experiments.job.stages import LINES, LOG, Stages, collected_warnings
from hwcost.counts.codes import to_json
from hwcost.counts.measure import measure_histograms
from sam_flax import SamModel
from sam_flax.files.writing import make_folder, printable_path

# Evaluation images on which code histograms are counted, for `python -m hwcost --results=`.
HISTOGRAM_IMAGES = 8
QUANTIZED_FILE = "quantized.safetensors"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
        options: what was asked for.
        inputs: what it works on.
        stages: what it tells.
        journal: folder of the partial results of evaluations.
        cache: what calibration observed in earlier runs; None if there are none.
        with_report: makes `report.html` and counts the histograms of codes for it.
        results: what `results.json` will hold, filled stage by stage.
        partial: files of partial results that this run wrote or read.
        examples, layers: what the report shows.
    """

    options: Options
    inputs: Inputs
    stages: Stages
    journal: Path
    cache: StatisticsCache | None
    with_report: bool
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial: list[Path] = dataclasses.field(default_factory=list)
    examples: list[report.Example] = dataclasses.field(default_factory=list)
    layers: list[report.HybridPanel | report.GroupPanel] = dataclasses.field(default_factory=list)

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @functools.cached_property
    def state(self) -> Path:
        """The folder of what a killed calibration or reconstruction goes on from.

        Its name tells everything apart, so that a run that differs in anything starts anew. Processes that share a run
        share it.
        """
        config, reconstruction = self.options.quant_config(), self.options.reconstruction_config()
        images = fingerprint([np.asarray(array) for item in self.inputs.calib for array in item])
        parts = f"{saved_state.code_version()} {self.inputs.model_id} {images} {config} {reconstruction}"
        stage = "calibration" if reconstruction is None else "reconstruction"
        return devices.home(self.out) / "partial" / f"{stage}-{_short(parts)}"

    @property
    def artefact(self) -> Path:
        """The file of the quantized model, given or made."""
        return Path(self.options.artefact or self.out / QUANTIZED_FILE)

    @property
    def float_id(self) -> str:
        """What tells the floating-point model from all others."""
        return f"{self.inputs.model_id} {self.options.precision}"

    def partial_file(self, name: str, identity: str, blank: bool = False) -> Path:
        """The partial results of an evaluation.

        Its name tells everything apart, so that another run into the same folder starts its own file.
        """
        dataset, boxes, protocol = self.inputs.dataset, self.inputs.boxes, self.options.protocol()
        where = _short(f"{identity} {dataset.fingerprint} {boxes.fingerprint} {protocol.multimask} {protocol.prompt}")
        return self.journal / f"{name}-{'blank' if blank else 'real'}-{where}.jsonl"

    def score(self, name: str, model: Any, identity: str, blank: bool = False) -> evaluate.EvaluationResult:
        """Evaluates a model; `identity` tells it from all others."""
        dataset, boxes, protocol = self.inputs.dataset, self.inputs.boxes, self.options.protocol()
        file = self.partial_file(name, identity, blank)
        self.partial.append(file)
        return evaluate.evaluate(
            devices.predictors(model),
            dataset,
            boxes,
            blank=blank,
            partial_results=file,
            model_fingerprint=identity,
            code=code_version(),
            protocol=protocol,
            progress=f"evaluate {name}{' (blank images)' if blank else ''}" if self.stages.bars else None,
        )


def run(
    options: Options,
    journal: Path | None = None,
    cache: StatisticsCache | None = None,
    with_report: bool = True,
    verbosity: int = LINES,
) -> dict[str, Any]:
    """Does everything the command does and returns what it writes to `results.json`.

    Args:
        options: the run.
        journal: folder of partial results; runs that share it evaluate the float model once.
        cache: calibration passes; runs that share it make equal ones once.
        with_report: makes `report.html` and counts the histograms of codes for it.
        verbosity: see `Stages`.

    Raises:
        InputError, OSError: if an input is unusable or a file cannot be written; nothing but resumable partial results
            is left.
    """
    out, stages = Path(options.out), Stages(verbosity)
    # Every input is looked at before the first long stage.
    check_writable(out, "--out")
    with claimed(out, "--out"), collected_warnings() as warned:
        with stages.stage("load"):
            inputs = plan.read_inputs(options, stages.bars)
        stages.say(inputs.headline(options))
        current = Run(options, inputs, stages, journal or out / "partial", cache, with_report)
        results = _scores(current)
        notes = [*inputs.notes(options), *(plan.as_flags(sentence) for sentence in warned)]
        results["warnings"] = notes
        _write(current, notes)
        if journal is None:
            # They serve interrupted runs only.
            for file in current.partial:
                file.unlink(missing_ok=True)
        if inputs.calib and devices.home(out) == out:
            shutil.rmtree(current.state, ignore_errors=True)
    return results


def dry_run(options: Options, verbosity: int = LINES) -> str:
    """Reads and checks every input as `run` does, and returns the plan instead of doing it; writes nothing.

    Raises:
        InputError, OSError: as `run`, before its first long stage.
    """
    out, stages = Path(options.out), Stages(verbosity)
    check_writable(out, "--out")
    inputs = plan.read_inputs(options, stages.bars)
    current = Run(options, inputs, stages, out / "partial", None, with_report=False)
    finished = []
    partial = current.partial_file("fp", current.float_id)
    if partial.exists():
        lines = len(partial.read_bytes().splitlines()) - 1
        finished.append(f"{lines} of {len(inputs.dataset.items)} images of the floating-point evaluation")
    if inputs.calib and current.state.exists():
        finished.append(f"the state of a quantization that was stopped, {printable_path(current.state)}")
    return describe(inputs, options, forecast(inputs, options, product_rate()), finished)


def _scores(run: Run) -> dict[str, Any]:
    """All stages up to the scores, as `results.json` keeps them."""
    options, inputs, results, stages = run.options, run.inputs, run.results, run.stages
    model = SamModel(inputs.sam, inputs.params, options.precision)
    make_folder(run.out)
    stages.open(run.out / LOG, code=code_version(), options=options.given())
    with stages.stage("evaluate_fp"):
        fp = run.score("fp", model, run.float_id)
    results |= {"config": options.given(), "fp": dict(fp.metrics), "model": options.model_name()}
    results["bytes"] = {"fp32": 4 * inputs.parameter_count}
    if options.method != FLOAT:
        quantized, quantized_id = _quantized_model(run)
        with stages.stage("evaluate_quantized"):
            scored = run.score("quantized", quantized, quantized_id)
        results["quantized"] = dict(scored.metrics)
        results["agreement_mIoU"] = evaluate.agreement_miou(fp.images, scored.images)
        if run.with_report:
            with stages.stage("histograms"):
                results["code_histograms"] = code_histograms(quantized, inputs.dataset, inputs.boxes)
        if options.blank:
            with stages.stage("evaluate_blank"):
                results["quantized_blank"] = dict(run.score("quantized", quantized, quantized_id, blank=True).metrics)
        if run.with_report:
            with stages.stage("report"):
                run.examples.extend(report.make_examples(inputs.dataset, inputs.boxes, fp, scored))
                if inputs.calib:
                    panels = report.layer_panels(quantized, SamModel(inputs.sam, inputs.params), inputs.calib)
                    run.layers.extend(panels)
    if options.blank:
        with stages.stage("evaluate_blank"):
            results["fp_blank"] = dict(run.score("fp", model, run.float_id, blank=True).metrics)
    results["baselines"] = evaluate.evaluate_baselines(inputs.dataset, inputs.boxes, options.protocol())
    results["seconds"] = {name: round(value, 2) for name, value in stages.seconds.items()}
    results["mIoU_note"] = fp.miou_note
    results["protocol"] = options.protocol().as_dict() | {"sentence": options.protocol().describe()}
    results["versions"] = {"ahcptq_jax": ahcptq_jax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    results["code"] = code_version()
    return results


def _quantized_model(run: Run) -> tuple[Quantized, str]:
    """The quantized model, given or made, and what tells it from all others; its facts go into the results."""
    options, results = run.options, run.results
    quantized = run.inputs.saved
    if quantized is None:
        with run.stages.stage("quantize"):
            made, units = _quantize(run)
            results["units"] = [dataclasses.asdict(unit) for unit in units]
            for old in ("results.json", "report.html", "flags.txt"):
                # Of an earlier run, whose model is overwritten here.
                (run.out / old).unlink(missing_ok=True)
            made.save(run.artefact)
        # What is scored is what the file holds, its float part rounded as in the file.
        quantized = ahcptq_jax.load(run.artefact)
    quantized = dataclasses.replace(quantized, carrier=options.carrier)
    config = quantized.quant_config
    if options.artefact:
        results["config"] |= {"method": "artefact", "w_bits": config.w_bits, "a_bits": config.a_bits}
    elif (reconstruction := options.reconstruction_config()) is not None:
        results["reconstruction_config"] = dataclasses.asdict(reconstruction)
    results["bytes"]["quantized"] = run.artefact.stat().st_size
    results["quant_config"] = dataclasses.asdict(config)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(quantized)]
    return quantized, fingerprint([*arrays, np.array(repr(config))])


def _quantize(run: Run) -> tuple[Quantized, list[UnitReport]]:
    """The quantized model and, where the method learns, how each unit went; a killed run goes on in `run.state`."""
    sam, params, calib = run.inputs.sam, run.inputs.params, run.inputs.calib
    config, reconstruction = run.options.quant_config(), run.options.reconstruction_config()
    units: list[UnitReport] = []
    quantized = quantize(
        params,
        calib,
        config,
        sam=sam,
        reconstruction=reconstruction,
        state_dir=run.state,
        cache=run.cache,
        progress=run.stages.bars,
        on_unit=units.append,
    )
    return quantized, units


def code_histograms(model: Quantized, dataset: coco.CocoDataset, boxes: coco.BoxSet) -> dict[str, Any]:
    """How often each code of a hybrid or log2 site occurs on the first images that have a box; {} where none has."""
    prompts = {image_id: of_image.boxes for image_id, of_image in boxes.per_image.items() if len(of_image)}
    items = [item for item in dataset.items if item.image_id in prompts][:HISTOGRAM_IMAGES]
    if not items:
        return {}
    images = [image for _, image in coco.stream_images(dataset, items)]
    return to_json(measure_histograms(model, images, [prompts[item.image_id] for item in items]))


def _write(run: Run, notes: list[str]) -> None:
    """`flags.txt`, `report.html` and, last, `results.json`, whose presence says that the run is complete."""
    write_file(run.out / "flags.txt", as_lines(run.options))
    if run.with_report:
        title = _title(run.options.model_name(), run.results["config"])
        report.write_report(run.out, run.results, run.examples, run.layers, title=title, notes=notes)
    write_json(run.out / "results.json", run.results)


def _title(model: str, config: dict[str, Any]) -> str:
    if config["method"] == FLOAT:
        return f"{model}, floating point"
    return f"{model}, W{config['w_bits']}A{config['a_bits']} {config['method']}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
