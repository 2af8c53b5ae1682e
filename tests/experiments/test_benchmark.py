"""The benchmark times every row in its own process, counts products rightly and writes both files."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments import benchmark
from experiments.bench import peers, rows
from sam_flax import Sam
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.config import VIT_B


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_writes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    done = command("--toy", "--repeats=2", "--rows=encoder_b,hluq_forward", f"--out={tmp_path}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert [row["name"] for row in document["rows"]] == ["encoder_b", "hluq_forward"]
    for row in document["rows"]:
        assert row["seconds"] > 0 and row["compile_seconds"] > 0 and row["peers"] == {}
        assert len(row["all_seconds"]) == row["repeats"] == 2
        # A Python process with JAX in it, and no more than toy arrays.
        assert 2**27 < row["peak_bytes"] < 2**31
    assert document["rows"][0]["ceiling_gflops"] > 0
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown in done.stdout and "| hluq_forward |" in markdown


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    done = command("--rows=encoder_x", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "--rows names encoder_x; choose of matmul" in done.stderr
    assert not (tmp_path / "out").exists()
    assert [row.name for row in benchmark.chosen_rows("encoder_b,matmul")] == ["matmul", "encoder_b"]


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name != "onnx" else True)
    with pytest.raises(ValueError, match="=torch needs torch and segment_anything; install them with"):
        benchmark.chosen_peers("torch")
    with pytest.raises(ValueError, match=r"=openvino needs openvino and onnxscript and .*\.\[peers\]"):
        benchmark.chosen_peers("openvino")
    with pytest.raises(ValueError, match="--against names tflite; choose of torch, onnxruntime, openvino"):
        benchmark.chosen_peers("tflite")
    assert benchmark.chosen_peers("") == []


@pytest.mark.parametrize("peers_of", ["onnxruntime", "openvino"])
def test_peers_of_other_runtimes_run(tmp_path: Path, peers_of: str) -> None:
    try:
        benchmark.chosen_peers(peers_of)
    except ValueError as error:
        pytest.skip(f"compares with other runtimes: {error}")
    done = command("--toy", "--repeats=1", "--rows=onnx_b_w4a4", f"--against={peers_of}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    expected = [name for name in peers.RUNTIMES if name.startswith(peers_of)]
    assert list(row["peers"]) == expected and all(peer["ratio"] > 0 for peer in row["peers"].values())
    assert f"| {expected[0]} / ours |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx_b", "onnx_b_w4a4", "onnx_b_w8a8"])
def test_our_onnx_files_run(name: str) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    (embeddings,) = benchmark.chosen_rows(name)[0].prepare(True).run()
    assert np.isfinite(embeddings).all() and embeddings.std() > 0


class FakeWorker:
    """Answers at once: ours takes 2, 4 and 6 seconds, the other side 6 each."""

    def __init__(self, row: Any, peer: str, toy: bool):
        self.times = iter([6.0, 6.0, 6.0] if peer else [2.0, 6.0, 4.0])
        self.first = {"compile_seconds": 1.0}

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self) -> dict[str, float]:
        seconds = next(self.times)
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "ceiling_gflops": 10.0}

    def finish(self) -> dict[str, Any]:
        return {"peak_bytes": 1 << 30, "parts": 2, "flops": 2e10}


def test_numbers_are_medians_and_ratios_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    row = dataclasses.replace(benchmark.chosen_rows("encoder_b")[0])
    result = benchmark.measure(row, 3, ["torch", "openvino"], True, lambda: None)
    assert result["seconds"] == 2.0 and result["cpu_seconds"] == 4.0  # 4 seconds for two parts
    assert result["ceiling_share"] == 0.5  # 20 GFLOP in 4 s of 10 GFLOP/s
    assert list(result["peers"]) == ["torch", "openvino"]
    assert result["peers"]["torch"]["ratio"] == 1.5 and result["peers"]["openvino"]["seconds"] == 6.0
    alone = benchmark.measure(benchmark.chosen_rows("hluq_search")[0], 3, ["torch"], True, lambda: None)
    assert alone["peers"] == {} and "No public package" in alone["note"]


def test_fused_attention_is_the_public_one() -> None:
    try:
        benchmark.chosen_peers("torch")
    except ValueError as error:
        pytest.skip(f"compares with PyTorch: {error}")
    import torch

    with unittest.mock.patch.dict(sys.modules):  # whose other users want the whole package
        public = peers.public_module()
    torch.manual_seed(0)
    attention = public.Attention(16, num_heads=2, use_rel_pos=True, input_size=(5, 5)).eval()
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(3, 5, 5, 16)
    with torch.inference_mode():
        for in_turn in (False, True):
            fused = peers.fused_attention(public, attention, in_turn)(x)
            torch.testing.assert_close(fused, attention(x), rtol=1e-5, atol=1e-5)


def test_a_failing_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(benchmark.ROWS[0], name="absent")  # which the process does not find
    with pytest.raises(ValueError, match="row absent ended with exit code 1"):
        benchmark.measure(row, 1, [], True, lambda: None)


def product_flops(jaxpr: Any) -> float:
    """Operations of the matrix products in a jaxpr, loops counted as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * equation.outvars[0].aval.size * depth
        inner = sum(product_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


@pytest.mark.usefixtures("positions_by_definition")
@pytest.mark.parametrize("config", [MINI, dataclasses.replace(VIT_B, depth=1, img_size=448, global_attn_indexes=())])
def test_products_are_counted(config: Any) -> None:
    sam = Sam(config)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    images = jnp.zeros((1, config.img_size, config.img_size, 3))
    traced = jax.make_jaxpr(lambda p, x: sam.apply({"params": p}, x, method="encode_image"))(params, images)
    assert product_flops(traced.jaxpr) == rows.encoder_flops(config)


def test_spans_of_compilation_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners: list[Callable[..., None]] = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    clock = rows.CompileClock()
    now: Iterator[float] = iter([2.0, 3.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    note = listeners[0]
    note("/jax/core/compile/jaxpr_trace_duration", 1.0)  # 1..2
    note("/jax/core/compile/jaxpr_trace_duration", 3.0)  # 0..3, around it
    note("/jax/core/compile/backend_compile_duration", 4.0)  # 5..9
    note("/jax/compilation_cache/other", 100.0)
    assert clock.seconds() == 7.0
