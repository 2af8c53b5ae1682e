"""Files that are written whole or not at all, by any number of processes at a time."""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves behind is not found there
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]
# A part file this old, in seconds, that nobody has locked was left by a killed process. A writer locks its part at
# once; the time only covers the moment between its creation and its lock.
ABANDONED_AFTER = 60.0
_REMEDIES = {
    errno.ENOSPC: "make room on that disk or choose a folder on another one",
    errno.EDQUOT: "your quota of that disk is used up: make room there or choose a folder on another one",
    errno.EFBIG: "files of this size are not allowed there: choose a folder on another disk or raise the limit",
    errno.EROFS: "that disk can only be read: choose a folder on another one",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EISDIR: "that is a folder: choose another name",
    errno.ENOTDIR: "one of its folders is a file: choose another path",
    errno.EEXIST: "one of its folders is a file: choose another path",
    errno.ENOENT: "make its folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_whole(path: PathLike, chunks: Iterable[bytes | memoryview], *, remedy: str | None = None) -> None:
    """Writes chunks of bytes one after the other as one file; see `whole_file`."""
    with whole_file(path, remedy=remedy) as file:
        for chunk in chunks:
            file.write(chunk)


@contextlib.contextmanager
def whole_file(path: PathLike, *, remedy: str | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which stands at `path` once the block has ended without an error, and not before.

    A reader, or a process killed meanwhile, finds the old file or the whole new one. Each writer has a part file of its
    own beside `path`, so that of two that write at once the later one wins; parts that killed processes left are
    removed. The new file has the permissions that any new file of this process would have.

    Args:
        path: the file to write; an existing one is replaced.
        remedy: what the user should do where the file cannot be written, if that is known better than here: the end of
            a sentence, without a full stop.

    Raises:
        OSError: of the same class as the system's, if the file cannot be written; one sentence with path and remedy.
            What stood at `path` is then still there, and the part is gone.
    """
    path = Path(path)
    part: Path | None = None
    try:
        _remove_abandoned_parts(path)
        part = path.with_name(f"{_part_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.part")
        # 0o666 less the process's umask, as `open` would give it.
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        # Buffered: after a short write it goes on until all bytes are written or the system refuses.
        with cast(BinaryIO, os.fdopen(descriptor, "w+b")) as file:
            _lock(descriptor)
            yield file
            file.flush()
            os.fsync(descriptor)
            os.utime(part)  # young once more, for the moment between its lock's end and its new name
        os.replace(part, path)
    except OSError as error:
        if error.filename is not None and part is not None and os.fspath(error.filename) != os.fspath(part):
            raise  # something else that the block opened
        raise unwritable(path, error, remedy) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):  # it is not there, once it has its name
                part.unlink()


def make_folder(path: PathLike, *, remedy: str | None = None) -> Path:
    """Makes a folder with its parents, unless it is there.

    Raises:
        OSError: if it cannot be made; one sentence with path and remedy.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error, remedy) from error
    return path


def unwritable(path: PathLike, error: OSError, remedy: str | None = None) -> OSError:
    """The error to raise where writing to `path` failed with `error`: of its class, one sentence with the remedy."""
    if remedy is None:
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
    reason = error.strerror or str(error) or type(error).__name__
    told = type(error)(f"{printable_path(path)} cannot be written ({reason}): {remedy}.")
    told.errno = error.errno
    return told


def printable_path(path: PathLike) -> str:
    """A path as text that every terminal and file can hold: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _part_prefix(path: Path) -> str:
    # Cut, so that the name of the part is allowed wherever the name of the file is.
    return f".{os.fsdecode(os.fsencode(path.name)[:160])}."


def _lock(descriptor: int) -> bool:
    """Locks a part file for as long as it is open; False if another process holds it, or files cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where parts of killed processes stay
        return False
    return True


def _remove_abandoned_parts(path: Path) -> None:
    """Removes what killed processes left of this file."""
    prefix = _part_prefix(path)
    try:
        names = os.listdir(path.parent)
    except OSError:  # a folder that may be written to but not listed
        return
    for name in names:
        if not (name.startswith(prefix) and name.endswith(".part")):
            continue
        with contextlib.suppress(OSError):
            part = path.with_name(name)
            if time.time() - part.stat().st_mtime < ABANDONED_AFTER:
                continue
            descriptor = os.open(part, os.O_RDWR)
            try:
                if _lock(descriptor):
                    part.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
