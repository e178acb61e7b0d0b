"""Faster R-CNN on c4, against the same parts put together by hand with torchvision's functions."""

import copy
import inspect

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from torch.nn.functional import softmax
from torchvision.ops import batched_nms, roi_align

from resnext_backbones import (
    FrozenBatchNorm2d,
    ResNeXt,
    TorchvisionBody,
    UsageError,
    freeze,
    freeze_norms,
    resnet18,
    resnext29_8x64d,
)
from tasks.load import ALLOWED, load_task
from tasks.models.c4 import faster_rcnn_c4
from tasks.models.rcnn import faster_rcnn
from tasks.stages import parameters_by_stage

SMALL = {"rpn_channels": 16, "rpn_batch": 32, "roi_batch": 16, "candidates_train": 60, "candidates_test": 60,
         "proposals_train": 20, "proposals_test": 15}  # fmt: skip
SIZE = (96, 128)


def body(**settings):
    torch.manual_seed(0)
    return ResNeXt((1, 1, 1, 1), 8, 4, **settings)


def lively(model):
    """With random statistics and a box head that has opinions."""
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 5, 10)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    return model


@pytest.fixture
def model():
    return lively(faster_rcnn_c4(body(), 3, score_threshold=0.0, detections=10, **SMALL))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8, generator=generator)


SIZES = torch.tensor([SIZE])
TARGETS = [{"boxes": torch.tensor([[10.0, 20.0, 60.0, 80.0]]), "labels": torch.tensor([2])}]


def test_detections_are_those_of_the_parts_put_together_by_hand(model, images):
    """The network's own proposals; pooling, conv5, classes and boxes computed here from their definitions."""
    model.eval()
    whole = body()  # an ordinary body with the same weights, run stage by stage
    whole.load_state_dict(model.backbone.body.state_dict())
    whole.eval()
    with torch.no_grad():
        (mine,) = model(images, SIZES)
        c4 = whole(model.normalise(images))["c4"]
        given, features = model._features(images, SIZES)
        torch.testing.assert_close(features["c4"], c4)
        assert list(features) == ["c4"]
        (proposals,), _ = model.rpn(given, features)
        regions = roi_align(c4, [proposals], output_size=14, spatial_scale=1 / 16, sampling_ratio=2)
        vectors = whole.layer4(regions).mean((2, 3))
        predictor = model.roi_heads.box_predictor
        scores = softmax(vectors @ predictor.cls_score.weight.T + predictor.cls_score.bias, dim=1)
        deltas = (vectors @ predictor.bbox_pred.weight.T + predictor.bbox_pred.bias).view(-1, 4, 4)

        widths, heights = (proposals[:, i + 2] - proposals[:, i] for i in (0, 1))
        centres = [proposals[:, i] + 0.5 * side for i, side in ((0, widths), (1, heights))]
        rows = []
        for label in (1, 2, 3):  # arXiv 1311.2524, appendix C, with the weights 10, 10, 5, 5
            dx, dy, dw, dh = (deltas[:, label] / torch.tensor([10, 10, 5, 5])).T
            x, y = centres[0] + dx * widths, centres[1] + dy * heights
            w, h = widths * dw.exp(), heights * dh.exp()
            boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
            boxes[:, 0::2] = boxes[:, 0::2].clamp(0, SIZE[1])
            boxes[:, 1::2] = boxes[:, 1::2].clamp(0, SIZE[0])
            rows.append((boxes, scores[:, label], torch.full((len(boxes),), label)))
        boxes, scores, labels = (torch.cat(column) for column in zip(*rows, strict=True))
        keep = batched_nms(boxes, scores, labels, 0.5)[:10]
    assert len(mine["boxes"]) == 10
    torch.testing.assert_close(mine["scores"], scores[keep], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine["boxes"], boxes[keep], rtol=1e-4, atol=1e-2)
    assert torch.equal(mine["labels"], labels[keep])


def test_conv5_sees_regions_and_not_the_map(model, images):
    seen = []
    model.backbone.body.layer4[0].register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    model.eval()
    with torch.no_grad():
        model(images, SIZES)
    ((regions, out),) = seen
    assert regions.shape[1:] == (1024, 14, 14)
    assert 1 < len(regions) <= 15  # of all that proposals_test leaves
    assert out.shape == (len(regions), 2048, 7, 7)


def test_the_proposal_network_has_its_own_width_and_15_anchors_of_32_to_512_pixels(model):
    head, generator = model.rpn.head, model.rpn.anchor_generator
    assert head.conv[0][0].weight.shape == (16, 1024, 3, 3)
    assert head.cls_logits.weight.shape == (15, 16, 1, 1)
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    (cells,) = generator.cell_anchors
    areas = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    sides = sorted(set((areas.sqrt() / 32).log2().round().tolist()))
    assert sides == [0, 1, 2, 3, 4]


def test_training_gives_the_four_losses_and_reaches_every_weight(model, images):
    losses = model.train()(images, SIZES, TARGETS)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_checkpointing_changes_no_gradient(images):
    gradients = []
    for recompute in (False, True):
        model = lively(faster_rcnn_c4(body(activation_checkpointing=recompute), 3, **SMALL)).train()
        torch.manual_seed(0)
        sum(model(images, SIZES, TARGETS).values()).backward()
        gradients.append(model.backbone.body.layer4[0].conv2.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_weights_have_the_names_they_have_under_every_other_model(model):
    """So that a body is handed over, frozen, and slowed down by stage as anywhere."""
    theirs = {n for n in faster_rcnn(body(), 3).state_dict() if n.startswith("backbone.body.")}
    mine = [n for n in model.state_dict() if n.startswith("backbone.body.")]
    assert set(mine) == theirs
    assert list(parameters_by_stage(model, "x")) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    parts = [(m, model.get_submodule(m)) for part in model.parts for m in part.modules]
    names = [n for m, module in parts for n, _ in module.named_parameters(m)]
    others = {n for n, _ in model.named_parameters() if not n.startswith("backbone.body.")}
    assert set(names) == others


def test_a_frozen_body_is_frozen_on_regions_too(images):
    pretrained = body()
    freeze_norms(pretrained)
    freeze(pretrained, 5)
    model = faster_rcnn_c4(pretrained, 3, **SMALL).train()
    sum(model(images, SIZES, TARGETS).values()).backward()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.backbone.body.layer4.modules())


def test_a_copy_runs_its_own_conv5(model, images):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.backbone.body.layer4.parameters():
            p.zero_()
    regions = torch.rand(2, 1024, 14, 14)
    assert model.eval().roi_heads.box_head(regions).abs().sum() == 0
    assert twin.eval().roi_heads.box_head(regions).abs().sum() > 0


def test_no_region_is_no_error(model):
    assert model.eval().roi_heads.box_head(torch.zeros(0, 1024, 14, 14)).shape == (0, 2048)


def test_basic_blocks_will_do():
    model = faster_rcnn_c4(resnet18(), 3, **SMALL)
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (4, 512)


@pytest.mark.parametrize(
    "unfit",
    [
        lambda: TorchvisionBody("resnet18"),
        lambda: resnext29_8x64d(),
        lambda: body(block="preact"),
        lambda: torch.nn.Identity(),
    ],
)  # fmt: skip
def test_other_bodies_are_refused(unfit):
    with pytest.raises(UsageError, match="has no c5 that can be run on regions alone"):
        faster_rcnn_c4(unfit(), 3)


def test_two_steps_saved_loaded_and_predicting(start, tiny_shapes, monkeypatch):
    words = [f"model.{key}={value}" for key, value in SMALL.items()]
    little = ["data.batch_size=2", "data.num_workers=0", "data.image_size=[64,64]", "trainer.max_epochs=1",
              "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.accelerator=cpu",
              "callbacks.pictures.images=1", "logger.wandb.mode=disabled", "stages=fit"]  # fmt: skip
    folder = start("model=faster_rcnn_c4", "backbone=resnet18", *words, small=little)
    monkeypatch.setitem(ALLOWED, "model", ALLOWED["model"] | {"tasks.models.c4.faster_rcnn_c4"})
    image = next((ROOT / tiny_shapes[0].removeprefix("data.root=")).glob("val/*.jpg"))
    (found,) = load_task(folder, device="cpu").predict([image])
    assert found.boxes.shape[1] == 4


def test_the_defaults_stand_in_the_configuration():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["model=faster_rcnn_c4", "data=coco"]).model
    parameters = inspect.signature(faster_rcnn_c4).parameters
    for name, parameter in parameters.items():
        if name not in ("body", "num_classes"):
            default = parameter.default
            assert cfg[name] == (list(default) if isinstance(default, tuple) else default), name
