"""The images of plain folders with the class or the mask of each, decoded but not resized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.data.class_folders import ClassFolders
from tasks.data.faults import counted, listed
from tasks.data.images import IGNORED, MAX_PIXELS, WrongSize, decode, decode_and_measure, image_size, opened
from tasks.data.inspection import Inspection, pixel_statistics, pixels_of
from tasks.data.mask_folders import MaskFolders, read_mask
from tasks.data.transforms import nearest
from tasks.drawing.pictures import captioned, draw_classes

Sample = tuple[Tensor, dict[str, Any]]


class FolderImages(Dataset):
    """What class folders and mask folders share: images go by their number, and errors name the file.

    Args:
        annotations: from `read_class_folders` or `read_mask_folders`.
        split: its name, for errors.
        max_pixels: larger images are refused.
        bit_depth: for 16-bit images, the number of bits that are in use.
    """

    def __init__(
        self,
        annotations: ClassFolders | MaskFolders,
        split: str,
        *,
        max_pixels: int = MAX_PIXELS,
        bit_depth: int | None = None,
    ) -> None:
        self.annotations, self.split = annotations, split
        self.max_pixels, self.bit_depth = max_pixels, bit_depth

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        raise NotImplementedError

    def image_id(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        """What to call an image in an error: its number and its file."""
        return f"image {index} {self.annotations.file_name(index)!r}"

    @contextmanager
    def named(self, index: int) -> Iterator[None]:
        """Puts split and image in front of an error."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.split}: {self.name(index)}: {error}") from None

    # For `tasks.data.check`.

    def unjudgeable(self) -> list[str]:
        return []

    def worth_showing(self) -> list[int]:
        return list(range(len(self)))


class ClassImages(FolderImages):
    """The images of a split with their classes.

    Sample: an image, uint8 [3, H, W], RGB, turned as its EXIF orientation says, and a dict:
        label: int, 0…K-1. image_id: int, the index. original_size: height and width of the whole image.

    Raises:
        UsageError: on access, an image that cannot be decoded, named with its split, index and file.
    """

    annotations: ClassFolders

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width, from the header of the file."""
        with self.named(index):
            return image_size(self.annotations.image_path(index), self.max_pixels)

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        """The sample.

        at_least: the height and width it will be resized to; a JPEG is then decoded at a fraction of its
        size, as `images.decode` says.
        """
        with self.named(index):
            image, size = decode_and_measure(
                self.annotations.image_path(index),
                max_pixels=self.max_pixels,
                bit_depth=self.bit_depth,
                at_least=at_least,
            )
        label = int(self.annotations.labels[index])
        return tv_tensors.Image(image), {"label": label, "image_id": index, "original_size": size}

    # For `tasks.data.check`.

    def inspect(self, index: int) -> Inspection:
        """Decodes the image; there is nothing to be found that does not raise."""
        self.load(index)
        return Inspection()

    def statistics(self, inspections: Sequence[Inspection]) -> list[Table | str]:
        """Images of each class, and the size of the smallest and the largest class."""
        counts = self.annotations.counts().tolist()
        table = Table()
        table.add_column("class", overflow="fold")
        table.add_column("images", justify="right")
        for name, count in zip(self.annotations.names, counts, strict=True):
            table.add_row(Text(name), str(count))
        table.add_section()
        table.add_row("all", str(len(self)))
        return [table, f"images a class: {min(counts)}–{max(counts)}"]

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        """A sample's image over its class's name."""
        return captioned(image, self.annotations.names[target["label"]], right=None)


class MaskImages(FolderImages):
    """The images of a split with their masks.

    Sample: an image, uint8 [3, H, W], RGB, and a dict:
        semantic: `tv_tensors.Mask`, uint8 [H, W], 0…K-1, and 255 where ignored.
        image_id: int, the index. original_size: height and width (ints) of the mask as it is stored.
        original_semantic: uint8 [H0, W0], the mask as it is stored; in evaluation only.

    Args:
        annotations, split, settings: see `FolderImages`.
        training: without `original_semantic`.

    Raises:
        UsageError: on access, named with split, index and file: an image or mask that cannot be decoded; a
            mask of another size than its image; values that are no class.
    """

    annotations: MaskFolders

    def __init__(self, annotations: MaskFolders, split: str, *, training: bool, **settings: Any) -> None:
        super().__init__(annotations, split, **settings)
        self.training = training

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width, from the header of the mask."""
        with self.named(index), opened(self.annotations.mask_path(index), self.max_pixels) as mask:
            return mask.height, mask.width

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        """The sample.

        at_least: the height and width it will be resized to. A JPEG is then decoded at a fraction of its
        size, as `images.decode` says, and its mask is brought to that size, each pixel the nearest one.
        """
        with self.named(index):
            mask = self._mask(index)
            image = self._image(index, mask.shape, at_least)
        original = torch.from_numpy(mask)
        size = (image.shape[-2], image.shape[-1])
        target = {
            "semantic": tv_tensors.Mask(original.clone()) if size == mask.shape else nearest(original, size),
            "image_id": index,
            "original_size": (mask.shape[0], mask.shape[1]),
        }
        if not self.training:
            target["original_semantic"] = original
        return tv_tensors.Image(image), target

    def _mask(self, index: int) -> NDArray[np.uint8]:
        path, number = self.annotations.mask_path(index), len(self.annotations.names)
        mask = read_mask(path, max_pixels=self.max_pixels)
        unknown = (mask >= number) & (mask != IGNORED)
        if unknown.any():
            values, counts = np.unique(mask[unknown], return_counts=True)
            named = listed([f"{v} ({counted(int(n), 'pixel')})" for v, n in zip(values, counts, strict=True)])
            raise UsageError(
                f"{path}: values that are no class: {named}; the {number} classes are 0 to {number - 1}, and "
                f"{IGNORED} is ignored"
            )
        return mask

    def _image(self, index: int, size: tuple[int, ...], at_least: tuple[int, int] | None) -> Tensor:
        """The image as the mask sees it: as it is stored, or turned by its EXIF orientation."""
        path = self.annotations.image_path(index)
        try:
            return decode(
                path,
                (size[0], size[1]),
                max_pixels=self.max_pixels,
                bit_depth=self.bit_depth,
                at_least=at_least,
            )
        except WrongSize:
            height, width = image_size(path, self.max_pixels)
            raise UsageError(
                f"{path} has height×width {height}×{width}, but its mask {self.annotations.mask_path(index)} "
                f"{size[0]}×{size[1]}; make both of one size"
            ) from None

    # For `tasks.data.check`.

    def inspect(self, index: int) -> Inspection:
        _, target = self.load(index)
        return Inspection(pixels=pixels_of(target["semantic"]))

    def statistics(self, inspections: Sequence[Inspection]) -> list[Table | str]:
        return pixel_statistics(self.annotations.names, inspections)

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        """A sample's image under the colours of its mask."""
        return draw_classes(image, target["semantic"].as_subclass(Tensor), self.annotations.names)
