"""The options of a network, each against a peer, or against what its paper says."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from resnext_backbones import (
    BasicBlock,
    Block,
    BlockSpec,
    Bottleneck,
    FrozenBatchNorm2d,
    PreActBottleneck,
    ResNeXt,
    UsageError,
    freeze,
    resnet50,
    resnext50_32x4d,
    seresnext50_32x4d,
    seresnext101_32x4d,
)


def lived(net: nn.Module) -> nn.Module:
    """With statistics and scales that are no longer those of the beginning; in evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.dim() == 1:
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return net.eval()


@torch.no_grad()
def assert_same(ours: ResNeXt, theirs: nn.Module, images: Tensor) -> None:
    ours.load_state_dict(lived(theirs).state_dict())
    torch.testing.assert_close(ours.eval().classify(images), theirs(images), rtol=1e-5, atol=1e-6)


def small(**kwargs: Any) -> ResNeXt:
    return ResNeXt((1, 1, 2, 2), 4, 8, **kwargs)


# Squeeze-and-excitation


def test_squeeze_and_excitation_is_timms() -> None:
    ours = seresnext50_32x4d(num_classes=10)
    assert_same(ours, timm.create_model("seresnext50_32x4d", num_classes=10), torch.randn(2, 3, 65, 64))


def test_names_of_seresnext101_are_timms() -> None:
    with torch.device("meta"):
        ours = seresnext101_32x4d(num_classes=1000).state_dict()
        theirs = timm.create_model("seresnext101_32x4d").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("channels", [16, 64, 256, 320, 2048])
def test_squeezed_channels_are_timms(channels: int) -> None:
    block = BasicBlock(BlockSpec(8, 8, channels, se_reduction=16))
    assert block.se.fc1.out_channels == timm.layers.SEModule(channels).fc1.out_channels


# Stride and dilation


@pytest.mark.parametrize(("output_stride", "replace"), [(16, [False, False, True]), (8, [False, True, True])])
def test_dilation_is_torchvisions(output_stride: int, replace: list[bool]) -> None:
    ours = resnet50(output_stride=output_stride, num_classes=10)
    theirs = torchvision.models.resnet50(num_classes=10, replace_stride_with_dilation=replace)
    assert_same(ours, theirs, torch.randn(2, 3, 65, 64))
    assert [s.stride for s in ours.features.values()] == [4, 8, 16, 32][
        : [8, 16].index(output_stride) + 2
    ] + [output_stride] * (3 - [8, 16].index(output_stride) - 1)


@pytest.mark.parametrize("output_stride", [4, 8, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride_in_1x1": True},
        {"block": "basic", "cardinality": 1},
        {"block": "preact"},
        {"se_reduction": None},
    ],
    ids=str,
)
def test_dilation_computes_what_the_strides_left_out(output_stride: int, options: dict[str, Any]) -> None:
    """À trous: every so many pixels of the dense maps are the strided network's (arXiv 1706.05587, §3.1)."""
    arguments = {"depths": (1, 2, 2, 2), "cardinality": 2, "base_width": 8, **options}
    strided = lived(ResNeXt(**arguments))
    dense = ResNeXt(**arguments, output_stride=output_stride).eval()
    dense.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        coarse, fine = strided(images), dense(images)
    for name, x in coarse.items():
        step = strided.features[name].stride // dense.features[name].stride
        torch.testing.assert_close(fine[name][..., ::step, ::step], x, rtol=1e-4, atol=1e-5)
    assert step == 32 // output_stride


def test_stride_in_the_first_1x1() -> None:
    """As torchvision's network becomes when the strides of conv1 and conv2 are exchanged."""
    theirs = torchvision.models.resnet50(num_classes=10)
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    ours = resnet50(stride_in_1x1=True, num_classes=10)
    assert_same(ours, theirs, torch.randn(2, 3, 65, 64))
    assert [m.stride for m in (ours.layer2[0].conv1, ours.layer2[0].conv2)] == [(2, 2), (1, 1)]


# Stems


def test_deep_stem_is_timms() -> None:
    theirs = TimmResNet(TimmBottleneck, (1, 1, 1, 1), num_classes=10, stem_width=32, stem_type="deep")
    assert_same(ResNeXt((1, 1, 1, 1), stem="deep", num_classes=10), theirs, torch.randn(2, 3, 65, 64))


def test_cifar_stem_keeps_the_size() -> None:
    net = ResNeXt((1, 1, 1), 8, 64, stem="cifar")
    maps = net(torch.randn(1, 3, 32, 31))
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "c2": (256, 32, 31),
        "c3": (512, 16, 16),
        "c4": (1024, 8, 8),
    }


@pytest.mark.parametrize("stem", ["7x7", "deep", "cifar"])
def test_any_number_of_channels(stem: Any) -> None:
    net = ResNeXt((1,), stem=stem, in_channels=5)
    assert net(torch.randn(1, 5, 32, 32))["c2"].shape[1] == 256


# Pre-activation


def test_pre_activation_block_by_its_definition() -> None:
    """arXiv 1603.05027, figure 4(e): norm, ReLU, convolution, three times; nothing after the addition."""
    block = lived(PreActBottleneck(BlockSpec(8, 12, 16, stride=2, cardinality=3)))
    x = torch.randn(2, 8, 9, 10)

    def norm_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, var, w, b = (t.view(shape) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return ((x - mean) / (var + 1e-5).sqrt() * w + b).clamp(min=0)

    active = norm_relu(x, block.bn1)
    y = norm_relu(F.conv2d(active, block.conv1.weight), block.bn2)
    y = norm_relu(F.conv2d(y, block.conv2.weight, stride=2, padding=1, groups=3), block.bn3)
    y = F.conv2d(y, block.conv3.weight) + F.conv2d(active, block.downsample[0].weight, stride=2)
    torch.testing.assert_close(block(x), y)
    assert y.min() < 0


def test_pre_activation_network_ends_with_a_norm_and_begins_without() -> None:
    net = small(block="preact")
    names = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert "norm" in names
    assert "bn1" not in names
    maps = net(torch.randn(2, 3, 64, 64))
    assert maps["c5"].min() == 0
    assert maps["c4"].min() < 0
    identity = net.layer4[1]  # the shortcut of a block that keeps its shape is the identity
    with torch.no_grad():
        for p in identity.conv3.parameters():
            p.zero_()
    x = torch.randn(1, 2048, 3, 3)
    assert torch.equal(identity(x), x)


def test_pre_activation_does_not_touch_what_it_is_given() -> None:
    net = small(block="preact", norm=lambda channels: nn.Identity())
    x = torch.randn(1, 1024, 4, 4)
    given = x.clone()
    net.layer4(x)
    assert torch.equal(x, given)


def test_the_last_norm_is_frozen_with_the_last_stage() -> None:
    net = small(block="preact")
    freeze(net, at=5)
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


# Depthwise


def test_depthwise_has_one_channel_a_group_everywhere() -> None:
    net = ResNeXt((1, 1, 1, 1), base_width=32, depthwise=True)
    shapes = [tuple(net.get_submodule(f"layer{i}.0.conv2").weight.shape) for i in (1, 2, 3, 4)]
    assert shapes == [(32, 1, 3, 3), (64, 1, 3, 3), (128, 1, 3, 3), (256, 1, 3, 3)]


# Stochastic depth


def test_drop_rates_rise_linearly() -> None:
    """arXiv 1603.09382, equation 4: block l of L survives with probability 1 − l/L (1 − p_L)."""
    net = ResNeXt((3, 4, 6, 3), 2, 8, stochastic_depth=0.5)
    rates = [block.drop_rate for block in net.modules() if isinstance(block, Block)]
    assert rates == pytest.approx([0.5 * i / 16 for i in range(1, 17)])


@pytest.mark.parametrize("kind", [Bottleneck, PreActBottleneck, BasicBlock])
def test_a_sample_is_dropped_or_scaled(kind: type[Block]) -> None:
    block = lived(kind(BlockSpec(8, 8, 8, drop_rate=0.25)))
    x = torch.randn(400, 8, 4, 4)
    with torch.no_grad():
        block.drop_rate = 0.0
        whole = block(x)
        block.drop_rate = 0.25
        assert torch.equal(block(x), whole)  # in evaluation nothing is dropped
        pre = kind is PreActBottleneck
        residual = block.aggregate(F.relu(block.bn1(x)) if pre else x)
        block.training = True  # the norms stay in evaluation mode
        y = block(x)
    kept = x + residual / 0.75 if pre else F.relu(x + residual / 0.75)
    dropped = x if pre else F.relu(x)
    is_kept = (y - kept).abs().amax((1, 2, 3)) < 1e-5
    is_dropped = (y - dropped).abs().amax((1, 2, 3)) == 0
    assert (is_kept ^ is_dropped).all()
    assert 60 < is_dropped.sum() < 140  # binomial, 100 ± 8.7


# Norms


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", nn.BatchNorm2d),
        ("sync", nn.SyncBatchNorm),
        ("group", nn.GroupNorm),
        ("frozen", FrozenBatchNorm2d),
    ],
)
def test_norms(norm: Any, kind: type[nn.Module]) -> None:
    net = small(norm=norm)
    norms = [
        m
        for m in net.modules()
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, FrozenBatchNorm2d))
    ]
    assert len(norms) == 1 + 6 * 3 + 4
    assert all(type(m) is kind for m in norms)


def test_group_norms_have_32_groups_or_what_divides() -> None:
    net = ResNeXt((1,), 3, 12, norm="group")
    assert (net.bn1.num_groups, net.layer1[0].bn1.num_groups, net.layer1[0].bn3.num_groups) == (32, 4, 32)


# Activation checkpointing


def step(net: ResNeXt, images: Tensor) -> tuple[list[Tensor], list[Tensor], int]:
    """Maps and gradients of a training step, and how many bytes autograd kept for it."""
    net.train()
    torch.manual_seed(5)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        maps = list(net(images).values())
    torch.stack([x.square().mean() for x in maps]).sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return maps, gradients, sum(kept.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stochastic_depth": 0.5},
        {"block": "preact"},
        {"block": "basic", "cardinality": 1},
        {"norm": "group"},
    ],
    ids=str,
)
def test_recomputing_changes_no_number(options: dict[str, Any]) -> None:
    arguments = {"depths": (2, 2, 2), "cardinality": 4, "base_width": 8, **options}
    torch.manual_seed(0)
    plain = ResNeXt(**arguments)
    frugal = ResNeXt(**arguments, activation_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 64, 64)
    for _ in range(2):
        maps, gradients, bytes_plain = step(plain, images)
        maps_too, gradients_too, bytes_frugal = step(frugal, images)
        assert all(map(torch.equal, maps, maps_too))
        assert all(map(torch.equal, gradients, gradients_too))
    # Running statistics and their counters have moved once a step, not twice.
    for (name, one), other in zip(plain.state_dict().items(), frugal.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert bytes_frugal < bytes_plain * 2 / 3
    norms = [m for m in frugal.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.momentum == 0.1 and m.num_batches_tracked == 2 for m in norms)


# Arguments


def test_defaults_are_the_published_network() -> None:
    spelt_out = ResNeXt(
        (3, 4, 6, 3), 32, 4, block=Bottleneck, norm=nn.BatchNorm2d, stem="7x7", output_stride=32
    )
    assert repr(spelt_out) == repr(resnext50_32x4d())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": ()}, r"depths=\(\) must give"),
        ({"depths": 5}, "depths=5 must give"),
        ({"depths": (1, 0)}, r"depths\[1\]=0 must be a whole number of at least 1"),
        ({"cardinality": 0}, "cardinality=0 must be"),
        ({"cardinality": 3.5}, "cardinality=3.5 must be"),
        ({"base_width": -4}, "base_width=-4 must be"),
        ({"in_channels": 0}, "in_channels=0 must be"),
        ({"num_classes": 0}, "num_classes=0 must be"),
        ({"se_reduction": 0}, "se_reduction=0 must be"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0 must"),
        ({"stochastic_depth": float("nan")}, "stochastic_depth=nan must"),
        ({"stochastic_depth": "a"}, "stochastic_depth='a' must"),
        ({"norm": None}, "norm=None must be one of batch, sync, group, frozen"),
        ({"stem": 7}, "stem=7 must be one of 7x7, deep, cifar"),
        ({"block": nn.Conv2d}, "block=.*Conv2d.* must be one of basic, bottleneck, preact, or a Block"),
        ({"block": "basic", "stride_in_1x1": True}, "BasicBlock has no 1×1 convolution"),
        ({"activation_checkpointing": "false"}, "activation_checkpointing='false' must be true or false"),
        ({"output_stride": 8.0}, "output_stride=8.0 must be a whole number"),
        ({"norm": "layer"}, "norm='layer' must be one of batch, sync, group, frozen"),
        ({"stem": "patchify"}, "stem='patchify' must be one of 7x7, deep, cifar"),
        ({"block": "transformer"}, "block='transformer' must be one of basic, bottleneck, preact"),
        ({"output_stride": 12}, r"output_stride=12 must be one of \[4, 8\]"),
        ({"output_stride": 64}, r"output_stride=64 must be one of \[4, 8\]"),
    ],
)
def test_nonsense_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ResNeXt(**{"depths": (1, 1), **arguments})


def test_classify_without_a_classifier() -> None:
    with pytest.raises(UsageError, match="build it with num_classes"):
        small().classify(torch.randn(1, 3, 64, 64))


def test_a_block_of_ones_own() -> None:
    class Swapped(Bottleneck):
        def aggregate(self, x: Tensor) -> Tensor:
            return super().aggregate(x) * 0.5

    torch.manual_seed(0)
    ours = small(block=Swapped)
    plain = small()
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(ours(images)["c2"], plain(images)["c2"])
