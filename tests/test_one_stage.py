"""RetinaNet and FCOS against torchvision's own, on the same weights and pixels."""

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from resnext_backbones import FPN, UsageError, resnet18, resnet50
from tasks.models.one_stage import fcos, retinanet

STRIDES = (8, 16, 32, 64, 128)
BACKGROUND = -20.0  # a bias: torchvision's networks are trained never to answer with class 0


def build(kind, body, num_classes, **settings):
    if kind == "retinanet":
        return retinanet(body, num_classes, extra_levels="conv_p5", **settings)
    return fcos(body, num_classes, **settings)


def build_torchvisions(kind, body, num_classes, channels=256, **settings):
    backbone = FPN(body, channels, "conv_p5", finest="c3")
    if kind == "retinanet":
        return detection.RetinaNet(backbone, num_classes, **settings)
    return detection.FCOS(backbone, num_classes, **settings)


@pytest.fixture(scope="module", params=["retinanet", "fcos"])
def pair(request):
    """Ours and torchvision's with the same random weights and lively heads."""
    torch.manual_seed(0)
    kind = request.param
    settings = {"fpn_channels": 64, "score_threshold": 0.3}
    if kind == "retinanet":
        settings["anchor_scales"] = (4, 5, 6)
    ours = build(kind, resnet18(), 4, **settings).eval()
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 5, 10)  # keeps activations in range without training
    for module in ours.head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    logits = ours.head.classification_head.cls_logits
    torch.nn.init.zeros_(logits.bias)
    logits.bias.data.view(-1, 5)[:, 0] = BACKGROUND
    logits.weight.data.view(-1, 5, *logits.weight.shape[1:])[:, 0] = 0
    sizes = [(4 * s, 5 * s, 6 * s) if kind == "retinanet" else (s,) for s in STRIDES]
    ratios = (0.5, 1.0, 2.0) if kind == "retinanet" else (1.0,)
    theirs = build_torchvisions(
        kind,
        resnet18(),
        5,
        channels=64,
        min_size=128,  # which every stride divides, so that torchvision infers the declared ones
        max_size=128,
        score_thresh=0.3,
        detections_per_img=100,
        anchor_generator=AnchorGenerator(tuple(sizes), (ratios,) * 5),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_parameters_are_torchvisions(kind):
    """91 classes published with the background are 90 here."""
    with torch.device("meta"):
        models = build(kind, resnet50(), 90), build_torchvisions(kind, resnet50(), 91)
    ours, theirs = ({name: t.shape for name, t in model.state_dict().items()} for model in models)
    assert ours == theirs


def test_retinanet_takes_c5_as_the_paper_unless_told_otherwise():
    with torch.device("meta"):
        assert retinanet(resnet18(), 3).backbone.fpn.extra_blocks.p6.in_channels == 512
        published = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
        ours = retinanet(resnet50(), 90).backbone.fpn.extra_blocks.p6
    assert ours.weight.shape == published.backbone.fpn.extra_blocks.p6.weight.shape


def test_a_norm_in_the_heads_makes_torchvisions_second_retinanet():
    with torch.device("meta"):
        theirs = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
        ours = retinanet(resnet50(), 90, head_norm="group")
    shapes = {name: t.shape for name, t in ours.state_dict().items() if name.startswith("head.")}
    assert shapes == {name: t.shape for name, t in theirs.items() if name.startswith("head.")}
    assert sum(p.numel() for p in ours.parameters()) == 38_198_935  # published


def test_retinanet_says_what_its_norms_need():
    with pytest.raises(UsageError, match="retinanet: fpn_channels=32 must be a multiple of 32"):
        retinanet(resnet18(), 3, fpn_channels=32, head_norm="group")
    with pytest.raises(UsageError, match="head_norm='batch' must be group or null"):
        retinanet(resnet18(), 3, head_norm="batch")


def test_retinanets_anchors_are_the_papers():
    """Areas of 32² on p3 to 512² on p7 times 1, 2^(2/3), 2^(4/3), in shapes 1:2, 1:1, 2:1 (section 4)."""
    generator = retinanet(resnet18(), 3, fpn_channels=64).anchor_generator
    for side, boxes in zip((32, 64, 128, 256, 512), generator.cell_anchors, strict=True):
        widths, heights = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
        expected = [(side * 2 ** (i / 3), ratio) for ratio in (0.5, 1.0, 2.0) for i in range(3)]
        for width, height, (scale, ratio) in zip(widths, heights, expected, strict=True):
            assert abs(width - scale / ratio**0.5) <= 1  # torchvision rounds half sides to pixels
            assert abs(height - scale * ratio**0.5) <= 1


def test_detections_are_torchvisions(pair):
    ours, theirs = pair
    image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        (mine,) = ours(image[None], torch.tensor([[128, 128]]))
        (other,) = theirs([image / 255])
    assert len(mine["boxes"]) > 10
    assert len(mine["labels"].unique()) > 1
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-3)


def test_losses_are_torchvisions(pair, monkeypatch):
    ours, theirs = pair
    images, sizes = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), [(128, 128), (100, 120)]
    truth = [
        {"boxes": torch.tensor([[10.0, 10, 60, 60], [30, 40, 90, 120]]), "labels": torch.tensor([1, 4])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    same = ImageList(ours.normalise(images, sizes), sizes)
    monkeypatch.setattr(theirs.transform, "forward", lambda *_: (same, truth))
    for model in pair:
        model.train().backbone.eval()  # batch statistics of two images would magnify rounding
    mine = list(ours(images, torch.tensor(sizes), truth).values())
    other = list(theirs(list(images / 255), truth).values())
    for model in pair:
        model.eval()
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert len(mine) >= 2
    assert all(loss > 0 for loss in mine)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("label", [1, 3])
def test_a_label_is_learned_and_reported_as_itself(kind, label):
    torch.manual_seed(0)
    model = build(kind, resnet18(), 3, fpn_channels=64, score_threshold=0.0).train()
    images, sizes = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]])
    logits = model.head.classification_head.cls_logits
    torch.nn.init.zeros_(logits.bias)

    # Two labels for the same box push the biases of these two classes apart, and no other's.
    gradients = {}
    for taught in (label, 2):
        truth = [{"boxes": torch.tensor([[8.0, 8, 56, 56]]), "labels": torch.tensor([taught])}]
        (gradient,) = torch.autograd.grad(model(images, sizes, truth)["loss_classifier"], logits.bias)
        gradients[taught] = gradient.view(-1, 4).sum(0)
    pushed = gradients[label] - gradients[2]
    assert pushed[label] < 0 < pushed[2]
    torch.testing.assert_close(pushed[[0, 4 - label]], torch.zeros(2), atol=1e-4, rtol=0)

    # Sure of one class everywhere, and surer still of the background, which is no answer.
    logits.bias.data.view(-1, 4)[:, label] = 3
    logits.bias.data.view(-1, 4)[:, 0] = 9
    model.eval()
    (found,) = model(images, sizes)
    assert len(found["labels"]) > 0
    assert found["labels"][0] == label
    assert 0 not in found["labels"]


def test_logits_and_deltas_are_float32_under_autocast():
    model = retinanet(resnet18(), 3, fpn_channels=64, score_threshold=0.0).eval()
    seen = {}
    decode = model.box_coder.decode_single
    model.box_coder.decode_single = lambda deltas, anchors: decode(
        seen.update(d=deltas.dtype) or deltas, anchors
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert seen["d"] == torch.float32


def test_training_needs_targets():
    images, sizes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]])
    with pytest.raises(ValueError, match="RetinaNet needs targets"):
        retinanet(resnet18(), 3, fpn_channels=64).train()(images, sizes)


@pytest.mark.parametrize("channels", [32, 80])
def test_fcos_says_what_its_norms_need(channels):
    with pytest.raises(UsageError, match=f"fpn_channels={channels} must be a multiple of 32"):
        fcos(resnet18(), 3, fpn_channels=channels)
