"""HLUQ, the hybrid log-uniform quantizer for inputs of an MLP's second linear (paper, section on HLUQ)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import base


def hybrid_log_levels(grid_rate: Any, bits: int) -> jax.Array:
    """Number of logarithmic codes, ``2^bits * grid_rate`` kept within ``1..2^bits-2``, as float32.

    At 2 bits a grid rate of 1/8 would give half a code; it becomes one, the same as 1/4. Two codes at least are left
    to the uniform part: its first coincides with the first log code, the second is its only value of its own.
    """
    return jnp.clip(jnp.round(jnp.asarray(grid_rate, jnp.float32) * 2**bits), 1.0, 2**bits - 2)


def hybrid_scales(
    value_range: Any, range_rate: Any, grid_rate: Any, bits: int, reach_maximum: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(scale_log, scale_uniform, log_levels)`` of a breakpoint candidate.

    Args:
        value_range: observed maximum minus minimum, scalar.
        range_rate: share of the range that is logarithmic; scalar or array of candidates.
        grid_rate: share of the codes that is logarithmic, same shape.
        bits: code width.
        reach_maximum: the paper's uniform step ``(1-r)R / ((2^bits-1)(1-r_g))`` leaves the top of the range out of
            reach, since the uniform part has ``2^bits(1-r_g)`` codes counted from 0; True takes the step whose last
            code is the maximum.

    Source: official ``HybridParamObserver.solve_range_loss``.
    """
    levels = 2**bits
    log_levels = hybrid_log_levels(grid_rate, bits)
    value_range = jnp.asarray(value_range, jnp.float32)
    range_rate = jnp.asarray(range_rate, jnp.float32)
    if reach_maximum:
        steps = levels - log_levels - 1.0
    else:
        # Equal to (2^bits - 1) * (1 - grid_rate), with the grid rate that the whole number of codes amounts to.
        steps = (levels - 1.0) * (1.0 - log_levels / levels)
    return value_range * range_rate, value_range * (1.0 - range_rate) / steps, log_levels


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def hybrid_fake_quant(
    x: jax.Array,
    minimum: jax.Array,
    scale_log: jax.Array,
    scale_uniform: jax.Array,
    log_levels: jax.Array,
    levels: int,
) -> jax.Array:
    """Hybrid log-uniform quantization with straight-through gradients.

    With ``u = x - minimum``: where ``u <= scale_log`` the value is ``minimum + scale_log * 2^-k``,
    ``k = round(-log2(u/scale_log))``, or ``minimum`` where ``k >= log_levels``; elsewhere it is
    ``minimum + scale_log + n * scale_uniform``, ``n = min(round((u-scale_log)/scale_uniform), uniform levels - 1)``.

    The official code applies the zero rule to the whole tensor and so also collapses large values
    (``u >= log_levels``) of the uniform region to ``scale_log``; here it stays in the log region.

    Gradients: log region ``(value-minimum)/u`` to ``x`` (none in the zero code; none to ``scale_log``, which
    cancels); uniform region 1 to ``x`` and ``n - (u-scale_log)/scale_uniform`` to ``scale_uniform``; where clipped
    1 to ``scale_log`` and ``n`` to ``scale_uniform``.

    Args:
        x: float32, any shape.
        minimum, scale_log, scale_uniform, log_levels: scalars; may be traced.
        levels: number of all codes, ``2^bits``.

    Source: official ``fake_hybrid_quantize_per_tensor_affine``.
    """
    u = x - minimum
    k = base.round_to_octave(jnp.maximum(u, 0.0) / scale_log)
    log_value = jnp.where(k < log_levels, scale_log * base.negative_power_of_two(k), 0.0)
    n = jnp.clip(jnp.round((u - scale_log) / scale_uniform), 0.0, levels - log_levels - 1.0)
    return jnp.where(u <= scale_log, log_value, n * scale_uniform + scale_log) + minimum


def _forward(
    x: jax.Array,
    minimum: jax.Array,
    scale_log: jax.Array,
    scale_uniform: jax.Array,
    log_levels: jax.Array,
    levels: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    value = hybrid_fake_quant(x, minimum, scale_log, scale_uniform, log_levels, levels)
    return value, (x, minimum, scale_log, scale_uniform, log_levels)


def _backward(levels: int, residuals: tuple, cotangent: jax.Array) -> tuple:
    x, minimum, scale_log, scale_uniform, log_levels = residuals
    u = x - minimum
    is_log = u <= scale_log
    k = base.round_to_octave(jnp.maximum(u, 0.0) / scale_log)
    coded = is_log & (k < log_levels)
    ratio = (u - scale_log) / scale_uniform
    rounded = jnp.round(ratio)
    last = levels - log_levels - 1.0
    clipped = ~is_log & (rounded > last)
    log_slope = scale_log * base.negative_power_of_two(k) / jnp.where(coded, u, 1.0)
    to_x = cotangent * jnp.where(is_log, jnp.where(coded, log_slope, 0.0), jnp.where(clipped, 0.0, 1.0))
    to_uniform = cotangent * jnp.where(is_log, 0.0, jnp.where(clipped, last, rounded - ratio))
    return (
        to_x,
        base.sum_to_shape(cotangent - to_x, jnp.shape(minimum)),
        base.sum_to_shape(jnp.where(clipped, cotangent, 0.0), jnp.shape(scale_log)),
        base.sum_to_shape(to_uniform, jnp.shape(scale_uniform)),
        jnp.zeros_like(log_levels),
    )


hybrid_fake_quant.defvjp(_forward, _backward)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["minimum", "scale_log", "scale_uniform", "log_levels"],
    meta_fields=["bits"],
)
@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Hybrid log-uniform quantizer, per tensor.

    Code layout, with ``L = log_levels``:
      * ``0 .. L-1``: log code ``k``, value ``minimum + scale_log * 2^-k``;
      * ``L``: zero of the log part, value ``minimum``. It takes the place of uniform code ``n = 0``, whose value
        ``minimum + scale_log`` is log code 0 already, so that all values fit in ``bits``;
      * ``L+1 .. 2^bits-1``: uniform code ``n = code - L``, value ``minimum + scale_log + n * scale_uniform``.

    The following conditions hold:
      * all parameters are finite scalars, the scales positive; ``log_levels`` is an integer in ``1..2^bits-2``.

    Attributes:
        minimum: smallest value that was observed; the log part counts from it.
        scale_log: width of the logarithmic region.
        scale_uniform: step of the uniform region.
        log_levels: number of log codes (float32, an integer value).
        bits: code width, 2 to 8; static.
    """

    minimum: Any
    scale_log: Any
    scale_uniform: Any
    log_levels: Any
    bits: int

    def __post_init__(self) -> None:
        base.check_bits(self.bits)

    @classmethod
    def from_range(
        cls,
        minimum: Any,
        value_range: Any,
        range_rate: Any,
        grid_rate: Any,
        bits: int,
        reach_maximum: bool = False,
    ) -> Hybrid:
        """The quantizer of one breakpoint candidate; see ``hybrid_scales`` for the arguments."""
        base.check_bits(bits)
        scale_log, scale_uniform, log_levels = hybrid_scales(value_range, range_rate, grid_rate, bits, reach_maximum)
        tiny = base.MIN_SCALE  # A constant tensor has no range.
        return cls(
            jnp.asarray(minimum, jnp.float32),
            jnp.maximum(scale_log, tiny),
            jnp.maximum(scale_uniform, tiny),
            log_levels,
            bits,
        )

    def validate(self, channels: int | None = None) -> Hybrid:
        """Returns itself; raises ValueError if a (concrete) parameter breaks the conditions above."""
        del channels
        base.check_bits(self.bits)
        for name in ("minimum", "scale_log", "scale_uniform", "log_levels"):
            if np.size(getattr(self, name)) != 1:
                raise ValueError(f"{name} of a hybrid quantizer must be a scalar, one for the tensor")
        base.check_finite("minimum", self.minimum)
        base.check_positive("scale_log", self.scale_log)
        base.check_positive("scale_uniform", self.scale_uniform)
        base.check_codes_range("log_levels", self.log_levels, 2**self.bits - 2)
        base.check_positive("log_levels", self.log_levels)
        return self

    def _parameters(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        # The official scales are (1,) arrays: as scalars they fit inputs of any rank.
        values = (self.minimum, self.scale_log, self.scale_uniform, self.log_levels)
        minimum, scale_log, scale_uniform, log_levels = (jnp.asarray(v, jnp.float32).reshape(()) for v in values)
        return minimum, scale_log, scale_uniform, log_levels

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes of ``x`` (any shape) as int32 in ``0..2^bits-1``."""
        minimum, scale_log, scale_uniform, log_levels = self._parameters()
        whole = log_levels.astype(jnp.int32)
        u = jnp.asarray(x).astype(jnp.float32) - minimum
        k = jnp.minimum(base.round_to_octave(jnp.maximum(u, 0.0) / scale_log), whole)
        n = jnp.clip(jnp.round((u - scale_log) / scale_uniform), 0.0, 2**self.bits - log_levels - 1.0)
        uniform_code = jnp.where(n < 1.0, 0, whole + n.astype(jnp.int32))
        return jnp.where(u <= scale_log, k, uniform_code)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer ``codes`` (any shape)."""
        minimum, scale_log, scale_uniform, log_levels = self._parameters()
        whole = log_levels.astype(jnp.int32)
        codes = jnp.asarray(codes).astype(jnp.int32)
        log_value = jnp.where(codes < whole, scale_log * base.negative_power_of_two(codes), 0.0)
        uniform_value = (codes - whole).astype(jnp.float32) * scale_uniform + scale_log
        return jnp.where(codes <= whole, log_value, uniform_value) + minimum

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """``decode(encode(x))`` in the dtype of ``x``, with straight-through gradients to ``x`` and the scales."""
        x = jnp.asarray(x)
        return hybrid_fake_quant(x.astype(jnp.float32), *self._parameters(), 2**self.bits).astype(x.dtype)

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> Hybrid:
        """Itself: the method learns these scales with their plain gradients."""
        del x_shape
        return self
