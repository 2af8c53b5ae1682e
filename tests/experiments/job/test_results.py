"""Result files: strict JSON, complete or absent."""

import json

import numpy as np
import pytest

from experiments.job.results import plain, write_file, write_json


def test_json_is_strict_and_atomic(tmp_path):
    value = {
        "a": np.float32(1.5),
        2: [float("nan"), np.inf],
        "p": tmp_path,
        "n": np.arange(2),
        "t": (True, None),
    }
    path = write_json(tmp_path / "new" / "results.json", value)
    text = path.read_text()
    assert json.loads(text) == {
        "a": 1.5,
        "2": [None, None],
        "p": str(tmp_path),
        "n": [0, 1],
        "t": [True, None],
    }
    assert "NaN" not in text and [file.name for file in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(TypeError, match="no JSON form"):
        write_json(path, {"f": plain})
    assert path.read_text() == text  # a failed write leaves the old file


def test_an_unwritable_place_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot be written .*: one of its folders is a file"):
        write_file(tmp_path / "file" / "results.json", "{}")
