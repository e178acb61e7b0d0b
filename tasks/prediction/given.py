"""Images in whatever form they are given, as the datasets of evaluation give theirs."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.data.images import MAX_PIXELS, Size, decode, image_size

Given = str | os.PathLike | Image.Image | np.ndarray | Tensor
"""An image: a file, one of Pillow, uint8 [H, W, 3], or a tensor, uint8 [3, H, W]; all RGB."""


class Images:
    """Images in any form, given as the datasets of evaluation give theirs, but without annotations."""

    def __init__(self, given: Sequence[Given], reading: dict[str, Any]) -> None:
        self.given, self.reading = given, reading

    def __len__(self) -> int:
        return len(self.given)

    def image_size(self, index: int) -> Size:
        image = self.given[index]
        if not isinstance(image, str | os.PathLike):
            height, width = self._read(index).shape[-2:]
            return height, width
        if os.path.isdir(image):
            raise UsageError(f"{image}: a folder; give its images (`prediction.arguments.chosen_images`)")
        return image_size(Path(image), self.reading["max_pixels"])

    def load(self, index: int, at_least: Size | None = None) -> tuple[Tensor, dict[str, Any]]:
        image = self._read(index, at_least)
        decoded_smaller = isinstance(self.given[index], str | os.PathLike)  # perhaps; the header knows
        size = self.image_size(index) if decoded_smaller else (image.shape[-2], image.shape[-1])
        return tv_tensors.Image(image), {"image_id": index, "original_size": size, "label": 0}

    def _read(self, index: int, at_least: Size | None = None) -> Tensor:
        try:
            return as_tensor(self.given[index], at_least=at_least, **self.reading)
        except UsageError as fault:
            file = isinstance(self.given[index], str | os.PathLike)
            raise fault if file else UsageError(f"image {index}: {fault}") from None


def as_tensor(
    image: Given, *, max_pixels: int = MAX_PIXELS, bit_depth: int | None = None, at_least: Size | None = None
) -> Tensor:
    """An image of any kind as uint8 [3, H, W], RGB, turned as its EXIF orientation says.

    max_pixels, bit_depth, at_least: of files, see `tasks.data.images.decode`.

    Raises:
        UsageError: it is not 8 bits of RGB, and cannot become that without a loss of what it shows.
    """
    if isinstance(image, str | os.PathLike):
        return decode(Path(image), max_pixels=max_pixels, bit_depth=bit_depth, at_least=at_least)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UsageError(f"pixels of mode {image.mode} have more than 8 bits; scale them to 0…255")
        turned = ImageOps.exif_transpose(image)
        turned = turned.convert("RGBA") if "transparency" in turned.info else turned
        return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        wanted = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
        result = torch.from_numpy(np.array(image)).permute(2, 0, 1) if wanted else None
    else:
        wanted = image.ndim == 3 and image.shape[0] == 3 and image.dtype == torch.uint8
        result = image.cpu() if wanted else None
    if result is None or result.numel() == 0:
        raise UsageError(
            f"{type(image).__name__} {image.dtype} {list(image.shape)}: RGB of uint8 is wanted, an array of "
            "[height, width, 3] or a tensor of [3, height, width]"
        )
    return result


class Unreadable(NamedTuple):
    place: int
    reason: str


class Readable(Dataset):
    """A prepared dataset that gives, in place of an image that cannot be read, the reason."""

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.prepared[index]
        except UsageError as fault:
            return Unreadable(index, str(fault))


class Read(NamedTuple):
    """A batch of the images that could be read (None: of none), their own sizes, and the others' reasons."""

    batch: Any
    sizes: list[Size]
    faults: list[Unreadable]


class Together:
    """Collates what could be read."""

    def __init__(self, collate_fn: Callable[[Sequence[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[Any]) -> Read:
        faults = [sample for sample in samples if isinstance(sample, Unreadable)]
        read = [sample for sample in samples if not isinstance(sample, Unreadable)]
        sizes = [about["original_size"] for _, about in read]
        return Read(self.collate_fn(read) if read else None, sizes, faults)
