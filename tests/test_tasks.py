"""Tasks: what they learn from a batch, what they say of one, and the names that a run reports."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL
from omegaconf import open_dict
from pycocotools import mask as rle
from rich.console import Console
from torch import Tensor, nn

from resnext_backbones import freeze_norms, resnet18
from resnext_backbones.errors import UsageError
from tasks.classification import ClassificationTask
from tasks.data.batches import DetectionBatch, collate
from tasks.data.class_transforms import ClassBatch
from tasks.data.coco import CocoDataset, read_coco
from tasks.data.coco_data import CocoData
from tasks.data.keypoints import skeleton_of
from tasks.data.prepared import Prepared
from tasks.detection import DetectionTask, learnable
from tasks.loggers import read_metrics
from tasks.models.classifier import Classifier
from tasks.models.evaluation import SEED
from tasks.models.one_stage import fcos, retinanet
from tasks.models.rcnn import faster_rcnn, keypoint_rcnn, mask_rcnn
from tasks.models.semantic import semantic_fpn
from tasks.segmentation import SemanticTask, pixel_cross_entropy
from tasks.terminal import table

NARROW: dict[str, Any] = {
    "fpn_channels": 32,
    "head_channels": 32,
    "rpn_batch": 32,
    "roi_batch": 16,
    "proposals_train": 30,
    "proposals_test": 20,
}
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "classifier": lambda body: Classifier(body, 3),
    "faster_rcnn": lambda body: faster_rcnn(body, 3, **NARROW),
    "mask_rcnn": lambda body: mask_rcnn(body, 3, mask_channels=8, **NARROW),
    "keypoint_rcnn": lambda body: keypoint_rcnn(body, 3, 2, keypoint_channels=8, **NARROW),
    "retinanet": lambda body: retinanet(body, 3, fpn_channels=32),
    "fcos": lambda body: fcos(body, 3, fpn_channels=64),
    "semantic_fpn": lambda body: semantic_fpn(body, 3, fpn_channels=32, head_channels=64),
}
IOU_TYPES = {"mask_rcnn": ["bbox", "segm"], "keypoint_rcnn": ["bbox", "keypoints"]}


def task_of(kind: Any, model: nn.Module, **settings: Any) -> Any:
    task = kind(model, None, None, **settings)
    task.record = {"categories": [{"id": k, "name": n} for k, n in enumerate("abc", start=1)]}
    return task


class Reported(list):
    """A metric that only remembers."""

    def update(self, *reported: Any) -> None:
        self.append(reported)


# Detection: what is learned from.


def evaluation_batch() -> tuple[DetectionBatch, list[dict[str, Tensor]]]:
    """Two images of 64 × 64 and 40 × 64 pixels, with crowds and boxes that teach nothing among the rest; and
    what is left without them, written down by hand."""
    images = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    images[1, :, 40:] = 0
    boxes = [
        [[4, 4, 40, 50], [0, 0, 64, 64], [10, 10, 10, 30], [50, 20, 90, 60], [70, 5, 90, 9]],
        [[0, 0, 30, 80], [5, 5, 5.5, 20]],
    ]
    crowd = [[False, True, False, False, False], [False, False]]
    targets = []
    for b, c, height in zip(boxes, crowd, (64, 40), strict=True):
        n = len(b)
        masks = torch.zeros(n, height, 64, dtype=torch.uint8)
        for mask, box in zip(masks, b, strict=True):
            x1, y1, x2, y2 = (int(v) for v in box)
            mask[y1:y2, x1:x2] = 1
        keypoints = torch.tensor([[[8.0, 8, 2], [20, 30, 1]]]).repeat(n, 1, 1)
        keypoints[:, 0, 0] += torch.arange(n)
        targets.append(
            {
                "boxes": torch.tensor(b, dtype=torch.float32),
                "labels": torch.arange(n) % 3 + 1,
                "iscrowd": torch.tensor(c),
                "masks": masks,
                "keypoints": keypoints,
            }
        )
    kept = [([0, 3], [[4, 4, 40, 50], [50, 20, 64, 60]]), ([0], [[0, 0, 30, 40]])]
    left = [
        {key: t[key][rows] for key in ("labels", "masks", "keypoints")} | {"boxes": torch.tensor(b).float()}
        for t, (rows, b) in zip(targets, kept, strict=True)
    ]
    sizes = torch.tensor([[64, 64], [40, 64]])
    return DetectionBatch(images, sizes, sizes * 2, torch.tensor([7, 9]), targets), left


def test_crowds_and_degenerate_boxes_are_not_learned_from() -> None:
    batch, left = evaluation_batch()
    for target, size, expected in zip(batch.targets, batch.sizes.tolist(), left, strict=True):
        before = {key: value.clone() for key, value in target.items()}
        found = learnable(target, size)
        assert set(found) == set(target)
        assert not found["iscrowd"].any()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert all(torch.equal(target[key], before[key]) for key in before)  # pictures still show them


def test_an_object_whose_mask_is_empty_is_not_learned_from() -> None:
    batch, _ = evaluation_batch()
    batch.targets[0]["masks"][3] = 0
    assert learnable(batch.targets[0], (64, 64))["boxes"].tolist() == [[4, 4, 40, 50]]


def test_without_any_object_nothing_is_left() -> None:
    batch, _ = evaluation_batch()
    empty = {key: value[:0] for key, value in batch.targets[0].items()}
    found = learnable(empty, (64, 64))
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 64, 64)


@pytest.mark.parametrize(
    ("target", "file"), [("boxes", "instances"), ("masks", "instances"), ("keypoints", "person_keypoints")]
)
def test_evaluation_learns_from_what_training_learns_from(real_data: Path, target: str, file: str) -> None:
    """The same file on both ways: cleaned and then resized, or resized as it is and then cleaned."""
    root = real_data / "coco33"
    annotations = read_coco(root / f"annotations/{file}_train2017.json", root / "train2017")
    settings = {"target": target, "skeleton": skeleton_of(annotations) if target == "keypoints" else None}
    learned = CocoDataset(annotations, "train", training=True, **settings)
    judged = CocoDataset(annotations, "train", training=False, **settings)
    position = {int(k): i for i, k in enumerate(annotations.image_ids)}
    crowds = 0
    for index in range(min(6, len(learned))):
        _, mine = Prepared(learned, (96, 160), training=True)[0, 0, index]
        batch = collate([Prepared(judged, (96, 160))[position[int(learned.annotations.image_ids[index])]]])
        crowds += int(batch.targets[0]["iscrowd"].sum())
        found = learnable(batch.targets[0], batch.sizes[0].tolist())
        assert torch.equal(found["annotation_ids"], mine["annotation_ids"])
        torch.testing.assert_close(found["boxes"], mine["boxes"].as_subclass(Tensor))
        if target == "masks":
            assert torch.equal(found["masks"], mine["masks"].as_subclass(Tensor))
        if target == "keypoints":
            torch.testing.assert_close(found["keypoints"], mine["keypoints"])
    assert crowds > 0


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"])
def test_the_loss_of_a_split_is_that_of_training_and_moves_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](freeze_norms(resnet18()))
    model.backbone.body.register_buffer("moved", torch.zeros(()))
    task = task_of(DetectionTask, model, iou_types=IOU_TYPES.get(name, ["bbox"])).eval()
    batch, left = evaluation_batch()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    metric = Reported()
    detections, losses = task.update(metric, batch)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())
    ((ids, reported),) = metric
    assert ids == [7, 9]
    assert reported is detections
    torch.manual_seed(SEED)  # of the anchors and regions that are drawn; there are none to draw for one stage
    with torch.no_grad():
        expected = model.train()(batch.images, batch.sizes, left)
    assert losses.keys() == expected.keys()
    assert all(losses[key].item() == expected[key].item() for key in losses)


def test_running_statistics_stay_as_they_are_in_validation() -> None:
    torch.manual_seed(0)
    model = MODELS["fcos"](resnet18())  # with batch norm that learns
    task = task_of(DetectionTask, model).eval()
    batch, left = evaluation_batch()
    before = {key: value.clone() for key, value in model.named_buffers()}
    task.update(Reported(), batch)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())
    task.train()
    task.losses(batch._replace(targets=left))
    assert any(not torch.equal(before[key], value) for key, value in model.named_buffers())


# Detection: what is found, in the pixels of the image as annotated.


class Finds(nn.Module):
    """A detector that knows its answer."""

    def __init__(self, *answers: dict[str, Tensor]) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, images: Tensor, sizes: Tensor, targets: Any = None) -> list[dict[str, Tensor]]:
        return [dict(answer) for answer in self.answers]

    def evaluate(self, images: Tensor, sizes: Tensor, targets: Any) -> Any:
        return self(images, sizes), {"loss": torch.zeros(())}


def found(*boxes: list[float], **more: Tensor) -> dict[str, Tensor]:
    n = len(boxes)
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(n, 4)
    return {"boxes": rows, "scores": torch.linspace(0.9, 0.1, n), "labels": torch.arange(n) + 1, **more}


def resized_batch() -> DetectionBatch:
    """One image of 100 × 200 pixels given as 50 × 80, one that kept its size."""
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "iscrowd": torch.zeros(0).bool()}
    return DetectionBatch(
        images=torch.zeros(2, 3, 64, 96, dtype=torch.uint8),
        sizes=torch.tensor([[50, 80], [60, 96]]),
        original_sizes=torch.tensor([[100, 200], [60, 96]]),
        image_ids=torch.tensor([3, 4]),
        targets=[target, target],
    )


def test_boxes_and_keypoints_come_back_in_original_pixels() -> None:
    """2.5 times as wide, twice as high; keypoints then name pixels, as COCO's files, by their centres."""
    points = torch.tensor([[[8.0, 10, 1], [40, 25, 1]]])
    model = Finds(
        found([8, 10, 40, 30], keypoints=points, keypoint_scores=torch.ones(1, 2)),
        found([8, 10, 40, 30], [0, 0, 96, 60], keypoints=points.repeat(2, 1, 1)),
    )
    task, batch = task_of(DetectionTask, model, iou_types=["bbox", "keypoints"]), resized_batch()
    for detections in (task.predict(batch), task.update(Reported(), batch)[0]):
        first, second = detections
        assert first["boxes"].tolist() == [[20, 20, 100, 60]]
        assert first["keypoints"].tolist() == [[[19.5, 19.5, 1], [99.5, 49.5, 1]]]
        assert first["keypoint_scores"].tolist() == [[1, 1]]
        assert second["boxes"].tolist() == [[8, 10, 40, 30], [0, 0, 96, 60]]
        assert second["keypoints"].tolist() == [[[7.5, 9.5, 1], [39.5, 24.5, 1]]] * 2
        shown = task.layers(batch, 0, first, 0.5)[2]
        torch.testing.assert_close(shown["keypoints"], points)  # in the pictures where the network saw them
        assert second["labels"].tolist() == [1, 2]


def test_masks_come_back_in_original_pixels() -> None:
    """A full mask is its box; the upper half of one the upper half, ± the row that the edge runs through."""
    masks = torch.ones(2, 28, 28)
    masks[1, 14:] = 0
    model = Finds(found([8, 10, 40, 30], [8, 10, 40, 30], masks=masks), found(masks=torch.zeros(0, 28, 28)))
    first, second = task_of(DetectionTask, model, iou_types=["bbox", "segm"]).predict(resized_batch())
    assert "masks" not in first
    assert [code["size"] for code in first["rles"]] == [[100, 200]] * 2
    whole, half = (torch.from_numpy(rle.decode(code)) for code in first["rles"])
    expected = torch.zeros(100, 200, dtype=torch.uint8)
    expected[20:60, 20:100] = 1
    assert torch.equal(whole, expected)
    expected[40:] = 0
    assert torch.equal(half, expected)
    assert second["rles"] == []


class Oracle(nn.Module):
    """A detector that is told the truth, at the size of the resized image."""

    def evaluate(self, images: Tensor, sizes: Tensor, targets: Any) -> Any:
        return [self.answer(target) for target in targets], {"loss": torch.zeros(())}

    def answer(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = {"boxes": target["boxes"], "labels": target["labels"]}
        answer["scores"] = torch.ones(len(target["labels"]))
        if "keypoints" in target:
            answer["keypoints"] = target["keypoints"].clamp(max=1e6)
        if "masks" in target:
            windows = [b.round().int().tolist() for b in target["boxes"]]
            parts = [
                m[None, None, y1:y2, x1:x2].float()
                for m, (x1, y1, x2, y2) in zip(target["masks"], windows, strict=True)
            ]
            answer["masks"] = torch.cat([F.interpolate(p, (28, 28), mode="bilinear")[0] for p in parts])
        return answer


@pytest.mark.parametrize(
    ("target", "iou_types", "least"),
    [
        ("boxes", ["bbox"], {"AP": 0.9999}),
        ("masks", ["bbox", "segm"], {"AP": 0.9999, "mask_AP50": 0.9999, "mask_AP": 0.8}),
        ("keypoints", ["bbox", "keypoints"], {"AP": 0.9999, "keypoint_AP": 0.9999}),
    ],
)
def test_the_truth_found_in_resized_images_is_judged_perfect(
    tiny_shapes: list[str], target: str, iou_types: list[str], least: dict[str, float]
) -> None:
    """From the file through resizing, batch, task and metric and back; a mask has 28 × 28 cells only."""
    root = tiny_shapes[0].partition("=")[2]
    data = CocoData(root, "train", "val", target=target, image_size=[200, 300], batch_size=4, num_workers=0)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    task = task_of(DetectionTask, Oracle(), iou_types=iou_types)
    trainer = SimpleNamespace(datamodule=data)
    task.trainer = trainer
    metric = task.metric("val")
    for batch in data.val_dataloader():
        assert (batch.sizes != batch.original_sizes).all()
        task.update(metric, batch)
    numbers = metric.compute()
    assert {name: numbers[name] for name in least if numbers[name] < least[name]} == {}


# Semantic segmentation.


def test_the_mean_is_over_the_pixels_that_count() -> None:
    """Two maps of 2 × 3 and 3 × 2 within 4 × 4; padding and 255 count nowhere."""
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = [
        torch.tensor([[0, 1, 255], [2, 255, 1]], dtype=torch.uint8),
        torch.tensor([[1, 1], [0, 2], [255, 255]], dtype=torch.uint8),
    ]
    terms = [
        torch.logsumexp(logits[b, :, y, x], 0) - logits[b, int(maps[b][y, x]), y, x]
        for b in range(2)
        for y in range(maps[b].shape[0])
        for x in range(maps[b].shape[1])
        if maps[b][y, x] != 255
    ]
    assert len(terms) == 8
    assert pixel_cross_entropy(logits, maps).item() == pytest.approx(sum(terms).item() / 8, rel=1e-12)


def test_where_all_is_ignored_there_is_nothing_to_learn() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    maps = [torch.full((4, 4), 255, dtype=torch.uint8), torch.full((2, 3), 255, dtype=torch.uint8)]
    assert F.cross_entropy(logits, torch.full((2, 4, 4), 255), ignore_index=255).isnan()  # as torch has it
    loss = pixel_cross_entropy(logits, maps)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_ignored_image_does_not_weigh_on_the_others() -> None:
    logits = torch.randn(2, 3, 4, 4)
    seen = torch.randint(0, 3, (4, 4), dtype=torch.uint8)
    ignored = torch.full((4, 4), 255, dtype=torch.uint8)
    alone = pixel_cross_entropy(logits[:1], [seen])
    torch.testing.assert_close(pixel_cross_entropy(logits, [seen, ignored]), alone)
    torch.testing.assert_close(alone, F.cross_entropy(logits[:1], seen[None].long()))


class Says(nn.Module):
    """A network that knows its logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        return self.logits


def halves() -> tuple[Says, DetectionBatch]:
    """Class 0 on the left half of each image and 1 on its right, 2 wherever it is padded."""
    batch = resized_batch()
    logits = torch.zeros(2, 3, 64, 96)
    logits[:, 2] = 100
    maps = []
    for scores, (height, width) in zip(logits, batch.sizes.tolist(), strict=True):
        scores[:, :height, :width] = 0
        scores[0, :height, : width // 2] = 1
        scores[1, :height, width // 2 : width] = 1
        maps.append(scores[:, :height, :width].argmax(0).to(torch.uint8))
    originals = [torch.zeros(size, dtype=torch.uint8) for size in batch.original_sizes.tolist()]
    targets = [{"semantic": m, "original_semantic": o} for m, o in zip(maps, originals, strict=True)]
    return Says(logits), batch._replace(targets=targets)


def test_class_maps_come_back_in_original_pixels_without_the_padding() -> None:
    model, batch = halves()
    task = task_of(SemanticTask, model)
    expected = [torch.zeros(100, 200), torch.zeros(60, 96)]
    for drawn in expected:
        drawn[:, drawn.shape[1] // 2 :] = 1
    metric = Reported()
    results, losses = task.update(metric, batch)
    for classes in (task.predict(batch), results):
        assert [c.dtype for c in classes] == [torch.uint8] * 2
        assert all(torch.equal(c.float(), e) for c, e in zip(classes, expected, strict=True))
    ((ids, reported, truths),) = metric
    assert ids == [3, 4]
    assert reported is results
    assert [tuple(t.shape) for t in truths] == [(100, 200), (60, 96)]
    # every pixel is right by a margin of 1 over two others
    assert losses["loss_semantic"].item() == pytest.approx(
        -torch.tensor([1.0, 0, 0]).log_softmax(0)[0].item()
    )
    assert task.losses(batch)["loss_semantic"].item() == losses["loss_semantic"].item()


@pytest.mark.parametrize(("side", "least"), [(128, 1.0), (200, 0.95)])
def test_the_true_map_of_each_image_is_judged_perfect(
    tiny_shapes: list[str], side: int, least: float
) -> None:
    """Painted from the file, resized, padded, batched, and cut and resized back; exact at the same size."""
    root = tiny_shapes[0].partition("=")[2]
    size = [side, 2 * side]
    data = CocoData(root, "train", "val", target="semantic", image_size=size, batch_size=4, num_workers=0)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    task, trainer = task_of(SemanticTask, Says(torch.zeros(()))), SimpleNamespace(datamodule=data)
    task.record, task.trainer = {"categories": data.categories}, trainer
    metric = task.metric("val")
    for batch in data.val_dataloader():
        task.model.logits = torch.zeros(len(batch.images), len(data.names), *batch.images.shape[-2:])
        task.model.logits[:, 1] = 0.5  # in the padding, and where it does not matter
        for logits, target in zip(task.model.logits, batch.targets, strict=True):
            drawn = target["semantic"].long()
            known = F.one_hot(drawn.where(drawn != 255, 0), len(data.names)).permute(2, 0, 1)
            logits[:, : drawn.shape[0], : drawn.shape[1]] = known
        task.update(metric, batch)
    assert least <= metric.compute()["mIoU"] <= 1
    assert metric.per_class["background"] >= least


# Classification.


class Sees(nn.Module):
    """A classifier that remembers the images it was given; its logits are their three channels' means."""

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() / 255

    def forward(self, normalised: Tensor) -> Tensor:
        self.given = normalised.clone()
        return normalised.mean(dim=(2, 3)) * 5


def class_batch() -> ClassBatch:
    """Images of one value each, four different ones."""
    values = torch.tensor([[0, 51, 255], [102, 204, 0], [255, 153, 51], [204, 0, 102]], dtype=torch.uint8)
    return ClassBatch(
        values[:, :, None, None].repeat(1, 1, 8, 8), torch.tensor([2, 0, 1, 0]), torch.arange(4)
    )


def test_labels_are_smoothed_in_training_only() -> None:
    batch, task = class_batch(), task_of(ClassificationTask, Sees(), label_smoothing=0.1)
    logits = batch.images[:, :, 0, 0].float() / 255 * 5
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, batch.labels)
    (loss,) = task.losses(batch).values()
    torch.testing.assert_close(loss, smoothed)
    metric = Reported()
    probabilities, losses = task.update(metric, batch)
    torch.testing.assert_close(losses["loss_cross_entropy"], nn.CrossEntropyLoss()(logits, batch.labels))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(task.predict(batch), probabilities)
    ((ids, reported, labels),) = metric
    assert ids == [0, 1, 2, 3]
    torch.testing.assert_close(reported, logits)
    assert labels is batch.labels


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_alike(way: str) -> None:
    """How much of each image is its own shows in its pixels; its label is to say the same."""
    batch, model = class_batch(), Sees()
    task = task_of(ClassificationTask, model, label_smoothing=0.2, **{way: 1.0})
    own = batch.images.float() / 255
    other = own.roll(1, 0)
    seen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        (loss,) = task.losses(batch).values()
        shares = ((model.given - other) / (own - other)).mean(dim=(1, 2, 3))  # no channel is equal in both
        share = float(shares[0])
        torch.testing.assert_close(shares, torch.full((4,), share))
        seen.add(round(share, 4))
        labels = share * F.one_hot(batch.labels, 3) + (1 - share) * F.one_hot(batch.labels.roll(1), 3)
        labels = 0.8 * labels + 0.2 / 3
        logits = model.given.mean(dim=(2, 3)) * 5
        torch.testing.assert_close(loss, -(labels * logits.log_softmax(1)).sum(1).mean())
        if way == "cutmix":
            assert ((model.given == own) | (model.given == other)).all()
    assert len(seen) > 2
    task.update(Reported(), batch)
    assert torch.equal(model.given, own)


# A model of another task.


@pytest.mark.parametrize(
    ("kind", "settings", "fitting"),
    [
        (ClassificationTask, {}, {"classifier"}),
        (SemanticTask, {}, {"semantic_fpn"}),
        (DetectionTask, {}, {"faster_rcnn", "retinanet", "fcos"}),
        (DetectionTask, {"iou_types": ["bbox", "segm"]}, {"mask_rcnn"}),
        (DetectionTask, {"iou_types": ["segm"]}, {"mask_rcnn"}),
        (DetectionTask, {"iou_types": ["bbox", "keypoints"]}, {"keypoint_rcnn"}),
    ],
)
def test_a_model_of_another_task_is_refused(kind: Any, settings: Any, fitting: set[str]) -> None:
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build(resnet18())
        if name in fitting:
            task_of(kind, model, **settings)
            continue
        with pytest.raises(UsageError) as caught:
            task_of(kind, model, **settings)
        assert "choose" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_detector_of_one_s_own_may_find_anything() -> None:
    task_of(DetectionTask, Finds(), iou_types=["bbox", "segm", "keypoints"])


def test_a_run_ends_before_it_trains_what_does_not_fit(start: Callable[..., Path], runs: Path) -> None:
    with pytest.raises(UsageError, match=r"finds bbox, segm: choose model=faster_rcnn"):
        start("task=detection", "model=mask_rcnn", "run_id=odd")
    assert not (runs / "odd/metrics.jsonl").exists()


# A run of each task.

RUNS = {
    "classification": ["data.image_size=64"],
    "instance_segmentation": ["model.mask_channels=8"],
    "keypoints": ["model.keypoint_channels=16"],
    "semantic_segmentation": ["model.fpn_channels=32"],
}
JUDGED = {  # its monitor, the names of its losses, what the log calls a class's number
    "classification": ("top1", {"loss_cross_entropy"}, "accuracy"),
    "instance_segmentation": ("mask_AP", {"loss_mask", "loss_classifier", "loss_objectness"}, "mask_AP"),
    "keypoints": ("keypoint_AP", {"loss_keypoint", "loss_box_reg", "loss_rpn_box_reg"}, "keypoint_AP"),
    "semantic_segmentation": ("mIoU", {"loss_semantic"}, "IoU"),
}
SHAPES = {"circle", "square", "triangle", "star", "ring", "cross"}


@pytest.fixture(scope="session")
def finished(tiny_shapes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny run of a task, made once."""
    from hydra import compose, initialize_config_dir

    from tasks.run import run

    folders: dict[str, Path] = {}

    def finished(task: str) -> Path:
        if task in folders:
            return folders[task]
        detector = task in ("instance_segmentation", "keypoints")
        words = [word for word in SMALL if detector or not word.startswith("model.")]
        words += [f"runs_dir={tmp_path_factory.mktemp('runs')}", "trainer.max_epochs=1", f"task={task}"]
        words += [*tiny_shapes, *RUNS[task], "trainer.limit_train_batches=2"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=words, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg.hydra
        folders[task] = run(cfg, words, choices)
        return folders[task]

    return finished


every_task = pytest.mark.parametrize("task", RUNS)


@every_task
def test_the_log_has_the_task_s_numbers(finished: Callable[[str], Path], task: str) -> None:
    monitor, losses, of_class = JUDGED[task]
    records = read_metrics(finished(task))
    numbers = {name: value for record in records for name, value in record.items()}
    for split in ("val", "test"):
        assert 0 <= numbers[f"{split}/{monitor}"] <= 1
        assert {f"{split}/{loss}" for loss in losses} <= numbers.keys()
        of_classes = {n.rpartition("/")[2] for n in numbers if n.startswith(f"{split}/{of_class}/")}
        assert of_classes
        assert of_classes <= SHAPES | {"background"}
        assert ("background" in of_classes) == (task == "semantic_segmentation")
    for name, value in numbers.items():
        assert value == value, name  # no NaN
    for split in ("train", "val", "test"):
        parts = [v for n, v in numbers.items() if n.startswith(f"{split}/loss_")]
        assert numbers[f"{split}/loss"] == pytest.approx(sum(parts), rel=1e-5)


@every_task
def test_the_summary_and_the_table_have_the_classes(finished: Callable[[str], Path], task: str) -> None:
    monitor, _, of_class = JUDGED[task]
    summary = json.loads((finished(task) / "summary.json").read_text())
    results = summary["results"]
    assert 0 <= results[f"test/{monitor}"] <= 1
    assert f"best val/{monitor}" in results
    named = {n.rpartition("/")[2] for n in results if n.startswith(f"test/{of_class}/")}
    assert named
    of_test = {name for kind in summary["per_class"]["test"].values() for name in kind}
    assert named <= of_test <= SHAPES | {"background"}
    printed = io.StringIO()
    Console(width=200, file=printed).print(table(results))
    lines = printed.getvalue().splitlines()
    for name in named:
        assert any(f"{of_class} of {name} " in line for line in lines)
    assert any(f" {monitor} " in line for line in lines)


@every_task
def test_each_epoch_leaves_its_pictures(finished: Callable[[str], Path], task: str) -> None:
    folder = finished(task)
    assert (folder / "pictures/val_epoch001.png").is_file()
    assert (folder / "pictures/test.png").is_file()
    assert (folder / "history.png").is_file()
