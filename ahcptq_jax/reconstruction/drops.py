"""QDrop (arXiv 2203.05740): while a unit is learned, part of every tensor passes unquantized, drawn anew each time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ahcptq_jax.quantizers import Quantizer, fake_quant_lsq

Seed = jax.Array  # (2,) uint32


def _random_words(seed: Seed, shape: tuple[int, ...]) -> jax.Array:
    """uint32 words of `shape`: a hash of (seed, position), which is all that drops need.

    JAX's own generators write their words to memory first; this one is fused into its use, and costs a fifth.
    """
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    # The multipliers and shifts of C. Wellons' "lowbias32" (public domain), after a Weyl step.
    word = position * jnp.uint32(0x9E3779B9) + seed[0]
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D) ^ seed[1]
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def mix(seed: Seed, value: jax.Array, instead: jax.Array, share: float) -> jax.Array:
    """`value` with about `share` of its elements taken from `instead`."""
    if share in (0, 1):
        return instead if share else value
    return jnp.where(_random_words(seed, value.shape) < jnp.uint32(share * 2**32), instead, value)


def dropping(quantizers: Mapping[str, Quantizer], seeds: jax.Array, share: float) -> Any:
    """A site handler: quantizes, with LSQ's gradients, all but a random `share` of the elements.

    LSQ's factor takes the size of what passes at once: of an attention map that comes in pieces, a piece's. Adam does
    not see the difference, but for its epsilon.

    Args:
        seeds: (sites, 2), for the sites in alphabetical order.
    """
    numbers = {path: i for i, path in enumerate(sorted(quantizers))}

    def handle(path: str, value: Any) -> Any:
        if path not in quantizers or share == 1:
            return value
        seed = seeds[numbers[path]]
        if path.endswith("softmax"):
            # A large attention map comes here in pieces, in a loop traced once: their content tells them apart.
            content = jnp.sum(jax.lax.stop_gradient(value[..., 0]))
            seed = seed ^ jax.lax.bitcast_convert_type(content, jnp.uint32)
        return mix(seed, fake_quant_lsq(quantizers[path], value), value, share)

    return handle
