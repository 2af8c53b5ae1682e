"""Scores of many runs in one small file, a line of JSON each, which can be kept with the code."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.job.code import code_version
from experiments.job.folder import alone
from experiments.job.options import Options
from experiments.job.results import plain, write_file
from sam_flax.errors import InputError

# What is kept of a run's results, besides its options.
_KEPT = ("model", "fp", "quantized", "agreement_mIoU", "bytes", "seconds", "versions", "code")

Record = dict[str, Any]


def key(options: Options) -> Options:
    """What two runs with equal results have in common.

    Not the folder that they write to, nor what carries their products, nor needless overrides.
    """
    return dataclasses.replace(options, out=Options.out, carrier=Options.carrier).without_needless()


def read(path: Path) -> dict[Options, Record]:
    """The records of a file by their `key`; none if there is no file.

    Raises:
        InputError: if a line is no record.
    """
    if not path.exists():
        return {}
    return {options: record for options, record, _ in _parsed(path)}


def _parsed(path: Path) -> Iterator[tuple[Options, Record, str]]:
    """The key, the record and the text of every line."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            options = Options(**record["config"])
            if not all(isinstance(record[name], Mapping) for name in ("fp", "quantized")):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} has no record of a run in line {number}; delete the line to repeat that run, or the file."
            ) from error
        yield key(options), record, line


def add(path: Path, options: Options, results: Mapping[str, Any]) -> Record:
    """Adds a run to the file, in the place of a record of the same run, and returns its record.

    The file is there whole before and after; two sweeps that share it add to it in turn.
    """
    config = key(options).given()
    record = plain({"config": config, **{name: results[name] for name in _KEPT if name in results}})
    with alone(path):
        others = [line for known, _, line in _parsed(path) if known != key(options)] if path.exists() else []
        write_file(path, "\n".join([*others, json.dumps(record, allow_nan=False)]) + "\n")
    return record


def is_stale(record: Record) -> bool:
    """Whether other code than this made the record; records of before versions were kept are of other code."""
    return record.get("code") != code_version()
