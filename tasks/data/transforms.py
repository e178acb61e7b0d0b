"""From a decoded image and its target to what a network is fed: one resize, augmentation, one padded batch.

Coordinates are continuous: pixel (0, 0) covers 0…1, an image of width W ends at x = W, and mirroring takes x
to W - x, for boxes and keypoints alike (which COCO's files count otherwise: `keypoints.TO_CENTRE`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from resnext_backbones.errors import UsageError
from tasks.data.samplers import Item, mix
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


class Samples(Protocol):
    """What is asked of a dataset, as of `CocoDataset`; `load` is told the size it will be resized to."""

    def __len__(self) -> int: ...
    def image_size(self, index: int) -> Size: ...
    def load(self, index: int, at_least: Size | None = None) -> tuple[Tensor, Target]: ...


class DetectionBatch(NamedTuple):
    """A batch of images padded at the right and at the bottom to one size.

    images: uint8 [B, 3, H, W], RGB, channels last, zero where padded.
    sizes: int64 [B, 2], height and width of each image within its padding.
    original_sizes: int64 [B, 2], height and width of each image as annotated.
    image_ids: int64 [B], as in the annotation file.
    targets: for each image, at its size h × w within the padding, what the task's target holds of:
        boxes: float32 [N, 4], xyxy. labels: int64 [N], 1…K. annotation_ids: int64 [N].
        iscrowd: bool [N], in evaluation only.
        masks: uint8 [N, h, w], 1 inside.
        keypoints: float32 [N, K, 3], x, y and visibility (0 not there, 1 hidden, 2 visible).
        semantic: uint8 [h, w], class 0…K - 1 of each pixel, `IGNORED` where it does not count.
        original_semantic: uint8 [H0, W0], as annotated, in evaluation only.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    targets: list[dict[str, Tensor]]


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


class Prepared(Dataset):
    """A dataset made ready for the network: resized once, perhaps cropped, augmented, cleaned.

    With `size=(S, S)`, `jitter=(0.1, 2.0)` and `crop=(S, S)` this is large-scale jitter (Ghiasi et al. 2020,
    arXiv 2012.07177, section 3); with `size=(S, 4 * S)`, `jitter=(0.5, 2.0)` and `crop=(S, S)` the usual
    augmentation of semantic segmentation (DeepLabv3, arXiv 1706.05587, section 4). A smaller image than the
    crop is not padded here; `collate` does it at the right and at the bottom.

    Masks are drawn from the file's segmentations when size and window are known, so that N objects never
    take more memory than N times the window.

    Args:
        dataset: gives images and targets by `load` (see `CocoDataset`).
        size: shorter side, longest allowed longer side, in pixels. Several shorter sides: in training one of
            them at random (Detectron2's multi-scale training), the longest one in evaluation.
        jitter: the range of a random factor on `size`, (1, 1) for none.
        crop: height and width of a window at random, cut out in training where the image is larger.
        augment: transforms of torchvision's v2 and `HorizontalFlip` in their order; empty for evaluation.
        training: whether to jitter, crop, augment and clean. In evaluation every object is kept.
        seed: random numbers of a sample depend on it, the epoch, the copy and the index, on nothing else.
        posed: whether the targets have keypoints, whose left and right a flip has to swap.

    Raises:
        UsageError: a size or a factor is not positive; a transform of `augment`, or one within it, would
            leave left and right keypoints unswapped.
    """

    def __init__(
        self,
        dataset: Samples,
        size: tuple[int | Sequence[int], int],
        *,
        jitter: tuple[float, float] = (1.0, 1.0),
        crop: Size | None = None,
        augment: Sequence[v2.Transform] = (),
        seed: int = 0,
        training: bool = False,
        posed: bool = False,
    ) -> None:
        short, self.long = size
        self.shorts = [short] if isinstance(short, int | float) else list(short)
        if not self.shorts or min(*self.shorts, self.long) < 1:
            raise UsageError(f"data.image_size={[short, self.long]}: sides of at least one pixel are wanted")
        if not 0 < jitter[0] <= jitter[1]:
            raise UsageError(f"data.jitter={list(jitter)}: two factors above 0 are wanted, the smaller first")
        if crop is not None and min(crop) < 1:
            raise UsageError(f"data.crop={list(crop)}: a height and a width of at least one pixel are wanted")
        if posed:
            refuse_plain_flips(augment)
        self.dataset, self.jitter, self.crop = dataset, jitter, crop
        self.seed, self.training = seed, training
        self.augment, self.clean = list(augment), Clean(tighten=crop is not None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item | int) -> tuple[Tensor, Target]:
        epoch, copy, index = item if isinstance(item, tuple) else (0, 0, item)
        if not self.training:
            size = resized(*self.dataset.image_size(index), max(self.shorts), self.long)
            image, target = self._resized(index, size)
            return image, finished(drawn(target, size))
        with seeded(mix(self.seed, epoch, copy, index)):
            size = self._random_size(index)
            image, target = self._resized(index, size)
            window = self._random_window(size)
            if window is not None:
                image, target = cut(image, target, window)
            image, target = self._augmented(image, drawn(target, size, window))
            image, target = self.clean(image, target)
            return image, finished(target)

    def _random_size(self, index: int) -> Size:
        low, high = self.jitter
        factor = low + (high - low) * float(torch.rand(()))
        several = len(self.shorts) > 1
        short = self.shorts[int(torch.randint(len(self.shorts), ()))] if several else self.shorts[0]
        return resized(*self.dataset.image_size(index), round(short * factor), round(self.long * factor))

    def _random_window(self, size: Size) -> Window | None:
        if self.crop is None:
            return None
        height, width = (min(side, most) for side, most in zip(size, self.crop, strict=True))
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        return top, left, height, width

    def _resized(self, index: int, size: Size) -> tuple[Tensor, Target]:
        image, target = self.dataset.load(index, at_least=size)
        if tuple(image.shape[-2:]) == size:
            return image, target
        semantic = target.pop("semantic", None)  # v2 would take NEAREST, which is half a pixel off
        image, target = v2.Resize(list(size), antialias=True)(image, target)
        if semantic is not None:
            target["semantic"] = nearest(semantic, size)
        return image, target

    def _augmented(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        # Transforms fill what they uncover with zeros; so zero means ignored while they are at it
        if "semantic" in target:
            target["semantic"] = tv_tensors.wrap(target["semantic"] + 1, like=target["semantic"])
        for transform in self.augment:
            image, target = transform(image, target)
        if "semantic" in target:
            target["semantic"] = tv_tensors.wrap(target["semantic"] - 1, like=target["semantic"])
        return image, target


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


def refuse_plain_flips(transforms: Iterable[nn.Module]) -> None:
    for transform in transforms:
        if isinstance(transform, v2.Compose | v2.RandomApply | v2.RandomChoice | v2.RandomOrder):
            refuse_plain_flips(transform.transforms)
        if isinstance(transform, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
            raise UsageError(
                f"data.augment: {type(transform).__name__} leaves left and right keypoints unswapped; use "
                "tasks.data.transforms.HorizontalFlip instead"
            )


def finished(target: Target) -> Target:
    """The target as the network gets it: keypoints with their visibility (float32 [N, K, 3])."""
    if "keypoints" not in target:
        return target
    rest = {name: v for name, v in target.items() if name not in ("visibility", "keypoint_flip")}
    points, visibility = target["keypoints"].as_subclass(Tensor), target["visibility"]
    there = (visibility > 0)[..., None]
    keypoints = torch.cat([points.where(there, 0), visibility[..., None].to(points)], dim=2)
    return {**rest, "keypoints": keypoints}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers start from `seed` inside, and go on outside as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def collate(samples: Sequence[tuple[Tensor, Target]], multiple: int = 32) -> DetectionBatch:
    """Pads images to one size, a multiple of the body's coarsest stride, so that strides stay as declared."""
    images, targets = zip(*samples, strict=True)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(dim=0))
    shape = (len(images), 3, height, width)
    batch = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[-2], : image.shape[-1]] = image
    return DetectionBatch(
        images=batch,
        sizes=sizes,
        original_sizes=torch.tensor([target["original_size"] for target in targets]),
        image_ids=torch.tensor([target["image_id"] for target in targets]),
        targets=[_tensors(*sample) for sample in samples],
    )


def _tensors(image: Tensor, target: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: value.as_subclass(Tensor) for name, value in target.items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if len({shape[0] for name, shape in shapes.items() if name in OF_OBJECTS}) > 1:
        raise ValueError(f"image {target['image_id']}: the target's entries differ in number: {shapes}")
    size = tuple(image.shape[-2:])
    if any(shapes[name][-2:] != size for name in ("masks", "semantic") if name in shapes):
        raise ValueError(f"image {target['image_id']}: masks are not of the image's size {size}: {shapes}")
    return tensors
