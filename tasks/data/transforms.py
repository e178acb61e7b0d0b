"""What is done to one image and its target: resized, cropped, mirrored, drawn, cleaned.

Coordinates are continuous: pixel (0, 0) covers 0…1, an image of width W ends at x = W, and mirroring takes x
to W - x, for boxes and keypoints alike (which COCO's files count otherwise: `keypoints.TO_CENTRE`).
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from resnext_backbones.errors import UsageError
from tasks.data.segmentations import Size, Window, render

Target = dict[str, Any]

MIN_SIDE = 1.0  # pixels; a narrower box is not trained on
OF_OBJECTS = (  # a target's entries with one row for each object
    "boxes",
    "labels",
    "annotation_ids",
    "iscrowd",
    "segmentations",
    "masks",
    "keypoints",
    "visibility",
)


def resized(height: int, width: int, short: int, long: int) -> Size:
    """The size whose shorter side is `short`, unless the longer would exceed `long`; the aspect is kept.

    As Detectron2's `ResizeShortestEdge`. No side falls below one pixel.
    """
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class HorizontalFlip(v2.Transform):
    """Mirrors an image and its target, as `v2.RandomHorizontalFlip` with the same random numbers.

    Of mirrored keypoints left and right change places too: the target's `keypoint_flip` (int64 [K]) names the
    keypoint whose place each one takes. torchvision's flip would leave them, and count x in whole pixels.

    Args:
        p: probability.

    Raises:
        UsageError: `p` is not a probability.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UsageError(f"data.flip={p}: a probability, 0 to 1, is wanted")
        self.p = p

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if torch.rand(1) >= self.p:
            return image, target
        width = image.shape[-1]
        flipped = {
            name: F.horizontal_flip(value) if isinstance(value, tv_tensors.TVTensor) else value
            for name, value in target.items()
        }
        if "keypoints" in target:
            points, order = target["keypoints"], target["keypoint_flip"]
            x, y = points.as_subclass(Tensor)[:, order].unbind(dim=2)
            flipped["keypoints"] = tv_tensors.wrap(torch.stack([width - x, y], dim=2), like=points)
            flipped["visibility"] = target["visibility"][:, order]
        return F.horizontal_flip(image), flipped


class Clean(v2.Transform):
    """Makes a target fit for training again after augmentation.

    Boxes: finite, within the image, at least a pixel wide, in this order, since clamping would turn an
    infinite box into one of full width, and sanitising alone would drop every box that reaches over the edge.
    An object whose mask has no pixel left is dropped. Keypoints outside the image count as not there.

    Args:
        tighten: whether boxes are drawn anew around their masks, for images of which parts were cut off.
    """

    def __init__(self, tighten: bool = False) -> None:
        super().__init__()
        self.tighten = tighten

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if "boxes" in target:
            target = within_image(target)
        if "masks" in target:
            target = select(target, target["masks"].as_subclass(Tensor).flatten(1).any(dim=1).bool())
        if "masks" in target and self.tighten:
            around = masks_to_boxes(target["masks"].as_subclass(Tensor))
            around[:, 2:] += 1  # from the last pixel's index to its far edge
            target["boxes"] = tv_tensors.wrap(around.to(target["boxes"].dtype), like=target["boxes"])
        if "keypoints" in target:
            height, width = image.shape[-2:]
            x, y = target["keypoints"].as_subclass(Tensor).unbind(dim=2)
            inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
            target = {**target, "visibility": target["visibility"] * inside}
        return image, target


def within_image(target: Target) -> Target:
    """The target with finite boxes only, clamped to the image and at least `MIN_SIDE` wide and high there."""
    target = select(target, torch.isfinite(target["boxes"]).all(dim=1))
    target["boxes"] = v2.ClampBoundingBoxes()(target["boxes"])
    x1, y1, x2, y2 = target["boxes"].as_subclass(Tensor).unbind(dim=1)
    return select(target, (x2 - x1 >= MIN_SIDE) & (y2 - y1 >= MIN_SIDE))


def select(target: Target, keep: Tensor) -> Target:
    """The target of those objects for which `keep` (bool [N]) is set."""
    if keep.all():
        return dict(target)  # copying masks takes longer than anything else here

    def kept(value: Any) -> Any:
        if isinstance(value, tv_tensors.TVTensor):
            return tv_tensors.wrap(value[keep], like=value)
        if isinstance(value, Tensor):
            return value[keep]
        return [entry for entry, kept in zip(value, keep.tolist(), strict=True) if kept]

    return {name: kept(value) if name in OF_OBJECTS else value for name, value in target.items()}


def cut(image: Tensor, target: Target, window: Window) -> tuple[Tensor, Target]:
    """The part of a sample within the window, without the objects whose box lies outside."""
    image = F.crop(image, *window)
    target = {
        name: F.crop(value, *window) if isinstance(value, tv_tensors.TVTensor) else value
        for name, value in target.items()
    }
    return image, within_image(target) if "boxes" in target else target


def drawn(target: Target, size: Size, window: Window | None = None) -> Target:
    """The target with masks (uint8 [N, h, w]) in place of `segmentations`, if it has any."""
    if "segmentations" not in target:
        return target
    height, width = window[2:] if window else size
    masks = torch.zeros(len(target["segmentations"]), height, width, dtype=torch.uint8)
    for mask, segmentation in zip(masks, target["segmentations"], strict=True):
        mask.copy_(render(segmentation, target["original_size"], size, window))
    rest = {name: value for name, value in target.items() if name != "segmentations"}
    return {**rest, "masks": tv_tensors.Mask(masks)}


def nearest(semantic: Tensor, size: Size) -> tv_tensors.Mask:
    """A map of classes (uint8 [H, W]) resized: each pixel takes the class found at its centre."""
    classes = semantic.as_subclass(Tensor)[None]
    return tv_tensors.Mask(F.resize(classes, list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0])


def finished(target: Target) -> Target:
    """The target as the network gets it: keypoints with their visibility (float32 [N, K, 3])."""
    if "keypoints" not in target:
        return target
    rest = {name: v for name, v in target.items() if name not in ("visibility", "keypoint_flip")}
    points, visibility = target["keypoints"].as_subclass(Tensor), target["visibility"]
    there = (visibility > 0)[..., None]
    keypoints = torch.cat([points.where(there, 0), visibility[..., None].to(points)], dim=2)
    return {**rest, "keypoints": keypoints}
