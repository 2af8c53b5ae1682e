"""The uniform quantizer: one scale for a tensor, or one per channel of the last axis."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import base


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def uniform_fake_quant(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """``(clip(round(x/s)+z, 0, 2^bits-1) - z) * s`` with straight-through gradients.

    The gradient passes through ``round``; inside the range (both end codes included) it reaches ``x`` and gives the
    scale ``round(x/s) - x/s``, outside it only reaches the scale. The zero point gets none.

    Args:
        x: float32, any shape.
        scale: float32, broadcasts into ``x``.
        zero_point: float32 integers, same shape as ``scale``.
        bits: code width.

    Source: official ``fake_quantize_learnable_per_tensor_affine_training`` and the per-channel form.
    """
    return (uniform_codes(x, scale, zero_point, bits) - zero_point) * scale


def uniform_codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """``clip(round(x/s)+z, 0, 2^bits-1)`` as float32."""
    return jnp.clip(jnp.round(x / scale) + zero_point, 0.0, 2**bits - 1)


def _forward(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> tuple[jax.Array, tuple]:
    return uniform_fake_quant(x, scale, zero_point, bits), (x, scale, zero_point)


def _backward(bits: int, residuals: tuple, cotangent: jax.Array) -> tuple:
    x, scale, zero_point = residuals
    ratio = x / scale
    rounded = jnp.round(ratio)
    code = rounded + zero_point
    inside = (code >= 0) & (code <= 2**bits - 1)
    to_x = jnp.where(inside, cotangent, 0.0)
    to_scale = cotangent * jnp.where(inside, rounded - ratio, jnp.clip(code, 0.0, 2**bits - 1) - zero_point)
    return to_x, base.sum_to_shape(to_scale, scale.shape), jnp.zeros_like(zero_point)


uniform_fake_quant.defvjp(_forward, _backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale", "zero_point"], meta_fields=["bits"])
@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform asymmetric quantizer; the value of code ``q`` is ``(q - zero_point) * scale``.

    The following conditions hold:
      * ``scale`` is a scalar (per tensor) or ``(C,)`` (per channel of the last axis), finite and positive.
      * ``zero_point`` has the shape of ``scale`` and holds integers in ``0..2^bits-1`` (stored as float32).

    Attributes:
        scale: step between codes, in units of the tensor.
        zero_point: code of the value 0.
        bits: code width, 2 to 8; static.
    """

    scale: Any
    zero_point: Any
    bits: int

    def __post_init__(self) -> None:
        base.check_bits(self.bits)

    @classmethod
    def from_range(cls, low: Any, high: Any, bits: int) -> Uniform:
        """The quantizer that covers ``[low, high]`` and zero; scalars or one value per channel."""
        scale, zero_point = base.qparams_from_range(low, high, bits)
        return cls(scale, zero_point, bits)

    def validate(self, channels: int | None = None) -> Uniform:
        """Returns itself; raises ValueError if a (concrete) parameter breaks the conditions above.

        Args:
            channels: size of the last axis of the tensors to come, if known.
        """
        base.check_bits(self.bits)
        base.check_positive("scale", self.scale)
        if np.shape(self.scale) != np.shape(self.zero_point):
            raise ValueError(
                f"scale {np.shape(self.scale)} and zero_point {np.shape(self.zero_point)} must have the same shape"
            )
        base.check_codes_range("zero_point", self.zero_point, 2**self.bits - 1)
        if channels is not None:
            base.check_broadcast("scale", np.shape(self.scale), (channels,))
        return self

    def _parameters(self, x_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        scale, zero_point = jnp.asarray(self.scale, jnp.float32), jnp.asarray(self.zero_point, jnp.float32)
        base.check_broadcast("scale", scale.shape, x_shape)
        base.check_broadcast("zero_point", zero_point.shape, x_shape)
        return scale, zero_point

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes of ``x`` (any shape) as int32 in ``0..2^bits-1``."""
        x = jnp.asarray(x)
        scale, zero_point = self._parameters(x.shape)
        return uniform_codes(x.astype(jnp.float32), scale, zero_point, self.bits).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer ``codes`` (any shape)."""
        codes = jnp.asarray(codes)
        scale, zero_point = self._parameters(codes.shape)
        return (codes.astype(jnp.float32) - zero_point) * scale

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """``decode(encode(x))`` in the dtype of ``x``, with straight-through gradients to ``x`` and ``scale``."""
        x = jnp.asarray(x)
        scale, zero_point = self._parameters(x.shape)
        return uniform_fake_quant(x.astype(jnp.float32), scale, zero_point, self.bits).astype(x.dtype)

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> Uniform:
        """The same quantizer, whose scale's gradient carries LSQ's factor for inputs of ``x_shape``."""
        channels = 1 if np.size(self.scale) == 1 else x_shape[-1]
        factor = base.lsq_factor(int(np.prod(x_shape)), channels, self.bits)
        return dataclasses.replace(self, scale=base.scale_gradient(jnp.asarray(self.scale), factor))
