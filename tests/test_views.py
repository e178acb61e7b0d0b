"""Test-time augmentation, against merges made by hand from single forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from PIL import Image
from small_checkpoints import changed, made
from torch import Tensor, nn
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as transforms

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.classification import ClassificationTask
from tasks.data.batches import DetectionBatch, collate
from tasks.data.class_transforms import ClassBatch
from tasks.detection import DetectionTask
from tasks.load import load_task
from tasks.predict import VIEWS, main
from tasks.segmentation import SemanticTask
from tasks.views import NAMED, PLAIN, View, views_of

FLIP = {"flip": True}
SIZES = [(50, 80), (64, 60), (40, 90)]  # of images in one batch; two of them are padded


def task_of(kind: str, shapes: list[str], **views: Any) -> Any:
    """A small network of random weights that judges by these views."""
    task = made(kind, shapes).task
    task.views = task.judged_views = views_of(views)
    return task


@pytest.fixture
def network(tiny_shapes: list[str]) -> Any:
    """Networks are shared by all tests of a session; they get their plain view back."""
    used = []

    def network(kind: str, **views: Any) -> Any:
        used.append(task_of(kind, tiny_shapes, **views))
        return used[-1]

    with torch.no_grad():
        yield network
    for task in used:
        task.views = task.judged_views = (PLAIN,)


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Smooth noise, so that a network finds different things in different places."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(3, height // 4, width // 4, generator=generator) * 255 for height, width in sizes)
    return [
        F.interpolate(part[None], size, mode="bilinear")[0].to(torch.uint8)
        for part, size in zip(coarse, sizes, strict=True)
    ]


def batch_of(pictures: list[Tensor], scale_of_original: int = 1) -> DetectionBatch:
    original = [[scale_of_original * side for side in picture.shape[-2:]] for picture in pictures]
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "iscrowd": torch.zeros(0).bool()}
    targets = [{**target, "original_size": size, "image_id": i} for i, size in enumerate(original)]
    samples = zip(pictures, targets, strict=True)
    return collate([(picture, dict(about)) for picture, about in samples])


def alone(task: Any, picture: Tensor) -> Any:
    """What the network finds in one image by itself, in that image's pixels."""
    batch = batch_of([picture])
    return task.model(batch.images, batch.sizes)[0]


def mirrored_boxes(boxes: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def by_hand(found: list[dict[str, Tensor]], iou: float, most: int) -> dict[str, Tensor]:
    joined = {key: torch.cat([one[key] for one in found]) for key in ("boxes", "scores", "labels")}
    kept = batched_nms(joined["boxes"], joined["scores"], joined["labels"], iou)[:most]
    return {key: value[kept] for key, value in joined.items()}


class Reported:
    """In place of a metric."""

    def update(self, *reported: Any) -> None:
        self.reported = reported


# Which views.


def test_a_view_for_each_scale_and_side() -> None:
    assert views_of(None) == views_of({}) == (PLAIN,)
    assert views_of({"flip": True, "scales": [0.5, 1]}) == (
        View(0.5, False),
        View(0.5, True),
        View(1.0, False),
        View(1.0, True),
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("flip", r"task\.views=flip"),
        (3, r"task\.views=3"),
        ({"flips": True}, r"views\.flips"),
        ({"flip": 1}, "flip=1"),
        ({"scales": []}, r"scales=\[\]"),
        ({"scales": 1.0}, r"scales=1\.0"),
        ({"scales": "1.0"}, r"scales=1\.0"),
        ({"scales": [0.0]}, "above 0"),
        ({"scales": [-1.0]}, "above 0"),
        ({"scales": [float("nan")]}, "above 0"),
        ({"scales": [100]}, "up to 4"),
        ({"scales": [1, 1.0]}, "different"),
        ({"scales": [True]}, "numbers"),
        ({"scales": ["a", None]}, "numbers"),
    ],
)
def test_views_that_make_no_sense_are_one_line(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        views_of(given)
    assert "\n" not in str(caught.value)


def test_the_options_are_those_of_the_configurations() -> None:
    files = {
        path.stem: yaml.safe_load(path.read_text())["views"] for path in (ROOT / "configs/tta").iterdir()
    }
    assert files | {"none": {}} == NAMED
    assert files["none"] is None
    assert list(NAMED) == list(VIEWS)


def test_the_padding_stays_where_it_was() -> None:
    """Mirrored within each image's own height and width; the scaled sides are rounded each by itself."""
    pictures = images((50, 81), (64, 60))
    seen = View(1.0, True).of_batch(batch_of(pictures))
    assert seen.sizes.tolist() == [[50, 81], [64, 60]]
    for image, picture in zip(seen.images, pictures, strict=True):
        height, width = picture.shape[-2:]
        assert torch.equal(image[:, :height, :width], picture.flip(-1))
        assert image[:, height:].sum() == image[:, :, width:].sum() == 0
    seen = View(0.5).of_batch(batch_of(pictures))
    assert seen.sizes.tolist() == [[25, 40], [32, 30]]
    assert seen.images.shape == (2, 3, 32, 64)
    assert torch.equal(seen.images[0, :, :25, :40], transforms.resize(pictures[0], [25, 40], antialias=True))
    assert View(0.001).of_batch(batch_of(pictures)).sizes.tolist() == [[1, 1], [1, 1]]


def test_boxes_return_from_where_they_went() -> None:
    boxes = torch.tensor([[3.0, 5.0, 20.0, 31.0], [0.0, 0.0, 81.0, 50.0]])
    for view in (View(0.75, True), View(1.25), View(1.0, True), PLAIN):
        torch.testing.assert_close(view.boxes_back(view.boxes(boxes, 50, 81), 50, 81), boxes)
    whole = torch.tensor([[0.0, 0.0, 81.0, 50.0]])
    rounded = View(0.75, True).boxes(whole, 50, 81)  # of 60.75 × 37.5
    torch.testing.assert_close(rounded, torch.tensor([[0.0, 0.0, 61.0, 38.0]]), rtol=0, atol=1e-4)
    assert View(1.0, True).boxes(boxes[:1], 50, 81).tolist() == [[61, 5, 78, 31]]
    beyond = torch.tensor([[-4.0, 10.0, 90.0, 70.0]])  # of 81 × 50: on three sides
    assert View(1.0, True).boxes_back(beyond, 50, 81).tolist() == [[0, 10, 81, 50]]
    assert View(0.5).boxes_back(beyond, 100, 162).tolist() == [[0, 20, 162, 100]]


# Classification.


def class_batch() -> ClassBatch:
    return ClassBatch(torch.stack(images((64, 64), (64, 64))), torch.tensor([0, 1]), torch.tensor([7, 8]))


def test_probabilities_are_the_mean_of_two_plain_passes(network: Any) -> None:
    task, batch = network("classes", **FLIP), class_batch()

    def plain(pixels: Tensor) -> Tensor:
        return task.model(task.model.normalise(pixels)).softmax(dim=1)

    expected = (plain(batch.images) + plain(batch.images.flip(-1))) / 2
    assert not torch.allclose(expected, plain(batch.images), atol=1e-6)
    torch.testing.assert_close(task.predict(batch), expected, rtol=0, atol=1e-6)
    metric = Reported()
    probabilities, losses = task.update(metric, batch)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(metric.reported[1].softmax(dim=1), expected, rtol=0, atol=1e-6)
    plain_loss = F.cross_entropy(task.model(task.model.normalise(batch.images)), batch.labels)
    torch.testing.assert_close(losses["loss_cross_entropy"], plain_loss)


def test_a_scaled_square_is_seen_whole(network: Any) -> None:
    task, batch = network("classes", scales=[1.25]), class_batch()
    larger = transforms.resize(batch.images, [80, 80], antialias=True)
    expected = task.model(task.model.normalise(larger)).softmax(dim=1)
    torch.testing.assert_close(task.predict(batch), expected)


class Sure(nn.Module):
    """A classifier with one class at odds of e^200 to 1."""

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels

    def forward(self, normalised: Tensor) -> Tensor:
        return torch.tensor([[200.0, 0.0]]).repeat(len(normalised), 1)


def test_a_probability_of_zero_is_judged(tmp_path: Path) -> None:
    from tasks.metrics.accuracy import Accuracy

    task = ClassificationTask(Sure(), None, None, views=FLIP)
    metric = Accuracy(["a", "b"])
    task.update(metric, class_batch())
    assert metric.compute()["top1"] == 0.5


# Detection.


@pytest.mark.parametrize("kind", ["boxes", "one_stage"])
def test_detections_are_merged_as_by_hand(network: Any, kind: str) -> None:
    """Both sides of three images in one batch, against the same images alone, in original pixels."""
    task, pictures = network(kind, **FLIP), images(*SIZES)
    declaring = task.model.roi_heads if kind == "boxes" else task.model
    batch = batch_of(pictures, scale_of_original=2)
    found = task.predict(batch)
    for i, (picture, result) in enumerate(zip(pictures, found, strict=True)):
        left, right = alone(task, picture), alone(task, picture.flip(-1))
        right = {**right, "boxes": mirrored_boxes(right["boxes"], SIZES[i][1])}
        expected = by_hand([left, right], declaring.nms_thresh, declaring.detections_per_img)
        assert len(expected["boxes"]) > 5
        torch.testing.assert_close(result["boxes"], expected["boxes"] * 2, rtol=0, atol=1e-3)
        torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=1e-5)
        assert torch.equal(result["labels"], expected["labels"])


def test_the_losses_are_those_of_the_plain_image(network: Any) -> None:
    """And what is judged is what is predicted."""
    batch = batch_of(images(*SIZES))
    targets = [
        {**t, "boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])} for t in batch.targets
    ]
    batch = batch._replace(targets=[{**t, "iscrowd": torch.tensor([False])} for t in targets])
    _, plain = network("boxes").update(Reported(), batch)
    found, losses = network("boxes", **NAMED["flip_multiscale"]).update(Reported(), batch)
    assert losses == plain
    for one, other in zip(found, network("boxes", **NAMED["flip_multiscale"]).predict(batch), strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
        assert torch.equal(one["scores"], other["scores"])


def test_boxes_of_another_scale_come_back_in_original_pixels(network: Any) -> None:
    """50 × 81 at 0.75 are 38 × 61, so that x and y are scaled by different factors."""
    (picture,) = images((50, 81))
    found = network("one_stage", scales=[0.75]).predict(batch_of([picture], scale_of_original=3))[0]
    small = alone(network("one_stage"), transforms.resize(picture, [38, 61], antialias=True))
    factors = torch.tensor([81 / 61, 50 / 38, 81 / 61, 50 / 38]) * 3
    torch.testing.assert_close(found["boxes"], small["boxes"] * factors, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["scores"], small["scores"])


def test_what_a_symmetric_image_shows_is_symmetric(network: Any) -> None:
    """Each object with its mirror image, of the same score: a network by itself sees none of this."""
    (half,) = images((64, 32))
    symmetric = batch_of([torch.cat([half, half.flip(-1)], dim=-1)])

    def worst(task: Any) -> float:
        task.model.detections_per_img = 1000  # of a pair none is cut off
        (found,) = task.predict(symmetric)
        boxes = torch.cat(
            [found["boxes"], found["labels"][:, None] * 1000, found["scores"][:, None] * 1e4], 1
        )
        mirror = torch.cat([mirrored_boxes(found["boxes"], 64), boxes[:, 4:]], dim=1)
        return float(torch.cdist(mirror, boxes, p=float("inf")).amin(dim=1).max())

    task = network("one_stage", **FLIP)
    before, iou = task.model.detections_per_img, task.model.nms_thresh
    try:
        task.model.nms_thresh = 1.0  # which of two alike is kept is not symmetric
        assert worst(task) < 0.01
        task.views = (PLAIN,)
        assert worst(task) > 1
    finally:
        task.model.detections_per_img, task.model.nms_thresh = before, iou


def test_masks_are_the_mean_over_the_views(network: Any) -> None:
    """Those of the merged boxes, looked for in the image and in its mirror image."""
    task, pictures = network("masks", **FLIP), images(*SIZES)
    batch = batch_of(pictures)
    heads = task.model.roi_heads
    merged = task._found(batch, task.views)
    for picture, found in zip(pictures, merged, strict=True):
        boxes, labels, width = found["boxes"], found["labels"], picture.shape[-1]
        assert len(boxes) == 5

        def masks(pixels: Tensor, boxes: Tensor, labels: Tensor = labels) -> Tensor:
            one = batch_of([pixels])
            shape = [tuple(pixels.shape[-2:])]
            features = task.model.backbone(task.model.normalise(one.images, shape))
            pooled = heads.mask_roi_pool(features, [boxes], shape)
            logits = heads.mask_predictor(heads.mask_head(pooled))
            return torch.stack([logits[k, label] for k, label in enumerate(labels.tolist())]).sigmoid()

        mirrored = masks(picture.flip(-1), mirrored_boxes(boxes, width)).flip(-1)
        expected = (masks(picture, boxes) + mirrored) / 2
        torch.testing.assert_close(found["masks"], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mirrored, expected, atol=1e-4)
    assert all(len(result["rles"]) == 5 for result in task.predict(batch))


class Points(nn.Module):
    """A detector that sees one object, and at the left of whatever it is shown keypoint 0."""

    nms_thresh, detections_per_img = 0.5, 10

    def forward(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, float(width), float(height)]]),
                "scores": torch.ones(1),
                "labels": torch.ones(1).long(),
            }
            for height, width in sizes.tolist()
        ]

    evaluate = forward

    def maps(
        self, images: Tensor, sizes: Tensor, boxes: list[Tensor], labels: Any
    ) -> list[dict[str, Tensor]]:
        heatmaps = torch.zeros(1, 3, 4, 4)
        heatmaps[0, 0, 1, 0] = heatmaps[0, 1, 2, 3] = heatmaps[0, 2, 0, 1] = 1.0
        return [{"heatmaps": heatmaps} for _ in sizes]

    def of_maps(self, maps: dict[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        return {"keypoints": torch.zeros(1, 3, 3), "heatmaps": maps["heatmaps"]}


def test_left_and_right_change_names_with_the_sides() -> None:
    """Row 1, column 0, the left eye's, is the right one's (1, 3); the nose's (0, 1) is its (0, 2)."""
    task = DetectionTask(Points(), None, None, iou_types=["bbox", "keypoints"], views=FLIP)
    task.record = {"skeleton": {"names": ["left_eye", "right_eye", "nose"], "edges": [], "mirror": [1, 0, 2]}}
    (found,) = task.predict(batch_of(images((64, 64))))
    left, right, nose = torch.zeros(3, 4, 4)
    left[1, 0] = left[2, 0] = 0.5
    right[2, 3] = right[1, 3] = 0.5
    nose[0, 1] = nose[0, 2] = 0.5
    assert torch.equal(found["heatmaps"][0], torch.stack([left, right, nose]))
    for mirror in (None, [0, 0, 2], [1, 0]):
        task.record["skeleton"]["mirror"] = mirror
        with pytest.raises(UsageError, match=r"skeleton\.mirror"):
            task.predict(batch_of(images((64, 64))))


def test_keypoints_of_a_mirrored_image_are_mirrored_with_their_names(network: Any) -> None:
    """Merged over both sides, an image and its mirror image have the same keypoints, left for right."""
    task, pictures = network("keypoints", **FLIP), images(*SIZES)
    mirror = task.record["skeleton"]["mirror"]
    assert mirror != sorted(mirror)
    here = task._found(batch_of(pictures), task.views)
    there = task._found(batch_of([picture.flip(-1) for picture in pictures]), task.views)
    for one, other, (_, width) in zip(here, there, SIZES, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(mirrored_boxes(one["boxes"], width), other["boxes"], rtol=0, atol=1e-3)
        points = one["keypoints"][:, mirror]
        close = (width - points[..., 0] - other["keypoints"][..., 0]).abs() < 1
        assert close.float().mean() > 0.9  # a maximum may stand in two places
        torch.testing.assert_close(
            one["keypoint_scores"][:, mirror], other["keypoint_scores"], rtol=0, atol=0.01
        )


def test_where_nothing_is_found_nothing_is_merged(network: Any) -> None:
    for kind in ("masks", "keypoints"):
        task = network(kind, **FLIP)
        heads = task.model.roi_heads
        before, heads.score_thresh = heads.score_thresh, 1.0
        try:
            found = task.predict(batch_of(images(*SIZES)))
        finally:
            heads.score_thresh = before
        assert [len(one["boxes"]) for one in found] == [0, 0, 0]
        assert all(one["rles"] == [] if kind == "masks" else len(one["keypoints"]) == 0 for one in found)


class Bare(nn.Module):
    def evaluate(self, images: Tensor, sizes: Tensor, targets: Any) -> Any: ...


def test_detectors_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(UsageError, match="nms_thresh and detections_per_img"):
        DetectionTask(Bare(), None, None, views=FLIP)
    bare = Bare()
    bare.nms_thresh, bare.detections_per_img = 0.5, 100
    DetectionTask(bare, None, None, views=FLIP)
    with pytest.raises(UsageError, match="maps"):
        DetectionTask(bare, None, None, iou_types=["bbox", "segm"], views=FLIP)
    DetectionTask(Bare(), None, None, iou_types=["bbox", "segm"], views={"scales": [1.0]})  # the plain one


# Semantic segmentation.


def test_class_maps_are_of_the_mean_probabilities(network: Any) -> None:
    """Both sides at two scales, each image by itself; the classes at the size of the original."""
    task, pictures = network("semantic", flip=True, scales=[0.75, 1.0]), images(*SIZES)
    found = task.predict(batch_of(pictures, scale_of_original=2))

    def probabilities(pixels: Tensor) -> Tensor:
        batch = batch_of([pixels])
        logits = task.model(batch.images, batch.sizes)[:, :, : pixels.shape[-2], : pixels.shape[-1]]
        return logits.softmax(dim=1)

    differing = 0
    for picture, classes in zip(pictures, found, strict=True):
        height, width = picture.shape[-2:]
        small = transforms.resize(picture, [round(height * 0.75), round(width * 0.75)], antialias=True)
        large = probabilities(picture), probabilities(picture.flip(-1)).flip(-1)
        less = probabilities(small), probabilities(small.flip(-1)).flip(-1)
        enlarged = [F.interpolate(p, (height, width), mode="bilinear") for p in less]
        mean = torch.stack([*large, *enlarged]).mean(dim=0)
        whole = F.interpolate(mean, (2 * height, 2 * width), mode="bilinear")[0]
        best, second = whole.topk(2, dim=0).values
        expected = whole.argmax(dim=0)
        assert ((classes == expected) | (best - second < 1e-5)).all()
        plain = F.interpolate(large[0], (2 * height, 2 * width), mode="bilinear")[0].argmax(dim=0)
        differing += int((plain != expected).sum())
    assert differing > 100  # or the views would change nothing


# In the stages, and in predictions.


@pytest.mark.parametrize("kind", ["classes", "boxes", "masks", "keypoints", "one_stage", "semantic"])
def test_one_plain_view_is_the_plain_result_to_the_last_bit(network: Any, kind: str) -> None:
    batch = class_batch() if kind == "classes" else batch_of(images(*SIZES))
    plain, viewed = (
        network(kind, **views).predict(batch) for views in ({}, {"flip": False, "scales": [1.0]})
    )
    if kind == "classes":
        plain, viewed = [plain], [viewed]
    for one, other in zip(plain, viewed, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
            continue
        assert one.keys() == other.keys()
        assert all(
            torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) else one[key] == other[key]
            for key in one
        )


def predicted(run: Any, file: str, **settings: Any) -> Any:
    return load_task(run, "cpu", **settings).predict(file)[0]


def test_a_checkpoint_is_predicted_with_views(tiny_shapes: Any, tmp_path: Path) -> None:
    """As asked for, else as the run was judged."""
    run = made("classes", tiny_shapes).folder
    file = str(tmp_path / "a.png")
    Image.fromarray(images((64, 64))[0].permute(1, 2, 0).numpy()).save(file)
    Image.fromarray(images((64, 64))[0].flip(-1).permute(1, 2, 0).numpy()).save(tmp_path / "b.png")
    sides = [predicted(run, str(tmp_path / name)).probabilities for name in ("a.png", "b.png")]
    expected = (sides[0] + sides[1]) / 2
    flipped = predicted(run, file, views=FLIP).probabilities
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-6)
    record = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["record"]
    record["config"]["task"]["views"] = dict(FLIP)
    judged = changed(run, tmp_path, config=record["config"])
    assert torch.equal(predicted(judged, file).probabilities, flipped)
    assert torch.equal(predicted(judged, file, views={}).probabilities, sides[0])
    for wrong, said in (({"scales": [0]}, r"views\.scales"), ("flip", r"task\.views=flip")):
        with pytest.raises(UsageError, match=said):
            predicted(run, file, views=wrong)
    words = [str(run), file, "--output", str(tmp_path / "out"), "--device", "cpu", "--no-pictures"]
    assert main([*words, "--tta", "flip"]) == 0
    best = (tmp_path / "out/predictions.csv").read_text().splitlines()[1].split(",")
    assert float(best[2]) == pytest.approx(float(expected.max()), abs=1e-6)


def test_a_fit_validates_plainly_and_the_stages_by_views(start: Any, monkeypatch: Any, capsys: Any) -> None:
    """From the same run: tested with views, then from its checkpoint with and without."""
    by: list[tuple[str, int]] = []
    judge = BaseTask._judge

    def judged(self: Any, split: str, batch: Any) -> Any:
        by.append((split, len(self.judged_views)))
        return judge(self, split, batch)

    monkeypatch.setattr(BaseTask, "_judge", judged)
    few = [f"trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    run = start("tta=flip", "trainer.max_epochs=1", *few)
    assert set(by) == {("val", 1), ("test", 2)}
    assert "views of each image: ×1, mirrored ×1" in capsys.readouterr().err
    by.clear()
    start("stages=[test]", f"ckpt_path={run}", "tta=none", "run_id=plain", *few)
    assert set(by) == {("test", 1)}
    by.clear()
    start("stages=[validate]", f"ckpt_path={run}", "tta=flip_multiscale", "run_id=many", *few)
    assert set(by) == {("val", 6)}
    by.clear()
    start(f"resume={run}", "stages=[test]", "tta=none")
    assert set(by) == {("test", 1)}


def test_semantic_views_are_judged_too(network: Any) -> None:
    batch = batch_of(images(*SIZES))
    maps = [torch.zeros(size, dtype=torch.uint8) for size in SIZES]
    targets = [{"semantic": m, "original_semantic": m} for m in maps]
    task = network("semantic", **FLIP)
    assert isinstance(task, SemanticTask)
    metric = Reported()
    found, losses = task.update(metric, batch._replace(targets=targets))
    for one, other in zip(found, task.predict(batch), strict=True):
        assert torch.equal(one, other)
    _, plain = network("semantic").update(Reported(), batch._replace(targets=targets))
    assert losses == plain
