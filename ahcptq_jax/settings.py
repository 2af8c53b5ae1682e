"""Settings declared once: a dataclass field that carries its help, its choices and its check.

A record of settings is a frozen dataclass whose fields are made by `setting`. Its `__post_init__` calls
`check_settings`; command-line flags, sweep switches and tables of settings are made from `settings_of`. So a new switch
is one field, written in one place.
"""

import dataclasses
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from sam_flax.errors import InputError

_KEY = "setting"
# Type of a setting -> the types that it accepts, and how to say so.
_ACCEPTED: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a number"),
    bool: ((bool, np.bool_), "True or False"),
    str: ((str,), "a text"),
    tuple: ((tuple,), "a tuple"),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on the value of a setting, and the words for it.

    Attributes:
        accepts: returns whether a value of the right type is allowed.
        wanted: the end of the sentence "<name>=<value> must be …".
    """

    accepts: Callable[[Any], bool]
    wanted: str


def at_least(least: int) -> Check:
    """The check for a number from `least` upwards."""
    return Check(lambda value: value >= least, f"at least {least}")


def between(low: float, high: float) -> Check:
    """The check for a number in the closed interval from `low` to `high`."""
    return Check(lambda value: low <= value <= high, f"a number from {low} to {high}")


def finite_from(least: float) -> Check:
    """The check for a finite number from `least` upwards."""
    return Check(lambda value: least <= value < math.inf, f"a finite number of at least {least:g}")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The description of one field of a record of settings.

    Attributes:
        name: the name of the field; empty until the record's class is made.
        default: its value where none is given.
        type: int, float, bool, str or tuple; with default None the type of the value where one is given.
        help: a sentence for `--help` and for readers.
        choices: all values that a text may have; empty for any.
        check: the condition on a value; None accepts every value of the type.
        sweep: whether a table of methods may switch or set it (`method+name=value`).
    """

    name: str
    default: Any
    type: type
    help: str
    choices: tuple[str, ...] = ()
    check: Check | None = None
    sweep: bool = True

    def checked(self, value: Any) -> Any:
        """The value as a plain Python object: NumPy's numbers become Python's, which hash and serialize as such.

        Raises:
            InputError: if it has another type, is none of the choices, or does not pass the check.
        """
        accepted, kind = _ACCEPTED[self.type]
        if value is None and self.default is None:
            return None
        # bool is an int to Python, and bits=True a mistake.
        is_flag = isinstance(value, bool | np.bool_)
        if not isinstance(value, accepted) or (is_flag and self.type is not bool):
            raise InputError(f"{self.name}={value!r} must be {kind}{', or None' if self.default is None else ''}.")
        value = self.type(value)
        if self.choices and value not in self.choices:
            raise InputError(f"{self.name}={value!r} is unknown; choose one of {', '.join(self.choices)}.")
        if self.check is not None and not self.check.accepts(value):
            raise InputError(f"{self.name}={value!r} must be {self.check.wanted}.")
        return value


def setting(
    default: Any,
    help: str,
    *,
    type: type | None = None,
    choices: tuple[str, ...] = (),
    check: Check | None = None,
    sweep: bool = True,
) -> Any:
    """A dataclass field that is a setting; see `Setting` for the arguments.

    Args:
        type: needed where the default is None; otherwise it is the default's.
    """
    kind = default.__class__ if type is None else type
    if kind not in _ACCEPTED:
        raise ValueError(f"A setting with the default {default!r} needs type= int, float, bool, str or tuple.")
    return dataclasses.field(
        default=default, metadata=MappingProxyType({_KEY: Setting("", default, kind, help, choices, check, sweep)})
    )


def settings_of(record: Any) -> dict[str, Setting]:
    """The settings of a dataclass or of an instance of one, by name, in their order."""
    return {
        field.name: dataclasses.replace(field.metadata[_KEY], name=field.name)
        for field in dataclasses.fields(record)
        if _KEY in field.metadata
    }


def check_settings(record: Any) -> None:
    """Checks every setting of a frozen dataclass and makes its values plain Python objects; for `__post_init__`.

    Raises:
        InputError: at the first value that is not one of its setting.
    """
    for name, known in settings_of(record).items():
        object.__setattr__(record, name, known.checked(getattr(record, name)))
