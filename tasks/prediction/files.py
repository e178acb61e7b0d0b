"""Predictions as files: COCO's results format, CSV, class maps, pictures; each whole or not there."""

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.checkpoint import replacing
from tasks.classification import ClassificationTask
from tasks.data.images import BACKGROUND, IGNORED
from tasks.data.tree import suffix
from tasks.drawing.marks import map_colour
from tasks.drawing.pictures import HATCH, save_jpeg, save_png
from tasks.metrics.accuracy import BEST
from tasks.prediction.arguments import Chosen
from tasks.prediction.predictions import ClassMap, ClassScores, Objects, Prediction
from tasks.prediction.predictor import Predictor, has_own_prediction
from tasks.segmentation import SemanticTask

Write = Callable[[Any], None]


def output_folder(asked: Path | None, run: str) -> Path:
    """A folder of this command alone: the one asked for, or `predictions/<run>`, numbered where that exists.

    Raises:
        UsageError: the folder asked for holds files already, or cannot be made.
    """
    if asked is not None:
        try:
            asked.mkdir(parents=True, exist_ok=True)
            if any(asked.iterdir()):
                raise UsageError(
                    f"--output {asked}: is not empty; give a new folder, or remove what is in it"
                )
        except OSError as fault:
            raise UsageError(f"--output {asked}: cannot be made: {fault.strerror}; give another") from fault
        return asked
    path = Path(run).resolve()
    if path.is_file():
        path = path.parent.parent if path.parent.name == "checkpoints" else path.with_suffix("")
    for number in range(1, 10_000):
        folder = Path("predictions") / (path.name if number == 1 else f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as fault:
            raise UsageError(f"{folder}: cannot be made: {fault.strerror}; give --output DIR") from fault
    raise UsageError(f"predictions/{path.name}-…: 9999 folders are taken; give --output DIR")


def results(predictor: Predictor, folder: Path, chosen: Chosen) -> AbstractContextManager[Write]:
    """What takes one prediction after the other and has written them all at its end."""
    if has_own_prediction(predictor.task):
        return _table(predictor, folder, chosen)
    if isinstance(predictor.task, SemanticTask):
        return _class_maps(predictor, folder, chosen)
    if isinstance(predictor.task, ClassificationTask):
        return _class_table(predictor, folder, chosen)
    return _coco_results(predictor, folder, chosen)


@contextmanager
def _coco_results(predictor: Predictor, folder: Path, chosen: Chosen) -> Iterator[Write]:
    """`predictions.json`, written as it comes, and `images.json`, which `pycocotools.coco.COCO` reads."""
    images: list[dict[str, Any]] = []
    ids = [category["id"] for category in predictor.categories]
    written = 0
    with replacing(folder / "predictions.json") as file:
        file.write(b"[")

        def write(found: Objects) -> None:
            nonlocal written
            height, width = found.size
            name = chosen.relative(found.index)
            images.append({"id": found.index + 1, "file_name": name, "height": height, "width": width})
            rows = [json.dumps(row, allow_nan=False) for row in coco_rows(found, found.index + 1, ids)]
            file.write("".join((",\n" if written + k else "\n") + row for k, row in enumerate(rows)).encode())
            written += len(rows)

        yield write
        file.write(b"\n]\n")
    about = {"description": "images of predictions.json", "root": str(chosen.root)}
    truth = {"info": about, "images": images, "annotations": [], "categories": _categories(predictor)}
    with replacing(folder / "images.json") as file:
        file.write(json.dumps(truth).encode() + b"\n")


def coco_rows(found: Objects, image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """An image's objects in COCO's results format (cocodataset.org/#format-results)."""
    boxes = found.boxes.double()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for label, box, score in zip(
            found.labels.tolist(), boxes.tolist(), found.scores.double().tolist(), strict=True
        )
    ]
    if found.rles is not None:
        for row, code in zip(rows, found.rles, strict=True):
            counts = code["counts"]
            text = counts.decode() if isinstance(counts, bytes) else counts
            row["segmentation"] = {"size": list(code["size"]), "counts": text}
    if found.keypoints is not None:
        for row, points in zip(rows, found.keypoints.double().flatten(1).tolist(), strict=True):
            row["keypoints"] = points
    return rows


def _categories(predictor: Predictor) -> list[dict[str, Any]]:
    if predictor.skeleton is None:
        return predictor.categories
    pose = {
        "keypoints": list(predictor.skeleton["names"]),
        "skeleton": [[a + 1, b + 1] for a, b in predictor.edges],
    }
    return [{**category, **pose} for category in predictor.categories]


@contextmanager
def _class_table(predictor: Predictor, folder: Path, chosen: Chosen) -> Iterator[Write]:
    """`predictions.csv`: an image a line, its most probable classes first."""
    number = min(BEST, len(predictor.class_names))
    others = [f"{column}_{rank}" for rank in range(2, number + 1) for column in ("prediction", "score")]
    with replacing(folder / "predictions.csv") as file:

        def write(found: ClassScores) -> None:
            best = [cell for name, p in found.best(number) for cell in (name, f"{p:.6f}")]
            file.write(_line(chosen.relative(found.index), *best))

        file.write(_line("file", "prediction", "score", *others))  # as the test stage names them
        yield write


@contextmanager
def _table(predictor: Predictor, folder: Path, chosen: Chosen) -> Iterator[Write]:
    """`predictions.csv`: an image a line, as a plug-in's own kind of prediction describes itself."""
    with replacing(folder / "predictions.csv") as file:
        columns: list[str] = []

        def write(found: Prediction) -> None:
            row = found.row()
            if not columns:
                columns.extend(row)
                file.write(_line("file", *columns))
            file.write(_line(chosen.relative(found.index), *(row[column] for column in columns)))

        yield write


def _line(*cells: Any) -> bytes:
    """Of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode(errors="surrogateescape")  # odd file names


@contextmanager
def _class_maps(predictor: Predictor, folder: Path, chosen: Chosen) -> Iterator[Write]:
    """`classes/`: a PNG with a palette for each image; `classes.txt`: the names of its values, from 0."""
    names = predictor.class_names
    palette = {k: (0, 0, 0) if name == BACKGROUND else map_colour(k, names) for k, name in enumerate(names)}
    palette[IGNORED] = HATCH
    flat = [value for k in range(256) for value in palette.get(k, (0, 0, 0))]
    files = chosen.own_names()

    def write(found: ClassMap) -> None:
        picture = Image.fromarray(found.classes.numpy())
        picture.putpalette(flat)
        save_png(picture, folder / "classes" / f"{files[found.index]}.png")

    yield write
    with replacing(folder / "classes.txt") as file:
        file.write("".join(f"{' '.join(name.split())}\n" for name in names).encode())


class Pictures:
    """Draws in threads of its own, since reading and writing images takes longer than drawing.

    Args:
        folder: where the pictures come, in the images' folders; JPEG for JPEG, else PNG.
        score: of objects that are drawn.
        threads: how many; at least 1.
    """

    def __init__(self, folder: Path, score: float, threads: int) -> None:
        self.folder, self.score = folder, score
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads)
        self._waiting: deque[Future[None]] = deque()
        self._names: list[str] | None = None

    def add(self, found: Prediction, chosen: Chosen) -> None:
        """Raises what went wrong with an earlier picture."""
        if self._names is None:
            self._names = chosen.own_names()
        while len(self._waiting) >= 2 * self._threads:  # not all images at once in memory
            self._waiting.popleft().result()
        file = chosen.files[found.index]
        self._waiting.append(self._pool.submit(self._write, found, file, self._names[found.index]))

    def finish(self) -> None:
        """Waits for the last ones; raises what went wrong with one, then those not begun are left out."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _write(self, found: Prediction, file: str, name: str) -> None:
        picture = found.draw(file, self.score)
        jpeg = suffix(file) in (".jpg", ".jpeg")
        save = save_jpeg if jpeg else save_png
        save(picture, self.folder / f"{name}{'.jpg' if jpeg else '.png'}")
