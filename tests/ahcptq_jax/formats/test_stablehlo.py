"""Exported programs run where there is neither flax nor this package, with the same results."""

import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.export
import jaxtyping
import numpy as np
import pytest

from ahcptq_jax.formats import stablehlo

# Refuses what a machine without the package and its other dependencies would not have.
ELSEWHERE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "sam_flax", "ahcptq_jax", "experiments", "optax", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from pathlib import Path
import jax, numpy as np
from jax import export

folder = Path(sys.argv[1])
given = np.load(folder / "given.npz")

def load(name):
    return jax.jit(export.deserialize(bytearray((folder / name).read_bytes())).call)

embeddings = load("encoder.jax")(given["canvas"])
decode = load("decoder.jax")
found = {"embeddings": embeddings}
for count in (1, 3):  # one program, any number of prompts
    found[f"logits{count}"], found[f"iou{count}"] = decode(embeddings, given["boxes"][:count])
found["points"], _ = load("points.jax")(embeddings, given["coords"], given["labels"])
np.savez(folder / "found.npz", **found)
"""


@pytest.fixture(scope="module", autouse=True)
def sizes_may_be_symbols() -> Iterator[None]:
    """Without the checks of types that only tests have: the number of prompts in an exported decoder is a symbol."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def folder(tiny_quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    stablehlo.export(tiny_quantized, folder)
    (folder / "points.jax").write_bytes(stablehlo.export_decoder(tiny_quantized, points=2, multimask_output=True))
    rng = np.random.default_rng(0)
    np.savez(
        folder / "given.npz",
        canvas=rng.normal(0, 1, (1, 128, 128, 3)).astype(np.float32),
        boxes=np.array([[10, 12, 70, 80], [30, 5, 90, 100], [2, 40, 60, 110]], np.float32),
        coords=rng.uniform(0, 128, (4, 2, 2)).astype(np.float32),
        labels=np.array([[1, 0], [1, -1], [1, 1], [0, 1]], np.int32),
    )
    return folder


def test_it_runs_elsewhere_with_the_same_results(tiny_quantized, folder):
    # -I: not even the current directory is searched for modules.
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "found.npz") as found, np.load(folder / "given.npz") as given:
        embeddings = tiny_quantized.encode_image(given["canvas"])
        np.testing.assert_array_equal(found["embeddings"], embeddings)
        logits, iou = (np.asarray(a) for a in tiny_quantized.decode(embeddings, None, given["boxes"], None, False))
        for count in (1, 3):
            # Float sums at the decoder's end are compiled for a number of prompts: their last bits may differ.
            wanted, largest = logits[:count], np.abs(logits).max()
            np.testing.assert_allclose(found[f"logits{count}"], wanted, rtol=0, atol=1e-6 * largest)
            np.testing.assert_allclose(found[f"iou{count}"], iou[:count], rtol=0, atol=1e-6)
        logits, _ = tiny_quantized.decode(embeddings, (given["coords"], given["labels"]), None, None, True)
        assert found["points"].shape == logits.shape == (4, 3, 32, 32)
        np.testing.assert_allclose(found["points"], logits, rtol=0, atol=1e-6 * np.abs(logits).max())


def test_weights_inside_are_packed(tiny_quantized, folder):
    text = jax.export.deserialize(bytearray((folder / "encoder.jax").read_bytes())).mlir_module()
    constants = re.findall(r"stablehlo.constant dense.*: tensor<([0-9x]+)x(\w+)>", text)
    for path, weight in tiny_quantized.weights.items():
        if path.startswith("image_encoder"):
            assert (str(weight.packed.size), "ui8") in constants, path
            assert ("x".join(map(str, weight.shape)), "f32") not in constants, path


def test_unusable_requests_are_refused(tiny_quantized):
    with pytest.raises(ValueError, match="points=-1"):
        stablehlo.export_decoder(tiny_quantized, points=-1)
