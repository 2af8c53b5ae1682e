"""Training batches for MINI: generated scenes, cached once, and optional crops of COCO photographs.

Every batch is a pure function of (seed, step), so a resumed run sees what the uninterrupted one would have seen.
"""

import dataclasses
import json
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from experiments.coco.masks import run_lengths
from experiments.mini.losses import Batch
from experiments.scenes.scenes import TRAIN_SEED, make_scene
from sam_flax.config import SamConfig


@dataclasses.dataclass(frozen=True)
class ScenePool:
    """Generated scenes as two memory-mapped arrays; `labels` is 0 for background, i for object i."""

    images: np.ndarray  # (N, S, S, 3) uint8
    labels: np.ndarray  # (N, S, S) uint8


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One photograph at training resolution with its segments (which may overlap)."""

    image: np.ndarray  # (H, W, 3) uint8
    segments: np.ndarray  # (N, H, W) uint8, 0 or 1


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    batch: int = 6
    prompts: int = 6
    point_share: float = 0.2
    mask_share: float = 0.1
    exact_box_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the images of a batch are."""

    photo_share: float = 0.0  # photographs instead of scenes, where there are any
    mosaic_share: float = 0.0  # images made of four at half the size, whose objects are as small as photographs' are
    min_photo_area: float = 0.003  # least share of the image of a photograph's segment


def _scene_arrays(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    scene = make_scene(TRAIN_SEED, index, size)
    order = np.arange(1, len(scene.masks) + 1, dtype=np.uint8)[:, None, None]
    return scene.image, (scene.masks * order).max(axis=0)


def scene_pool(cache: Path, count: int, size: int) -> ScenePool:
    """Generates `count` training scenes of side `size` once, and maps them from `cache` afterwards."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = [cache / f"{name}_{count}_{size}.npy" for name in ("images", "labels")]
    if not all(path.exists() for path in paths):
        images = np.empty((count, size, size, 3), np.uint8)
        labels = np.empty((count, size, size), np.uint8)
        # Spawned, because a fork of a process that runs JAX's threads can deadlock.
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            made = pool.map(partial(_scene_arrays, size=size), range(count), chunksize=64)
            for i, (image, label) in enumerate(tqdm(made, total=count, desc="scenes", mininterval=5)):
                images[i], labels[i] = image, label
        for path, array in zip(paths, (images, labels), strict=True):
            partial_path = path.with_suffix(".partial")
            with partial_path.open("wb") as file:
                np.save(file, array)
            partial_path.replace(path)
    return ScenePool(*(np.load(path, mmap_mode="r") for path in paths))


def load_photographs(images: Path, segments: Path, size: int) -> list[Photograph]:
    """Reads a COCO folder at `size` pixels on the long side.

    Raises:
        FileNotFoundError: if the folder or the annotation file is missing.
    """
    for path in (images, segments):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a COCO image folder and its annotation JSON.")
    document = json.loads(segments.read_text())
    by_image: dict[int, list[dict]] = {}
    for annotation in document["annotations"]:
        if not annotation.get("iscrowd"):
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    photographs = []
    for record in tqdm(document["images"], desc="photographs", mininterval=5):
        pixels = cv2.imread(str(images / record["file_name"]), cv2.IMREAD_COLOR)
        if pixels is None:
            raise FileNotFoundError(f"{images / record['file_name']} is missing or unreadable; restore the image.")
        scale = size / max(pixels.shape[:2])
        width, height = (round(n * scale) for n in (pixels.shape[1], pixels.shape[0]))
        image = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)[..., ::-1]
        masks = []
        for annotation in by_image.get(record["id"], []):
            rle = run_lengths(annotation["segmentation"], record["width"], record["height"])
            mask = cv2.resize(mask_utils.decode(rle), (width, height), interpolation=cv2.INTER_AREA)
            if mask.any():
                masks.append(mask)
        if masks:
            photographs.append(Photograph(np.ascontiguousarray(image), np.stack(masks)))
    return photographs


Sample = tuple[np.ndarray, list[np.ndarray]]  # image (S, S, 3) uint8, masks (S, S) uint8 0/1


def _sample_scene(rng: np.random.Generator, pool: ScenePool) -> Sample:
    index = int(rng.integers(len(pool.images)))
    image, label = np.array(pool.images[index]), np.array(pool.labels[index])
    image, label = _dihedral(rng, image, label)
    image = image[..., rng.permutation(3)]
    if rng.random() < 0.3:
        image = 255 - image
    return image, [(label == i).astype(np.uint8) for i in range(1, int(label.max()) + 1) if (label == i).any()]


def _dihedral(rng: np.random.Generator, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    image, label = np.rot90(image, turns), np.rot90(label, turns)
    if flip:
        image, label = image[:, ::-1], label[:, ::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(label)


def _sample_photograph(
    rng: np.random.Generator, photographs: list[Photograph], size: int, pad: int, min_area: float
) -> Sample:
    """A random crop (or the whole photograph), letterboxed at the top left as SAM does; `pad` fills the rest."""
    photo = photographs[int(rng.integers(len(photographs)))]
    height, width = photo.image.shape[:2]
    share = 1.0 if rng.random() < 0.4 else float(rng.uniform(0.35, 1.0))
    aspect = float(np.exp(rng.uniform(-0.2, 0.2)))
    ch, cw = (int(min(n, max(32, n * share * a))) for n, a in ((height, aspect), (width, 1 / aspect)))
    top, left = int(rng.integers(height - ch + 1)), int(rng.integers(width - cw + 1))
    scale = size / max(ch, cw)
    target = (max(1, round(cw * scale)), max(1, round(ch * scale)))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)

    def crop(array: np.ndarray, method: int) -> np.ndarray:
        return cv2.resize(array[top : top + ch, left : left + cw][:, flip], target, interpolation=method)

    image = np.full((size, size, 3), pad, np.uint8)
    image[: target[1], : target[0]] = crop(np.ascontiguousarray(photo.image), shrink)
    masks = []
    for segment in photo.segments:
        if segment.mean() < min_area:
            continue
        mask = np.zeros((size, size), np.uint8)
        mask[: target[1], : target[0]] = crop(segment, cv2.INTER_NEAREST)
        if mask.any() and mask.mean() >= min_area:
            masks.append(mask)
    gain, offset = rng.uniform(0.7, 1.3, 3), rng.uniform(-25, 25)
    inside = image[: target[1], : target[0]]
    inside[:] = np.clip(inside * gain + offset, 0, 255).astype(np.uint8)
    return image, masks


def _mosaic(samples: list[Sample], size: int) -> Sample:
    """Four images at half the size, one in each quarter."""
    half = size // 2
    image = np.empty((size, size, 3), np.uint8)
    masks = []
    for quarter, (part, part_masks) in enumerate(samples):
        rows = slice(half * (quarter // 2), half * (quarter // 2) + half)
        cols = slice(half * (quarter % 2), half * (quarter % 2) + half)
        image[rows, cols] = cv2.resize(part, (half, half), interpolation=cv2.INTER_AREA)
        for part_mask in part_masks:
            small = cv2.resize(255 * part_mask, (half, half), interpolation=cv2.INTER_AREA) > 127
            if small.any():
                mask = np.zeros((size, size), np.uint8)
                mask[rows, cols] = small
                masks.append(mask)
    return image, masks


def _interior_point(rng: np.random.Generator, mask: np.ndarray) -> tuple[float, float]:
    """A point well inside the mask: drawn among the pixels at least half as deep as the deepest."""
    depth = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    ys, xs = np.nonzero(depth >= 0.5 * depth.max())
    pick = int(rng.integers(len(xs)))
    return float(xs[pick]), float(ys[pick])


def make_batch(
    step: int,
    seed: int,
    config: SamConfig,
    settings: BatchSettings,
    mixture: Mixture,
    pool: ScenePool,
    photographs: list[Photograph],
) -> Batch:
    """The training batch of one step."""
    rng = np.random.default_rng([seed, step])
    size, g, m = config.img_size, config.grid, config.mask_size
    b, p = settings.batch, settings.prompts
    images = np.zeros((b, size, size, 3), np.uint8)
    masks = np.zeros((b, p, m, m), np.uint8)
    boxes = np.tile(np.array([0, 0, size, size], np.float32), (b, p, 1))
    points = np.zeros((b, p, 2), np.float32)
    weight = np.zeros((b, p), np.float32)
    pad = int(round(float(np.mean(config.pixel_mean))))

    def sample() -> Sample:
        if photographs and rng.random() < mixture.photo_share:
            return _sample_photograph(rng, photographs, size, pad, mixture.min_photo_area)
        return _sample_scene(rng, pool)

    for i in range(b):
        if mixture.mosaic_share and rng.random() < mixture.mosaic_share:
            images[i], candidates = _mosaic([sample() for _ in range(4)], size)
        else:
            images[i], candidates = sample()
        for j, k in enumerate(rng.permutation(len(candidates))[:p]):
            mask = candidates[k]
            ys, xs = np.nonzero(mask)
            box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
            if rng.random() >= settings.exact_box_share:
                extent = np.tile(box[2:] - box[:2], 2)
                box = box + rng.normal(0, 0.05, 4).clip(-0.1, 0.1) * extent
            boxes[i, j] = np.clip(box, 0, size)
            points[i, j] = _interior_point(rng, mask)
            coverage = mask.reshape(m, size // m, m, size // m).mean(axis=(1, 3))
            masks[i, j] = np.round(255 * coverage)
            weight[i, j] = 1.0
    noise = rng.normal(size=(b, p, g, g)).astype(np.float32)
    is_point, has_mask = rng.random((b, p)) < settings.point_share, rng.random((b, p)) < settings.mask_share
    return Batch(images, masks, boxes, points, is_point, noise, has_mask, weight)  # type: ignore[arg-type]


def prefetch(make: Callable[[int], Batch], start: int, stop: int, depth: int = 4) -> Iterator[tuple[int, Batch]]:
    """Yields (step, make(step)) for step in start..stop-1, made ahead by one thread."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        for step in range(start, stop):
            try:
                item: object = make(step)
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if closed.is_set() or isinstance(item, BaseException):
                return

    threading.Thread(target=produce, daemon=True).start()
    try:
        for step in range(start, stop):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield step, item
    finally:
        closed.set()
