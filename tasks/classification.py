"""Classification: one class an image, judged by accuracy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.base import takes
from tasks.data.class_transforms import ClassBatch, Mix
from tasks.drawing.pictures import captioned
from tasks.metrics.accuracy import Accuracy
from tasks.views import PLAIN, View, ViewedTask

LEAST = torch.finfo(torch.float32).tiny  # a probability whose logarithm is finite


class ClassificationTask(ViewedTask):
    """Trains a classifier by cross-entropy.

    Args: those of `ViewedTask`, and
        model: `normalise(images)` and `model(normalised) -> logits` (see
            `tasks.models.classifier.Classifier`).
        mixup, cutmix: alpha of the Beta distribution that pairs of images are mixed by (arXiv 1710.09412,
            1905.04899), 0 for none; where both are given each batch takes one of them.
        label_smoothing: share of the target spread over all classes (arXiv 1512.00567, §7), in training only.

    With several views an image's probabilities are their mean.

    Raises UsageError for a model of another task.
    """

    def __init__(
        self,
        *args: Any,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mixup, self.cutmix, self.label_smoothing = mixup, cutmix, label_smoothing
        if not takes(self.model, "normalised") or not hasattr(self.model, "normalise"):
            raise UsageError(
                f"task=classification: {type(self.model).__name__} is no classifier of images; choose "
                "model=classifier, or another task"
            )

    def losses(self, batch: ClassBatch) -> dict[str, Tensor]:
        images = self.model.normalise(batch.images)  # type: ignore[operator]
        mix = Mix(self.mixup, self.cutmix, len(self.names), self.label_smoothing)
        images, labels = mix(images, batch.labels)
        return {"loss_cross_entropy": F.cross_entropy(self.model(images), labels)}

    def predict(self, batch: ClassBatch) -> Tensor:
        """Probabilities of the classes, float32 [B, K]."""
        return self._probabilities(batch, self.views)

    def metric(self, split: str) -> Accuracy:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        files = data.annotations(split)
        return Accuracy(self.names, {i: files.file_name(i) for i in range(len(files))})

    def update(self, metric: Any, batch: ClassBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._logits(batch.images)
        probabilities = self._probabilities(batch, self.judged_views, logits)
        # Of plain images the logits as they are: where one class is all but certain, rounding ties the others
        judged = logits if self.judged_views == (PLAIN,) else probabilities.clamp(min=LEAST).log()
        metric.update(batch.image_ids.tolist(), judged, batch.labels)
        return probabilities, {"loss_cross_entropy": F.cross_entropy(logits, batch.labels)}

    def picture(self, batch: ClassBatch, i: int, found: Tensor, min_score: float) -> Image.Image:
        truth, guess = int(batch.labels[i]), int(found.argmax())
        said = f"{self.names[guess]} {float(found[guess]):.2f}"
        text = said if guess == truth else f"{said} (is {self.names[truth]})"
        return captioned(batch.images[i].cpu(), text, right=guess == truth)

    def _logits(self, images: Tensor) -> Tensor:
        return self.model(self.model.normalise(images)).float()  # type: ignore[operator]

    def _probabilities(self, batch: ClassBatch, views: Sequence[View], plain: Tensor | None = None) -> Tensor:
        """The mean over the views; `plain`: the logits of the images as they are, where they are known."""
        by_view = [
            plain if view == PLAIN and plain is not None else self._logits(view.of(batch.images))
            for view in views
        ]
        return torch.stack([logits.softmax(dim=1) for logits in by_view]).mean(dim=0)
