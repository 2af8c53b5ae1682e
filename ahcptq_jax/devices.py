"""The devices of all processes as one row: images are dealt out to it like cards, and a step's batch is spread over it.

JAX's own engine does it: a program that is the same on every device runs by `shard_map` over a mesh, and processes that
have joined (`jax.distributed.initialize`) are part of the mesh. All processes make the same calls with the same
arguments. With one device nothing here is used.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_flax.errors import InputError

AXIS = "images"
EVERYWHERE, BY_IMAGE = PartitionSpec(), PartitionSpec(AXIS)


@functools.cache
def row(count: int | None = None) -> Mesh:
    """The mesh of the first `count` devices of all processes, by default of all."""
    return Mesh(np.array(jax.devices()[:count]), (AXIS,))


def count() -> int:
    """The number of devices of all processes."""
    return jax.device_count()


def own_places(mesh: Mesh) -> list[int]:
    """The places in the row of this process's devices."""
    return [place for place, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]


def spread(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """The function run on every device of a mesh; `inputs` and `outputs` say which arrays are shared out."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    from jax.experimental.shard_map import shard_map  # before JAX 0.7

    return shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_rep=False)


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every process has, on every device of the mesh; as they are where there is none."""
    if mesh is None:
        return tree

    def put(value: Any) -> jax.Array:
        if isinstance(value, jax.Array) and value.sharding == NamedSharding(mesh, EVERYWHERE):
            return value
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, EVERYWHERE), lambda index: array[index])

    return jax.tree.map(put, tree)


def shared_out(rows: Sequence[Any], mesh: Mesh) -> Any:
    """One array of the rows of all devices, one after the other; `rows` are those of this process's, in their order."""

    def put(*values: Any) -> jax.Array:
        stacked = np.concatenate([np.asarray(value) for value in values])
        shape = (len(np.asarray(values[0])) * mesh.size, *stacked.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, BY_IMAGE), stacked, shape)

    return jax.tree.map(put, *rows)


def rows_of(tree: Any) -> list[Any]:
    """What this process's devices hold of shared out arrays, in the order of their places, on the host."""
    leaves, structure = jax.tree.flatten(tree)

    def parts(leaf: jax.Array) -> list[np.ndarray]:
        return [np.asarray(s.data) for s in sorted(leaf.addressable_shards, key=lambda s: s.index[0].start or 0)]

    return [jax.tree.unflatten(structure, values) for values in zip(*map(parts, leaves), strict=True)]


def settled(tree: Any) -> Any:
    """Arrays before or after an exchange; on CPUs when they are there.

    Virtual devices share the threads of a process, on one core few: one device's program can wait in an exchange for
    another's that finds no thread, for good (MINI on two devices of one core; XLA ends the process after a minute).
    """
    return jax.block_until_ready(tree) if jax.default_backend() == "cpu" else tree


def on_host(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that `replicated` has put on a mesh, as arrays of this process alone."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), tree)


def is_first() -> bool:
    """Whether this process is the one that writes what all have in common."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here; `name` tells this place from others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_same(number: int, what: str) -> None:
    """Raises InputError on all processes unless they have the same number; `what` begins the sentence."""
    if jax.process_count() == 1:
        return
    found = np.asarray(multihost_utils.process_allgather(np.array([number], np.int32))).reshape(-1)
    if len(set(found.tolist())) > 1:
        raise InputError(
            f"{what} is not the same for all processes ({', '.join(map(str, found))}); give them one folder on a file "
            "system that they share, or none that has a state."
        )


def in_order_of_images(own: Mapping[int, float], count: int) -> np.ndarray:
    """Numbers of all images (count,), float64, of which each process gives those of its own."""
    known = np.full(count, -1, np.int64)
    numbers = np.zeros(count, np.float64)
    for index, number in own.items():
        known[index], numbers[index] = index, number
    if jax.process_count() == 1:
        return numbers
    # As bytes: JAX would round them to float32.
    bits = np.concatenate([known, numbers.view(np.int64)]).view(np.int32)
    everyone = np.ascontiguousarray(multihost_utils.process_allgather(bits)).reshape(jax.process_count(), -1)
    for theirs in everyone.view(np.int64).reshape(-1, 2, count):
        has = theirs[0] >= 0
        numbers[has] = theirs[1].view(np.float64)[has]
    return numbers


class Dealt(Sequence[Any]):
    """A value for each image, of which every process holds those of its own devices: of image i, the i-th in turn.

    Another process's value is sent when it is asked for, and not kept; all processes ask for it together.
    """

    def __init__(self, own: Mapping[int, Any], count: int, shape: Any, mesh: Mesh) -> None:
        """`own` are the values that this process holds, by image, and `shape` the shapes and types of one."""
        self.own, self._count, self._shape = dict(own), count, shape
        self._processes = [device.process_index for device in mesh.devices.flat]

    def __len__(self) -> int:
        return self._count

    def held(self, index: int) -> Any:
        """The value of an image if this process holds it, else zeros."""
        if index in self.own:
            return self.own[index]
        return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._shape)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        owner = self._processes[index % len(self._processes)]
        if jax.process_count() == 1:
            return self.own[index]
        mine = owner == jax.process_index()
        return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(self.held(index), is_source=mine))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self._count))
