"""The three forms of figure 3 compute the same, learn the same, and turn into one another bit for bit."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import mostly_slow
from torch import Tensor, nn

from resnext_backbones import (
    FPN,
    VARIANTS,
    BasicBlock,
    BlockSpec,
    Bottleneck,
    FrozenBatchNorm2d,
    PreActBottleneck,
    ResNeXt,
    UsageError,
    convert,
    freeze,
    resnet18,
)

BOTTLENECKS = [name for name in VARIANTS if name not in ("resnet18", "resnet34")]


def lived(net: nn.Module, in_channels: int = 3) -> nn.Module:
    """In float64, with statistics, scales and shifts that are no longer those of the beginning."""
    net.double().train()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    net(torch.randn(2, in_channels, 32, 32, dtype=torch.float64))
    return net


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def outputs_and_gradients(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Every map in one vector; the gradient with respect to the images, which has passed all layers."""
    images = images.clone().requires_grad_()
    maps = torch.cat([x.flatten() for x in net(images).values()])
    (gradient,) = torch.autograd.grad(maps.square().mean(), images)
    return maps.detach(), gradient


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def check_all_conversions(net: nn.Module, images: Tensor, modes: Sequence[bool] = (True, False)) -> None:
    forms = {"c": net, "a": convert(net, "a"), "b": convert(net, "b")}
    for training in modes:
        expected = outputs_and_gradients(net.train(training), images)
        for form in "ab":
            found = outputs_and_gradients(forms[form].train(training), images)
            for one, other in zip(expected, found, strict=True):
                assert relative(one, other) < 1e-12, (form, training)
    # The training pass has moved the statistics of all three, each by itself.
    for source, target in itertools.permutations("abc", 2):
        there = convert(forms[source], target)
        assert same_bits(convert(there, source), forms[source]), (source, target)
        if target == "c":
            for value, expected in zip(there.state_dict().values(), net.state_dict().values(), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def images_for(name: str) -> Tensor:
    side = {224: 32, 32: 8}[VARIANTS[name].image_size]
    return torch.randn(2, 3, side + 1, side, dtype=torch.float64)


# With one block a stage, networks of the same width, stem and options are the same.
WIDTHS = [
    *(
        "resnet50",
        "wide_resnet50_2",
        "resnext50_2x40d",
        "resnext50_4x24d",
        "resnext50_8x14d",
        "resnext50_32x4d",
    ),
    *("resnext101_1x100d", "resnext101_2x64d", "resnext101_64x4d", "resnext101_32x8d", "seresnext50_32x4d"),
    *("resnext29_1x64d", "resnext29_8x64d", "resnext29_16x64d", "resnext29_32x4d"),
]


@pytest.mark.parametrize("name", mostly_slow(WIDTHS, "resnet18", "resnext50_32x4d", "resnext29_8x64d"))
def test_every_width(name: str, shallow: Callable[..., ResNeXt]) -> None:
    torch.manual_seed(0)
    check_all_conversions(lived(shallow(name)), images_for(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_every_variant(name: str) -> None:
    torch.manual_seed(0)
    # In training, batch norms over the 4 values of so small a c5 multiply the rounding of a hundred layers.
    check_all_conversions(lived(VARIANTS[name].build()), images_for(name), modes=[False])


@pytest.mark.slow
def test_training_at_full_depth() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 65, dtype=torch.float64)
    check_all_conversions(lived(VARIANTS["resnext50_32x4d"].build()), images, modes=[True])


OPTIONS: dict[str, dict[str, Any]] = {
    "pre-activation": {"block": "preact"},
    "squeeze-and-excitation": {"se_reduction": 4},
    "depthwise": {"depthwise": True},
    "stride in the 1×1": {"stride_in_1x1": True},
    "dilated": {"output_stride": 8},
    "frozen norms": {"norm": "frozen"},
    "sync norms": {"norm": "sync"},
    "no statistics": {"norm": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
    "no scale": {"norm": lambda c: nn.BatchNorm2d(c, affine=False, momentum=None)},
    "group norms": {"norm": lambda c: nn.GroupNorm(8, c)},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("option", mostly_slow(OPTIONS, "dilated", "frozen norms", "group norms"))
def test_every_option(option: str) -> None:
    torch.manual_seed(0)
    net = ResNeXt((1, 2, 1, 1), 4, 4, **OPTIONS[option])
    check_all_conversions(lived(net), torch.randn(2, 3, 64, 64, dtype=torch.float64))


def test_stochastic_depth_drops_the_same_samples() -> None:
    net = lived(ResNeXt((2, 2), 4, 4, stochastic_depth=0.7))
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    found = []
    for form in "cab":
        torch.manual_seed(3)
        found.append(outputs_and_gradients(convert(net, form), images)[0])
    assert relative(found[0], found[1]) < 1e-12
    assert relative(found[0], found[2]) < 1e-12
    assert relative(found[0], outputs_and_gradients(convert(net, "c"), images)[0]) > 1e-3  # another draw


def gradients(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    block(x).square().mean().backward()
    return {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize("kind", [Bottleneck, PreActBottleneck])
def test_gradients_of_the_parameters_are_the_slices(kind: type[Bottleneck]) -> None:
    torch.manual_seed(0)
    block = kind(BlockSpec(24, 12, 20, stride=2, cardinality=3)).double()
    x = torch.randn(2, 24, 9, 8, dtype=torch.float64)
    expected = gradients(block, x)
    first, second = block.inner_norms
    for form in "ab":
        found = gradients(convert(block, form), x)
        for i in range(3):
            ours = slice(4 * i, 4 * (i + 1))
            pairs = {
                "conv1.weight": expected["conv1.weight"][ours],
                "norm1.weight": expected[f"{first}.weight"][ours],
                "conv2.weight": expected["conv2.weight"][ours],
                "norm2.bias": expected[f"{second}.bias"][ours],
            }
            pairs |= {"conv3.weight": expected["conv3.weight"][:, ours]} if form == "a" else {}
            for name, gradient in pairs.items():
                torch.testing.assert_close(found[f"branches.{i}.{name}"], gradient, rtol=0, atol=1e-12)
        assert ("conv3.weight" in found) == (form == "b")


def test_a_branch_is_what_the_figure_shows() -> None:
    """Figure 3 with 256 channels in, 32 paths, 4 channels a path."""
    block = Bottleneck(BlockSpec(256, 128, 256, cardinality=32))
    a, b = convert(block, "a"), convert(block, "b")

    def shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
        return (tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Conv2d))

    assert list(shapes(a.branches[0])) == [(4, 256, 1, 1), (4, 4, 3, 3), (256, 4, 1, 1)]
    assert list(shapes(a)) == 32 * list(shapes(a.branches[0]))
    assert list(shapes(b.branches[0])) == [(4, 256, 1, 1), (4, 4, 3, 3)]
    assert list(shapes(b)) == 32 * list(shapes(b.branches[0])) + [(256, 128, 1, 1)]
    assert list(shapes(block)) == [(128, 256, 1, 1), (128, 4, 3, 3), (256, 128, 1, 1)]
    counts = {sum(p.numel() for p in module.parameters()) for module in (a, b, block)}
    assert len(counts) == 1  # the same number of parameters, as section 3.3 says


def test_the_original_is_left_alone_and_shares_nothing() -> None:
    net = lived(ResNeXt((1, 1), 4, 4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for form in "abc":
        other = convert(net, form)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(net.layer1[0]) is Bottleneck


def test_what_is_frozen_stays_so() -> None:
    net = lived(ResNeXt((1, 1), 4, 4))
    freeze(net, at=2)
    for form in "ab":
        other = convert(net, form)
        assert not any(p.requires_grad for p in other.layer1.parameters())
        assert all(p.requires_grad for p in other.layer2.parameters())
        assert isinstance(other.layer1[0].branches[3].norm2, FrozenBatchNorm2d)
        back = convert(other, "c")
        assert same_bits(back, net)
        assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in net.parameters()]
    other.layer2[0].branches[1].conv1.requires_grad_(False)
    with pytest.raises(UsageError, match="some branches of a block are frozen and others are not"):
        convert(other, "c")


def test_mode_dtype_and_precision_are_kept() -> None:
    net = ResNeXt((1, 1), 4, 4).half().eval()
    other = convert(net, "a")
    assert not any(module.training for module in other.modules())
    assert {t.dtype for t in other.state_dict().values()} == {torch.float16, torch.int64}
    assert all(module.training for module in convert(net.train(), "b").modules())


def test_a_body_within_something_larger() -> None:
    net = nn.ModuleDict({"backbone": FPN(ResNeXt((1, 1, 1, 1), 4, 4), 16)})
    other = convert(net, "a")
    assert not any(type(module) is Bottleneck for module in other.modules())
    assert same_bits(convert(other, "c"), net)


def test_a_block_in_two_places_stays_one() -> None:
    block = Bottleneck(BlockSpec(32, 8, 32, cardinality=4))
    twice = convert(nn.Sequential(block, block), "a")
    assert twice[0] is twice[1]
    assert same_bits(convert(twice, "c"), nn.Sequential(block, block))


def test_branches_may_be_taken_out_of_form_a() -> None:
    block = lived_block()
    split = convert(block, "a")
    split.branches = split.branches[:2]
    joined = convert(split, "c")
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    assert joined.conv2.groups == joined.cardinality == 2
    assert relative(split(x), joined(x)) < 1e-12
    assert relative(convert(joined, "b")(x), joined(x)) < 1e-12
    incomplete = convert(block, "b")
    incomplete.branches = incomplete.branches[:2]
    with pytest.raises(UsageError, match="2 branches before a 1×1 convolution of 4"):
        convert(incomplete, "c")


def lived_block() -> nn.Module:
    torch.manual_seed(0)
    return Bottleneck(BlockSpec(32, 8, 32, cardinality=4)).double().eval()


def test_branches_that_differ_are_not_joined() -> None:
    split = convert(lived_block(), "a")
    split.branches[3].norm1.eps = 0.1
    with pytest.raises(UsageError, match=r"branches differ: .*eps=0\.1"):
        convert(split, "c")


def test_a_block_of_ones_own_is_named() -> None:
    class Special(Bottleneck):
        pass

    with pytest.raises(UsageError, match="Special may compute something else"):
        convert(ResNeXt((1, 1), 4, 4, block=Special), "a")
    with pytest.raises(UsageError, match="Special may compute something else"):
        convert(Special(BlockSpec(8, 8, 8)), "a")


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="form='d' must be a, b or c"):
        convert(ResNeXt((1,)), "d")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ResNeXt holds no bottleneck; blocks of depth 2"):
        convert(resnet18(), "a")
    with pytest.raises(UsageError, match="BasicBlock holds no bottleneck"):
        convert(BasicBlock(BlockSpec(8, 8, 8)), "a")
    with pytest.raises(UsageError, match="groups that reach over the 8 branches"):
        convert(ResNeXt((1,), 8, 4, norm=lambda c: nn.GroupNorm(4, c)), "a")
    with pytest.raises(UsageError, match="batch, sync, group and frozen norms can be"):
        convert(ResNeXt((1,), 8, 4, norm=nn.InstanceNorm2d), "b")
    net = ResNeXt((1,), 8, 4)
    net.layer1[0].conv2 = nn.Conv2d(32, 32, 3, 1, 1, groups=8)
    with pytest.raises(UsageError, match="only a plain Conv2d without a bias"):
        convert(net, "a")
