"""Scores of many runs in one small file, a line of JSON each, which can be kept with the code."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.job.options import Options
from experiments.job.results import plain, write_atomically

# What is kept of a run's results, besides its options.
_KEPT = ("model", "fp", "quantized", "agreement_mIoU", "bytes", "seconds", "versions")

Record = dict[str, Any]


def key(options: Options) -> Options:
    """What two runs with equal results have in common: everything but the folder that they write to."""
    return dataclasses.replace(options, out=Options.out)


def read(path: Path) -> dict[Options, Record]:
    """The records of a file by their `key`; none if there is no file.

    Raises:
        ValueError: if a line is no record.
    """
    if not path.exists():
        return {}
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            options = Options(**record["config"])
            if not all(isinstance(record[name], Mapping) for name in ("fp", "quantized")):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} has no record of a run in line {number}; delete the line to repeat that run, or the file."
            ) from error
        records[options] = record
    return records


def add(path: Path, options: Options, results: Mapping[str, Any]) -> Record:
    """Adds a run to the file, which is there whole before and after, and returns its record."""
    config = {name: value for name, value in dataclasses.asdict(key(options)).items() if value is not None}
    record = plain({"config": config, **{name: results[name] for name in _KEPT if name in results}})
    lines = path.read_text() if path.exists() else ""
    write_atomically(path, lines + json.dumps(record, allow_nan=False) + "\n")
    return record
