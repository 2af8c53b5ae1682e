"""A folder belongs to one run at a time, and nothing is left of a run that did nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.job.folder import check_writable, claimed
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from experiments.job.folder import claimed
with claimed(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="Another run is writing to --out="), claimed(out, "--out"):
        pass
    holder.kill()
    holder.wait()
    with claimed(out, "--out"), claimed(tmp_path / "other", "--out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"], "what the killed one made is not ours"


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b", "--out"):
        assert (tmp_path / "a" / "b" / "partial").is_dir()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "c", "--out"):
        (tmp_path / "c" / "partial" / "kept").touch()
    assert [p.name for p in (tmp_path / "c" / "partial").iterdir()] == ["kept"]
    with pytest.raises(RuntimeError), claimed(tmp_path / "d", "--out"):
        raise RuntimeError
    assert not (tmp_path / "d").exists()


def test_what_cannot_be_written_names_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--records=.*file/x cannot be written"):
        check_writable(tmp_path / "file" / "x", "--records")
    check_writable(tmp_path / "new" / "deep", "--out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
