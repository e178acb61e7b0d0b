"""Draws docs/images/forms.png: a block in its three forms (arXiv 1611.05431, figure 3), read off real blocks.

uv run python docs/draw_forms.py [FILE.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import nn

from resnext_backbones import BlockSpec, Bottleneck, convert

BLOCK = Bottleneck(BlockSpec(in_channels=256, width=128, out_channels=256, cardinality=32))
TITLES = {
    "a": "(a) split, transform, sum",
    "b": "(b) split, concatenate, one 1×1",
    "c": "(c) grouped convolution",
}
SPLIT, WHOLE, LINE = "#dbe9f6", "#fde6cf", "#33475b"
TOP, BOTTOM = 5.6, -0.3  # where a block is entered, and where its result is added to the shortcut
SHORTCUT = 4.05


def words(conv: nn.Conv2d) -> str:
    kernel = f"{conv.kernel_size[0]}×{conv.kernel_size[1]}"
    groups = f"\n{conv.groups} groups" if conv.groups > 1 else ""
    return f"{conv.in_channels}, {kernel}, {conv.out_channels}{groups}"


def box(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.28", "facecolor": colour, "edgecolor": LINE, "linewidth": 1.0}
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=style, zorder=3)


def line(ax: Axes, *points: tuple[float, float], arrow: bool = False) -> None:
    xs, ys = zip(*points, strict=True)
    ax.plot(xs, ys, color=LINE, linewidth=1.0, zorder=1, solid_capstyle="round")
    if arrow:
        ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": LINE}, zorder=1)


def column(ax: Axes, x: float, convs: list[nn.Conv2d], heights: list[float], colour: str) -> None:
    for conv, y in zip(convs, heights, strict=True):
        box(ax, x, y, words(conv), colour)


def frame(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=11, pad=8)
    ax.text(0, TOP + 0.1, f"{BLOCK.conv1.in_channels} channels in", ha="center", va="bottom", fontsize=8.5)
    line(ax, (0, TOP), (0, TOP - 0.35))
    line(ax, (0, TOP - 0.35), (SHORTCUT, TOP - 0.35), (SHORTCUT, BOTTOM), (0.18, BOTTOM), arrow=True)
    ax.text(0, BOTTOM, "+", ha="center", va="center", fontsize=12, zorder=4)
    ax.scatter([0], [BOTTOM], s=230, facecolor="white", edgecolor=LINE, zorder=3)
    line(ax, (0, BOTTOM - 0.18), (0, BOTTOM - 0.75), arrow=True)
    ax.text(0, BOTTOM - 0.85, f"{BLOCK.conv3.out_channels} channels out", ha="center", va="top", fontsize=8.5)
    ax.set_xlim(-3.6, 4.5)
    ax.set_ylim(-1.7, 6.3)
    ax.set_axis_off()


def branches(ax: Axes, form: str) -> None:
    block = convert(BLOCK, form)
    paths = [block.branches[0], block.branches[1], block.branches[-1]]
    xs = [-2.6, -0.5, 2.7]
    heights = [4.3, 3.2, 2.1] if form == "a" else [4.3, 3.2]
    merge = 0.95 if form == "a" else 2.25
    for x, path in zip(xs, paths, strict=True):
        convs = [layer for layer in (path.conv1, path.conv2, path.conv3) if layer is not None]
        line(ax, (0, TOP - 0.35), (x, TOP - 0.75), (x, heights[-1]), (x, heights[-1] - 0.35), (0, merge))
        column(ax, x, convs, heights, SPLIT)
    for y in heights:
        dots = f"… {len(block.branches)} paths …" if y == heights[0] else "…"
        ax.text(1.1, y, dots, ha="center", fontsize=8.5)
    if form == "a":
        box(ax, 0, merge, "sum", WHOLE)
        line(ax, (0, merge), (0, BOTTOM + 0.18), arrow=True)
    else:
        box(ax, 0, merge, "concatenate", WHOLE)
        line(ax, (0, merge), (0, BOTTOM + 0.18), arrow=True)
        box(ax, 0, 1.0, words(block.conv3), WHOLE)


def whole(ax: Axes) -> None:
    line(ax, (0, TOP - 0.35), (0, BOTTOM + 0.18), arrow=True)
    column(ax, 0, [BLOCK.conv1, BLOCK.conv2, BLOCK.conv3], [4.3, 2.75, 1.2], WHOLE)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images/forms.png"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for form, ax in zip("abc", axes, strict=True):
        frame(ax, TITLES[form])
        whole(ax) if form == "c" else branches(ax, form)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
