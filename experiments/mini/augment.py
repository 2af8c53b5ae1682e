"""Training batches as a jitted pure function of a key: what the layers of a canvas show, masks, boxes and points."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.mini.atlas import LEVELS, Atlas, atlas_side, level_offset
from experiments.mini.colour import ColourSettings, change_colours
from experiments.mini.views import CELLS, Layers, ViewSettings, canvas_boxes, choose_layers, choose_prompts


class Batch(NamedTuple):
    """B images with P prompted objects each; pixel coordinates are those of the canvas."""

    images: jax.Array  # (B, S, S, 3) float32, 0..255; the mean colour where there is no image
    masks: jax.Array  # (B, P, m, m) float32: the visible share of each mask cell
    boxes: jax.Array  # (B, P, 4) float32 prompt boxes, xyxy
    true_boxes: jax.Array  # (B, P, 4) float32
    points: jax.Array  # (B, P, 2) float32 prompt points, xy
    is_point: jax.Array  # (B, P) bool: prompted by its point instead of its box
    weight: jax.Array  # (B, P) float32: 0 for what is not to be seen


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """What a batch is.

    Attributes:
        batch: images.
        cells: mask cells along the canvas.
        pad: the colour where there is no image.
        views: what the images are made of.
        colours: how their colours are changed.
        point_share: objects prompted by an interior point.
        exact_box_share: boxes that are not jittered.
        box_jitter: standard deviation, as a share of the box's side.
        jitter_floor: smallest standard deviation, pixels.
        smallest: least visible area, canvas pixels.
    """

    batch: int = 64
    cells: int = 128
    pad: tuple[float, float, float] = (123.675, 116.28, 103.53)
    views: ViewSettings = ViewSettings()
    colours: ColourSettings = ColourSettings()
    point_share: float = 0.25
    exact_box_share: float = 0.5
    box_jitter: float = 0.04
    jitter_floor: float = 0.4
    smallest: float = 6.0


def plain(settings: BatchSettings) -> BatchSettings:
    """The settings that show single images whole, as evaluation does, and prompt them exactly."""
    views = dataclasses.replace(
        settings.views,
        whole_share=1.0,
        whole_scene_share=1.0,
        mosaic_share=0.0,
        flip_share=0.0,
        pastes=0,
        blur=0.0,
        gain=0.0,
    )
    colours = ColourSettings(strength=0.0)
    return dataclasses.replace(settings, views=views, colours=colours, point_share=0.0, exact_box_share=1.0)


def make_batch(key: jax.Array, atlas: Atlas, cumulative: jax.Array, settings: BatchSettings) -> Batch:
    """Draws one batch; `cumulative` holds the cumulated probabilities of the atlas's images."""
    return jax.vmap(_sample, (0, None, None, None))(jax.random.split(key, settings.batch), atlas, cumulative, settings)


def _sample(key: jax.Array, atlas: Atlas, cumulative: jax.Array, settings: BatchSettings) -> Batch:
    layer_key, colour_key, choice_key, prompt_key, phase_key = jax.random.split(key, 5)
    views = settings.views
    layers = choose_layers(layer_key, atlas, cumulative, views)
    chosen = choose_prompts(choice_key, atlas, layers, views)
    image = change_colours(colour_key, _draw(atlas, layers, settings), settings.colours, jnp.array(settings.pad))

    # Two samples a cell and axis, at places that differ from image to image: exact on average.
    lattice = sample_lattice(phase_key, 2 * settings.cells, views.canvas)
    owner = _owner(atlas, layers, lattice)
    seen = jax.vmap(lambda layer, segment: _covered(atlas, layers, layer, segment, lattice) & (owner == layer))(
        chosen.layer, chosen.segment
    )
    p, m = views.prompts, settings.cells
    masks = seen.reshape(p, m, 2, m, 2).mean((2, 4), dtype=jnp.float32)
    step = views.canvas / (2 * m)
    boxes = _fit_boxes(seen, chosen.box, step)
    visible = seen.sum((1, 2)) * step**2
    weight = (visible >= settings.smallest).astype(jnp.float32)
    point_key, kind_key, jitter_key = jax.random.split(prompt_key, 3)
    points = interior_points(point_key, masks, views.canvas)
    is_point = jax.random.uniform(kind_key, (p,)) < settings.point_share
    return Batch(image, masks, _jitter(jitter_key, boxes, settings), boxes, points, is_point, weight)


def sample_lattice(key: jax.Array, count: int, canvas: int) -> tuple[jax.Array, jax.Array]:
    """x of count columns (1, count) and y of count rows (count, 1) of canvas places, one in each step."""
    phase = jax.random.uniform(key, (2, 1), minval=0.25, maxval=0.75)
    at = (jnp.arange(count) + phase) * (canvas / count)
    return at[0][None, :], at[1][:, None]


def _to_source(layers: Layers, layer: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x, y), scale, offset = at, layers.scale[layer], layers.offset[layer]
    return (x - offset[..., 0]) / scale[..., 0], (y - offset[..., 1]) / scale[..., 1]


def _inside(layers: Layers, layer: int, at: tuple[jax.Array, jax.Array], size: jax.Array) -> jax.Array:
    """Where a layer's part of the canvas shows its image."""
    (x, y), rect = at, layers.rect[layer]
    u, v = _to_source(layers, jnp.int32(layer), at)
    there = (x >= rect[0]) & (y >= rect[1]) & (x < rect[2]) & (y < rect[3])
    return there & (u >= 0) & (v >= 0) & (u < size[0]) & (v < size[1])


def _covered(
    atlas: Atlas, layers: Layers, layer: jax.Array, segment: jax.Array, at: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Where a segment of a layer's image lies on the canvas, whatever hides it: bool."""
    u, v = _to_source(layers, layer, at)
    return segment_at(atlas, segment, jnp.floor(u).astype(jnp.int32), jnp.floor(v).astype(jnp.int32))


def segment_at(atlas: Atlas, segment: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Whether pixels of a segment's image belong to it; False outside."""
    side = atlas_side(atlas)
    inside = (x >= 0) & (y >= 0) & (x < side) & (y < side)
    place = jnp.where(inside, y * side + x, 0)
    byte = atlas.bits[segment, place >> 3]
    return inside & ((byte >> (7 - (place & 7)).astype(jnp.uint8)) & 1).astype(bool)


def _owner(atlas: Atlas, layers: Layers, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The layer that each place shows, -1 where there is no image. Objects are pasted onto images only."""
    x, y = at
    owner = jnp.full(jnp.broadcast_shapes(x.shape, y.shape), -1, jnp.int32)
    for layer in range(len(layers.image)):
        there = _inside(layers, layer, at, atlas.sizes[layers.image[layer]])
        if layer >= CELLS:
            there &= _covered(atlas, layers, jnp.int32(layer), layers.segment[layer], at) & (owner >= 0)
        owner = jnp.where(there, layer, owner)
    return owner


def _draw(atlas: Atlas, layers: Layers, settings: BatchSettings) -> jax.Array:
    """The canvas (S, S, 3), 0..255, before its colours change; NaN where there is no image."""
    size = settings.views.canvas
    centres = jnp.arange(size) + 0.5
    at = centres[None, :], centres[:, None]
    count = len(layers.image)
    base = _owner(atlas, _first(layers, CELLS), at)
    image = jnp.where((base >= 0)[..., None], _colours(atlas, layers, jnp.maximum(base, 0), at), jnp.nan)
    for layer in range(CELLS, count):
        alpha = _soft_cover(atlas, layers, layer, at)[..., None]
        pasted = _colours(atlas, layers, jnp.full((size, size), layer), at)
        image = jnp.where(jnp.isnan(image), image, image + alpha * (pasted - image))
    return image


def _first(layers: Layers, count: int) -> Layers:
    return Layers(*(a[:count] for a in layers))


def _soft_cover(atlas: Atlas, layers: Layers, layer: int, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """How much of a pasted object each pixel shows, 0..1, by four samples in it."""
    x, y = at
    total = jnp.zeros(jnp.broadcast_shapes(x.shape, y.shape))
    for dx in (-0.25, 0.25):
        for dy in (-0.25, 0.25):
            place = (x + dx, y + dy)
            there = _inside(layers, layer, place, atlas.sizes[layers.image[layer]])
            total += there & _covered(atlas, layers, jnp.int32(layer), layers.segment[layer], place)
    return total / 4


def _colours(atlas: Atlas, layers: Layers, layer: jax.Array, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Colours of the layers (S, S) that pixels show, interpolated on their levels: (S, S, 3)."""
    side = atlas_side(atlas)
    offsets = jnp.array([level_offset(side, level) for level in range(LEVELS)])
    u, v = _to_source(layers, layer, at)
    level = layers.level[layer]
    width, shrink = side >> level, 1.0 / (1 << level)
    u, v = u * shrink - 0.5, v * shrink - 0.5
    left, top = jnp.floor(u), jnp.floor(v)
    total = jnp.zeros((*u.shape, 3))
    for dx in (0, 1):
        for dy in (0, 1):
            column = jnp.clip(left.astype(jnp.int32) + dx, 0, width - 1)
            row = jnp.clip(top.astype(jnp.int32) + dy, 0, width - 1)
            packed = atlas.pixels[layers.image[layer], offsets[level] + row * width + column]
            rgb = jnp.stack([packed >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(jnp.float32)
            share = jnp.abs(1 - dx - (u - left)) * jnp.abs(1 - dy - (v - top))
            total += share[..., None] * rgb
    return total * layers.gain[layer]


def _fit_boxes(seen: jax.Array, whole: jax.Array, step: float) -> jax.Array:
    """Boxes of visible masks (P, n, n) on a lattice: each side exact where it is the whole object's."""
    n = seen.shape[-1]
    places = jnp.arange(n)

    def span(line: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(line, places, n).min(-1) * step, (jnp.where(line, places, -1).max(-1) + 1) * step

    (x0, x1), (y0, y1) = span(seen.any(1)), span(seen.any(2))
    sampled = jnp.stack([x0, y0, x1, y1], axis=-1)
    boxes = jnp.where(jnp.abs(sampled - whole) <= 1.5 * step, whole, sampled)
    return jnp.where((boxes[:, 2:] > boxes[:, :2]).all(-1, keepdims=True), boxes, jnp.array([0.0, 0.0, 1.0, 1.0]))


def _jitter(key: jax.Array, boxes: jax.Array, settings: BatchSettings) -> jax.Array:
    """Boxes moved as a detector's are, in part."""
    noise_key, exact_key = jax.random.split(key)
    sides = jnp.tile(boxes[:, 2:] - boxes[:, :2], 2)
    spread = jnp.maximum(settings.box_jitter * sides, settings.jitter_floor)
    # Never so far that a small box turns over.
    noise = jnp.clip(spread * jax.random.normal(noise_key, boxes.shape), -0.25 * sides, 0.25 * sides)
    exact = jax.random.uniform(exact_key, (len(boxes), 1)) < settings.exact_box_share
    return jnp.where(exact, boxes, jnp.clip(boxes + noise, 0.0, settings.views.canvas))


def interior_points(key: jax.Array, masks: jax.Array, canvas: int) -> jax.Array:
    """A point well inside each mask (P, m, m), (P, 2) xy: among the cells at least half as deep as the deepest."""
    m = masks.shape[-1]
    inside = (masks > 0.5).astype(jnp.float32)
    inside = jnp.where(inside.any((1, 2), keepdims=True), inside, (masks > 0).astype(jnp.float32))
    depth, left = inside, inside
    for _ in range(max(1, m // 10)):
        left = -jax.lax.reduce_window(-left, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
        depth = depth + left
    key, spread_key, cell_key = jax.random.split(key, 3)
    # Half of them are the deepest: what evaluation and people click.
    floor = jnp.where(jax.random.uniform(spread_key, (len(masks), 1, 1)) < 0.5, 1.0, 0.5)
    good = (depth > 0) & (depth >= floor * depth.max((1, 2), keepdims=True))
    score = jnp.where(good, jax.random.gumbel(key, depth.shape), -jnp.inf).reshape(len(masks), -1)
    best = score.argmax(-1)
    cell = jnp.stack([best % m, best // m], axis=-1)
    return (cell + jax.random.uniform(cell_key, cell.shape)) * (canvas / m)


__all__ = ["Batch", "BatchSettings", "canvas_boxes", "interior_points", "make_batch", "plain", "segment_at"]
