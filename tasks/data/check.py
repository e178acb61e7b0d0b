"""What can be said about a dataset before it is trained on: in a few lines, or after looking at all of it.

`start_report` uses what reading the annotations found; `check_dataset` decodes every image and looks at all
that is annotated in it, in parallel. What there is to be said is each dataset's own (`inspection.py`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.coco import CocoDataset
from tasks.data.coco_check import CheckedCoco
from tasks.data.faults import NAMED, Fault, describe, fault
from tasks.data.inspection import Described, Inspectable, Inspection
from tasks.data.pool import Crashed, spread
from tasks.drawing.pictures import LONGEST_SIDE, contact_sheet, save_png

SAMPLES = 16
SECONDS_PER_IMAGE = 120.0

Item = tuple[str, int]


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found.

    ok: nothing was found that makes training or evaluation fail. text: all of it, as printed. faults: by
    split. pictures: the PNG files written, by split.
    """

    ok: bool
    text: str
    faults: dict[str, list[Fault]]
    pictures: dict[str, Path]


def start_report(annotations: Mapping[str, Described]) -> str:
    """What is known of each split without decoding an image: a line each, and a warning that names faults."""
    lines = []
    for split, read in annotations.items():
        lines += [f"{split}: {read.overview()}", *filter(None, [describe(read.faults, read.path)])]
    return "\n".join(lines)


def check_dataset(
    datasets: Mapping[str, Inspectable | CocoDataset],
    folder: Path,
    workers: int,
    *,
    seconds_per_image: float = SECONDS_PER_IMAGE,
) -> Report:
    """Decodes every image of each split and all that is annotated in it, prints what it finds, draws samples.

    A split is looked at as its dataset gives it: for training without what cleaning dropped, which is named.

    datasets: by split. folder: gets `check_{split}.png`, `SAMPLES` images with what is annotated in them.
    workers: processes. seconds_per_image: one that takes longer counts as a fault.
    """
    checked: dict[str, Inspectable] = {
        split: CheckedCoco(dataset) if isinstance(dataset, CocoDataset) else dataset
        for split, dataset in datasets.items()
    }
    inspections = _inspect(checked, workers, seconds_per_image)
    console = Console(file=StringIO(), width=100, record=True, highlight=False)
    ok = True
    faults, pictures = {}, {}
    for split, dataset in checked.items():
        found = inspections[split]
        errors = [*(seen.error for seen in found if seen.error), *dataset.unjudgeable()]
        ok = ok and not errors
        new = _new_faults(dataset, found)
        faults[split] = [*dataset.annotations.faults, *new]
        lines = [start_report({split: dataset.annotations})]
        lines += [f"  {line}" for line in (*map(str, new), *errors[:NAMED])]
        console.print(*lines, sep="\n", soft_wrap=True, markup=False)
        for part in dataset.statistics(found):
            console.print(part, soft_wrap=True, markup=False)
        good = {index for index, seen in enumerate(found) if not seen.error}
        if good:
            pictures[split] = folder / f"check_{split}.png"
            save_png(_samples(dataset, good), pictures[split])
            console.print(f"samples: {pictures[split]}\n", soft_wrap=True, markup=False)
    console.print("nothing found that would stop a run" if ok else "a run would stop at what is named above")
    text = console.export_text()
    print(text)
    return Report(ok, text, faults, pictures)


def _inspect(
    datasets: Mapping[str, Inspectable], workers: int, seconds: float
) -> dict[str, list[Inspection]]:
    """What was found in each image, by split, in the order of the dataset."""
    items = [(split, index) for split, dataset in datasets.items() for index in range(len(dataset))]
    inspections = {split: [Inspection()] * len(dataset) for split, dataset in datasets.items()}
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(items))
        for number, found in spread(_Inspector(datasets), items, workers, seconds):
            split, index = items[number]
            if isinstance(found, Crashed):
                found = Inspection(error=f"{split}: {datasets[split].name(index)}: {found}")
            inspections[split][index] = found
            progress.advance(task)
    return inspections


class _Inspector:
    """What a worker does for one image."""

    def __init__(self, datasets: Mapping[str, Inspectable]) -> None:
        self.datasets = dict(datasets)

    def __call__(self, item: Item) -> Inspection:
        split, index = item
        try:
            return self.datasets[split].inspect(index)
        except UsageError as error:
            return Inspection(error=str(error))


def _new_faults(dataset: Inspectable, inspections: Sequence[Inspection]) -> list[Fault]:
    by_kind: dict[str, list[int]] = defaultdict(list)
    for found in inspections:
        for kind, annotation in found.faults:
            by_kind[kind].append(annotation)
    broken = [dataset.image_id(index) for index, found in enumerate(inspections) if found.error]
    return [
        *fault("image that cannot be used", "found", "image", broken),
        *(f for kind, ids in sorted(by_kind.items()) for f in fault(kind, "found", "annotation", ids)),
    ]


def _samples(dataset: Inspectable, usable: set[int]) -> Image.Image:
    """Up to `SAMPLES` images, evenly spread over those worth showing, or over all."""
    candidates = [index for index in dataset.worth_showing() if index in usable] or sorted(usable)
    chosen = torch.linspace(0, len(candidates) - 1, min(SAMPLES, len(candidates))).round().long().tolist()
    return contact_sheet([_drawn(dataset, candidates[k]) for k in chosen])


def _drawn(dataset: Inspectable, index: int) -> Image.Image:
    image, target = dataset.load(index)
    height, width = image.shape[-2:]
    scale = LONGEST_SIDE / max(height, width)
    if scale < 2:  # smaller ones are enlarged by a whole factor when they are drawn
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        image, target = v2.Resize(size, antialias=True)(image, target)
    return dataset.picture(image.as_subclass(Tensor), target)
