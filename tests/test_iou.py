"""MeanIoU on maps small enough to count by hand, and against torchmetrics and hotcoco."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hotcoco.metrics import mean_iou
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from resnext_backbones.errors import UsageError
from tasks.metrics.iou import MeanIoU

NAMES = ["sky", "sea", "sun"]


def area(*rows: list[int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counted_by_hand(dtype: torch.dtype) -> None:
    truth = area([0, 0, 1, 1], [0, 0, 1, 255])
    found = area([0, 0, 0, 1], [0, 2, 1, 2], dtype=dtype)
    metric = MeanIoU(NAMES, [4])
    metric.update([4], [found], [truth])
    # sky: 3 of 5 in either; sea: 2 of 3; sun: found once where it is not; the ignored pixel counts nowhere
    assert metric.compute() == pytest.approx(
        {
            "mIoU": (3 / 5 + 2 / 3 + 0) / 3,
            "pixel_accuracy": 5 / 7,
            "mean_accuracy": (3 / 4 + 2 / 3) / 2,  # over the classes in the truth
        }
    )
    assert metric.per_class == pytest.approx({"sky": 3 / 5, "sea": 2 / 3, "sun": 0.0})
    assert metric.per_class_name == "IoU"
    assert metric.confusion.tolist() == [[3, 0, 1], [1, 2, 0], [0, 0, 0]]


def test_a_class_that_occurs_nowhere_counts_nowhere() -> None:
    metric = MeanIoU(NAMES, [1])
    metric.update([1], [area([0, 1])], [area([0, 0])])
    assert metric.compute() == pytest.approx({"mIoU": 1 / 4, "pixel_accuracy": 1 / 2, "mean_accuracy": 1 / 2})
    assert metric.per_class == pytest.approx({"sky": 1 / 2, "sea": 0.0})


def test_pixels_are_pooled_over_images() -> None:
    # Not the mean of the images' IoU of sky, (1 + 1/9) / 2: 2 of 10 pixels.
    metric = MeanIoU(NAMES, [1, 2])
    metric.update([1, 2], [area([0]), area([0, 1, 1, 1, 1, 1, 1, 1, 1])], [area([0]), area([0] * 9)])
    metric.compute()
    assert metric.per_class["sky"] == pytest.approx(2 / 10)


def maps(images: int, classes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    sizes = [(5 + i, 9 + i % 3) for i in range(images)]
    truths = [torch.randint(0, classes, size, generator=random) for size in sizes]
    found = [torch.where(torch.rand(t.shape, generator=random) < 0.6, t, (t + 1) % classes) for t in truths]
    for truth in truths:
        truth[torch.rand(truth.shape, generator=random) < 0.1] = 255
    return found, [truth.to(torch.uint8) for truth in truths]


def test_as_torchmetrics_and_hotcoco() -> None:
    found, truths = maps(20, 7)  # of ten classes three occur nowhere
    metric = MeanIoU([str(i) for i in range(10)], range(20))
    metric.update(range(20), found, truths)
    numbers = metric.compute()
    pixels = torch.cat([f.flatten() for f in found]), torch.cat([t.flatten().long() for t in truths])
    expected = multiclass_confusion_matrix(*pixels, 10, ignore_index=255)
    assert metric.confusion.tolist() == expected.tolist()
    jaccard = multiclass_jaccard_index(*pixels, 10, ignore_index=255)
    assert numbers["mIoU"] == pytest.approx(jaccard.item())
    theirs = mean_iou(expected.numpy().astype(np.uint64))  # after MMSegmentation
    assert numbers == pytest.approx(
        {"mIoU": theirs["mIoU"], "pixel_accuracy": theirs["aAcc"], "mean_accuracy": theirs["mAcc"]}
    )
    assert len(metric.per_class) == 7
    assert 0.3 < numbers["mIoU"] < 0.8


def test_batches_and_reports_twice_change_nothing() -> None:
    found, truths = maps(6, 3)
    results = []
    for size in (1, 4, 6):
        metric = MeanIoU(NAMES, range(6))
        for start in reversed(range(0, 6, size)):
            part = slice(start, start + size)
            metric.update(range(6)[part], found[part], truths[part])
        if size == 4:  # a padded sampler's second report
            metric.update([2], [truths[2].clamp(max=2)], [truths[2]])
        results.append((metric.compute(), metric.per_class, metric.confusion.tolist()))
    assert results[0] == results[1] == results[2]


def test_an_image_of_ignored_pixels_only(tmp_path: Path) -> None:
    nothing = area([255, 255])
    metric = MeanIoU(NAMES, [1, 2])
    metric.update([2], [area([0, 1])], [nothing])
    with pytest.warns(UserWarning, match="IoU is of 1 of the split's 2 images only"):
        assert metric.compute([2]) == {}
    assert metric.per_class == {}
    assert metric.draw(tmp_path, "val") == []
    metric.update([1], [area([0, 0, 1])], [area([0, 0, 0])])
    assert metric.compute()["pixel_accuracy"] == pytest.approx(2 / 3)
    metric.save(tmp_path, "val")
    assert (tmp_path / "per_image_val.csv").read_text().splitlines() == [
        "image_id,pixels,pixel_accuracy,mIoU",
        "1,3,0.666667,0.333333",
        "2,0,,",
    ]
    assert [path.name for path in metric.draw(tmp_path, "val")] == ["per_class_val.png", "confusion_val.png"]


def test_an_image_without_pixels() -> None:
    metric = MeanIoU(NAMES, [1])
    metric.update([1], [torch.zeros(0, 4, dtype=torch.uint8)], [torch.zeros(0, 4, dtype=torch.uint8)])
    assert metric.compute() == {}


# What is refused.


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        ([[0, 3]], [[0, 1]], "class 3 in the prediction of image 6 is not in 0…2"),
        ([[0, -1]], [[0, 1]], "class -1 in the prediction of image 6"),
        ([[0, 1]], [[0, 254]], "class 254 in the truth of image 6"),
        ([[0, 1]], [[0, 1], [0, 1]], r"image 6: prediction \[1, 2\], truth \[2, 2\]"),
    ],
)
def test_maps_that_do_not_fit(found: list[list[int]], truth: list[list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MeanIoU(NAMES).update([6], [torch.tensor(found)], [torch.tensor(truth, dtype=torch.uint8)])


def test_more_classes_than_a_map_can_hold() -> None:
    with pytest.raises(UsageError, match="256 classes: at most 255"):
        MeanIoU([str(i) for i in range(256)])


def test_images_must_be_those_of_the_split() -> None:
    metric = MeanIoU(NAMES, [1, 2])
    metric.update([1], [area([0])], [area([0])])
    with pytest.raises(RuntimeError, match=r"1 images were not reported .*\[2\]"):
        metric.compute()
