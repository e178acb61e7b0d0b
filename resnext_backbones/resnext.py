"""ResNeXt (arXiv 1611.05431) and, with cardinality 1, ResNet (arXiv 1512.03385) and Wide ResNet (1605.07146).

Parameter names are torchvision's, because the world's weights are saved under them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .features import FeatureSpec
from .norm import conv_norm

Norm = Callable[[int], nn.Module]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps ceil(size / stride); no bias, since a norm follows."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    """The identity (None) where shapes agree, else a projection: option B of arXiv 1512.03385."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the block of ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int, norm: Norm
    ) -> None:
        super().__init__()
        if cardinality != 1:
            raise UsageError(
                f"BasicBlock with cardinality {cardinality}: in a block of depth 2 a group is nothing but "
                "a wider layer (arXiv 1611.05431, section 3); use Bottleneck, or cardinality 1"
            )
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = norm(width)
        self.conv2 = conv(width, out_channels, 3)
        self.bn2 = norm(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        y = conv_norm(self.conv2, self.bn2, y)
        y += x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1×1, grouped 3×3, 1×1: the aggregated transformations of figure 3(c).

    The 3×3 convolution strides, as in torchvision's networks and the weights made with them, not the first
    1×1 as in the ResNet paper.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, groups=cardinality)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        y = F.relu(conv_norm(self.conv2, self.bn2, y), inplace=True)
        y = conv_norm(self.conv3, self.bn3, y)
        y += x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        return F.relu(y, inplace=True)


class ResNeXt(nn.Module):
    """Images to feature maps c2 … c5, strides 4 … 32 (table 1 of arXiv 1611.05431).

    Args:
        block: `Bottleneck` or `BasicBlock`.
        depths: blocks in each of the four stages.
        cardinality: the paper's C, the number of groups of a 3×3 convolution.
        base_width: the paper's d, the channels of one group in the first stage; each stage doubles it.
        in_channels: of the images.
        num_classes: of a classifier on top (`fc`, used by `classify`); None for a body without one.
        norm: makes the norm for a number of channels.
    """

    # What `freeze` counts, and the receipt of `load_weights` tells apart.
    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "stem": ("conv1", "bn1"),
        "layer1": ("layer1",),
        "layer2": ("layer2",),
        "layer3": ("layer3",),
        "layer4": ("layer4",),
    }
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        cardinality: int = 1,
        base_width: int = 64,
        in_channels: int = 3,
        num_classes: int | None = None,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.features: dict[str, FeatureSpec] = {}
        self.conv1 = conv(in_channels, 64, 7, stride=2)
        self.bn1 = norm(64)
        channels, total_stride = 64, 4
        for i, depth in zip(range(4), depths, strict=True):
            width, out_channels = cardinality * base_width * 2**i, 64 * 2**i * block.expansion
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, out_channels, stride, cardinality, norm))
                channels, total_stride = out_channels, total_stride * stride
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.features[f"c{i + 2}"] = FeatureSpec(channels, total_stride)
        if num_classes is not None:
            self.fc = nn.Linear(channels, num_classes)

        # As torchvision. The last norm of a block is left at 1, not 0: frozen at 0 it would switch the
        # block off for good.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float (N, in_channels, H, W), to {"c2": (N, C, ⌈H/4⌉, ⌈W/4⌉), … "c5"}."""
        x = F.relu(conv_norm(self.conv1, self.bn1, images), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": c5}

    def classify(self, images: Tensor) -> Tensor:
        """Normalised images to logits, (N, num_classes)."""
        x = self(images)["c5"]
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# The published networks; keyword arguments are `ResNeXt`'s: in_channels, num_classes, norm.


def resnet18(**kwargs: Any) -> ResNeXt:
    return ResNeXt(BasicBlock, (2, 2, 2, 2), **kwargs)


def resnet34(**kwargs: Any) -> ResNeXt:
    return ResNeXt(BasicBlock, (3, 4, 6, 3), **kwargs)


def resnet50(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 6, 3), **kwargs)


def resnet101(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 23, 3), **kwargs)


def resnet152(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 8, 36, 3), **kwargs)


def wide_resnet50_2(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 6, 3), base_width=128, **kwargs)


def wide_resnet101_2(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 23, 3), base_width=128, **kwargs)


def resnext26_32x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50's template at half its depth: small enough to train a detector on a CPU."""
    return ResNeXt(Bottleneck, (2, 2, 2, 2), cardinality=32, base_width=4, **kwargs)


def resnext50_32x4d(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 6, 3), cardinality=32, base_width=4, **kwargs)


def resnext101_32x4d(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 23, 3), cardinality=32, base_width=4, **kwargs)


def resnext101_32x8d(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 23, 3), cardinality=32, base_width=8, **kwargs)


def resnext101_64x4d(**kwargs: Any) -> ResNeXt:
    return ResNeXt(Bottleneck, (3, 4, 23, 3), cardinality=64, base_width=4, **kwargs)
