"""Files and numbers of JSON, which may hold anything."""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sam_flax.errors import InputError


def read_json(path: Path, flag: str, expected: str) -> Any:
    """Parses a JSON file.

    Args:
      path: the file.
      flag: name of the command-line flag or argument behind it, for messages.
      expected: what kind of file belongs there, for messages.

    Raises:
      FileNotFoundError, InputError: with a sentence that names the file and the flag.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The file {path} {problem}: give {expected} with {flag}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not readable as JSON ({error}): give {expected} with {flag}, or copy the file again "
            "if it was cut off."
        ) from error


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; a truth value is none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
