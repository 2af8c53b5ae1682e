"""Calibration and learning on several devices and processes: the same bits, also after one of them was killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ahcptq_jax import devices
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.devices import Dealt, in_order_of_images
from ahcptq_jax.quantizers.kinds import Observation, kind_named
from ahcptq_jax.reconstruction.together import Deal, in_pairs, mesh_of
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[2]

# Quantizes a tiny SAM on seven images and writes the arrays of the result.
SCRIPT = """
import sys
import jax, numpy as np
from ahcptq_jax.api import quantize
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from sam_flax import Sam
from sam_flax.files.convert import convert

out, coordinator, processes, process, batch, state = sys.argv[1:]
if coordinator:
    jax.distributed.initialize(coordinator, int(processes), int(process))
with np.load("tests/data/sam_tiny_weights_s0.npz") as file:
    config, params = convert(dict(file), decoder_num_heads=4)
rng = np.random.default_rng(0)
boxes = [[5, 5, 40, 50], [1, 20, 30, 60]]
calib = [(rng.integers(0, 256, (60, 64, 3), dtype=np.uint8), boxes) for _ in range(7)]
learning = None
if int(batch):
    learning = ReconstructionConfig(iterations=20, batch=int(batch), chunk=2, save_seconds=0)
found = quantize(
    params, calib, QuantConfig(), sam=Sam(config), progress=False, reconstruction=learning, state_dir=state or None
)
np.savez(out, *map(np.asarray, jax.tree.leaves(found)))
"""


def start(folder: Path, name: str, processes: int, local: int = 1, batch: int = 0, state: str = "") -> list:
    """Starts the processes of a run; each writes its result to a file of its own."""
    coordinator = ""
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={local}",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder / f"{name}_{i}.npz"), coordinator, str(processes), str(i)]
            + [str(batch), state],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def arrays(folder: Path, name: str, *args: int, **kwargs: int | str) -> list[np.ndarray]:
    """The result of a run, of which all its processes have the same."""
    running = start(folder, name, *args, **kwargs)
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    found = []
    for index in range(len(running)):
        with np.load(folder / f"{name}_{index}.npz") as file:
            found.append([file[key] for key in file.files])
    for other in found[1:]:
        check_equal(found[0], other)
    return found[0]


def check_equal(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    assert len(first) == len(second) > 100
    assert [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not np.array_equal(a, b)] == []


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    return arrays(tmp_path_factory.mktemp("two"), "two", 1, local=2, batch=4)


@pytest.mark.slow
def test_a_calibration_is_that_of_one_device(tmp_path: Path) -> None:
    """Seven images on one device, four devices, and three processes."""
    one = arrays(tmp_path, "one", 1)
    check_equal(one, arrays(tmp_path, "four", 1, local=4))
    check_equal(one, arrays(tmp_path, "three", 3))


@pytest.mark.slow
def test_learning_does_not_depend_on_how_many_devices_share_it(two_devices: list[np.ndarray], tmp_path: Path) -> None:
    """One device alone is another program for XLA, and differs in last bits; what it learns is as good."""
    check_equal(two_devices, arrays(tmp_path, "four", 1, local=4, batch=4))
    check_equal(two_devices, arrays(tmp_path, "processes", 2, batch=4))


@pytest.mark.slow
def test_three_processes_learn_as_three_devices(tmp_path: Path) -> None:
    check_equal(arrays(tmp_path, "devices", 1, local=3, batch=6), arrays(tmp_path, "processes", 3, batch=6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "victim"),
    [("calibration/statistics.npz", 0), ("*blocks_1.mlp.partial.npz", 1), ("*mlp.done.npz", 0)],
)
def test_a_run_goes_on_with_another_number_of_processes(
    stage: str, victim: int, two_devices: list[np.ndarray], tmp_path: Path
) -> None:
    """Two processes of which one is killed in a stage, then one with two devices."""
    state = tmp_path / "state"
    running = start(tmp_path, "killed", 2, batch=4, state=str(state))
    end = time.monotonic() + 600
    while not list(state.glob(stage)):
        assert time.monotonic() < end and all(process.poll() is None for process in running)
        time.sleep(0.02)
    running[victim].kill()
    time.sleep(1)
    for process in running:
        process.kill()
        process.communicate()
    assert list(state.glob(stage)) and not (tmp_path / "killed_0.npz").exists()
    check_equal(two_devices, arrays(tmp_path, "resumed", 1, local=2, batch=4, state=str(state)))


# ------------------------------------------------------------------------------------------------------- what it is of


def row(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:1] * size), (devices.AXIS,))


@pytest.mark.parametrize(("batch", "images"), [(1, 5), (2, 5), (4, 5), (8, 5), (8, 32)])
def test_images_are_dealt_to_slots(batch: int, images: int) -> None:
    deal = Deal(batch, images, None)
    slots = [list(deal.of_slot(slot)) for slot in range(batch)]
    assert sorted({image for slot in slots for image in slot}) == list(range(images)) == deal.own
    if batch <= images:
        assert sum(map(len, slots)) == images
    for size in (1, 2, 4, 8):
        if batch % size == 0:
            shared = Deal(batch, images, row(size))
            assert [list(slot) for place in range(size) for slot in shared.of_device(place)] == slots
            key = jax.random.key(3)
            np.testing.assert_array_equal(shared.draw(key, 6), deal.draw(key, 6))
    drawn = deal.draw(jax.random.key(0), 200)
    assert all(set(drawn[:, slot]) == set(range(len(slots[slot]))) for slot in range(batch))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_sums_in_pairs_are_those_of_the_parts(count: int) -> None:
    """Parts of 1, 2, 4 … values, summed on their own first, give the same bits."""
    values = list(jnp.asarray(np.random.default_rng(0).normal(size=(count, 50)), jnp.float32))
    whole = in_pairs(values)
    np.testing.assert_allclose(whole, np.sum(np.array(values, np.float64), 0), rtol=1e-4, atol=1e-5)
    for size in (1, 2, 4, 8):
        if count % size == 0:
            parts = [in_pairs(values[i : i + size]) for i in range(0, count, size)]
            np.testing.assert_array_equal(in_pairs(parts), whole)


def test_a_batch_is_shared_by_as_many_devices_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "row", lambda count=None: row(count or 6))
    monkeypatch.setattr(devices, "count", lambda: 6)
    assert [mesh.size if (mesh := mesh_of(batch)) else 1 for batch in (1, 2, 4, 6, 9, 12)] == [1, 2, 4, 6, 3, 6]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="batch=4 cannot be dealt out evenly to the 6 devices of all processes; give"):
        mesh_of(4)


@pytest.mark.parametrize(
    ("kind", "act_range"),
    [(kind, "minmax") for kind in ("uniform", "grouped", "hybrid", "log2", "log_nonlinear")]
    + [("uniform", "mse"), ("uniform", "percentile")],
)
def test_what_batches_tell_is_merged_in_any_grouping(kind: str, act_range: str) -> None:
    """Three batches at once, as three devices look at them, against one after the other: equal bits."""
    statistic, settings = kind_named(kind).statistic, QuantConfig(act_range=act_range)
    rng = np.random.default_rng(1)

    def observation(index: int) -> Observation:
        key = jax.random.key(index)
        if kind.startswith("log"):
            scores = jnp.asarray(rng.normal(size=(2, 9, 9)), jnp.float32)
            return Observation(key, attention=lambda queries: (jax.nn.softmax(scores), scores[..., :4]))
        x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 4, 8), (8, 5)))
        return Observation(key, activations=x, kernel=kernel)

    seen = [observation(index) for index in range(4)]
    empty = statistic.init((1, 3, 4, 8), 4, settings)
    one_by_one = empty
    for observed in seen:
        one_by_one = statistic.merge(one_by_one, statistic.of_batch(one_by_one, observed, 4, settings))
    start = statistic.merge(empty, statistic.of_batch(empty, seen[0], 4, settings))
    outlines = [statistic.outline(empty, observed) if statistic.outline else None for observed in seen]
    batches = []
    for index in (1, 2, 3):
        before = start
        for outline in outlines[1:index]:
            before = before if outline is None else statistic.merge(before, outline)
        batches.append(statistic.of_batch(before, seen[index], 4, settings))
    together_ = start
    for batch in batches:
        together_ = statistic.merge(together_, batch)
    for found, wanted in zip(jax.tree.leaves(together_), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_array_equal(found, wanted)
    grouped = statistic.merge(start, statistic.merge(statistic.merge(batches[0], batches[1]), batches[2]))
    for found, wanted in zip(jax.tree.leaves(grouped), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_one_process_has_everything() -> None:
    values = Dealt({0: np.ones(2), 1: np.zeros(2)}, 2, np.ones(2), row(1))
    assert len(values) == 2 and [float(v.sum()) for v in values] == [2, 0]
    with pytest.raises(IndexError):
        values[2]
    np.testing.assert_array_equal(in_order_of_images({1: 0.1, 0: 1 / 3}, 2), [1 / 3, 0.1])
    devices.check_same(3, "Nothing")


def test_processes_that_see_different_folders_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather: Callable = lambda number: np.array([[0], [3]])  # noqa: E731
    monkeypatch.setattr(devices.multihost_utils, "process_allgather", gather)
    with pytest.raises(
        InputError, match=r"The number of images saved in a.npz is not the same for all processes \(0, 3\)"
    ):
        devices.check_same(3, "The number of images saved in a.npz")
