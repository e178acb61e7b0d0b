"""The networks, against torchvision's and the published parameter counts."""

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import resnext_backbones
from resnext_backbones import ResNeXt, UsageError, check_backbone

IN_TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
]
QUICK = ("resnet18", "resnext50_32x4d")


def build(name: str, **kwargs: object) -> ResNeXt:
    return getattr(resnext_backbones, name)(**kwargs)


def twin(name: str) -> tuple[ResNeXt, torch.nn.Module]:
    """Ours and torchvision's with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None)
    ours = build(name, num_classes=1000)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_state_dict_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours = build(name, num_classes=1000).state_dict()
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.items()
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in IN_TORCHVISION]
)
def test_computes_what_torchvision_computes(name: str) -> None:
    ours, theirs = twin(name)
    images = torch.randn(2, 3, 64, 64)

    ours.train(), theirs.train()
    mine, reference = ours.classify(images), theirs(images)
    assert (mine - reference).abs().max() == 0.0
    mine.square().mean().backward()
    reference.square().mean().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key

    # The training pass has moved the statistics, so that evaluation tests more than the identity.
    for (key, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert (ours.classify(images) - theirs(images)).abs().max() == 0.0


def test_feature_maps_are_the_ends_of_the_stages() -> None:
    ours, theirs = twin("resnext50_32x4d")
    ends = {"layer1": "c2", "layer2": "c3", "layer3": "c4", "layer4": "c5"}
    reference = create_feature_extractor(theirs.eval(), ends)
    images = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        maps, expected = ours.eval()(images), reference(images)
    assert list(maps) == list(ours.features) == ["c2", "c3", "c4", "c5"]
    assert all(torch.equal(maps[name], expected[name]) for name in maps)
    assert [(spec.channels, spec.stride) for spec in ours.features.values()] == [
        (256, 4),
        (512, 8),
        (1024, 16),
        (2048, 32),
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_initialisation_is_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    ours = build(name, num_classes=10).state_dict()
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=10).state_dict()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_keeps_the_contract() -> None:
    check_backbone(ResNeXt((1, 1, 1, 1), block="basic", base_width=16, in_channels=1), in_channels=1)
    check_backbone(ResNeXt((1, 1, 1, 2), cardinality=8, base_width=4, in_channels=4), in_channels=4)


def test_from_scratch_nothing_is_frozen() -> None:
    net = resnext_backbones.resnext26_32x4d()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert all(p.requires_grad for p in net.parameters())
    net.train()(torch.randn(2, 3, 64, 64))
    norms = [name for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 1 + 4 * (2 * 3 + 1)
    after = net.state_dict()
    assert not any(torch.equal(after[f"{n}.running_mean"], before[f"{n}.running_mean"]) for n in norms)


def test_small_one_is_the_template_at_half_depth() -> None:
    with torch.device("meta"):
        small, full = resnext_backbones.resnext26_32x4d().state_dict(), build("resnext50_32x4d").state_dict()
    assert {k: v.shape for k, v in full.items() if k in small} == {k: v.shape for k, v in small.items()}
    assert sum(key.split(".")[-2].startswith("conv") for key in small if key.endswith("weight")) == 26 - 1


def test_without_classes_there_is_no_fc() -> None:
    assert not hasattr(resnext_backbones.resnet18(), "fc")


def test_grouped_basic_block_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cardinality 32.*use Bottleneck"):
        ResNeXt((2, 2, 2, 2), cardinality=32, block="basic")


def test_another_norm() -> None:
    net = ResNeXt((1, 1, 1, 1), 2, 4, norm=lambda channels: torch.nn.GroupNorm(4, channels))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    check_backbone(net, sizes=((64, 65),))
