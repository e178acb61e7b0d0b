"""Pictures of a judged split, drawn with matplotlib: confusion matrices, curves and bars."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.drawing.figures import COLOURS, GREY, figure_at, short, styles


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path | str, title: str) -> None:
    """Draws a confusion matrix, int [K, K], rows truth; colours and numbers are shares of a row.

    One of K + 1 is a detector's: its last column holds what was missed, its last row what was found where
    nothing is.

    Rows without any truth are grey. Up to 25 classes have their numbers, up to 100 their names; with more
    than 25 the pairs most often confused are listed.
    """
    import matplotlib
    from matplotlib.colors import PowerNorm

    labels = [short(name, 16) for name in [*names, "background"][: len(matrix)]]
    size, total = len(labels), matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(
        np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
    )
    inches = min(max(3.6, 0.42 * size), 9.0)
    listed = size > 25
    with figure_at(inches + 2.2 + 3 * listed, inches + 1.2, path) as figure:
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["Blues"].with_extremes(bad="#d9d9d9")
        image = axes.imshow(
            shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="auto"
        )
        axes.set(title=f"confusion of {title}", xlabel="predicted class", ylabel="true class")
        bar = figure.colorbar(
            image, ax=axes, fraction=0.04, aspect=30, pad=0.02, label="share of the true class"
        )
        bar.set_ticks([0, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
        if size <= 100:
            font = min(9.0, 72 * inches / size * 0.75)
            axes.set_xticks(range(size), labels, rotation=90 if size > 4 else 0, fontsize=font)
            axes.set_yticks(range(size), labels, fontsize=font)
            axes.tick_params(length=0 if size > 40 else 3)
        if not listed:
            for (row, column), value in np.ndenumerate(shares):
                if matrix[row, column]:
                    ink = "white" if value > 0.4 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
        if listed:
            pairs = _most_confused(matrix[: len(names), : len(names)], total, labels)
            text = "\n".join(["most often confused", "", *pairs])
            bar.ax.text(6, 1, text, transform=bar.ax.transAxes, fontsize=8, va="top", linespacing=1.4)


def _most_confused(matrix: np.ndarray, total: np.ndarray, labels: Sequence[str]) -> Iterator[str]:
    off = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    for cell in np.argsort(-off, axis=None, kind="stable")[:30]:
        true, found = divmod(int(cell), len(off))
        if times := off[true, found]:
            yield f"{labels[true]} → {labels[found]}: {times:,} ({times / total[true, 0]:.1%})"


def pr_curves(
    precision: np.ndarray, names: Sequence[str], path: Path | str, title: str, overlap: str = "IoU"
) -> None:
    """Draws precision over recall: the mean over classes at each threshold of `overlap`, and each class at
    0.50.

    precision: COCO's, [10, 101, K], over thresholds 0.50 … 0.95, recalls 0 … 1 and classes; −1 marks a
    class without ground truth. Of more than ten classes the five best and five worst have colours.
    """
    import matplotlib

    present = (precision > -1).any(axis=(0, 1))
    recalls = np.linspace(0, 1, precision.shape[1])
    with figure_at(10.5, 4.4, path) as figure:
        left, right = figure.subplots(1, 2)
        left.set_title(f"mean over classes, by {overlap} threshold")
        means = precision[:, :, present].mean(axis=2) if present.any() else precision[:, :, :0].sum(axis=2)
        for t, curve in enumerate(means):
            shade = matplotlib.colormaps["viridis"](t / 10)
            left.plot(
                recalls, curve, color=shade, label=f"{overlap} {0.5 + 0.05 * t:.2f}: AP {curve.mean():.3f}"
            )
        right.set_title(f"classes at {overlap} 0.50")
        ap = {k: precision[0, :, k].mean() for k in np.flatnonzero(present).tolist()}
        ranked = sorted(ap, key=lambda k: -ap[k])
        coloured = ranked if len(ranked) <= 10 else ranked[:5] + ranked[-5:]
        for k in set(ranked) - set(coloured):
            right.plot(recalls, precision[0, :, k], color=GREY, alpha=0.3, linewidth=0.6)
        for k, (colour, line) in styles(coloured).items():
            label = f"{short(names[k])}: AP50 {ap[k]:.3f}"
            right.plot(recalls, precision[0, :, k], color=colour, linestyle=line, label=label)
        for axes in (left, right):
            axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            axes.grid(alpha=0.3)
            if present.any():
                axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.suptitle(f"precision and recall of {title}")


TIDE_ERRORS = {
    "Cls": "wrong class",
    "Loc": "too little overlap",
    "Both": "wrong class and place",
    "Dupe": "found twice",
    "Bkg": "nothing there",
    "Miss": "missed",
    "FP": "all false positives",
    "FN": "all false negatives",
}


def tide(delta_ap: Mapping[str, float], counts: Mapping[str, int], path: Path | str, title: str) -> None:
    """Draws TIDE's errors (Bolya et al., arXiv 2008.08115) with what each costs and how many there are."""
    with figure_at(7.5, 4, path) as figure:
        axes = figure.add_subplot()
        labels = [f"{TIDE_ERRORS[error]} ({error})" for error in delta_ap]
        colours = [COLOURS[0] if error in counts else GREY for error in delta_ap]
        bars = axes.barh(labels, list(delta_ap.values()), color=colours)
        notes = [
            f"{delta:.3f}" + (f"  ({counts[error]:,})" if error in counts else "")
            for error, delta in delta_ap.items()
        ]
        axes.bar_label(bars, notes, padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(title=f"errors of {title}", xlabel="AP50 gained without them (in brackets: how many)")
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)


def per_class(values: Mapping[str, float], name: str, path: Path | str, title: str) -> None:
    """Draws a number of each class, best first; of more than 80 classes the 40 best and the 40 worst."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    shown = ranked if len(ranked) <= 80 else [*ranked[:40], *ranked[-40:]]
    with figure_at(7, 1.6 + 0.16 * max(len(shown), 4), path) as figure:
        axes = figure.add_subplot()
        bars = axes.barh(range(len(shown)), [value for _, value in shown], color=COLOURS[0])
        axes.bar_label(bars, [f"{value:.3f}" for _, value in shown], padding=3, fontsize=7)
        axes.set_yticks(range(len(shown)), [short(label) for label, _ in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set(title=f"{name} of {title}", xlabel=name, xlim=(0, 1.1))
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)
        if ranked:
            mean = sum(values.values()) / len(values)
            axes.axvline(mean, color=COLOURS[1], linewidth=1, zorder=0, label=f"mean {mean:.3f}")
            if len(shown) < len(ranked):
                note = f"{len(ranked) - len(shown)} classes between are left out"
                axes.axhline(39.5, color=GREY, linewidth=1, linestyle=":", label=note)
            axes.legend(fontsize=7, loc="lower right")
