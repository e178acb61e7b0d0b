"""From decoded images to padded batches."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from tasks.data.transforms import Clean, Prepared, collate, resized, select


def sample(height=60, width=80, boxes=((10, 10, 40, 50),), image_id=7):
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(1, len(boxes) + 1),
        "image_id": image_id,
        "original_size": (height, width),
    }
    return image, target


class Samples:
    """Stands in for a `CocoDataset`."""

    def __init__(self, *samples):
        self.samples = samples
        self.annotations = self

    def __len__(self):
        return len(self.samples)

    def image_size(self, index):
        return tuple(self.samples[index][0].shape[-2:])

    def load(self, index, at_least):
        return self.samples[index]


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # Detectron2's ResizeShortestEdge(800, 1333)
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((400, 1000), (533, 1333)),
        ((1, 500), (3, 1333)),
        ((2, 20000), (1, 1333)),
    ],
)
def test_resized(size, expected):
    assert resized(*size, 800, 1333) == expected


def test_cleaning_keeps_what_reaches_over_the_edge_and_drops_the_rest():
    inf, nan = float("inf"), float("nan")
    boxes = [
        (10, 10, 40, 50),  # fine
        (nan, 0, 5, 5),
        (0, 0, inf, 5),
        (20, 20, 20, 40),  # no width
        (-20, -20, 30, 30),  # partly outside
        (60, 40, 100, 90),  # partly outside
        (90, 10, 99, 20),  # wholly outside
        (10, 10, 10.5, 40),  # thinner than a pixel
    ]
    _, target = Clean()(*sample(boxes=boxes))
    assert target["labels"].tolist() == [1, 5, 6]
    assert target["boxes"].tolist() == [[10, 10, 40, 50], [0, 0, 30, 30], [60, 40, 80, 60]]
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)


def test_select_keeps_what_belongs_to_the_image():
    _, target = sample(boxes=[(0, 0, 9, 9), (1, 1, 8, 8)])
    kept = select(target, torch.tensor([False, True]))
    assert (kept["image_id"], kept["original_size"], kept["labels"].tolist()) == (7, (60, 80), [2])


def test_boxes_follow_resize_and_flip():
    flip = [v2.RandomHorizontalFlip(p=1.0)]
    prepared = Prepared(Samples(sample()), (30, 40), augment=flip, training=True)
    image, target = prepared[(0, 0)]
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[20, 5, 35, 25]]
    image, target = Prepared(Samples(sample()), (30, 40), augment=flip)[0]
    assert target["boxes"].tolist() == [[5, 5, 20, 25]]  # evaluation does not augment


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    augment = [v2.ColorJitter(brightness=0.9), v2.RandomHorizontalFlip()]
    samples = Samples(*(sample() for _ in range(4)))

    def images(seed, epoch):
        prepared = Prepared(samples, (60, 80), jitter=(0.5, 1.0), augment=augment, seed=seed, training=True)
        return [prepared[(epoch, index)][0] for index in (0, 1, 2, 3)]

    first = images(0, 0)
    torch.manual_seed(99)
    again = images(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(i.shape) for i in first}) > 1  # jitter differs from image to image
    assert any(a.shape != b.shape for a, b in zip(first, images(0, 1), strict=True))
    assert any(a.shape != b.shape for a, b in zip(first, images(1, 0), strict=True))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    images(0, 0)
    assert torch.rand(1) == expected  # the process's own random numbers are left alone


def test_a_batch_is_padded_to_whole_strides():
    batch = collate([sample(60, 80), sample(33, 20, boxes=[], image_id=0)])
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes.tolist() == [[60, 80], [33, 20]]
    assert batch.image_ids.tolist() == [7, 0]
    assert batch.images[1, :, 33:].max() == 0
    assert batch.images[1, :, :, 20:].max() == 0
    assert [t["boxes"].shape for t in batch.targets] == [(1, 4), (0, 4)]


def test_a_target_with_unequal_numbers_is_refused():
    image, target = sample()
    target["labels"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="image 7: the target's entries differ in number"):
        collate([(image, target)])
