"""The pyramid against torchvision's `BackboneWithFPN`, and inside torchvision's detectors."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from resnext_backbones import (
    FPN,
    FeatureSpec,
    ResNeXt,
    UsageError,
    check_backbone,
    freeze_norms,
    resnet18,
    resnet50,
    resnext50_32x4d,
)


def tiny() -> ResNeXt:
    return ResNeXt((1, 1, 1, 1), block="basic", base_width=8)


@pytest.mark.parametrize(
    ("extra_levels", "extra", "finest"),
    [
        ("pool", LastLevelMaxPool(), "c2"),
        ("conv_c5", LastLevelP6P7(512, 64), "c3"),
        ("conv_p5", LastLevelP6P7(64, 64), "c3"),
    ],
)
def test_computes_what_torchvision_computes(extra_levels: str, extra: nn.Module, finest: str) -> None:
    torch.manual_seed(0)
    stages = range(int(finest[1]) - 1, 5)
    theirs = BackboneWithFPN(
        torchvision.models.resnet18(weights=None),
        {f"layer{i}": str(i) for i in stages},
        [64 * 2 ** (i - 1) for i in stages],
        64,
        extra,
    ).eval()
    ours = FPN(resnet18(), 64, extra_levels, None if finest == "c2" else finest).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for size in ((128, 96), (101, 67)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            maps, expected = ours(images), theirs(images)
        assert list(maps) == [f"p{i}" for i in range(int(finest[1]), 7 if extra_levels == "pool" else 8)]
        for (name, x), y in zip(maps.items(), expected.values(), strict=True):
            assert torch.equal(x, y), name


def test_equal_channels_do_not_decide_where_p6_comes_from() -> None:
    wide = FPN(tiny(), 512, "conv_c5")
    assert wide.features["p7"] == FeatureSpec(512, 128)
    nn.init.zeros_(wide.fpn.layer_blocks[3][0].weight)  # p5 is nothing, c5 is not
    with torch.no_grad():
        maps = wide(torch.randn(1, 3, 64, 64))
    assert not maps["p5"].any()
    assert maps["p6"].any()


@pytest.mark.parametrize("extra_levels", ["pool", "conv_c5", "conv_p5", None])
@pytest.mark.parametrize("finest", [None, "c3"])
def test_is_a_backbone(extra_levels: str | None, finest: str | None) -> None:
    fpn = FPN(tiny(), 32, extra_levels, finest)
    assert fpn.out_channels == 32
    check_backbone(fpn, sizes=((64, 64), (33, 98)))


@pytest.mark.parametrize(("frozen", "parameters"), [(False, 41_280_278), (True, 41_212_054)])
def test_detector_has_the_published_number_of_parameters(frozen: bool, parameters: int) -> None:
    with torch.device("meta"):
        body = resnext50_32x4d()
        detector = FasterRCNN(FPN(freeze_norms(body) if frozen else body), 91)
    assert sum(p.numel() for p in detector.parameters()) == parameters


def test_torchvision_detectors_weights_fit() -> None:
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        ours = FasterRCNN(FPN(resnet50()), 91).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("strides", [(4, 8, 32), (4, 8, 24), (3, 6, 12)])
def test_strides_that_do_not_double_are_refused(strides: tuple[int, ...]) -> None:
    body = tiny()
    body.features = {f"c{i}": FeatureSpec(64, stride) for i, stride in enumerate(strides, 2)}
    with pytest.raises(UsageError, match=f"double.*{strides[-1]}"):
        FPN(body)


def test_faults_of_use_are_named() -> None:
    with pytest.raises(UsageError, match=r"features must be a dict"):
        FPN(torchvision.models.mobilenet_v3_small(weights=None))  # has `features`, but other ones
    with pytest.raises(UsageError, match="extra_levels='p6'"):
        FPN(tiny(), extra_levels="p6")
    with pytest.raises(UsageError, match="finest='c1'"):
        FPN(tiny(), finest="c1")


def test_grouped_body_trains_under_the_pyramid() -> None:
    fpn = FPN(ResNeXt((1, 1, 1, 1), cardinality=8, base_width=4), 32)
    sum(x.square().mean() for x in fpn(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in fpn.parameters())


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (256, 64)])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="bfloat16 goes through oneDNN")
def test_gradients_of_tiny_maps_in_bfloat16_are_those_of_float32(size: tuple[int, int]) -> None:
    """Of a map one pixel wide, torch's gradient of a strided convolution is memory nobody wrote to."""
    torch.manual_seed(0)
    pyramid, images = FPN(tiny(), 64, "conv_c5", finest="c3").eval(), torch.randn(4, 3, *size)

    def gradients(bfloat16: bool) -> list[torch.Tensor]:
        pyramid.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            maps = pyramid(images)
        sum(maps[level].float().square().sum() for level in ("p6", "p7")).backward()
        return [
            layer.weight.grad.clone() for layer in (pyramid.fpn.extra_blocks.p6, pyramid.fpn.extra_blocks.p7)
        ]

    expected = gradients(bfloat16=False)
    for _ in range(5):
        junk = [torch.full_like(g, torch.nan, dtype=torch.bfloat16) for g in expected for _ in range(4)]
        del junk  # what the allocator hands out next
        for found, wanted in zip(gradients(bfloat16=True), expected, strict=True):
            assert (found - wanted).norm() < 0.05 * wanted.norm()
