"""Scenes of the embedded dataset: six shapes on textured, cluttered ground and on one another.

Shapes are tilted and scaled at random. A class has an outline, a hue and a kind of texture of its own (one
texture in ten and one hue in twenty-five are any), so that a small detector learns it in two minutes.

A shape that would leave less than `MIN_VISIBLE` of another one in sight, or less than `MIN_SIDE` pixels of
its box, is not placed; so every shape in a picture can be annotated. Every twentieth image is empty, and
every twentieth holds a dense group that is annotated as one crowd.
"""

from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tasks.data.outlines import box

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
FILLS = ("ramp", "checks", "stripes", "plain", "blotches", "grain")  # of each class
SPLITS = ("train", "val", "test")

MIN_SIDE, MAX_SIDE = 8, 96  # pixels, longer side of an object's box
TILT = np.pi / 8  # a shape is turned by at most this angle, either way
MIN_VISIBLE = 0.7  # share of a shape that stays in sight, of its whole area
SUPERSAMPLING = 4

Loop = NDArray[np.float64]  # [vertices, 2], x and y


@dataclass
class Shape:
    """One placed shape, or a crowd of them.

    label: 1…6. loops: the whole outline in pixels, hidden parts included; a second loop is a hole.
    centre: x, y. visible: bool [H, W], the part in sight.
    """

    label: int
    loops: list[Loop]
    centre: NDArray[np.float64]
    visible: NDArray[np.bool_]
    crowd: bool = False


@dataclass
class Scene:
    """image: uint8 [H, W, 3], RGB. shapes: from the lowest to the topmost."""

    image: NDArray[np.uint8]
    shapes: list[Shape]


# --- outlines -------------------------------------------------------------------------------------------


def _regular(vertices: int, radius: float = 1.0) -> Loop:
    angles = 2 * np.pi * np.arange(vertices) / vertices
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> Loop:
    return _regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


def _cross(arm: float = 0.34) -> Loop:
    quarter, turn = np.array([[1, -arm], [1, arm], [arm, arm]]), np.array([[0, 1], [-1, 0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# around the origin, as large as they come; a second loop is a hole
_OUTLINES: dict[str, list[Loop]] = {
    "circle": [_regular(48)],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [_star()],
    "cross": [_cross()],
    "ring": [_regular(48), _regular(48, 0.52)],
}


def _outline(label: int, side: float, angle: float) -> list[Loop]:
    """The outline around the origin, turned by `angle`, its box's longer side `side` pixels."""
    c, s = np.cos(angle), np.sin(angle)
    loops = [loop @ np.array([[c, s], [-s, c]]) for loop in _OUTLINES[CLASSES[label - 1]]]
    scale = side / np.ptp(loops[0], axis=0).max()
    return [loop * scale for loop in loops]


# --- textures -------------------------------------------------------------------------------------------


def _wave(rng: Generator, height: int, width: int, period: tuple[float, float]) -> NDArray[np.float32]:
    """A plane wave in −1…1 of random direction, phase and period (pixels)."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    k = 2 * np.pi / rng.uniform(*period)
    x = np.arange(width, dtype=np.float32) * np.float32(k * np.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(k * np.sin(angle))
    return np.sin(y[:, None] + x + np.float32(phase)).astype(np.float32)


def _ramp(rng: Generator, height: int, width: int) -> NDArray[np.float32]:
    """A linear gradient in −1…1 of random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(np.sin(angle))
    longest = np.float32(abs(np.cos(angle)) + abs(np.sin(angle)))
    return ((y[:, None] + x) / longest).astype(np.float32)


def _blotches(rng: Generator, height: int, width: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise in about −1…1 with `cells` random values along each side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _fill(rng: Generator, label: int, height: int, width: int) -> NDArray[np.float32]:
    """The pattern of one shape, in −1…1: nine times in ten that of its class."""
    match rng.choice(FILLS) if rng.random() < 0.1 else FILLS[label - 1]:
        case "ramp":
            return _ramp(rng, height, width)
        case "stripes":
            return np.sign(_wave(rng, height, width, (5, 9)))
        case "checks":
            return np.sign(_wave(rng, height, width, (7, 11)) * _wave(rng, height, width, (7, 11)))
        case "blotches":
            return _blotches(rng, height, width, 6)
        case "grain":
            return rng.uniform(-1, 1, (height, width)).astype(np.float32)
        case _:
            return np.zeros((height, width), dtype=np.float32)


def _background(rng: Generator, size: int) -> NDArray[np.float32]:
    """Ground [3, H, W] of gradient, smooth noise, stripes, strokes of little contrast, and grain."""

    def tint(strength: float) -> NDArray[np.float32]:
        return rng.uniform(-strength, strength, (3, 1, 1)).astype(np.float32)

    ground = _ramp(rng, size, size) * tint(28)
    ground += np.float32(rng.uniform(60, 195)) + tint(45)
    ground += _blotches(rng, size, size, int(rng.integers(3, 7))) * tint(18)
    ground += _blotches(rng, size, size, max(size // 6, 2)) * tint(10)
    if rng.random() < 0.5:
        ground += _wave(rng, size, size, (6, 30)) * tint(12)
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(2, 7))
    ground += _strokes(rng, size) + grain
    return np.clip(ground, 0, 255, out=ground)


def _strokes(rng: Generator, size: int) -> NDArray[np.float32]:
    """Lines and arcs, a little lighter or darker. None is closed: there is nothing to be found in them."""
    canvas = Image.new("L", (size, size), 128)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(4, 14)):
        x0, y0, x1, y1 = (rng.uniform(-0.2, 1.2, 4) * size).tolist()
        shade, width = int(128 + rng.uniform(-24, 24)), int(rng.integers(1, 4))
        if rng.random() < 0.6:
            pen.line([(x0, y0), (x1, y1)], fill=shade, width=width)
        else:
            radius, start = rng.uniform(0.05, 0.35) * size, rng.uniform(0, 360)
            circle = (x0 - radius, y0 - radius, x0 + radius, y0 + radius)
            pen.arc(circle, start, start + rng.uniform(40, 150), fill=shade, width=width)
    return np.asarray(canvas, dtype=np.float32) - 128


def _colour(rng: Generator, label: int, ground: NDArray[np.float32]) -> NDArray[np.float32]:
    """A colour [3, 1, 1] that stands out from `ground` [3, h, w]: nearly always of its class's hue."""
    hues = rng.random(16) if rng.random() < 0.04 else (label - 1 + rng.uniform(-0.3, 0.3, 16)) / len(CLASSES)
    saturations, values = rng.uniform(0.5, 1, 16), rng.uniform(0.3, 1, 16)
    candidates = 255 * np.array([hsv_to_rgb(*hsv) for hsv in zip(hues % 1, saturations, values, strict=True)])
    apart = np.linalg.norm(candidates - ground.mean(axis=(1, 2)), axis=1)
    far_enough = np.flatnonzero(apart >= 140)
    chosen = candidates[far_enough[0] if len(far_enough) else apart.argmax()]
    return chosen.astype(np.float32).reshape(3, 1, 1)


# --- drawing --------------------------------------------------------------------------------------------


@dataclass
class _Patch:
    """coverage: float [h, w] in 0…1, the part inside the image; window: where it lies; whole: all pixels."""

    coverage: NDArray[np.float32]
    window: tuple[slice, slice]
    whole: int

    @property
    def mask(self) -> NDArray[np.bool_]:
        return self.coverage >= 0.5


def _rasterise(loops: list[Loop], size: int, rim: bool = False) -> _Patch:
    """Antialiased coverage of an outline, or of a stroke along it (`rim`) within the same window."""
    x, y = (np.floor(loops[0].min(axis=0)).astype(int) - 1).tolist()
    right, bottom = (np.ceil(loops[0].max(axis=0)).astype(int) + 1).tolist()
    width, height = right - x, bottom - y
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for hole, loop in enumerate(loops):
        # Pillow counts from the middle of the first pixel, an outline from its edge
        points = [(px, py) for px, py in ((loop - (x, y)) * SUPERSAMPLING - 0.5).tolist()]
        if rim:
            pen.line([*points, points[0]], fill=255, width=SUPERSAMPLING + width * SUPERSAMPLING // 14)
        else:
            pen.polygon(points, fill=0 if hole else 255)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    x0, x1, y0, y1 = max(x, 0), min(right, size), max(y, 0), min(bottom, size)
    inside = coverage[y0 - y : y1 - y, x0 - x : x1 - x]
    return _Patch(inside, (slice(y0, y1), slice(x0, x1)), int((coverage >= 0.5).sum()))


def _paint(rng: Generator, image: NDArray[np.float32], label: int, loops: list[Loop], patch: _Patch) -> None:
    """Draw one shape into `image` [3, H, W] in place, coloured and textured, half with a rim."""
    region = image[:, *patch.window]
    swing = (rng.uniform(30, 60, (3, 1, 1)) * rng.choice([-1, 1])).astype(np.float32)
    paint = _colour(rng, label, region) + _fill(rng, label, *patch.coverage.shape) * swing
    if rng.random() < 0.5:
        rim = _rasterise(loops, image.shape[1], rim=True).coverage * np.float32(rng.uniform(0.3, 0.8))
        paint += rim * (np.float32(rng.choice([20, 235])) - paint)
    region += patch.coverage * (paint - region)
    np.clip(region, 0, 255, out=region)


def _leaves_enough(top: NDArray[np.int16], whole: list[int], patch: _Patch) -> bool:
    """Whether every shape stays in sight once `patch` lies on top, itself included."""
    number = len(whole)
    after = top.copy()
    after[patch.window][patch.mask] = number
    hidden = np.flatnonzero(np.bincount(top[patch.window][patch.mask] + 1, minlength=1)[1:]).tolist()
    return all(_in_sight(after == n, [*whole, patch.whole][n]) for n in [*hidden, number])


def _in_sight(visible: NDArray[np.bool_], whole: int) -> bool:
    return int(np.count_nonzero(visible)) >= MIN_VISIBLE * whole and max(box(visible)[2:]) >= MIN_SIDE


def _random_place(rng: Generator, side: float, size: int, others: list[tuple[float, float, float]]) -> Loop:
    """x, y of the next shape's centre; often so near one of `others` (x, y, side) that they overlap."""
    centre = rng.uniform(0, size, 2)
    if others and rng.random() < 0.6:
        x, y, other = others[rng.integers(len(others))]
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.4) * (side + other)
        centre = np.array([x + reach * np.cos(angle), y + reach * np.sin(angle)])
    return np.clip(centre, 0.4 * side, size - 0.4 * side)  # a tenth of the side may leave the image


def scene(seed: int, split: str, index: int, image_size: int = 128) -> Scene:
    """Draw image `index` (from 0) of a split: a pure function of its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image = _background(rng, image_size)
    top = np.full((image_size, image_size), -1, dtype=np.int16)  # number of the topmost shape in each pixel
    shapes: list[Shape] = []
    whole: list[int] = []  # pixels of each shape before anything lay on it
    others: list[tuple[float, float, float]] = []

    wanted = 0 if index % 20 == 9 else int(rng.integers(3, 7))
    if index % 20 == 19:
        shapes.append(_crowd(rng, image, top))
        whole.append(int((top == 0).sum()))
        wanted = int(rng.integers(1, 4))
    for _ in range(4 * (wanted - len(shapes))):
        if len(shapes) == wanted:
            break
        label = int(rng.integers(1, len(CLASSES) + 1))
        side = _random_side(rng, image_size)
        centre = _random_place(rng, side, image_size, others)
        loops = [loop + centre for loop in _outline(label, side, rng.uniform(-TILT, TILT))]
        patch = _rasterise(loops, image_size)
        if _leaves_enough(top, whole, patch):
            _paint(rng, image, label, loops, patch)
            top[patch.window][patch.mask] = len(shapes)
            shapes.append(Shape(label, loops, centre, patch.mask))
            whole.append(patch.whole)
            others.append((float(centre[0]), float(centre[1]), side))
    for number, shape in enumerate(shapes):
        shape.visible = top == number
    return Scene(np.ascontiguousarray(np.rint(image).astype(np.uint8).transpose(1, 2, 0)), shapes)


def _random_side(rng: Generator, size: int) -> float:
    low, mode, high = np.log([MIN_SIDE + 1, 60, MAX_SIDE - 2])
    return min(float(np.exp(rng.triangular(low, mode, high))), 0.75 * size)


def _crowd(rng: Generator, image: NDArray[np.float32], top: NDArray[np.int16]) -> Shape:
    """Paint a heap of small shapes of one class, too dense to be told apart, as number 0 of the scene."""
    size = len(top)
    label = int(rng.integers(1, len(CLASSES) + 1))
    middle = rng.uniform(0.3, 0.7, 2) * size
    for _ in range(rng.integers(14, 26)):
        centre = np.clip(middle + rng.normal(0, 0.1 * size, 2), 0.06 * size, 0.94 * size)
        side = rng.uniform(0.07, 0.13) * size
        loops = [loop + centre for loop in _outline(label, side, rng.uniform(-TILT, TILT))]
        patch = _rasterise(loops, size)
        _paint(rng, image, label, loops, patch)
        top[patch.window][patch.mask] = 0
    return Shape(label, [], middle, top == 0, crowd=True)
