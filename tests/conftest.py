"""What several test files share: stored numbers of the official functions, and a tiny SAM."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import tests.type_checker

# Shapes and types in the signatures of these modules are checked whenever tests run. The others take what users give,
# and check it themselves. The hook stands before the imports that it is for.
CHECKED = ("layers", "convolutions", "encoders", "heads", "sam", "segmenter", "preprocessing")
jaxtyping.install_import_hook([f"sam_flax.{name}" for name in CHECKED], "beartype.beartype")
# (Not what refuses users' mistakes itself, which is `formats` and configurations, and not the packed weights, which JAX
# rebuilds with leaves of any type.)
CHECKED_QUANTIZATION = (
    "architectures",
    "calibration",
    "devices",
    "methods",
    *("quantizers." + name for name in ("base", "cost", "grouped", "hybrid", "kinds", "log2", "searches", "uniform")),
    "recipe",
    *("reconstruction." + name for name in ("adaround", "drops", "fit", "folder", "learning", "objectives")),
    *("reconstruction." + name for name in ("regrouping", "together", "units")),
    "runtime",
    "transforms",
)
jaxtyping.install_import_hook(
    [f"ahcptq_jax.{name}" for name in CHECKED_QUANTIZATION], f"{tests.type_checker.__name__}.check"
)

from sam_flax import SamConfig
from sam_flax.encoders import vit
from sam_flax.files.convert import convert
from sam_flax.sam import Params

# Compiled programs are kept, for a repeated run and for the processes that tests start.
_CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
_CACHE_FROM_SECONDS = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(_CACHE_FROM_SECONDS))
# Full float32 products, on accelerators too: the references were computed so.
jax.config.update("jax_default_matmul_precision", "highest")

# What JAX keeps of its programs makes every collection long: rarer ones save a twentieth of three files' time.
gc.set_threshold(100_000, 50, 100)

DATA = Path(__file__).parent / "data"
# The files that take longest: a worker that began one of them last would keep all others waiting.
LONGEST = (
    "test_main",
    "test_quantize",
    "test_reconstruct",
    "test_devices",
    "test_artefact",
    "test_export",
    "test_integer",
)
Arrays = dict[str, np.ndarray]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, for `--dist loadfile --no-loadscope-reorder`."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of stored arrays."""
    return DATA


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    """Reads `data/<name>.npz` into a dict."""

    def read(name: str) -> Arrays:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def sam_tiny_io(golden: Callable[[str], Arrays]) -> Arrays:
    """Inputs and outputs of the official code for `sam_tiny`."""
    return golden("sam_tiny_io_s0")


@pytest.fixture(scope="session")
def sam_tiny(golden: Callable[[str], Arrays]) -> tuple[SamConfig, Params]:
    """Configuration and parameters of a SAM of four blocks, two windowed and two global, on 8x8 tokens."""
    config, params = convert(golden("sam_tiny_weights_s0"), decoder_num_heads=4)
    return config, jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture
def positions_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative positions as the official code multiplies them, for counts of operations.

    Ours takes the whole table for every query and drops half of the products, which is faster and does not count.
    """

    def relative_scores(q: jax.Array, table: jax.Array) -> jax.Array:
        n = q.shape[-2]
        offsets = np.arange(n)[:, None] - np.arange(n)[None, :] + n - 1
        return jnp.einsum("...ic,ijc->...ij", q, table[offsets])

    monkeypatch.setattr(vit, "relative_scores", relative_scores)
