"""The residual blocks: basic, bottleneck (figure 3(c) of the ResNeXt paper), bottleneck with pre-activation.

y = shortcut(x) + Σ Tᵢ(x), equation 3 of arXiv 1611.05431. Parameter names are torchvision's, because the
world's weights are saved under them; those of squeeze-and-excitation are timm's, for the same reason.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from .errors import UsageError
from .norm import FrozenBatchNorm2d, conv_norm

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in arXiv 1803.08494, or as many of them as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": group_norm,
    "frozen": FrozenBatchNorm2d,
}


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A convolution that keeps ceil(size / stride); no bias, since a norm follows."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)


class SqueezeExcitation(nn.Module):
    """Every channel scaled by a gate that has seen the means of all (arXiv 1709.01507, equations 2 to 4).

    The squeezed channels are channels ÷ reduction, rounded to a multiple of 8 as in timm.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(8, int(channels / reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.relu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)
        return x * self.fc2(squeezed).sigmoid()


@dataclass(frozen=True)
class BlockSpec:
    """What a block is built from: (N, in_channels, H, W) to (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    Attributes:
        in_channels, out_channels: of the maps.
        width: channels of the layers inside.
        stride: 1 or 2.
        cardinality: groups of the 3×3 convolution, the paper's C.
        dilations: of a 3×3 convolution before or at the stride, and of one after it. They differ in the first
            block of a stage whose stride was exchanged for dilation.
        stride_in_1x1: the first 1×1 convolution strides, as in the ResNet paper and its Caffe models, instead
            of the 3×3, as in the ResNeXt paper's code and in torchvision.
        se_reduction: r of squeeze-and-excitation; None for none.
        drop_rate: the probability that stochastic depth leaves out a sample's Σ Tᵢ(x) in training.
        norm: makes the norm for a number of channels.
    """

    in_channels: int
    width: int
    out_channels: int
    stride: int = 1
    cardinality: int = 1
    dilations: tuple[int, int] = (1, 1)
    stride_in_1x1: bool = False
    se_reduction: int | None = None
    drop_rate: float = 0.0
    norm: Norm = nn.BatchNorm2d


class Block(nn.Module):
    """What the blocks share. A subclass builds its layers and says how they make Σ Tᵢ(x)."""

    expansion: ClassVar[int]  # channels of its output ÷ 64 in the first stage
    preactivation: ClassVar[bool] = False

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.cardinality, self.drop_rate = spec.cardinality, spec.drop_rate
        self.build(spec)
        self.se = self.downsample = None
        if spec.se_reduction is not None:
            self.se = SqueezeExcitation(spec.out_channels, spec.se_reduction)
        if spec.stride > 1 or spec.in_channels != spec.out_channels:
            self.downsample = self.projection(spec)

    def build(self, spec: BlockSpec) -> None:
        raise NotImplementedError

    def projection(self, spec: BlockSpec) -> nn.Sequential:
        """The shortcut where shapes differ: option B of arXiv 1512.03385."""
        return nn.Sequential(
            conv(spec.in_channels, spec.out_channels, 1, spec.stride), spec.norm(spec.out_channels)
        )

    def aggregate(self, x: Tensor) -> Tensor:
        """Σ Tᵢ(x)."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        y = self.aggregate(x)
        if self.se is not None:
            y = self.se(y)
        return stochastic_depth(y, self.drop_rate, "row", self.training) if self.drop_rate else y

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        y += x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        return F.relu(y, inplace=True)


class BasicBlock(Block):
    """Two 3×3 convolutions; the block of ResNet-18 and -34 (arXiv 1512.03385, figure 5, left)."""

    expansion = 1

    def build(self, spec: BlockSpec) -> None:
        if spec.cardinality != 1:
            raise UsageError(
                f"BasicBlock with cardinality {spec.cardinality}: in a block of depth 2 a group is nothing "
                "but a wider layer (arXiv 1611.05431, section 3); use Bottleneck, or cardinality 1"
            )
        self.conv1 = conv(spec.in_channels, spec.width, 3, spec.stride, dilation=spec.dilations[0])
        self.bn1 = spec.norm(spec.width)
        self.conv2 = conv(spec.width, spec.out_channels, 3, dilation=spec.dilations[1])
        self.bn2 = spec.norm(spec.out_channels)

    def aggregate(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        return conv_norm(self.conv2, self.bn2, y)


class Bottleneck(Block):
    """1×1, grouped 3×3, 1×1: the aggregated transformations of arXiv 1611.05431, figure 3(c).

    `convert` turns it into the forms of figure 3(a) and 3(b), and back.
    """

    expansion = 4
    inner_norms: ClassVar[tuple[str, str]] = ("bn1", "bn2")  # those after conv1 and after conv2

    def build(self, spec: BlockSpec) -> None:
        strides = (spec.stride, 1) if spec.stride_in_1x1 else (1, spec.stride)
        # After the stride, a 3×3 convolution sees the coarser of the stage's two maps.
        dilation = spec.dilations[1 if spec.stride_in_1x1 else 0]
        self.conv1 = conv(spec.in_channels, spec.width, 1, strides[0])
        self.bn1 = spec.norm(self.channels_of_norms(spec)[0])
        self.conv2 = conv(spec.width, spec.width, 3, strides[1], spec.cardinality, dilation)
        self.bn2 = spec.norm(self.channels_of_norms(spec)[1])
        self.conv3 = conv(spec.width, spec.out_channels, 1)
        self.bn3 = spec.norm(self.channels_of_norms(spec)[2])

    def channels_of_norms(self, spec: BlockSpec) -> tuple[int, int, int]:
        return spec.width, spec.width, spec.out_channels

    def transform(self, x: Tensor) -> Tensor:
        """What the branches hold before they are merged, (N, width, ⌈H/stride⌉, ⌈W/stride⌉)."""
        first, second = (getattr(self, name) for name in self.inner_norms)
        y = F.relu(conv_norm(self.conv1, first, x), inplace=True)
        return F.relu(conv_norm(self.conv2, second, y), inplace=True)

    def aggregate(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv3, self.bn3, self.transform(x))


class PreActBottleneck(Bottleneck):
    """A bottleneck whose norms and activations come before its convolutions (arXiv 1603.05027, figure 4(e)).

    The paper's results on CIFAR are with this block (its repository says so).
    """

    preactivation = True
    inner_norms = ("bn2", "bn3")

    def channels_of_norms(self, spec: BlockSpec) -> tuple[int, int, int]:
        return spec.in_channels, spec.width, spec.width

    def projection(self, spec: BlockSpec) -> nn.Sequential:
        return nn.Sequential(conv(spec.in_channels, spec.out_channels, 1, spec.stride))

    def aggregate(self, x: Tensor) -> Tensor:
        return self.conv3(self.transform(x))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))  # not in place: a norm may be the identity, and x is still needed
        y = self.residual(active)
        y += x if self.downsample is None else self.downsample(active)
        return y


BLOCKS: dict[str, type[Block]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "preact": PreActBottleneck,
}
