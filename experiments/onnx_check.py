"""Compares the masks of exported ONNX files, run by ONNX Runtime, with those of the quantized model that they are of.

    python -m experiments.onnx_check --artefact=runs/w4a4/quantized.safetensors --num_scenes=40

Two comparisons on the evaluation images, prompted with their annotated boxes: from the image to the masks, and of the
decoder alone, on the features that ONNX Runtime's encoder made. The first shows how far a different last bit goes: sums
in another order move a code in a hundred thousand, each of which moves others in the next block. The second shows
whether the file computes what the model computes.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import ahcptq_jax
from ahcptq_jax import Quantized
from ahcptq_jax.command import finish, launch, use_compilation_cache
from ahcptq_jax.flags import define_flags, values
from experiments import coco
from experiments.job.options import Options
from experiments.job.plan import evaluation_set
from sam_flax import SamPredictor, preprocessing
from sam_flax.encoders.hiera import Features
from sam_flax.errors import InputError

try:
    import onnxruntime

    from ahcptq_jax.formats.onnx import export_onnx
except (ImportError, InputError):  # an extra
    onnxruntime = export_onnx = None  # type: ignore[assignment]

CORNERS = (2.0, 3.0)  # labels of a box's two points
BOXES = 8  # on each image


@dataclasses.dataclass
class Agreement:
    """What was compared, summed over images; `ious` has an entry for each prompt.

    Attributes:
        ious: of both masks of a prompt, at the size of the image; 1 where both are empty.
        pixels, equal: of these masks.
        cells, equal_cells: of low-resolution masks, by both decoders on the same features.
        ours, theirs: seconds of an image and its prompts, for every image.
    """

    ious: list[float] = dataclasses.field(default_factory=list)
    pixels: int = 0
    equal: int = 0
    cells: int = 0
    equal_cells: int = 0
    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)


def _check_installed() -> None:
    if onnxruntime is None:
        raise InputError("This needs the packages onnx and onnxruntime; pip install 'ahcptq-jax[onnx]'.")


class Files:
    """`encoder.onnx` and `decoder.onnx` of a folder in ONNX Runtime, on its CPU provider.

    Raises:
        InputError: if ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path):
        _check_installed()
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in ("encoder", "decoder")
        )

    def encode(self, canvas: np.ndarray) -> dict[str, np.ndarray]:
        """A canvas (S, S, 3) -> the features by their names."""
        found = self.encoder.run(None, {"images": canvas[None].transpose(0, 3, 1, 2)})
        return dict(zip((output.name for output in self.encoder.get_outputs()), found, strict=True))

    def decode(self, features: dict[str, np.ndarray], boxes: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
        """Boxes (N, 4) in pixels of the canvas, on an image of `size`, (height, width) -> all outputs by name."""
        side = 4 * next(iter(features.values())).shape[-1]
        feeds = {
            **features,
            "point_coords": boxes.astype(np.float32).reshape(-1, 2, 2),
            "point_labels": np.tile(np.array([CORNERS], np.float32), (len(boxes), 1)),
            "mask_input": np.zeros((1, 1, side, side), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array(size, np.float32),
        }
        names = [output.name for output in self.decoder.get_outputs()]
        return dict(zip(names, self.decoder.run(None, feeds), strict=True))


def compare(quantized: Quantized, files: Files, image: np.ndarray, boxes: np.ndarray, found: Agreement) -> None:
    """Adds what one image (H, W, 3) with boxes (N, 4) in its pixels shows."""
    size = (image.shape[0], image.shape[1])
    begun = time.perf_counter()
    predictor = SamPredictor(quantized)
    predictor.set_image(image)
    own = predictor.predict_batch(boxes=boxes, multimask_output=False)[0][:, 0]
    found.ours.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    canvas, _ = preprocessing.prepare_image(image, quantized.config)
    moved = preprocessing.transform_of(quantized.config).apply_boxes(boxes, size)
    features = files.encode(canvas)
    given = files.decode(features, moved, size)
    theirs = given["masks"][:, 0] > quantized.config.mask_threshold
    found.theirs.append(time.perf_counter() - begun)

    both, either = (own & theirs).sum((1, 2)), (own | theirs).sum((1, 2))
    found.ious += np.where(either > 0, both / np.maximum(either, 1), 1.0).tolist()
    found.pixels, found.equal = found.pixels + own.size, found.equal + int((own == theirs).sum())

    last = [jnp.asarray(feature.transpose(0, 2, 3, 1)) for feature in features.values()]
    logits, _ = quantized.decode(Features(*last) if len(last) > 1 else last[0], None, jnp.asarray(moved), None, True)
    # All masks but the first, which a family may choose among by its own rule.
    cells = (np.asarray(logits) > 0) == (given["low_res_masks"][:, 1:] > 0)
    found.cells, found.equal_cells = found.cells + cells.size, found.equal_cells + int(cells.sum())


def report(found: Agreement) -> str:
    """The figures as lines."""
    whole, decoder = found.equal / found.pixels, found.equal_cells / found.cells
    lines = [
        f"{len(found.ours)} images, {BOXES} boxes each",
        f"from image to mask: mean IoU {np.mean(found.ious):.4f}, {whole:.5f} of the pixels equal",
        f"decoder alone, on the same features: {decoder:.6f} of the low-resolution pixels equal",
    ]
    if len(found.ours) > 1:
        ours, theirs = (np.median(seconds[1:]) for seconds in (found.ours, found.theirs))
        lines.append(f"seconds an image, median without the first: {ours:.3f} here, {theirs:.3f} in ONNX Runtime")
    return "\n".join(lines)


def check(quantized: Quantized, options: Options) -> Agreement:
    """Exports the model to a temporary folder and compares it on the evaluation images."""
    _check_installed()
    dataset, found = evaluation_set(options, quantized.config), Agreement()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(quantized, folder)
        files = Files(Path(folder))
        for image, boxes in coco.prompted_images(dataset, BOXES, "compare"):
            compare(quantized, files, image, boxes, found)
    return found


def main(argv: list[str]) -> int:
    return finish(argv, _command)


def _command() -> int:
    options = Options(**values(Options))
    if not options.artefact:
        raise InputError("--artefact is missing; give a quantized model, such as runs/w4a4/quantized.safetensors.")
    print(report(check(ahcptq_jax.load(options.artefact), options)))
    return 0


def cli() -> None:
    """What `python -m experiments.onnx_check` runs."""
    define_flags(Options, only=("artefact", "images", "annotations", "num_scenes", "limit"))
    use_compilation_cache()
    launch(main)


if __name__ == "__main__":
    cli()
