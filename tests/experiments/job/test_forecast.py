"""The plan of a run: it reads and checks, writes nothing, and its estimates grow with the work."""

import json
from pathlib import Path

import pytest

from experiments import sweep
from experiments.job import plan
from experiments.job.forecast import Forecast, forecast, in_words
from experiments.job.options import Options
from experiments.job.run import dry_run, run
from experiments.job.stages import LOG

ROOT = Path(__file__).parents[3]


def estimate(**changes: object) -> Forecast:
    options = Options(**{"num_scenes": 4, "num_calib": 2, **changes})  # type: ignore[arg-type]
    return forecast(plan.read_inputs(options, bars=False), options, speed=5e10)


def test_more_work_takes_longer() -> None:
    small = estimate()
    assert set(small.seconds) == {"evaluate_fp", "quantize", "evaluate_quantized", "evaluate_blank"}
    for changes, stage in (
        ({"num_scenes": 8}, "evaluate_fp"),
        ({"num_calib": 4}, "quantize"),
        ({"iterations": 10}, "quantize"),
        ({"num_scenes": 8}, "evaluate_quantized"),
    ):
        assert estimate(**changes).seconds[stage] > small.seconds[stage], changes
    assert set(estimate(method="fp", blank=False).seconds) == {"evaluate_fp"}
    assert estimate(method="fp").memory < small.memory < estimate(iterations=10, num_calib=16).memory


def test_the_main_job_is_forecast_within_its_measured_time() -> None:
    """A kept run of 200 scenes took 12 s to evaluate and 96 s to quantize on two processors of 58 GMAC/s."""
    line = next(
        record
        for record in map(json.loads, (ROOT / "results" / "mini_scenes.jsonl").read_text().splitlines())
        # Of a sweep, the runs that shared nothing with one before.
        if record["config"]["iterations"] == 200 and record["seconds"]["evaluate_fp"] > 5
    )
    options = Options(**line["config"])
    found = forecast(plan.read_inputs(options, bars=False), options, speed=58e9)
    for stage in ("evaluate_fp", "quantize", "evaluate_quantized"):
        assert 1 / 3 < found.seconds[stage] / line["seconds"][stage] < 3, stage


@pytest.mark.parametrize(("seconds", "words"), [(3.2, "3 s"), (600, "10 min"), (36000, "10.0 h")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_dry_run_writes_nothing_and_says_what_is_kept(tmp_path: Path) -> None:
    options = Options(num_scenes=2, num_calib=2, iterations=5, out=str(tmp_path / "out"))
    told = dry_run(options, verbosity=-1)
    for part in ("MINI", "2 images with", "W4A4 ahcptq on 2 images, 5 iterations", "quantize", "GiB", "--prompt=box"):
        assert part in told
    assert not list(tmp_path.iterdir())


def test_a_sweeps_dry_run_counts_what_is_missing(tmp_path: Path) -> None:
    settings = sweep.parse_settings("ahcptq,minmax", "44,88")
    base = Options(checkpoint="mini-scenes", grid_bits=0, iterations=200, blank=False, num_scenes=200)
    told = sweep.dry_run(base, settings, 1, tmp_path, ROOT / "results" / "mini_scenes.jsonl", "keep", bars=False)
    assert told.startswith("2 of 4 runs are missing") and "ahcptq_w8a8_s0" in told and "ahcptq_w4a4_s0" not in told
    told = sweep.dry_run(base, settings, 1, tmp_path, ROOT / "results" / "mini_scenes.jsonl", "repeat", bars=False)
    assert told.startswith("4 of 4 runs are missing")
    assert not list(tmp_path.iterdir())


def test_stages_are_told_on_the_terminal_and_as_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(method="fp", num_scenes=1, blank=False, out=str(tmp_path))
    run(options, with_report=False)
    told = capsys.readouterr().err
    assert "load: " in told and "evaluate_fp: " in told and "MiB" in told and "evaluate fp" in told
    first, *stages = map(json.loads, (tmp_path / LOG).read_text().splitlines())
    assert first["options"]["method"] == "fp" and first["code"] and first["start"]
    assert [stage["stage"] for stage in stages] == ["load", "evaluate_fp"]
    assert all(stage["seconds"] >= 0 and stage["peak_bytes"]["memory"] > 2**20 for stage in stages)
    run(options, with_report=False, verbosity=-1)
    assert capsys.readouterr().err == "", "neither lines nor bars"
