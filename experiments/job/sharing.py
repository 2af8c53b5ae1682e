"""Runs that several processes take in turn, on one machine or on hosts that share a folder, without a server.

A run is taken by the lock of a file of its own. The system gives a lock back when its holder dies, so that a dead
process loses its run alone: another takes it, and goes on from what it left. Locks reach other hosts where the shared
file system carries them (NFS 4 does, once it notices that a host is gone). One without locks is not for sharing: runs
would be done twice, and records of one host lost to another's.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from experiments.job.folder import FolderTaken, claimed

T = TypeVar("T")

WAIT_SECONDS = 5.0  # between looks at runs that others have


def in_turn(
    runs: Sequence[T],
    name: Callable[[T], str],
    folder: Path,
    is_done: Callable[[T], bool],
    do: Callable[[T], None],
    say: Callable[[str], None],
) -> None:
    """Does all runs that no other process does, and returns when all are done, by whomever.

    Args:
        runs: in the order in which they are tried.
        name: of a run, unique, as part of a file's name.
        folder: where the locks are; it is gone when nobody holds one.
        is_done: whether anybody has finished a run; asked again once its lock is held.
        do: does a run and makes `is_done` true of it.
        say: tells the user.

    Raises:
        whatever `do` raises: the run is then given back.
    """
    left, waiting = list(runs), False
    while left:
        before = len(left)
        for run in list(left):
            if not is_done(run):
                try:
                    with claimed(folder / name(run), "--out"):
                        if not is_done(run):
                            do(run)
                except FolderTaken:
                    continue
            left.remove(run)
        if len(left) == before:
            if not waiting:
                say(f"{len(left)} runs are under way in other processes; this one waits for them.")
                waiting = True
            time.sleep(WAIT_SECONDS)
