"""The error that speaks to users."""


class InputError(ValueError):
    """A mistake in what the user gave: an argument, a file or a flag.

    Its text is one sentence that names the input and the remedy. Commands print that sentence alone and end with a
    status above zero; every other exception is a fault of this program and keeps its traceback.
    """
