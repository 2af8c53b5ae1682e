"""Result files that are either complete or absent, in strict JSON."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that a reader, or a run killed meanwhile, finds the old file or the whole new one.

    Args:
      path: the file; its folder is made if absent.
      content: text (stored as UTF-8) or bytes.

    Raises:
      ValueError: if the folder or the file cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same folder, so that the final rename stays within one file system.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): choose a writable folder with --out."
        ) from error
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes strict JSON atomically; see `plain` for what is converted.

    Raises:
      ValueError: if the file cannot be written.
      TypeError: if a value has no JSON form.
    """
    return write_atomically(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in JSON's own types: arrays become lists, paths become text, NaN and infinities become
    None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(np.asarray(value).tolist())
    raise TypeError(f"A {type(value).__name__} has no JSON form: convert it before it is written.")


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
