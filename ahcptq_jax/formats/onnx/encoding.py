"""Activations in a graph: from float32 to whole levels of 8 bits, and back.

The value of a level is `offset + step * (level - zero)`. What a kind of quantizer does to get from values to levels is
one function here, in the table `ENCODERS`; a kind that has none cannot be exported. The functions take the operators
that ONNX Runtime is fast at: `QuantizeLinear` for a whole tensor and plain arithmetic. `Gather` from a table costs 5 to
15 ns a value there, `Where` and `QuantizeLinear` by channel more, all of the others together less than 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ahcptq_jax.formats.onnx.graph import INT8, UINT8, Graph
from ahcptq_jax.quantizers.base import Quantizer
from ahcptq_jax.quantizers.kinds import kind_of
from sam_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Coded:
    """A tensor of levels.

    Attributes:
        levels: its name, of type uint8.
        zero: the level of `offset`.
        step: between levels.
        offset: a number, or one for each channel of the last axis.
    """

    levels: str
    zero: int
    step: float
    offset: Any = 0.0

    @property
    def shifted(self) -> bool:
        """Whether there is an offset."""
        return bool(np.any(self.offset))


def is_uniform(quantizer: Any) -> bool:
    """Whether this is a uniform quantizer with one scale for a tensor; None is not."""
    return quantizer is not None and kind_of(quantizer).name == "uniform" and np.size(quantizer.scale) == 1


def encode(graph: Graph, x: str, quantizer: Quantizer, site: str) -> Coded:
    """Levels of the float32 tensor `x` (..., C) at a site.

    Raises:
        InputError: if the quantizer's kind has no form in ONNX.
    """
    name = kind_of(quantizer).name
    if name not in ENCODERS:
        raise InputError(f"Site {site} has a quantizer of kind {name!r}, which has no form in ONNX; use another kind.")
    return ENCODERS[name](graph, x, quantizer, f"{site}/levels")


def decode(graph: Graph, coded: Coded, name: str = "") -> str:
    """float32 values of levels."""
    zero = graph.constant(coded.zero, np.uint8)
    y = graph.node("DequantizeLinear", coded.levels, graph.constant(coded.step), zero, name=name)
    return graph.node("Add", y, graph.constant(coded.offset)) if coded.shifted else y


def quantize_dequantize(graph: Graph, x: str, quantizer: Any, site: str) -> str:
    """Values of `x` rounded by a uniform quantizer of 4 or 8 bits, as `QuantizeLinear` and `DequantizeLinear` alone."""
    zero = round(float(np.asarray(quantizer.zero_point).reshape(())))
    scale = graph.constant(float(np.asarray(quantizer.scale).reshape(())))
    zero_point = (
        graph.four_bits(np.array(zero), f"{site}/zero") if quantizer.bits == 4 else graph.constant(zero, np.uint8)
    )
    codes = graph.node("QuantizeLinear", x, scale, zero_point, name=f"{site}/levels")
    return graph.node("DequantizeLinear", codes, scale, zero_point)


def check_plain(activations: Mapping[str, Quantizer], weight_bits: set[int]) -> None:
    """Raises InputError if `quantize_dequantize` cannot say what a model's quantizers are; names their sites."""
    odd = [s for s, q in activations.items() if not is_uniform(q) or q.bits not in (4, 8)]
    if odd:
        shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise InputError(
            f"QuantizeLinear can say uniform quantizers of 4 and 8 bits alone, but not those of {shown}; quantize with "
            "hluq, cag and agq off and such widths, or export with products='integer'."
        )
    if weight_bits - {4, 8}:
        raise InputError(
            f"DequantizeLinear takes weights of 4 and 8 bits, not {min(weight_bits - {4, 8})}; quantize to such a "
            "width, or export with products='integer'."
        )


def round_to_levels(graph: Graph, x: str, step: float, zero: int, most: int, name: str) -> str:
    """uint8 `min(max(round(x / step) + zero, 0), most)`."""
    bounded = most < 255
    inputs = (x, graph.constant(step), graph.constant(zero, np.uint8))
    levels = graph.node("QuantizeLinear", *inputs, name="" if bounded else name)
    return graph.node("Min", levels, graph.constant(most, np.uint8), name=name) if bounded else levels


def right_type(bits: int, vnni: bool) -> int:
    """The type of levels of `bits` bits as the right factor of `MatMulInteger`.

    int8, for which products are fast, up to 7 bits. At 8 it is uint8 unless the processor has VNNI: those with AVX2
    alone add products of uint8 and int8 in pairs of 16 bits, which 8-bit levels would overflow.
    """
    return UINT8 if bits == 8 and not vnni else INT8


def _uniform(graph: Graph, x: str, quantizer: Any, name: str) -> Coded:
    if np.size(quantizer.scale) > 1:
        raise InputError(f"{name}: a quantizer with a scale for every channel has no levels; group its channels.")
    scale, zero = (float(np.asarray(a).reshape(())) for a in (quantizer.scale, quantizer.zero_point))
    levels = round_to_levels(graph, x, scale, int(zero), 2**quantizer.bits - 1, name)
    return Coded(levels, int(zero), scale)


def _grouped(graph: Graph, x: str, quantizer: Any, name: str) -> Coded:
    found = kind_of(quantizer).levels(quantizer)
    step, table = float(np.asarray(found.step).reshape(())), np.asarray(found.table)
    offset, multiple, low, high = np.asarray(found.offset), table[1] - table[0], table[0], table[-1]
    rounded = graph.node("Round", graph.node("Div", x, graph.constant(np.float32(step) * multiple.astype(np.float32))))
    if offset.any():
        # 8 bits: the levels of a channel are as many as there are, and begin where its offset is.
        rounded = graph.node("Sub", rounded, graph.constant(np.round(offset / step)))
        return Coded(round_to_levels(graph, rounded, 1.0, 128, 255, name), 128, step, offset)
    kept = graph.node("Max", rounded, graph.constant(low / multiple))
    kept = graph.node("Min", kept, graph.constant(high / multiple))
    if (multiple != 1).any():
        kept = graph.node("Mul", kept, graph.constant(multiple))
    return Coded(round_to_levels(graph, kept, 1.0, 128, 255, name), 128, step)


def _hybrid(graph: Graph, x: str, quantizer: Any, name: str) -> Coded:
    found = kind_of(quantizer).levels(quantizer)
    step, minimum, table = float(found.step), float(found.offset), np.asarray(found.table)
    count = int(np.argmin(table))  # of logarithmic codes; the next code is zero
    foot, top, multiple = int(table[0]), int(table[-1]), int(table[count + 1] - table[0])
    above = graph.node("Sub", x, graph.constant(minimum))
    # The logarithmic part: the nearest power of two, from 0.75 of a power on the next one, in a space in which that
    # is sqrt(1/2). A number times 2^23 + 1 keeps one bit of the number when the product less itself is taken from it.
    to_powers = 0.75 / math.sqrt(0.5) / (step * foot)
    scaled = graph.node("Mul", above, graph.constant(to_powers))
    far = graph.node("Mul", above, graph.constant(to_powers * (2.0**23 + 1)))
    power = graph.node("Sub", far, graph.node("Sub", far, scaled))
    least = foot * 2.0 ** (1 - count)  # the least level; half of it may not round to a level
    if least > 1:
        power = graph.node("ThresholdedRelu", power, alpha=0.75 * least / foot)
    if multiple == 1:
        # The uniform part is the rounded value.
        logarithmic = round_to_levels(graph, power, 1.0 / foot, 0, foot, "")
        kept = graph.node("ThresholdedRelu", above, alpha=step * foot)
        uniform = round_to_levels(graph, kept, step, 0, top, "")
        return Coded(graph.node("Max", logarithmic, uniform, name=name), 0, step, minimum)
    logarithmic = graph.node("Mul", graph.node("Min", power, graph.constant(1.0)), graph.constant(float(foot)))
    logarithmic = graph.node("Round", logarithmic)
    rest = graph.node("Sub", above, graph.constant(step * foot))
    codes = round_to_levels(graph, rest, step * multiple, 0, (top - foot) // multiple, "")
    uniform = graph.node("DequantizeLinear", codes, graph.constant(float(multiple)), graph.constant(0, np.uint8))
    return Coded(round_to_levels(graph, graph.node("Add", logarithmic, uniform), 1.0, 0, top, name), 0, step, minimum)


def _log2(graph: Graph, x: str, quantizer: Any, name: str) -> Coded:
    return _log2_of_logarithm(graph, graph.node("Log", x), quantizer, name)


def _log_nonlinear(graph: Graph, x: str, quantizer: Any, name: str) -> Coded:
    found = kind_of(quantizer).levels(quantizer)
    table, last = np.asarray(found.table), 2**quantizer.bits - 1
    alpha, scale = (float(np.asarray(a).reshape(())) for a in (quantizer.alpha, quantizer.scale))
    whole, top = math.log1p(alpha * scale), int(table[-1])
    logarithm = graph.node("Log", graph.node("Add", graph.node("Mul", x, graph.constant(alpha)), graph.constant(1.0)))
    codes = round_to_levels(graph, logarithm, whole / last, 0, last, "")
    power = graph.node("DequantizeLinear", codes, graph.constant(whole / last), graph.constant(0, np.uint8))
    above = graph.node("Sub", graph.node("Exp", power), graph.constant(1.0))
    # Half a level rounds up, as in the table.
    step = math.expm1(whole) / top * (1.0 - 1e-6)
    return Coded(round_to_levels(graph, above, step, 0, top, name), 0, float(found.step))


ENCODERS: dict[str, Callable[[Graph, str, Any, str], Coded]] = {
    "uniform": _uniform,
    "grouped": _grouped,
    "hybrid": _hybrid,
    "log2": _log2,
    "log_nonlinear": _log_nonlinear,
}


def softmax_levels(graph: Graph, scores: str, quantizer: Quantizer, site: str) -> Coded:
    """Levels of the softmax of `scores` over the last axis."""
    if kind_of(quantizer).name == "log2":
        # The logarithm of a softmax takes no logarithm of each value.
        return _log2_of_logarithm(graph, graph.node("LogSoftmax", scores, axis=-1), quantizer, f"{site}/levels")
    return encode(graph, graph.node("Softmax", scores, axis=-1), quantizer, site)


def _log2_of_logarithm(graph: Graph, logarithm: str, quantizer: Any, name: str) -> Coded:
    """Levels of `exp(logarithm)`: `logarithm` is rounded to a code, whose power is rounded to a level."""
    found = kind_of(quantizer).levels(quantizer)
    table, tau = np.asarray(found.table), float(np.asarray(quantizer.tau).reshape(()))
    top, count = int(table[0]), 2**quantizer.bits - 1
    scale = float(np.asarray(quantizer.scale).reshape(()))
    octave = math.log(2.0) / tau
    # Codes count down from `count`, which makes 0 of what is beyond every level.
    shift = -math.log(scale) / octave
    whole = round(shift)
    if abs(shift - whole) > 1e-6 or not 0 <= count + whole <= 255:
        logarithm, whole = graph.node("Sub", logarithm, graph.constant(math.log(scale))), 0
    zero = graph.constant(count + whole, np.uint8)
    codes = graph.node("QuantizeLinear", logarithm, graph.constant(octave), zero)
    power = graph.node("DequantizeLinear", codes, graph.constant(octave), graph.constant(count, np.uint8))
    power = graph.node("Exp", power)
    smallest = 2.0 ** (-count / tau)
    if round(top * smallest) > 0:
        power = graph.node("ThresholdedRelu", power, alpha=smallest * 2.0 ** (0.5 / tau))
    # Half a level rounds up, as in the table, whichever way the power was rounded.
    step = (1.0 - 1e-6) / top
    assert _table(top, tau, count, step) == table.tolist(), "the levels of a softmax"
    return Coded(round_to_levels(graph, power, step, 0, top, name), 0, float(found.step))


def _table(top: int, tau: float, count: int, step: float) -> list[int]:
    powers = [2.0 ** (-k / tau) / step for k in range(count)]
    return [round(power) for power in powers] + [0]
