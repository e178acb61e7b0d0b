"""From a decoded image and its boxes to what a network is fed: one resize, augmentation, one padded batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tasks.data.coco import CocoDataset
from tasks.data.samplers import Item, mix

Target = dict[str, Any]


MIN_SIDE = 1.0  # pixels; a narrower box is not trained on


class DetectionBatch(NamedTuple):
    """A batch of images padded at the right and at the bottom to one size.

    images: uint8 [B, 3, H, W], RGB, channels last, zero where padded.
    sizes: int64 [B, 2], height and width of each image within its padding.
    original_sizes: int64 [B, 2], height and width of each image as annotated.
    image_ids: int64 [B], as in the annotation file.
    targets: for each image `boxes` (float32 [N, 4], xyxy, pixels of the resized image), `labels`
        (int64 [N], 1…K) and whatever else the task's target holds.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    targets: list[dict[str, Tensor]]


def resized(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The size whose shorter side is `short`, unless the longer would exceed `long`; the aspect is kept.

    As Detectron2's `ResizeShortestEdge`. No side falls below one pixel.
    """
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class Clean(v2.Transform):
    """Makes boxes fit for training again after augmentation: finite, within the image, at least a pixel wide.

    In this order, since clamping would turn an infinite box into one of full width, and sanitising alone
    would drop every box that reaches over the edge.
    """

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        target = select(target, torch.isfinite(target["boxes"]).all(dim=1))
        target["boxes"] = v2.ClampBoundingBoxes()(target["boxes"])
        x1, y1, x2, y2 = target["boxes"].as_subclass(Tensor).unbind(dim=1)
        return image, select(target, (x2 - x1 >= MIN_SIDE) & (y2 - y1 >= MIN_SIDE))


def select(target: Target, keep: Tensor) -> Target:
    """The target of those objects for which `keep` (bool [N]) is set."""
    number = len(keep)
    return {
        name: tv_tensors.wrap(value[keep], like=value)
        if isinstance(value, tv_tensors.TVTensor)
        else value[keep]
        if isinstance(value, Tensor) and value.ndim and len(value) == number
        else value
        for name, value in target.items()
    }


class Prepared(Dataset):
    """A dataset made ready for the network: resized once, augmented, cleaned.

    Args:
        dataset: gives images and targets by `load` (see `CocoDataset`).
        size: shorter side, longest allowed longer side, in pixels.
        jitter: the range of a random factor on `size`, (1, 1) for none.
        augment: transforms of torchvision's v2 in their order; empty for evaluation.
        training: whether to jitter, augment and clean.
        seed: random numbers of a sample depend on it, the epoch and the index, on nothing else.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        size: tuple[int, int],
        *,
        jitter: tuple[float, float] = (1.0, 1.0),
        augment: Sequence[v2.Transform] = (),
        seed: int = 0,
        training: bool = False,
    ) -> None:
        self.dataset, self.size, self.jitter, self.seed, self.training = dataset, size, jitter, seed, training
        self.augment, self.clean = list(augment), Clean()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item | int) -> tuple[Tensor, Target]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        if not self.training:
            return self._resized(index, factor=1.0)
        with seeded(mix(self.seed, epoch, index)):
            low, high = self.jitter
            image, target = self._resized(index, low + (high - low) * float(torch.rand(())))
            for transform in self.augment:
                image, target = transform(image, target)
            return self.clean(image, target)

    def _resized(self, index: int, factor: float) -> tuple[Tensor, Target]:
        short, long = self.size
        original = self.dataset.annotations.image_size(index)
        size = resized(*original, round(short * factor), round(long * factor))
        image, target = self.dataset.load(index, at_least=size)
        if tuple(image.shape[-2:]) == size:
            return image, target
        return v2.Resize(list(size), antialias=True)(image, target)


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
        targets=[_tensors(target) for target in targets],
    )


def _tensors(target: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: value.as_subclass(Tensor) for name, value in target.items() if isinstance(value, Tensor)}
    if len({len(value) for value in tensors.values()}) > 1:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise ValueError(f"image {target['image_id']}: the target's entries differ in number: {shapes}")
    return tensors
