"""Classification: one class an image, judged by accuracy."""

from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask, takes
from tasks.data.class_transforms import ClassBatch, Mix
from tasks.drawing.pictures import captioned
from tasks.metrics.accuracy import Accuracy


class ClassificationTask(BaseTask):
    """Trains a classifier by cross-entropy.

    Args: those of `BaseTask`, and
        model: `normalise(images)` and `model(normalised) -> logits` (see
            `tasks.models.classifier.Classifier`).
        mixup, cutmix: alpha of the Beta distribution that pairs of images are mixed by (arXiv 1710.09412,
            1905.04899), 0 for none; where both are given each batch takes one of them.
        label_smoothing: share of the target spread over all classes (arXiv 1512.00567, §7), in training only.

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
        return self._logits(batch).softmax(dim=1)

    def metric(self, split: str) -> Accuracy:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        files = data.annotations(split)
        return Accuracy(self.names, {i: files.file_name(i) for i in range(len(files))})

    def update(self, metric: Any, batch: ClassBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._logits(batch)
        metric.update(batch.image_ids.tolist(), logits, batch.labels)
        return logits.softmax(dim=1), {"loss_cross_entropy": F.cross_entropy(logits, batch.labels)}

    def picture(self, batch: ClassBatch, i: int, found: Tensor, min_score: float) -> Image.Image:
        truth, guess = int(batch.labels[i]), int(found.argmax())
        said = f"{self.names[guess]} {float(found[guess]):.2f}"
        text = said if guess == truth else f"{said} (is {self.names[truth]})"
        return captioned(batch.images[i].cpu(), text, right=guess == truth)

    def _logits(self, batch: ClassBatch) -> Tensor:
        return self.model(self.model.normalise(batch.images)).float()  # type: ignore[operator]
