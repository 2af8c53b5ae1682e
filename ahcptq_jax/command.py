"""How the commands of this project take their arguments and end: with 0, or with one sentence and a status above it."""

import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags

from ahcptq_jax.flags import with_flag_files
from sam_flax.errors import InputError, InputWarning
from sam_flax.files.writing import printable_path

FAILED = 2  # the status after "Error: …"
INTERRUPTED = 130  # as shells have it: 128 and the number of the signal
_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or choose a folder on another one",
    errno.EDQUOT: "your quota of that disk is used up: make room there, or choose a folder on another one",
    errno.EACCES: "give this user the right to it, or choose another path",
    errno.EROFS: "that disk can only be read: choose a folder on another one",
    errno.EMFILE: "too many files are open: raise the limit with ulimit -n",
}


def launch(
    main: Callable[[list[str]], int],
    arguments: Sequence[str] | None = None,
    read: Callable[[Sequence[str]], list[str]] = with_flag_files,
) -> NoReturn:
    """Reads the command line, with its flag files, and ends the process with the status of `main`.

    Args:
        main: takes what is left of the arguments, the program's name first; usually calls `finish`.
        arguments: the command line; `sys.argv` by default.
        read: puts the lines of flag files in their place; may raise `InputError`.
    """
    open_closed_streams()
    plain_format = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> str:
        # What this project warns of concerns the user's input, not a line of code.
        if issubclass(category, InputWarning):
            return f"Warning: {message}\n"
        return plain_format(message, category, *rest, **named)

    warnings.formatwarning = one_line

    def parse(words: Sequence[str]) -> list[str]:
        return parse_flags(words, read=read)

    app.run(main, argv=list(sys.argv if arguments is None else arguments), flags_parser=parse)
    raise AssertionError("app.run ends the process")


def parse_flags(
    words: Sequence[str],
    flag_values: flags.FlagValues = flags.FLAGS,
    read: Callable[[Sequence[str]], list[str]] = with_flag_files,
) -> list[str]:
    """Sets the flags of a command line and returns what is left of it; ends the process where that cannot be."""
    # absl shows INFO, at which JAX tells of every accelerator that is absent.
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        return flag_values(read(words))
    except InputError as error:
        sys.exit(_fail(str(error)))
    except flags.Error as error:
        sys.exit(_fail(f"{str(error).rstrip('.')}; --help lists all flags."))


def finish(argv: list[str], work: Callable[[], int], kept: Callable[[], str] | None = None) -> int:
    """Does a command's work and returns its exit status.

    Mistakes in what the user gave (`InputError`), files that cannot be read or written, memory that runs out and a
    device that JAX does not find end with one sentence on stderr; every other exception is a fault of this program
    and passes with its traceback.

    Args:
        argv: what absl left of the command line, the program's name first.
        work: returns the status.
        kept: a clause for the line after Ctrl-C that says what is kept and how to go on; nothing is kept by default.

    Returns:
        The status of `work`; 2 after "Error: …", also if `argv` has something besides flags, like the 66 of
        `--bits 44 66`; 130 after Ctrl-C.
    """
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}; every option is a --flag.")
    try:
        return work()
    except KeyboardInterrupt:
        _say(f"Interrupted; {'nothing is kept.' if kept is None else kept()}")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read this command's output, such as `head`, has gone: there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(describe(error))
    except Exception as error:
        sentence = _of_the_machine(error)
        if sentence is None:
            raise
        return _fail(sentence)


def describe(error: OSError) -> str:
    """One sentence for an error of the system; those that this project raises are sentences already."""
    if error.strerror is None:
        return str(error)
    what = " and ".join(printable_path(name) for name in (error.filename, error.filename2) if name) or "A file"
    return f"{what} cannot be used ({error.strerror}): {_REMEDIES.get(error.errno or 0, 'check the path')}."


def _of_the_machine(error: Exception) -> str | None:
    """A sentence if the error comes of too little memory or of a device that is not there."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "memory ran out; free some, or ask for less, and give the command again."
    try:
        jax.devices()
    except Exception as fault:
        # Some versions of JAX fail an assertion here, without a word.
        reason = " ".join(str(fault).split()).rstrip(".") or "its package for that device is not installed"
        asked = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"JAX finds no device for JAX_PLATFORMS={asked} ({reason}); unset JAX_PLATFORMS, or install JAX for that "
            "device (https://docs.jax.dev/en/latest/installation.html)."
        )
    return None


def open_closed_streams() -> None:
    """Gives a process that was started with closed output (`2>&-`) somewhere to write, and lets any file name pass.

    Without it the next file that is opened would be taken for standard error, and receive what libraries write there.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:
            with contextlib.suppress(AttributeError, ValueError):  # replaced by a test, or by a notebook
                stream.reconfigure(errors="surrogateescape")


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs of the command line, unless JAX is told otherwise."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ahcptq_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _fail(sentence: str) -> int:
    _say(f"Error: {sentence}")
    return FAILED


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)
