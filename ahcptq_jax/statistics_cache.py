"""Calibration statistics that outlive a run, so that many settings on one model pass over its images once."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class StatisticsCache:
    """Statistics of quantized sites, and the embeddings, of the floating-point model that was calibrated last.

    A run is handed what it needs and was found before, and observes the rest. Another model, other images or another
    seed take the place of everything in it, so that it holds one set of embeddings at a time.

    Attributes:
        identity: of the model, the images and the seed.
        statistics: a site and all that its statistics depend on -> what `calibrate` accumulated for it.
        embeddings: of every image, (1, g, g, C); empty until all of them are there.
    """

    identity: str = ""
    statistics: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    embeddings: list[np.ndarray] = dataclasses.field(default_factory=list)

    def enter(self, identity: str) -> None:
        """Empties itself if it holds another model's, or other images', statistics."""
        if identity != self.identity:
            self.identity, self.statistics, self.embeddings = identity, {}, []

    def split(self, keys: Mapping[str, Hashable], empty: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Statistics by path: those to observe, as they start, and those that are known.

        Args:
            keys: path -> what its statistics depend on.
            empty: path -> statistics of no image.
        """
        known = {path: self.statistics[key] for path, key in keys.items() if key in self.statistics}
        return {path: state for path, state in empty.items() if path not in known}, known

    def add(self, keys: Mapping[str, Hashable], statistics: Mapping[str, Any]) -> None:
        """Takes in finished statistics by path; `keys` as in `split`."""
        self.statistics |= {keys[path]: state for path, state in statistics.items()}
