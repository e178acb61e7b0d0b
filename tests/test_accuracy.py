"""Accuracy on cases small enough to count by hand, and against torchmetrics."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
)

from resnext_backbones.errors import UsageError
from tasks.metrics.accuracy import Accuracy
from tasks.metrics.iou import MeanIoU

NAMES = ["cat", "dog", "eel"]


def sure_of(*classes: int, number: int = 3) -> torch.Tensor:
    """Logits whose best class is the given one."""
    return torch.nn.functional.one_hot(torch.tensor(classes), number).float() * 2


def test_counted_by_hand() -> None:
    metric = Accuracy(NAMES, range(5))
    # cats: 2 of 3 right, one taken for a dog; the only dog is right; no eel in the split, but one predicted
    metric.update([0, 1, 2], sure_of(0, 0, 1), torch.tensor([0, 0, 0]))
    metric.update([3, 4], sure_of(1, 2), torch.tensor([1, 1]))
    numbers = metric.compute()
    assert numbers == pytest.approx({"top1": 3 / 5, "mean_class_accuracy": (2 / 3 + 1 / 2) / 2})
    assert metric.per_class == pytest.approx({"cat": 2 / 3, "dog": 1 / 2})
    assert metric.per_class_name == "accuracy"
    assert metric.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_top5_needs_more_than_five_classes() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    metric = Accuracy([*"abcdef"], range(2))
    metric.update([0, 1], logits, torch.tensor([4, 5]))  # the fifth and the sixth best
    assert metric.compute() == {"top1": 0.0, "top5": 0.5, "mean_class_accuracy": 0.0}
    five = Accuracy([*"abcde"], range(2))
    five.update([0, 1], logits[:, :5], torch.tensor([4, 0]))
    assert five.compute() == {"top1": 0.5, "mean_class_accuracy": 0.5}


def test_of_tied_classes_the_first_is_better() -> None:
    metric = Accuracy([*"abcdefgh"], range(3))
    metric.update([0, 1, 2], torch.zeros(3, 8), torch.tensor([0, 4, 5]))
    assert metric.compute() == pytest.approx({"top1": 1 / 3, "top5": 2 / 3, "mean_class_accuracy": 1 / 3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_torchmetrics(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 20, generator=random).to(dtype)
    labels = torch.randint(0, 20, (400,), generator=random)
    logits[torch.arange(400), labels] += 1.5
    if dtype == torch.float32:
        assert len(logits.flatten().unique()) == logits.numel()  # no ties: torchmetrics leaves them to chance
    metric = Accuracy([str(i) for i in range(20)], range(400))
    metric.update(range(400), logits, labels)
    numbers = metric.compute()

    best = logits.argmax(dim=1)
    assert numbers["top1"] == pytest.approx(multiclass_accuracy(best, labels, 20, average="micro").item())
    each = multiclass_accuracy(best, labels, 20, average=None)
    assert list(metric.per_class.values()) == pytest.approx(each.tolist())
    assert numbers["mean_class_accuracy"] == pytest.approx(each.mean().item())
    assert metric.confusion.tolist() == multiclass_confusion_matrix(best, labels, 20).tolist()
    if dtype == torch.float32:
        top5 = multiclass_accuracy(logits, labels, 20, average="micro", top_k=5)
        assert numbers["top5"] == pytest.approx(top5.item())
        assert 0.3 < numbers["top1"] < numbers["top5"] < 1


def test_batches_and_reports_twice_change_nothing(tmp_path: Path) -> None:
    logits = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 6
    results = []
    for size in (1, 5, 12):
        metric = Accuracy([*"abcdef"], range(12))
        for start in reversed(range(0, 12, size)):
            part = slice(start, start + size)
            metric.update(range(12)[part], logits[part], labels[part])
        if size == 5:  # a padded sampler's second report
            metric.update([3], -logits[3:4], labels[3:4])
        numbers = metric.compute()
        metric.save(tmp_path, str(size))
        results.append((numbers, (tmp_path / f"predictions_{size}.csv").read_text()))
    assert results[0] == results[1] == results[2]
    assert results[0][0]["top5"] > 0


def test_predictions_on_disk(tmp_path: Path) -> None:
    metric = Accuracy(["cat", "dog", 'a "b", c'], {7: "x/1.jpg", 3: "y\n2.jpg"})
    metric.update([7, 3], torch.tensor([[0.0, 0, math.log(2)], [1000.0, 0, 0]]), torch.tensor([0, 0]))
    metric.compute()
    metric.save(tmp_path, "test")
    with (tmp_path / "predictions_test.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == (
        "image_id,file,truth,prediction,score,prediction_2,score_2,prediction_3,score_3"
    )
    assert rows == [
        ["3", "y\n2.jpg", "cat", "cat", "1.000000", "dog", "0.000000", 'a "b", c', "0.000000"],
        ["7", "x/1.jpg", "cat", 'a "b", c', "0.500000", "cat", "0.250000", "dog", "0.250000"],
    ]
    before = (tmp_path / "predictions_test.csv").read_bytes()
    metric._files = {}
    del metric._found[7], metric.names[2]
    with pytest.raises(IndexError):
        metric.save(tmp_path, "test")
    assert (tmp_path / "predictions_test.csv").read_bytes() == before  # whole or not at all
    assert [p.name for p in tmp_path.iterdir()] == ["predictions_test.csv"]


def test_pictures(tmp_path: Path) -> None:
    metric = Accuracy(NAMES, range(2))
    metric.update([0, 1], sure_of(0, 2), torch.tensor([0, 1]))
    metric.compute()
    written = metric.draw(tmp_path, "val")
    assert [path.name for path in written] == ["per_class_val.png", "confusion_val.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_classes_of_one_name_are_told_apart() -> None:
    metric = Accuracy(["bat", "bat"], [0])
    metric.update([0], sure_of(1, number=2), torch.tensor([1]))
    metric.compute()
    assert metric.per_class == {"bat (1)": 1.0}


# What is refused.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    logits = sure_of(0, 1)
    logits[1, 2] = value
    with pytest.raises(RuntimeError, match="image 8: its logits are not finite"):
        Accuracy(NAMES).update([5, 8], logits, torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_a_class(label: int) -> None:
    with pytest.raises(UsageError, match=rf"label {label} of image 8 is not in 0…2"):
        Accuracy(NAMES).update([5, 8], sure_of(0, 1), torch.tensor([0, label]))


def test_another_number_of_classes() -> None:
    with pytest.raises(UsageError, match=r"logits \[2, 4\].*3 classes"):
        Accuracy(NAMES).update([5, 8], sure_of(0, 1, number=4), torch.tensor([0, 1]))


def test_images_must_be_those_of_the_split() -> None:
    metric = Accuracy(NAMES, range(3))
    metric.update([0], sure_of(0), torch.tensor([0]))
    with pytest.raises(RuntimeError, match=r"2 images were not reported .*\[1, 2\]"):
        metric.compute()
    with pytest.warns(UserWarning, match="accuracy is of 1 of the split's 3 images only"):
        assert metric.compute(metric.reported)["top1"] == 1.0


def test_nothing_to_judge(tmp_path: Path) -> None:
    metric = Accuracy(NAMES)
    assert metric.compute() == {}
    assert metric.per_class == {}
    assert metric.draw(tmp_path, "val") == []
    metric.save(tmp_path, "val")
    assert len((tmp_path / "predictions_val.csv").read_text().splitlines()) == 1


# Several processes: the same for each metric, since they share how their images are brought together.


def truths_and_guesses(images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    maps = torch.randint(0, 3, (2, images, 4, 5), generator=random).to(torch.uint8)
    return (
        torch.randn(images, 3, generator=random),
        torch.randint(0, 3, (images,), generator=random),
        *maps,
    )


def metrics_of(ids: list[int], images: int) -> tuple[Accuracy, MeanIoU]:
    logits, labels, predictions, truths = truths_and_guesses(images)
    accuracy, iou = Accuracy(NAMES, range(images)), MeanIoU(NAMES, range(images))
    accuracy.update(ids, logits[ids], labels[ids])
    iou.update(ids, list(predictions[ids]), list(truths[ids]))
    return accuracy, iou


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    numbers = {}
    accuracy, iou = metrics_of([[0, 5, 2], [1, 3, 4, 6, 0]][rank], 7)  # image 0 twice
    for metric in (accuracy, iou):
        numbers |= metric.compute() | metric.per_class
        metric.save(folder, "val")
        metric.draw(folder, "val")
    incomplete, _ = metrics_of([rank], 7)
    with pytest.raises(RuntimeError, match="5 images were not reported"):
        incomplete.compute()  # must not leave the other process waiting
    incomplete._found[rank] = None  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="AttributeError"):  # a fault of the first process alone
        incomplete.compute([0, 1])
    (folder / f"rank{rank}.json").write_text(json.dumps(numbers))
    del metric, accuracy, iou, incomplete  # with their process groups
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*images only:UserWarning")
def test_number_of_processes_changes_no_number(tmp_path: Path) -> None:
    mp.spawn(work, (tmp_path,), nprocs=2)
    alone: dict[str, float] = {}
    for metric in metrics_of(list(range(7)), 7):
        alone |= metric.compute() | metric.per_class
        metric.save(tmp_path, "alone")
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == alone
    for name in ("predictions", "per_image"):
        files = [tmp_path / f"{name}_{split}.csv" for split in ("val", "alone")]
        assert files[0].read_text() == files[1].read_text()
