"""What is found in an image does not depend on the images beside it in a batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from resnext_backbones import ResNeXt
from tasks.data.alike import alike
from tasks.data.batches import DetectionBatch
from tasks.detection import DetectionTask
from tasks.models.rcnn import faster_rcnn
from tasks.models.semantic import deeplabv3, semantic_fpn
from tasks.schedule import warmup_cosine
from tasks.segmentation import SemanticTask

SIZES = [(64, 96), (96, 64), (60, 90), (160, 96), (96, 64)]


def batch_of(images: Sequence[Tensor]) -> DetectionBatch:
    """Images of noise, padded to the largest; annotated at half their size."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(side) // 32) * 32 for side in sizes.amax(dim=0))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for target, image in zip(padded, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return DetectionBatch(padded, sizes, sizes // 2, torch.arange(len(images)), [{} for _ in images])


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]


def body(**options: Any) -> ResNeXt:
    torch.manual_seed(0)
    return ResNeXt((1, 1, 1, 1), 4, 4, **options)


def ready(kind: Any, model: Any) -> Any:
    """The task around a network whose norms have seen some images."""
    task = kind(model, partial(SGD, lr=0.1), partial(warmup_cosine, warmup=0.1))
    with torch.no_grad():
        for _ in range(5):
            model.backbone(torch.randn(4, 3, 96, 96))
    return task.eval()


def test_parts_are_padded_no_further_than_alone(images: list[Tensor]) -> None:
    parts = list(alike(batch_of(images)))
    assert [(places, tuple(part.images.shape[-2:])) for places, part in parts] == [
        ([0, 2], (64, 96)),
        ([1, 4], (96, 64)),
        ([3], (160, 96)),
    ]
    for places, part in parts:
        assert part.image_ids.tolist() == places
        for place, image, (height, width) in zip(places, part.images, part.sizes.tolist(), strict=True):
            assert torch.equal(image[:, :height, :width], images[place])


def test_a_batch_of_one_size_is_left_as_it_is(images: list[Tensor]) -> None:
    batch = batch_of([images[1], images[4]])
    ((places, part),) = alike(batch)
    assert places == [0, 1]
    assert part is batch


@pytest.mark.parametrize("build", [semantic_fpn, deeplabv3])
def test_class_maps(build: Any, images: list[Tensor]) -> None:
    options = {"output_stride": 8} if build is deeplabv3 else {}
    task = ready(SemanticTask, build(body(**options), 7))
    with torch.no_grad():
        together = task.predict(batch_of(images))
        alone = [task.predict(batch_of([image]))[0] for image in images]
    assert min(len(found.unique()) for found in alone) > 1  # something to tell apart
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        assert (one != other).float().mean() < 1e-3  # two scores may be equal but for rounding


def test_boxes(images: list[Tensor]) -> None:
    model = faster_rcnn(body(), 3, fpn_channels=16, head_channels=32, score_threshold=0.0)
    task = ready(DetectionTask, model)
    with torch.no_grad():
        together = task.predict(batch_of(images))
        alone = [task.predict(batch_of([image]))[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert len(one["scores"]) == len(other["scores"]) > 0
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-4, rtol=1e-4)
