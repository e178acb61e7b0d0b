"""Pictures of numbers: what is drawn, read back from the figures, and the files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.drawing.history import history as draw_history
from tasks.metrics import plots

HOSTILE = ["a", "_b", "$\\frac{$", "two\nlines", "", "very " * 30, "猫"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures written, in order."""
    figures: list[Figure] = []
    write = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        write(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes}


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def words(axes: Axes) -> set[str]:
    return {text.get_text() for text in axes.texts}


@pytest.fixture
def history(tmp_path: Path, drawn: list[Figure]) -> Callable[..., dict[str, Axes]]:
    """Draws the history of these records and returns its panels."""

    def history(*records: dict[str, Any]) -> dict[str, Axes]:
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        draw_history(file, tmp_path / "history.png")
        with Image.open(tmp_path / "history.png") as picture:
            picture.verify()
        return panels(drawn[-1])

    return history


def test_history(history: Callable[..., dict[str, Axes]]) -> None:
    shown = history(
        {"step": 0, "epoch": 0, "time": 1.0, "lr-SGD": 0.1},
        {"step": 0, "epoch": 0, "time": 1.0, "train/loss": 3.0, "train/loss_mask": 1.0},
        {"step": 9, "epoch": 0, "time": 2.0, "train/loss": 2.0, "train/loss_mask": 0.5},
        {"step": 9, "epoch": 0, "time": 2.0, "val/loss": 2.5, "val/loss_mask": 0.7},
        {"step": 9, "epoch": 0, "time": 2.0, "val/AP": 0.1, "val/mask_AP50": 0.2, "val/TIDE_Cls": 0.3},
        {"step": 19, "epoch": 1, "time": 3.0, "val/AP": 0.4, "val/AR1": 0.5, "val/keypoint_AR": 0.6},
        {"step": 19, "epoch": 1, "time": 3.0, "test/AP": 0.9},  # the final judgement is no history
    )
    assert {title: curves(axes) for title, axes in shown.items()} == {
        "loss": {"train/loss": [(0, 3), (9, 2)], "val/loss": [(9, 2.5)]},
        "parts of the loss": {"train/loss_mask": [(0, 1), (9, 0.5)], "val/loss_mask": [(9, 0.7)]},
        "learning rate": {"lr-SGD": [(0, 0.1)]},
        "average precision": {"AP": [(1, 0.1), (2, 0.4)]},
        "average precision of masks": {"mask_AP50": [(1, 0.2)]},
        "TIDE errors": {"TIDE_Cls": [(1, 0.3)]},
        "average recall": {"AR1": [(2, 0.5)]},
        "average recall of keypoints": {"keypoint_AR": [(2, 0.6)]},
    }
    assert list(shown)[:3] == ["loss", "parts of the loss", "learning rate"]
    assert (shown["loss"].get_xlabel(), shown["average precision"].get_xlabel()) == ("step", "epoch")
    train, val = shown["parts of the loss"].lines
    assert train.get_color() == val.get_color()
    assert train.get_linestyle() != val.get_linestyle()


def test_history_of_other_tasks(history: Callable[..., dict[str, Axes]]) -> None:
    shown = history({"step": 5, "epoch": 0, "val/top1": 0.5, "val/mIoU": 0.25, "val/loss": 1.0})
    assert curves(shown["validation"]) == {"top1": [(1, 0.5)], "mIoU": [(1, 0.25)]}


def test_history_of_classes(history: Callable[..., dict[str, Axes]]) -> None:
    few = {"step": 5, "epoch": 0, "val/AP": 0.5, "val/mask_AP/cat": 0.4, "val/AP/black/white cat": 0.6}
    shown = {title: curves(axes) for title, axes in history(few).items()}
    assert shown == {
        "average precision": {"AP": [(1, 0.5)]},
        "mask_AP by class": {"cat": [(1, 0.4)]},
        "AP by class": {"black/white cat": [(1, 0.6)]},
    }
    many = {"step": 5, "epoch": 0, "val/AP": 0.5} | {f"val/AP/{i}": 0.1 for i in range(13)}
    assert list(history(many)) == ["average precision"]


def test_history_of_a_resumed_run(history: Callable[..., dict[str, Axes]]) -> None:
    # Steps 2 and 3 were lost by the kill and done again.
    values = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.5)]
    shown = history(*({"step": s, "epoch": 0, "train/loss": v} for s, v in values))
    assert curves(shown["loss"])["train/loss"] == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.5)]


def test_history_of_a_loss_that_was_not_finite(history: Callable[..., dict[str, Axes]]) -> None:
    values = [1.0, "NaN", 0.5, "Infinity", None]
    shown = history(*({"step": s, "epoch": 0, "train/loss": v} for s, v in enumerate(values)))
    (points,) = curves(shown["loss (2 not finite)"]).values()
    assert [p for p in points if math.isfinite(p[1])] == [(0, 1.0), (2, 0.5)]


def test_history_of_several_validations_an_epoch(history: Callable[..., dict[str, Axes]]) -> None:
    shown = history(*({"step": s, "epoch": s // 10, "val/AP": s / 100} for s in (4, 9, 14)))
    assert curves(shown["average precision"])["AP"] == [(4, 0.04), (9, 0.09), (14, 0.14)]
    assert shown["average precision"].get_xlabel() == "step"


def test_history_of_many_steps(history: Callable[..., dict[str, Axes]]) -> None:
    shown = history(*({"step": s, "epoch": 0, "train/loss": float(s % 2)} for s in range(5000)))
    points = curves(shown["loss"])["train/loss"]
    assert len(points) == 500
    assert {y for _, y in points} == {0.5}  # the means
    (band,) = shown["loss"].collections
    assert {y for _, y in band.get_paths()[0].vertices} == {0.0, 1.0}


def test_history_without_anything(history: Callable[..., dict[str, Axes]], drawn: list[Figure]) -> None:
    assert history() == {}
    assert "nothing was logged" in drawn[-1].get_suptitle()
    assert history({"step": None, "epoch": 0, "train/loss": 1.0}, {"hp_metric": -1}) == {}


def test_history_names_the_folder(tmp_path: Path, drawn: list[Figure]) -> None:
    with pytest.raises(UsageError, match="no such file"):
        draw_history(tmp_path, tmp_path / "history.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "epoch": 0, "train/loss": 1}\n')
    draw_history(tmp_path, tmp_path / "history.png")
    assert drawn[-1].get_suptitle().startswith(f"history of {tmp_path.name[:50]}")


def test_confusion_shows_shares_of_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    matrix = np.array([[3, 1, 0], [0, 0, 0], [0, 1, 1]])
    plots.confusion(matrix, ["cat", "dog", "eel"], tmp_path / "c.png", "images, val")
    axes = drawn[0].axes[0]
    shares = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shares == pytest.approx(np.array([[0.75, 0.25, 0], [math.nan] * 3, [0, 0.5, 0.5]]), nan_ok=True)
    assert words(axes) == {"0.75", "0.25", "0.50"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "eel"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("classes", [26, 1000])
def test_confusion_of_many_classes_lists_the_worst(tmp_path: Path, drawn: list[Figure], classes: int) -> None:
    matrix = np.eye(classes, dtype=np.int64) * 90
    matrix[2, 1], matrix[5, 0] = 10, 30
    matrix[0, -1] = matrix[-1, 3] = 1000  # missed, and found where nothing is: not confused
    plots.confusion(matrix, [f"n{i}" for i in range(classes - 1)], tmp_path / "c.png", "boxes, val")
    (listed,) = (text for axes in drawn[0].axes for text in words(axes))
    assert listed.splitlines()[2:] == ["n5 → n0: 30 (25.0%)", "n2 → n1: 10 (10.0%)"]


def test_precision_and_recall(tmp_path: Path, drawn: list[Figure]) -> None:
    precision = np.zeros((10, 101, 3))
    precision[0] = [1.0, 0.5, -1.0]  # at IoU 0.50; the third class has no ground truth
    precision[1:, :, 2] = -1.0
    plots.pr_curves(precision, ["cat", "dog", "eel"], tmp_path / "pr.png", "boxes, val")
    mean, by_class = drawn[0].axes
    assert {name: points[50] for name, points in curves(mean).items()} == {
        "IoU 0.50: AP 0.750": (0.5, 0.75),
        **{f"IoU {0.5 + 0.05 * t:.2f}: AP 0.000": (0.5, 0.0) for t in range(1, 10)},
    }
    assert {n: p[7] for n, p in curves(by_class).items()} == {
        "cat: AP50 1.000": (0.07, 1.0),
        "dog: AP50 0.500": (0.07, 0.5),
    }


def test_precision_of_many_classes(tmp_path: Path, drawn: list[Figure]) -> None:
    precision = np.broadcast_to(np.arange(30) / 100, (10, 101, 30))
    plots.pr_curves(precision, [f"n{i}" for i in range(30)], tmp_path / "pr.png", "boxes, val")
    _, by_class = drawn[0].axes
    assert len(by_class.lines) == 30
    legend = [text.get_text() for text in by_class.get_legend().get_texts()]
    assert [name.partition(":")[0] for name in legend] == [
        f"n{i}" for i in (29, 28, 27, 26, 25, 4, 3, 2, 1, 0)
    ]


def test_precision_without_ground_truth(tmp_path: Path) -> None:
    plots.pr_curves(np.full((10, 101, 2), -1.0), ["cat", "dog"], tmp_path / "pr.png", "boxes, val")
    assert (tmp_path / "pr.png").exists()


def test_tide(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.tide({"Cls": 0.25, "Miss": 0.0, "FP": 0.5}, {"Cls": 1234, "Miss": 0}, tmp_path / "t.png", "boxes")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.0, 0.5]
    assert words(axes) == {"0.250  (1,234)", "0.000  (0)", "0.500"}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "wrong class (Cls)",
        "missed (Miss)",
        "all false positives (FP)",
    ]


def test_per_class(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.per_class({"cat": 0.2, "dog": 0.8, "eel": 0.5}, "IoU", tmp_path / "c.png", "pixels, val")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "eel", "cat"]
    assert [bar.get_width() for bar in axes.patches] == [0.8, 0.5, 0.2]
    assert axes.get_legend().get_texts()[0].get_text() == "mean 0.500"


def test_per_class_of_many(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.per_class({f"n{i}": i / 1000 for i in range(1000)}, "AP", tmp_path / "c.png", "boxes, val")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [
        i / 1000 for i in (*range(999, 959, -1), *range(39, -1, -1))
    ]
    assert "920 classes between are left out" in {t.get_text() for t in axes.get_legend().get_texts()}
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.height < 3000


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_names_are_data(tmp_path: Path, drawn: list[Figure]) -> None:
    """Neither formulas nor line ends nor a leading underscore, which would hide it, mean anything."""
    k = len(HOSTILE)
    plots.confusion(np.eye(k, dtype=np.int64), HOSTILE, tmp_path / "c.png", HOSTILE[2])
    plots.pr_curves(np.ones((10, 101, k)), HOSTILE, tmp_path / "pr.png", HOSTILE[2])
    plots.per_class(dict.fromkeys(HOSTILE, 0.5), "AP", tmp_path / "p.png", HOSTILE[2])
    assert len(drawn) == 3
    legend = [text.get_text() for text in drawn[1].axes[1].get_legend().get_texts()]
    assert len(legend) == k
    assert "two lines: AP50 1.000" in legend
    assert max(map(len, legend)) < 50


def test_nothing_of_the_callers_changes(tmp_path: Path) -> None:
    """Neither backend nor style; and the caller's style does not show."""
    with matplotlib.rc_context({"axes.facecolor": "red", "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        plots.per_class({"cat": 0.5}, "AP", tmp_path / "red.png", "boxes")
        assert dict(matplotlib.rcParams) == before
    plots.per_class({"cat": 0.5}, "AP", tmp_path / "white.png", "boxes")
    assert (tmp_path / "red.png").read_bytes() == (tmp_path / "white.png").read_bytes()


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.png"
    plots.per_class({"cat": 0.5}, "AP", path, "boxes")
    before, style = path.read_bytes(), dict(matplotlib.rcParams)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plots.per_class({"cat": 0.9}, "AP", path, "boxes")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
    assert dict(matplotlib.rcParams) == style
