"""All training images and their segments as a few arrays on the accelerator.

A slot of `side` x `side` pixels holds each image at its top left, with two levels of half the resolution each behind
it. A batch is then a gather (`augment`), and no host has to keep up with the accelerator.
"""

import dataclasses
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.folders import Record, read_photographs
from experiments.scenes.scenes import EVAL_SEED, TRAIN_SEED, make_scene

LEVELS = 3
# Held-out scenes of the curve; kept apart from the first EVAL_SEED scenes, which the product is judged on.
CURVE_SCENES_START = 100_000
SCENE, CURVE_SCENE, HELD = "scene", "curve_scene", "held"  # sources that no photograph may be named after
_CHUNK = 256  # images that go to the accelerator at once


class Atlas(NamedTuple):
    """N images with M segments. Coordinates are pixels of the images, x right and y down, the corner at 0."""

    pixels: jax.Array  # (N, side^2 + side^2/4 + side^2/16) uint32: 0xBBGGRR of every level
    bits: jax.Array  # (M, side^2/8) uint8: the segments in their slots, eight pixels a byte, the first one highest
    sizes: jax.Array  # (N, 2) float32 width, height
    boxes: jax.Array  # (M, 4) float32 xyxy
    first: jax.Array  # (N,) int32: the segments of image i are first[i] .. first[i] + counts[i] - 1
    counts: jax.Array  # (N,) int32, at least 1
    scene: jax.Array  # (N,) bool: generated


class Slot(NamedTuple):
    """One image of the atlas on the host."""

    pixels: np.ndarray  # (side, side, 3) uint8
    bits: np.ndarray  # (n, side^2/8) uint8
    size: tuple[int, int]  # width, height
    boxes: np.ndarray  # (n, 4) float32


@dataclasses.dataclass(frozen=True)
class AtlasSettings:
    """What an atlas holds.

    Attributes:
        side: of a slot, a multiple of 16.
        scenes: number of generated training scenes.
        curve_scenes: number of held-out ones.
        scene_size: their side in pixels, at most `side`.
        held_share: share of the photographs of held-back folders, chosen by `held_seed`, that is never trained on.
    """

    side: int = 352
    scenes: int = 6000
    curve_scenes: int = 64
    scene_size: int = 256
    held_share: float = 0.1
    held_seed: int = 0


def atlas_side(atlas: Atlas) -> int:
    """The side of its slots."""
    return round((8 * atlas.bits.shape[1]) ** 0.5)


def level_offset(side: int, level: int) -> int:
    """Where a level starts in `Atlas.pixels`."""
    return sum((side >> i) ** 2 for i in range(level))


def make_slot(image: np.ndarray, segments: np.ndarray, side: int) -> Slot:
    """A slot of an image (H, W, 3) and its segments (N, H, W), none of them empty."""
    height, width = image.shape[:2]
    below, right = side - height, side - width
    # Repeated edges: a coarse level may look past the image.
    pixels = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
    padded = np.pad(segments, ((0, 0), (0, below), (0, right)))
    boxes = np.zeros((len(segments), 4), np.float32)
    for box, segment in zip(boxes, segments, strict=True):
        ys, xs = np.flatnonzero(segment.any(1)), np.flatnonzero(segment.any(0))
        box[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return Slot(pixels, np.packbits(padded.reshape(len(segments), -1), axis=1), (width, height), boxes)


def _scene_slot(number: tuple[int, int], size: int, side: int) -> Slot:
    scene = make_scene(*number, size)
    return make_slot(scene.image, scene.masks, side)


def scene_slots(numbers: Sequence[tuple[int, int]], size: int, side: int, workers: int) -> Iterator[Slot]:
    """Generates the scenes (seed, index), in their order."""
    make = partial(_scene_slot, size=size, side=side)
    if workers < 2:
        yield from map(make, numbers)
        return
    # Spawned, because a fork of a process that runs JAX's threads can deadlock.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, numbers, chunksize=16)


def held_back(records: Sequence[Record], share: float, seed: int) -> np.ndarray:
    """Which records are kept for decisions: bool (N,)."""
    held = np.zeros(len(records), bool)
    held[np.random.default_rng(seed).permutation(len(records))[: round(share * len(records))]] = True
    return held


def build_atlas(
    divided: Sequence[Record], whole: Sequence[Record], settings: AtlasSettings, workers: int
) -> tuple[Atlas, tuple[str, ...]]:
    """Reads and generates everything.

    Args:
        divided: photographs of which a share is held back.
        whole: photographs that are all trained on.
        settings: the rest.
        workers: processes and threads.

    Returns:
        The atlas, and the source of each image: that of its record, after "held/" if it is held back.
    """
    held = held_back(divided, settings.held_share, settings.held_seed)
    names = [f"{HELD}/{r.source}" if h else r.source for r, h in zip(divided, held, strict=True)]
    names += [record.source for record in whole]
    numbers = [(TRAIN_SEED, i) for i in range(settings.scenes)]
    numbers += [(EVAL_SEED, CURVE_SCENES_START + i) for i in range(settings.curve_scenes)]
    names += [SCENE if seed == TRAIN_SEED else CURVE_SCENE for seed, _ in numbers]

    def slots() -> Iterator[Slot]:
        for photo in read_photographs([*divided, *whole], settings.side, workers):
            yield make_slot(photo.image, photo.segments, settings.side)
        yield from scene_slots(numbers, settings.scene_size, settings.side, workers)

    return pack(slots(), names)


def pack(slots: Iterator[Slot], names: Sequence[str]) -> tuple[Atlas, tuple[str, ...]]:
    """Slots with their sources into an atlas; those without a segment are left out."""
    pixels, bits, waiting = [], [], []
    sizes, boxes, kept = [], [], []
    for slot, name in zip(slots, names, strict=True):
        if not len(slot.bits):
            continue
        waiting.append(slot.pixels)
        bits.append(slot.bits)
        sizes.append(slot.size)
        boxes.append(slot.boxes)
        kept.append(name)
        if len(waiting) == _CHUNK:
            pixels.append(pack_levels(jnp.asarray(np.stack(waiting))))
            waiting = []
    if waiting:
        pixels.append(pack_levels(jnp.asarray(np.stack(waiting))))
    count = np.array([len(b) for b in boxes], np.int32)
    atlas = Atlas(
        jnp.concatenate(pixels),
        jnp.asarray(np.concatenate(bits)),
        jnp.asarray(np.array(sizes, np.float32)),
        jnp.asarray(np.concatenate(boxes)),
        jnp.asarray((np.cumsum(count) - count).astype(np.int32)),
        jnp.asarray(count),
        jnp.asarray(np.array([name in (SCENE, CURVE_SCENE) for name in kept])),
    )
    return atlas, tuple(kept)


@jax.jit
def pack_levels(images: jax.Array) -> jax.Array:
    """(n, side, side, 3) uint8 -> (n, pixels of all levels) uint32."""
    level = images.astype(jnp.float32)
    packed = []
    for _ in range(LEVELS):
        n, side = level.shape[:2]
        whole = jnp.round(level).astype(jnp.uint32)
        packed.append((whole[..., 0] | whole[..., 1] << 8 | whole[..., 2] << 16).reshape(n, -1))
        level = level.reshape(n, side // 2, 2, side // 2, 2, 3).mean((2, 4))
    return jnp.concatenate(packed, axis=1)


def cumulative_weights(sources: Sequence[str], weights: dict[str, float], scene_share: float) -> np.ndarray:
    """Cumulated probabilities of the images to train on, float32 (N,).

    Scenes have `scene_share` of the whole; a photograph has the weight of its source (1 where none is given), and
    none if it is held back.
    """
    scene = np.array([s == SCENE for s in sources], np.float64)
    photo = np.array([0.0 if s in (SCENE, CURVE_SCENE) or s.startswith(HELD) else weights.get(s, 1.0) for s in sources])
    share = scene_share if photo.any() else 1.0
    total = share * scene / max(scene.sum(), 1.0) + (1 - share) * photo / max(photo.sum(), 1e-9)
    return np.cumsum(total / total.sum()).astype(np.float32)


def uniform_weights(sources: Sequence[str], prefix: str) -> np.ndarray | None:
    """Cumulated probabilities of the images whose source starts with `prefix`; None if there are none."""
    chosen = np.array([s.startswith(prefix) for s in sources], np.float64)
    return np.cumsum(chosen / chosen.sum()).astype(np.float32) if chosen.any() else None
