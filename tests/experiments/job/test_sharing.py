"""Sweeps whose runs several processes take in turn."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import sweep
from experiments.job import sharing
from experiments.job.folder import FolderTaken, claimed
from experiments.job.options import Options

ROOT = Path(__file__).parents[3]


def made_up(options: Options, **_: Any) -> dict[str, Any]:
    metrics = dict.fromkeys(sweep.COLUMNS[:7], 50.0 + options.seed)
    return {"fp": metrics, "quantized": metrics, "agreement_mIoU": 0.9, "model": options.model_name(), "units": []}


def test_a_run_that_another_has_is_left_to_it_until_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(options: Options, **named: Any) -> dict[str, Any]:
        calls.append(Path(options.out).name)
        return made_up(options, **named)

    monkeypatch.setattr(sweep.one_run, "run", run)
    monkeypatch.setattr(sharing, "WAIT_SECONDS", 0.05)
    settings = sweep.parse_settings("ahcptq,minmax,omse", "44")
    finished: list[str] = []
    thread = threading.Thread(
        target=lambda: finished.append(sweep.sweep(Options(), settings, 1, tmp_path, share=True, verbosity=0))
    )
    with claimed(tmp_path / "partial" / "taken" / "minmax_w4a4_s0", "--out"):
        thread.start()
        deadline = time.monotonic() + 30
        while len(calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert calls == ["ahcptq_w4a4_s0", "omse_w4a4_s0"] and not finished
    thread.join(30)
    assert calls[2:] == ["minmax_w4a4_s0"] and "| MINI | minmax_w4a4 |" in finished[0]
    assert not (tmp_path / "partial").exists(), "no lock is left"
    alone = sweep.sweep(Options(), settings, 1, tmp_path / "b", tmp_path / "records.jsonl", verbosity=0)
    assert alone == finished[0] and len(calls) == 3


def test_a_folder_that_comes_and_goes_is_taken_by_one_at_a_time(tmp_path: Path) -> None:
    """Threads that take one folder in turn without rest: none fails, and never do two have it."""
    inside, met, faults, turns = [], [], [], []

    def work() -> None:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            try:
                with claimed(tmp_path / "taken" / "run", "--out"):
                    inside.append(1)
                    met.append(len(inside))
                    turns.append(1)
                    inside.pop()
            except FolderTaken:
                continue
            except OSError as error:
                faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and max(met) == 1 and len(turns) > 100


def test_a_fault_gives_the_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> dict[str, Any]:
        raise OSError("no room")

    monkeypatch.setattr(sweep.one_run, "run", fail)
    settings = sweep.parse_settings("minmax", "44")
    with pytest.raises(OSError, match="no room"):
        sweep.sweep(Options(), settings, 1, tmp_path, share=True, verbosity=0)
    monkeypatch.setattr(sweep.one_run, "run", made_up)
    assert "minmax_w4a4" in sweep.sweep(Options(), settings, 1, tmp_path, share=True, verbosity=0)


@pytest.mark.slow
def test_processes_share_a_sweep_and_a_killed_one_loses_its_run_alone(tmp_path: Path) -> None:
    """Three processes on four runs, one killed inside a run, give the records of one process, number by number."""
    words = ["--methods=minmax,omse", "--bits=44,66", "--seeds=1", "--checkpoint=mini-scenes", "--num_scenes=6"]
    words += ["--num_calib=2", "--noblank", "--iterations=0"]

    def start(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments.sweep", *words, f"--out={out}", *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    alone = start(tmp_path / "alone")
    assert alone.wait(600) == 0
    shared = tmp_path / "shared"
    victim = start(shared, "--share")
    taken = shared / "partial" / "taken"
    deadline = time.monotonic() + 300
    while not (taken.exists() and any(taken.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any(taken.iterdir()), "a run is under way"
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    others = [start(shared, "--share") for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in others]
    assert [process.returncode for process in others] == [0, 0], texts

    def scores(out: Path) -> dict[str, Any]:
        lines = map(json.loads, (out / "records.jsonl").read_text().splitlines())
        return {json.dumps(r["config"], sort_keys=True): (r["fp"], r["quantized"]) for r in lines}

    assert scores(shared) == scores(tmp_path / "alone") and len(scores(shared)) == 4
    assert all("== " in text for text in texts), "each did some"
    assert (shared / "table.md").read_text().splitlines()[2:] == (
        tmp_path / "alone" / "table.md"
    ).read_text().splitlines()[2:]
