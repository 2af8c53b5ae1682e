"""The main job end to end on the model that ships, and what it says to inputs it cannot use."""

import dataclasses
import functools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from ahcptq_jax.command import finish
from ahcptq_jax.flags import define_flags, values, with_flag_files
from experiments import coco, evaluate, integer_check
from experiments import main as main_job
from experiments.job import plan
from experiments.job import run as one_run
from experiments.job.options import Options
from experiments.job.summary import summary
from hwcost.counts.codes import histograms
from hwcost.study.options import Options as HwcostOptions
from sam_flax import CONFIGS
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
COCO100 = Path(os.environ.get("COCO100", ROOT.parent / "shared" / "coco100"))
METRICS = {"AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU"}


def command(*flags: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "experiments.main", *flags]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


# The smaller of the models that ship: its programs compile and run in half the time.
SMALL = "--checkpoint=mini-scenes"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("job")
    done = command("--flagfile=w4a4.flags", SMALL, "--num_scenes=4", "--num_calib=2", "--iterations=2", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_results_are_complete(job: tuple[Path, str]) -> None:
    results = json.loads((job[0] / "results.json").read_text())
    for key in ("fp", "quantized", "fp_blank", "quantized_blank"):
        assert METRICS <= results[key].keys()
    assert results["fp"]["AP"] > 70 and results["quantized"]["AP"] > 60
    assert results["fp_blank"]["AP"] < 40, "MINI looks at the image"
    assert 0.85 < results["agreement_mIoU"] <= 1
    assert results["bytes"]["quantized"] == (job[0] / "quantized.safetensors").stat().st_size
    assert results["bytes"]["quantized"] < 0.21 * results["bytes"]["fp32"]
    assert {"load", "evaluate_fp", "quantize", "evaluate_quantized"} <= results["seconds"].keys()
    assert results["config"]["w_bits"] == 4
    measured = histograms(results["code_histograms"])
    assert len(measured) == 19, "five encoder MLPs and attentions, two decoder MLPs, seven decoder attentions"
    assert all(len(h.counts) == 16 and (h.tau is None) != (h.log_levels is None) for h in measured.values())
    assert results["model"] == "mini-scenes"
    # Attention and MLP of five encoder blocks, the neck, two decoder layers of four units, the last attention.
    assert len(results["units"]) == 20 and all(unit["after"] > 0 for unit in results["units"])
    assert not (job[0] / "partial").exists()
    assert "quantized" in job[1] and "agreement" in job[1]


def test_report_is_one_self_contained_file(job: tuple[Path, str]) -> None:
    page = (job[0] / "report.html").read_text()
    assert "data:image/png;base64," in page
    for attribute in ('src="http', "src='http", 'href="http', "url(http", "@import"):
        assert attribute not in page
    for text in ("Floating point", "Quantized", "HLUQ", "CAG", "breakpoint"):
        assert text in page


def test_a_saved_artefact_scores_the_same_without_calibration(
    job: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibrated although an artefact was given")

    monkeypatch.setattr(one_run, "quantize", never)
    monkeypatch.setattr(plan, "calibration_set", never)
    artefact = str(job[0] / "quantized.safetensors")
    # Its bits are the file's, not the flags'.
    options = Options(
        checkpoint="mini-scenes", artefact=artefact, w_bits=8, num_scenes=4, blank=False, out=str(tmp_path)
    )
    results, first = one_run.run(options), json.loads((job[0] / "results.json").read_text())
    for key in ("quantized", "agreement_mIoU", "bytes", "quant_config"):
        assert json.loads(json.dumps(results[key])) == first[key]
    assert results["config"]["w_bits"] == 4 and "W4A4 artefact" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="another model"), pytest.warns(UserWarning, match="heads"):
        one_run.run(Options(artefact=artefact, checkpoint=str(DATA / "sam_tiny_s0.pth"), out=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_killed_job_ends_the_same(tmp_path: Path) -> None:
    flags = ("--flagfile=w4a4.flags", SMALL, "--num_scenes=2", "--num_calib=2", "--iterations=5", "--noblank")
    assert command(*flags, f"--out={tmp_path / 'whole'}", timeout=3600).returncode == 0
    out, chance, kills = tmp_path / "killed", random.Random(0), 0
    while not (out / "results.json").exists():
        arguments = [sys.executable, "-m", "experiments.main", *flags, f"--out={out}"]
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(10, 40 + 30 * kills))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        assert process.wait() in (0, -9)
    assert kills > 0
    name = "quantized.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, killed = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "killed"))
    assert whole["quantized"] == killed["quantized"]


def parsed(*arguments: str) -> Options:
    """Arguments -> options, as the command makes them, with a registry of flags of its own."""
    found = flags.FlagValues()
    define_flags(Options, flag_values=found)
    found(with_flag_files(["main", *arguments]))
    return Options(**values(Options, found))


def test_resolved_flags_repeat_the_run(job: tuple[Path, str]) -> None:
    options = parsed(f"--flagfile={job[0] / 'flags.txt'}")
    assert options.given() == json.loads((job[0] / "results.json").read_text())["config"]
    assert (options.method, options.w_bits, options.num_scenes, options.iterations) == ("ahcptq", 4, 4, 2)


@pytest.mark.slow
def test_integer_inference_finds_the_same_codes(job: tuple[Path, str]) -> None:
    options = Options(artefact=str(job[0] / "quantized.safetensors"), num_scenes=2)
    quantized = integer_check.model_to_check(options, "")
    counts = integer_check.check(quantized, options, plain=False)
    assert counts.images == 2 and counts.sites == len(quantized.activations) and counts.codes > 0
    assert (counts.codes_differing, counts.sites_differing, counts.pixels_differing_far) == (0, 0, 0)
    assert counts.outputs_differing == 0


def test_a_harder_model_scores_the_same(job: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, Any]] = []
    make_harder = plan.make_harder

    def noting(params: Any, *arguments: Any, **named: Any) -> Any:
        made.append((params, make_harder(params, *arguments, **named)))
        return made[-1][1]

    monkeypatch.setattr(plan, "make_harder", noting)
    options = Options(checkpoint="mini-scenes", method="fp", harder=1.0, num_scenes=4, blank=False, out=str(tmp_path))
    found = one_run.run(options, with_report=False)["fp"]
    ((before, after),) = made
    bias = ("image_encoder", "blocks_0", "norm1", "bias")
    spreads = [float(np.abs(functools.reduce(lambda node, name: node[name], bias, p)).max()) for p in (before, after)]
    assert spreads[1] > 1.5 * spreads[0]
    plain = json.loads((job[0] / "results.json").read_text())["fp"]
    known = [name for name in sorted(METRICS) if plain[name] is not None]
    assert "AP" in known and [found[name] for name in known] == pytest.approx([plain[name] for name in known], rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of one good image, and broken variants beside it; `tests/test_failures.py` tries many more."""
    path = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path / "a.jpg")
    write(path / "absent.json", document(file_name="b.jpg"))
    write(path / "short.json", document(file_name="short.jpg"))
    (path / "short.jpg").write_bytes((path / "a.jpg").read_bytes()[:700])
    (path / "image.pth").write_bytes((path / "a.jpg").read_bytes())
    return path


def document(bbox: list[float] | None = None, file_name: str = "a.jpg") -> dict[str, Any]:
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400}
    return {
        "images": [{"id": 1, "file_name": file_name, "height": 60, "width": 80}],
        "annotations": [annotation | {"bbox": bbox or [10, 10, 20, 20], "segmentation": polygon}],
        "categories": [{"id": 1, "name": "thing"}],
    }


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_scenes_to_choose_by_are_neither_those_of_results_nor_of_calibration() -> None:
    config = CONFIGS["mini"]

    def images(scenes: str) -> list[bytes]:
        dataset = plan.evaluation_set(Options(scenes=scenes, num_scenes=4), config)
        return [image.tobytes() for _, image in coco.stream_images(dataset, dataset.items)]

    calibration = [image.tobytes() for image, _ in plan.calibration_set(Options(num_calib=4), config)]
    assert len({*images("val"), *images("train"), *calibration}) == 12


def test_command_line_says_it_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    done = command(f"--checkpoint={folder / 'image.pth'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("Error:") == 1


def test_unusable_flags_end_the_command(tmp_path: Path) -> None:
    done = command("--method=magic", f"--out={tmp_path / 'out'}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "method" in done.stderr + done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--method=magic", "--bits=4", "--w_bits=four", "--flagfile=none.flags"])
def test_unusable_flags_are_refused_by_name(flag: str) -> None:
    """With what `absl.app.run` ends a command by itself, as above."""
    with pytest.raises((flags.Error, InputError), match=flag.lstrip("-").split("=")[0]):
        parsed(flag)


def test_what_is_no_flag_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_job.main(["main", "more"]) == 2
    assert "'more'" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["experiments.main", "experiments.sweep", "hwcost"])
def test_help_lists_every_flag(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    kind = HwcostOptions if module == "hwcost" else Options
    missing = [f.name for f in dataclasses.fields(kind) if not re.search(rf"--(\[no\])?{f.name}:", done.stdout)]
    assert not missing, done.stdout[-2000:] + done.stderr[-2000:]


def test_memory_that_runs_out_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    def broken() -> int:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    assert finish(["x"], full) == 2 and "memory ran out" in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        finish(["x"], broken)


def test_inputs_are_checked_before_the_model_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a long stage began before all inputs were read")

    monkeypatch.setattr(evaluate, "evaluate", too_late)
    monkeypatch.setattr(one_run, "quantize", too_late)
    for name in ("short.json", "absent.json"):
        for kind in ("", "calib_"):
            fields: dict[str, Any] = {f"{kind}images": str(folder), f"{kind}annotations": str(folder / name)}
            with pytest.raises((ValueError, FileNotFoundError)):
                one_run.run(Options(**fields, num_scenes=1, num_calib=1, out=str(tmp_path / "out")))
    # The folder cannot be made: not even the weights are read.
    monkeypatch.setattr(plan, "load_sam", too_late)
    with pytest.raises(ValueError, match="--out"):
        one_run.run(Options(out=str(folder / "a.jpg" / "out")))
    assert not (tmp_path / "out").exists()


def test_the_float_model_alone(tmp_path: Path) -> None:
    options = Options(checkpoint=str(DATA / "sam_tiny_s0.pth"), method="fp", num_scenes=2, out=str(tmp_path))
    # Its random weights find nothing; what counts is that all of it is written, and nothing else.
    with pytest.warns(UserWarning, match="heads"):
        results = one_run.run(options)
    assert METRICS <= results["fp"].keys() and "quantized" not in results
    assert set(results["bytes"]) == {"fp32"} and "evaluate_fp" in results["seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flags.txt", "log.jsonl", "report.html", "results.json"]
    assert "fp" in summary(results) and "bytes:" not in summary(results)
    assert "floating point" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not COCO100.is_dir(), reason=f"no COCO images at {COCO100}; set COCO100 to a folder of them")
def test_real_photographs(tmp_path: Path) -> None:
    options = Options(
        images=str(COCO100 / "val2017"),
        annotations=str(COCO100 / "annotations" / "instances_val2017.json"),
        calib_images=str(COCO100 / "train2017"),
        calib_annotations=str(COCO100 / "annotations" / "instances_train2017.json"),
        limit=3,
        num_calib=2,
        out=str(tmp_path),
    )
    results = one_run.run(options)
    assert METRICS <= results["quantized"].keys() and results["agreement_mIoU"] > 0.3
