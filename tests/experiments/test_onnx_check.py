"""The comparison of exported files with their model: it finds them equal, and tells another model's files."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import onnx_check
from experiments.bench.made_up import random_quantized
from experiments.job.options import Options
from experiments.job.plan import evaluation_set
from sam_flax import Sam
from sam_flax.errors import InputError
from tests.experiments.tiny import TINY

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from ahcptq_jax.formats.onnx import export_onnx  # noqa: E402


def model(seed: int) -> onnx_check.Quantized:
    return random_quantized(TINY, Sam(TINY).init_params(jax.random.key(seed)))


@pytest.mark.slow
def test_files_are_found_equal_to_their_model() -> None:
    found = onnx_check.check(model(0), Options(num_scenes=3))
    assert found.equal_cells / found.cells > 0.999
    assert len(found.ours) == len(found.theirs) == 3 and np.mean(found.ious) > 0.8
    text = onnx_check.report(found)
    assert "3 images" in text and "decoder alone" in text and "seconds an image" in text


@pytest.mark.slow
def test_files_of_another_model_are_told(tmp_path: Path) -> None:
    export_onnx(model(1), tmp_path)
    dataset, found = evaluation_set(Options(num_scenes=1), TINY), onnx_check.Agreement()
    image = dataset.read_image(dataset.items[0])
    boxes = np.array([[2.0, 2, 20, 20], [8, 8, 30, 30]])
    onnx_check.compare(model(0), onnx_check.Files(tmp_path), image, boxes, found)
    assert found.equal_cells / found.cells < 0.99


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_check, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'ahcptq-jax\[onnx\]'"):
        onnx_check.Files(tmp_path)
