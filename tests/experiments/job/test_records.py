"""Records of runs in one file, which several sweeps may share."""

import multiprocessing
import time

import pytest

from experiments.job import records
from experiments.job.options import Options

RESULTS = {"model": "MINI", "fp": {"AP": 1.0}, "quantized": {"AP": 0.5}, "agreement_mIoU": 0.9}


def add_some(path, first):
    for seed in range(first, first + 8):
        records.add(path, Options(seed=seed), RESULTS)
        time.sleep(0.001)


def test_two_processes_lose_no_record(tmp_path):
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_some, args=(path, first)) for first in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {options.seed for options in records.read(path)} == {*range(8), *range(100, 108)}


@pytest.mark.parametrize("change", [{"out": "elsewhere"}, {"carrier": "float32"}])
def test_what_does_not_change_a_result_is_no_part_of_its_key(tmp_path, change):
    path = tmp_path / "records.jsonl"
    records.add(path, Options(), RESULTS)
    records.add(path, Options(**change), RESULTS)
    assert len(records.read(path)) == 1
    records.add(path, Options(seed=1), RESULTS)
    assert len(records.read(path)) == 2
