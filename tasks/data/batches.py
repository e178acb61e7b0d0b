"""Samples of different sizes in one padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.data.transforms import OF_OBJECTS, Target


class DetectionBatch(NamedTuple):
    """A batch of images padded at the right and at the bottom to one size.

    images: uint8 [B, 3, H, W], RGB, channels last, zero where padded.
    sizes: int64 [B, 2], height and width of each image within its padding.
    original_sizes: int64 [B, 2], height and width of each image as annotated.
    image_ids: int64 [B], as in the annotation file.
    targets: for each image, at its size h × w within the padding, what the task's target holds of:
        boxes: float32 [N, 4], xyxy. labels: int64 [N], 1…K. annotation_ids: int64 [N].
        iscrowd: bool [N], in evaluation only.
        masks: uint8 [N, h, w], 1 inside.
        keypoints: float32 [N, K, 3], x, y and visibility (0 not there, 1 hidden, 2 visible).
        semantic: uint8 [h, w], class 0…K - 1 of each pixel, `IGNORED` where it does not count.
        original_semantic: uint8 [H0, W0], as annotated, in evaluation only.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    targets: list[dict[str, Tensor]]


def collate(samples: Sequence[tuple[Tensor, Target]], multiple: int = 32) -> DetectionBatch:
    """Pads images to one size, a multiple of the body's coarsest stride, so that strides stay as declared."""
    images, targets = zip(*samples, strict=True)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(dim=0))
    shape = (len(images), 3, height, width)
    batch = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[-2], : image.shape[-1]] = image
    return DetectionBatch(
        images=batch,
        sizes=sizes,
        original_sizes=torch.tensor([target["original_size"] for target in targets]),
        image_ids=torch.tensor([target["image_id"] for target in targets]),
        targets=[_tensors(*sample) for sample in samples],
    )


def _tensors(image: Tensor, target: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: value.as_subclass(Tensor) for name, value in target.items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if len({shape[0] for name, shape in shapes.items() if name in OF_OBJECTS}) > 1:
        raise ValueError(f"image {target['image_id']}: the target's entries differ in number: {shapes}")
    size = tuple(image.shape[-2:])
    if any(shapes[name][-2:] != size for name in ("masks", "semantic") if name in shapes):
        raise ValueError(f"image {target['image_id']}: masks are not of the image's size {size}: {shapes}")
    return tensors
