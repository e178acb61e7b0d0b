"""The history of a run, drawn with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from tasks.drawing.figures import figure_at, short, styles
from tasks.loggers import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[float], list[float]]  # x and y
TOTAL = ("train/loss", "val/loss")
MOST_CLASSES = 12  # whose curves can be told apart


class Panel(NamedTuple):
    x_label: str
    y_label: str
    curves: dict[str, Curve]


def history(metrics: Path | str, path: Path | str) -> None:
    """Draws a run's `metrics.jsonl` (the file or its folder): losses, learning rate, validation's metrics.

    Losses and learning rates stand over optimizer steps, metrics over epochs, or over steps where validation
    came more than once an epoch; those of single classes only where there are at most twelve. Of a step
    logged twice, as in a resumed run, the later line counts. More than 1,000 points become 500 means, the
    whole loss in a band from least to greatest. Points that are not finite are left out and counted.

    Raises UsageError if the file does not exist or a line is no JSON.
    """
    from matplotlib.ticker import MaxNLocator

    metrics = Path(metrics)
    run = metrics if metrics.is_dir() else metrics.parent
    panels = _panels(read_metrics(metrics))
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with figure_at(4.6 * columns, 3.2 * rows, path) as figure:
        nothing = "" if panels else ": nothing was logged"
        figure.suptitle(f"history of {short(run.resolve().name, 60)}{nothing}")
        for number, (title, panel) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, number)
            looks = _looks(panel.curves)
            omitted = sum(_draw_curve(axes, name, panel.curves[name], *look) for name, look in looks.items())
            note = f" ({omitted} not finite)" if omitted else ""
            axes.set(title=title + note, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.legend(fontsize=6.5, ncols=1 if len(looks) <= 6 else 2, framealpha=0.6, handlelength=3)
            axes.grid(alpha=0.3)


def _panels(records: Sequence[Mapping[str, Any]]) -> dict[str, Panel]:
    """The panels by their titles."""
    curves, epochs = _curves(records)
    learned = {name.partition("/")[2] for name in curves if name.startswith("train/")}
    losses = {title: Panel("step", "loss", {}) for title in ("loss", "parts of the loss")}
    losses["learning rate"] = Panel("step", "learning rate", {})
    metrics: dict[str, Panel] = {}
    for name, curve in curves.items():
        split, _, what = name.partition("/")
        if name in TOTAL:
            losses["loss"].curves[name] = curve
        elif split in ("train", "val") and what in learned:
            losses["parts of the loss"].curves[name] = curve
        elif name.startswith("lr-"):
            losses["learning rate"].curves[name] = curve
        elif split == "val":
            title, unit, label = _place(what)
            metrics.setdefault(title, Panel("step", unit, {})).curves[label] = curve
    return {title: panel for title, panel in losses.items() if panel.curves} | {
        title: _over_epochs(panel, epochs)
        for title, panel in metrics.items()
        if not title.endswith("by class") or len(panel.curves) <= MOST_CLASSES
    }


def _curves(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Curve], dict[float, float]]:
    """What was logged, by name and over steps, and the epoch of each step."""
    by_name: dict[str, dict[float, float]] = {}
    epochs: dict[float, float] = {}
    for record in records:
        step, epoch = record.get("step"), record.get("epoch")
        if not _is_number(step):
            continue
        if _is_number(epoch):
            epochs[step] = epoch
        for name, value in record.items():
            if name not in ("step", "epoch", "time") and _is_number(value):
                by_name.setdefault(name, {})[step] = value  # the later line counts
    return {name: (sorted(of), [of[step] for step in sorted(of)]) for name, of in by_name.items()}, epochs


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(metric: str) -> tuple[str, str, str]:
    """Where a metric is drawn: its panel, the label of its axis, its own label."""
    kind, _, name = metric.partition("/")
    if name:
        return f"{kind} by class", kind, name
    shape, bare = "", metric
    for prefix, of in (("mask_", " of masks"), ("keypoint_", " of keypoints")):
        if metric.startswith(prefix):
            shape, bare = of, metric.removeprefix(prefix)
    if bare.startswith("TIDE_"):
        return f"TIDE errors{shape}", "AP50 lost", metric
    if bare.startswith("AP"):
        return f"average precision{shape}", "AP", metric
    if bare.startswith("AR"):
        return f"average recall{shape}", "AR", metric
    return "validation", "metric", metric


def _over_epochs(panel: Panel, epochs: Mapping[float, float]) -> Panel:
    """The same over finished epochs, if each point has an epoch of its own."""
    for steps, _ in panel.curves.values():
        of = [epochs.get(step) for step in steps]
        if None in of or len(set(of)) < len(of):
            return panel
    curves = {n: ([epochs[s] + 1 for s in steps], values) for n, (steps, values) in panel.curves.items()}
    return panel._replace(x_label="epoch", curves=curves)


def _looks(curves: Mapping[str, Curve]) -> dict[str, tuple[str, str]]:
    """A colour and a kind of line for each; a part of the loss is solid in training, dashed in validation."""
    parts = {name: name.partition("/") for name in curves}
    if TOTAL[0] in curves or not all(split in ("train", "val") for split, _, _ in parts.values()):
        return styles(curves)
    colours = styles(dict.fromkeys(part for _, _, part in parts.values()))
    return {n: (colours[part][0], "-" if split == "train" else "--") for n, (split, _, part) in parts.items()}


def _draw_curve(axes: "Axes", name: str, curve: Curve, colour: str, line: str) -> int:
    """How many points were left out."""
    x, y = np.array(curve[0], dtype=float), np.array(curve[1], dtype=float)
    finite = np.isfinite(y)
    style: dict[str, Any] = {"color": colour, "linestyle": line, "label": short(name), "linewidth": 1.3}
    if len(x) > 1000:
        bins = [(x[part], y[part]) for part in np.array_split(np.flatnonzero(finite), 500) if len(part)]
        middle = [part.mean() for part, _ in bins]
        if name in TOTAL:  # of many curves the bands would only cover each other
            least, greatest = [part.min() for _, part in bins], [part.max() for _, part in bins]
            axes.fill_between(middle, least, greatest, color=colour, alpha=0.15, linewidth=0)
        axes.plot(middle, [part.mean() for _, part in bins], **style)
    else:
        y[~finite] = np.nan  # a gap in the line
        axes.plot(x, y, marker="o" if len(x) <= 30 else "", markersize=3, **style)
    return int((~finite).sum())
