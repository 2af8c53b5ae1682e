"""The error and the warning that speak to users."""

import sys
import warnings


class InputError(ValueError):
    """A mistake in what the user gave: an argument, a file or a flag.

    Its text is one sentence that names the input and the remedy. Commands print that sentence alone and end with a
    status above zero; every other exception is a fault of this program and keeps its traceback.
    """


class InputWarning(UserWarning):
    """Something about the user's input that this program had to assume or leave out, and how to say it better.

    Its text is one sentence. Commands collect these and write them into their results.
    """


def warn(message: str) -> None:
    """Issues an `InputWarning` at the line of the caller's caller that lies outside of this package."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, InputWarning, stacklevel=level)
