"""What every kind of dataset tells about itself, so that one check serves all (`tasks.data.check`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tasks.data.faults import listed


@dataclass(frozen=True)
class Inspection:
    """What looking at one image has found.

    error: why training or evaluation would end at it; empty where they would not. faults: what is wrong with
    an annotation, and its id. pixels: of a mask, how many have each of the values 0…255.
    """

    error: str = ""
    faults: tuple[tuple[str, int], ...] = ()
    pixels: tuple[int, ...] = ()


def pixels_of(semantic: Tensor) -> tuple[int, ...]:
    """How many pixels of a class map (uint8) have each of the values 0…255."""
    return tuple(torch.bincount(semantic.flatten(), minlength=256).tolist())


def pixel_statistics(names: Sequence[str], inspections: Sequence[Inspection]) -> list[Table | str]:
    """A table of the images and pixels of each class, and the classes without any."""
    pixels = np.array([found.pixels for found in inspections if found.pixels]).reshape(-1, 256)
    total, images = pixels.sum(axis=0), (pixels > 0).sum(axis=0)
    table = Table()
    table.add_column("class", overflow="fold")
    for column in ("value", "images", "pixels", "share"):
        table.add_column(column, justify="right")
    for value, name in [*enumerate(names), (255, "(ignored)")]:
        share = total[value] / max(1, total.sum())
        table.add_row(Text(name), str(value), str(images[value]), str(total[value]), f"{share:.2%}")
    unseen = [name for value, name in enumerate(names) if not total[value]]
    lines = [f"{len(unseen)} of {len(names)} classes without a pixel: {listed(unseen)}"] if unseen else []
    return [table, *lines]


class Described(Protocol):
    """What a file or a folder says of a split before an image is decoded. faults: found while reading it."""

    @property
    def path(self) -> Path: ...

    @property
    def faults(self) -> Sequence[Any]: ...

    def overview(self) -> str:
        """One line: how many images, objects, classes."""


class Inspectable(Protocol):
    """A dataset that can be checked."""

    @property
    def annotations(self) -> Described: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Tensor, dict[str, Any]]: ...

    def name(self, index: int) -> str:
        """What to call an image in an error."""

    def image_id(self, index: int) -> int: ...

    def inspect(self, index: int) -> Inspection:
        """Decodes an image and looks at all that belongs to it. Raises UsageError where a run would."""

    def unjudgeable(self) -> list[str]:
        """Why predictions could not be judged by this split."""

    def statistics(self, inspections: Sequence[Inspection]) -> list[Table | str]:
        """Tables and lines that describe the split."""

    def worth_showing(self) -> Sequence[int]:
        """The images from which samples are chosen."""

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        """A sample with what is annotated drawn on it. image: uint8 [3, H, W]."""
