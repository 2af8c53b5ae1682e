"""Time and energy of counted layers on an accelerator, for one set of constants or many at once.

Layers of one kernel stream into each other, so a kernel takes as long as the busiest of four resources: the array,
the floating-point array beside it (for what a quantized model leaves in floating point), the vector unit, and DRAM.
Buffers are double: loading and computing overlap. The board's area is divided between the three units so that the
model runs fastest, as a designer would; every precision is given the same freedom.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from hwcost.board.accelerator import Accelerator, Design, cores, element_count, element_options, passes
from hwcost.board.constants import Values
from hwcost.board.cycles import systolic_cycles, tiled_bytes
from hwcost.board.energy import buffer_bits, column_split, operations_pj
from hwcost.counts.costs import Layer
from hwcost.counts.counts import Counts

RESOURCES = ("array", "float array", "vector", "DRAM")
VECTOR_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
FLOAT_SHARES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelEstimate:
    """Layers that stream together.

    Attributes:
        name: path of the layer that gives it its name.
        part: "encoder" or "decoder".
        macs: multiply-accumulates, whatever form they take.
        seconds: (4, S) of each resource of `RESOURCES`.
        dram_bytes: (S,) moved.
    """

    name: str
    part: str
    macs: int
    seconds: np.ndarray
    dram_bytes: np.ndarray

    @property
    def bound(self) -> str:
        """The resource that decides, at the first set of constants."""
        return RESOURCES[int(np.argmax(self.seconds[:, 0]))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One model on one design; arrays have one entry for each of S sets of constants.

    Attributes:
        seconds: (S,) for one image with its prompts.
        joules: {"compute", "buffers", "DRAM", "static"}: (S,) each.
        elements: (S,) processing elements in the array.
        float_elements: (S,) in the floating-point array beside it; 0 where there is none.
        lanes: (S,) of the vector unit.
        kernels: the kernels in forward order.
    """

    seconds: np.ndarray
    joules: dict[str, np.ndarray]
    elements: np.ndarray
    float_elements: np.ndarray
    lanes: np.ndarray
    kernels: tuple[KernelEstimate, ...]

    @property
    def total_joules(self) -> np.ndarray:
        """(S,)."""
        return sum(self.joules.values(), np.zeros_like(self.seconds))


@dataclasses.dataclass(frozen=True)
class _Units:
    """What was built: arrays of (S, G), G ways of dividing the board."""

    array: "_Array"
    beside: "_Array | None"  # the floating-point array of a quantized design
    lanes: Any
    lane_seconds: Any


@dataclasses.dataclass(frozen=True)
class _Array:
    rows: Any
    columns: Any
    cores: Any
    seconds_per_cycle: Any

    @property
    def elements(self) -> Any:
        return self.rows * self.columns * self.cores


@dataclasses.dataclass(frozen=True)
class _Board:
    """What all kernels of an estimate share; `shape` is (S, G)."""

    design: Design
    accelerator: Accelerator
    units: _Units
    values: Values
    shape: tuple[int, ...]
    products_only: bool


@dataclasses.dataclass(frozen=True)
class _KernelWork:
    """One kernel: seconds (4, S, G) of each resource, DRAM bytes (S, G) moved, joules (S, G) by kind."""

    seconds: np.ndarray
    dram_bytes: np.ndarray
    joules: dict[str, np.ndarray]


def estimate(
    counts: Counts,
    design: Design,
    accelerator: Accelerator,
    values: Values,
    *,
    products_only: bool = False,
) -> Estimate:
    """Runs the model.

    Args:
        counts: of the model at the design's precision.
        design: what is built.
        accelerator: where.
        values: the constants, numbers or arrays (S,).
        products_only: leaves out softmax, norms and everything else that is no matrix product, as papers that speak
            of the matrix unit do.

    Returns:
        Time and energy of one image.
    """
    size = max(np.size(value) for value in values.values())
    v = {name: np.broadcast_to(np.asarray(x, float), (size,))[:, None] for name, x in values.items()}
    units = _build(design, accelerator, v)
    shape = np.broadcast_shapes((size, 1), np.shape(units.lanes))
    board = _Board(design, accelerator, units, v, shape, products_only)
    # Kernels of one kind are one object, worked out once.
    works: dict[int, _KernelWork] = {}
    seconds = np.zeros(shape)
    energy = {name: np.zeros(shape) for name in ("compute", "buffers", "DRAM")}
    for _, _, layers in counts.kernels:
        if id(layers) not in works:
            works[id(layers)] = _kernel(layers, board)
        work = works[id(layers)]
        seconds += work.seconds.max(0)
        for kind in energy:
            energy[kind] += work.joules[kind]
    return _at_the_best_division(counts, board, works, seconds, energy)


def _at_the_best_division(
    counts: Counts,
    board: _Board,
    works: dict[int, _KernelWork],
    seconds: np.ndarray,
    energy: dict[str, np.ndarray],
) -> Estimate:
    """The estimate with the board divided, for each set of constants, so that the image takes least time."""
    best, units = np.argmin(seconds, axis=1), board.units

    def pick(array: Any) -> np.ndarray:
        full = np.broadcast_to(array, (*np.shape(array)[:-2], *board.shape))
        return np.take_along_axis(full, best.reshape((1,) * (full.ndim - 2) + (-1, 1)), -1)[..., 0]

    total = pick(seconds)
    static = board.values["static_watts_per_klut"][:, 0] * board.accelerator.luts / 1e3 * total
    picked = {key: (pick(work.seconds), pick(work.dram_bytes)) for key, work in works.items()}
    return Estimate(
        seconds=total,
        joules={**{kind: pick(array) for kind, array in energy.items()}, "static": static},
        elements=pick(units.array.elements),
        float_elements=pick(units.beside.elements if units.beside else 0.0 * units.lanes),
        lanes=pick(units.lanes),
        kernels=tuple(
            KernelEstimate(
                name=name,
                part=part,
                macs=sum(layer.ops.macs for layer in layers),
                seconds=picked[id(layers)][0],
                dram_bytes=picked[id(layers)][1],
            )
            for name, part, layers in counts.kernels
        ),
    )


def _build(design: Design, accelerator: Accelerator, v: Values) -> _Units:
    """Divides the board between array, floating-point array and vector unit in every way of the grid."""
    is_float = design.element == "float"
    grid = list(itertools.product(VECTOR_SHARES, (0.0,) if is_float else FLOAT_SHARES))
    vector, beside = (np.array(shares)[None, :] for shares in zip(*grid, strict=True))
    luts, dsps = v["usable_lut"] * accelerator.luts, v["usable_dsp"] * accelerator.dsps
    lane_luts = v["vector_lane_lut"] * (2 if design.float_bits == 32 else 1)
    lanes = np.maximum(np.floor(vector * luts / lane_luts), 1)
    elements: Any = design.elements
    if elements is None:
        options = element_options(design, v, accelerator.side)
        elements = element_count(options, luts * (1 - vector - beside), dsps * (1 - beside))
    clock = v["clock_mhz"] * 1e6
    fp16 = np.minimum(clock, v["fp16_fmax_mhz"] * 1e6)
    speed = clock
    if is_float:
        speed = fp16 if design.bits == 16 else np.minimum(clock, v["fp32_fmax_mhz"] * 1e6)
    array = _Array(*cores(elements, accelerator.side), 1 / speed)
    if is_float:
        return _Units(array, None, lanes, 1 / clock / lanes)
    fp16_options = element_options(Design(element="float", bits=16, float_bits=16), v)
    small = element_count(fp16_options, luts * beside, dsps * beside)
    return _Units(array, _Array(*cores(small, accelerator.side), 1 / fp16), lanes, 1 / clock / lanes)


def _kernel(layers: tuple[Layer, ...], board: _Board) -> _KernelWork:
    """What layers that stream together take."""
    design, accelerator, units, v = board.design, board.accelerator, board.units, board.values
    buffer = v["usable_bram"] * accelerator.buffer_bits / 8
    bandwidth = v["dram_efficiency"] * accelerator.dram_gbps * 1e9
    times = np.zeros((len(RESOURCES), *board.shape))
    moved, bits, operations = (np.zeros(board.shape) for _ in range(3))
    for layer in layers:
        if board.products_only and layer.gemm is None:
            continue
        on_float = layer.is_float and units.beside is not None
        array = units.beside if on_float and units.beside is not None else units.array
        if layer.gemm is not None:
            cycles = passes(layer, design) * systolic_cycles(
                layer.gemm, array.rows, array.columns, accelerator.dataflow,
                groups=column_split(layer, design), cores=array.cores, overlap=accelerator.overlap,
            )  # fmt: skip
            times[int(on_float)] += cycles * array.seconds_per_cycle
        if not board.products_only:
            times[2] += vector_cycles(layer, v) * units.lane_seconds
        moved += layer_dram_bytes(layer, buffer)
        bits += buffer_bits(layer, design, array.rows, array.columns, accelerator.dataflow)
        operations += operations_pj(layer, design, v)
    times[3] += moved / bandwidth
    node = v["node_45_to_16"] * 1e-12
    joules = {
        "compute": operations * v["fpga_logic_per_asic"] * node,
        "buffers": (bits + 16 * moved) * v["sram_pj_per_bit"] * v["fpga_sram_per_asic"] * node,
        "DRAM": moved * 8 * v[f"{accelerator.dram}_pj_per_bit"] * 1e-12,
    }
    return _KernelWork(times, moved, joules)


def vector_cycles(layer: Layer, v: Values) -> Any:
    """Lane cycles; a rescale and a code each take one, and corrections ride on the rescales as their addend."""
    ops = layer.ops
    return ops.elementwise + v["transcendental_multiplies"] * ops.transcendentals + ops.encodes + ops.rescales


def layer_dram_bytes(layer: Layer, buffer: Any) -> Any:
    """Bytes across the DRAM interface, with the operands of a product passing as often as tiling needs."""
    written = sum(t.bytes for t in layer.outputs if not t.on_chip) + layer.qparam_bytes
    if layer.gemm is None:
        return layer.weight_bytes + written + sum(t.bytes for t in layer.inputs if not t.on_chip)
    repeat = layer.gemm.repeat
    left, right = layer.inputs[0], layer.inputs[1] if layer.dynamic_b else None
    right_bytes = right.bytes if right is not None else layer.weight_bytes
    if not layer.dynamic_b:
        # One set of weights serves all repeats.
        return written + tiled_bytes(
            left.bytes, right_bytes, buffer, left_on_chip=left.on_chip, right_on_chip=False
        )  # fmt: skip
    each = tiled_bytes(
        left.bytes / repeat,
        right_bytes / repeat,
        buffer,
        left_on_chip=left.on_chip,
        right_on_chip=right is not None and right.on_chip,
    )
    return written + repeat * each
