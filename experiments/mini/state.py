"""Saved training states: atomic, and tied to the flags of their run."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.schedule import TrainState
from sam_flax.errors import InputError


def save_state(path: Path, state: TrainState, fingerprint: str) -> None:
    """Writes the state atomically."""
    leaves: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez(file, fingerprint=np.array(fingerprint), **leaves)
    os.replace(partial_path, path)


def load_state(path: Path, like: TrainState, fingerprint: str) -> TrainState:
    """Reads a state written by `save_state`.

    Raises:
        InputError: if the file is corrupt or was written by a run with other flags.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = str(archive["fingerprint"])
            leaves, treedef = jax.tree.flatten(like)
            loaded = [archive[f"leaf_{i}"] for i in range(len(leaves))]
    except Exception as error:
        raise InputError(f"{path} is not a readable training state ({error}); delete it to start over.") from error
    if found != fingerprint:
        raise InputError(f"{path} belongs to a run with other flags ({found}); use another --out or delete it.")
    return jax.tree.unflatten(treedef, [jnp.asarray(a, b.dtype) for a, b in zip(loaded, leaves, strict=True)])
