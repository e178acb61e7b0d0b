"""The datamodules of plain folders: a folder a class, or a folder of masks beside one of images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Packed
from tasks.data.class_folders import ClassFolders, read_class_folders
from tasks.data.class_transforms import PreparedClasses, collate_classes
from tasks.data.dense_data import DenseData
from tasks.data.folder_images import ClassImages, MaskImages
from tasks.data.mask_folders import MaskFolders, read_mask_folders
from tasks.data.mask_folders import Split as MaskSplit
from tasks.data.module import SPLITS, ImageData, pair
from tasks.data.samplers import repeat_factors, subset


class FolderData(ImageData):
    """What class folders and mask folders share: their splits are folders, read once.

    A source fills in `read`, `part` and `dataset`, and says which `files` a split has.
    """

    def __init__(
        self,
        root: str,
        target: str,
        train: Any,
        val: Any,
        test: Any,
        *,
        classes: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        self.classes = None if classes is None else list(classes)
        self._annotations: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}

    def read(self, split: str) -> Any:
        raise NotImplementedError

    def part(self, read: Any, indices: Tensor) -> Any:
        raise NotImplementedError

    def labels(self, read: Any) -> Tensor | None:
        """By which a part is drawn class by class, int64 [N]."""
        return None

    def annotations(self, split: str) -> Any:
        """A split's files, read once."""
        if split not in self._annotations:
            self._annotations[split] = self._used(split)
        return self._annotations[split]

    def _used(self, split: str) -> Any:
        """A split's files, but for what is held out or left out."""
        read = self.read(split)
        if self.val_fraction is not None and self.splits[split] == self.splits["train"]:
            held_out = self.held_out(len(read), str(read.path), self.labels(read))
            read = self.part(read, held_out[split != "train"])
        if split == "train" and self.fraction < 1:
            read = self.part(read, subset(len(read), self.fraction, self.split_seed, self.labels(read)))
        return read

    @property
    def categories(self) -> list[dict[str, Any]]:
        return [{"id": k, "name": name} for k, name in enumerate(self.annotations("train").names)]

    def fingerprint(self, split: str) -> str:
        """Of the names of files and classes; pictures are not read for it."""
        if split not in self._fingerprints:
            found = self.annotations(split)
            digest = hashlib.sha256("\0".join(found.names).encode())
            for files in self.files(found):
                digest.update(b"\0\0" + b"\0".join(files[i] for i in range(len(found))))
            self._fingerprints[split] = digest.hexdigest()
        return self._fingerprints[split]

    def files(self, found: Any) -> Sequence[Packed]:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        for split in SPLITS:
            self.annotations(split)


class ClassFolderData(FolderData):
    """Images sorted into a folder a class, as torchvision's `ImageFolder` and ImageNet have them.

    Args:
        root: folder of the dataset; `root/{split}/{class}/…` (other layouts: `read_class_folders`).
        train, val, test: names of the splits' folders. Without `val`, a share of `train` is held out; without
            `test`, the test stage is judged on `val`.
        classes: their order; by default the folders of `train`, sorted by name.
        val_fraction: the share of each class of `train` that is held out where there is no `val`.
        image_size: side of the square that the network sees, in pixels.
        train_image_size: another side in training; somewhat smaller, it fits the sizes in which objects are
            seen in evaluation (arXiv 1906.06423). None: the same.
        crop_scale, crop_ratio, interpolation, flip: see `PreparedClasses`.
        augment: then, transforms of `torchvision.transforms.v2` by name, in this order.
        repeats: copies of an image in the same batch, each augmented differently (see `TrainSampler`).
        repeat_threshold: images of classes with a smaller share of all images than this are shown more often
            (`repeat_factors`).
        settings: those of `ImageData`.
    """

    TARGETS = ("label",)
    collate = staticmethod(collate_classes)

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str | None = "val",
        test: str | None = None,
        *,
        target: str = "label",
        image_size: int | Sequence[int] = 224,
        train_image_size: int | None = None,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: float = 0.875,
        interpolation: str = "bilinear",
        flip: float = 0.5,
        augment: Mapping[str, v2.Transform] | None = None,
        repeats: int = 1,
        repeat_threshold: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        sides = image_size if isinstance(image_size, Sequence) else [image_size]
        if not all(isinstance(side, int) for side in sides) or len(set(sides)) != 1:
            raise UsageError(f"data.image_size={image_size}: classifiers see a square; give one number")
        self.image_size = sides[0]
        self.train_image_size = self.image_size if train_image_size is None else train_image_size
        self.cropping: dict[str, Any] = {
            "scale": pair("data.crop_scale", crop_scale),
            "crop_ratio": crop_ratio,
            "interpolation": interpolation,
            "flip": flip,
        }
        self.augment: list[v2.Transform] = list((augment or {}).values())
        self.repeats, self.repeat_threshold = repeats, repeat_threshold

    def read(self, split: str) -> ClassFolders:
        classes = self.classes
        if split != "train" and classes is None:
            classes = self.annotations("train").classes
        return read_class_folders(
            self.root, self.splits[split], classes, follow_symlinks=self.follow_symlinks
        )

    def part(self, read: ClassFolders, indices: Tensor) -> ClassFolders:
        return replace(read, files=read.files.select(indices), labels=read.labels[indices])

    def labels(self, read: ClassFolders) -> Tensor:
        return read.labels

    def files(self, found: ClassFolders) -> Sequence[Packed]:
        return [found.files]

    def dataset(self, split: str) -> ClassImages:
        return ClassImages(self.annotations(split), split, **self.reading)

    def prepared(self, split: str) -> Dataset:
        training = split == "train"
        return PreparedClasses(
            self.dataset(split),
            self.train_image_size if training else self.image_size,
            training=training,
            augment=self.augment if training else (),
            seed=self.seed,
            **self.cropping,
        )

    def sampling(self) -> dict[str, Any]:
        found: dict[str, Any] = {"repeats": self.repeats}
        if self.repeat_threshold is not None:
            labels = self.annotations("train").labels
            images = torch.arange(len(labels))
            found["repeat_factors"] = repeat_factors(images, labels, len(labels), self.repeat_threshold)
        return found


class MaskFolderData(DenseData, FolderData):
    """Images with a PNG file each whose values are the classes of the pixels, for semantic segmentation.

    Args:
        root: folder of the dataset; `root/images/{split}/…` and `root/masks/{split}/…`, and other layouts of
            `read_mask_folders`.
        train, val, test: names of the splits, or mappings with the folders `images` and `masks`. Without
            `val`, a share of `train` is held out; without `test`, the test stage is judged on `val`.
        classes: the names of the values 0…K - 1; by default the lines of `root/classes.txt`, or without it
            as many as the masks of all splits hold.
        endings: of the names of images and masks where they differ (see `read_mask_folders`).
        val_fraction: the share of `train` that is held out where there is no `val`.
        image_size: see `DenseData`.
        settings: those of `DenseData`.
    """

    TARGETS = ("semantic",)

    def __init__(
        self,
        root: str,
        train: MaskSplit = "train",
        val: MaskSplit | None = "val",
        test: MaskSplit | None = None,
        *,
        target: str = "semantic",
        endings: Sequence[str] = ("", ""),
        image_size: Sequence[Any] = (512, 2048),
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, image_size=image_size, **settings)
        self.endings = pair("data.endings", endings)

    def read(self, split: str) -> MaskFolders:
        classes = self.classes
        if split != "train" and classes is None:
            classes = self.annotations("train").names
        return read_mask_folders(
            self.root,
            self.splits[split],
            classes,
            also=[self.splits[other] for other in SPLITS],
            endings=self.endings,
            training=split == "train",
            workers=self.num_workers,
            max_pixels=self.reading["max_pixels"],
            follow_symlinks=self.follow_symlinks,
        )

    def part(self, read: MaskFolders, indices: Tensor) -> MaskFolders:
        return replace(
            read,
            image_files=read.image_files.select(indices),
            mask_files=read.mask_files.select(indices),
        )

    def files(self, found: MaskFolders) -> Sequence[Packed]:
        return [found.image_files, found.mask_files]

    def dataset(self, split: str) -> MaskImages:
        return MaskImages(self.annotations(split), split, training=split == "train", **self.reading)
