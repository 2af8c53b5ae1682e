"""What a training image is made of: parts of images and pasted objects, each an affine map onto the canvas.

All functions are pure in their key and made for one image; `augment` maps them over a batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.mini.atlas import Atlas

CELLS = 4  # images side by side on one canvas; one of them covers it in a view of a single image


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """How images and objects are laid on the canvas.

    Attributes:
        canvas: its side in pixels.
        prompts: objects asked for in each image.
        whole_share: photographs shown whole as `SamPredictor` shows them, the longer side as long as the canvas.
        whole_scene_share: the same of scenes.
        mosaic_share: canvases of four images.
        flip_share: images mirrored left to right.
        object_sizes: smallest and largest longer side of the object that a view is chosen for, as shares of the
            canvas (in a mosaic, of its part); drawn log-uniformly. This is how small objects are learned.
        largest_scale: canvas pixels to a pixel of the atlas; more would be blur.
        smallest_fit: smallest scale as a share of the one that fits the image into its part of the canvas.
        aspect: largest distortion, as a logarithm.
        pastes: objects pasted onto the canvas at most, each with probability `paste_share`.
        paste_sizes: like `object_sizes`.
        small_bias: how much likelier a small object is asked for: to this power of the shrinking of its longer side.
        smallest_box: least shorter and longer side of an object that is asked for, canvas pixels.
        blur: largest number of levels that pixels are taken too coarse or too fine.
        gain: standard deviation of the logarithm of what a layer's colours are multiplied by.
    """

    canvas: int = 256
    prompts: int = 8
    whole_share: float = 0.4
    whole_scene_share: float = 0.6
    mosaic_share: float = 0.3
    flip_share: float = 0.5
    object_sizes: tuple[float, float] = (0.03, 0.9)
    largest_scale: float = 2.0
    smallest_fit: float = 0.7
    aspect: float = 0.15
    pastes: int = 2
    paste_share: float = 0.5
    paste_sizes: tuple[float, float] = (0.04, 0.6)
    small_bias: float = 0.0
    smallest_box: tuple[float, float] = (2.0, 5.0)
    blur: float = 0.4
    gain: float = 0.12


class Layers(NamedTuple):
    """CELLS images and then `pastes` objects; canvas = source * scale + offset on both axes."""

    image: jax.Array  # (L,) int32
    segment: jax.Array  # (L,) int32: what a pasted layer shows of its image
    scale: jax.Array  # (L, 2), negative where mirrored
    offset: jax.Array  # (L, 2)
    rect: jax.Array  # (L, 4): the part of the canvas that a layer may cover; without area if it is not there
    level: jax.Array  # (L,) int32 of the atlas
    gain: jax.Array  # (L, 3)


def choose_layers(key: jax.Array, atlas: Atlas, cumulative: jax.Array, settings: ViewSettings) -> Layers:
    """Draws the layers of one canvas, its images by `cumulative` probabilities."""
    split_key, cell_key, paste_key, look_key = jax.random.split(key, 4)
    mosaic, rects = _divide(split_key, settings)
    images = draw_images(cell_key, cumulative, CELLS)
    place = jax.vmap(_place_cell, (0, None, 0, 0, None, None))
    cells = place(jax.random.split(cell_key, CELLS), atlas, images, rects, mosaic, settings)
    parts = [(images, jnp.zeros(CELLS, jnp.int32), *cells, rects)]
    if settings.pastes:
        pasted = draw_images(paste_key, cumulative, settings.pastes)
        paste = jax.vmap(_place_paste, (0, None, 0, None))
        parts.append((pasted, *paste(jax.random.split(paste_key, settings.pastes), atlas, pasted, settings)))
    image, segment, scale, offset, rect = (jnp.concatenate(p) for p in zip(*parts, strict=True))
    level_key, gain_key = jax.random.split(look_key)
    finer = -jnp.log2(jnp.abs(scale).mean(-1))
    level = jnp.round(finer + jax.random.uniform(level_key, finer.shape, minval=-1.0, maxval=1.0) * settings.blur)
    gain = jnp.exp(settings.gain * jax.random.normal(gain_key, (len(image), 3)))
    return Layers(image, segment, scale, offset, rect, jnp.clip(level, 0, 2).astype(jnp.int32), gain)


def draw_images(key: jax.Array, cumulative: jax.Array, count: int) -> jax.Array:
    """Images by their cumulated probabilities, (count,) int32."""
    drawn = jnp.searchsorted(cumulative, jax.random.uniform(key, (count,)), side="right")
    return jnp.minimum(drawn, len(cumulative) - 1).astype(jnp.int32)


def _divide(key: jax.Array, settings: ViewSettings) -> tuple[jax.Array, jax.Array]:
    """Whether the canvas is a mosaic, and the part of it that each cell has, (CELLS, 4)."""
    size = float(settings.canvas)
    flag_key, at_key = jax.random.split(key)
    mosaic = jax.random.uniform(flag_key) < settings.mosaic_share
    x, y = jnp.round(size * jax.random.uniform(at_key, (2,), minval=0.3, maxval=0.7))
    four = jnp.array([[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 1, 2], [1, 1, 2, 2]])
    lines = jnp.array([[0.0, 0.0], [0.0, 0.0], [size, size]]).at[1].set(jnp.stack([x, y]))
    rects = jnp.stack([lines[four[:, i], i % 2] for i in range(4)], axis=-1)
    alone = jnp.zeros((CELLS, 4)).at[0].set(jnp.array([0.0, 0.0, size, size]))
    return mosaic, jnp.where(mosaic, rects, alone)


def _place_cell(
    key: jax.Array, atlas: Atlas, image: jax.Array, rect: jax.Array, mosaic: jax.Array, settings: ViewSettings
) -> tuple[jax.Array, jax.Array]:
    """Scale and offset of an image in its part of the canvas: whole, or chosen for one of its objects."""
    keys = jax.random.split(key, 8)
    space = rect[2:] - rect[:2]
    target = _draw_segment(keys[0], atlas, image)
    box, size = atlas.boxes[target], atlas.sizes[image]
    # A single image may leave a part of the canvas empty, as evaluation's do; those of a mosaic should hardly.
    fit = jnp.where(mosaic, jnp.max(space / size), jnp.max(space) / jnp.max(size))
    share = jnp.where(atlas.scene[image], settings.whole_scene_share, settings.whole_share)
    whole = (jax.random.uniform(keys[1]) < share) & ~mosaic
    wanted = jnp.max(space) * _log_uniform(keys[2], *settings.object_sizes)
    close = wanted / jnp.max(box[2:] - box[:2])
    close = jnp.clip(close, settings.smallest_fit * fit, jnp.maximum(fit, settings.largest_scale))
    stretch = jnp.exp(settings.aspect * jax.random.uniform(keys[3], (2,), minval=-1.0, maxval=1.0))
    scale = jnp.where(whole, fit, close * stretch)

    mirrored = jax.random.uniform(keys[4]) < settings.flip_share
    centre = (box[:2] + box[2:]) / 2
    centre = jnp.where(mirrored, jnp.stack([size[0] - centre[0], centre[1]]), centre) * scale
    half = jnp.minimum((box[2:] - box[:2]) / 2 * scale, space / 2)
    at = rect[:2] + half + jax.random.uniform(keys[5], (2,)) * (space - 2 * half)
    # The image covers its part where it is large enough, and lies inside where it is not.
    ends = rect[:2], rect[2:] - size * scale
    offset = jnp.clip(at - centre, jnp.minimum(*ends), jnp.maximum(*ends))
    letterboxed = whole | ((jax.random.uniform(keys[6]) < 0.5) & jnp.all(size * scale <= space))
    offset = jnp.where(letterboxed, rect[:2], offset)
    return _mirror(mirrored, scale, offset, size)


def _place_paste(
    key: jax.Array, atlas: Atlas, image: jax.Array, settings: ViewSettings
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Segment, scale, offset and part of the canvas of a pasted object; no part if there is none this time."""
    keys = jax.random.split(key, 6)
    segment = _draw_segment(keys[0], atlas, image)
    box = atlas.boxes[segment]
    extent = jnp.max(box[2:] - box[:2])
    wanted = settings.canvas * _log_uniform(keys[1], *settings.paste_sizes)
    scale = jnp.minimum(wanted / extent, settings.largest_scale)
    scale = scale * jnp.exp(settings.aspect * jax.random.uniform(keys[2], (2,), minval=-1.0, maxval=1.0))
    at = settings.canvas * jax.random.uniform(keys[3], (2,))
    there = (jax.random.uniform(keys[4]) < settings.paste_share) & (extent >= 12)
    # What covers most of its image is rather a ground than an object.
    there &= jnp.prod(box[2:] - box[:2]) < 0.6 * jnp.prod(atlas.sizes[image])
    mirrored = jax.random.uniform(keys[5]) < settings.flip_share
    centre = (box[:2] + box[2:]) / 2
    centre = jnp.where(mirrored, jnp.stack([atlas.sizes[image][0] - centre[0], centre[1]]), centre) * scale
    scale, offset = _mirror(mirrored, scale, at - centre, atlas.sizes[image])
    size = float(settings.canvas)
    return segment, scale, offset, jnp.where(there, jnp.array([0.0, 0.0, size, size]), 0.0)


def _draw_segment(key: jax.Array, atlas: Atlas, image: jax.Array) -> jax.Array:
    return atlas.first[image] + jax.random.randint(key, (), 0, atlas.counts[image])


def _mirror(mirrored: jax.Array, scale: jax.Array, offset: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same place for the image turned left to right."""
    sign = jnp.where(mirrored, jnp.array([-1.0, 1.0]), 1.0)
    return scale * sign, offset + jnp.where(sign < 0, size * scale, 0.0)


def _log_uniform(key: jax.Array, low: float, high: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, minval=jnp.log(low), maxval=jnp.log(high)))


class Candidates(NamedTuple):
    """Objects that a canvas may show."""

    layer: jax.Array  # (K,) int32
    segment: jax.Array  # (K,) int32
    box: jax.Array  # (K, 4) canvas xyxy of the whole object, cut to its layer's part


def choose_prompts(key: jax.Array, atlas: Atlas, layers: Layers, settings: ViewSettings) -> Candidates:
    """The objects to ask for: those pasted, and others of the images that are likely to be seen."""
    start_key, order_key = jax.random.split(key)
    mosaic = layers.rect[1, 2] > 0
    each = 2 * settings.prompts
    number = jnp.arange(CELLS * each)
    cell = jnp.where(mosaic, number // each, 0)
    place = jnp.where(mosaic, number % each, number)
    start = jax.random.randint(start_key, (CELLS,), 0, 1 << 20)
    image = layers.image[cell]
    count = atlas.counts[image]
    segment = atlas.first[image] + (start[cell] + place) % count
    pasted = jnp.arange(CELLS, CELLS + settings.pastes)
    layer = jnp.concatenate([cell, pasted])
    segment = jnp.concatenate([segment, layers.segment[CELLS:]])
    again = jnp.concatenate([place >= count, jnp.zeros(settings.pastes, bool)])

    full = canvas_boxes(atlas.boxes[segment], layers, layer)
    rect = layers.rect[layer]
    box = jnp.concatenate([jnp.maximum(full[:, :2], rect[:, :2]), jnp.minimum(full[:, 2:], rect[:, 2:])], axis=-1)
    sides = jnp.maximum(box[:, 2:] - box[:, :2], 0.0)
    shown = sides.prod(-1) / (full[:, 2:] - full[:, :2]).prod(-1)
    likely = (sides.min(-1) >= settings.smallest_box[0]) & (sides.max(-1) >= settings.smallest_box[1]) & (shown > 0.25)
    score = jax.random.gumbel(order_key, segment.shape)
    score -= settings.small_bias * jnp.log(jnp.maximum(sides.max(-1), 1.0))
    score += 2.0 * (layer >= CELLS) - 20.0 * again - 100.0 * ~likely
    _, best = jax.lax.top_k(score, settings.prompts)
    return Candidates(layer[best], segment[best], box[best])


def canvas_boxes(boxes: jax.Array, layers: Layers, layer: jax.Array) -> jax.Array:
    """Boxes (K, 4) of a layer's image on the canvas."""
    corners = boxes.reshape(-1, 2, 2) * layers.scale[layer][:, None] + layers.offset[layer][:, None]
    return jnp.concatenate([corners.min(1), corners.max(1)], axis=-1)
