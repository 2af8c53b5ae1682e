"""How commands end: one sentence for what the user can mend, the traceback for our own faults."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from ahcptq_jax import command
from ahcptq_jax.command import FAILED, INTERRUPTED, finish
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[3]
SMALL = "--checkpoint=mini-scenes"


def raising(error: BaseException) -> int:
    def work() -> int:
        raise error

    return finish(["x"], work, lambda: "all of it is kept.")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("--x=1 is wrong; give 2."), "Error: --x=1 is wrong; give 2.\n"),
        (FileNotFoundError("The file a does not exist: give another."), "Error: The file a does not exist: give"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "Error: /a/b cannot be used (No space left on",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "make room on that disk"),
        (PermissionError(errno.EACCES, "Permission denied", b"caf\xe9"), "caf\\xe9 cannot be used (Permission denied)"),
        (MemoryError(), "Error: memory ran out"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 bytes"), "Error: memory ran out"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == FAILED
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a shape of our own"), KeyError("x"), jax.errors.JaxRuntimeError("INTERNAL: x"), TypeError()]
)
def test_our_own_faults_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)


def test_an_interrupt_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "Interrupted; all of it is kept.\n"


def test_a_device_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", none)
    assert raising(AssertionError()) == FAILED
    told = capsys.readouterr().err
    assert "no device for JAX_PLATFORMS=cuda" in told and told.count("\n") == 1


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    # Whatever started the tests in the background may have had them ignore interrupts, which processes inherit.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)"
    )
    words = [sys.executable, "-c", script, "--method=fp", "--noblank", *arguments]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def wait_for(out: Path, images: int) -> None:
    """Waits until the run into `out` has finished so many images."""
    for _ in range(3000):
        files = list((out / "partial").glob("*.jsonl")) if out.exists() else []
        if files and len(files[0].read_text().splitlines()) > images:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not begin")


def test_two_runs_into_one_folder_and_an_interrupt(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start("--num_scenes=1000", SMALL, f"--out={out}")
    wait_for(out, 1)
    second = start("--num_scenes=1000", SMALL, f"--out={out}")
    _, told = second.communicate(timeout=300)
    assert second.returncode == FAILED and "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith(f"Error: Another run is writing to --out={out}")
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=300)
    assert first.returncode == INTERRUPTED and "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert last.endswith(f"what is done is kept in {out}/partial; give the same command again to go on from there.")
    (kept,) = (out / "partial").iterdir()
    assert len(kept.read_text().splitlines()) > 1


def test_closed_output_is_no_fault(tmp_path: Path) -> None:
    """The results are written, and no file of the run takes the place of standard error."""
    out = tmp_path / "out"
    words = f"{sys.executable} -m experiments.main --method=fp --noblank --num_scenes=1 {SMALL} --out={out} >&- 2>&-"
    done = subprocess.run(words, cwd=ROOT, shell=True, timeout=300)
    assert done.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["flags.txt", "log.jsonl", "report.html", "results.json"]


def test_streams_take_any_file_name(tmp_path: Path) -> None:
    script = "import os; from ahcptq_jax.command import open_closed_streams as o; o(); print(os.fsdecode(b'\\xe9'))"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, env=environment, check=True)
    assert done.stdout == b"\xe9\n"


def test_descriptions_end_with_a_remedy() -> None:
    for code in (errno.ENOENT, errno.EROFS, errno.EMFILE, errno.EIO):
        sentence = command.describe(OSError(code, os.strerror(code), "x"))
        assert sentence.startswith("x cannot be used (") and sentence.endswith(".") and ": " in sentence
