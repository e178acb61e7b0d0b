"""The datamodules of objects and of class maps: images resized once, jittered, cropped, augmented."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from torchvision.transforms import v2

from tasks.data.batches import collate
from tasks.data.module import ImageData, pair
from tasks.data.prepared import Prepared
from tasks.data.transforms import HorizontalFlip


class DenseData(ImageData):
    """Images whose targets lie in them, so that both are resized and augmented together.

    Args:
        root, target, train, val, test: see `ImageData`.
        image_size: shorter side and longest allowed longer side an image is resized to, in pixels; several
            shorter sides for multi-scale training.
        jitter: range of a random factor on `image_size` in training.
        crop: height and width of a random window, in training (see `Prepared`).
        flip: probability of mirroring left to right, in training; left and right keypoints change names.
        augment: then, transforms of `torchvision.transforms.v2` by name, in this order.
        settings: those of `ImageData`, or of the next class in line.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        root: str,
        target: str,
        train: Any,
        val: Any,
        test: Any,
        *,
        image_size: Sequence[Any] = (800, 1333),
        jitter: Sequence[float] = (1.0, 1.0),
        crop: Sequence[int] | None = None,
        flip: float = 0.5,
        augment: Mapping[str, v2.Transform] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        self.image_size, self.jitter = pair("data.image_size", image_size), pair("data.jitter", jitter)
        self.crop = None if crop is None else pair("data.crop", crop)
        self.flip = flip
        self.augment = [HorizontalFlip(flip), *(augment or {}).values()]

    def prepared(self, split: str) -> Dataset:
        if split != "train":
            return Prepared(self.dataset(split), self.image_size)
        return Prepared(
            self.dataset("train"),
            self.image_size,
            jitter=self.jitter,
            crop=self.crop,
            augment=self.augment,
            seed=self.seed,
            training=True,
            posed=self.target == "keypoints",
        )
