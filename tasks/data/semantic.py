"""Class maps: for every pixel the class it belongs to, painted from instances or read from a PNG file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.annotations import CocoAnnotations
from tasks.data.faults import listed
from tasks.data.images import IGNORED, MAX_PIXELS
from tasks.data.mask_folders import read_mask
from tasks.data.segmentations import render


def class_map(annotations: CocoAnnotations, index: int) -> Tensor:
    """Paints an image's instances, uint8 [H, W] of the size that the file gives.

    0 is background, k the class with label k. Crowds are `IGNORED`; then instances are painted by their area,
    the largest first, so that small things on large ones stay in sight. Of an instance without a segmentation
    that can be drawn its box is `IGNORED`: something is there.
    """
    height, width = annotations.image_size(index)
    drawn = torch.zeros(height, width, dtype=torch.uint8)
    rows = torch.arange(len(annotations.ids))[annotations.rows(index)]
    crowd = annotations.crowd[rows]
    by_size = rows[~crowd][annotations.areas[rows[~crowd]].argsort(descending=True, stable=True)]
    for row in [*rows[crowd].tolist(), *by_size.tolist()]:
        mask = render(annotations.segmentations[row], (height, width), (height, width)).bool()
        drawn[mask] = IGNORED if annotations.crowd[row] else int(annotations.all_labels[row])
        if not mask.any():
            x, y, w, h = annotations.xywh[row].round().long().tolist()
            drawn[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = IGNORED
    return drawn


def read_class_map(
    path: Path, annotations: CocoAnnotations, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A PNG file whose values are category ids of the annotation file, as uint8 [H, W] of classes 0…K - 1.

    Other values are `IGNORED` where they are 0 (COCO's "unlabeled") or 255.

    Raises:
        UsageError: the file is missing or damaged, of another size than `size`, or holds other values.
    """
    values = read_mask(path, max_pixels=max_pixels)
    if values.shape != size:
        raise UsageError(f"{path}: {values.shape[0]}×{values.shape[1]}, its image is {size[0]}×{size[1]}")
    classes = np.full(256, IGNORED, dtype=np.uint8)
    for label, category in enumerate(annotations.category_ids):
        classes[category] = label
    known = {0, IGNORED, *annotations.category_ids}
    strange = sorted(set(np.unique(values).tolist()) - known)
    if strange:
        raise UsageError(
            f"{path}: values {listed([str(v) for v in strange])} are no category ids of {annotations.path}; "
            "write category ids, and 255 where there is nothing to learn"
        )
    return torch.from_numpy(classes[values])
