"""The state of the encoder's calibration in a folder, so that a killed run goes on after its last finished image."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    def load(self, empty: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Statistics and embeddings of the finished images; `empty` statistics and none if there is no file.

        Raises:
            ValueError: if a file is damaged or another run's.
        """
        path = self.folder / "statistics.npz"
        arrays = saved_state.load(path, self.identity)
        if arrays is None:
            return empty, []
        leaves, structure = jax.tree.flatten(empty)
        saved_state.check_names(path, arrays, ["images", *(f"leaf/{i}" for i in range(len(leaves)))])
        found = [arrays[f"leaf/{i}"] for i in range(len(leaves))]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves, strict=True)):
            raise saved_state.damaged(path, "an array has a wrong shape")
        embeddings = []
        for index in range(int(arrays["images"])):
            file = self._embedding(index)
            embedding = saved_state.load(file, self.identity)
            if not embedding:
                raise saved_state.damaged(path, f"{file.name}, which belongs to it, is missing")
            outputs = [embedding[f"output/{i}"] for i in range(len(embedding))]
            embeddings.append(joined(outputs))
        return jax.tree.unflatten(structure, [jnp.asarray(a) for a in found]), embeddings

    def add(self, statistics: dict[str, Any], embeddings: Sequence[Any]) -> None:
        """Saves the state after the image of the last embedding."""
        last = len(embeddings) - 1
        # The embedding first: statistics that count an image always find its embedding.
        outputs = {f"output/{i}": array for i, array in enumerate(jax.tree.leaves(embeddings[last]))}
        saved_state.save(self._embedding(last), self.identity, outputs)
        leaves = {f"leaf/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(statistics))}
        saved_state.save(self.folder / "statistics.npz", self.identity, leaves | {"images": np.array(len(embeddings))})

    def _embedding(self, index: int) -> Path:
        return self.folder / f"embedding_{index:04d}.npz"
