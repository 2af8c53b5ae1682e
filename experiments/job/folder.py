"""The folder that a run writes to: whether it can, and that it is the only one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sam_flax.errors import InputError
from sam_flax.files.writing import make_folder, printable_path

try:
    import fcntl
except ImportError:  # Windows, where two runs into one folder are not found
    fcntl = None  # type: ignore[assignment]


# Of opening a lock whose folder comes and goes. Two processes that took one without rest met once in 300 times.
_MOST_ATTEMPTS = 100


class FolderTaken(InputError):
    """Another process writes to the folder."""


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError if nothing can be written to the folder that a flag names; leaves nothing behind."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            f"{flag}={printable_path(folder)} cannot be written ({error.strerror}); choose a writable folder."
        ) from error


@contextlib.contextmanager
def claimed(folder: Path, flag: str) -> Iterator[None]:
    """Keeps other runs out of a folder until the block ends or the process dies.

    What stands in `<folder>/partial` serves a run that was killed; two at once would write over one another's. Folders
    that are made here and stay empty are removed again.

    Raises:
        FolderTaken: if another process has the folder.
    """
    partial = folder / "partial"
    made = [path for path in (partial, folder, *folder.parents) if not path.exists()]
    lock = partial / ".lock"
    descriptor = _take(lock, folder, flag)
    try:
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            partial.rmdir()  # if nothing is left that a later run could go on from
        for path in made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Keeps other processes out of a block that reads a file and writes it anew; they wait for its end.

    The lock is a file beside it, which stays: one that is removed can be locked by two. Where files cannot be locked,
    nobody waits.
    """
    if fcntl is None:
        yield
        return
    make_folder(file.parent)
    descriptor = os.open(file.parent / f".{file.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _opened(lock: Path) -> int:
    """The file of a lock, made with its folder, which another process may remove at any moment as it gives it back."""
    for attempt in range(_MOST_ATTEMPTS):
        try:
            make_folder(lock.parent)
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):
            if attempt + 1 == _MOST_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _take(lock: Path, folder: Path, flag: str) -> int | None:
    """The open file whose lock this process holds; None where files cannot be locked."""
    if fcntl is None:
        make_folder(lock.parent)
    while fcntl is not None:
        descriptor = _opened(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FolderTaken(
                f"Another run is writing to {flag}={printable_path(folder)}; wait for its end, or choose "
                "another folder."
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        # Its holder removed it between our opening and our lock.
        os.close(descriptor)
    return None
