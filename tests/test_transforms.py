"""From decoded images to padded batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.batches import collate
from tasks.data.prepared import Prepared
from tasks.data.samplers import TrainSampler
from tasks.data.transforms import Clean, HorizontalFlip, nearest, resized, select


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

    def __len__(self):
        return len(self.samples)

    def image_size(self, index):
        return tuple(self.samples[index][0].shape[-2:])

    def load(self, index, at_least=None):
        image, target = self.samples[index]
        return image, dict(target)


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
    image, target = prepared[(0, 0, 0)]
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[20, 5, 35, 25]]
    image, target = Prepared(Samples(sample()), (30, 40), augment=flip)[0]
    assert target["boxes"].tolist() == [[5, 5, 20, 25]]  # evaluation does not augment


def test_augmentation_is_a_function_of_seed_epoch_copy_and_index():
    augment = [v2.ColorJitter(brightness=0.9), v2.RandomHorizontalFlip()]
    samples = Samples(*(sample() for _ in range(4)))

    def images(seed, epoch, copy=0):
        prepared = Prepared(samples, (60, 80), jitter=(0.5, 1.0), augment=augment, seed=seed, training=True)
        return [prepared[(epoch, copy, index)][0] for index in (0, 1, 2, 3)]

    first = images(0, 0)
    torch.manual_seed(99)
    again = images(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(i.shape) for i in first}) > 1  # jitter differs from image to image
    assert any(a.shape != b.shape for a, b in zip(first, images(0, 1), strict=True))
    assert any(a.shape != b.shape for a, b in zip(first, images(1, 0), strict=True))
    assert any(a.shape != b.shape for a, b in zip(first, images(0, 0, copy=1), strict=True))
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


# Scenes: each object is white in a channel of its own, so that its mask and box can be read off the image.


def scene(height=90, width=120, rle=(), segmentations=True):
    """Three rectangles with the labels 1 to 3, the first left of the second."""
    rectangles = [(10, 12, 50, 60), (60, 8, 110, 40), (55, 45, 115, 85)]  # x1, y1, x2, y2
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    texts = []
    for k, (x1, y1, x2, y2) in enumerate(rectangles):
        image[k, y1:y2, x1:x2] = 255
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        before, column, after = x1 * height + y1, y2 - y1, height - y2
        counts = [before, *([column, height - column] * (x2 - x1 - 1)), column]
        counts.append(height * width - sum(counts))
        assert after >= 0
        text = {"size": [height, width], "counts": counts} if k in rle else outline
        texts.append(json.dumps(text).encode())
    boxes = torch.tensor(rectangles, dtype=torch.float32)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([1, 2, 3]),
        "annotation_ids": torch.tensor([11, 12, 13]),
        "image_id": 5,
        "original_size": (height, width),
    }
    if segmentations:
        target["segmentations"] = texts
    return tv_tensors.Image(image), target


LARGE_SCALE = {"size": (60, 60), "jitter": (0.4, 2.0), "crop": (60, 60)}


@pytest.mark.parametrize("settings", [{"size": (60, 400), "jitter": (0.5, 2.0)}, LARGE_SCALE])
@pytest.mark.parametrize("rle", [(), (0, 2)])
def test_masks_and_boxes_stay_on_their_objects(settings, rle):
    prepared = Prepared(Samples(scene(rle=rle)), **settings, augment=[HorizontalFlip(0.5)], training=True)
    lost = flips = 0
    for epoch in range(40):
        image, target = prepared[(epoch, 0, 0)]
        assert "segmentations" not in target
        lost += 3 - len(target["labels"])
        assert target["annotation_ids"].tolist() == [10 + k for k in target["labels"].tolist()]
        assert target["masks"].dtype == torch.uint8
        assert target["masks"].shape == (len(target["labels"]), *image.shape[-2:])
        for label, mask, box in zip(target["labels"], target["masks"], target["boxes"], strict=True):
            seen = image[label - 1] > 127  # within a pixel, since resizing blurs the edge
            assert (mask.bool() ^ seen).sum() <= 2 * sum(mask.shape)
            rows, columns = seen.any(dim=1).nonzero(), seen.any(dim=0).nonzero()
            if len(rows) and len(columns):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == pytest.approx([int(e) for e in expected], abs=1.01)
        boxes = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
        if 1 in boxes and 2 in boxes:
            flips += boxes[1][0] > boxes[2][0]
    assert (lost > 0) == ("crop" in settings)  # objects outside the window are left out
    assert 5 < flips < 35


def test_boxes_of_parts_are_drawn_around_what_is_left_of_the_mask():
    """Of a right triangle less is left than of its box."""
    image, target = scene()
    target["segmentations"][0] = b"[[10, 12, 50, 60, 10, 60]]"
    image[0] = 0
    y, x = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    image[0][(x > 10) & (y < 60) & ((y - 12) / 48 > (x - 10) / 40)] = 255
    prepared = Prepared(Samples((image, target)), (90, 200), crop=(40, 40), training=True)
    narrower = 0
    for epoch in range(30):
        image, target = prepared[(epoch, 0, 0)]
        for box in target["boxes"][target["labels"] == 1].tolist():
            rows, columns = (image[0] > 127).any(dim=1).nonzero(), (image[0] > 127).any(dim=0).nonzero()
            if len(rows) > 4 and len(columns) > 4:
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box == pytest.approx([int(e) for e in expected], abs=2.01)
                narrower += box[2] < 35 and columns.min() == 0
    assert narrower > 0


def test_large_scale_jitter_draws_its_sizes_and_windows_evenly():
    # 64 is the crop's side; the image is square, so its resized side is round(64 * factor)
    side = 64
    image = torch.arange(side, dtype=torch.uint8).expand(3, side, side).contiguous()  # column x has value x
    _, target = sample(side, side)
    samples = Samples((tv_tensors.Image(image), target))
    prepared = Prepared(samples, (side, side), jitter=(0.1, 2.0), crop=(side, side), training=True)
    images = [prepared[(epoch, 0, 0)][0] for epoch in range(300)]
    sizes = torch.tensor([image.shape[-1] for image in images])
    small = sizes[sizes < side]
    assert len(small) / 300 == pytest.approx(0.9 / 1.9, abs=0.1)
    assert small.float().mean() == pytest.approx(side * 0.55, abs=4)
    assert small.min() < 0.2 * side
    # cut from a larger image, the window's first column is the image's at the same share of its width
    cut = [i for i in images if i.shape[-1] == side and i[0, 0, -1] - i[0, 0, 0] < 50]
    starts = torch.tensor([float(i[0, 0, 0]) for i in cut])
    room = torch.tensor([side - 1.0 - float(i[0, 0, -1] - i[0, 0, 0]) for i in cut])
    share = starts / room
    assert len(cut) > 50
    assert share.mean() == pytest.approx(0.5, abs=0.1)
    assert share.min() < 0.1
    assert share.max() > 0.9
    assert {image.shape[-2] for image in images} <= set(range(6, side + 1))


def test_multi_scale_training_draws_each_short_side():
    prepared = Prepared(Samples(sample(60, 80)), ([30, 45, 60], 70), training=True)
    sizes = [tuple(prepared[(epoch, 0, 0)][0].shape[-2:]) for epoch in range(60)]
    assert set(sizes) == {(30, 40), (45, 60), (52, 70)}  # the longest side of 70 limits the last
    assert all(sizes.count(size) > 8 for size in set(sizes))
    assert Prepared(Samples(sample(60, 80)), ([30, 45, 60], 100))[0][0].shape[-2:] == (60, 80)


@pytest.mark.parametrize("seed", range(6))
def test_our_flip_is_torchvisions_with_the_same_random_numbers(seed):
    image, target = sample(boxes=[(10, 10, 40, 50), (0, 5, 80, 9)])
    target["masks"] = tv_tensors.Mask(torch.randint(0, 2, (2, 60, 80), dtype=torch.uint8))
    target["semantic"] = tv_tensors.Mask(torch.randint(0, 9, (60, 80), dtype=torch.uint8))
    torch.manual_seed(seed)
    expected = v2.RandomHorizontalFlip(0.5)(image, target)
    torch.manual_seed(seed)
    found = HorizontalFlip(0.5)(image, target)
    assert torch.equal(found[0], expected[0])
    for name in ("boxes", "masks", "semantic", "labels"):
        assert torch.equal(found[1][name], expected[1][name])
        assert type(found[1][name]) is type(expected[1][name])


def person(height=60, width=80):
    """Nose, left and right eye, of two people; the second's right eye is not there."""
    image, target = sample(height, width, boxes=[(10, 10, 40, 50), (50, 10, 75, 50)])
    points = [[[25, 20], [30, 15], [20, 15]], [[60, 20], [65, 15], [0, 0]]]
    target["keypoints"] = tv_tensors.KeyPoints(torch.tensor(points).float(), canvas_size=(height, width))
    target["visibility"] = torch.tensor([[2, 1, 2], [2, 2, 0]])
    target["keypoint_flip"] = torch.tensor([0, 2, 1])
    return image, target


def test_mirrored_keypoints_swap_left_and_right():
    prepared = Prepared(Samples(person()), (120, 160), augment=[HorizontalFlip(1.0)], training=True)
    image, target = prepared[0]
    assert target["keypoints"].tolist() == [
        [[110, 40, 2], [120, 30, 2], [100, 30, 1]],  # the new left eye was the right one, 20 from the left
        [[40, 40, 2], [0, 0, 0], [30, 30, 2]],
    ]
    assert target["boxes"].tolist() == [[80, 20, 140, 100], [10, 20, 60, 100]]
    assert set(target) == {"boxes", "labels", "image_id", "original_size", "keypoints"}
    batch = collate([(image, target)])
    assert batch.targets[0]["keypoints"].dtype == torch.float32
    assert "keypoint_flip" not in batch.targets[0]


def test_flipped_twice_keypoints_are_where_they_were():
    image, target = person()
    again = HorizontalFlip(1.0)(*HorizontalFlip(1.0)(image, target))[1]
    assert torch.equal(again["keypoints"][0], target["keypoints"][0])
    assert torch.equal(again["visibility"], target["visibility"])


FLIPS = {
    "horizontal": v2.RandomHorizontalFlip(),
    "vertical": v2.RandomVerticalFlip(),
    "sometimes": v2.RandomApply([v2.RandomHorizontalFlip()]),
    "one of several": v2.RandomChoice([v2.ColorJitter(), v2.RandomVerticalFlip()]),
    "in any order": v2.RandomOrder([v2.RandomHorizontalFlip()]),
    "deep": v2.Compose([v2.RandomApply(torch.nn.ModuleList([v2.Compose([v2.RandomHorizontalFlip()])]))]),
}


@pytest.mark.parametrize("flip", FLIPS.values(), ids=FLIPS)
def test_a_flip_that_would_mix_up_left_and_right_is_refused_before_an_image_is_read(flip):
    settings = {"augment": [v2.ColorJitter(0.1), flip], "training": True}
    with pytest.raises(UsageError, match="leaves left and right keypoints unswapped"):
        Prepared(Samples(), (60, 80), **settings, posed=True)
    assert Prepared(Samples(sample()), (60, 80), **settings)[0]


def test_our_flip_may_stand_within_others():
    augment = [v2.Compose([v2.RandomApply([v2.ColorJitter(0.5)]), v2.RandomChoice([HorizontalFlip(1.0)])])]
    target = Prepared(Samples(person()), (60, 80), augment=augment, training=True, posed=True)[0][1]
    assert target["keypoints"][0].tolist() == [[55, 20, 2], [60, 15, 2], [50, 15, 1]]


def test_keypoints_outside_the_window_are_not_there():
    prepared = Prepared(Samples(person()), (60, 80), crop=(40, 40), training=True)
    outside = 0
    for epoch in range(30):
        image, target = prepared[(epoch, 0, 0)]
        height, width = image.shape[-2:]
        x, y, visibility = target["keypoints"].unbind(dim=2)
        there = visibility > 0
        assert ((x[there] >= 0) & (x[there] <= width) & (y[there] >= 0) & (y[there] <= height)).all()
        assert (target["keypoints"][~there] == 0).all()
        outside += int((~there[target["labels"] == 1]).sum())
        for box, points in zip(target["boxes"], target["keypoints"], strict=True):
            for x, y, v in points.tolist():
                if v and 0 < x < width and 0 < y < height:  # every keypoint lies within its box
                    assert box[0] <= x <= box[2]
                    assert box[1] <= y <= box[3]
    assert outside > 5


def test_objects_without_a_mask_are_not_trained_on_but_kept_in_evaluation():
    image, target = scene()
    target["segmentations"][1] = b"null"
    target["segmentations"][2] = b"[[1, 1, 5, 1, 5, 1e9]]"
    trained = Prepared(Samples((image, target)), (45, 60), training=True)[0][1]
    assert trained["labels"].tolist() == [1]
    assert trained["masks"].shape == (1, 45, 60)
    assert trained["boxes"].shape == (1, 4)
    judged = Prepared(Samples((image, target)), (45, 60))[0][1]
    assert judged["labels"].tolist() == [1, 2, 3]
    assert judged["masks"].flatten(1).sum(dim=1).tolist() == [20 * 24, 0, 0]


@pytest.mark.parametrize("settings", [{"size": (45, 60)}, LARGE_SCALE])
def test_an_image_without_objects_has_no_masks(settings):
    image, target = scene()
    target |= {name: target[name][:0] for name in ("labels", "annotation_ids", "segmentations")}
    target["boxes"] = tv_tensors.wrap(target["boxes"][:0], like=target["boxes"])
    augment = [HorizontalFlip(1.0), v2.RandomAffine(10), v2.ColorJitter(0.5)]
    image, target = Prepared(Samples((image, target)), **settings, augment=augment, training=True)[0]
    assert target["masks"].shape == (0, *image.shape[-2:])
    assert collate([(image, target)]).targets[0]["boxes"].shape == (0, 4)


def classes(height=60, width=80, seed=0):
    image, target = sample(height, width)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 5, (height // 10, width // 10), dtype=torch.uint8, generator=generator)
    blocks[blocks == 4] = 255
    semantic = blocks.repeat_interleave(10, dim=0).repeat_interleave(10, dim=1)
    known = {name: target[name] for name in ("image_id", "original_size")}
    return image, known | {"semantic": tv_tensors.Mask(semantic)}


@pytest.mark.parametrize("size", [(60, 80), (90, 120), (31, 41), (7, 200)])
def test_maps_of_classes_are_resized_as_pillow_does(size):
    semantic = classes()[1]["semantic"]
    expected = Image.fromarray(semantic.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(nearest(semantic, size), np.array(expected))


def test_maps_of_classes_follow_the_image():
    image, target = classes()
    image = tv_tensors.Image(target["semantic"].as_subclass(torch.Tensor).expand(3, -1, -1).clone())
    settings = {"size": (60, 240), "jitter": (0.5, 2.0), "crop": (50, 50)}
    prepared = Prepared(Samples((image, target)), **settings, augment=[HorizontalFlip(0.5)], training=True)
    for epoch in range(10):
        image, target = prepared[(epoch, 0, 0)]
        assert target["semantic"].shape == image.shape[-2:]
        assert max(image.shape[-2:]) <= 50
        assert target["semantic"].dtype == torch.uint8
        # blurred only near the edges of the blocks of at least five pixels
        assert (image[0] == target["semantic"]).float().mean() > 0.4
    assert "original_semantic" not in target


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("image_size", {"size": (0, 80)}),
        ("image_size", {"size": ([], 80)}),
        ("image_size", {"size": ([60, 0], 80)}),
        ("jitter", {"size": (60, 80), "jitter": (0.0, 1.0)}),
        ("jitter", {"size": (60, 80), "jitter": (2.0, 1.0)}),
        ("crop", {"size": (60, 80), "crop": (0, 10)}),
    ],
)
def test_values_out_of_range_are_refused(name, settings):
    with pytest.raises(UsageError, match=rf"^data\.{name}="):
        Prepared(Samples(sample()), **settings)
    with pytest.raises(UsageError, match=r"^data\.flip=1\.5"):
        HorizontalFlip(1.5)


def test_what_a_rotation_uncovers_is_ignored():
    image, target = classes()
    target["semantic"] = tv_tensors.Mask(torch.zeros_like(target["semantic"]))
    augment = [v2.RandomRotation((45, 45))]
    image, target = Prepared(Samples((image, target)), (60, 80), augment=augment, training=True)[0]
    assert target["semantic"][0, 0] == 255
    assert target["semantic"][30, 40] == 0
    assert set(target["semantic"].unique().tolist()) == {0, 255}


def test_evaluation_keeps_the_original_classes():
    image, target = classes()
    original = torch.randint(0, 5, (120, 160), dtype=torch.uint8)
    target |= {"original_semantic": original, "original_size": (120, 160)}
    image, target = Prepared(Samples((image, target)), (30, 40))[0]
    batch = collate([(image, target)])
    assert batch.targets[0]["semantic"].shape == (30, 40)
    assert torch.equal(batch.targets[0]["original_semantic"], original)


@pytest.mark.parametrize("name", ["masks", "semantic"])
def test_masks_of_another_size_than_their_image_are_refused(name):
    image, target = sample()
    target[name] = tv_tensors.Mask(torch.zeros(1, 61, 80, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image 7: masks are not of the image's size \(60, 80\)"):
        collate([(image, target)])


def test_as_many_objects_as_the_image_has_rows_are_no_trouble():
    target = classes(10, 20)[1]
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 10)
    target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(10, 20))
    target["labels"] = torch.arange(10)
    kept = select(target, torch.arange(10) < 3)
    assert kept["semantic"].shape == (10, 20)
    assert kept["labels"].tolist() == [0, 1, 2]


def test_workers_change_nothing():
    prepared = Prepared(
        Samples(*(scene(rle=(k % 3,)) for k in range(6))),
        **LARGE_SCALE,
        augment=[HorizontalFlip(), v2.ColorJitter(0.5), v2.RandomIoUCrop()],
        training=True,
    )

    def batches(workers):
        sampler = TrainSampler(6, 2, 0, repeats=2)
        return list(
            DataLoader(prepared, batch_size=2, sampler=sampler, num_workers=workers, collate_fn=collate)
        )

    here, there = batches(0), batches(2)
    assert len(here) == 3
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.image_ids[0] == a.image_ids[1]  # two copies
        assert a.sizes.tolist() == b.sizes.tolist()
        for mine, other in zip(a.targets, b.targets, strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in mine)
    copies = [batch.images for batch in here]
    assert any(not torch.equal(pair[0], pair[1]) for pair in copies)
