"""What the tests of weights share: a tiny SAM as the official code saved it, and how a file must be refused."""

# What zipfile and pickletools decode names with: importing them later would look like harm.
import encodings.ascii
import encodings.cp437
import encodings.raw_unicode_escape  # noqa: F401
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sam_flax.config import SamConfig
from sam_flax.errors import InputError
from sam_flax.files.convert import convert
from sam_flax.sam import Params

EXECUTION = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "exec",
    "compile",
}
watching: list[str] | None = None


def watch(event: str, _args) -> None:
    if watching is not None and event in EXECUTION:
        watching.append(event)


sys.addaudithook(watch)  # a hook stays for the life of the process; `watching` switches it


@pytest.fixture(scope="session")
def tiny_config() -> SamConfig:
    """The configuration of `tiny_state`."""
    return SamConfig(
        img_size=128,
        patch_size=16,
        embed_dim=64,
        depth=4,
        num_heads=4,
        window_size=3,
        global_attn_indexes=(1, 3),
        out_chans=32,
        mask_in_chans=8,
        decoder_num_heads=4,
        decoder_mlp_dim=64,
        iou_head_hidden_dim=32,
    )


@pytest.fixture(scope="session")
def tiny_state(golden) -> dict[str, np.ndarray]:
    """The state dict of an official SAM of four blocks."""
    return golden("sam_tiny_weights_s0")


@pytest.fixture(scope="session")
def tiny_pth(data_dir) -> Path:
    """`tiny_state` as torch.save wrote it."""
    return data_dir / "sam_tiny_s0.pth"


@pytest.fixture
def tiny_tree(tiny_state) -> tuple[SamConfig, Params]:
    """Configuration and NumPy parameters of `tiny_state`, made anew for every test."""
    return convert(tiny_state, decoder_num_heads=4)


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Checks that a call fails with one sentence that holds given parts, and returns it."""
    return _refused


@pytest.fixture(scope="session")
def survives() -> Callable[[Path, Callable], None]:
    """Checks that reading a file works or raises a plain InputError, and that nothing runs."""
    return _survives


@pytest.fixture(scope="session")
def damage() -> Callable[..., bytes]:
    """Flips bits of a file's content and cuts it."""
    return _damage


def _refused(call, *parts: str, error: type[Exception] = InputError) -> str:
    """The one sentence with which `call` fails, after checking that it holds `parts`."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error  # no subclass: not UnicodeDecodeError, not UnpicklingError
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 2500, message
    for part in parts:
        assert part in message, (part, message)
    return message


def _survives(path: Path, read) -> None:
    """`read` either works or raises a plain InputError, and nothing runs."""
    global watching
    watching = []
    try:
        read(path)
    except ValueError as error:
        assert type(error) is InputError and str(path) in str(error)
        assert "\n" not in str(error)
    finally:
        seen, watching = watching, None
    assert not seen


def _damage(content: bytes, changes, keep: float) -> bytes:
    damaged = bytearray(content)
    for position, mask in changes:
        damaged[position % len(damaged)] ^= mask
    return bytes(damaged[: int(len(damaged) * keep)])
