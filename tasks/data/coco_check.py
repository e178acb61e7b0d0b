"""What is to be said about a COCO dataset: its objects by class and size, its segmentations one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.annotations import CocoAnnotations
from tasks.data.coco import CocoDataset
from tasks.data.faults import counted, listed
from tasks.data.images import BACKGROUND
from tasks.data.inspection import Inspection, pixel_statistics, pixels_of
from tasks.data.segmentations import segmentation_fault
from tasks.data.transforms import drawn, finished
from tasks.drawing.pictures import draw, draw_classes

SMALL, MEDIUM = 32**2, 96**2  # pixels of area, as https://cocodataset.org/#detection-eval


class CheckedCoco:
    """A `CocoDataset` that can be checked (`tasks.data.inspection.Inspectable`).

    Faulty segmentations are named, but end nothing unless the evaluator cannot read them, since boxes are
    learned and judged without them.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset, self.annotations = dataset, dataset.annotations
        self.load, self.name = dataset.load, dataset.name

    def __len__(self) -> int:
        return len(self.dataset)

    def image_id(self, index: int) -> int:
        return int(self.annotations.image_ids[index])

    def inspect(self, index: int) -> Inspection:
        columns = self.annotations
        error = ""
        pixels: tuple[int, ...] = ()
        try:
            _, target = self.load(index)
            if "semantic" in target:
                pixels = pixels_of(target["semantic"])
        except UsageError as cause:
            error = str(cause)
        rows = range(*columns.rows(index).indices(len(columns.ids)))
        size = columns.image_size(index)
        judged = [(segmentation_fault(columns.segmentations[row], *size), row) for row in rows]
        faults = tuple((reason, int(columns.ids[row])) for reason, row in judged if reason)
        return Inspection(error, faults, pixels)

    def unjudgeable(self) -> list[str]:
        """Why the evaluator cannot read a file that can be trained on: it decodes every segmentation."""
        judged_by_file = not self.dataset.training and self.dataset.target != "semantic"
        return _refused(self.annotations.path) if judged_by_file else []

    def statistics(self, inspections: Sequence[Inspection]) -> list[Table | str]:
        objects: list[Table | str] = [_class_table(self.annotations), *_size_lines(self.annotations)]
        if self.dataset.target != "semantic":
            return objects
        return [*objects, *pixel_statistics(self._classes_of_pixels(), inspections)]

    def _classes_of_pixels(self) -> list[str]:
        names = self.annotations.names
        return [BACKGROUND, *names] if self.dataset.class_maps is None else names

    def worth_showing(self) -> list[int]:
        """Those with objects."""
        return self.annotations.objects().nonzero().squeeze(1).tolist()

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        """A sample with its objects: boxes, and the masks or keypoints that the task learns from."""
        if "semantic" in target:
            return draw_classes(image, target["semantic"].as_subclass(Tensor), self._classes_of_pixels())
        boxes = target["boxes"].as_subclass(Tensor)
        size = (image.shape[-2], image.shape[-1])
        target = finished(drawn(target, size))
        skeleton = self.dataset.skeleton
        return draw(
            image,
            boxes,
            target["labels"],
            self.annotations.names,
            crowd=target.get("iscrowd"),
            masks=target.get("masks"),
            keypoints=target.get("keypoints"),
            edges=skeleton.edges if skeleton else (),
        )


def _refused(path: Path) -> list[str]:
    try:
        import hotcoco
    except ImportError:
        return []
    try:
        hotcoco.COCO(path)
    except ValueError as error:
        return [f"{path}: predictions cannot be judged by this file: {error}"]
    return []


def _class_table(columns: CocoAnnotations) -> Table:
    """Objects and images of each class, and how many objects are small, medium and large as COCO has it."""
    objects = ~columns.crowd
    labels, areas, image_of = columns.all_labels[objects], columns.areas[objects], columns.image_of()[objects]
    sizes = {"small": areas < SMALL, "medium": (areas >= SMALL) & (areas <= MEDIUM), "large": areas > MEDIUM}
    number = len(columns.categories) + 1
    counts: dict[str, Any] = {"objects": torch.bincount(labels, minlength=number)}
    pairs = torch.unique(torch.stack([labels, image_of]), dim=1)
    counts["images"] = torch.bincount(pairs[0], minlength=number)
    counts |= {name: torch.bincount(labels[mask], minlength=number) for name, mask in sizes.items()}
    table = Table()
    table.add_column("class", overflow="fold")
    for name in counts:
        table.add_column(name, justify="right")
    for label, name in enumerate(columns.names, start=1):
        if counts["objects"][label]:
            table.add_row(Text(name), *(str(int(column[label])) for column in counts.values()))
    table.add_section()
    whole = {name: int(column.sum()) for name, column in counts.items()} | {"images": len(columns)}
    table.add_row("all", *map(str, whole.values()))
    return table


def _size_lines(columns: CocoAnnotations) -> list[str]:
    seen = set(columns.all_labels[~columns.crowd].tolist())
    unseen = [name for label, name in enumerate(columns.names, start=1) if label not in seen]
    height, width = (f"{int(side.min())}–{int(side.max())}" for side in columns.sizes.unbind(dim=1))
    per_image = columns.objects()
    lines = [
        f"images: {width} wide, {height} high, {counted(len(columns.sizes.unique(dim=0)), 'size')}; "
        f"{int(per_image.min())}–{int(per_image.max())} objects each, {int(per_image.median())} as a rule"
    ]
    if unseen:
        lines.append(
            f"{len(unseen)} of {len(columns.categories)} classes without an object: {listed(unseen)}"
        )
    return lines
