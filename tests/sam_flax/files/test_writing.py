"""Files are whole or absent: with many writers at once, full disks, short writes and killed processes."""

import errno
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sam_flax.files import writing
from sam_flax.files.writing import make_folder, printable_path, whole_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_and_replaced(tmp_path):
    path = tmp_path / "file"
    write_whole(path, [b"one ", memoryview(b"two")])
    assert path.read_bytes() == b"one two"
    write_whole(str(path), [])
    assert path.read_bytes() == b"" and names(tmp_path) == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # a moment with another mask is seen by every thread
        write_whole(tmp_path / "file", [b"x"])
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_nothing_is_seen_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_an_error_of_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"new")
        raise KeyError
    # What the block could not read is not blamed on the file that is written.
    with pytest.raises(FileNotFoundError, match="'absent'"), whole_file(path):
        open("absent")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_many_writers_of_one_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 200_000 for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_whole(path, [content[:70_000], content[70_000:]]), contents))
    assert path.read_bytes() in contents and names(tmp_path) == ["file"]


def test_two_processes_at_once(tmp_path):
    code = (
        "import sys; from sam_flax.files.writing import whole_file\n"
        "with whole_file(sys.argv[1]) as file:\n"
        "    file.write(sys.argv[2].encode()); file.flush(); print('open', flush=True); sys.stdin.readline()\n"
        "    file.write(b'.')\n"
    )
    path = tmp_path / "file"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), word], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for word in ("first", "second")
    ]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "open\n"
    assert len(names(tmp_path)) == 2
    for run, content in zip(runs, (b"first.", b"second."), strict=True):
        run.communicate("\n", timeout=60)
        assert run.returncode == 0 and path.read_bytes() == content
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [1_000_000, 4_096])
def test_short_writes_are_noticed(tmp_path, refused, size):
    """The system writes what still fits and says so; only the next write fails."""
    path = tmp_path / "file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 10, hard))
    try:
        refused(lambda: write_whole(path, [bytes(size)]), str(path), "File too large", "limit", error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "part"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "quota"), (errno.EROFS, "only be read"), (errno.EIO, "folder")],
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_disks_that_refuse(tmp_path, monkeypatch, refused, number, part, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args, **_kwargs):
        raise OSError(number, os.strerror(number), args[0] if call != "fsync" else None)

    monkeypatch.setattr(os, call, fail)
    message = refused(lambda: write_whole(path, [b"new"]), str(path), part, os.strerror(number), error=OSError)
    assert "Errno" not in message
    with pytest.raises(OSError, match="use --out") as caught:
        write_whole(path, [b"new"], remedy="use --out")
    assert caught.value.errno == number
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_places_for_no_file(tmp_path, refused):
    (tmp_path / "taken").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, error, part in (
        (tmp_path / "absent" / "file", FileNotFoundError, "make its folder"),
        (tmp_path / "taken" / "file", NotADirectoryError, "is a file"),
        (tmp_path / "folder", IsADirectoryError, "another name"),
        (tmp_path / ("x" * 300), OSError, "shorter name"),
    ):
        refused(lambda path=path: write_whole(path, [b"x"]), str(path), part, error=error)
    refused(lambda: make_folder(tmp_path / "taken" / "in"), "is a file", error=NotADirectoryError)
    refused(lambda: make_folder(tmp_path / "taken"), "is a file", error=FileExistsError)
    assert make_folder(tmp_path / "a" / "b").is_dir() and make_folder(tmp_path / "a").is_dir()
    assert names(tmp_path / "folder") == []


def test_longest_and_strangest_names(tmp_path):
    for name in ("x" * 255, os.fsdecode(b"caf\xe9\xff" * 20)):
        write_whole(tmp_path / name, [b"x"])
        assert (tmp_path / name).read_bytes() == b"x"
    assert printable_path(tmp_path / os.fsdecode(b"caf\xe9")).endswith("caf\\xe9")
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "absent" / os.fsdecode(b"caf\xe9"), [b"x"])
    assert str(caught.value).encode().startswith(os.fsencode(tmp_path))


def test_parts_of_killed_writers_go(tmp_path):
    """A part that nobody writes any more is removed by the next writer of the file; one that is written stays."""
    path, other = tmp_path / "file", tmp_path / ".other.1-0.part"
    long_ago = time.time() - 10 * writing.ABANDONED_AFTER
    left, young = tmp_path / ".file.1-0.part", tmp_path / ".file.2-0.part"
    for part in (left, young, other):
        part.write_bytes(b"half")
    for part in (left, other):
        os.utime(part, (long_ago, long_ago))
    with whole_file(path) as file:
        file.write(b"slow")
        file.flush()
        (own,) = set(tmp_path.glob(".file.*.part")) - {young, left}
        os.utime(own, (long_ago, long_ago))
        write_whole(path, [b"quick"])
        assert own.exists()
    assert path.read_bytes() == b"slow"
    assert names(tmp_path) == [young.name, other.name, "file"]
