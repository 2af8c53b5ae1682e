"""AGQ's logarithmic quantizer for softmax outputs (PTQ4SAM, arXiv 2405.03144)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import base

TAUS = (1, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def log2_fake_quant(
    x: jax.Array, scale: jax.Array, tau: jax.Array, levels: jax.Array | int, grid_bits: int = 0
) -> jax.Array:
    """``s * 2^(-k/tau)`` with ``k = max(round(-tau * log2(x/s)), 0)``, and 0 where ``k >= levels``.

    ``levels`` counts the nonzero values. The official code takes ``2^bits`` and so emits ``2^bits + 1`` values; the
    quantizer below takes ``2^bits - 1``, which with zero makes ``2^bits``.

    Straight-through gradients: inside the levels ``value/x`` to ``x`` and none to the scale (the scale cancels),
    above them (``x`` larger than the scale) 1 to the scale, none where the value is zero.

    Args:
        x: float32, any shape; what is not positive counts as zero.
        scale: float32 scalar, the largest value.
        tau: 1, 2 or 4, scalar; may be traced.
        levels: scalar; may be traced.
        grid_bits: see ``log2_values``; the gradients are those off the grid.

    Source: official ``fake_logquantize_per_tensor_affine``.
    """
    return log2_values(log2_codes(x, scale, tau, levels), scale, tau, levels, grid_bits)


def log2_values(
    k: jax.Array, scale: jax.Array, tau: jax.Array, levels: jax.Array | int, grid_bits: int = 0
) -> jax.Array:
    """float32 values of int32 codes: ``s * 2^(-k/tau)``, and 0 from ``levels`` on.

    Args:
        grid_bits: not 0 rounds every value to a whole number of steps ``s / (2^grid_bits - 1)``.
    """
    power = base.negative_power_of_root(k, tau)
    if grid_bits:
        top = 2.0**grid_bits - 1.0
        power = jnp.round(top * power) / top
    return jnp.where(k < levels, scale * power, 0.0)


def log2_codes(x: jax.Array, scale: jax.Array, tau: jax.Array, levels: jax.Array | int) -> jax.Array:
    """int32 codes: ``k`` in ``0..levels-1`` for ``s * 2^(-k/tau)``, and ``levels`` for zero."""
    k = base.round_to_octave_fraction(jnp.maximum(x, 0.0) / scale, tau)
    return jnp.clip(k, 0, levels)


def _forward(
    x: jax.Array, scale: jax.Array, tau: jax.Array, levels: jax.Array | int, grid_bits: int
) -> tuple[jax.Array, tuple]:
    return log2_fake_quant(x, scale, tau, levels, grid_bits), (x, scale, tau, levels)


def _backward(grid_bits: int, residuals: tuple, cotangent: jax.Array) -> tuple:
    del grid_bits
    x, scale, tau, levels = residuals
    k = base.round_to_octave_fraction(jnp.maximum(x, 0.0) / scale, tau)
    inside = (k >= 0) & (k < levels)
    value = scale * base.negative_power_of_root(jnp.maximum(k, 0), tau)
    to_x = jnp.where(inside, cotangent * value / jnp.where(inside, x, 1.0), 0.0)
    to_scale = jnp.where(k < 0, cotangent, 0.0)
    return to_x, base.sum_to_shape(to_scale, jnp.shape(scale)), None, None


log2_fake_quant.defvjp(_forward, _backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale", "tau"], meta_fields=["bits", "grid_bits"])
@dataclasses.dataclass(frozen=True)
class Log2:
    """Logarithmic quantizer of values in ``[0, scale]`` with zero.

    Code layout: code ``k`` in ``0..2^bits-2`` has the value ``scale * 2^(-k/tau)``; the last code, ``2^bits-1``, is
    zero. (The official quantizer has zero besides ``2^bits`` nonzero values, which does not fit in ``bits``.)

    The following conditions hold:
      * ``scale`` is a scalar, finite and positive; ``tau`` is the scalar 1, 2 or 4.

    Attributes:
        scale: largest value.
        tau: levels per octave.
        bits: code width, 2 to 8; static.
        grid_bits: not 0 rounds every value to a whole number of steps ``scale / (2^grid_bits - 1)``; static.
    """

    scale: Any
    tau: Any
    bits: int
    grid_bits: int = 0

    def __post_init__(self) -> None:
        base.check_bits(self.bits)

    @property
    def levels(self) -> int:
        """Number of nonzero values; also the code of zero."""
        return 2**self.bits - 1

    def validate(self, channels: int | None = None) -> Log2:
        """Returns itself; raises ValueError if a (concrete) parameter breaks the conditions above."""
        del channels
        base.check_bits(self.bits)
        base.check_positive("scale", self.scale)
        if not 0 <= self.grid_bits <= base.MAX_BITS:
            raise ValueError(f"grid_bits must be from 0 to {base.MAX_BITS}, got {self.grid_bits}")
        if np.size(self.scale) != 1 or np.size(self.tau) != 1:
            raise ValueError("scale and tau of a log2 quantizer must be scalars, one for the tensor")
        if float(np.asarray(self.tau).reshape(())) not in TAUS:
            raise ValueError(f"tau must be one of {TAUS}, got {np.asarray(self.tau)}")
        return self

    def _parameters(self) -> tuple[jax.Array, jax.Array]:
        # The official scale is a (1,) array: as a scalar it fits inputs of any rank.
        return jnp.asarray(self.scale, jnp.float32).reshape(()), jnp.asarray(self.tau, jnp.int32).reshape(())

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes of ``x`` (any shape) as int32 in ``0..2^bits-1``."""
        scale, tau = self._parameters()
        return log2_codes(jnp.asarray(x).astype(jnp.float32), scale, tau, self.levels)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer ``codes`` (any shape)."""
        scale, tau = self._parameters()
        codes = jnp.asarray(codes).astype(jnp.int32)
        return log2_values(codes, scale, tau, self.levels, self.grid_bits)

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """``decode(encode(x))`` in the dtype of ``x``, with straight-through gradients to ``x`` and ``scale``."""
        x = jnp.asarray(x)
        scale, tau = self._parameters()
        return log2_fake_quant(x.astype(jnp.float32), scale, tau, self.levels, self.grid_bits).astype(x.dtype)

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> Log2:
        """Itself: the method learns this scale with its plain gradient."""
        del x_shape
        return self
