"""Random outlines for `scenes`: what a bounding box cannot give away, as polygons, and their antialiased coverage."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Outlines are rasterised this many times finer than the image and averaged down to a coverage in [0, 1].
SUPERSAMPLE = 4


class Layer(NamedTuple):
    """One drawing step: fills (even-odd) or strokes contours, adds them to the shape or cuts them out."""

    contours: list[np.ndarray]  # each float64 (P, 2), roughly in [-1, 1]
    add: bool = True
    width: float = 0.0  # stroke width in the same unit; 0 fills
    loop: bool = True  # whether a stroke joins its last point to its first; fills always do


Shape = list[Layer]


def circle(radius_x: float = 1.0, radius_y: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
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


def _polygon(rng: np.random.Generator, points: Sequence[Sequence[float]] | np.ndarray) -> Shape:
    contour = np.asarray(points, float)
    if rng.random() < 0.4:
        contour = _cut_corners(contour, rng.uniform(0.08, 0.22))
    return [Layer([contour])]


def _ellipse(rng: np.random.Generator) -> Shape:
    return [Layer([circle(1, rng.uniform(0.35, 1))])]


def _rectangle(rng: np.random.Generator) -> Shape:
    height = rng.uniform(0.25, 0.9)
    return _polygon(rng, _box(-1, -height, 1, height))


def _triangle(rng: np.random.Generator) -> Shape:
    angle = np.array([0, 2.1, 4.2]) + rng.uniform(-0.5, 0.5, 3)
    return _polygon(rng, np.stack([np.cos(angle), np.sin(angle)], -1))


def _letter_l(rng: np.random.Generator) -> Shape:
    a, b = rng.uniform(0.35, 0.75, 2)
    return _polygon(rng, [(-1, -1), (-1 + a, -1), (-1 + a, 1 - b), (1, 1 - b), (1, 1), (-1, 1)])


def _letter_u(rng: np.random.Generator) -> Shape:
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


def _letter_t(rng: np.random.Generator) -> Shape:
    bar, stem, at = rng.uniform(0.35, 0.6), rng.uniform(0.2, 0.35), rng.uniform(-0.5, 0.5)
    outline = [(-1, -1), (1, -1), (1, -1 + bar), (at + stem, -1 + bar), (at + stem, 1), (at - stem, 1),
               (at - stem, -1 + bar), (-1, -1 + bar)]  # fmt: skip
    return _polygon(rng, outline)


def _cross(rng: np.random.Generator) -> Shape:
    a, b = rng.uniform(0.2, 0.4, 2)
    x, y = rng.uniform(-0.3, 0.3, 2)
    outline = [(x - a, -1), (x + a, -1), (x + a, y - b), (1, y - b), (1, y + b), (x + a, y + b), (x + a, 1),
               (x - a, 1), (x - a, y + b), (-1, y + b), (-1, y - b), (x - a, y - b)]  # fmt: skip
    return _polygon(rng, outline)


def _arrow(rng: np.random.Generator) -> Shape:
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


def _chevron(rng: np.random.Generator) -> Shape:
    depth, thick = rng.uniform(0.5, 1.1), rng.uniform(0.45, 0.75)
    return _polygon(
        rng, [(-1, -1), (-1 + thick, -1), (-1 + thick + depth, 0), (-1 + thick, 1), (-1, 1), (-1 + depth, 0)]
    )


def _star(rng: np.random.Generator) -> Shape:
    tips = int(rng.integers(4, 8))
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.35, 0.55))
    radius = radius * rng.uniform(0.85, 1.1, 2 * tips)
    angle = np.arange(2 * tips) * np.pi / tips
    return _polygon(rng, np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1))


def _flower(rng: np.random.Generator) -> Shape:
    petals = int(rng.integers(3, 7))
    angle = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    radius = rng.uniform(0.3, 0.45) + 0.6 * np.abs(np.cos(petals * angle / 2)) ** rng.uniform(0.5, 1.2)
    return [Layer([np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)])]


def _blob_contour(rng: np.random.Generator, strength: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    order = np.arange(2, 7)
    amplitude = strength * rng.uniform(-1, 1, 5) / order**0.6
    phase = rng.uniform(0, 2 * np.pi, 5)
    radius = 1 + (amplitude[:, None] * np.cos(order[:, None] * angle + phase[:, None])).sum(0)
    radius = np.maximum(radius, 0.3)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _blob(rng: np.random.Generator) -> Shape:
    return [Layer([_blob_contour(rng, rng.uniform(0.35, 0.7))])]


def _ring(rng: np.random.Generator) -> Shape:
    hole = rng.uniform(0.45, 0.7)
    x, y = rng.uniform(-0.1, 0.1, 2)
    style = rng.random()
    if style < 0.5:
        outer, inner = circle(), circle(hole, hole, x, y)
    elif style < 0.8:  # a frame
        outer, inner = _box(-1, -1, 1, 1), _box(x - hole, y - hole, x + hole, y + hole)
    else:
        outer, inner = _blob_contour(rng, 0.25), circle(0.8 * hole, 0.8 * hole, x, y)
    return [Layer([outer, inner])]


def _crescent(rng: np.random.Generator) -> Shape:
    bite = rng.uniform(0.75, 1.0)
    return [Layer([circle()]), Layer([circle(bite, bite, rng.uniform(0.45, 0.7))], add=False)]


def _arc(rng: np.random.Generator) -> Shape:
    angle = np.linspace(0, rng.uniform(1.1, 1.65) * np.pi, 40)
    return [Layer([np.stack([np.cos(angle), np.sin(angle)], -1)], width=rng.uniform(0.35, 0.6), loop=False)]


def _spiral(rng: np.random.Generator) -> Shape:
    angle = np.linspace(0, rng.uniform(2.6, 3.3) * np.pi, 80)
    radius = 0.12 + 0.88 * angle / angle[-1]
    return [
        Layer(
            [np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)],
            width=rng.uniform(0.22, 0.28),
            loop=False,
        )
    ]


def _wave(rng: np.random.Generator) -> Shape:
    x = np.linspace(-1, 1, 60)
    phase, turns = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 2.8)
    curve = np.sin(turns * np.pi * x + phase)
    if rng.random() < 0.4:  # zigzag
        curve = 2 / np.pi * np.arcsin(curve)
    return [Layer([np.stack([x, rng.uniform(0.4, 0.75) * curve], -1)], width=rng.uniform(0.24, 0.36), loop=False)]


def _curve(rng: np.random.Generator) -> Shape:
    """A thick smooth curve through random points."""
    control = rng.uniform(-1, 1, (4, 2)) + np.array([[-0.8, 0], [-0.2, 0.7], [0.2, -0.7], [0.8, 0]])
    t = np.linspace(0, 1, 50)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    return [Layer([basis @ control], width=rng.uniform(0.3, 0.5), loop=False)]


def _primitive(rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        return circle(1, rng.uniform(0.4, 1))
    if kind == 1:
        return _box(-1, -rng.uniform(0.3, 0.9), 1, rng.uniform(0.3, 0.9))
    if kind == 2:
        return _triangle(rng)[0].contours[0]
    return _blob_contour(rng, 0.4)


def _compound(rng: np.random.Generator) -> Shape:
    """The union of two or three primitives, sometimes with a bite or a hole."""
    layers = []
    at, heading = np.zeros(2), rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(2, 4))):
        part = _turn(_primitive(rng), rng.uniform(0, 2 * np.pi)) * rng.uniform(0.45, 0.9)
        layers.append(Layer([part + at]))
        heading += rng.uniform(-1.3, 1.3)
        at = at + rng.uniform(0.7, 1.1) * np.array([np.cos(heading), np.sin(heading)])
    if rng.random() < 0.35:
        hole = rng.uniform(0.2, 0.35)
        layers.append(Layer([circle(hole, hole, *rng.uniform(-0.4, 0.4, 2))], add=False))
    return layers


def _bitten(rng: np.random.Generator) -> Shape:
    layers = [Layer([_primitive(rng)])]
    for _ in range(int(rng.integers(1, 4))):
        angle, bite = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6)
        layers.append(Layer([circle(bite, bite, 0.85 * np.cos(angle), 0.7 * np.sin(angle))], add=False))
    return layers


def _mug(rng: np.random.Generator) -> Shape:
    height, grip = rng.uniform(0.6, 1.0), rng.uniform(0.35, 0.55)
    taper = rng.uniform(-0.25, 0.25)
    body = np.array([[-0.8, -height], [0.6, -height], [0.6 - taper, height], [-0.8 + taper, height]])
    handle = circle(grip, grip * 1.1, 0.65)
    return [Layer([handle], width=rng.uniform(0.2, 0.28)), Layer([handle], add=False), Layer([body])]


def _vase(rng: np.random.Generator) -> Shape:
    """A body of revolution: bottle, vase, lamp."""
    y = np.linspace(-1, 1, 40)
    knots = np.linspace(-1, 1, 6)
    profile = np.interp(y, knots, rng.uniform(0.15, 0.75, 6))
    profile = np.convolve(np.pad(profile, 3, mode="edge"), np.ones(7) / 7, "valid")
    side = np.stack([profile, y], -1)
    return [Layer([np.concatenate([side, side[::-1] * [-1, 1]])])]


def _creature(rng: np.random.Generator) -> Shape:
    """Body, head, legs, tail: the topology of many photographed animals."""
    layers = [Layer([_blob_contour(rng, 0.15) * [0.8, rng.uniform(0.32, 0.5)]])]
    head = rng.uniform(0.25, 0.4)
    neck_x, neck_y = rng.uniform(0.85, 1.15), rng.uniform(-0.8, -0.2)
    layers.append(Layer([circle(head, head * rng.uniform(0.7, 1), neck_x, neck_y)]))
    layers.append(Layer([np.array([[0.55, -0.05], [neck_x, neck_y]])], width=rng.uniform(0.25, 0.4), loop=False))
    foot, leg_width = rng.uniform(0.75, 1.1), rng.uniform(0.2, 0.28)
    hips = np.linspace(-0.6, 0.6, int(rng.integers(2, 5)))
    for hip in hips:
        layers.append(
            Layer([np.array([[hip, 0.1], [hip + rng.uniform(-0.15, 0.15), foot]])], width=leg_width, loop=False)
        )
    if rng.random() < 0.6:
        tail = np.array([[-0.65, -0.1], [-1.0, -0.2], [-1.2, rng.uniform(-0.8, 0.3)]])
        layers.append(Layer([tail], width=0.2, loop=False))
    return layers


def _figure(rng: np.random.Generator) -> Shape:
    """Head, torso, arms and legs."""
    width = rng.uniform(0.2, 0.28)
    layers = [
        Layer([circle(0.24, 0.28, rng.uniform(-0.1, 0.1), -0.9)]),
        Layer([_cut_corners(_box(-0.33, -0.65, 0.33, 0.25), 0.2)]),
    ]
    for side in (-1, 1):
        elbow = np.array([side * rng.uniform(0.4, 0.8), rng.uniform(-0.5, 0.0)])
        hand = elbow + np.array([side * rng.uniform(-0.2, 0.4), rng.uniform(-0.5, 0.5)])
        layers.append(Layer([np.array([[side * 0.25, -0.52], elbow, hand])], width=width, loop=False))
        knee = np.array([side * rng.uniform(0.15, 0.5), 0.6])
        foot = np.array([side * rng.uniform(0.15, 0.6), 1.1])
        layers.append(Layer([np.array([[side * 0.18, 0.15], knee, foot])], width=width * 1.1, loop=False))
    return layers


OUTLINES: tuple[tuple[Callable[[np.random.Generator], Shape], float], ...] = (
    (_ellipse, 0.7), (_rectangle, 0.8), (_triangle, 1.0), (_letter_l, 1.2), (_letter_u, 1.2),
    (_letter_t, 0.8), (_cross, 1.0), (_arrow, 0.8), (_chevron, 0.8), (_star, 1.2), (_flower, 0.8),
    (_blob, 1.3), (_ring, 1.3),
    (_crescent, 1.2), (_arc, 0.7), (_spiral, 0.5), (_wave, 0.7), (_curve, 0.8), (_compound, 2.0),
    (_bitten, 1.2), (_mug, 0.8), (_vase, 0.8), (_creature, 1.5), (_figure, 1.0),
)  # fmt: skip
_WEIGHTS = np.array([weight for _, weight in OUTLINES])
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


def random_shape(rng: np.random.Generator) -> Shape:
    """A random outline, bent, squeezed, mirrored, rotated, and scaled to a largest extent of 1 around 0."""
    kind = min(int(np.searchsorted(_CUMULATIVE, rng.random())), len(OUTLINES) - 1)
    layers = OUTLINES[kind][0](rng)
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
        Layer([(c - centre) / extent for c in layer.contours], layer.add, layer.width / extent, layer.loop)
        for layer in layers
    ]


def rasterise(shape: Shape, diameter: float) -> np.ndarray:
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
