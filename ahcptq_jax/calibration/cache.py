"""A cache of what calibration has found, so that runs with many settings on one model find it once."""

import dataclasses
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from ahcptq_jax.quantizers.weights import QuantizedWeight

V = TypeVar("V")

# The embeddings of 32 images of SAM-B take 134 MB, its weights at 4 bits 45 MB.
MOST_BYTES = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """The findings of one pass over all images.

    Attributes:
        statistics: the accumulated statistics, by site or by stage and site.
        embeddings: the encoder's outputs, for each image an array or a tuple of arrays; empty for the decoder's pass.
    """

    statistics: dict[str, Any]
    embeddings: list[Any]


class Recent(MutableMapping[Hashable, V], Generic[V]):
    """A dict of pytrees of arrays that forgets the least recently used ones beyond a number of bytes.

    The last value set is kept whatever its size.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0  # of all arrays held
        self._values: dict[Hashable, V] = {}  # least recently used first

    def __getitem__(self, key: Hashable) -> V:
        self._values[key] = value = self._values.pop(key)
        return value

    def __setitem__(self, key: Hashable, value: V) -> None:
        if key in self._values:
            del self[key]
        self._values[key] = value
        self.nbytes += _bytes_of(value)
        while self.nbytes > self.most_bytes and len(self._values) > 1:
            del self[next(iter(self._values))]

    def __delitem__(self, key: Hashable) -> None:
        self.nbytes -= _bytes_of(self._values.pop(key))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)


def _bytes_of(tree: Any) -> int:
    """The size of a pytree's arrays in bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(np.shape(leaf))) * np.dtype(getattr(leaf, "dtype", float)).itemsize for leaf in leaves)


@dataclasses.dataclass
class StatisticsCache:
    """Finished passes over the images by the floating-point model that was calibrated last, and quantized weights.

    A pass is taken over whole, by runs whose own would be the same program: single sites' statistics would fit into
    others but for the rounding of what lies between them, which changes with the program. Another model, other images
    or another seed take the place of all passes. The weights depend on no image and stay, as far as there is room.

    Attributes:
        identity: a fingerprint of the model, the images and the seed.
        passes: from all else that a pass depends on to its findings.
        weights: from a kernel's content and the way it was quantized to its codes.
    """

    identity: str = ""
    passes: Recent[Observed] = dataclasses.field(default_factory=Recent)
    weights: Recent[QuantizedWeight] = dataclasses.field(default_factory=Recent)

    def keep_passes_of(self, identity: str) -> None:
        """Forgets the passes of any other model or over other images."""
        if identity != self.identity:
            self.identity = identity
            self.passes.clear()
