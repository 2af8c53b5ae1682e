"""The state of the encoder's calibration in a folder, so that a killed run goes on after its last finished image."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax import devices
from ahcptq_jax.calibration import saved_state
from sam_flax.stages import joined


@dataclasses.dataclass(frozen=True)
class SavedStatistics:
    """The files of one encoder's calibration: its statistics, and the embeddings of the finished images.

    Attributes:
        folder: holds one file of statistics and one for each embedding.
        identity: the run's fingerprint, see `saved_state.fingerprint`.
    """

    folder: Path
    identity: str

    def load(self, empty: dict[str, Any], own: Callable[[int], bool]) -> tuple[dict[str, Any], int, dict[int, Any]]:
        """Statistics, how many images they have, and the embeddings of those among them that are this process's own.

        `empty` statistics if there is no file.

        Raises:
            ValueError: if a file is damaged or another run's, or not every process finds the same.
        """
        path = self.folder / "statistics.npz"
        arrays = saved_state.load(path, self.identity)
        devices.check_same(0 if arrays is None else int(arrays["images"]), f"The number of images saved in {path}")
        if arrays is None:
            return empty, 0, {}
        leaves, structure = jax.tree.flatten(empty)
        saved_state.check_names(path, arrays, ["images", *(f"leaf/{i}" for i in range(len(leaves)))])
        found = [arrays[f"leaf/{i}"] for i in range(len(leaves))]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves, strict=True)):
            raise saved_state.damaged(path, "an array has a wrong shape")
        embeddings = {}
        count = int(arrays["images"])
        for index in filter(own, range(count)):
            file = self._embedding(index)
            embedding = saved_state.load(file, self.identity)
            if not embedding:
                raise saved_state.damaged(path, f"{file.name}, which belongs to it, is missing")
            outputs = [embedding[f"output/{i}"] for i in range(len(embedding))]
            embeddings[index] = joined(outputs)
        return jax.tree.unflatten(structure, [jnp.asarray(a) for a in found]), count, embeddings

    def add(self, statistics: dict[str, Any], count: int, embeddings: Mapping[int, Any]) -> None:
        """Saves the state after `count` images, and this process's own embeddings of those that came last."""
        # The embeddings first: statistics that count an image always find its embedding.
        for index, embedding in embeddings.items():
            outputs = {f"output/{i}": array for i, array in enumerate(jax.tree.leaves(embedding))}
            saved_state.save(self._embedding(index), self.identity, outputs)
        devices.wait_for_all(f"embeddings of {count} images")
        if devices.is_first():
            leaves = {f"leaf/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(statistics))}
            saved_state.save(self.folder / "statistics.npz", self.identity, leaves | {"images": np.array(count)})

    def _embedding(self, index: int) -> Path:
        return self.folder / f"embedding_{index:04d}.npz"
