"""The state folder of a reconstruction: finished units, and the unit that a killed run was learning."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax import devices
from ahcptq_jax.architectures.base import Unit
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.reconstruction import learning


@dataclasses.dataclass(frozen=True)
class UnitState:
    """The part of the quantized model that belongs to a unit, by paths relative to the unit.

    Attributes:
        weights: layer -> packed weight.
        quantizers: site -> quantizer.
        before: error of the calibrated unit.
        after: error of the finished unit.
    """

    weights: dict[str, QuantizedWeight]
    quantizers: dict[str, Quantizer]
    before: float = 0.0
    after: float = 0.0

    def arrays(self) -> dict[str, Any]:
        """The arrays that a file of the state holds, by name."""
        arrays: dict[str, Any] = {"errors": np.array([self.before, self.after])}
        arrays |= {f"codes/{layer}": weight.packed for layer, weight in self.weights.items()}
        for site, quantizer in self.quantizers.items():
            arrays |= {f"site/{site}/{name}": value for name, value in arrays_of(quantizer).items()}
        return arrays

    def restored(self, path: Path, arrays: Mapping[str, np.ndarray]) -> "UnitState":
        """The state that a file holds of the unit of which this is the calibrated one.

        Raises:
            ValueError: if the file at `path` does not fit the unit.
        """
        # Only grouped quantizers change their shapes, and only in the number of groups.
        saved_state.check_names(path, arrays, self.arrays())
        weights, quantizers = {}, {}
        for layer, weight in self.weights.items():
            packed = arrays[f"codes/{layer}"]
            if packed.shape != weight.packed.shape or packed.dtype != np.uint8:
                raise saved_state.damaged(path, f"the codes of {layer} have a wrong shape")
            weights[layer] = dataclasses.replace(weight, packed=jnp.asarray(packed))
        for site, quantizer in self.quantizers.items():
            fields: dict[str, Any] = {name: jnp.asarray(arrays[f"site/{site}/{name}"]) for name in arrays_of(quantizer)}
            per_channel = kind_of(quantizer).channel_fields
            channels = np.shape(fields[per_channel[0]])[0] if per_channel else None
            try:
                quantizers[site] = dataclasses.replace(quantizer, **fields).validate(channels)
            except ValueError as error:
                raise saved_state.damaged(path, f"{site}: {error}") from error
        before, after = arrays["errors"]
        return UnitState(weights, quantizers, float(before), float(after))


def arrays_of(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer's leaves by name."""
    kind = kind_of(quantizer)
    return {name: getattr(quantizer, name) for name in kind.fields + kind.channel_fields}


@dataclasses.dataclass(frozen=True)
class StateFolder:
    """A folder tied to one run; without a folder nothing is kept.

    Attributes:
        folder: None keeps nothing.
        identity: the run's fingerprint, see `saved_state.fingerprint`.
    """

    folder: Path | None
    identity: str

    def _file(self, unit: Unit, state: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{unit.name.replace('/', '.')}.{state}.npz"

    def load(self, unit: Unit, calibrated: UnitState) -> UnitState | None:
        """A finished unit; None if it is not there.

        Raises:
            ValueError: if its file is damaged or another run's.
        """
        path = self._file(unit, "done")
        arrays = None if path is None else saved_state.load_by_all(path, self.identity)
        if path is None or arrays is None:
            return None
        state = calibrated.restored(path, arrays)
        # A run that was killed between saving the unit and this left its intermediate state.
        self._drop_partial(unit)
        return state

    def save(self, unit: Unit, state: UnitState) -> None:
        """Saves a finished unit and drops its intermediate state."""
        if (path := self._file(unit, "done")) is not None:
            saved_state.save_for_all(path, self.identity, state.arrays())
        self._drop_partial(unit)

    def _drop_partial(self, unit: Unit) -> None:
        if (path := self._file(unit, "partial")) is not None and devices.is_first():
            saved_state.remove(path)

    def save_partial(self, unit: Unit, state: learning.State, step: int) -> None:
        """Saves a unit that is being learned, before iteration `step`."""
        if (path := self._file(unit, "partial")) is not None:
            leaves = {f"leaf/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
            saved_state.save_for_all(path, self.identity, leaves | {"step": np.array(step)})

    def load_partial(self, unit: Unit, state: learning.State) -> tuple[int, learning.State]:
        """The step reached and the state there; 0 and the given state if nothing was saved.

        Raises:
            ValueError: if the file is damaged or another run's.
        """
        path = self._file(unit, "partial")
        arrays = None if path is None else saved_state.load(path, self.identity)
        step = 0 if arrays is None or "step" not in arrays else int(arrays["step"])
        devices.check_same(step, f"The iteration that {unit.name} has reached in {self.folder}")
        if path is None or arrays is None:
            return 0, state
        leaves, structure = jax.tree.flatten(state)
        saved_state.check_names(path, arrays, ["step", *(f"leaf/{i}" for i in range(len(leaves)))])
        found = [arrays[f"leaf/{i}"] for i in range(len(leaves))]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves, strict=True)):
            raise saved_state.damaged(path, "an array has a wrong shape")
        return int(arrays["step"]), jax.tree.unflatten(structure, [jnp.asarray(a) for a in found])
