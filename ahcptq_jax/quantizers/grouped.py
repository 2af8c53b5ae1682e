"""CAG's grouped quantizer: the channels of the last axis share a few scales (paper, section on CAG)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantizers import base
from ahcptq_jax.quantizers.uniform import Uniform


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["scale", "zero_point", "groups"], meta_fields=["bits"]
)
@dataclasses.dataclass(frozen=True)
class Grouped:
    """Uniform quantizer whose parameters are shared by groups of channels.

    The following conditions hold:
      * ``scale`` is ``(G,)``, finite and positive; ``zero_point`` is ``(G,)``, integers in ``0..2^bits-1``.
      * ``groups`` is ``(C,)`` for inputs ``(..., C)``, with labels in ``0..G-1``.

    Attributes:
        scale: step of each group.
        zero_point: code of the value 0 in each group (stored as float32).
        groups: group of each channel, int32.
        bits: code width, 2 to 8; static.
    """

    scale: Any
    zero_point: Any
    groups: Any
    bits: int

    def __post_init__(self) -> None:
        base.check_bits(self.bits)

    def validate(self, channels: int | None = None) -> Grouped:
        """Returns itself; raises ValueError if a (concrete) parameter breaks the conditions above.

        Args:
            channels: size of the last axis of the tensors to come, if known.
        """
        base.check_bits(self.bits)
        base.check_positive("scale", self.scale)
        if np.ndim(self.scale) != 1 or np.shape(self.scale) != np.shape(self.zero_point):
            raise ValueError(
                f"scale {np.shape(self.scale)} and zero_point {np.shape(self.zero_point)} must both be (G,), "
                "one entry per group"
            )
        base.check_codes_range("zero_point", self.zero_point, 2**self.bits - 1)
        base.check_codes_range("groups", self.groups, np.shape(self.scale)[0] - 1)
        if np.ndim(self.groups) != 1 or (channels is not None and np.shape(self.groups)[0] != channels):
            raise ValueError(
                f"groups {np.shape(self.groups)} must have one label for each of the {channels or 'C'} channels"
            )
        return self

    def per_channel(self) -> Uniform:
        """The equal per-channel quantizer: scale and zero point gathered once for each channel, ``(C,)``."""
        groups = jnp.asarray(self.groups)
        return Uniform(
            jnp.asarray(self.scale, jnp.float32)[groups],
            jnp.asarray(self.zero_point, jnp.float32)[groups],
            self.bits,
        )

    def _for_input(self, shape: tuple[Any, ...]) -> Uniform:
        if len(shape) == 0 or shape[-1] != np.shape(self.groups)[0]:
            raise ValueError(
                f"groups labels {np.shape(self.groups)[0]} channels but the input has shape {tuple(shape)}; "
                "its last axis must be the channels"
            )
        return self.per_channel()

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes of ``x`` (..., C) as int32 in ``0..2^bits-1``."""
        return self._for_input(np.shape(x)).encode(x)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer ``codes`` (..., C)."""
        return self._for_input(np.shape(codes)).decode(codes)

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """``decode(encode(x))`` in the dtype of ``x``, with straight-through gradients to ``x`` and ``scale``."""
        return self._for_input(np.shape(x)).fake_quant(x)

    def with_gradient_scale(self, x_shape: tuple[int, ...]) -> Grouped:
        """The same quantizer, whose scales' gradient carries LSQ's factor for inputs of ``x_shape`` (..., C)."""
        factor = base.lsq_factor(int(np.prod(x_shape)), x_shape[-1], self.bits)
        return dataclasses.replace(self, scale=base.scale_gradient(jnp.asarray(self.scale), factor))
