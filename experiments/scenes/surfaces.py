"""How things in `scenes` look: colours, textures, light, backgrounds, and what a camera does to them."""

import cv2
import numpy as np


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


def background(rng: np.random.Generator, size: int) -> np.ndarray:
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


def pick_colour(rng: np.random.Generator, around: np.ndarray, wanted: float) -> np.ndarray:
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


def appearance(rng: np.random.Generator, coverage: np.ndarray, colour: np.ndarray, light: np.ndarray) -> np.ndarray:
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


def photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
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
