"""What can be said about a dataset before it is trained on: in a few lines, or after looking at all of it.

`start_report` uses what reading the annotation files found; `check_dataset` decodes every image and judges
every segmentation, in parallel.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from resnext_backbones.errors import UsageError
from tasks.data.annotations import CocoAnnotations
from tasks.data.coco import CocoDataset
from tasks.data.faults import NAMED, Fault, counted, describe, fault, listed
from tasks.data.pool import Crashed, spread
from tasks.data.segmentations import segmentation_fault
from tasks.pictures import LONGEST_SIDE, contact_sheet, draw, save_png

SAMPLES = 16
SECONDS_PER_IMAGE = 120.0
SMALL, MEDIUM = 32**2, 96**2  # pixels of area, as https://cocodataset.org/#detection-eval

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


def start_report(annotations: Mapping[str, CocoAnnotations]) -> str:
    """What is known of each split without decoding an image: a line each, and a warning that names faults."""
    lines = []
    for split, columns in annotations.items():
        objects = _objects(columns)
        negatives = int((_per_image(columns) == 0).sum())
        seen = len(columns.all_labels[objects].unique())
        lines.append(
            f"{split}: {counted(len(columns), 'image')} ({negatives} without objects), "
            f"{counted(int(objects.sum()), 'object')} of {seen} of {len(columns.categories)} classes, "
            f"{counted(columns.crowds, 'crowd')}"
            + (" left out" if columns.cleaned and columns.crowds else "")
        )
        lines += filter(None, [describe(columns.faults, columns.path)])
    return "\n".join(lines)


def check_dataset(
    datasets: Mapping[str, CocoDataset],
    folder: Path,
    workers: int,
    *,
    seconds_per_image: float = SECONDS_PER_IMAGE,
) -> Report:
    """Decodes every image and judges every segmentation of each split, prints what it finds, draws samples.

    A split is looked at as its dataset gives it: for training without what cleaning dropped, which is named.
    Faulty segmentations are named, but do not make the report fail unless the evaluator cannot read them,
    since boxes are learned and judged without them.

    datasets: by split. folder: gets `check_{split}.png`, `SAMPLES` images with their boxes. workers:
    processes. seconds_per_image: one that takes longer counts as a fault.
    """
    findings = _inspect(datasets, workers, seconds_per_image)
    console = Console(file=StringIO(), width=100, record=True, highlight=False)
    ok = True
    faults, pictures = {}, {}
    for split, dataset in datasets.items():
        errors = [found.error for found in findings[split] if found.error]
        if not dataset.training:
            errors += _refused(dataset.annotations.path)
        ok = ok and not errors
        new = _new_faults(dataset, findings[split])
        faults[split] = [*dataset.annotations.faults, *new]
        lines = [start_report({split: dataset.annotations})]
        lines += [f"  {line}" for line in (*map(str, new), *errors[:NAMED])]
        console.print(*lines, sep="\n", soft_wrap=True, markup=False)
        console.print(_class_table(dataset.annotations))
        console.print(*_size_lines(dataset.annotations), sep="\n", soft_wrap=True, markup=False)
        good = [index for index, found in enumerate(findings[split]) if not found.error]
        if good:
            pictures[split] = folder / f"check_{split}.png"
            save_png(_samples(dataset, good), pictures[split])
            console.print(f"samples: {pictures[split]}\n", soft_wrap=True, markup=False)
    console.print("nothing found that would stop a run" if ok else "a run would stop at what is named above")
    text = console.export_text()
    print(text)
    return Report(ok, text, faults, pictures)


@dataclass(frozen=True)
class _Findings:
    """Of one image. error: why it cannot be used. segmentations: annotation id and what is wrong."""

    error: str = ""
    segmentations: tuple[tuple[int, str], ...] = ()


def _inspect(datasets: Mapping[str, CocoDataset], workers: int, seconds: float) -> dict[str, list[_Findings]]:
    """What was found in each image, by split, in the order of the dataset."""
    items = [(split, index) for split, dataset in datasets.items() for index in range(len(dataset))]
    findings = {split: [_Findings()] * len(dataset) for split, dataset in datasets.items()}
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(items))
        for number, found in spread(_Inspection(datasets), items, workers, seconds):
            split, index = items[number]
            if isinstance(found, Crashed):
                found = _Findings(error=f"{split}: {datasets[split].name(index)}: {found}")
            findings[split][index] = found
            progress.advance(task)
    return findings


class _Inspection:
    """What a worker does for one image."""

    def __init__(self, datasets: Mapping[str, CocoDataset]) -> None:
        self.datasets = dict(datasets)

    def __call__(self, item: Item) -> _Findings:
        split, index = item
        dataset = self.datasets[split]
        columns = dataset.annotations
        error = ""
        try:
            dataset.load(index)
        except UsageError as cause:
            error = str(cause)
        rows = range(*columns.rows(index).indices(len(columns.ids)))
        judged = [
            (row, segmentation_fault(columns.segmentations[row], *columns.image_size(index))) for row in rows
        ]
        return _Findings(error, tuple((int(columns.ids[row]), reason) for row, reason in judged if reason))


def _refused(path: Path) -> list[str]:
    """Why the evaluator cannot read a file that can be trained on: it decodes every segmentation."""
    try:
        import hotcoco
    except ImportError:
        return []
    try:
        hotcoco.COCO(path)
    except ValueError as error:
        return [f"{path}: predictions cannot be judged by this file: {error}"]
    return []


def _new_faults(dataset: CocoDataset, findings: Sequence[_Findings]) -> list[Fault]:
    by_reason: dict[str, list[int]] = defaultdict(list)
    for found in findings:
        for annotation, reason in found.segmentations:
            by_reason[reason].append(annotation)
    broken = torch.tensor([bool(found.error) for found in findings], dtype=torch.bool)
    return [
        *fault("image that cannot be used", "found", "image", dataset.annotations.image_ids[broken]),
        *(f for reason, ids in sorted(by_reason.items()) for f in fault(reason, "found", "annotation", ids)),
    ]


def _objects(columns: CocoAnnotations) -> Tensor:
    return ~columns.crowd


def _per_image(columns: CocoAnnotations) -> Tensor:
    return torch.bincount(columns.image_of()[_objects(columns)], minlength=len(columns))


def _class_table(columns: CocoAnnotations) -> Table:
    """Objects and images of each class, and how many objects are small, medium and large as COCO has it."""
    objects = _objects(columns)
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
    seen = set(columns.all_labels[_objects(columns)].tolist())
    unseen = [name for label, name in enumerate(columns.names, start=1) if label not in seen]
    height, width = (f"{int(side.min())}–{int(side.max())}" for side in columns.sizes.unbind(dim=1))
    per_image = _per_image(columns)
    lines = [
        f"images: {width} wide, {height} high, {counted(len(columns.sizes.unique(dim=0)), 'size')}; "
        f"{int(per_image.min())}–{int(per_image.max())} objects each, {int(per_image.median())} as a rule"
    ]
    if unseen:
        lines.append(
            f"{len(unseen)} of {len(columns.categories)} classes without an object: {listed(unseen)}"
        )
    return lines


def _samples(dataset: CocoDataset, usable: Sequence[int]) -> Any:
    """Up to `SAMPLES` images with their boxes, evenly spread over those with objects, or over all."""
    per_image = _per_image(dataset.annotations)
    candidates = [index for index in usable if per_image[index]] or list(usable)
    chosen = torch.linspace(0, len(candidates) - 1, min(SAMPLES, len(candidates))).round().long().tolist()
    return contact_sheet([_drawn(dataset, candidates[k]) for k in chosen])


def _drawn(dataset: CocoDataset, index: int) -> Any:
    image, target = dataset.load(index)
    height, width = image.shape[-2:]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    boxes = target["boxes"].as_subclass(Tensor) * scale
    shrunk = F.resize(image.as_subclass(Tensor), size, antialias=True)
    return draw(shrunk, boxes, target["labels"], dataset.annotations.names, crowd=target.get("iscrowd"))
