"""The annotations of a COCO file as columns, and what training learns from.

A column is one tensor for the whole file, grouped by image: the workers of a DataLoader share the memory
however they are started, since no Python object is touched.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.faults import Fault, clip, counted, fault, overlapping_edge, unusable
from tasks.data.segmentations import segmentation_fault

DROPS_ALWAYS_ALLOWED = 5  # annotations; so that one bad box does not end a run on a tiny dataset


@dataclass(frozen=True)
class Category:
    """One class: `id` as in the file, and what it says of keypoints (pairs from 1; see `Skeleton`)."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Packed:
    """Many byte strings in one tensor: number i is `buffer[start[i]:stop[i]]`."""

    buffer: Tensor
    start: Tensor
    stop: Tensor

    @classmethod
    def of(cls, strings: Sequence[Any]) -> "Packed":
        """strings: anything that `bytes.join` takes."""
        joined = bytearray().join(strings) or bytearray(1)
        lengths = torch.tensor([memoryview(string).nbytes for string in strings], dtype=torch.int64)
        stop = lengths.cumsum(dim=0)
        return cls(torch.frombuffer(joined, dtype=torch.uint8), stop - lengths, stop)

    def __getitem__(self, index: int) -> bytes:
        return self.buffer[int(self.start[index]) : int(self.stop[index])].numpy().tobytes()

    def select(self, rows: Tensor) -> "Packed":
        return Packed(self.buffer, self.start[rows], self.stop[rows])


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """What an annotation file holds, as it stands there; `clean` gives what training learns from.

    `len()` is the number of images I; they keep the order of the file, and so do an image's annotations.

    path: the annotation file. images: the image folder. categories: K classes, by ascending id.
    image_ids: int64 [I]. sizes: int64 [I, 2], height and width as the file says. first: int64 [I + 1], the
    annotations of image i are rows `first[i]` to `first[i + 1]` of the columns below.
    ids: int64 [N], of annotations. all_labels: int64 [N], 1…K. xywh: float64 [N, 4], boxes as in the file.
    areas: float64 [N], of the file, or the box's where the file has none. crowd: bool [N].
    segmentations: JSON of each, empty where there is none. keypoints: the same of keypoints.
    crowds: number of crowds in the file.
    notes: faults of the file itself. box_faults: those of annotations. cleaned: whether `clean` made it.
    partial: whether it is a part of a file, by which the file's own faults are not judged.
    """

    path: Path
    images: Path
    categories: list[Category]
    image_ids: Tensor
    sizes: Tensor
    file_names: Packed
    first: Tensor
    ids: Tensor
    all_labels: Tensor
    xywh: Tensor
    areas: Tensor
    crowd: Tensor
    segmentations: Packed
    keypoints: Packed
    crowds: int
    notes: tuple[Fault, ...] = ()
    box_faults: tuple[Fault, ...] = ()
    cleaned: bool = False
    partial: bool = False

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def category_ids(self) -> list[int]:
        """Label k stands for the category `category_ids[k - 1]`."""
        return [category.id for category in self.categories]

    @property
    def label_of(self) -> dict[int, int]:
        """From category id to label."""
        return {category.id: label for label, category in enumerate(self.categories, start=1)}

    @property
    def names(self) -> list[str]:
        """The name of label k is `names[k - 1]`."""
        return [category.name for category in self.categories]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.notes + self.box_faults

    def file_name(self, index: int) -> str:
        return self.file_names[index].decode()

    def image_path(self, index: int) -> Path:
        return self.images / self.file_name(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width as the file says."""
        height, width = self.sizes[index].tolist()
        return height, width

    def rows(self, index: int) -> slice:
        """The rows of an image's annotations."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def boxes(self, index: int) -> Tensor:
        """An image's boxes, float32 [n, 4], xyxy in pixels of the image as the file gives its size."""
        xywh = self.xywh[self.rows(index)]
        return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float()

    def labels(self, index: int) -> Tensor:
        """An image's labels, int64 [n], 1…K."""
        return self.all_labels[self.rows(index)]

    def annotation_ids(self, index: int) -> Tensor:
        """int64 [n]."""
        return self.ids[self.rows(index)]

    def iscrowd(self, index: int) -> Tensor:
        """bool [n]."""
        return self.crowd[self.rows(index)]

    def counts(self) -> Tensor:
        """Annotations of each image, int64 [I]."""
        return self.first.diff()

    def image_of(self) -> Tensor:
        """The image of each annotation, int64 [N], 0…I - 1."""
        return torch.repeat_interleave(torch.arange(len(self)), self.counts())

    def objects(self) -> Tensor:
        """Objects in each image, crowds left out, int64 [I]."""
        return torch.bincount(self.image_of()[~self.crowd], minlength=len(self))

    def overview(self) -> str:
        """What is known without opening an image, on one line."""
        objects = self.objects()
        seen = len(self.all_labels[~self.crowd].unique())
        return (
            f"{counted(len(self), 'image')} ({int((objects == 0).sum())} without objects), "
            f"{counted(int(objects.sum()), 'object')} of {seen} of {len(self.categories)} classes, "
            f"{counted(self.crowds, 'crowd')}" + (" left out" if self.cleaned and self.crowds else "")
        )

    def clean(
        self, *, min_image_side: int = 1, max_drop_fraction: float = 0.01, masks: bool = False
    ) -> "CocoAnnotations":
        """What training learns from: no crowds, no boxes (and, where asked, masks) that teach nothing.

        Boxes are clipped to their image; those without a side of at least one pixel there are dropped.
        Images with nothing but crowds are dropped, since they would teach that crowds are background, and
        so are images with a side below `min_image_side` pixels. Images without annotations stay, and so do
        those that lose their last box to a fault.

        Raises:
            UsageError: more than `max_drop_fraction` of the annotations (and more than
                `DROPS_ALWAYS_ALLOWED`) are faulty, or nothing is left.
        """
        if self.cleaned:
            return self
        image_of = self.image_of()
        sizes = self.sizes[image_of]
        objects = torch.bincount(image_of[~self.crowd], minlength=len(self))
        too_small = self.sizes.amin(dim=1) < min_image_side
        only_crowds = ~too_small & (self.counts() > 0) & (objects == 0)
        images = ~too_small & ~only_crowds

        used = images[image_of] & ~self.crowd
        faults, keep = [], used.clone()
        for reason, mask in unusable(self.xywh, sizes).items():
            faults += fault(reason, "dropped", "annotation", self.ids[mask & used])
            keep &= ~mask
        if masks:
            for reason, rows in self._undrawable(keep).items():
                faults += fault(reason, "dropped", "annotation", self.ids[rows])
                keep[rows] = False
        over = overlapping_edge(self.xywh, sizes) & keep
        faults += fault("box reaching over the edge of its image", "clipped", "annotation", self.ids[over])
        faults += fault("image with nothing but crowds", "dropped", "image", self.image_ids[only_crowds])
        faults += fault(
            f"image with a side of less than {min_image_side} pixels (data.min_image_side)",
            "dropped",
            "image",
            self.image_ids[too_small],
        )
        self._refuse_many_drops(faults, max_drop_fraction)
        if not keep.any():
            raise UsageError(
                f"{self.path}: nothing to train on: none of {len(self)} images holds an object that can be "
                f"used; {'; '.join(map(str, (*self.notes, *faults)))}"
            )
        kept = replace(self, xywh=clip(self.xywh, sizes), box_faults=tuple(faults), cleaned=True)
        return kept._select(images, keep)

    def _undrawable(self, asked: Tensor) -> dict[str, list[int]]:
        """Of the annotations asked for (bool [N]) the rows of those without a mask, by reason."""
        reasons: dict[str, list[int]] = defaultdict(list)
        image_of = self.image_of()
        for row in asked.nonzero().squeeze(1).tolist():
            segmentation = self.segmentations[row]
            reason = segmentation_fault(segmentation, *self.image_size(int(image_of[row])))
            if segmentation in (b"", b"null"):
                reason = "annotation without a segmentation"
            if reason:
                reasons[reason].append(row)
        return reasons

    def with_paintable(self, max_drop_fraction: float = 0.01) -> "CocoAnnotations":
        """The same, with the faults of segmentations named: what class maps are painted from.

        Raises:
            UsageError: see `clean`; a file of boxes alone would make maps of nothing.
        """
        faults = [
            f
            for reason, rows in self._undrawable(torch.ones(len(self.ids), dtype=torch.bool)).items()
            for f in fault(f"{reason}: its box is ignored", "dropped", "annotation", self.ids[rows])
        ]
        self._refuse_many_drops(faults, max_drop_fraction)
        return replace(self, box_faults=(*self.box_faults, *faults))

    def teaching(self, annotations: Tensor) -> "CocoAnnotations":
        """Without the images that have none of these annotations (bool [N]); they are named."""
        images = torch.bincount(self.image_of()[annotations], minlength=len(self)) > 0
        left = fault("image without what is learned", "left out", "image", self.image_ids[~images])
        if not images.any():
            raise UsageError(f"{self.path}: nothing to train on: no image holds what is to be learned")
        kept = self._select(images, torch.ones(len(self.ids), dtype=torch.bool))
        return replace(kept, box_faults=(*self.box_faults, *left))

    def _refuse_many_drops(self, faults: Sequence[Fault], fraction: float) -> None:
        notes = () if self.partial else self.notes
        lost = [f for f in (*notes, *faults) if f.action == "dropped" and f.of == "annotation"]
        dropped = sum(f.count for f in lost)
        number = len(self.ids) + sum(f.count for f in notes if f in lost)
        if dropped > max(fraction * number, DROPS_ALWAYS_ALLOWED):
            raise UsageError(
                f"{self.path}: {dropped} of {number} annotations ({dropped / number:.1%}) would be dropped, "
                f"more than data.max_drop_fraction={fraction}: {'; '.join(map(str, lost))}; mend them or "
                "raise data.max_drop_fraction"
            )

    def subset(self, indices: Tensor) -> "CocoAnnotations":
        """The images of `indices` (int64), in the order of the file, with all their annotations."""
        images = torch.zeros(len(self), dtype=torch.bool)
        images[indices] = True
        part = self._select(images, torch.ones(len(self.ids), dtype=torch.bool))
        return replace(part, crowds=int(part.crowd.sum()), partial=True)

    def _select(self, images: Tensor, annotations: Tensor) -> "CocoAnnotations":
        """The images and annotations (bool [I] and [N]) that are set, without annotations of other images."""
        image_of = self.image_of()
        annotations = annotations & images[image_of]
        counts = torch.bincount(image_of[annotations], minlength=len(self))[images]
        rows = annotations.nonzero().squeeze(1)
        return replace(
            self,
            image_ids=self.image_ids[images],
            sizes=self.sizes[images],
            file_names=self.file_names.select(images),
            first=starts(counts),
            ids=self.ids[rows],
            all_labels=self.all_labels[rows],
            xywh=self.xywh[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            segmentations=self.segmentations.select(rows),
            keypoints=self.keypoints.select(rows),
        )


def starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
