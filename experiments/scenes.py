"""Seeded synthetic scenes on which MINI is trained, calibrated and evaluated.

Each scene holds 4 to 8 annotated objects whose outline cannot be guessed from their bounding box: letters,
rings, crescents, stars, curves, unions, figures with limbs. They are textured, lit, rotated, and occlude
each other over a cluttered background. An instance mask is the *visible* part of its object.

`make_scene(seed, index, size)` is a pure function of its arguments: scenes can be made in any order, by any
number of processes. Use the disjoint streams `TRAIN_SEED`, `CALIB_SEED` and `EVAL_SEED`.

To look at some scenes::

    python -m experiments.scenes --size=192 --count=8 --seed=0 --out=/tmp/scenes
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_utils

# Streams never share a scene: the seed is part of the generator's entropy, whatever the index.
TRAIN_SEED = 101
CALIB_SEED = 202
EVAL_SEED = 303

MIN_OBJECTS = 4
MAX_OBJECTS = 8
# Below this share of the image an object is a few pixels wide on a half-resolution mask: unfair to score.
MIN_VISIBLE_AREA = 0.008
# An occluded object keeps at least this share of what the image frame shows of it.
MIN_VISIBLE_FRACTION = 0.45
# Outlines are rasterised this many times finer than the image and averaged down to a coverage in [0, 1].
SUPERSAMPLE = 4
# RGB distance across the outline (channels in [0, 1]) that counts as visible; share of outline that must be.
MIN_EDGE_CONTRAST = 0.09
MIN_VISIBLE_OUTLINE = 0.8


@dataclass(frozen=True)
class Scene:
    """One generated image and its instance masks.

    Attributes:
        image: uint8 (S, S, 3), RGB.
        masks: bool (N, S, S), the visible part of each annotated object; no pixel belongs to two objects.
    """

    image: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4), the tight boxes of the masks as (x0, y0, x1, y1); see `boxes_xyxy`."""
        return boxes_xyxy(self.masks)


class _Layer(NamedTuple):
    """One drawing step: fills (even-odd) or strokes contours, adds them to the shape or cuts them out."""

    contours: list[np.ndarray]  # each float64 (P, 2), roughly in [-1, 1]
    add: bool = True
    width: float = 0.0  # stroke width in the same unit; 0 fills
    loop: bool = True  # whether a stroke joins its last point to its first; fills always do


_Shape = list[_Layer]


# --------------------------------------------------------------------------------------------------- outlines


def _circle(radius_x: float = 1.0, radius_y: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], -1)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _cut_corners(points: np.ndarray, ratio: float, rounds: int = 2) -> np.ndarray:
    """Chaikin's corner cutting of a closed polygon: rounds its corners."""
    for _ in range(rounds):
        following = np.roll(points, -1, 0)
        points = np.stack(
            [(1 - ratio) * points + ratio * following, ratio * points + (1 - ratio) * following], 1
        ).reshape(-1, 2)
    return points


def _polygon(rng: np.random.Generator, points: Sequence[Sequence[float]] | np.ndarray) -> _Shape:
    contour = np.asarray(points, float)
    if rng.random() < 0.4:
        contour = _cut_corners(contour, rng.uniform(0.08, 0.22))
    return [_Layer([contour])]


def _ellipse(rng: np.random.Generator) -> _Shape:
    return [_Layer([_circle(1, rng.uniform(0.35, 1))])]


def _rectangle(rng: np.random.Generator) -> _Shape:
    height = rng.uniform(0.25, 0.9)
    return _polygon(rng, _box(-1, -height, 1, height))


def _triangle(rng: np.random.Generator) -> _Shape:
    angle = np.array([0, 2.1, 4.2]) + rng.uniform(-0.5, 0.5, 3)
    return _polygon(rng, np.stack([np.cos(angle), np.sin(angle)], -1))


def _letter_l(rng: np.random.Generator) -> _Shape:
    a, b = rng.uniform(0.35, 0.75, 2)
    return _polygon(rng, [(-1, -1), (-1 + a, -1), (-1 + a, 1 - b), (1, 1 - b), (1, 1), (-1, 1)])


def _letter_u(rng: np.random.Generator) -> _Shape:
    a, b, c = rng.uniform(0.3, 0.6, 3)
    top = rng.uniform(-1, -0.2)
    outline = [
        (-1, -1),
        (-1 + a, -1),
        (-1 + a, 1 - c),
        (1 - b, 1 - c),
        (1 - b, top),
        (1, top),
        (1, 1),
        (-1, 1),
    ]
    return _polygon(rng, outline)


def _letter_t(rng: np.random.Generator) -> _Shape:
    bar, stem, at = rng.uniform(0.35, 0.6), rng.uniform(0.2, 0.35), rng.uniform(-0.5, 0.5)
    outline = [(-1, -1), (1, -1), (1, -1 + bar), (at + stem, -1 + bar), (at + stem, 1), (at - stem, 1),
               (at - stem, -1 + bar), (-1, -1 + bar)]  # fmt: skip
    return _polygon(rng, outline)


def _cross(rng: np.random.Generator) -> _Shape:
    a, b = rng.uniform(0.2, 0.4, 2)
    x, y = rng.uniform(-0.3, 0.3, 2)
    outline = [(x - a, -1), (x + a, -1), (x + a, y - b), (1, y - b), (1, y + b), (x + a, y + b), (x + a, 1),
               (x - a, 1), (x - a, y + b), (-1, y + b), (-1, y - b), (x - a, y - b)]  # fmt: skip
    return _polygon(rng, outline)


def _arrow(rng: np.random.Generator) -> _Shape:
    shaft, neck = rng.uniform(0.18, 0.35), rng.uniform(-0.2, 0.4)
    notch = rng.uniform(-1, -0.75)
    outline = [
        (-1, -shaft),
        (neck, -shaft),
        (neck, -0.9),
        (1, 0),
        (neck, 0.9),
        (neck, shaft),
        (-1, shaft),
        (notch, 0),
    ]
    return _polygon(rng, outline)


def _chevron(rng: np.random.Generator) -> _Shape:
    depth, thick = rng.uniform(0.5, 1.1), rng.uniform(0.45, 0.75)
    return _polygon(
        rng, [(-1, -1), (-1 + thick, -1), (-1 + thick + depth, 0), (-1 + thick, 1), (-1, 1), (-1 + depth, 0)]
    )


def _star(rng: np.random.Generator) -> _Shape:
    tips = int(rng.integers(4, 8))
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.35, 0.55))
    radius = radius * rng.uniform(0.85, 1.1, 2 * tips)
    angle = np.arange(2 * tips) * np.pi / tips
    return _polygon(rng, np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1))


def _flower(rng: np.random.Generator) -> _Shape:
    petals = int(rng.integers(3, 7))
    angle = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    radius = rng.uniform(0.3, 0.45) + 0.6 * np.abs(np.cos(petals * angle / 2)) ** rng.uniform(0.5, 1.2)
    return [_Layer([np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)])]


def _blob_contour(rng: np.random.Generator, strength: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    order = np.arange(2, 7)
    amplitude = strength * rng.uniform(-1, 1, 5) / order**0.6
    phase = rng.uniform(0, 2 * np.pi, 5)
    radius = 1 + (amplitude[:, None] * np.cos(order[:, None] * angle + phase[:, None])).sum(0)
    radius = np.maximum(radius, 0.3)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _blob(rng: np.random.Generator) -> _Shape:
    return [_Layer([_blob_contour(rng, rng.uniform(0.35, 0.7))])]


def _ring(rng: np.random.Generator) -> _Shape:
    hole = rng.uniform(0.45, 0.7)
    x, y = rng.uniform(-0.1, 0.1, 2)
    style = rng.random()
    if style < 0.5:
        outer, inner = _circle(), _circle(hole, hole, x, y)
    elif style < 0.8:  # a frame
        outer, inner = _box(-1, -1, 1, 1), _box(x - hole, y - hole, x + hole, y + hole)
    else:
        outer, inner = _blob_contour(rng, 0.25), _circle(0.8 * hole, 0.8 * hole, x, y)
    return [_Layer([outer, inner])]


def _crescent(rng: np.random.Generator) -> _Shape:
    bite = rng.uniform(0.75, 1.0)
    return [_Layer([_circle()]), _Layer([_circle(bite, bite, rng.uniform(0.45, 0.7))], add=False)]


def _arc(rng: np.random.Generator) -> _Shape:
    angle = np.linspace(0, rng.uniform(1.1, 1.65) * np.pi, 40)
    return [_Layer([np.stack([np.cos(angle), np.sin(angle)], -1)], width=rng.uniform(0.35, 0.6), loop=False)]


def _spiral(rng: np.random.Generator) -> _Shape:
    angle = np.linspace(0, rng.uniform(2.6, 3.3) * np.pi, 80)
    radius = 0.12 + 0.88 * angle / angle[-1]
    return [
        _Layer(
            [np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)],
            width=rng.uniform(0.22, 0.28),
            loop=False,
        )
    ]


def _wave(rng: np.random.Generator) -> _Shape:
    x = np.linspace(-1, 1, 60)
    phase, turns = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 2.8)
    curve = np.sin(turns * np.pi * x + phase)
    if rng.random() < 0.4:  # zigzag
        curve = 2 / np.pi * np.arcsin(curve)
    return [_Layer([np.stack([x, rng.uniform(0.4, 0.75) * curve], -1)], width=rng.uniform(0.24, 0.36), loop=False)]


def _curve(rng: np.random.Generator) -> _Shape:
    """A thick smooth curve through random points."""
    control = rng.uniform(-1, 1, (4, 2)) + np.array([[-0.8, 0], [-0.2, 0.7], [0.2, -0.7], [0.8, 0]])
    t = np.linspace(0, 1, 50)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    return [_Layer([basis @ control], width=rng.uniform(0.3, 0.5), loop=False)]


def _primitive(rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        return _circle(1, rng.uniform(0.4, 1))
    if kind == 1:
        return _box(-1, -rng.uniform(0.3, 0.9), 1, rng.uniform(0.3, 0.9))
    if kind == 2:
        return _triangle(rng)[0].contours[0]
    return _blob_contour(rng, 0.4)


def _compound(rng: np.random.Generator) -> _Shape:
    """The union of two or three primitives, sometimes with a bite or a hole."""
    layers = []
    at, heading = np.zeros(2), rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(2, 4))):
        part = _turn(_primitive(rng), rng.uniform(0, 2 * np.pi)) * rng.uniform(0.45, 0.9)
        layers.append(_Layer([part + at]))
        heading += rng.uniform(-1.3, 1.3)
        at = at + rng.uniform(0.7, 1.1) * np.array([np.cos(heading), np.sin(heading)])
    if rng.random() < 0.35:
        hole = rng.uniform(0.2, 0.35)
        layers.append(_Layer([_circle(hole, hole, *rng.uniform(-0.4, 0.4, 2))], add=False))
    return layers


def _bitten(rng: np.random.Generator) -> _Shape:
    layers = [_Layer([_primitive(rng)])]
    for _ in range(int(rng.integers(1, 4))):
        angle, bite = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6)
        layers.append(_Layer([_circle(bite, bite, 0.85 * np.cos(angle), 0.7 * np.sin(angle))], add=False))
    return layers


def _mug(rng: np.random.Generator) -> _Shape:
    height, grip = rng.uniform(0.6, 1.0), rng.uniform(0.35, 0.55)
    taper = rng.uniform(-0.25, 0.25)
    body = np.array([[-0.8, -height], [0.6, -height], [0.6 - taper, height], [-0.8 + taper, height]])
    handle = _circle(grip, grip * 1.1, 0.65)
    return [_Layer([handle], width=rng.uniform(0.2, 0.28)), _Layer([handle], add=False), _Layer([body])]


def _vase(rng: np.random.Generator) -> _Shape:
    """A body of revolution: bottle, vase, lamp."""
    y = np.linspace(-1, 1, 40)
    knots = np.linspace(-1, 1, 6)
    profile = np.interp(y, knots, rng.uniform(0.15, 0.75, 6))
    profile = np.convolve(np.pad(profile, 3, mode="edge"), np.ones(7) / 7, "valid")
    side = np.stack([profile, y], -1)
    return [_Layer([np.concatenate([side, side[::-1] * [-1, 1]])])]


def _creature(rng: np.random.Generator) -> _Shape:
    """Body, head, legs, tail: the topology of many photographed animals."""
    layers = [_Layer([_blob_contour(rng, 0.15) * [0.8, rng.uniform(0.32, 0.5)]])]
    head = rng.uniform(0.25, 0.4)
    neck_x, neck_y = rng.uniform(0.85, 1.15), rng.uniform(-0.8, -0.2)
    layers.append(_Layer([_circle(head, head * rng.uniform(0.7, 1), neck_x, neck_y)]))
    layers.append(_Layer([np.array([[0.55, -0.05], [neck_x, neck_y]])], width=rng.uniform(0.25, 0.4), loop=False))
    foot, leg_width = rng.uniform(0.75, 1.1), rng.uniform(0.2, 0.28)
    hips = np.linspace(-0.6, 0.6, int(rng.integers(2, 5)))
    for hip in hips:
        layers.append(
            _Layer([np.array([[hip, 0.1], [hip + rng.uniform(-0.15, 0.15), foot]])], width=leg_width, loop=False)
        )
    if rng.random() < 0.6:
        tail = np.array([[-0.65, -0.1], [-1.0, -0.2], [-1.2, rng.uniform(-0.8, 0.3)]])
        layers.append(_Layer([tail], width=0.2, loop=False))
    return layers


def _figure(rng: np.random.Generator) -> _Shape:
    """Head, torso, arms and legs."""
    width = rng.uniform(0.2, 0.28)
    layers = [
        _Layer([_circle(0.24, 0.28, rng.uniform(-0.1, 0.1), -0.9)]),
        _Layer([_cut_corners(_box(-0.33, -0.65, 0.33, 0.25), 0.2)]),
    ]
    for side in (-1, 1):
        elbow = np.array([side * rng.uniform(0.4, 0.8), rng.uniform(-0.5, 0.0)])
        hand = elbow + np.array([side * rng.uniform(-0.2, 0.4), rng.uniform(-0.5, 0.5)])
        layers.append(_Layer([np.array([[side * 0.25, -0.52], elbow, hand])], width=width, loop=False))
        knee = np.array([side * rng.uniform(0.15, 0.5), 0.6])
        foot = np.array([side * rng.uniform(0.15, 0.6), 1.1])
        layers.append(_Layer([np.array([[side * 0.18, 0.15], knee, foot])], width=width * 1.1, loop=False))
    return layers


_OUTLINES: tuple[tuple[Callable[[np.random.Generator], _Shape], float], ...] = (
    (_ellipse, 0.7), (_rectangle, 0.8), (_triangle, 1.0), (_letter_l, 1.2), (_letter_u, 1.2),
    (_letter_t, 0.8), (_cross, 1.0), (_arrow, 0.8), (_chevron, 0.8), (_star, 1.2), (_flower, 0.8),
    (_blob, 1.3), (_ring, 1.3),
    (_crescent, 1.2), (_arc, 0.7), (_spiral, 0.5), (_wave, 0.7), (_curve, 0.8), (_compound, 2.0),
    (_bitten, 1.2), (_mug, 0.8), (_vase, 0.8), (_creature, 1.5), (_figure, 1.0),
)  # fmt: skip
_WEIGHTS = np.array([weight for _, weight in _OUTLINES])
_CUMULATIVE = np.cumsum(_WEIGHTS / _WEIGHTS.sum())


def _densify(points: np.ndarray, closed: bool) -> np.ndarray:
    """Splits long edges, so that bending a shape bends its straight sides too."""
    if len(points) > 30:
        return points
    following = np.roll(points, -1, 0)
    starts, ends = (points, following) if closed else (points[:-1], following[:-1])
    t = np.arange(6)[:, None, None] / 6
    dense = ((1 - t) * starts + t * ends).transpose(1, 0, 2).reshape(-1, 2)
    return dense if closed else np.concatenate([dense, points[-1:]])


def _random_shape(rng: np.random.Generator) -> _Shape:
    """A random outline, bent, squeezed, mirrored, rotated, and scaled to a largest extent of 1 around 0."""
    kind = min(int(np.searchsorted(_CUMULATIVE, rng.random())), len(_OUTLINES) - 1)
    layers = _OUTLINES[kind][0](rng)
    bend = rng.uniform(0.03, 0.14) if rng.random() < 0.55 else 0.0
    frequency, phase = rng.uniform(1.5, 4.0, 2), rng.uniform(0, 2 * np.pi, 2)
    squeeze = rng.uniform(0.65, 1.0) * (-1 if rng.random() < 0.5 else 1)
    # A third stays nearly upright, as most things in photographs do.
    angle = rng.normal(0, 0.15) if rng.random() < 0.33 else rng.uniform(0, 2 * np.pi)

    def move(points: np.ndarray, closed: bool) -> np.ndarray:
        points = _densify(points, closed)
        points = points + bend * np.sin(frequency * points[:, ::-1] + phase)
        return _turn(points * [squeeze, 1.0], angle)

    layers = [layer._replace(contours=[move(contour, layer.loop) for contour in layer.contours]) for layer in layers]
    low = np.min([c.min(0) - layer.width / 2 for layer in layers if layer.add for c in layer.contours], 0)
    high = np.max([c.max(0) + layer.width / 2 for layer in layers if layer.add for c in layer.contours], 0)
    centre, extent = (low + high) / 2, float((high - low).max())
    return [
        _Layer([(c - centre) / extent for c in layer.contours], layer.add, layer.width / extent, layer.loop)
        for layer in layers
    ]


def _rasterise(shape: _Shape, diameter: float) -> np.ndarray:
    """Antialiased coverage of a shape whose largest extent is `diameter` pixels: float32 (P, P) in [0, 1]."""
    side = int(np.ceil(diameter)) + 4
    canvas = np.zeros((side * SUPERSAMPLE, side * SUPERSAMPLE), np.uint8)
    scale, centre = diameter * SUPERSAMPLE, side * SUPERSAMPLE / 2
    for layer in shape:
        # Four fractional bits: cv2's fixed-point coordinates.
        contours = [np.round((c * scale + centre - 0.5) * 16).astype(np.int32) for c in layer.contours]
        value = 255 if layer.add else 0
        if layer.width > 0:
            cv2.polylines(canvas, contours, layer.loop, value, max(1, round(layer.width * scale)), cv2.LINE_8, 4)
        else:
            cv2.fillPoly(canvas, contours, value, cv2.LINE_8, 4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# ----------------------------------------------------------------------------------------- colour and texture


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour, float32 (3,) in [0, 1], less saturated than uniform RGB: as in photographs."""
    hue, saturation, value = rng.random(), rng.beta(1.2, 1.3), 0.08 + 0.9 * rng.random()
    ramp = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * ramp)).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, cells: float) -> np.ndarray:
    """Smooth noise, about `cells` bumps along the longer side, two octaves: float32 (H, W), near [-1, 1]."""
    longest = max(height, width)
    field = np.zeros((height, width), np.float32)
    for octave, gain in ((1.0, 0.75), (2.3, 0.35)):
        shape = [max(2, round(cells * octave * side / longest) + 1) for side in (height, width)]
        grid = rng.uniform(-1, 1, shape).astype(np.float32)
        field += gain * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return field


def _square(wave: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(0.5 + sharpness * wave, 0, 1)


def _pattern(rng: np.random.Generator, height: int, width: int, kind: str, cycles: float) -> np.ndarray:
    """A weight in [0, 1] between two colours, `cycles` periods along the longer side: float32 (H, W)."""
    if kind == "noise":
        return np.clip(0.5 + 0.6 * _noise(rng, height, width, cycles), 0, 1)
    angle, longest = rng.uniform(0, np.pi), max(height, width)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    ys = (np.arange(height, dtype=np.float32)[:, None] - height / 2) / longest
    xs = (np.arange(width, dtype=np.float32)[None] - width / 2) / longest
    u = cos * xs + sin * ys
    if kind == "gradient":
        return np.clip(0.5 + rng.uniform(0.6, 1.2) * u, 0, 1)
    if kind == "two_tone":
        return np.clip((u - rng.uniform(-0.2, 0.2)) * longest / 1.5, 0, 1)
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    omega = np.float32(2 * np.pi * cycles)
    # An edge about a pixel and a half wide keeps hard patterns from aliasing.
    sharpness = rng.choice([0.5, longest / (9 * cycles)])
    first = np.sin(omega * u + phase[0])
    if kind == "stripes":
        return _square(first, sharpness)
    second = np.sin(omega * (cos * ys - sin * xs) + phase[1])
    if kind == "checker":
        return _square(first * second, 2 * sharpness)
    return _square(first * second - 0.35, 2 * sharpness)  # dots


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return first + weight[..., None] * (second - first)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Surface, horizon, texture and unannotated clutter: float32 (S, S, 3)."""
    base = _colour(rng)
    spread = np.float32(rng.uniform(0.05, 0.3))
    other = np.clip(base + spread * rng.uniform(-1, 1, 3).astype(np.float32) - spread * (base - 0.5), 0, 1)
    image: np.ndarray
    kind = rng.choice(["gradient", "noise", "noise", "stripes", "checker", "horizon", "patches"])
    if kind == "horizon":
        level = int(size * rng.uniform(0.2, 0.7))
        image = np.empty((size, size, 3), np.float32)
        image[:level] = _blend(base, np.clip(base + 0.15, 0, 1), _pattern(rng, level, size, "noise", 4))
        floor = _colour(rng)
        image[level:] = _blend(floor, 0.7 * floor, _pattern(rng, size - level, size, "stripes", rng.uniform(3, 9)))
        image = cv2.GaussianBlur(image, (0, 0), size / 150)
    elif kind == "patches":
        image = np.broadcast_to(base, (size, size, 3)).copy()
        for _ in range(int(rng.integers(3, 7))):
            corners = (rng.uniform(-0.4, 1.4, 2) + rng.uniform(-0.7, 0.7, (4, 2))) * size * 16
            shade = np.clip(base + spread * rng.uniform(-1, 1, 3), 0, 1)
            cv2.fillPoly(image, [cv2.convexHull(corners.astype(np.int32))], shade.tolist(), cv2.LINE_8, 4)
        image = cv2.GaussianBlur(image, (0, 0), size / rng.uniform(25, 200))
    else:
        # Regular patterns stay faint here: behind objects, strong ones hide outlines from people too.
        if kind in ("stripes", "checker"):
            other = base + np.float32(0.5) * (other - base)
        image = _blend(base, other, _pattern(rng, size, size, kind, rng.uniform(2, 12)))
    if rng.random() < 0.6:
        image += (rng.uniform(0.02, 0.07) * _noise(rng, size, size, rng.uniform(5, 40)))[..., None]

    clutter = np.clip(image * 255, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 8))):
            ends = (rng.uniform(-0.1, 1.1, (2, 2)) * size * 16).astype(int)
            ink = (255 * _colour(rng)).tolist()
            width = max(1, round(size * rng.uniform(0.003, 0.012)))
            cv2.line(clutter, ends[0].tolist(), ends[1].tolist(), ink, width, cv2.LINE_AA, 4)
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(4, 40))):
            at = (rng.uniform(0, 1, 2) * size * 16).astype(int).tolist()
            radius = int(size * rng.uniform(0.003, 0.014) * 16)
            cv2.circle(clutter, at, radius, (255 * _colour(rng)).tolist(), -1, cv2.LINE_AA, 4)
    return clutter.astype(np.float32) / 255


def _pick_colour(rng: np.random.Generator, around: np.ndarray, wanted: float) -> np.ndarray:
    """The first of 12 random colours that differs by `wanted` from most of `around` (P, 3), else the best."""
    best, best_contrast = np.zeros(3, np.float32), -1.0
    for _ in range(12):
        candidate = _colour(rng)
        distance = np.sqrt(((around - candidate) ** 2).sum(-1))
        contrast = float(np.partition(distance, len(distance) // 8)[len(distance) // 8])
        if contrast > best_contrast:
            best, best_contrast = candidate, contrast
        if contrast >= wanted:
            break
    return best


def _appearance(rng: np.random.Generator, coverage: np.ndarray, colour: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Texture and lighting of an object with the given coverage (P, P): float32 (P, P, 3)."""
    side = coverage.shape[0]
    kind = rng.choice(["plain", "noise", "gradient", "stripes", "checker", "dots", "two_tone"],
                      p=[0.28, 0.24, 0.14, 0.14, 0.06, 0.07, 0.07])  # fmt: skip
    if kind == "plain":
        surface = np.broadcast_to(colour, (side, side, 3))
    else:
        if rng.random() < 0.6:  # a lighter or darker tone of the same colour
            second = np.clip(colour * rng.uniform(0.5, 0.8) + (0.45 if colour.mean() < 0.35 else 0.0), 0, 1)
        else:
            second = colour + rng.uniform(0.4, 0.8) * (_colour(rng) - colour)
        cycles = rng.uniform(3, 9) if kind != "checker" else rng.uniform(2, 5)
        surface = _blend(colour, second.astype(np.float32), _pattern(rng, side, side, kind, cycles))

    shading = np.ones((side, side), np.float32)
    style = rng.random()
    ramp = (np.arange(side, dtype=np.float32) / side - 0.5) * 2
    if style < 0.75:  # light falling off across the object
        strength = rng.uniform(0.08, 0.3)
        shading += np.float32(strength) * (light[0] * ramp[None] + light[1] * ramp[:, None])
    if style > 0.45:  # a rounded surface: its height grows away from the outline
        distance = cv2.distanceTransform((coverage > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        rim = side * rng.uniform(0.04, 0.15)
        height = cv2.GaussianBlur(np.sqrt(np.minimum(distance / rim, 1)), (0, 0), max(0.8, rim / 3))
        slope = light[0] * cv2.Sobel(height, cv2.CV_32F, 1, 0) + light[1] * cv2.Sobel(height, cv2.CV_32F, 0, 1)
        shading -= np.clip(slope * np.float32(rng.uniform(0.02, 0.07) * rim), -0.35, 0.35)
    surface = surface * shading[..., None]
    if rng.random() < 0.15:  # a gloss spot
        spot = (rng.uniform(0.25, 0.45) * side * light[:2] + side / 2).astype(np.float32)
        squared = (np.arange(side, dtype=np.float32)[None] - spot[0]) ** 2
        squared = squared + (np.arange(side, dtype=np.float32)[:, None] - spot[1]) ** 2
        surface = surface + (0.35 * np.exp(-squared / (0.1 * side) ** 2))[..., None].astype(np.float32)
    return surface


# ------------------------------------------------------------------------------------------------ composition


class _Placed(NamedTuple):
    """An object's square patch and the part of it that lies inside the image."""

    rows: slice
    columns: slice
    patch: tuple[slice, slice]


def _window(top: int, left: int, side: int, size: int) -> _Placed:
    y0, y1, x0, x1 = max(top, 0), min(top + side, size), max(left, 0), min(left + side, size)
    return _Placed(slice(y0, y1), slice(x0, x1), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)))


def _place(
    rng: np.random.Generator, coverage: np.ndarray, visible: list[np.ndarray], framed: list[float], size: int
) -> _Placed | None:
    """A place where the new object shows enough of itself and leaves enough of those below it, or None."""
    side, floor = coverage.shape[0], MIN_VISIBLE_AREA * size * size
    for _ in range(8):
        x, y = rng.uniform(0.08, 0.92, 2) * size - side / 2
        place = _window(int(y), int(x), side, size)
        part = coverage[place.patch]
        shown = float(part.sum())
        if shown < max(1.3 * floor, 0.6 * float(coverage.sum())):
            continue
        for below, frame in zip(visible, framed, strict=True):
            left_over = float(below.sum()) - float((below[place.rows, place.columns] * part).sum())
            if left_over < max(1.1 * floor, MIN_VISIBLE_FRACTION * frame):
                break
        else:
            return place
    return None


def _cast_shadow(
    rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, place: _Placed, light: np.ndarray
) -> None:
    size = image.shape[0]
    margin = max(2, round(size * rng.uniform(0.01, 0.035)))
    padded = cv2.copyMakeBorder(coverage, 2 * margin, 2 * margin, 2 * margin, 2 * margin, cv2.BORDER_CONSTANT)
    shadow = cv2.GaussianBlur(padded, (0, 0), margin / 2)
    top = place.rows.start - place.patch[0].start - 2 * margin - round(margin * float(light[1]))
    left = place.columns.start - place.patch[1].start - 2 * margin - round(margin * float(light[0]))
    window = _window(top, left, padded.shape[0], size)
    image[window.rows, window.columns] *= 1 - np.float32(rng.uniform(0.2, 0.6)) * shadow[window.patch][..., None]


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven illumination, defocus, sensor noise and compression: float32 (S, S, 3) in, uint8 out."""
    size = image.shape[0]
    if rng.random() < 0.5:
        image = image * (1 + rng.uniform(0.05, 0.2) * _noise(rng, size, size, 1.5))[..., None]
    if rng.random() < 0.4:  # colour cast and exposure
        image = image * rng.uniform(0.85, 1.12, 3).astype(np.float32)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8) * size / 192)
    strength = rng.uniform(0.004, 0.035)
    # uint8 draws are several times cheaper than normal ones; a sum of two is close enough to a bell here.
    draws = rng.integers(0, 256, (2, size, size, 3), np.uint8).astype(np.float32)
    image = image + np.float32(strength / 104) * (draws[0] + draws[1] - 255)
    pixels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.35:
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 95))])
        # Channels stay in RGB order: the codec takes them for BGR both ways.
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return pixels


def _without_crumbs(mask: np.ndarray, floor: float) -> np.ndarray:
    """Removes from a uint8 mask the connected pieces smaller than `floor` pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count <= 2:
        return mask
    keep = stats[:, cv2.CC_STAT_AREA] >= floor
    keep[0] = False
    return keep[labels].astype(np.uint8)


def _outline_visibility(image: np.ndarray, mask: np.ndarray) -> float:
    """The share of a mask's outline across which the local mean colour changes by `MIN_EDGE_CONTRAST`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = (slice(max(rows[0] - 4, 0), rows[-1] + 5), slice(max(columns[0] - 4, 0), columns[-1] + 5))
    inside = mask[crop].astype(np.float32)
    edge = (inside > 0) & (cv2.erode(inside, np.ones((3, 3), np.uint8)) == 0)
    if not edge.any():
        return 1.0  # the object fills the crop: its outline is the image frame
    pixels = image[crop].astype(np.float32) / 255
    total, share = cv2.blur(pixels, (5, 5))[edge], cv2.blur(inside, (5, 5))[edge][:, None]
    mean_inside = cv2.blur(pixels * inside[..., None], (5, 5))[edge]
    difference = mean_inside / share - (total - mean_inside) / np.maximum(1 - share, 1e-3)
    return float((np.sqrt((difference**2).sum(-1)) >= MIN_EDGE_CONTRAST).mean())


def _compose(rng: np.random.Generator, size: int) -> Scene:
    image = _background(rng, size)
    heading = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(heading), np.sin(heading)], np.float32)
    visible: list[np.ndarray] = []  # float32 (S, S) each: coverage less what covers it
    framed: list[float] = []  # pixels of each that the image frame shows
    wanted = int(rng.integers(MIN_OBJECTS + 1, MAX_OBJECTS + 1))
    for _ in range(3 * wanted):
        if len(visible) == wanted:
            break
        diameter = size * (0.2 + 0.35 * rng.beta(1.2, 1.6))
        coverage = _rasterise(_random_shape(rng), diameter)
        if coverage.sum() < 1.3 * MIN_VISIBLE_AREA * size * size:
            continue
        place = _place(rng, coverage, visible, framed, size)
        if place is None:
            continue
        if rng.random() < 0.45:
            _cast_shadow(rng, image, coverage, place, light)
        softness = rng.uniform(0.2, 0.7) * size / 192
        if rng.random() < 0.5:
            coverage = cv2.GaussianBlur(coverage, (0, 0), softness)
        part = coverage[place.patch]
        canvas = image[place.rows, place.columns]
        ring = (cv2.dilate(part, np.ones((5, 5), np.uint8)) > 0.5) & (part < 0.1)
        around = canvas[ring] if ring.any() else canvas.reshape(-1, 3)
        colour = _pick_colour(rng, around, rng.uniform(0.22, 0.5))
        surface = _appearance(rng, coverage, colour, light)[place.patch]
        canvas += part[..., None] * (surface - canvas)
        for below in visible:
            below[place.rows, place.columns] *= 1 - part
        own = np.zeros((size, size), np.float32)
        own[place.rows, place.columns] = part
        visible.append(own)
        framed.append(float(part.sum()))

    pixels = _photograph(rng, image)
    masks = []
    for own in visible:
        mask = _without_crumbs((own > 0.5).astype(np.uint8), 4e-4 * size * size).astype(bool)
        # What people could not see stays in the image, unannotated, like any other clutter.
        if mask.mean() >= MIN_VISIBLE_AREA and _outline_visibility(pixels, mask) >= MIN_VISIBLE_OUTLINE:
            masks.append(mask)
    return Scene(pixels, np.stack(masks) if masks else np.zeros((0, size, size), bool))


def make_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Draws scene number `index` of stream `seed`.

    Args:
        seed: the stream, not negative; `TRAIN_SEED`, `CALIB_SEED` or `EVAL_SEED`.
        index: the scene's number in the stream, not negative.
        size: side of the square image in pixels, at least 64.

    Returns:
        A `Scene` with 4 to 8 masks. The same arguments always give the same scene; another size gives another
        arrangement.

    Raises:
        ValueError: if an argument is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed={seed}, index={index}.")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels for objects to be recognisable, got {size}.")
    rng = np.random.default_rng([seed, index])
    while True:  # rarely, crowding or the visibility check leaves too few objects: draw on
        scene = _compose(rng, size)
        if len(scene.masks) >= MIN_OBJECTS:
            return scene


def scene_dataset(seed: int, count: int, size: int = 128, start: int = 0) -> Iterator[Scene]:
    """Yields scenes `start` to `start + count - 1` of stream `seed`, one at a time."""
    for index in range(start, start + count):
        yield make_scene(seed, index, size)


# -------------------------------------------------------------------------------------- boxes and COCO format


def boxes_xyxy(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks.

    Args:
        masks: bool (N, H, W), none empty.

    Returns:
        float32 (N, 4): (x0, y0, x1, y1) with exclusive ends, so that width is x1 - x0 as in COCO annotations.

    Raises:
        ValueError: if a mask is empty.
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in enumerate(masks):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(ys):
            raise ValueError(f"mask {row} is empty and has no box; drop empty masks first.")
        boxes[row] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return boxes


def boxes_xywh(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks (N, H, W) as COCO writes them: float32 (N, 4), (x, y, width, height)."""
    boxes = boxes_xyxy(masks)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO run-length encoding of a mask (H, W), with `counts` as text so that it can be written as JSON."""
    encoded = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def to_coco(scenes: Iterable[Scene]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Turns scenes into images and a COCO instances dictionary, for the evaluation path of real COCO.

    Args:
        scenes: any number of scenes.

    Returns:
        The images, uint8 (S, S, 3) each, and the dictionary (`info`, `images`, `annotations`, `categories`).
        Image ids are 1, 2, ... in the order of the images. All objects share category 1, "object".
    """
    images: list[np.ndarray] = []
    coco: dict[str, Any] = {
        "info": {"description": "synthetic scenes"},
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }
    for image_id, scene in enumerate(scenes, 1):
        images.append(scene.image)
        height, width = scene.image.shape[:2]
        name = f"scene_{image_id:06d}.png"
        coco["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for mask, box in zip(scene.masks, boxes_xywh(scene.masks), strict=True):
            annotation = {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": encode_mask(mask),
                "bbox": [float(value) for value in box],
                "area": float(mask.sum()),
                "iscrowd": 0,
            }
            coco["annotations"].append(annotation)
    return images, coco


# ---------------------------------------------------------------------------------------------------- looking


def contact_sheet(scenes: Sequence[Scene], columns: int = 4) -> np.ndarray:
    """Scenes in a grid, each above a copy with its masks outlined and tinted: uint8 (H, W, 3), RGB."""
    size = scenes[0].image.shape[0]
    rows = -(-len(scenes) // columns)
    sheet = np.full((rows * 2 * (size + 2), columns * (size + 2), 3), 255, np.uint8)
    for number, scene in enumerate(scenes):
        annotated = scene.image.copy()
        for colour_index, mask in enumerate(scene.masks):
            hue = np.array([[[(colour_index * 67) % 180, 255, 255]]], np.uint8)
            ink = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
            annotated[mask] = (0.5 * annotated[mask] + 0.5 * ink).astype(np.uint8)
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(annotated, contours, -1, ink.tolist(), 1)
        top, left = (number // columns) * 2 * (size + 2), (number % columns) * (size + 2)
        sheet[top : top + size, left : left + size] = scene.image
        sheet[top + size + 2 : top + 2 * size + 2, left : left + size] = annotated
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a contact sheet of scenes as PNG."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=192, help="side of each scene in pixels")
    parser.add_argument("--count", type=int, default=8, help="number of scenes")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="stream of scenes")
    parser.add_argument("--start", type=int, default=0, help="index of the first scene")
    parser.add_argument("--out", type=Path, required=True, help="folder for the sheet")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error("--count must be at least 1.")
    scenes = list(scene_dataset(arguments.seed, arguments.count, arguments.size, arguments.start))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"scenes_{arguments.seed}_{arguments.start}_{arguments.size}.png"
    if not cv2.imwrite(str(path), cv2.cvtColor(contact_sheet(scenes), cv2.COLOR_RGB2BGR)):
        parser.error(f"could not write {path}; choose a writable folder with --out.")
    print(path)


if __name__ == "__main__":
    main()
