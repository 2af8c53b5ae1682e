"""Images shared by several devices and processes: the results are those of one device, bit by bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.job import devices

ROOT = Path(__file__).parents[3]

# Evaluates a tiny SAM, in floating point and quantized, on seven images, one of them without a box; writes the
# predictions and scores to the file it is given.
SCRIPT = """
import json
import sys
import jax, numpy as np
from ahcptq_jax.api import quantize
import ahcptq_jax.devices
from ahcptq_jax.config import METHODS, QuantConfig
from experiments import coco, evaluate
from experiments.evaluate.journal import to_record
from experiments.job import devices
from experiments.scenes.scenes import scene_dataset, to_coco
from sam_flax import Sam, SamModel, SamPredictor
from sam_flax.files.convert import convert

out, coordinator, processes, process = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
devices.connect(coordinator, processes, process)
with np.load("tests/data/sam_tiny_weights_s0.npz") as file:
    config, params = convert(dict(file), decoder_num_heads=4)
params = jax.tree.map(jax.numpy.asarray, params)
model = SamModel(Sam(config), params)
scenes = scene_dataset(5, 7, 64)
images, document = to_coco(scenes)
dataset = coco.CocoDataset.from_memory(images, document)
boxes = coco.load_boxes("gt", dataset)
none = coco.ImageBoxes(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
boxes.per_image[dataset.items[3].image_id] = none
models, found = {"float": model}, {"devices": jax.device_count()}
if sys.argv[5:]:
    # The images are dealt out to the devices; then once more, all on one.
    config = QuantConfig(**METHODS[sys.argv[5]])
    models["quantized"] = quantize(params, images[:3], config, sam=model.sam)
    ahcptq_jax.devices.count = lambda: 1
    leaves, single = map(jax.tree.leaves, (models["quantized"], quantize(params, images[:3], config, sam=model.sam)))
    found["calibration"] = len(leaves), sum(np.array_equal(a, b) for a, b in zip(leaves, single, strict=True))
for name, model in models.items():
    journal = f"{out}.{name}.jsonl"
    single = evaluate.evaluate(SamPredictor(model), dataset, boxes, progress=None)
    shared = evaluate.evaluate(
        devices.predictors(model), dataset, boxes, progress=None, partial_results=journal, model_fingerprint="x"
    )
    resumed = evaluate.evaluate(
        devices.predictors(model), dataset, boxes, progress=None, partial_results=journal, model_fingerprint="x"
    )
    for kind, result in (("single", single), ("shared", shared), ("resumed", resumed)):
        records = [to_record(image) for image in result.images.values()]
        found[f"{name} {kind}"] = {"metrics": dict(result.metrics), "records": records, "resumed": result.resumed}
with open(out, "w") as file:
    json.dump(found, file)
"""


def start(out: Path, *arguments: str, local_devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={local_devices}",
    }
    words = [sys.executable, "-c", SCRIPT, str(out), *arguments]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen, out: Path) -> dict[str, Any]:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return json.loads(out.read_text())


def check_equal(found: dict[str, Any], name: str, own: int) -> None:
    single, shared, resumed = (found[f"{name} {kind}"] for kind in ("single", "shared", "resumed"))
    assert len(single["records"]) == 7 and single["records"][3]["counts"] == []
    assert shared["records"] == single["records"] == resumed["records"]
    assert shared["metrics"] == single["metrics"] == resumed["metrics"]
    assert (single["resumed"], shared["resumed"], resumed["resumed"]) == (0, 0, own)


@pytest.mark.parametrize(("count", "method"), [(2, "minmax"), pytest.param(4, "ahcptq", marks=pytest.mark.slow)])
def test_several_devices_equal_one(count: int, method: str, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    found = results(start(out, "", "1", "0", method, local_devices=count), out)
    assert found["devices"] == count
    leaves, equal = found["calibration"]
    assert leaves == equal > 0
    for name in ("float", "quantized"):
        check_equal(found, name, own=7)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    files = [tmp_path / f"{i}.json" for i in range(2)]
    started = [start(file, coordinator, "2", str(i)) for i, file in enumerate(files)]
    for file, process, own in zip(files, started, (4, 3), strict=True):
        found = results(process, file)
        assert found["devices"] == 2
        check_equal(found, "float", own)
        lines = Path(f"{file}.float.jsonl").read_text().splitlines()
        assert len(lines) == 1 + own  # its own images only, below the header


@pytest.mark.parametrize("count", [0, 1, 7])
def test_shares_cover_the_images_once(count: int) -> None:
    assert [i for share in devices.shares(count) for i in share] == list(range(count))


def test_records_survive_the_exchange() -> None:
    record = {"image_id": 3, "counts": ["ab"], "predicted_iou": [float(np.float32(0.1)), 1 / 3]}
    assert devices.from_all_processes({3: record}) == {3: record}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 2, 0), "several processes need a coordinator"),
        (("localhost:1", 1, 0), "several processes need a coordinator"),
        (("localhost:1", 2, 2), "--process_id=2 must lie in 0..num_processes-1=1"),
    ],
)
def test_flags_that_do_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devices.connect(*arguments)
