"""A quantized weight as a model holds it: packed codes with a scale and a zero point for each output channel."""

import dataclasses
from functools import partial

import jax

from ahcptq_jax.quantizers import packing
from ahcptq_jax.quantizers.uniform import Uniform


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scale", "zero_point"],
    meta_fields=["shape", "bits"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight as packed codes.

    The following conditions hold:
      * `packed` is uint8, the codes in C order (see `packing.pack`);
      * `scale` and `zero_point` are (out,), `out` being the last axis of `shape`.
    """

    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    shape: tuple[int, ...]
    bits: int

    @classmethod
    def from_codes(cls, codes: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> "QuantizedWeight":
        """Packs integer codes of the weight's shape."""
        return cls(packing.pack(codes, bits), scale, zero_point, tuple(codes.shape), bits)

    def codes(self) -> jax.Array:
        """uint8 codes of `shape`."""
        return packing.unpack(self.packed, self.bits, self.shape)

    def decode(self) -> jax.Array:
        """float32 weight of `shape`."""
        return Uniform(self.scale, self.zero_point, self.bits).decode(self.codes())
