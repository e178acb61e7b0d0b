"""A task of one's own: one number an image, judged by the mean absolute error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resnext_backbones_example.csv_data import NumberBatch
from tasks.base import BaseTask
from tasks.drawing.pictures import captioned
from tasks.metrics.between import is_first
from tasks.metrics.split import SplitMetric
from tasks.metrics.table import write_csv
from tasks.prediction.predictions import Prediction


class RegressionTask(BaseTask):
    """Trains any classifier of one output (`model=classifier`) to give a number, by smooth L1.

    Args: those of `BaseTask`, and
        scale: about how large the numbers are; the network learns number / scale, which is about 1.
    """

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def losses(self, batch: NumberBatch) -> dict[str, Tensor]:
        return {"loss_smooth_l1": F.smooth_l1_loss(self._outputs(batch), batch.numbers / self.scale)}

    def predict(self, batch: NumberBatch) -> Tensor:
        """The number of each image, float32 [B]; reads only `images`, which may be all that a batch has."""
        return self._outputs(batch) * self.scale

    def metric(self, split: str) -> "AbsoluteError":
        return AbsoluteError(self.trainer.datamodule.annotations(split).files)

    def update(self, metric: "AbsoluteError", batch: NumberBatch) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.predict(batch)
        metric.update(batch.image_ids.tolist(), found, batch.numbers)
        return found, {"loss_smooth_l1": F.smooth_l1_loss(found / self.scale, batch.numbers / self.scale)}

    def picture(self, batch: NumberBatch, i: int, found: Tensor, min_score: float) -> Image.Image:
        return captioned(batch.images[i].cpu(), f"{found:.4g} (is {batch.numbers[i]:.4g})", right=None)

    def prediction(self, found: Tensor, about: Mapping[str, Any]) -> "Number":
        return Number(**about, value=float(found))

    def _outputs(self, batch: Any) -> Tensor:
        return self.model(self.model.normalise(batch.images)).float()[:, 0]


@dataclass(frozen=True, eq=False)
class Number(Prediction):
    """What `load_task(…).predict(images)` gives for an image: `value`, in the units of the CSV file."""

    value: float

    def row(self) -> dict[str, Any]:
        return {self.class_names[0]: f"{self.value:.6g}"}

    def _drawn(self, image: Tensor, score: float) -> Image.Image:
        return captioned(image, f"{self.class_names[0]} {self.value:.4g}", right=None)


class AbsoluteError(SplitMetric[tuple[float, float]]):
    """MAE and RMSE over the whole split.

    Its state, {image id: (found, truth)}, comes together once at the end, so neither the number of processes
    nor the size of batches changes a number.

    Args:
        files: of the split's images, by image id.
    """

    per_class_name = "MAE"  # there are no classes, and so no entries

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(range(len(files)), source="regression")
        self.files = files

    def update(self, image_ids: Sequence[int], found: Tensor, truths: Tensor) -> None:
        pairs = zip(found.tolist(), truths.tolist(), strict=True)
        for image_id, pair in zip(image_ids, pairs, strict=True):
            self._found.setdefault(image_id, pair)

    def _judge(self, found: Mapping[int, tuple[float, float]]) -> tuple[dict[str, float], dict[str, Any]]:
        values, truths = torch.tensor(list(found.values()), dtype=torch.float64).T
        errors = values - truths
        return {"MAE": errors.abs().mean().item(), "RMSE": errors.square().mean().sqrt().item()}, {}

    def save(self, folder: Path | str, split: str) -> None:
        """Writes `predictions_<split>.csv`."""
        if is_first():
            rows = ([self.files[i], value, truth] for i, (value, truth) in self._found.items())
            write_csv(Path(folder) / f"predictions_{split}.csv", ["file", "prediction", "truth"], rows)

    def draw(self, folder: Path | str, split: str) -> list[Path]:
        return []
