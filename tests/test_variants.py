"""The published networks: their counts, the paper's tables from the code, the accuracies listed with them."""

import inspect
import math
import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

import resnext_backbones
from resnext_backbones import (
    FPN,
    VARIANTS,
    ResNeXt,
    UsageError,
    base_width_for,
    freeze_norms,
    variants,
)
from resnext_backbones.cost import count

# Parameters, and 10⁹ multiply-adds at 224², with 1000 classes; of CIFAR's networks with 10.
COUNTS = {
    "resnet50": (25_557_032, 4.089),
    "resnext50_2x40d": (25_425_000, 4.125),
    "resnext50_4x24d": (25_292_968, 4.160),
    "resnext50_8x14d": (25_603_016, 4.267),
    "resnext50_32x4d": (25_028_904, 4.230),
    "resnet101": (44_549_160, 7.801),
    "resnext101_2x40d": (44_456_296, None),
    "resnext101_4x24d": (44_363_432, None),
    "resnext101_8x14d": (45_104_328, None),
    "resnext101_32x4d": (44_177_704, 7.970),
    "resnext101_1x100d": (85_611_336, 15.273),
    "resnext101_2x64d": (84_198_184, 15.123),
    "resnext101_64x4d": (83_455_272, 15.460),
    "resnext101_32x8d": (88_791_336, 16.414),
    "resnet200": (64_673_832, 15.007),
    "resnext29_8x64d": (34_426_698, None),
    "resnext29_16x64d": (68_155_210, None),
    # torchvision's and timm's documentation
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet152": (60_192_808, 11.514),
    "wide_resnet50_2": (68_883_240, 11.398),
    "wide_resnet101_2": (126_886_696, 22.753),
    "seresnext50_32x4d": (27_559_896, None),
    "seresnext101_32x4d": (48_955_416, None),
}


def on_meta(name: str, **kwargs: object) -> ResNeXt:
    with torch.device("meta"):
        return VARIANTS[name].build(**kwargs)


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str) -> None:
    variant = VARIANTS[name]
    net = on_meta(name, num_classes=variant.num_classes)
    counts = count(net, (variant.image_size, variant.image_size))
    parameters, gmacs = COUNTS[name]
    assert counts.parameters == parameters
    if gmacs is not None:
        assert f"{counts.macs / 1e9:.3f}" == f"{gmacs:.3f}"


@pytest.mark.parametrize(
    ("name", "frozen", "trainable"),
    [
        ("resnext50_32x4d", (41_212_054, 43_858_161), (41_280_278, 43_926_385)),
        ("resnext101_32x8d", (104_839_830, 107_485_937), None),
        ("resnext101_64x4d", (99_503_766, 102_149_873), None),
    ],
)
def test_counts_of_detectors(name: str, frozen: tuple[int, int], trainable: tuple[int, int] | None) -> None:
    """Faster and Mask R-CNN with COCO's 91 classes, background among them, on the FPN."""
    for detector, expected in zip((FasterRCNN, MaskRCNN), frozen, strict=True):
        with torch.device("meta"):
            model = detector(FPN(freeze_norms(VARIANTS[name].build())), 91)
        assert sum(p.numel() for p in model.parameters()) == expected
    for detector, expected in zip((FasterRCNN, MaskRCNN), trainable or (), strict=trainable is not None):
        with torch.device("meta"):
            model = detector(FPN(VARIANTS[name].build()), 91)
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_under_the_pyramid(name: str) -> None:
    """p2 … p6; CIFAR's networks, which begin at stride 1, have p0 … p3."""
    with torch.device("meta"):
        backbone = FPN(VARIANTS[name].build(), out_channels=8)
        maps = backbone(torch.empty(1, 3, 65, 96))
    levels = range(4) if name.startswith("resnext29") else range(2, 7)
    expected = {f"p{i}": (1, 8, math.ceil(65 / 2**i), math.ceil(96 / 2**i)) for i in levels}
    assert {level: tuple(x.shape) for level, x in maps.items()} == expected


# Table 1


def layers_of(stage: nn.Sequential) -> list[str]:
    """A stage in the notation of table 1."""
    templates = []
    for block in stage:
        templates.append(
            ", ".join(
                f"{conv.kernel_size[0]}×{conv.kernel_size[1]}, {conv.out_channels}"
                + (f", C={conv.groups}" if conv.groups > 1 else "")
                for conv in (block.conv1, block.conv2, block.conv3)
            )
        )
    assert len(set(templates)) == 1  # one template for a whole stage
    return [f"[{templates[0]}] × {len(templates)}"]


TABLE_1 = {
    "conv1": ("112×112", "7×7, 64, stride 2", "7×7, 64, stride 2"),
    "conv2": ("56×56", "[1×1, 64, 3×3, 64, 1×1, 256] × 3", "[1×1, 128, 3×3, 128, C=32, 1×1, 256] × 3"),
    "conv3": ("28×28", "[1×1, 128, 3×3, 128, 1×1, 512] × 4", "[1×1, 256, 3×3, 256, C=32, 1×1, 512] × 4"),
    "conv4": ("14×14", "[1×1, 256, 3×3, 256, 1×1, 1024] × 6", "[1×1, 512, 3×3, 512, C=32, 1×1, 1024] × 6"),
    "conv5": ("7×7", "[1×1, 512, 3×3, 512, 1×1, 2048] × 3", "[1×1, 1024, 3×3, 1024, C=32, 1×1, 2048] × 3"),
    "# params": ("", "25.5·10⁶", "25.0·10⁶"),
    "FLOPs": ("", "4.1·10⁹", "4.2·10⁹"),
}


def test_table_1(capsys: pytest.CaptureFixture[str]) -> None:
    nets = [on_meta(name, num_classes=1000).eval() for name in ("resnet50", "resnext50_32x4d")]
    images = torch.empty(1, 3, 224, 224, device="meta")
    rows = {}
    sizes = {"conv1": nets[0].conv1(images).shape[-2:]}
    sizes |= {f"conv{name[1]}": x.shape[-2:] for name, x in nets[0](images).items()}
    for stage, (height, width) in sizes.items():
        if stage == "conv1":
            cells = [
                f"7×7, {net.conv1.out_channels}, stride {net.conv1.stride[0]}"
                for net in nets
                if net.conv1.kernel_size == (7, 7)
            ]
        else:
            cells = [layers_of(net.get_submodule(f"layer{int(stage[-1]) - 1}"))[0] for net in nets]
        rows[stage] = (f"{height}×{width}", *cells)
    counts = [count(net, (224, 224)) for net in nets]
    # The paper cuts ResNet-50's 25.557 to 25.5, so that digits are cut here, too; of FLOPs they are rounded.
    rows["# params"] = ("", *(f"{c.parameters // 10**5 / 10}·10⁶" for c in counts))
    rows["FLOPs"] = ("", *(f"{c.macs / 1e9:.1f}·10⁹" for c in counts))
    with capsys.disabled():
        print("\n\nTable 1 of arXiv 1611.05431, from the code and (below each line) from the paper")
        for stage, row in rows.items():
            for who, cells in ((stage, row), ("  paper", TABLE_1[stage])):
                print(f"{who:10} {cells[0]:8} {cells[1]:38} {cells[2]}")
    assert rows == TABLE_1


# Table 2: cardinality, width of the bottleneck d, width of the grouped convolution.
TABLE_2 = [(1, 64, 64), (2, 40, 80), (4, 24, 96), (8, 14, 112), (32, 4, 128)]


def test_table_2(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(c, base_width_for(c), c * base_width_for(c)) for c, _, _ in TABLE_2]
    with capsys.disabled():
        print("\n\nTable 2 of arXiv 1611.05431, from the code and from the paper")
        print("cardinality C  width d  width of group conv   paper: C    d  width")
        for (c, d, width), paper in zip(rows, TABLE_2, strict=True):
            print(f"{c:13}  {d:7}  {width:19}   {paper[0]:8} {paper[1]:4}  {paper[2]:5}")
    assert rows == TABLE_2


@pytest.mark.parametrize(("cardinality", "width", "group_width"), TABLE_2)
def test_the_template_block_keeps_its_weights(cardinality: int, width: int, group_width: int) -> None:
    """≈70k parameters, as table 2's caption says, counted on a real block."""
    with torch.device("meta"):
        block = ResNeXt((2,), cardinality, width).layer1[1]
    assert block.conv2.weight.shape[0] == group_width
    weights = sum(conv.weight.numel() for conv in (block.conv1, block.conv2, block.conv3))
    assert weights == cardinality * (2 * 256 * width + 9 * width**2)
    assert abs(weights / 69_632 - 1) < 0.03


@pytest.mark.parametrize("cardinality", [0, -1, 270, 10**9, 2.0, True, "32"])
def test_base_width_for_nonsense(cardinality: object) -> None:
    with pytest.raises(UsageError, match="base_width_for: cardinality="):
        base_width_for(cardinality)  # type: ignore[arg-type]


def test_base_width_at_the_end_of_the_range() -> None:
    assert base_width_for(269) == 1
    assert base_width_for(64) == 2  # 64 · (1024 + 36) = 67,840


# The list


def test_every_builder_is_listed_under_its_name_and_says_where_it_is_from() -> None:
    builders = {
        name: function
        for name, function in inspect.getmembers(variants, inspect.isfunction)
        if function.__module__ == variants.__name__ and re.match(r"(se)?res|wide", name)
    }
    assert {name: variant.build for name, variant in VARIANTS.items()} == builders
    for name, function in builders.items():
        assert getattr(resnext_backbones, name) is function
        assert function.__doc__, name


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if "IMAGENET1K_V1" in v.source])
def test_accuracies_from_torchvision(name: str) -> None:
    (weights,) = [w for w in torchvision.models.get_model_weights(name) if w.name == "IMAGENET1K_V1"]
    assert VARIANTS[name].top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]


# Top-1 errors in per cent as printed in arXiv 1611.05431 (tables 3, 4 and 7) and 1709.01507 (table 2).
ERRORS = {
    "resnet50": 23.9,
    "resnext50_2x40d": 23.0,
    "resnext50_4x24d": 22.6,
    "resnext50_8x14d": 22.3,
    "resnext50_32x4d": 22.2,
    "resnet101": 22.0,
    "resnext101_2x40d": 21.7,
    "resnext101_4x24d": 21.4,
    "resnext101_8x14d": 21.3,
    "resnext101_32x4d": 21.2,
    "resnet200": 21.7,
    "resnext101_1x100d": 21.3,
    "resnext101_2x64d": 20.7,
    "resnext101_64x4d": 20.4,
    "resnext29_8x64d": 3.65,
    "resnext29_16x64d": 3.58,
    "seresnext50_32x4d": 21.10,
    "seresnext101_32x4d": 20.70,
}


def test_accuracies_from_the_papers() -> None:
    listed = {name: v.top1 for name, v in VARIANTS.items() if v.source.startswith("arXiv")}
    assert listed == {name: pytest.approx(100 - error) for name, error in ERRORS.items()}
    for name, variant in VARIANTS.items():
        assert (variant.top1 is None) == (variant.source == ""), name
