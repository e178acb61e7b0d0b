"""A dataset of one's own: images with a number each, listed in CSV files beside them."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.class_transforms import PreparedClasses
from tasks.data.folder_data import FolderData
from tasks.data.folder_images import FolderImages
from tasks.data.images import decode_and_measure, image_size
from tasks.data.inspection import Inspection
from tasks.drawing.pictures import captioned


class NumberBatch(NamedTuple):
    """A batch of square images with a number each.

    images: uint8 [B, 3, S, S], RGB, channels last. numbers: float32 [B]. image_ids: int64 [B]. What every
    batch needs for the common steps of `BaseTask` is `image_ids`.
    """

    images: Tensor
    numbers: Tensor
    image_ids: Tensor


@dataclass(frozen=True, eq=False)
class CsvNumbers:
    """What is known of a split without decoding an image.

    path: the CSV file. column: its column of numbers. files: of the images, relative to the CSV file.
    numbers: float32 [N]. faults: what was dropped or repaired; here nothing is.
    """

    path: Path
    column: str
    files: list[str]
    numbers: Tensor
    faults: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """The network's outputs: one."""
        return [self.column]

    def file_name(self, index: int) -> str:
        return self.files[index]

    def image_path(self, index: int) -> Path:
        return self.path.parent / self.files[index]

    def overview(self) -> str:
        low, high = self.numbers.min(), self.numbers.max()
        return f"{len(self)} images, {self.column} from {low:g} to {high:g}"


def read_csv_numbers(path: Path, column: str) -> CsvNumbers:
    """Reads a CSV file with the columns `file` and `column`.

    Raises UsageError, naming file and line, for what cannot be read, a missing column, and what is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UsageError(f"{path}: cannot be read ({fault}); give data.root=FOLDER with this file") from fault
    if not rows:
        raise UsageError(f"{path}: lists no image; a header and a line an image are wanted: file,{column}")
    for needed in ("file", column):
        if needed not in rows[0]:
            raise UsageError(f"{path}: has no column {needed!r}, but {', '.join(rows[0])}; see data.column")
    numbers = [_number(path, line, row[column]) for line, row in enumerate(rows, start=2)]
    return CsvNumbers(path, column, [row["file"] for row in rows], torch.tensor(numbers))


def _number(path: Path, line: int, word: str | None) -> float:
    try:
        number = float(word or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{path}, line {line}: {word!r} is no number")
    return number


class NumberImages(FolderImages):
    """The images of a split, decoded but not resized, with their numbers."""

    annotations: CsvNumbers

    def image_size(self, index: int) -> tuple[int, int]:
        with self.named(index):
            return image_size(self.annotations.image_path(index), self.max_pixels)

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Image, uint8 [3, H, W], and `number`, `image_id`, `original_size`."""
        path = self.annotations.image_path(index)
        with self.named(index):
            image, size = decode_and_measure(
                path, max_pixels=self.max_pixels, bit_depth=self.bit_depth, at_least=at_least
            )
        number = float(self.annotations.numbers[index])
        return tv_tensors.Image(image), {"number": number, "image_id": index, "original_size": size}

    # For stages=[check].

    def inspect(self, index: int) -> Inspection:
        self.load(index)
        return Inspection()

    def statistics(self, inspections: Sequence[Inspection]) -> list[str]:
        numbers = self.annotations.numbers
        return [f"{self.annotations.column}: mean {numbers.mean():.4g}, median {numbers.median():.4g}"]

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        return captioned(image, f"{target['number']:g}", right=None)


def collate_numbers(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> NumberBatch:
    images, targets = zip(*samples, strict=True)
    stacked = torch.stack([image.as_subclass(Tensor) for image in images])
    return NumberBatch(
        images=stacked.contiguous(memory_format=torch.channels_last),
        numbers=torch.tensor([target["number"] for target in targets]),
        image_ids=torch.tensor([target["image_id"] for target in targets]),
    )


class CsvNumberData(FolderData):
    """Images with a number each: `root/train.csv` and `root/val.csv` with the columns `file` and `column`.

    Args:
        root: folder of the CSV files; the files they list are relative to it.
        train, val, test: names of the CSV files. Without `val`, a share of `train` is held out
            (`val_fraction`); without `test`, the test stage is judged on `val`.
        column: the column of numbers.
        image_size: side of the square that the network sees, in pixels.
        crop_ratio: side of the central square that is seen by the image's shorter side.
        flip: probability of mirroring left to right, in training.
        augment: then, transforms of `torchvision.transforms.v2` by name, in this order.
        settings: those of `tasks.data.module.ImageData`.
    """

    TARGETS = ("number",)
    collate = staticmethod(collate_numbers)

    def __init__(
        self,
        root: str,
        column: str,
        train: str = "train.csv",
        val: str | None = "val.csv",
        test: str | None = None,
        *,
        target: str = "number",
        image_size: int = 128,
        crop_ratio: float = 1.0,
        flip: float = 0.5,
        augment: Mapping[str, v2.Transform] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        self.column, self.image_size, self.crop_ratio, self.flip = column, image_size, crop_ratio, flip
        self.augment = list((augment or {}).values())

    def read(self, split: str) -> CsvNumbers:
        return read_csv_numbers(self.root / self.splits[split], self.column)

    def part(self, read: CsvNumbers, indices: Tensor) -> CsvNumbers:
        return replace(read, files=[read.files[i] for i in indices.tolist()], numbers=read.numbers[indices])

    def files(self, found: CsvNumbers) -> list[list[bytes]]:
        """What makes a split what it is, so that a run does not go on with another one: files and numbers."""
        return [[name.encode() for name in found.files], [str(n).encode() for n in found.numbers.tolist()]]

    def dataset(self, split: str) -> NumberImages:
        return NumberImages(self.annotations(split), split, **self.reading)

    def prepared(self, split: str) -> Dataset:
        """The central square, resized; a random crop might lose what is counted."""
        training = split == "train"
        return PreparedClasses(
            self.dataset(split),
            self.image_size,
            training=training,
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            crop_ratio=self.crop_ratio,
            flip=self.flip,
            augment=self.augment if training else (),
            seed=self.seed,
        )
