"""From a decoded image and its class to what a classifier is fed: one square crop, augmentation, mixing."""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from resnext_backbones.errors import UsageError
from tasks.data.prepared import Samples, seeded
from tasks.data.samplers import Item, mix
from tasks.data.segmentations import Size, Window

ClassSample = tuple[Tensor, dict[str, Any]]

INTERPOLATIONS = ("bilinear", "bicubic")


class ClassBatch(NamedTuple):
    """A batch of square images with one class each.

    images: uint8 [B, 3, S, S], RGB, channels last. labels: int64 [B], 0…K - 1. image_ids: int64 [B].
    """

    images: Tensor
    labels: Tensor
    image_ids: Tensor


class PreparedClasses(Dataset):
    """A dataset of images with one class each, made ready for the network: cropped, resized once, augmented.

    Training takes a rectangle of random area and aspect (Szegedy et al. 2014, arXiv 1409.4842, section 6;
    torchvision's `RandomResizedCrop`, with its random numbers) and mirrors it in half of all cases.
    Evaluation resizes the shorter side to `size / crop_ratio` and takes the square in the centre, as
    torchvision's `Resize` and `CenterCrop` do. The crop is chosen before the image is decoded, so that a
    large JPEG is decoded at a fraction of its size only where the crop can spare the rest.

    Args:
        dataset: gives images and their `label` by `load`.
        size: side of the square the network sees, in pixels.
        training: whether to crop at random, mirror and augment.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width by its height.
        crop_ratio: in evaluation, the side of the square by the image's shorter side.
        interpolation: `bilinear` or `bicubic`, both with antialiasing.
        flip: probability of mirroring.
        augment: transforms of torchvision's v2 for uint8 images, in this order, after crop and mirroring.
        seed: random numbers of a sample depend on it, the epoch, the copy and the index, on nothing else.

    Raises:
        UsageError: a value is out of its range, or `augment` holds a `RandomErasing` that draws normal
            numbers, meant for normalised images.
    """

    def __init__(
        self,
        dataset: Samples,
        size: int,
        *,
        training: bool = False,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_ratio: float = 0.875,
        interpolation: str = "bilinear",
        flip: float = 0.5,
        augment: Sequence[v2.Transform] = (),
        seed: int = 0,
    ) -> None:
        checks = (
            ("image_size", size, size >= 1, "at least one pixel is wanted"),
            ("crop_scale", list(scale), 0 < scale[0] <= scale[1] <= 1, "two shares, the smaller first"),
            ("crop_ratio", crop_ratio, 0 < crop_ratio <= 1, "a share above 0 and up to 1 is wanted"),
            ("interpolation", interpolation, interpolation in INTERPOLATIONS, " or ".join(INTERPOLATIONS)),
            ("flip", flip, 0 <= flip <= 1, "a probability, 0 to 1, is wanted"),
        )
        for name, value, right, wanted in checks:
            if not right:
                raise UsageError(f"data.{name}={value}: {wanted}")
        for transform in augment:
            if isinstance(transform, v2.RandomErasing) and transform.value is None:
                raise UsageError(
                    "data.augment: RandomErasing with value=random draws for normalised images, these have "
                    "0…255; give a colour, such as ImageNet's mean: value=[124,116,104]"
                )
        self.dataset, self.size, self.training, self.seed = dataset, size, training, seed
        self.interpolation = v2.InterpolationMode(interpolation)
        self.short = round(size / crop_ratio)
        self.random_crop = v2.RandomResizedCrop(size, scale, ratio)
        self.augment = [v2.RandomHorizontalFlip(flip), *augment]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item | int) -> ClassSample:
        epoch, copy, index = item if isinstance(item, tuple) else (0, 0, item)
        if not self.training:
            return self._central(index)
        with seeded(mix(self.seed, epoch, copy, index)):
            image, target = self._random(index)
            for transform in self.augment:
                image = transform(image)
            return image, target

    def _random(self, index: int) -> ClassSample:
        original = self.dataset.image_size(index)
        crop = self.random_crop.make_params([torch.empty(3, *original, device="meta")])
        at_least = (
            ceil(original[0] * self.size / crop["height"]),
            ceil(original[1] * self.size / crop["width"]),
        )
        image, target = self.dataset.load(index, at_least)
        window = scaled((crop["top"], crop["left"], crop["height"], crop["width"]), original, image)
        square = [self.size, self.size]
        return F.resized_crop(image, *window, square, self.interpolation, antialias=True), target

    def _central(self, index: int) -> ClassSample:
        height, width = self.dataset.image_size(index)
        longer = int(self.short * max(height, width) / min(height, width))  # torchvision's rounding
        size = (self.short, longer) if height <= width else (longer, self.short)
        image, target = self.dataset.load(index, at_least=size)
        image = F.resize(image, list(size), self.interpolation, antialias=True)
        return F.center_crop(image, [self.size, self.size]), target


def scaled(window: Window, original: Size, image: Tensor) -> Window:
    """A window of an image of size `original`, in whole pixels of `image`, the same decoded smaller."""
    height, width = image.shape[-2:]
    y, x = height / original[0], width / original[1]
    top, left = min(round(window[0] * y), height - 1), min(round(window[1] * x), width - 1)
    bottom, right = round((window[0] + window[2]) * y), round((window[1] + window[3]) * x)
    return top, left, max(1, bottom - top), max(1, right - left)


def collate_classes(samples: Sequence[ClassSample]) -> ClassBatch:
    images, targets = zip(*samples, strict=True)
    return ClassBatch(
        images=torch.stack([image.as_subclass(Tensor) for image in images]).contiguous(
            memory_format=torch.channels_last
        ),
        labels=torch.tensor([target["label"] for target in targets]),
        image_ids=torch.tensor([target["image_id"] for target in targets]),
    )


class Mix(nn.Module):
    """Mixes each image of a batch with the one before it, the first with the last, and their labels likewise.

    Mixup (Zhang et al. 2017, arXiv 1710.09412) adds the two with weights λ and 1 - λ, CutMix (Yun et al.
    2019, arXiv 1905.04899) puts a rectangle of the other into the image; λ is drawn once a batch from
    Beta(α, α). With both, each batch takes one of them, with even chances. Random numbers come from torch's
    CPU generator, whatever the device. `TrainSampler` sees to it that copies of an image are no neighbours.

    Args:
        mixup_alpha, cutmix_alpha: α of each; 0 leaves it out.
        num_classes: K.
        label_smoothing: ε; a target becomes (1 - ε) · target + ε / K (Szegedy et al. 2015, arXiv 1512.00567,
            section 7).
    """

    def __init__(
        self, mixup_alpha: float, cutmix_alpha: float, num_classes: int, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        ways = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        self.ways = [way(alpha=alpha, num_classes=num_classes) for way, alpha in ways if alpha > 0]

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images: float [B, 3, H, W]; labels: int64 [B]. Returns mixed images and labels, float32 [B, K]."""
        if self.ways:
            way = self.ways[int(torch.randint(len(self.ways), ()))]
            images, soft = way(images, labels)
        else:
            soft = one_hot(labels, self.num_classes).float()
        return images, soft * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
