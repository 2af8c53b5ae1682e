"""Batches of calibration data, and how much of one a search looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp

# A search over a whole tensor looks coarsely at this many of its values, and then finely at all of them.
COARSE_ELEMENTS = 2**19

T = TypeVar("T")


def summed(before: T, batch: T) -> T:
    """The state of both, where all that a state holds are sums over the batches.

    Sums, and no running means: a product before a sum may or may not be fused with it, and then differs in the last bit
    between a program for one device and one for several.
    """
    return jax.tree.map(jnp.add, before, batch)


def nonempty(batches: Iterable[jax.Array]) -> Iterable[jax.Array]:
    """The batches that hold a value."""
    return (x for x in batches if math.prod(x.shape))


def no_batches() -> ValueError:
    """The error of a search that was given nothing."""
    return ValueError("calibration needs at least one batch with data, got none; pass calibration images")


def draw_rows(available: int, rows: int, key: jax.Array) -> jax.Array | None:
    """`rows` of `available` rows (rows,), in order; None if that is all of them, or `rows` is 0."""
    if not 0 < rows < available:
        return None
    return jnp.sort(jax.random.choice(key, available, (rows,), replace=False))
