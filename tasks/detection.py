"""Detection: boxes with labels, and the masks or keypoints of each, judged by COCO's average precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from resnext_backbones.errors import UsageError
from tasks.data.alike import alike
from tasks.data.batches import DetectionBatch
from tasks.data.keypoints import TO_CENTRE
from tasks.data.transforms import MIN_SIDE, nearest
from tasks.drawing.pictures import draw, side_by_side
from tasks.metrics.coco import CocoAP
from tasks.models.masks import paste
from tasks.models.one_stage import OneStage
from tasks.models.rcnn import RCNN
from tasks.views import PLAIN, View, ViewedTask, merged, suppression

Detections = list[dict[str, Any]]


class DetectionTask(ViewedTask):
    """Trains any detector: two-stage or one-stage, of boxes alone or also of masks or keypoints.

    Args: those of `ViewedTask`, and
        model: called as `model(images, sizes, targets)`; has `evaluate` (see `tasks.models.rcnn.RCNN`).
        iou_types: what is judged, of "bbox", "segm" and "keypoints".

    With several views the detections of all are merged (`tasks.views.merged`). Masks and keypoints are those
    of the merged boxes, looked for in every view: the mean of the masks' probabilities, as in Detectron2's
    `GeneralizedRCNNWithTTA`, and of the keypoints' heatmaps, as Detectron's `KPS_AUG` has it by `HM_AVG`.

    Raises UsageError for a model of another task, and with several views for one that they are not known of.
    """

    def __init__(self, *args: Any, iou_types: Sequence[str] = ("bbox",), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.iou_types = tuple(iou_types)
        refuse_other_model(self.model, set(iou_types))
        if self.views != (PLAIN,):
            suppression(self.model)
            if set(iou_types) != {"bbox"} and not hasattr(self.model, "maps"):
                raise UsageError(
                    f"task.views: {type(self.model).__name__} has no method `maps`, by which masks and "
                    "keypoints of several views are averaged (tasks/models/rcnn.py); leave out tta"
                )

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        return self.model(batch.images, batch.sizes, batch.targets)

    def predict(self, batch: DetectionBatch) -> Detections:
        """What is found in each image, in the pixels of the image as annotated.

        A dict of `boxes` (float32 [N, 4], xyxy), `scores` ([N], descending), `labels` (int64 [N], 1…K), and
        where the model gives them `rles` (N run-length masks as pycocotools has them) or `keypoints` (float32
        [N, P, 3]: x, y, 1; as in COCO's files, where whole numbers are the centres of pixels).
        """
        return self._in_original_pixels(batch, self._found(batch, self.views))

    def metric(self, split: str) -> CocoAP:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return CocoAP(
            data.annotation_file(split),
            self.iou_types,
            image_ids=data.image_ids(split),
            keypoint_sigmas=data.skeleton.sigmas if data.skeleton else None,
        )

    def update(self, metric: Any, batch: DetectionBatch) -> tuple[Detections, dict[str, Tensor]]:
        detections: dict[int, dict[str, Any]] = {}
        losses: dict[str, Tensor] = {}
        for places, part in alike(batch):
            targets = [learnable(t, size) for t, size in zip(part.targets, part.sizes.tolist(), strict=True)]
            found, of_part = self.model.evaluate(part.images, part.sizes, targets)  # type: ignore[operator]
            detections |= zip(places, found, strict=True)
            for name, loss in of_part.items():
                losses[name] = losses.get(name, 0) + loss * (len(places) / len(batch.image_ids))
        plain = [detections[i] for i in range(len(batch.image_ids))]
        in_order = self._in_original_pixels(batch, self._found(batch, self.judged_views, plain))
        metric.update(batch.image_ids.tolist(), in_order)
        return in_order, losses

    def picture(
        self, batch: DetectionBatch, i: int, found: Mapping[str, Any], min_score: float
    ) -> Image.Image:
        image, truth, shown = self.layers(batch, i, found, min_score)
        edges = (self.record.get("skeleton") or {}).get("edges", ())
        left, right = (
            draw(
                image,
                layer["boxes"],
                layer["labels"],
                self.names,
                layer.get("scores"),
                layer.get("iscrowd"),
                masks=layer.get("masks"),
                keypoints=layer.get("keypoints"),
                edges=edges,
            )
            for layer in (truth, shown)
        )
        return side_by_side(left, right)

    def layers(
        self, batch: DetectionBatch, i: int, found: Mapping[str, Any], min_score: float
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Image `i` as the network saw it, its truth, and what was found with confidence, in its pixels."""
        height, width = batch.sizes[i].tolist()
        scale = (batch.sizes[i] / batch.original_sizes[i]).flip(0).float().cpu()  # of x and y
        shown = confident(found, min_score)
        shown["boxes"] = shown["boxes"] * scale.repeat(2)
        if "keypoints" in shown:
            continuous = shown["keypoints"] + torch.tensor(TO_CENTRE)
            shown["keypoints"] = continuous * torch.cat([scale, torch.ones(1)])
        if "rles" in shown:
            masks = [torch.from_numpy(rle.decode(code)) for code in shown.pop("rles")]
            shown["masks"] = [nearest(mask, (height, width)) for mask in masks]
        truth = {key: value.cpu() for key, value in batch.targets[i].items()}
        return batch.images[i, :, :height, :width].cpu(), truth, shown

    def _found(
        self, batch: DetectionBatch, views: Sequence[View], plain: Detections | None = None
    ) -> Detections:
        """What the views find in each image, in the batch's pixels.

        plain: what is found in the images as they are, where it is known.
        """
        by_view = [
            plain if view == PLAIN and plain is not None else self._detections(view.of_batch(batch))
            for view in views
        ]
        if views == (PLAIN,):  # merging would suppress once more, with other rounding
            return by_view[0]
        sizes, rule = batch.sizes.tolist(), suppression(self.model)
        result: Detections = []
        for of_views, size in zip(zip(*by_view, strict=True), sizes, strict=True):
            there = [
                {**found, "boxes": view.boxes_back(found["boxes"], *size)}
                for view, found in zip(views, of_views, strict=True)
            ]
            result.append(dict(merged(there, *rule)))
        if set(self.iou_types) != {"bbox"}:
            for found, maps in zip(result, self._maps(batch, views, result), strict=True):
                found |= self.model.of_maps(maps, found["boxes"])  # type: ignore[operator]
        return result

    def _detections(self, batch: DetectionBatch) -> Detections:
        found: dict[int, dict[str, Any]] = {}
        for places, part in alike(batch):
            found |= zip(places, self.model(part.images, part.sizes), strict=True)
        return [found[i] for i in range(len(batch.image_ids))]

    def _maps(
        self, batch: DetectionBatch, views: Sequence[View], found: Detections
    ) -> list[dict[str, Tensor]]:
        """Of each image the maps of its boxes (`RCNN.maps`), the mean over the views.

        The network's maps of all views are not kept from the first pass: memory would grow with their number.
        """
        sizes = batch.sizes.tolist()
        mirrored = "keypoints" in self.iou_types and any(view.flip for view in views)
        mirror = {"heatmaps": self._mirror()} if mirrored else {}
        means: list[dict[str, Tensor]] = [{} for _ in found]
        for view in views:
            for places, part in alike(view.of_batch(batch)):
                boxes = [view.boxes(found[i]["boxes"], *sizes[i]) for i in places]
                labels = [found[i]["labels"] for i in places]
                of_part = self.model.maps(part.images, part.sizes, boxes, labels)  # type: ignore[operator]
                for i, maps in zip(places, of_part, strict=True):
                    for name, values in maps.items():
                        there = view.maps_back(values, mirror.get(name)) / len(views)
                        means[i][name] = means[i][name] + there if name in means[i] else there
        return means

    def _mirror(self) -> list[int]:
        """Which keypoint stands in the place of each after mirroring (`tasks.data.keypoints.Skeleton`)."""
        skeleton = self.record.get("skeleton") or {}
        mirror = skeleton.get("mirror")
        if not isinstance(mirror, list | tuple) or sorted(mirror) != list(range(len(skeleton["names"]))):
            raise UsageError(
                "task.views: the checkpoint does not say which keypoints a mirror swaps (skeleton.mirror); "
                "predict without tta"
            )
        return list(mirror)

    @staticmethod
    def _in_original_pixels(batch: DetectionBatch, detections: Sequence[Mapping[str, Tensor]]) -> Detections:
        scales = (batch.original_sizes / batch.sizes).flip(1).float().to(batch.images.device)  # of x and y
        result = []
        for found, scale, size in zip(detections, scales, batch.original_sizes.tolist(), strict=True):
            there: dict[str, Any] = {**found, "boxes": found["boxes"] * scale.repeat(2)}
            if "masks" in there:
                there["rles"] = paste(there.pop("masks"), there["boxes"], *size)
            if "keypoints" in there:
                continuous = found["keypoints"] * torch.cat([scale, scale.new_ones(1)])
                there["keypoints"] = continuous - scale.new_tensor(TO_CENTRE)
            result.append(there)
        return result


def refuse_other_model(model: nn.Module, iou_types: set[str]) -> None:
    finds = {"bbox"}
    if isinstance(model, RCNN):
        finds |= {"segm"} if model.roi_heads.has_mask() else set()
        finds |= {"keypoints"} if model.roi_heads.has_keypoint() else set()
    elif not isinstance(model, OneStage) and hasattr(model, "evaluate"):
        return  # of someone else's detector only its author knows
    if not hasattr(model, "evaluate") or finds != iou_types | {"bbox"}:
        said = f"which finds {', '.join(sorted(finds))}" if hasattr(model, "evaluate") else "no detector"
        raise UsageError(
            f"task.iou_types={sorted(iou_types)} does not fit {type(model).__name__}, {said}: "
            "choose model=faster_rcnn, retinanet or fcos for task=detection, mask_rcnn for "
            "task=instance_segmentation, keypoint_rcnn for task=keypoints"
        )


def learnable(target: Mapping[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Of an image's annotations as they stand in the file those that training would learn from."""
    height, width = size
    boxes = clip_boxes_to_image(target["boxes"], (height, width))
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1) & ~target["iscrowd"]
    if "masks" in target:
        keep &= target["masks"].bool().flatten(1).any(dim=1)
    return {key: value[keep] for key, value in {**target, "boxes": boxes}.items()}


def confident(found: Mapping[str, Any], min_score: float) -> dict[str, Any]:
    """The detections of one image with a score of at least `min_score`, on the CPU."""
    keep = (found["scores"] >= min_score).cpu()
    return {
        key: value.cpu()[keep]
        if isinstance(value, Tensor)
        else [v for v, kept in zip(value, keep.tolist(), strict=True) if kept]
        for key, value in found.items()
    }
