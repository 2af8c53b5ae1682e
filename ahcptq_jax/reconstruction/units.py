"""The units that reconstruction works on, one after the other, and what flows into and out of them.

A unit is an attention part or an MLP part of an encoder block (norm and residual included) or, by choice, the block
whole; the neck; or an attention or the MLP of a decoder layer. It is run as a function of its own parameters, so units
of one shape are the same function and share a compilation.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight, with_decoded
from sam_flax.heads.mask_decoder import Attention
from sam_flax.layers import MLPBlock, Site, in_float32
from sam_flax.sam import Params, Sam, call, encoder_stages

V = TypeVar("V")
Args = tuple[np.ndarray, ...]

# What can be reconstructed, in forward order.
PARTS = ("encoder_attention", "encoder_mlp", "encoder_block", "neck", "decoder_attention", "decoder_mlp")
# Whether attention and MLP of an encoder block are units of their own, as in the paper, or one.
GRANULARITIES = ("part", "block")

_TRANSFORMER = "mask_decoder/transformer"


@dataclasses.dataclass(frozen=True)
class Operation:
    """A module's method as a function of parameters and inputs. Hashable: a static argument of `jax.jit`."""

    module: nn.Module
    method: str | None = None

    def __call__(self, params: Params, *args: Any) -> Any:
        return call(self.module, params, *args, method=self.method)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One step of the reconstruction.

    Attributes:
        name: unique, e.g. "image_encoder/blocks_0/mlp".
        prefix: what its parameters' and sites' paths start with, "image_encoder/blocks_0/".
        members: the children of the prefix that belong to it; none means all.
        operation: what it computes.
        part: one of `PARTS`.
        loss_axis: axis over which squared errors are summed before they are averaged: rows of the grid, tokens, and
            channels in the neck, as in the official code (`lp_loss`), where they come second. Its windowed attention,
            though, is a unit inside the windows: it sums over a window's rows, so that its error weighs less against
            the regularizer, by window / grid, than ours.
    """

    name: str
    prefix: str
    members: tuple[str, ...]
    operation: Operation
    part: str
    loss_axis: int = 1

    def own(self, entries: Mapping[str, V]) -> dict[str, V]:
        """The entries that belong to this unit, by paths relative to it."""
        inside = below(self.prefix, entries)
        return {path: v for path, v in inside.items() if not self.members or path.split("/")[0] in self.members}


def encoder_units(sam: Sam, granularity: str = "part") -> list[Unit]:
    """The image encoder's units in forward order; `granularity` is one of `GRANULARITIES`."""
    units = []
    for key, module in encoder_stages(sam.config):
        prefix = f"image_encoder/{key}/"
        if key == "neck":
            units.append(Unit(prefix.rstrip("/"), prefix, (), Operation(module), "neck", loss_axis=-1))
            continue
        if granularity == "block":
            units.append(Unit(prefix.rstrip("/"), prefix, (), Operation(module), "encoder_block"))
            continue
        attention = Operation(module, "attention_part")
        # The MLP does not know of windows: the MLPs of all blocks are one function.
        mlp = Operation(module.clone(window=0), "mlp_part")
        units.append(Unit(prefix + "attn", prefix, ("norm1", "attn"), attention, "encoder_attention"))
        units.append(Unit(prefix + "mlp", prefix, ("norm2", "mlp"), mlp, "encoder_mlp"))
    return units


def decoder_units(sam: Sam) -> list[Unit]:
    """The mask decoder's units in forward order."""
    config = sam.config
    dim, heads = config.out_chans, config.decoder_num_heads
    own = Operation(Attention(dim, heads, parent=None))
    cross = Operation(Attention(dim, heads, downsample_rate=2, parent=None))
    mlp = Operation(MLPBlock(dim, config.decoder_mlp_dim, nn.relu, parent=None))
    units = []
    for i in range(config.decoder_depth):
        for child, operation, part in (
            ("self_attn", own, "decoder_attention"),
            ("cross_attn_token_to_image", cross, "decoder_attention"),
            ("mlp", mlp, "decoder_mlp"),
            ("cross_attn_image_to_token", cross, "decoder_attention"),
        ):
            name = f"{_TRANSFORMER}/layers_{i}/{child}"
            units.append(Unit(name, name + "/", (), operation, part))
    name = f"{_TRANSFORMER}/final_attn_token_to_image"
    return [*units, Unit(name, name + "/", (), cross, "decoder_attention")]


@partial(jax.jit, static_argnums=0)
@in_float32
def run_unit(
    operation: Operation,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    args: tuple[jax.Array, ...],
) -> jax.Array:
    """A unit's output; without weights and activations, that of the floating-point unit."""

    def handle(path: str, value: Any) -> Any:
        return activations[path].fake_quant(value) if path in activations else value

    with intercept_sites(handle):
        return operation(with_decoded(params, weights), *args)


Captured = dict[str, tuple[tuple[jax.Array, ...], jax.Array]]


@partial(jax.jit, static_argnames=("sam", "names"))
@in_float32
def capture_decoder(
    sam: Sam,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    embedding: jax.Array,
    boxes: jax.Array,
    *,
    names: tuple[str, ...],
) -> Captured:
    """Runs prompts through the decoder and keeps what passes the modules `names`.

    Args:
        params: of the prompt encoder and the mask decoder, less the kernels in `weights`.
        embedding: (1, g, g, C).
        boxes: (P, 4) in canvas pixels.

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

    The files have no name: they go away with the arrays, however the process ends.

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
    """What a unit sees and should give, one row per calibration image.

    Attributes:
        quantized: its inputs in the quantized model, each (N, b, ...); b counts the prompts in the decoder, else 1.
        original: the same in the floating-point model.
        target: its output there, (N, b, ...).
    """

    quantized: Args
    original: Args
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    @property
    def arrays(self) -> tuple[Args, Args, np.ndarray]:
        return self.quantized, self.original, self.target

    @property
    def on_disk(self) -> bool:
        return any(isinstance(a, np.memmap) for a in jax.tree.leaves(self.arrays))


class Feeder:
    """Chunks of a data set as the compiled step takes them: a store of rows, and the place of each wanted row in it.

    A data set in memory is handed over once. From one on disk, each chunk's rows are read anew, and chunks are made so
    short that their rows fit in memory.

    Attributes:
        chunk: iterations in one chunk.
    """

    def __init__(self, data: Dataset, chunk: int, batch: int, budget: int):
        """`chunk` is the most that a chunk may have, `batch` the rows of an iteration, `budget` in bytes."""
        self._data = data
        self._whole = None if data.on_disk else jax.tree.map(jnp.asarray, data.arrays)
        row = sum(a[0].nbytes for a in jax.tree.leaves(data.arrays))
        self.chunk = max(1, min(chunk, budget // (row * batch))) if data.on_disk else chunk
        self._limit = min(len(data), self.chunk * batch)

    def __call__(self, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        """Rows wanted, int (chunk, batch) -> (arrays (M, b, ...), places of the same shape)."""
        if self._whole is not None:
            return self._whole, rows
        wanted, places = np.unique(rows, return_inverse=True)
        # Always as many rows, so that every chunk has the same shape.
        wanted = np.resize(wanted, self._limit)
        return jax.tree.map(lambda a: jnp.asarray(a[wanted]), self._data.arrays), places.reshape(rows.shape)


def align_signs(params: Params, quantized: Quantized) -> Params:
    """Floating-point parameters with the signs that BIG flipped in `quantized`.

    Everything but the kernels is taken from the quantized model, which holds it unquantized; the sign of a kernel's
    output channel is the one that fits its quantized values.

    Raises:
        ValueError: if the parameters are not those that were quantized.
    """
    flat, rest = flatten(params), flatten(quantized.params)
    kernels = {f"{layer}/kernel": weight for layer, weight in quantized.weights.items()}
    if flat.keys() != rest.keys() | kernels.keys():
        odd = sorted(flat.keys() ^ (rest.keys() | kernels.keys()))
        raise ValueError(f"The parameters are not those that were quantized: {odd[0]} is in one of them only.")
    for path, weight in kernels.items():
        kernel = np.asarray(flat[path], np.float32)
        decoded = np.asarray(weight.decode())
        if kernel.shape != decoded.shape:
            raise ValueError(f"The parameters are not those that were quantized: {path} has another shape.")
        axes = tuple(range(kernel.ndim - 1))
        kernel = kernel * np.where((kernel * decoded).sum(axes) < 0, np.float32(-1), np.float32(1))
        if np.square(decoded - kernel).sum() > 0.7 * np.square(kernel).sum() > 0:
            raise ValueError(f"The parameters are not those that were quantized: {path} has other values.")
        rest[path] = kernel
    return unflatten({path: jnp.asarray(rest[path]) for path in flat})


def reconstruction_error(unit: Unit, output: np.ndarray, target: np.ndarray) -> float:
    """``mean(sum_over_loss_axis((output - target)^2))``, official `lp_loss`."""
    return float(np.square(output - target).sum(unit.loss_axis).mean())
