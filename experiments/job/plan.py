"""What a run works on, read and checked before anything long: model, images, boxes, a finished quantized model."""

import dataclasses
import functools
import hashlib
import json
import re
import struct
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

import ahcptq_jax
from ahcptq_jax.runtime.quantized import Quantized
from ahcptq_jax.transforms.harder import make_harder
from experiments import coco
from experiments.job.options import FLOAT, MOST_SCENES, Options
from experiments.scenes.scenes import CALIB_SEED, EVAL_SEED, Scene, scene_dataset, to_coco
from sam_flax import load_sam
from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.sam import Params, Sam

Calibration = list[tuple[np.ndarray, np.ndarray]]

# A generated scene is never larger than this: its shapes hold no finer detail.
MAX_SCENE_SIZE = 320
# Of the stream of scenes for calibration, those from here on are held back for `--scenes=train`, as many as a run may
# evaluate on; scenes for calibration go on behind them, so that no seed calibrates on what is evaluated.
HELD_BACK_START = 1_000_000
HELD_BACK_END = HELD_BACK_START + MOST_SCENES
# Arguments of `load_sam` that a sentence may name; on the command line they are flags.
_ARGUMENTS = re.compile(r"(?<![\w*-])(decoder_num_heads|img_size|global_attn_indexes|pixel_mean|pixel_std)\b")


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a run reads.

    Attributes:
        sam: the module.
        params: its parameters, made harder if that was asked for.
        dataset: the images to evaluate on.
        boxes: their prompts.
        saved: the quantized model that was given; None if one is to be made.
        calib: the images to calibrate on, [(uint8 (H, W, 3), float (N, 4) xyxy)]; empty if nothing is calibrated.
        model_id: a digest of the parameters.
    """

    sam: Sam
    params: Params
    dataset: coco.CocoDataset
    boxes: coco.BoxSet
    saved: Quantized | None
    calib: Calibration

    @functools.cached_property
    def model_id(self) -> str:
        return fingerprint([np.asarray(leaf) for leaf in jax.tree.leaves(self.params)])

    @property
    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def notes(self, options: Options) -> list[str]:
        """Sentences for the report about what was repaired, left out or is unusual."""
        notes = [*self.dataset.notes(), *self.boxes.notes]
        if self.calib and options.images and not options.calib_images:
            notes.append(
                "calibrated on generated scenes but evaluated on photographs; for theirs, give --calib_images and "
                "--calib_annotations."
            )
        return notes

    def headline(self, options: Options) -> str:
        """What the run works on, in a line."""
        line = (
            f"{options.checkpoint}: {self.parameter_count:,} parameters; evaluation on {len(self.dataset.items)} "
            f"{_origin(options.images)} with {len(self.boxes)} boxes"
        )
        return line + (f"; calibration on {len(self.calib)} {_origin(options.calib_images)}." if self.calib else ".")


def read_inputs(options: Options, bars: bool = True) -> Inputs:
    """Reads and checks every input of a run.

    Args:
        options: the run.
        bars: shows a bar while image files are checked.

    Raises:
        InputError, FileNotFoundError: if an input is unusable.
    """
    sam, params = load_model(options)
    dataset = evaluation_set(options, sam.config)
    boxes = coco.load_boxes(options.boxes, dataset)
    saved = _load_artefact(options.artefact, sam.config) if options.artefact else None
    calib = calibration_set(options, sam.config) if options.method != FLOAT and saved is None else []
    _check_images(dataset, bars)
    return Inputs(sam, params, dataset, boxes, saved, calib)


def load_model(options: Options) -> tuple[Sam, Params]:
    """The SAM of `--checkpoint` as the other flags describe it, made harder if that was asked for.

    Raises:
        InputError, FileNotFoundError: if the file is unusable.
    """
    try:
        sam, params = load_sam(options.checkpoint, **options.known_of_checkpoint())
    except InputError as error:
        raise InputError(as_flags(str(error))) from error
    return sam, make_harder(params, sam.config, options.harder, way=options.harder_way)


def as_flags(sentence: str) -> str:
    """A sentence that names arguments of `load_sam`, for users of the command line."""
    return _ARGUMENTS.sub(r"--\1", sentence)


def _load_artefact(path: str, config: SamConfig) -> Quantized:
    if _file_format(path) == "sam_flax":
        raise InputError(f"--artefact={path} is a floating-point SAM; give it with --checkpoint.")
    return ahcptq_jax.load(path, config)


def _file_format(path: str) -> str | None:
    """Which package of ours says that it wrote a safetensors file; None for all other files."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < 2**27 else {}
        return header["__metadata__"]["format"]
    except (OSError, ValueError, struct.error, KeyError, TypeError, RecursionError):
        return None


def evaluation_set(options: Options, config: SegmenterConfig) -> coco.CocoDataset:
    """The images to evaluate on: a COCO folder, or generated scenes that no training has seen."""
    limit = options.limit or None
    if options.images:
        return coco.load_coco(options.images, options.annotations, limit)
    count = min(options.num_scenes, limit or options.num_scenes)
    stream, start = (EVAL_SEED, 0) if options.scenes == "val" else (CALIB_SEED, HELD_BACK_START)
    return _scenes_as_coco(stream, count, _scene_size(config), start)


@functools.lru_cache(maxsize=1)
def _scenes_as_coco(stream: int, count: int, size: int, start: int) -> coco.CocoDataset:
    """Kept, since drawing scenes takes a sweep's run a tenth of its time."""
    return coco.CocoDataset.from_memory(*to_coco(scene_dataset(stream, count, size, start=start)))


def calibration_set(options: Options, config: SamConfig) -> Calibration:
    """`num_calib` images with their annotated boxes, chosen by seed.

    Returns:
        [(uint8 (H, W, 3), float (N, 4) xyxy)], images without a usable box left out.

    Raises:
        InputError: if there are fewer usable images than asked for.
    """
    if not options.calib_images:
        scenes = _calibration_scenes(options.seed * options.num_calib, options.num_calib, _scene_size(config))
        return [(scene.image, scene.boxes) for scene in scenes]
    dataset = coco.load_coco(
        options.calib_images,
        options.calib_annotations,
        images_flag="--calib_images",
        annotations_flag="--calib_annotations",
        require_masks=False,
    )
    boxes = coco.annotated_boxes(dataset).per_image
    usable = [item for item in dataset.items if len(boxes[item.image_id])]
    if len(usable) < options.num_calib:
        raise InputError(
            f"{dataset.source} has {len(usable)} images with a usable box but --num_calib={options.num_calib}; "
            "lower --num_calib or give more images."
        )
    chosen = np.random.default_rng(options.seed).permutation(len(usable))[: options.num_calib]
    items = [usable[i] for i in sorted(chosen)]
    return [(image, boxes[item.image_id].boxes) for item, image in coco.stream_images(dataset, items)]


def _calibration_scenes(first: int, count: int, size: int) -> Iterator[Scene]:
    """Scenes `first` to `first + count - 1` for calibration, counted without those that are held back."""
    before = range(first, min(first + count, HELD_BACK_START))
    yield from scene_dataset(CALIB_SEED, len(before), size, start=first)
    skipped = HELD_BACK_END - HELD_BACK_START
    yield from scene_dataset(CALIB_SEED, count - len(before), size, start=first + len(before) + skipped)


def _scene_size(config: SegmenterConfig) -> int:
    return min(config.img_size, MAX_SCENE_SIZE)


def _check_images(dataset: coco.CocoDataset, bars: bool) -> None:
    """Decodes every image file once, so that a damaged one shows now and not after hours."""
    files = [item for item in dataset.items if item.path is not None]
    images = coco.stream_images(dataset, files)
    for _ in tqdm(images, desc="check images", total=len(files), disable=not (files and bars), mininterval=1):
        pass


def _origin(folder: str) -> str:
    return f"images of {folder}" if folder else "generated scenes"


def fingerprint(arrays: list[np.ndarray]) -> str:
    """A digest of arrays with their types and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
