"""Semantic FPN by the paper's figure, DeepLabv3 against torchvision's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from resnext_backbones import UsageError, resnet18, resnet50, resnext29_8x64d
from tasks.models.semantic import deeplabv3, semantic_fpn

NETS = {
    "semantic_fpn": lambda k=5: semantic_fpn(resnet18(), k, fpn_channels=32, head_channels=64),
    "deeplabv3": lambda k=5: deeplabv3(resnet18(output_stride=8), k),
}
every_net = pytest.mark.parametrize("name", NETS)


def images(n=1, height=64, width=96):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
    return pixels, torch.tensor([[height, width]] * n)


@every_net
@pytest.mark.parametrize("n", [1, 2])
def test_every_batch_trains_every_parameter(name, n):
    torch.manual_seed(0)
    model = NETS[name]().train().to(memory_format=torch.channels_last)  # as a run has it
    logits = model(*images(n))
    assert logits.shape == (n, 5, 64, 96)
    F.cross_entropy(logits, torch.randint(0, 5, (n, 64, 96))).backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@every_net
def test_logits_are_float32_at_the_padded_size_under_autocast(name):
    model = NETS[name](3).eval()
    pixels, _ = images(2, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels, torch.tensor([[64, 64], [33, 50]]))
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 3, 64, 64)
    assert logits.isfinite().all()


@every_net
def test_what_stands_in_the_padding_is_not_seen(name):
    model = NETS[name]().eval()
    pixels, _ = images()
    other = pixels.clone()
    other[:, :, 40:] = 255
    with torch.no_grad():
        a, b = (model(x, torch.tensor([[40, 96]])) for x in (pixels, other))
    assert torch.equal(a, b)


def test_semantic_fpn_is_the_papers_figure():
    """Doublings of a level: p5 three, p4 two, p3 one, p2 none but a convolution; then a sum and a 1 × 1."""
    torch.manual_seed(0)
    model = semantic_fpn(resnet18(), 5).eval()
    head = model.classifier
    stages = {name: len(head.get_submodule(name)) for name in ("p2", "p3", "p4", "p5")}
    assert stages == {"p2": 1, "p3": 1, "p4": 2, "p5": 3}
    assert (head.predictor.in_channels, head.predictor.kernel_size) == (128, (1, 1))

    sides = {"p2": 16, "p3": 8, "p4": 4, "p5": 2}
    maps = {name: torch.randn(1, 256, side, side) for name, side in sides.items()}
    total = 0
    for name, x in maps.items():
        for module in head.get_submodule(name):
            conv, norm, _ = module
            x = F.relu(F.group_norm(F.conv2d(x, conv.weight, padding=1), 32, norm.weight, norm.bias))
            if name != "p2":
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    expected = F.conv2d(total, head.predictor.weight, head.predictor.bias)
    with torch.no_grad():
        torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-4)


def test_semantic_fpn_takes_images_that_no_stride_divides():
    model = semantic_fpn(resnet18(), 2, fpn_channels=32, head_channels=64).eval()
    with torch.no_grad():
        assert model(*images(1, 45, 71)).shape == (1, 2, 45, 71)


def test_parameters_of_semantic_fpn():
    """Convolutions of 3 × 3 × 256 × 128 and 3 × 3 × 128 × 128, norms and the 1 × 1 of the paper's head."""
    with torch.device("meta"):
        head = semantic_fpn(resnet50(), 54).classifier
    expected = 9 * 128 * (4 * 256 + 3 * 128) + 7 * 2 * 128 + 128 * 54 + 54
    assert sum(p.numel() for p in head.parameters()) == expected


def test_deeplabv3_is_torchvisions():
    torch.manual_seed(0)
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=False).eval()
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 2, 4)
    ours = deeplabv3(resnet50(output_stride=8), 21).eval()
    ours.load_state_dict(theirs.state_dict())  # strictly: the same names and shapes
    pixels, sizes = images(1, 64, 64)
    with torch.no_grad():
        mine = ours(pixels, sizes)
        other = theirs(ours.normalise(pixels))["out"]
    assert other.std() > 0
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18])])
def test_atrous_rates_follow_the_output_stride(stride, rates):
    """arXiv 1706.05587, section 3.3."""
    with torch.device("meta"):
        aspp = deeplabv3(resnet18(output_stride=stride), 5).classifier[0]
    assert [branch[0].dilation[0] for branch in aspp.convs[1:4]] == rates


def test_several_images_are_normalised_as_in_torchvisions_head():
    torch.manual_seed(0)
    ours, theirs = deeplabv3(resnet18(output_stride=8), 5).classifier.train(), DeepLabHead(512, 5).train()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 512, 4, 4)
    outputs = []
    for head, given in ((ours, {"c5": x}), (theirs, x)):
        torch.manual_seed(1)  # of the dropout
        outputs.append(head(given))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_one_image_is_normalised_by_the_running_statistics():
    torch.manual_seed(0)
    norm = deeplabv3(resnet18(output_stride=8), 5).classifier[0].convs[-1][2]
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(9.0)
    norm.train()
    x = torch.randn(1, 256, 1, 1)
    torch.testing.assert_close(norm(x), (x - 2) / 3, rtol=1e-4, atol=1e-5)
    assert norm.running_mean.unique().item() == 2.0


def test_a_body_without_dilation_is_refused_with_advice():
    with pytest.raises(UsageError, match=r"has 32: give backbone\.output_stride=8 .* or model=semantic_fpn"):
        deeplabv3(resnet18(), 5)


def test_semantic_fpn_refuses_bodies_for_cifars_small_images():
    with torch.device("meta"), pytest.raises(UsageError, match="Semantic FPN needs maps of stride 4 or more"):
        semantic_fpn(resnext29_8x64d(), 5)


@pytest.mark.parametrize("channels", [32, 80])
def test_semantic_fpn_says_what_its_norms_need(channels):
    with pytest.raises(UsageError, match=f"head_channels={channels} must be a multiple of 32"):
        semantic_fpn(resnet18(), 5, head_channels=channels)
