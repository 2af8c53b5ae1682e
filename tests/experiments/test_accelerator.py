"""The accelerator's table: ratios to float32, rows that failed, words that are refused."""

import subprocess
import sys

import pytest

from experiments import accelerator
from experiments.accelerator import Task, table


def _row(form: str, seconds: float, **more: object) -> dict:
    return {
        "model": "vit_b",
        "form": form,
        "batch": 2,
        "seconds": seconds,
        "images_per_second": 2 / seconds,
        "peak_bytes": 2**30,
    } | more


def test_ratios_are_to_float32_of_the_same_model_and_batch():
    lines = table([_row("float32", 0.5), _row("bfloat16", 0.125)], "card").splitlines()
    assert lines[-1] == "| vit_b | bfloat16 | 2 | 125.0 | 16.0 | 4.00 | 1.00 |"
    assert lines[-2].endswith("| 500.0 | 4.0 | 1.00 | 1.00 |")


def test_a_row_that_failed_says_why_and_the_others_stand():
    failed = {"model": "vit_h", "form": "float32", "batch": 8, "error": "RESOURCE_EXHAUSTED: out of memory"}
    text = table([failed, _row("w4a4", 0.5, peak_bytes=None)], "card")
    assert "RESOURCE_EXHAUSTED" in text
    assert "| vit_b | w4a4 | 2 | 500.0 | 4.0 |  |  |" in text, "no float32 to compare with, no memory known"


def test_a_process_that_dies_is_a_row_with_its_last_message(monkeypatch):
    monkeypatch.setattr(Task, "words", ["serve", "no_such_model", "float32", "1"])
    (row,) = accelerator.measure([Task("vit_b", "float32", 1)], together=1)
    assert "no_such_model" in row["error"]


@pytest.mark.parametrize("flag", ["--models=vit_x", "--forms=int3", "--batch=0"])
def test_bad_words_end_with_a_sentence(flag):
    words = [sys.executable, "-m", "experiments.accelerator", flag]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and flag.split("=")[1] in done.stderr
