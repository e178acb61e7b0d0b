"""CIFAR-10 from its binary version, which is read without unpickling anything.

A record is one byte with the label and 3,072 bytes with the image: the red, then the green, then the blue
plane, each row by row (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Packed
from tasks.data.class_folders import ClassFolders
from tasks.data.class_transforms import ClassSample, PreparedClasses, collate_classes
from tasks.data.folder_data import FolderData
from tasks.data.folder_images import ClassImages, Sample

SIDE = 32  # pixels
RECORD = 1 + 3 * SIDE * SIDE  # bytes
BINARY, PICKLED = "cifar-10-batches-bin", "cifar-10-batches-py"
NAMES = "batches.meta.txt"
FILES = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
MEAN_COLOUR = (124, 116, 104)  # what the network normalises to about 0
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


@dataclass(frozen=True, eq=False, kw_only=True)
class CifarBatches(ClassFolders):
    """The images of a split and their classes.

    files: the file of each image and its number there, such as "data_batch_1.bin/17". images: uint8
    [N, 3, 32, 32], RGB; one tensor, which the workers of a loader share.
    """

    images: Tensor


def read_cifar10(root: Path | str, split: str) -> CifarBatches:
    """Reads a split, `train` (data_batch_1.bin … data_batch_5.bin) or `test` (test_batch.bin).

    Args:
        root: the folder `cifar-10-batches-bin`, or the one that holds it.

    Raises:
        UsageError: there is only the pickled version, or none; a file is missing, empty, broken off or of
            another length than the others; a label has no name.
    """
    if split not in FILES:
        raise UsageError(f"data: {split!r} is no split of CIFAR-10; it has {' and '.join(FILES)}")
    folder = _folder(Path(root))
    names = _names(folder / NAMES)
    _refuse_other_lengths(folder)
    records = [np.fromfile(folder / file, dtype=np.uint8).reshape(-1, RECORD) for file in FILES[split]]
    for file, batch in zip(FILES[split], records, strict=True):
        if (highest := int(batch[:, 0].max())) >= len(names):
            raise UsageError(
                f"{folder / file}: image {batch[:, 0].argmax()} has label {highest}, but {NAMES} names "
                f"{len(names)} classes; the file is damaged: unpack {ARCHIVE} again"
            )
    both = torch.from_numpy(np.concatenate(records))
    return CifarBatches(
        path=folder,
        classes=names,
        names=names,
        files=Packed.of(
            [f"{f}/{i}".encode() for f, r in zip(FILES[split], records, strict=True) for i in range(len(r))]
        ),
        labels=both[:, 0].long(),
        images=both[:, 1:].reshape(-1, 3, SIDE, SIDE),
    )


def _folder(root: Path) -> Path:
    for folder in (root / BINARY, root):
        if (folder / FILES["test"][0]).is_file() or (folder.name == BINARY and folder.is_dir()):
            return folder
    pickled = any((folder / "data_batch_1").is_file() for folder in (root / PICKLED, root))
    found = (
        "this is CIFAR-10's Python version, pickled, which is not opened, since a pickle may hold any program"
        if pickled
        else f"no CIFAR-10 here: neither {BINARY} nor its files"
    )
    raise UsageError(f"{root}: {found}; unpack the binary version, {ARCHIVE}, into this folder")


def _names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: the classes' names cannot be read ({error}); unpack {ARCHIVE} again"
        ) from None
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{path}: names {names}, but a line each with different names is wanted")
    return names


def _refuse_other_lengths(folder: Path) -> None:
    """All six files hold the same number of whole images, 10,000 as published."""
    sizes = {}
    for path in (folder / file for files in FILES.values() for file in files):
        try:
            sizes[path] = path.stat().st_size
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"{path}: cannot be read ({reason}); unpack {ARCHIVE} again") from None
    usual = mode(sizes.values())
    for path, size in sizes.items():
        if not size or size % RECORD or size != usual:
            raise UsageError(
                f"{path}: {size:,} bytes, most files {usual:,}, and an image takes {RECORD:,}; the file is "
                f"broken off or not CIFAR-10's: unpack {ARCHIVE} again"
            )


class CifarImages(ClassImages):
    """The images of a split with their classes; samples as those of `ClassImages`."""

    annotations: CifarBatches

    def image_size(self, index: int) -> tuple[int, int]:
        return SIDE, SIDE

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        target = {
            "label": int(self.annotations.labels[index]),
            "image_id": index,
            "original_size": (SIDE, SIDE),
        }
        return tv_tensors.Image(self.annotations.images[index].clone()), target


class ShiftedClasses(PreparedClasses):
    """Images of one size, shifted: padded in the mean colour, a window of their size cut out, then mirrored.

    CIFAR's usual augmentation (arXiv 1512.03385, §4.2; 1611.05431, appendix A). Evaluation sees whole images.

    Args:
        padding: pixels at each side.
        settings: those of `PreparedClasses`.
    """

    def __init__(self, dataset: CifarImages, *, padding: int, **settings: Any) -> None:
        super().__init__(dataset, SIDE, **settings)
        if padding < 0:
            raise UsageError(f"data.padding={padding}: a number of pixels is wanted, or 0")
        self.shift = v2.RandomCrop(SIDE, padding=padding, fill=MEAN_COLOUR)

    def _random(self, index: int) -> ClassSample:
        image, target = self.dataset.load(index)
        return self.shift(image), target

    def _central(self, index: int) -> ClassSample:
        return self.dataset.load(index)


class Cifar10Data(FolderData):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32×32 pixels in ten classes.

    Args:
        root: the folder `cifar-10-batches-bin` of the binary version, or the one that holds it.
        train, val, test: `train` or `test`. As published, `val` is the test split; with `val=None` and
            `val_fraction` a share of `train` is held out, and `test=test` keeps the test split for the end.
        padding: pixels that an image is shifted by at most, in training.
        flip: probability of mirroring, in training.
        augment: then, transforms of `torchvision.transforms.v2` by name, in this order.
        repeats: see `TrainSampler`.
        settings: those of `ImageData`.
    """

    TARGETS = ("label",)
    collate = staticmethod(collate_classes)

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str | None = "test",
        test: str | None = None,
        *,
        target: str = "label",
        padding: int = 4,
        flip: float = 0.5,
        augment: Mapping[str, v2.Transform] | None = None,
        repeats: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        self.padding, self.flip, self.repeats = padding, flip, repeats
        self.augment: list[v2.Transform] = list((augment or {}).values())

    def read(self, split: str) -> CifarBatches:
        return read_cifar10(self.root, self.splits[split])

    def part(self, read: CifarBatches, indices: Tensor) -> CifarBatches:
        return replace(
            read,
            files=read.files.select(indices),
            labels=read.labels[indices],
            images=read.images[indices],
        )

    def labels(self, read: CifarBatches) -> Tensor:
        return read.labels

    def files(self, found: CifarBatches) -> Sequence[Packed]:
        return [found.files]

    def dataset(self, split: str) -> CifarImages:
        return CifarImages(self.annotations(split), split)

    def prepared(self, split: str) -> Dataset:
        training = split == "train"
        return ShiftedClasses(
            self.dataset(split),
            padding=self.padding,
            training=training,
            flip=self.flip,
            augment=self.augment if training else (),
            seed=self.seed,
        )

    def sampling(self) -> dict[str, Any]:
        return {"repeats": self.repeats}
