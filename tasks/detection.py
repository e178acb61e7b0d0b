"""Detection: boxes with labels, judged by COCO's average precision."""

from typing import Any

from torch import Tensor

from tasks.base import BaseTask
from tasks.data.transforms import DetectionBatch
from tasks.metrics.coco import CocoAP


class DetectionTask(BaseTask):
    """Trains any detector that gives a dict of losses in training mode and detections otherwise.

    Args: those of `BaseTask`; `model` is called as `model(images, sizes, targets)` (see `tasks.models.rcnn.RCNN`).
    """

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        return self.model(batch.images, batch.sizes, batch.targets)

    def predict(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the images as annotated."""
        detections = self.model(batch.images, batch.sizes)
        scales = (batch.original_sizes / batch.sizes).flip(1).repeat(1, 2).float()
        return [
            {**found, "boxes": found["boxes"] * scale}
            for found, scale in zip(detections, scales.to(batch.images.device), strict=True)
        ]

    def metric(self, split: str) -> CocoAP:
        return CocoAP(self.trainer.datamodule.annotation_file(split))  # type: ignore[attr-defined]

    def update(self, metric: Any, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        detections = self.predict(batch)
        metric.update(batch.image_ids.tolist(), detections)
        return detections
