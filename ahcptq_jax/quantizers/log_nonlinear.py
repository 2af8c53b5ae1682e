"""LNQ, the log-nonlinear quantizer of softmax outputs (AHCQ-SAM, arXiv 2503.03088 v4)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import base

# How much finer values near zero are divided than large ones: 0.001 divides almost evenly.
ALPHAS = (0.001, 0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
# Up to so many bits a code is found by comparing with every threshold, which vectorises; above, by bisection.
_BITS_COMPARED = 5


def log_nonlinear_values(x: jax.Array, alpha: jax.Array, scale: jax.Array, bits: int, grid_bits: int = 0) -> jax.Array:
    """``(exp(q/L * ln(1+alpha*s)) - 1) / alpha`` with ``q = round(L * ln(1+alpha*x) / ln(1+alpha*s))``, L = 2^bits - 1.

    The formula itself, for searches; `LogNonlinear` rounds by thresholds and agrees with it but for ties.

    Args:
        x: float32, any shape; clipped to [0, scale].
        alpha: float32 scalar; may be traced.
        scale: float32 scalar, the largest value; may be traced.
        bits: code width.
        grid_bits: not 0 rounds the values to whole steps ``scale / (2^grid_bits - 1)``.
    """
    last = 2**bits - 1
    # Not log1p and expm1: a search over 3 million probabilities took 2.1 s with them and takes 1.2 s on one core. What
    # they would save is less than a thousandth of a code.
    whole = jnp.log(1.0 + alpha * scale)
    code = jnp.round(jnp.log(1.0 + alpha * jnp.clip(x, 0.0, scale)) * (last / whole))
    values = (jnp.exp(code * (whole / last)) - 1.0) / alpha
    if not grid_bits:
        return values
    step = scale / (2.0**grid_bits - 1.0)
    return step * jnp.round(values / step)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["alpha", "scale"], meta_fields=["bits", "grid_bits"])
@dataclasses.dataclass(frozen=True)
class LogNonlinear:
    """Quantizer of values in ``[0, scale]`` whose codes divide ``ln(1 + alpha*x)`` evenly.

    Code layout: code ``q`` in ``0..2^bits-1`` has the value ``(exp(q/L * ln(1+alpha*scale)) - 1) / alpha`` with
    ``L = 2^bits - 1``; code 0 is zero. (The released program clamps codes to ``2^bits`` and so has one too many.)

    The following conditions hold:
      * ``alpha`` and ``scale`` are scalars, finite and positive.

    Attributes:
        alpha: how much finer small values are divided than large ones.
        scale: largest value.
        bits: code width, 2 to 8; static.
        grid_bits: not 0 rounds every value to a whole number of steps ``scale / (2^grid_bits - 1)``; static.
    """

    alpha: Any
    scale: Any
    bits: int
    grid_bits: int = 0

    def __post_init__(self) -> None:
        base.check_bits(self.bits)

    def validate(self, channels: int | None = None) -> LogNonlinear:
        """Returns itself; raises ValueError if a (concrete) parameter breaks the conditions above."""
        del channels
        base.check_bits(self.bits)
        base.check_positive("scale", self.scale)
        base.check_positive("alpha", self.alpha)
        if not 0 <= self.grid_bits <= base.MAX_BITS:
            raise ValueError(f"grid_bits must be from 0 to {base.MAX_BITS}, got {self.grid_bits}")
        if np.size(self.scale) != 1 or np.size(self.alpha) != 1:
            raise ValueError("scale and alpha of a log-nonlinear quantizer must be scalars, one for the tensor")
        return self

    def _parameters(self) -> tuple[jax.Array, jax.Array]:
        return (jnp.asarray(value, jnp.float32).reshape(()) for value in (self.alpha, self.scale))  # type: ignore[return-value]

    def shares(self, codes: jax.Array) -> jax.Array:
        """float32 values of codes as shares of `scale`, off the grid; codes between whole ones are taken, too."""
        alpha, scale = self._parameters()
        whole = jnp.log1p(alpha * scale)
        return jnp.expm1(codes.astype(jnp.float32) * (whole / (2**self.bits - 1))) / jnp.expm1(whole)

    def thresholds(self) -> jax.Array:
        """float32 (2^bits - 1,): a value above so many of them has the code of that number."""
        _, scale = self._parameters()
        return scale * self.shares(jnp.arange(2**self.bits - 1) + 0.5)

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes of ``x`` (any shape) as int32 in ``0..2^bits-1``.

        By thresholds, so that every program of the model finds the same code without a logarithm of each value.
        """
        x = jnp.asarray(x).astype(jnp.float32)
        thresholds = self.thresholds()
        if self.bits > _BITS_COMPARED:
            return jnp.searchsorted(thresholds, x, method="scan_unrolled").astype(jnp.int32)
        codes = jnp.zeros(x.shape, jnp.int32)
        for index in range(2**self.bits - 1):
            codes += x > thresholds[index]
        return codes

    def table(self, grid_bits: int) -> jax.Array:
        """int32 (2^bits,): the values of the codes in whole steps ``scale / (2^grid_bits - 1)``."""
        codes = jnp.arange(2**self.bits)
        return jnp.round((2.0**grid_bits - 1.0) * self.shares(codes)).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer ``codes`` (any shape)."""
        _, scale = self._parameters()
        if self.grid_bits:
            step = scale / (2.0**self.grid_bits - 1.0)
            return step * self.table(self.grid_bits).astype(jnp.float32)[codes]
        return scale * self.shares(jnp.arange(2**self.bits))[codes]

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """``decode(encode(x))`` in the dtype of ``x``; the gradient to ``x`` is 1 inside [0, scale] and 0 outside."""
        x = jnp.asarray(x)
        _, scale = self._parameters()
        x32 = x.astype(jnp.float32)
        value = jax.lax.stop_gradient(self.decode(self.encode(x32)))
        return base.straight_through(jnp.clip(x32, 0.0, jax.lax.stop_gradient(scale)), value).astype(x.dtype)

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> LogNonlinear:
        """Itself: nothing of it is learned."""
        del x_shape
        return self
