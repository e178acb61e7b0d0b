"""A dataset made ready for the network: every random choice a function of seed, epoch and image."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.samplers import Item, mix
from tasks.data.segmentations import Size, Window
from tasks.data.transforms import Clean, Target, cut, drawn, finished, nearest, resized


class Samples(Protocol):
    """What is asked of a dataset, as of `CocoDataset`; `load` is told the size it will be resized to."""

    def __len__(self) -> int: ...
    def image_size(self, index: int) -> Size: ...
    def load(self, index: int, at_least: Size | None = None) -> tuple[Tensor, Target]: ...


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


def refuse_plain_flips(transforms: Iterable[nn.Module]) -> None:
    for transform in transforms:
        if isinstance(transform, v2.Compose | v2.RandomApply | v2.RandomChoice | v2.RandomOrder):
            refuse_plain_flips(transform.transforms)
        if isinstance(transform, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
            raise UsageError(
                f"data.augment: {type(transform).__name__} leaves left and right keypoints unswapped; use "
                "tasks.data.transforms.HorizontalFlip instead"
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers start from `seed` inside, and go on outside as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
