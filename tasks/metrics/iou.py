"""Mean intersection over union of semantic segmentation, judged once over the whole split."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.images import IGNORED
from tasks.metrics import plots
from tasks.metrics.between import is_first
from tasks.metrics.confusion import by_name, confusion_matrix, share
from tasks.metrics.split import Numbers, SplitMetric, distinct
from tasks.metrics.table import write_csv


class Pixels(NamedTuple):
    """One image's confusion matrix, of which most cells are empty."""

    cells: np.ndarray  # int32 [n]: truth × K + prediction
    counts: np.ndarray  # int64 [n]


class MeanIoU(SplitMetric[Pixels]):
    """Overlap of predicted and true areas, each class's counted over the pixels of all images together.

    Numbers, in 0…1: `mIoU`, the mean of intersection / union over the classes that occur in truth or
    prediction; `pixel_accuracy`; `mean_accuracy`, the mean of each class's own over the classes that occur
    in truth. They are MMSegmentation's mIoU, aAcc and mAcc (mmseg/evaluation/metrics/iou_metric.py), also in
    which classes count; mIoU is torchmetrics' macro Jaccard index, too, while torchvision's reference script
    gives NaN where a class is absent. Pixels whose truth is 255 count nowhere; a split without any other has
    no numbers.

    After `compute`, `per_class`: IoU by class name; on rank 0 `confusion`.

    Args:
        names: of the classes, at most 255.
        image_ids: the split's images. None: whatever is reported is the split, and a missing image goes
            unnoticed.
    """

    per_class_name = "IoU"

    def __init__(self, names: Sequence[str], image_ids: Collection[int] | None = None) -> None:
        super().__init__(image_ids, source="segmentation")
        if len(names) > IGNORED:
            raise UsageError(
                f"{len(names)} classes: at most {IGNORED} fit beside {IGNORED}, which is ignored"
            )
        self.names = distinct(names, range(len(names)))

    def update(
        self, image_ids: Sequence[int], predictions: Sequence[Tensor], truths: Sequence[Tensor]
    ) -> None:
        """Takes a batch; of an image reported twice the first report stands.

        image_ids: B. predictions: B of [H, W], uint8 or int64, 0…K-1. truths: B of uint8 [H, W], 0…K-1, 255
        ignored. Both of the image as annotated, on any device.

        Raises UsageError where sizes differ or a class is outside 0…K-1.
        """
        classes = len(self.names)
        for image_id, prediction, truth in zip(image_ids, predictions, truths, strict=True):
            if prediction.shape != truth.shape:
                raise UsageError(
                    f"image {image_id}: prediction {list(prediction.shape)}, truth {list(truth.shape)}; "
                    "give both in the size of the image as annotated"
                )
            true, found = truth.cpu().numpy(), prediction.detach().cpu().numpy()
            judged = true != IGNORED
            true, found = true[judged], found[judged]
            for name, values in (("truth", true), ("prediction", found)):
                if values.size and not 0 <= values.min() <= values.max() < classes:
                    bad = values[(values < 0) | (values >= classes)][0]
                    raise UsageError(
                        f"class {bad} in the {name} of image {image_id} is not in 0…{classes - 1}: "
                        "give the model as many classes as the data has"
                    )
            matrix = confusion_matrix(true, found, classes).ravel()
            cells = matrix.nonzero()[0]
            self._found.setdefault(int(image_id), Pixels(cells.astype(np.int32), matrix[cells]))

    def _judge(self, found: Mapping[int, Pixels]) -> tuple[Numbers, dict[str, Numbers]]:
        confusion = self.confusion
        if not confusion.any():
            return {}, {"IoU": {}}
        per_class = _iou(confusion)
        numbers = {
            "mIoU": float(np.nanmean(per_class)),
            "pixel_accuracy": confusion.trace().item() / confusion.sum().item(),
            "mean_accuracy": float(np.nanmean(share(confusion.diagonal(), confusion.sum(axis=1)))),
        }
        return numbers, {"IoU": by_name(self.names, per_class)}

    @property
    def confusion(self) -> np.ndarray:
        """Pixels of this process's images; after `compute`, on rank 0, of all: int64 [K, K], rows truth."""
        return self._dense(*self._found.values())

    def _dense(self, *images: Pixels) -> np.ndarray:
        total = np.zeros(len(self.names) ** 2, dtype=np.int64)
        for image in images:
            total[image.cells] += image.counts
        return total.reshape(len(self.names), -1)

    def save(self, folder: Path | str, split: str) -> None:
        """Writes `per_image_<split>.csv`, a line an image; after `compute`, from rank 0.

        Columns: `image_id`, `pixels` (those judged), `pixel_accuracy`, `mIoU` (over the classes in this
        image's truth or prediction); both empty where no pixel is judged.
        """
        if not is_first():
            return
        header = ["image_id", "pixels", "pixel_accuracy", "mIoU"]
        rows = (self._row(image_id, image) for image_id, image in self._found.items())
        write_csv(Path(folder) / f"per_image_{split}.csv", header, rows)

    def _row(self, image_id: int, image: Pixels) -> list[object]:
        confusion = self._dense(image)
        pixels = confusion.sum().item()
        if pixels == 0:
            return [image_id, 0, "", ""]
        return [image_id, pixels, f"{confusion.trace() / pixels:.6f}", f"{np.nanmean(_iou(confusion)):.6f}"]

    def draw(self, folder: Path | str, split: str) -> list[Path]:
        """Draws `per_class_<split>.png` and `confusion_<split>.png` after `compute`, from rank 0; returns
        what it wrote.
        """
        if not is_first() or not self.per_class:
            return []
        confusion, per_class = (Path(folder) / f"{name}_{split}.png" for name in ("confusion", "per_class"))
        plots.per_class(self.per_class, self.per_class_name, per_class, f"pixels, {split}")
        plots.confusion(self.confusion, self.names, confusion, f"pixels, {split}")
        return [per_class, confusion]


def _iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class [K], NaN for one that occurs nowhere."""
    intersection = confusion.diagonal()
    return share(intersection, confusion.sum(axis=0) + confusion.sum(axis=1) - intersection)
