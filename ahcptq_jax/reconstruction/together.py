"""Iterations with batches of several images, whose gradients are found one by one, on one device or on many.

A batch has slots, and every slot has images of its own to draw from, dealt out like cards. A device has whole slots
and the rows of their images; what is exchanged is one sum of gradients an iteration. Gradients are summed in pairs,
pairs of pairs and so on, in the order of the slots, so that the bits do not depend on the devices, as long as each has
1, 2, 4, 8 ... slots, or all. An iteration is several programs for the same reason: an exchange would decide how XLA
fuses what comes before it, see `calibration.passes`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Int

from ahcptq_jax import devices
from ahcptq_jax.devices import AXIS, BY_IMAGE, EVERYWHERE, spread
from ahcptq_jax.reconstruction import learning
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from sam_flax.errors import InputError
from sam_flax.layers import in_float32


def mesh_of(batch: int) -> Mesh | None:
    """The devices that share a batch: as many as it can be dealt out to evenly; None for one.

    Raises:
        InputError: if there are several processes and one of them would have nothing to do.
    """
    available = devices.count()
    count = max(n for n in range(1, available + 1) if batch % n == 0)
    if jax.process_count() > 1 and count < available:
        raise InputError(
            f"batch={batch} cannot be dealt out evenly to the {available} devices of all processes; give a multiple of "
            f"{available}, or one process."
        )
    return devices.row(count) if count > 1 else None


@dataclasses.dataclass(frozen=True)
class Deal:
    """Which images a slot of the batch draws from, and which process has them.

    Attributes:
        batch: slots.
        images: how many there are; with more slots than images, slots have the same ones.
        mesh: the devices, each with as many slots; None for one device.
    """

    batch: int
    images: int
    mesh: Mesh | None

    @property
    def slots(self) -> int:
        """Slots of a device."""
        return self.batch // (1 if self.mesh is None else self.mesh.size)

    @property
    def places(self) -> list[int]:
        """The places of this process's devices."""
        return [0] if self.mesh is None else devices.own_places(self.mesh)

    def of_slot(self, slot: int) -> range:
        """The images that a slot draws from."""
        apart = min(self.batch, self.images)
        return range(slot % apart, self.images, apart)

    def of_device(self, place: int) -> list[range]:
        """The images of the slots of the device at this place."""
        return [self.of_slot(place * self.slots + slot) for slot in range(self.slots)]

    @property
    def own(self) -> list[int]:
        """This process's images, in order."""
        return sorted({image for place in self.places for slot in self.of_device(place) for image in slot})

    def draw(self, key: jax.Array, iterations: int) -> Int[np.ndarray, "iterations batch"]:
        """Which of its images each slot takes in each iteration; the same whatever the devices."""
        sizes = np.array([len(self.of_slot(slot)) for slot in range(self.batch)], np.int32)
        return np.asarray(jax.random.randint(key, (iterations, self.batch), 0, sizes[0] if self.batch == 1 else sizes))


@partial(jax.jit, static_argnames=("batch", "slots", "drops", "mesh"))
def _taken(
    store: Any,
    places: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    *,
    batch: int,
    slots: int,
    drops: int,
    mesh: Mesh | None,
) -> tuple[Any, jax.Array]:
    """The row that one slot of every device takes, one after the other, and its seeds (devices, drops, 2).

    Args:
        store: (devices * M, b, ...) rows of all devices.
        places: (devices, chunk, slots) int32, the row of a device that a slot takes.
        numbers: the iteration, that of the chunk's first, and the slot of each device.
        batch: slots of all devices.
        slots: of a device.
        drops: how many seeds an iteration needs.
    """

    def of_device(store: Any, places: Any, numbers: Any, key: Any) -> tuple[Any, jax.Array]:
        step, first, slot = numbers
        place = 0 if mesh is None else jax.lax.axis_index(AXIS)
        row = places[0, step - first, slot]
        number = place * slots + slot
        return jax.tree.map(lambda a: a[row], store), learning.seeds(key, step, batch, drops)[number][None]

    if mesh is None:
        return of_device(store, places, numbers, key)
    shares = (BY_IMAGE, BY_IMAGE, EVERYWHERE, EVERYWHERE)
    return spread(of_device, mesh, shares, BY_IMAGE)(store, places, numbers, key)


@partial(jax.jit, static_argnames=("how", "mesh"))
@in_float32
def _gradient(
    problem: learning.Problem,
    state: learning.State,
    taken: tuple[Any, jax.Array],
    step: jax.Array,
    shared: Any,
    *,
    how: learning.Learning,
    mesh: Mesh | None,
) -> jax.Array:
    """The gradients of what every device has `taken`, and its losses, as one vector a device (devices, n)."""

    def of_device(problem: Any, state: Any, taken: Any, step: jax.Array, shared: Any) -> jax.Array:
        row, (seeds,) = taken

        def total(rounding: dict, scales: dict) -> tuple[jax.Array, jax.Array]:
            return learning.total(problem, rounding, scales, state.quantizers, row, seeds, step, shared, how)

        gradients, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(*learning.learned(state, how.config))
        return jnp.concatenate([ravel_pytree(gradients)[0], losses])[None]

    if mesh is None:
        return of_device(problem, state, taken, step, shared)
    shares = (EVERYWHERE, EVERYWHERE, BY_IMAGE, EVERYWHERE, EVERYWHERE)
    return spread(of_device, mesh, shares, BY_IMAGE)(problem, state, taken, step, shared)


@jax.jit
def _plus(first: jax.Array, second: jax.Array) -> jax.Array:
    return first + second


@partial(jax.jit, static_argnames="mesh")
def _summed(vectors: jax.Array, *, mesh: Mesh | None) -> jax.Array:
    """The sum of the devices' vectors (devices, n), in pairs: each adds up a part of all and hands it to the others."""
    if mesh is None:
        return vectors[0]

    def of_device(vectors: jax.Array) -> jax.Array:
        (own,) = vectors
        parts = jnp.pad(own, (0, -own.size % mesh.size)).reshape(mesh.size, -1)
        theirs = jax.lax.all_to_all(parts, AXIS, 0, 0)
        part = in_pairs(list(theirs))
        return jax.lax.all_gather(part, AXIS).reshape(-1)[: own.size]

    return spread(of_device, mesh, BY_IMAGE, EVERYWHERE)(vectors)


def in_pairs(values: list[jax.Array]) -> jax.Array:
    """The sum of values by pairs, pairs of pairs and so on."""
    while len(values) > 1:
        pairs = [_plus(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


@partial(jax.jit, static_argnames=("config", "mesh"))
def _step(
    state: learning.State, total: jax.Array, *, config: ReconstructionConfig, mesh: Mesh | None
) -> tuple[learning.State, jax.Array]:
    """The state after a step, every device making the same one, and the losses of the batch."""

    def of_device(state: learning.State, total: jax.Array) -> tuple[learning.State, jax.Array]:
        mean = total / config.batch
        _, tree_of = ravel_pytree(learning.learned(state, config))
        return learning.stepped(state, tree_of(mean[:-2]), config), mean[-2:]

    if mesh is None:
        return of_device(state, total)
    return spread(of_device, mesh, EVERYWHERE, EVERYWHERE)(state, total)


def advance(
    problem: learning.Problem,
    state: learning.State,
    store: Any,
    places: jax.Array,
    first: np.int32,
    last: np.int32,
    key: jax.Array,
    shared: Any = (),
    *,
    deal: Deal,
    how: learning.Learning,
) -> tuple[learning.State, jax.Array]:
    """Iterations `first` to `last - 1`; as `learning.advance`, with `store` and `places` as `_taken` takes them."""
    losses: jax.Array | None = None
    drops = len(store[0]) + len(state.quantizers)
    sizes = {"batch": deal.batch, "slots": deal.slots, "drops": drops, "mesh": deal.mesh}
    for step in np.arange(first, last, dtype=np.int32):
        found = []
        for slot in range(deal.slots):
            taken = _taken(store, places, (step, first, np.int32(slot)), key, **sizes)
            found.append(_gradient(problem, state, taken, step, shared, how=how, mesh=deal.mesh))
        total = devices.settled(_summed(devices.settled(in_pairs(found)), mesh=deal.mesh))
        state, parts = _step(state, total, config=how.config, mesh=deal.mesh)
        losses = parts if losses is None else losses + parts
    return state, jnp.zeros(2) if losses is None else losses / (last - first)
