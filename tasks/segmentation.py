"""Semantic segmentation: a class for every pixel, judged by intersection over union."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.base import takes
from tasks.data.alike import alike
from tasks.data.batches import DetectionBatch
from tasks.data.images import IGNORED
from tasks.drawing.pictures import draw_classes, side_by_side
from tasks.metrics.iou import MeanIoU
from tasks.views import PLAIN, View, ViewedTask

AT_ONCE = 16  # classes whose scores are brought to an image's full size together


class SemanticTask(ViewedTask):
    """Trains a semantic segmentation network by the cross-entropy of every pixel that is not ignored.

    Args: those of `ViewedTask`, and
        model: `model(images, sizes) -> logits`, float32 [B, K, H, W] of the padded images' size.

    With several views a pixel's class is the most probable one by the mean of their probabilities, each
    brought to the size that the network is fed with.

    Raises UsageError for a model of another task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not takes(self.model, "images", "sizes") or hasattr(self.model, "evaluate"):  # as detectors have
            raise UsageError(
                f"task=semantic_segmentation: {type(self.model).__name__} does not classify pixels; choose "
                "model=semantic_fpn or model=deeplabv3, or another task"
            )

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.sizes)
        return {"loss_semantic": pixel_cross_entropy(logits, [t["semantic"] for t in batch.targets])}

    def predict(self, batch: DetectionBatch) -> list[Tensor]:
        """The class of every pixel of each image as annotated, uint8 [H, W], 0…K - 1."""
        found: dict[int, Tensor] = {}
        for places, part in alike(batch):
            found |= zip(places, self._classes(part, self._scores(part, self.views)), strict=True)
        return [found[i] for i in range(len(batch.image_ids))]

    def metric(self, split: str) -> MeanIoU:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return MeanIoU(self.names, image_ids=data.image_ids(split))

    def update(self, metric: Any, batch: DetectionBatch) -> tuple[list[Tensor], dict[str, Tensor]]:
        found: dict[int, Tensor] = {}
        loss = torch.zeros((), device=batch.images.device)
        for places, part in alike(batch):
            logits = self.model(part.images, part.sizes)
            scores = self._scores(part, self.judged_views, logits)
            found |= zip(places, self._classes(part, scores), strict=True)
            of_part = pixel_cross_entropy(logits, [t["semantic"] for t in part.targets])
            loss = loss + of_part * (len(places) / len(batch.image_ids))
        in_order = [found[i] for i in range(len(batch.image_ids))]
        metric.update(batch.image_ids.tolist(), in_order, [t["original_semantic"] for t in batch.targets])
        return in_order, {"loss_semantic": loss}

    def picture(self, batch: DetectionBatch, i: int, found: Tensor, min_score: float) -> Image.Image:
        height, width = batch.sizes[i].tolist()
        image = batch.images[i, :, :height, :width].cpu()
        truth = batch.targets[i]["semantic"].cpu()
        shown = F.interpolate(found[None, None].cpu(), (height, width), mode="nearest-exact")[0, 0]
        return side_by_side(draw_classes(image, truth, self.names), draw_classes(image, shown, self.names))

    def _scores(self, batch: DetectionBatch, views: Sequence[View], plain: Tensor | None = None) -> Tensor:
        """What decides on a pixel's class, float32 [B, K, H, W]: logits, of several views mean probabilities.

        plain: the logits of the images as they are, where they are known.
        """
        if views == (PLAIN,):
            return self.model(batch.images, batch.sizes) if plain is None else plain
        mean: Tensor | None = None
        for view in views:
            for places, part in alike(view.of_batch(batch)):
                known = plain if view == PLAIN else None
                logits = self.model(part.images, part.sizes) if known is None else known
                if mean is None:
                    mean = logits.new_zeros(len(batch.images), logits.shape[1], *batch.images.shape[-2:])
                for i, scores, (height, width) in zip(places, logits, part.sizes.tolist(), strict=True):
                    there = view.maps_back(scores[:, :height, :width].softmax(dim=0))
                    size = batch.sizes[i].tolist()
                    if [height, width] != size:
                        (there,) = F.interpolate(there[None], size, mode="bilinear", align_corners=False)
                    mean[i, :, : size[0], : size[1]] += there / len(views)
        assert mean is not None  # there is a view at least
        return mean

    @staticmethod
    def _classes(batch: DetectionBatch, logits: Tensor) -> list[Tensor]:
        """One image and a few classes at a time: at full size the scores of all would fill the memory."""
        result = []
        for scores, (height, width), size in zip(
            logits, batch.sizes.tolist(), batch.original_sizes.tolist(), strict=True
        ):
            best = scores.new_full(size, -torch.inf)
            classes = torch.zeros(size, dtype=torch.uint8, device=scores.device)
            for first in range(0, len(scores), AT_ONCE):
                seen = scores[None, first : first + AT_ONCE, :height, :width]
                if [height, width] != size:
                    seen = F.interpolate(seen, size, mode="bilinear", align_corners=False)
                highest, which = seen[0].max(dim=0)
                classes = torch.where(highest > best, (which + first).to(torch.uint8), classes)
                best = torch.maximum(best, highest)
            result.append(classes)
        return result


def pixel_cross_entropy(logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """The mean over all pixels of a batch that are not `IGNORED`; 0 where all are.

    logits: float32 [B, K, H, W]. maps: uint8 [h, w] of each image within its padding, which is ignored.
    (torch's own mean is NaN where every pixel is ignored.)
    """
    targets = logits.new_full(logits.shape[:1] + logits.shape[2:], IGNORED, dtype=torch.int64)
    for target, drawn in zip(targets, maps, strict=True):
        target[: drawn.shape[0], : drawn.shape[1]] = drawn
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
