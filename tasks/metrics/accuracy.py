"""Accuracy of classification, judged once over the whole split."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.metrics import plots
from tasks.metrics.between import is_first
from tasks.metrics.confusion import by_name, confusion_matrix, share
from tasks.metrics.split import Numbers, SplitMetric, distinct
from tasks.metrics.table import write_csv

BEST = 5
DRAWN = 2000  # classes; ImageNet-21k's matrix alone would take 3.8 GB


class Guess(NamedTuple):
    """What one image is and what it was taken for."""

    truth: int
    ranked: tuple[int, ...]  # the (at most five) best classes, best first
    scores: tuple[float, ...]  # their softmax


class Accuracy(SplitMetric[Guess]):
    """Share of images whose class is found.

    Numbers, in 0…1: `top1`; `top5`, the class is among the five best, only where there are more than five;
    `mean_class_accuracy`, the mean of the classes' own top1 over those that the split has images of, in which
    a rare class counts as much as a frequent one (balanced accuracy). Of tied classes the first one counts
    as better, as `argmax` has it. An empty split has no numbers.

    After `compute`, `per_class`: top1 of the images of a class, by name; on rank 0 `confusion`.

    Args:
        names: of the classes, in the order of the logits.
        image_ids: the split's images; as a mapping to file names, these stand in the saved predictions.
            None: whatever is reported is the split, and a missing image goes unnoticed.
    """

    per_class_name = "accuracy"

    def __init__(
        self, names: Sequence[str], image_ids: Collection[int] | Mapping[int, str] | None = None
    ) -> None:
        super().__init__(image_ids, source="classification")
        self.names = distinct(names, range(len(names)))
        self._files = image_ids if isinstance(image_ids, Mapping) else {}

    def update(self, image_ids: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Takes a batch; of an image reported twice the first report stands.

        image_ids: B. logits: float [B, K], any float dtype, on any device. labels: int [B], 0…K-1.

        Raises RuntimeError for logits that are NaN or infinite, UsageError for another number of logits than
        of names, or for a label outside 0…K-1.
        """
        if logits.shape != (len(image_ids), len(self.names)) or labels.shape != (len(image_ids),):
            raise UsageError(
                f"logits {list(logits.shape)}, labels {list(labels.shape)} for {len(image_ids)} images and "
                f"{len(self.names)} classes: give the model as many classes as the data has"
            )
        values, truths = logits.detach().cpu().double(), labels.cpu()  # double: each row's own, in any batch
        for bad in (~values.isfinite().all(dim=1)).nonzero()[:1, 0].tolist():
            raise RuntimeError(f"image {image_ids[bad]}: its logits are not finite")
        for bad in ((truths < 0) | (truths >= len(self.names))).nonzero()[:1, 0].tolist():
            raise UsageError(
                f"label {truths[bad]} of image {image_ids[bad]} is not in 0…{len(self.names) - 1}: "
                "give the model as many classes as the data has"
            )
        ranked = values.argsort(dim=1, descending=True, stable=True)[:, :BEST]
        scores = values.softmax(dim=1).gather(1, ranked)
        guesses = zip(truths.tolist(), ranked.tolist(), scores.tolist(), strict=True)
        for image_id, (truth, best, score) in zip(image_ids, guesses, strict=True):
            self._found.setdefault(int(image_id), Guess(truth, tuple(best), tuple(score)))

    def _judge(self, found: Mapping[int, Guess]) -> tuple[Numbers, dict[str, Numbers]]:
        truths, predictions = self._pairs()
        right = truths == predictions
        images = np.bincount(truths, minlength=len(self.names))
        per_class = share(np.bincount(truths[right], minlength=len(self.names)), images)
        numbers = {"top1": right.mean().item()}
        if len(self.names) > BEST:
            numbers["top5"] = sum(g.truth in g.ranked for g in found.values()) / len(found)
        numbers["mean_class_accuracy"] = float(np.nanmean(per_class))
        return numbers, {"accuracy": by_name(self.names, per_class)}

    @property
    def confusion(self) -> np.ndarray:
        """Of this process's images; after `compute`, on rank 0, of all: int64 [K, K], rows truth."""
        return confusion_matrix(*self._pairs(), len(self.names))

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The class that each image is and the one that it was taken for."""
        pairs = [(guess.truth, guess.ranked[0]) for guess in self._found.values()]
        truths, predictions = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return truths, predictions

    def save(self, folder: Path | str, split: str) -> None:
        """Writes `predictions_<split>.csv`, a line an image; after `compute`, from rank 0.

        Columns: `image_id`, `file` (where file names are known), `truth`, `prediction`, `score`, and the next
        best as `prediction_2`, `score_2`, … up to 5. Scores are softmax.
        """
        if not is_first():
            return
        ranks = range(2, 1 + min(BEST, len(self.names)))
        header = ["image_id", *(["file"] if self._files else []), "truth", "prediction", "score"]
        header += [f"{column}_{rank}" for rank in ranks for column in ("prediction", "score")]

        def row(image_id: int, guess: Guess) -> list[object]:
            file = [self._files[image_id]] if self._files else []
            best = zip(guess.ranked, guess.scores, strict=True)
            cells = [cell for k, score in best for cell in (self.names[k], f"{score:.6f}")]
            return [image_id, *file, self.names[guess.truth], *cells]

        rows = (row(image_id, guess) for image_id, guess in self._found.items())
        write_csv(Path(folder) / f"predictions_{split}.csv", header, rows)

    def draw(self, folder: Path | str, split: str) -> list[Path]:
        """Draws `per_class_<split>.png` and, of at most 2,000 classes, `confusion_<split>.png`, after
        `compute`, from rank 0; returns what it wrote.
        """
        if not is_first() or not self.per_class:
            return []
        confusion, per_class = (Path(folder) / f"{name}_{split}.png" for name in ("confusion", "per_class"))
        plots.per_class(self.per_class, self.per_class_name, per_class, f"images, {split}")
        if len(self.names) > DRAWN:
            return [per_class]
        plots.confusion(self.confusion, self.names, confusion, f"images, {split}")
        return [per_class, confusion]
