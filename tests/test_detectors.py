"""What all detectors promise alike: their face, both modes at once, and images that are hard on losses."""

import pytest
import torch
from torch import nn

from resnext_backbones import UsageError, freeze_norms, resnet18, resnet50, resnext29_8x64d
from tasks.models.evaluation import SEED
from tasks.models.one_stage import fcos, retinanet
from tasks.models.rcnn import faster_rcnn, keypoint_rcnn, mask_rcnn

RCNN = {
    "fpn_channels": 32,
    "head_channels": 64,
    "rpn_batch": 32,
    "roi_batch": 16,
    "proposals_train": 50,
    "proposals_test": 20,  # fewer, so that losses of the wrong mode's proposals would show
    "detections": 5,
}
ONE_STAGE = {"fpn_channels": 64, "detections": 5}
BUILDERS = {
    "faster_rcnn": lambda body, k, **s: faster_rcnn(body, k, **RCNN, **s),
    "mask_rcnn": lambda body, k, **s: mask_rcnn(body, k, mask_channels=8, **RCNN, **s),
    "keypoint_rcnn": lambda body, k, **s: keypoint_rcnn(body, k, 3, keypoint_channels=8, **RCNN, **s),
    "retinanet": lambda body, k, **s: retinanet(body, k, **ONE_STAGE, **s),
    "retinanet with norms": lambda body, k, **s: retinanet(body, k, head_norm="group", **ONE_STAGE, **s),
    "fcos": lambda body, k, **s: fcos(body, k, **ONE_STAGE, **s),
}
every_detector = pytest.mark.parametrize("name", BUILDERS)


def detector(name, *, frozen=False, **settings):
    torch.manual_seed(0)
    body = resnet18()
    for norm in (m for m in body.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 5, 10)  # keeps activations in range without training
    model = BUILDERS[name](freeze_norms(body) if frozen else body, 3, **settings)
    return model.to(memory_format=torch.channels_last)  # as a run has it


def batch(*boxes_of_image, side=64, labels=1):
    generator = torch.Generator().manual_seed(1)
    shape = (len(boxes_of_image), 3, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = []
    for boxes in boxes_of_image:
        n = len(boxes)
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(n, side, side, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        keypoints = torch.cat([centres, torch.full((n, 1), 2.0)], dim=1)[:, None].repeat(1, 3, 1)
        targets.append(
            {"boxes": boxes, "labels": torch.full((n,), labels), "masks": masks, "keypoints": keypoints}
        )
    return images, torch.tensor([[side, side]] * len(boxes_of_image)), targets


@every_detector
@pytest.mark.parametrize(
    "boxes",
    [
        ([], []),
        ([], [[4, 4, 60, 60]]),
        ([[10, 10, 11, 11], [63, 63, 64, 64]], [[0, 0, 64, 64]]),
        ([[5, 5, 40, 40]] * 60, []),  # many on one another
    ],
    ids=["no object", "an image without", "one pixel", "a heap"],
)
def test_every_image_trains_every_parameter(name, boxes):
    model = detector(name).train()
    losses = model(*batch(*boxes))
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@every_detector
def test_evaluate_is_what_both_modes_say_of_a_network_without_norms(name):
    model = detector(name, frozen=True, score_threshold=0.0).eval()
    images, sizes, targets = batch([[4, 4, 40, 50]], [[10, 20, 60, 60], [0, 0, 20, 20]])
    found, losses = model.evaluate(images, sizes, targets)
    with torch.no_grad():
        for mine, other in zip(found, model(images, sizes), strict=True):
            assert len(mine["boxes"]) > 0
            assert all(torch.equal(mine[key], other[key]) for key in other)
        torch.manual_seed(SEED)
        expected = model.train()(images, sizes, targets)
    assert losses.keys() == expected.keys()
    for key, loss in losses.items():
        assert not loss.requires_grad
        assert loss.item() == expected[key].item(), key


@every_detector
def test_evaluate_moves_nothing(name):
    torch.manual_seed(0)
    body = resnet18(stochastic_depth=0.5)
    model = BUILDERS[name](body, 3).train()
    model.backbone.fpn.eval()  # a mixture of modes has to come back as it was
    calls = []
    body.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {key: module.training for key, module in model.named_modules()}
    data = batch([[4, 4, 40, 50]], [])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    _, first = model.evaluate(*data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    _, second = model.evaluate(*data)

    assert len(calls) == 2  # one pass each
    assert {key: loss.item() for key, loss in first.items()} == {k: v.item() for k, v in second.items()}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {key: module.training for key, module in model.named_modules()} == modes


@every_detector
def test_modes_come_back_after_a_failure(name):
    model = detector(name).train()
    images, sizes, targets = batch([[4, 4, 40, 50]])
    del targets[0]["boxes"]
    state = torch.get_rng_state()
    with pytest.raises((KeyError, ValueError)):
        model.evaluate(images, sizes, targets)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@every_detector
def test_detections_are_ordered_and_within_the_image(name):
    model = detector(name, score_threshold=0.0).eval()
    images, _, _ = batch([], [])
    sizes = torch.tensor([[64, 64], [50, 40]])
    for found, (height, width) in zip(model(images, sizes), sizes.tolist(), strict=True):
        assert 0 < len(found["boxes"]) <= 5
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 2].max() <= width
        assert found["boxes"][:, 3].max() <= height
        assert found["labels"].dtype == torch.int64
        assert set(found["labels"].tolist()) <= {1, 2, 3}


@every_detector
def test_nothing_found_has_the_shapes_of_something(name):
    model = detector(name, score_threshold=1.0).eval()
    (found,), losses = model.evaluate(*batch([]))
    shapes = {"boxes": (0, 4), "scores": (0,), "labels": (0,)}
    if name == "mask_rcnn":
        shapes["masks"] = (0, 28, 28)
    if name == "keypoint_rcnn":
        shapes |= {"keypoints": (0, 3, 3), "keypoint_scores": (0, 3)}
    assert {key: tuple(value.shape) for key, value in found.items()} == shapes
    assert all(loss.isfinite() for loss in losses.values())


@every_detector
def test_results_are_float32_under_autocast(name):
    model = detector(name, score_threshold=0.0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        (found,), losses = model.evaluate(*batch([[4, 4, 40, 50]]))
    floats = {key: value.dtype for key, value in found.items() if key != "labels"} | {
        key: loss.dtype for key, loss in losses.items()
    }
    assert set(floats.values()) == {torch.float32}, floats


@every_detector
def test_bodies_for_cifars_small_images_are_refused(name):
    with torch.device("meta"), pytest.raises(UsageError, match=r"needs maps of stride 4 or more.* CIFAR"):
        BUILDERS[name](resnext29_8x64d(), 3)


@pytest.mark.parametrize(
    ("build", "expected"),
    [  # published for torchvision's ResNet-50 detectors, with 91 classes (keypoints: 2) and frozen norms
        (lambda body: faster_rcnn(body, 90), 41_755_286),
        (lambda body: mask_rcnn(body, 90), 44_401_393),
        (lambda body: keypoint_rcnn(body, 1, 17), 59_137_258),
        (lambda body: retinanet(body, 90, extra_levels="conv_p5"), 34_014_999),
        (lambda body: fcos(body, 90), 32_269_600),
    ],
    ids=["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"],
)
def test_parameter_counts(build, expected):
    with torch.device("meta"):
        model = build(freeze_norms(resnet50()))
    assert sum(p.numel() for p in model.parameters()) == expected
