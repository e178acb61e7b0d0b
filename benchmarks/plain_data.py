"""What a plain torchvision loop reads: COCO files as torchvision's reference scripts read them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from benchmarks.runs import REAL_DATA, ROOT

Target = dict[str, Any]

WORKERS = 1  # processes that load images, of both contenders


@dataclass(frozen=True)
class Data:
    """A dataset in COCO's layout, and the size at which both contenders see its images."""

    folder: str
    size: tuple[int, int]  # shorter side, longest longer side
    masks: bool

    @property
    def iou_types(self) -> tuple[str, ...]:
        return ("bbox", "segm") if self.masks else ("bbox",)

    def annotations(self, split: str) -> Path:
        return ROOT / REAL_DATA / self.folder / "annotations" / f"instances_{split}.json"


DATA = {"bccd": Data("bccd", (240, 320), False), "nuclei": Data("nuclei", (256, 256), True)}


class CocoImages(Dataset):
    """Images in 0…1 and their targets; mirrored at random in training, where what has no area is dropped."""

    def __init__(self, data: Data, split: str, training: bool, vertically: bool = False) -> None:
        self.coco, self.data, self.training = COCO(str(data.annotations(split))), data, training
        self.folder = ROOT / REAL_DATA / data.folder / split
        self.flips = (F.horizontal_flip, F.vertical_flip) if vertically else (F.horizontal_flip,)
        self.labels = {category: i for i, category in enumerate(sorted(self.coco.getCatIds()), start=1)}
        ids = sorted(self.coco.getImgIds())
        self.ids = [i for i in ids if self.coco.getAnnIds(i)] if training else ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        info = self.coco.loadImgs(self.ids[index])[0]
        with Image.open(self.folder / info["file_name"]) as file:
            image = F.pil_to_tensor(file.convert("RGB")).float() / 255
        if not self.training:
            return image, {"image_id": info["id"]}
        target = self._target(info["id"], *image.shape[-2:])
        for flip in self.flips:
            if torch.rand(1) < 0.5:
                image, target = flipped(flip, image, target)
        return image, target

    def _target(self, image_id: int, height: int, width: int) -> Target:
        annotations = [a for a in self.coco.imgToAnns[image_id] if not a.get("iscrowd")]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # torchvision refuses a box without area
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations]),
        }
        if self.data.masks:
            masks = [self.coco.annToMask(a) for a in annotations]
            target["masks"] = torch.from_numpy(np.stack(masks))
        return {name: value[keep] for name, value in target.items()}


def flipped(flip: Callable[[Tensor], Tensor], image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirrors image, masks and boxes."""
    axis = 0 if flip is F.horizontal_flip else 1
    boxes, side = target["boxes"].clone(), image.shape[2 - axis]
    boxes[:, [axis, axis + 2]] = side - target["boxes"][:, [axis + 2, axis]]
    target = {**target, "boxes": boxes}
    if "masks" in target:
        target["masks"] = flip(target["masks"])
    return flip(image), target


def pairs(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def endless(loader: DataLoader) -> Iterator[tuple[list[Tensor], list[Target]]]:
    while True:
        yield from loader
