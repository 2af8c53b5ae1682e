"""The commands of the project, and the rooms of what they are made of."""

import sys
from types import TracebackType


def _interrupted_early(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows what ended the process; Ctrl-C while libraries are still being loaded takes one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted; nothing was begun.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Python's own name for a module that is looked up for `python -m`: a program that imports this keeps its own hook.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _interrupted_early
