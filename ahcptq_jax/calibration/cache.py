"""What calibration has found and a later run can take over, so that many settings on one model find it once."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from ahcptq_jax.runtime.quantized import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a pass over all images has found.

    Attributes:
        statistics: what `calibrate` accumulated, by site or by stage and site.
        embeddings: of the images, each (1, g, g, C); none from the decoder's pass.
    """

    statistics: dict[str, Any]
    embeddings: list[np.ndarray]


@dataclasses.dataclass
class StatisticsCache:
    """Finished passes over the images by the floating-point model that was calibrated last, and quantized weights.

    A pass is taken over whole, by runs whose own would be the same program: single sites' statistics would fit into
    others but for the rounding of what lies between them, which changes with the program. Another model, other images
    or another seed take the place of all passes.

    Attributes:
        identity: of the model, the images and the seed.
        passes: all that a pass depends on besides -> what it found.
        weights: a kernel's content and how it was quantized -> its codes. They depend on no image, so they stay.
    """

    identity: str = ""
    passes: dict[Hashable, Observed] = dataclasses.field(default_factory=dict)
    weights: dict[Hashable, QuantizedWeight] = dataclasses.field(default_factory=dict)

    def enter(self, identity: str) -> None:
        """Drops the passes of another model or over other images."""
        if identity != self.identity:
            self.identity, self.passes = identity, {}
