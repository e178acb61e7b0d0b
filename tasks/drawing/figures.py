"""What pictures of numbers share: a figure that becomes a file, colours, names that fit.

Figures are built without pyplot, so that neither the backend nor the style of whoever imports this changes.
Names of classes are data: a `$` in one is a dollar sign.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tasks.checkpoint import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 150  # an inch

# Okabe and Ito's colours for colour-blind readers (https://jfly.uni-koeln.de/color), the darkest first
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#8c8c8c"

Key = TypeVar("Key")


@contextmanager
def figure_at(width: float, height: float, path: Path | str) -> Iterator["Figure"]:
    """A figure of so many inches to draw on, written to `path`, whole or not at all, when the block ends."""
    import matplotlib.style
    from matplotlib.figure import Figure

    style = {"text.parse_math": False, "text.usetex": False, "axes.titlesize": 10, "axes.labelsize": 9}
    style |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "figure.titlesize": 11}
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
        yield figure
        with replacing(Path(path)) as file:
            figure.savefig(file, format="png")


def styles(curves: Iterable[Key]) -> dict[Key, tuple[str, str]]:
    """A colour and a kind of line for each curve, no two alike in the first 28."""
    looks = product(("-", "--", ":", "-."), COLOURS)
    return {curve: (colour, line) for curve, (line, colour) in zip(curves, cycle(looks), strict=False)}


def short(name: str, length: int = 24) -> str:
    """On one line, cut with "…", and not starting with "_", which would keep it out of legends."""
    name = " ".join(name.split()) or " "
    name = name if len(name) <= length else name[: length - 1] + "…"
    return "\u200b" + name if name.startswith("_") else name
