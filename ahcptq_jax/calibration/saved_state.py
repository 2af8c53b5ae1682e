"""Saved states of a long run: named arrays in one file, complete or absent, tied to the run that they belong to."""

import functools
import glob
import hashlib
import importlib.metadata
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sam_flax
from ahcptq_jax import devices
from sam_flax.errors import InputError
from sam_flax.files.writing import make_folder, whole_file

_FINGERPRINT = "fingerprint"


def fingerprint(*parts: Any) -> str:
    """A digest of everything that decides a result: pytrees of arrays, and values with a faithful `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        leaves, structure = jax.tree.flatten(part)
        digest.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, np.ndarray | jax.Array):
                array = np.ascontiguousarray(leaf)
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """A digest of this package's and sam_flax's sources and of JAX's version: a run must not go on with other ones."""
    digest = hashlib.sha256(importlib.metadata.version("jax").encode())
    for package in (Path(__file__).parents[1], Path(sam_flax.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def save(path: Path, identity: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays so that a reader, or a run killed meanwhile, finds the old file, none, or the whole new one.

    Raises:
        OSError: if the file cannot be written; one sentence with path and remedy.
    """
    make_folder(path.parent)
    content: dict[str, Any] = {_FINGERPRINT: identity, **arrays}
    with whole_file(path) as file:
        np.savez(file, **content)


def save_for_all(path: Path, identity: str, arrays: Mapping[str, Any]) -> None:
    """Saves what all processes have in common, once; they see one folder."""
    if devices.is_first():
        save(path, identity, arrays)


def load_by_all(path: Path, identity: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save_for_all` has saved; raises InputError, too, if some processes find them and some do not."""
    arrays = load(path, identity)
    devices.check_same(arrays is not None, f"Whether {path} is there")
    return arrays


def remove(path: Path) -> None:
    """Removes a saved state, and what a run that was killed while it saved left of it."""
    for leftover in (path, *path.parent.glob(f".{glob.escape(path.name)}.*.part")):
        leftover.unlink(missing_ok=True)


def load(path: Path, identity: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under this identity; None if there is no file.

    Raises:
        InputError: if the file is damaged or belongs to another run.
        PermissionError: if it may not be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        found = str(arrays.pop(_FINGERPRINT))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read; give its folder to this user, or another folder.") from error
    # RuntimeError: a flipped bit may claim encryption, or a version of the format that is yet to come.
    except (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, str(error) or type(error).__name__) from error
    if found != identity:
        raise InputError(
            f"{path} was saved by a run with other weights, images or settings, or by other code; give this run a "
            "folder of its own, or delete the file."
        )
    return arrays


def damaged(path: Path, why: str) -> InputError:
    """The error to raise for a file whose content is not what was saved."""
    return InputError(f"{path} is damaged ({why}); delete it and its part of the run is done again.")


def check_names(path: Path, arrays: Mapping[str, np.ndarray], expected: Iterable[str]) -> None:
    """Raises InputError unless the file at `path` holds exactly the expected arrays."""
    odd = sorted(arrays.keys() ^ set(expected))
    if odd:
        raise damaged(path, f"{odd[0]} is missing or not expected")
