"""How the commands of this package take their arguments and end: with 0, or with one sentence and 2."""

import sys
from collections.abc import Callable

import jax


def finish(argv: list[str], work: Callable[[], int]) -> int:
    """Does a command's work and returns its exit status.

    Args:
        argv: what absl left of the command line, the program's name first.
        work: returns the status; raises ValueError or OSError with a sentence for its user.

    Returns:
        The status of `work`; 2 after "Error: …" on stderr if it raised, memory ran out, or `argv` has something
        besides flags, like the 66 of `--bits 44 66`.
    """
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}; every option is a --flag.")
    try:
        return work()
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("memory ran out; free some, or ask for less, and give the command again.")


def _fail(sentence: str) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return 2
