"""Result files that are either complete or absent, in strict JSON."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam_flax.files.writing import make_folder, write_whole


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that a reader, or a run killed meanwhile, finds the old file or the whole new one.

    Args:
      path: the file; its folder is made if absent.
      content: bytes, or text, which is stored as UTF-8; file names in it that are not UTF-8 keep their bytes.

    Raises:
      OSError: if the folder or the file cannot be written; a sentence with path and remedy.
    """
    path = Path(path)
    make_folder(path.parent)
    write_whole(path, [content if isinstance(content, bytes) else to_bytes(content)])
    return path


def to_bytes(text: str) -> bytes:
    """Text as UTF-8. Names of files that are not UTF-8 stand in Python's text as surrogates; they keep their bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair that no file name has, as JSON may contain it
        return text.encode("utf-8", "backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes strict JSON atomically; see `plain` for what is converted.

    Raises:
      OSError: if the file cannot be written.
      TypeError: if a value has no JSON form.
    """
    return write_file(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


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
