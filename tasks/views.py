"""Several views of each image in evaluation, mirrored and resized: test-time augmentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.v2 import functional as transforms

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.data.alike import MULTIPLE
from tasks.data.batches import DetectionBatch
from tasks.data.segmentations import Size

LARGEST = 4.0  # scale; memory grows with its square

# The options of the group `tta`, in configs/tta/, by name
NAMED: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"flip": True},
    "flip_multiscale": {"flip": True, "scales": [0.75, 1.0, 1.25]},
}


@dataclass(frozen=True)
class View:
    """One way to look at an image: at `scale` times the size that the network is fed with, perhaps mirrored.

    It is made of the pixels that the network is fed with, as Detectron2's `DatasetMapperTTA` has it, so a
    scale above 1 enlarges and brings no detail of the file back.
    """

    scale: float = 1.0
    flip: bool = False

    def size(self, height: int, width: int) -> Size:
        """Of this view of an image; no side falls below one pixel."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def of(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] without padding; resized as the data are, bilinear with antialiasing."""
        size = self.size(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            images = transforms.resize(images, list(size), antialias=True)
        return images.flip(-1) if self.flip else images

    def of_batch(self, batch: DetectionBatch) -> DetectionBatch:
        """Each image without its padding, padded again at the right and at the bottom; without targets."""
        if self == PLAIN:
            return batch
        images = [
            self.of(image[:, :height, :width])
            for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True)
        ]
        sizes = torch.tensor([image.shape[-2:] for image in images])
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in sizes.amax(dim=0).tolist())
        padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        return batch._replace(images=torch.stack(padded), sizes=sizes, targets=[{} for _ in images])

    def boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes (float32 [N, 4], xyxy) of an image of this size, in pixels of the view."""
        x1, y1, x2, y2 = (boxes * self._scale_of_boxes(boxes, height, width)).unbind(dim=1)
        if self.flip:
            _, side = self.size(height, width)
            x1, x2 = side - x2, side - x1
        return torch.stack([x1, y1, x2, y2], dim=1)

    def boxes_back(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes in pixels of the view (float32 [N, 4], xyxy), in those of the image, and within it."""
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        if self.flip:
            _, side = self.size(height, width)
            x1, x2 = side - x2, side - x1
        there = torch.stack([x1, y1, x2, y2], dim=1) / self._scale_of_boxes(boxes, height, width)
        return clip_boxes_to_image(there, (height, width))

    def _scale_of_boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Of x and y each its own, since sides are whole pixels."""
        y, x = (mine / theirs for mine, theirs in zip(self.size(height, width), (height, width), strict=True))
        return boxes.new_tensor([x, y, x, y])

    def maps_back(self, maps: Tensor, mirror: Sequence[int] | None = None) -> Tensor:
        """Maps of boxes or of an image (float [..., h, w]) as the unmirrored image has them.

        mirror: for maps of keypoints [N, K, h, w], what stands at each place after mirroring.
        """
        if not self.flip:
            return maps
        maps = maps.flip(-1)
        return maps if mirror is None else maps[:, mirror]

    def __str__(self) -> str:
        return f"{'mirrored ' if self.flip else ''}×{self.scale:g}"


PLAIN = View()


def views_of(given: Mapping[str, Any] | None) -> tuple[View, ...]:
    """The views that `task.views` asks for: each scale as it is and, with `flip`, mirrored; at least one.

    given: `flip` (bool, false) and `scales` (numbers, [1.0]); None and {} are the image as it is.

    Raises UsageError for other keys, for no scale at all, one that is not above 0 and up to 4, or the same
    one twice.
    """
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"task.views={given}: flip and scales are wanted, as {{flip: true, scales: [1.0]}}")
    said = {"flip": False, "scales": [1.0]} | dict(given or {})
    if unknown := sorted(map(str, set(said) - {"flip", "scales"})):
        raise UsageError(f"task.views.{unknown[0]}: it takes flip and scales, as in tta=flip_multiscale")
    flip, scales = said["flip"], said["scales"]
    if not isinstance(flip, bool):
        raise UsageError(f"task.views.flip={flip}: true or false is wanted")
    if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
        raise UsageError(f"task.views.scales={scales}: a list of numbers is wanted, as [0.75, 1.0, 1.25]")
    numbers = [s for s in scales if isinstance(s, int | float) and not isinstance(s, bool)]
    if len(set(numbers)) < len(scales) or not all(0 < s <= LARGEST for s in numbers):
        raise UsageError(
            f"task.views.scales={list(scales)}: different numbers above 0 and up to {LARGEST:g} are wanted"
        )
    sides = (False, True) if flip else (False,)
    return tuple(View(float(scale), mirrored) for scale in numbers for mirrored in sides)


class ViewedTask(BaseTask):
    """A task that can judge and predict by several views of each image.

    During a fit the validation takes the plain image, since views multiply its time; the stages validate and
    test, and predictions, take all views. A split's losses are always those of the plain image.

    Args: those of `BaseTask`, and
        views: see `views_of`; None: each image as it is.
    """

    def __init__(self, *args: Any, views: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.views = views_of(views)
        self.judged_views = self.views  # those that a split is judged by in the trainer's present stage

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.judged_views = (PLAIN,) if stage == "fit" else self.views

    def on_validation_start(self) -> None:
        self._tell()

    def on_test_start(self) -> None:
        self._tell()

    def _tell(self) -> None:
        if self.judged_views != (PLAIN,):
            said = ", ".join(map(str, self.judged_views))
            self.print(f"views of each image: {said}; the losses are those of the plain one")


def suppression(model: nn.Module) -> tuple[float, int]:
    """A detector's IoU of suppression and the most detections that it reports of an image.

    Raises UsageError for a detector that does not declare them by torchvision's names.
    """
    declaring = getattr(model, "roi_heads", model)
    iou, most = (getattr(declaring, name, None) for name in ("nms_thresh", "detections_per_img"))
    if iou is None or most is None:
        raise UsageError(
            f"task.views: {type(model).__name__} does not say how detections of several views are merged: "
            "give it the attributes nms_thresh and detections_per_img, or leave out tta"
        )
    return float(iou), int(most)


def merged(found: Sequence[Mapping[str, Tensor]], iou: float, most: int) -> dict[str, Tensor]:
    """Detections of one image in several views as those of one: the best of each class where they overlap.

    Suppression of each class by itself over the detections of all views, as Detectron2's
    `GeneralizedRCNNWithTTA` has it; scores stay as they are, so an object that one view alone shows is found.

    Args:
        found: of each view `boxes` (float32 [N, 4], xyxy, pixels of the image), `scores` and `labels` ([N]).
        iou: boxes of a class that overlap by more are the same object.
        most: so many are kept, the best.

    Returns:
        The same of all, scores descending.
    """
    columns = ("boxes", "scores", "labels")
    boxes, scores, labels = (torch.cat([of_view[column] for of_view in found]) for column in columns)
    kept = batched_nms(boxes, scores, labels, iou)[:most]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
