"""The inputs and outputs of the units that reconstruction works on, one after the other.

The architecture says what the units of a model are. A unit is run as a function of its own parameters, so units of one
shape are the same function and share a compilation.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ahcptq_jax import devices
from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import GRANULARITIES as GRANULARITIES
from ahcptq_jax.architectures.base import PARTS as PARTS
from ahcptq_jax.architectures.base import Operation as Operation
from ahcptq_jax.architectures.base import Unit as Unit
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.reconstruction.together import Deal
from ahcptq_jax.runtime.quantized import with_decoded
from sam_flax.layers import Site, in_float32
from sam_flax.sam import Params, call

Args = tuple[np.ndarray, ...]


def encoder_units(sam: Any, granularity: str = "part") -> list[Unit]:
    """The image encoder's units in forward order; `granularity` is one of `GRANULARITIES`."""
    return architecture_of(sam).encoder_units(sam, granularity)


def decoder_units(sam: Any) -> list[Unit]:
    """The mask decoder's units in forward order."""
    return architecture_of(sam).decoder_units(sam)


@partial(jax.jit, static_argnums=0)
@in_float32
def run_unit(
    operation: Operation,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    args: tuple[Shaped[Array, "..."], ...],
) -> Float[Array, "..."]:
    """The output of a quantized unit; without weights and activations, that of the floating-point unit."""

    def handle(path: str, value: Any) -> Any:
        return activations[path].fake_quant(value) if path in activations else value

    with intercept_sites(handle):
        return operation(with_decoded(params, weights), *args)


# The inputs and the output of modules, by path; the decoder itself has several outputs.
Captured = dict[str, tuple[tuple[jax.Array, ...], Any]]


@partial(jax.jit, static_argnames=("sam", "names"))
@in_float32
def capture_decoder(
    sam: Any,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    embedding: Any,
    boxes: Float[Array | np.ndarray, "p 4"],
    *,
    names: tuple[str, ...],
) -> Captured:
    """Runs prompts through the decoder and keeps the inputs and outputs of the modules `names`.

    Args:
        params: the prompt encoder's and the mask decoder's, without the kernels in `weights`.
        embedding: one image's, (1, g, g, C) if the encoder has one output.
        boxes: the prompts in canvas pixels.

    Returns:
        The inputs (each (P, T, C)) and the output of each of the modules.
    """
    captured: Captured = {}

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if isinstance(context.module, Site):
            return activations[path].fake_quant(args[0]) if path in activations else args[0]
        output = next_fun(*args, **kwargs)
        if path in names and context.method_name == "__call__":
            captured[path] = (args, output)
        return output

    with nn.intercept_methods(interceptor):
        call(sam, with_decoded(params, weights), embedding, None, boxes, method="decode")
    return captured


def gather(rows: Iterable[Sequence[Any]], count: int, budget: int, directory: Path | None) -> Args:
    """Stacks `count` rows of arrays, in memory or, above `budget` bytes, on disk.

    The files have no name, so that they go away with the arrays however the process ends.

    Args:
        rows: each the same number of arrays, of the same shapes in every row.
        directory: where the files are; None is the system's place for temporary files.

    Returns:
        For each array of a row, (count, ...) float32.
    """
    stacked: list[np.ndarray] = []
    for index, row in enumerate(rows):
        row = [np.asarray(a, np.float32) for a in row]
        if not stacked:
            make = np.empty if count * sum(a.nbytes for a in row) <= budget else partial(_on_disk, directory)
            stacked = [make((count, *a.shape), np.float32) for a in row]
        for array, value in zip(stacked, row, strict=True):
            array[index] = value
    return tuple(stacked)


def _on_disk(directory: Path | None, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                # A file with holes would end the process without a word when the disk is full.
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            raise OSError(
                f"{directory or tempfile.gettempdir()} has no room for {size:,} bytes of a unit's inputs "
                f"({error.strerror}); free some there, or raise memory_budget."
            ) from error
        return np.memmap(file, dtype, "w+", shape=shape)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The inputs and the wanted output of a unit, one row per calibration image.

    Attributes:
        quantized: its inputs in the quantized model, each (N, b, ...); b counts the prompts in the decoder, else 1.
        original: the same in the floating-point model.
        target: its output there, (N, b, ...).
        context: further arrays that the objective looks at, each (N, b, ...).
    """

    quantized: Args
    original: Args
    target: np.ndarray
    context: Args = ()

    def __len__(self) -> int:
        return len(self.target)

    @property
    def arrays(self) -> tuple[Args, Args, np.ndarray, Args]:
        return self.quantized, self.original, self.target, self.context

    @property
    def on_disk(self) -> bool:
        return any(isinstance(a, np.memmap) for a in jax.tree.leaves(self.arrays))


class Feeder:
    """Chunks of a data set as the compiled step takes them: a store of rows, and the place of each wanted row in it.

    A data set in memory is handed over once. From one on disk, each chunk's rows are read anew, and chunks are made so
    short that their rows fit in memory. Every device is handed the rows of its own slots.

    Attributes:
        chunk: iterations in one chunk.
    """

    def __init__(self, data: Dataset, chunk: int, deal: Deal, budget: int):
        """`chunk` is the most that a chunk may have, `budget` in bytes for this process."""
        self._data, self._deal = data, deal
        row = sum(a[0].nbytes for a in jax.tree.leaves(data.arrays))
        rows = deal.slots * len(deal.places)
        self.chunk = max(1, min(chunk, budget // (row * rows))) if data.on_disk else chunk
        # By device, by slot: the rows of this process's data that the slot draws from.
        number = {image: row for row, image in enumerate(deal.own)}
        self._rows = [[np.array([number[i] for i in slot]) for slot in deal.of_device(p)] for p in deal.places]
        # Equally many for every device, whatever it has.
        have = max(sum(map(len, deal.of_device(place))) for place in range(deal.batch // deal.slots))
        self._limit = min(have, self.chunk * deal.slots) if data.on_disk else have
        self._all = [np.concatenate(slots) for slots in self._rows]
        self._whole = None if data.on_disk else self._handed(self._all)

    def __call__(self, drawn: Int[np.ndarray, "chunk batch"]) -> tuple[Any, Int[Array, "..."]]:
        """The rows (M, b, ...) of all devices, and the place of each wanted row among those of its device.

        Args:
            drawn: which of its images each slot of the batch takes.

        Returns:
            The arrays, and the places: (chunk,) of one device with one slot, else (devices, chunk, slots).
        """
        taken = []
        for place, slots in zip(self._deal.places, self._rows, strict=True):
            first = place * self._deal.slots
            of_slots = [rows[drawn[:, first + slot]] for slot, rows in enumerate(slots)]
            taken.append(np.stack(of_slots, axis=1))  # (chunk, slots) rows of the data
        wanted, store = self._all, self._whole
        if store is None:
            wanted = [np.unique(rows) for rows in taken]
            store = self._handed(wanted)
        places = [_places(rows, of_device) for rows, of_device in zip(taken, wanted, strict=True)]
        if self._deal.batch == 1:
            return store, jnp.asarray(places[0][:, 0], jnp.int32)
        if self._deal.mesh is None:
            return store, jnp.asarray(np.stack(places), jnp.int32)
        return store, devices.shared_out([p[None].astype(np.int32) for p in places], self._deal.mesh)

    def _handed(self, wanted: Sequence[Int[np.ndarray, "rows"]]) -> Any:
        """The arrays of the wanted rows of each device, as the devices hold them."""
        # Always as many rows, so that every chunk has the same shape.
        filled = [np.resize(rows, self._limit) for rows in wanted]
        if self._deal.mesh is None:
            (rows,) = filled
            if len(rows) == len(self._data) and (rows == np.arange(len(rows))).all():
                return jax.tree.map(jnp.asarray, self._data.arrays)  # without a copy in between
            return jax.tree.map(lambda a: jnp.asarray(a[rows]), self._data.arrays)
        parts = [jax.tree.map(lambda a, rows=rows: a[rows], self._data.arrays) for rows in filled]
        return devices.shared_out(parts, self._deal.mesh)


def _places(rows: Int[np.ndarray, "*shape"], among: Int[np.ndarray, "n"]) -> Int[np.ndarray, "*shape"]:
    """The first place of each row among those that a device has."""
    order = np.argsort(among, kind="stable")
    return order[np.searchsorted(among, rows, sorter=order)]


def reconstruction_error(unit: Unit, output: Float[np.ndarray, "*shape"], target: Float[np.ndarray, "*shape"]) -> float:
    """The error that reports show, whatever the objective is: `mean(sum_over_loss_axis((output - target)^2))`.

    Source: official `lp_loss`.
    """
    return float(np.square(output - target).sum(unit.loss_axis).mean())
