"""What the quantizers share: checks, ranges, exact power-of-two arithmetic and gradient helpers.

Powers of two are built and rounded through the bits of the float, not through ``exp2`` and ``log2``. Both are
faster on a CPU and, unlike a polynomial ``log2``, exact at the grid points, so that a decoded value encodes to its
own code and an integer implementation by shifts gives the same numbers.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.config import MAX_BITS, MIN_BITS

MIN_SCALE = 1e-8

_MANTISSA_MASK = 0x007FFFFF
_EXPONENT_OF_ONE = 0x3F800000
# A value below the smallest normal float has no usable exponent: it rounds to this, beyond every level.
_BEYOND_EVERY_LEVEL = 1024
_SQRT_HALF_OCTAVE = np.float32(2.0**0.5)
# Row log2(tau): mantissas in [1, 2) above which tau * log2(mantissa) rounds to 1, 2, 3, 4; 4.0 is never reached.
_OCTAVE_THRESHOLDS = np.array(
    [[2.0 ** ((2 * i - 1) / (2 * tau)) if i <= tau else 4.0 for i in range(1, 5)] for tau in (1, 2, 4)],
    np.float32,
)
_QUARTER_OCTAVES = tuple(np.float32(2.0 ** (-i / 4)) for i in range(4))


@runtime_checkable
class Quantizer(Protocol):
    """What a quantizer is: a frozen pytree dataclass of array leaves and a static width.

    `validate` returns the quantizer itself, or raises ValueError if a (concrete) parameter is not sound; `channels` is
    the size of the last axis of the tensors to come, if known. `fake_quant` is ``decode(encode(x))`` in the dtype of
    ``x`` with straight-through gradients, and `with_gradient_scale` the same quantizer with the gradient factors that
    its learned fields have for inputs of a shape.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def bits(self) -> int: ...

    def encode(self, x: jax.Array) -> jax.Array: ...

    def decode(self, codes: jax.Array) -> jax.Array: ...

    def fake_quant(self, x: jax.Array) -> jax.Array: ...

    def validate(self, channels: int | None = None) -> Quantizer: ...

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> Quantizer: ...


def check_bits(bits: int) -> None:
    """Raises ValueError unless ``bits`` is an integer from 2 to 8."""
    is_integer = isinstance(bits, (int, np.integer)) and not isinstance(bits, bool)
    if not is_integer or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}; choose such a width")


def check_positive(name: str, values: Any) -> None:
    """Raises ValueError unless every (concrete) value is finite and above zero."""
    values = np.asarray(values)
    if not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise ValueError(f"{name} must be finite and positive; calibrate again on data that is finite and not empty")


def check_finite(name: str, values: Any) -> None:
    """Raises ValueError unless every (concrete) value is finite."""
    if not np.all(np.isfinite(np.asarray(values))):
        raise ValueError(f"{name} must be finite; calibrate again on data without NaN or infinity")


def check_codes_range(name: str, values: Any, highest: int) -> None:
    """Raises ValueError unless every (concrete) value is an integer in ``0..highest``."""
    values = np.asarray(values)
    if np.any(values != np.round(values)) or np.any(values < 0) or np.any(values > highest):
        raise ValueError(f"{name} must hold integers from 0 to {highest}; take them from qparams_from_range")


def check_broadcast(name: str, shape: tuple[int, ...], x_shape: tuple[Any, ...]) -> None:
    """Raises ValueError unless ``shape`` broadcasts into ``x_shape`` without enlarging it."""
    # Not np.broadcast_shapes: a size of x may be a symbol when the graph is exported.
    trailing = tuple(x_shape)[len(x_shape) - len(shape) :]
    fits = len(shape) <= len(x_shape) and all(n == 1 or n == m for n, m in zip(shape, trailing, strict=True))
    # A (1,) parameter, the layout of the official scalars, fits anything.
    if not fits and int(np.prod(shape)) != 1:
        raise ValueError(
            f"{name} of shape {tuple(shape)} does not fit an input of shape {tuple(x_shape)}; it must be a scalar "
            "or have one entry for each channel of the last axis"
        )


@functools.partial(jax.jit, static_argnames="bits")
def qparams_from_range(low: Any, high: Any, bits: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the asymmetric uniform quantizer that covers ``[low, high]`` and zero.

    Args:
        low: smallest value, a scalar or one per channel.
        high: largest value, of the same shape.
        bits: code width, 2 to 8.

    Returns:
        float32 scale and float32 zero point (an integer value in ``0..2^bits-1``), of the shape of ``low``.

    Source: official ``ObserverBase.calculate_qparams``.
    """
    check_bits(bits)
    highest = 2**bits - 1
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    scale = jnp.maximum((high - low) / highest, MIN_SCALE)
    zero_point = jnp.clip(-jnp.round(low / scale), 0.0, highest)
    return scale, zero_point


def round_to_octave(ratio: jax.Array) -> jax.Array:
    """``round(-log2(ratio))`` as int32, exact; a ratio of zero (or a subnormal one) gives a number above 255.

    Args:
        ratio: float32, not negative, any shape.
    """
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) - 127
    mantissa = jax.lax.bitcast_convert_type((bits & _MANTISSA_MASK) | _EXPONENT_OF_ONE, jnp.float32)
    rounded = -(exponent + (mantissa > _SQRT_HALF_OCTAVE).astype(jnp.int32))
    return jnp.where(exponent == -127, _BEYOND_EVERY_LEVEL, rounded)


def round_to_octave_fraction(ratio: jax.Array, tau: jax.Array) -> jax.Array:
    """``round(-tau * log2(ratio))`` as int32 for tau 1, 2 or 4; zero and subnormals give a number above 255.

    Args:
        ratio: float32, not negative, any shape.
        tau: scalar; may be traced.
    """
    tau = jnp.asarray(tau).astype(jnp.int32)
    thresholds = jnp.asarray(_OCTAVE_THRESHOLDS)[tau >> 1]
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) - 127
    mantissa = jax.lax.bitcast_convert_type((bits & _MANTISSA_MASK) | _EXPONENT_OF_ONE, jnp.float32)
    above = jnp.zeros_like(exponent)
    for i in range(4):
        above += (mantissa > thresholds[i]).astype(jnp.int32)
    return jnp.where(exponent == -127, _BEYOND_EVERY_LEVEL, -(exponent * tau + above))


def negative_power_of_two(k: jax.Array) -> jax.Array:
    """``2^-k`` as an exact float32 for int32 ``k >= 0``; below the smallest normal float it is zero."""
    return jax.lax.bitcast_convert_type(jnp.maximum(127 - k, 0) << 23, jnp.float32)


def positive_power_of_two(k: jax.Array) -> jax.Array:
    """``2^k`` as an exact float32 for int32 ``k`` from 0 to 127."""
    return jax.lax.bitcast_convert_type((k + 127) << 23, jnp.float32)


def negative_power_of_root(k: jax.Array, tau: jax.Array) -> jax.Array:
    """``2^(-k/tau)`` for int32 ``k >= 0`` and tau 1, 2 or 4 (scalar; may be traced)."""
    quarters = k * (4 // jnp.asarray(tau).astype(jnp.int32))
    whole, rest = quarters >> 2, quarters & 3
    low = jnp.where((rest & 1) == 1, _QUARTER_OCTAVES[1], _QUARTER_OCTAVES[0])
    high = jnp.where((rest & 1) == 1, _QUARTER_OCTAVES[3], _QUARTER_OCTAVES[2])
    return negative_power_of_two(whole) * jnp.where(rest >= 2, high, low)


def sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums ``x`` over the axes along which an array of ``shape`` had been broadcast to it."""
    if int(np.prod(shape)) == 1:
        return jnp.sum(x).reshape(shape)
    x = jnp.sum(x, axis=tuple(range(x.ndim - len(shape))))
    kept = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return jnp.sum(x, axis=kept, keepdims=True)


@jax.custom_jvp
def scale_gradient(value: jax.Array, factor: jax.Array | float) -> jax.Array:
    """``value`` itself, whose gradient is multiplied by ``factor`` (LSQ, arXiv 1902.08153)."""
    del factor
    return value


@scale_gradient.defjvp
def _scale_gradient_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    value, factor = primals
    return value, tangents[0] * factor


@jax.custom_jvp
def straight_through(value: jax.Array, instead: jax.Array) -> jax.Array:
    """`instead`, with the gradient as if it were `value`."""
    del value
    return instead


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def lsq_factor(numel: int, channels: int, bits: int) -> float:
    """LSQ's gradient factor ``1/sqrt(values per scale * highest code)``.

    Args:
        numel: values in the activation tensor.
        channels: 1 for a per-tensor scale, the channel count for per-channel and grouped scales. (The official code
            divides by the channel count for a group too, although a group's scale serves many channels.)
        bits: code width.
    """
    return float((numel / channels * (2**bits - 1)) ** -0.5)
