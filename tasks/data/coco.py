"""Reads COCO annotation files, and decodes the images they describe."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Category, CocoAnnotations, Packed, starts
from tasks.data.coco_columns import position, read_columns, repeated
from tasks.data.coco_file import CategoryRecord, read_file
from tasks.data.faults import NAMED, Fault, fault, listed, overlapping_edge, unusable
from tasks.data.image_files import check_image_files
from tasks.data.images import MAX_PIXELS, decode
from tasks.data.keypoints import Skeleton, poses
from tasks.data.semantic import class_map, read_class_map
from tasks.data.transforms import nearest

__all__ = ["Category", "CocoAnnotations", "CocoDataset", "read_coco"]

Sample = tuple[Tensor, dict[str, Any]]


def read_coco(
    annotations: Path | str,
    images: Path | str,
    *,
    require_annotations: bool = True,
    follow_symlinks: bool = False,
) -> CocoAnnotations:
    """Reads an annotation file and makes sure that the image files it names are there.

    `info`, `licenses`, `area` and `iscrowd` may be missing, ids may be zero, have gaps, be whole floats, or
    all be strings of digits. Nothing is cleaned here: faulty boxes are named and kept. Only annotations of
    images that the file does not list are left out, since nothing can come of them.

    Args:
        annotations: COCO JSON, as https://cocodataset.org/#format-data describes it.
        images: the folder that `file_name` is relative to.
        require_annotations: False for files that only list images to predict on.
        follow_symlinks: links in the image folder may lead out of it.

    Raises:
        UsageError: the file or the folder is missing or unreadable; a record is wrong, named with its place
            in the file; ids occur twice or name nothing; image files are missing or outside the folder.
    """
    path, folder = Path(annotations), Path(images)
    file = read_file(path)
    needed = ["images", "annotations", "categories"] if require_annotations else ["images"]
    absent = [name for name in needed if not isinstance(getattr(file, name), list)]
    if absent:
        raise UsageError(
            f"{path}: not a COCO file of objects: it has no {_quoted(absent, ' and no ')}; "
            f"{_quoted(needed, ', ')} are expected"
        )
    for name in ("images", "categories"):
        if name in needed and not getattr(file, name):
            raise UsageError(f"{path}: `{name}` is empty; there is nothing to learn from or to judge by")
    columns = read_columns(path, file)
    names = [record.file_name for record in file.images or []]
    check_image_files(folder, names, follow_symlinks=follow_symlinks)

    image_of = position(columns.image_id, columns.image_ids)
    lost = image_of < 0
    # stable: an image's annotations keep the order of the file
    rows = torch.from_numpy(np.argsort(image_of, kind="stable")[int(lost.sum()) :])
    counts = torch.from_numpy(np.bincount(image_of[~lost], minlength=len(names)))
    by_id = np.argsort(columns.category_ids)
    labels = torch.from_numpy(position(columns.category_id, columns.category_ids[by_id]) + 1)
    xywh = torch.from_numpy(columns.xywh)
    records = file.annotations or []
    given = torch.tensor([math.nan if r.area is None else r.area for r in records], dtype=torch.float64)
    twice = repeated(np.array(names, dtype=object))
    notes = [
        *(Fault(f"{what} ids written as text", "converted", "file", 1, ()) for what in columns.as_text),
        *fault("file name that an earlier image has", "kept", "image", columns.image_ids[twice].tolist()),
        *fault("annotation of an image not listed", "dropped", "annotation", columns.ids[lost].tolist()),
    ]
    read = CocoAnnotations(
        path=path,
        images=folder,
        categories=[_category(int(columns.category_ids[k]), (file.categories or [])[k]) for k in by_id],
        image_ids=torch.from_numpy(columns.image_ids),
        sizes=torch.from_numpy(columns.sizes),
        file_names=Packed.of([name.encode() for name in names]),
        first=starts(counts),
        ids=torch.from_numpy(columns.ids)[rows],
        all_labels=labels[rows],
        xywh=xywh[rows],
        areas=torch.where(given.isnan(), xywh[:, 2] * xywh[:, 3], given)[rows],
        crowd=torch.from_numpy(columns.crowd)[rows],
        segmentations=Packed.of([r.segmentation for r in records]).select(rows),
        keypoints=Packed.of([r.keypoints for r in records]).select(rows),
        crowds=int(columns.crowd.sum()),
        notes=tuple(notes),
    )
    return replace(read, box_faults=tuple(_kept(read)))


def part_of(annotations: CocoAnnotations, indices: Tensor) -> CocoAnnotations:
    """The images of `indices` (int64) as if the file held no others."""
    part = annotations.subset(indices)
    return replace(part, box_faults=tuple(_kept(part)))


def _category(category_id: int, record: CategoryRecord) -> Category:
    return Category(
        category_id,
        record.name,
        tuple(record.keypoints),
        tuple(record.skeleton),
        None if record.flip_pairs is None else tuple(record.flip_pairs),
        None if record.sigmas is None else tuple(record.sigmas),
    )


def _quoted(names: Iterable[str], between: str) -> str:
    return between.join(f"`{name}`" for name in names)


def _kept(annotations: CocoAnnotations) -> list[Fault]:
    """The boxes that training would drop or clip; evaluation judges by them as they are."""
    sizes = annotations.sizes[annotations.image_of()]
    reasons = unusable(annotations.xywh, sizes)
    bad = torch.stack(list(reasons.values())).any(dim=0)
    reasons["box reaching over the edge of its image"] = overlapping_edge(annotations.xywh, sizes) & ~bad
    return [f for kind, m in reasons.items() for f in fault(kind, "kept", "annotation", annotations.ids[m])]


class CocoDataset(Dataset):
    """The images of a split with their objects, decoded but not resized.

    Sample: an image, uint8 [3, H, W], RGB, and a dict with `image_id` (int), `original_size` (height and
    width, ints, that the annotation file gives), and for all targets but `semantic`
        boxes: `tv_tensors.BoundingBoxes`, float32 [N, 4], xyxy in pixels of this image.
        labels: int64 [N], 1…K. annotation_ids: int64 [N].
        iscrowd: bool [N], in evaluation only.
    for `masks` also
        segmentations: N times the JSON of the file (bytes), in pixels of `original_size`. They are drawn
            where the image has its final size, since drawn masks of a large image fill the memory.
    for `keypoints` also
        keypoints: `tv_tensors.KeyPoints`, float32 [N, P, 2], x and y in pixels of this image.
        visibility: int64 [N, P], 0 not labelled, 1 hidden, 2 in sight.
        keypoint_flip: int64 [P], the skeleton's `mirror`.
    for `semantic`
        semantic: `tv_tensors.Mask`, uint8 [H, W], see `class_map`.
        original_semantic: the same of `original_size`, in evaluation only.

    Args:
        annotations: from `read_coco`; for training, what `clean` makes of it is used, but for `semantic`:
            crowds are painted too, as ignored.
        split: its name, for errors.
        training: objects that can be learned from, boxes within the image. Otherwise all annotations as they
            stand in the file, crowds too: for pictures, since the metric reads the file itself.
        target: what a task asks for: `boxes`, `masks`, `keypoints` or `semantic`.
        skeleton: of the keypoints, for `keypoints`.
        class_maps: folder of PNG files for `semantic`, named like the images; None paints the instances.
        max_pixels: larger images are refused.
        bit_depth: for 16-bit images, the number of bits that are in use.

    Raises:
        UsageError: an unknown target; images above `max_pixels`. On access: an image that cannot be decoded
            or has another size than the file says, named with its split and id.
    """

    TARGETS = ("boxes", "masks", "keypoints", "semantic")

    def __init__(
        self,
        annotations: CocoAnnotations,
        split: str,
        *,
        training: bool,
        target: str = "boxes",
        skeleton: Skeleton | None = None,
        class_maps: Path | None = None,
        max_pixels: int = MAX_PIXELS,
        bit_depth: int | None = None,
    ) -> None:
        if target not in self.TARGETS:
            raise UsageError(f"data.target={target!r}: COCO data is read for {', '.join(self.TARGETS)}")
        cleaned = training and target != "semantic"
        self.annotations = annotations.clean(masks=target == "masks") if cleaned else annotations
        self.split, self.training, self.target = split, training, target
        self.skeleton, self.class_maps = skeleton, class_maps
        self.poses = poses(self.annotations, len(skeleton.names)) if skeleton else None
        self.max_pixels, self.bit_depth = max_pixels, bit_depth
        huge = (self.annotations.sizes.prod(dim=1) > max_pixels).nonzero().squeeze(1).tolist()
        if huge:
            named = [f"{self.name(i)}: {self.annotations.image_size(i)}" for i in huge[:NAMED]]
            raise UsageError(
                f"{annotations.path}: images of more than {max_pixels} pixels (height, width): "
                f"{listed(named, len(huge))}; remove them or raise data.max_pixels"
            )

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width as the annotation file says."""
        return self.annotations.image_size(index)

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        """The sample.

        at_least: the height and width it will be resized to. A JPEG is then decoded at a fraction of its
        size, as long as each side stays twice as long as that, and the boxes are scaled to the image.
        """
        annotations = self.annotations
        height, width = annotations.image_size(index)
        try:
            image = decode(
                annotations.image_path(index),
                (height, width),
                max_pixels=self.max_pixels,
                bit_depth=self.bit_depth,
                at_least=at_least,
            )
        except UsageError as error:
            raise UsageError(f"{self.split}: {self.name(index)}: {error}") from None
        size = (image.shape[-2], image.shape[-1])
        known = {"image_id": int(annotations.image_ids[index]), "original_size": (height, width)}
        if self.target == "semantic":
            return tv_tensors.Image(image), known | self._semantic(index, size)
        return tv_tensors.Image(image), known | self._objects(index, size)

    def _objects(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        annotations = self.annotations
        height, width = annotations.image_size(index)
        scale = torch.tensor([size[1] / width, size[0] / height])  # of x and y
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                annotations.boxes(index) * scale.repeat(2), format="XYXY", canvas_size=size
            ),
            "labels": annotations.labels(index).clone(),
            "annotation_ids": annotations.annotation_ids(index).clone(),
        }
        if not self.training:
            target["iscrowd"] = annotations.iscrowd(index).clone()
        rows = annotations.rows(index)
        if self.target == "masks":
            target["segmentations"] = [annotations.segmentations[row] for row in range(rows.start, rows.stop)]
        if self.skeleton is not None and self.poses is not None:
            x_y, visibility = self.poses[rows].split([2, 1], dim=2)
            target["keypoints"] = tv_tensors.KeyPoints(x_y * scale, canvas_size=size)
            target["visibility"] = visibility.squeeze(2).long()
            target["keypoint_flip"] = torch.tensor(self.skeleton.mirror)
        return target

    def _semantic(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        annotations = self.annotations
        original = annotations.image_size(index)
        try:
            if self.class_maps is None:
                drawn = class_map(annotations, index)
            else:
                file = self.class_maps / Path(annotations.file_name(index)).with_suffix(".png")
                drawn = read_class_map(file, annotations, original, self.max_pixels)
        except UsageError as error:
            raise UsageError(f"{self.split}: {self.name(index)}: {error}") from None
        target: dict[str, Any] = {"semantic": nearest(drawn, size)}
        if not self.training:
            target["original_semantic"] = drawn
        return target

    def name(self, index: int) -> str:
        """What to call an image in an error: its id and its file."""
        return f"image {int(self.annotations.image_ids[index])} {self.annotations.file_name(index)!r}"
