"""Images over all devices, on one host or many, in an evaluation; `ahcptq_jax.devices` is for what comes before it.

The images of an evaluation are one axis, sharded over a mesh of every device. A device runs the same program on its
images as a single one would, so results are equal bit by bit; hosts exchange them at the end.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from ahcptq_jax.devices import BY_IMAGE, row
from sam_flax import SamModel, SamPredictor
from sam_flax.errors import InputError
from sam_flax.predictor import MaskModel


def define_flags() -> None:
    """The flags by which several hosts find each other."""
    flags.DEFINE_string("coordinator", "", "host:port of process 0, where several processes share a run.")
    flags.DEFINE_integer("num_processes", 1, "How many processes take part; each runs the same command.")
    flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0.")


def connect(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes of a run; must come before anything that JAX computes. One process has nothing to join.

    Raises:
        ValueError: if the flags do not fit each other, or the processes do not find each other.
    """
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id={process_id} must lie in 0..num_processes-1={num_processes - 1}; give each process its own."
        )
    if (num_processes > 1) != bool(coordinator):
        raise InputError(
            f"--num_processes={num_processes} with --coordinator={coordinator!r}: several processes need a "
            "coordinator, host:port of process 0, and one process none."
        )
    if coordinator:
        try:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"--coordinator={coordinator} cannot be joined ({error}); give the same host:port to all processes."
            ) from error


def folder(out: Path) -> Path:
    """Where this process leaves its files; process 0 alone leaves them where it was told to."""
    return out / f"process_{jax.process_index()}" if jax.process_index() else out


def home(own: Path) -> Path:
    """The folder of process 0, given what `folder` returned."""
    return own.parent if jax.process_index() else own


def predictors(model: MaskModel) -> list[SamPredictor]:
    """A predictor for every local device, in the order of `jax.local_devices()`, the model copied to each."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return [SamPredictor(model)]
    return [SamPredictor(_on_device(model, device)) for device in devices]


def _on_device(model: MaskModel, device: jax.Device) -> MaskModel:
    if isinstance(model, SamModel):
        return dataclasses.replace(model, params=jax.device_put(model.params, device))
    return jax.device_put(model, device)


def shares(count: int) -> list[range]:
    """Which of `count` images each local device has, in the order of `jax.local_devices()`."""
    mesh = row()
    padded = -(-count // mesh.size) * mesh.size
    placed = NamedSharding(mesh, BY_IMAGE).devices_indices_map((padded,))
    return [range(*placed[device][0].indices(count)) for device in jax.local_devices()]


def from_all_processes(records: Mapping[int, Any]) -> dict[int, Any]:
    """The union of all processes' records (JSON values by number), on every process."""
    if jax.process_count() == 1:
        return dict(records)
    data = np.frombuffer(json.dumps(list(records.items())).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)]))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    everyone = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    parts = (json.loads(row[:length].tobytes()) for row, length in zip(everyone, lengths, strict=True))
    return {number: record for part in parts for number, record in part}
