"""A picture of what networks give for their time: accuracy or multiply-adds against latency."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cost import Setting, Timing
from .errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES, DOTS = (8.0, 5.0), 150  # 1200 × 750 pixels

# Where a label may stand, as seen from its point: direction, and reach in points (1/72 inch), best first.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
NEAR, *FAR = 7, 15, 25, 40


@dataclass(frozen=True)
class Point:
    """One network in the picture; `y` in the unit of the axis."""

    name: str
    inference: Timing
    y: float


def check_target(path: Path) -> None:
    """`UsageError` where the picture could not be drawn or written, to be asked before measuring."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the picture is a PNG; end its name in .png")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"{path} cannot be written; give a file in a folder that exists and may be written to"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--plot needs matplotlib ({error}): pip install 'resnext-backbones[plot]'"
        ) from error


def plot(points: Sequence[Point], y_label: str, setting: Setting, path: Path) -> None:
    """Write the PNG, at once or not at all. Error bars are the quartiles of the latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, point in enumerate(points):
        timing = point.inference
        spread = [[timing.latency_ms - timing.lower_ms], [timing.upper_ms - timing.latency_ms]]
        axes.errorbar(timing.latency_ms, point.y, xerr=spread, fmt="o", capsize=3, color=_colour(i))
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    images = "1 image" if setting.batch_size == 1 else f"{setting.batch_size} images"
    height, width = setting.input_size
    axes.set_xlabel(f"latency of inference, {images} of {height} × {width} (ms; median and quartiles)")
    axes.set_ylabel(y_label)
    threads = f", threads: {setting.threads}" if setting.device == "cpu" else ""
    axes.set_title(
        f"{setting.device_name}{threads}, batch: {setting.batch_size}, {setting.precision}, "
        f"{setting.memory_format.replace('_', ' ')}",
        fontsize="medium",
        wrap=True,
    )
    _label(axes, points)

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Each name at the first place where it covers nothing, or where it covers least."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # so that the layout is final and points have their pixels
    pixels_per_point = axes.figure.dpi / 72
    size = 8 * pixels_per_point  # of a mark, with some air
    taken = []
    for point in points:
        ends = [(x, point.y) for x in (point.inference.lower_ms, point.inference.upper_ms)]
        (left, height), (right, _) = axes.transData.transform(ends)
        taken.append(Bbox.from_extents(left, height - size / 2, right, height + size / 2))
        x, y = axes.transData.transform((point.inference.latency_ms, point.y))
        taken.append(Bbox.from_bounds(x - size / 2, y - size / 2, size, size))

    def covered(box: Bbox) -> float:
        shared = [Bbox.intersection(box, other) for other in (axes.bbox, *taken)]
        inside, *others = [both.width * both.height if both else 0.0 for both in shared]
        return box.width * box.height - inside + sum(others)

    for i, point in enumerate(points):
        text = axes.text(0, 0, point.name, fontsize="small")
        width, height = text.get_window_extent().size
        text.remove()
        x, y = axes.transData.transform((point.inference.latency_ms, point.y))
        places = {}
        for reach in (NEAR, *FAR):
            for dx, dy in DIRECTIONS:
                left = x + dx * reach * pixels_per_point - width * (1 - dx) / 2
                bottom = y + dy * reach * pixels_per_point - height * (1 - dy) / 2
                places[dx, dy, reach] = Bbox.from_bounds(left, bottom, width, height)
        dx, dy, reach = min(places, key=lambda place: covered(places[place]))
        taken.append(places[dx, dy, reach])
        leader = {"arrowstyle": "-", "color": _colour(i), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            point.name,
            (point.inference.latency_ms, point.y),
            (dx * reach, dy * reach),
            textcoords="offset points",
            ha=("right", "center", "left")[dx + 1],
            va=("top", "center", "bottom")[dy + 1],
            fontsize="small",
            color=_colour(i),
            arrowprops=leader if reach != NEAR else None,
        )


def _colour(i: int) -> str:
    return f"C{i % 10}"  # matplotlib's cycle: a label is told from its neighbour's by its colour, too
