"""ResNeXt (arXiv 1611.05431); with cardinality 1, ResNet (arXiv 1512.03385) and Wide ResNet (1605.07146)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BLOCKS, NORMS, Block, BlockSpec, Bottleneck, Norm, conv
from .errors import UsageError
from .features import FeatureSpec
from .norm import conv_norm
from .recompute import recomputed

T = TypeVar("T")


def deep_stem(in_channels: int, norm: Norm) -> nn.Sequential:
    """Three 3×3 convolutions in place of the 7×7 (arXiv 1812.01187, figure 2(b)), under timm's names."""
    first = [conv(in_channels, 32, 3, stride=2), norm(32), nn.ReLU(inplace=True)]
    second = [conv(32, 32, 3), norm(32), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second, conv(32, 64, 3))


STEMS: dict[str, Callable[[int, Norm], nn.Module]] = {
    "7x7": lambda in_channels, norm: conv(in_channels, 64, 7, stride=2),
    "deep": deep_stem,
    "cifar": lambda in_channels, norm: conv(in_channels, 64, 3),
}


class ResNeXt(nn.Module):
    """Images to feature maps c2 … c5, strides 4 … 32 (table 1 of arXiv 1611.05431).

    Args:
        depths: blocks in each stage; four stages for ImageNet's networks, three for CIFAR's.
        cardinality: the paper's C, the number of groups of a 3×3 convolution.
        base_width: the paper's d, channels of one group in the first stage; each stage doubles it.
        block: "bottleneck", "basic", "preact", or a subclass of `Block`. With "preact" the stem has no norm,
            as in timm, since the first block begins with one; only the last map is normalised and activated.
        in_channels: of the images.
        num_classes: of a classifier on top (`fc`, used by `classify`); None for a body without one.
        norm: "batch", "sync", "group" (32 groups), "frozen" (an identity until weights are loaded, so not for
            training from scratch), or a function that makes the norm for a number of channels.
        stem: "7x7" or "deep" (three 3×3), with stride 4; or "cifar", one 3×3 with stride 1.
        output_stride: of the coarsest map. Less than the network's own (32; CIFAR's 4) exchanges strides of
            the last stages for dilation (arXiv 1706.05587, section 3.1), for semantic segmentation.
        depthwise: every 3×3 convolution has as many groups as channels; cardinality × base_width is then
            only the width of the first stage.
        stride_in_1x1: a bottleneck's first 1×1 convolution strides, not its 3×3.
        se_reduction: r of squeeze-and-excitation in every block (arXiv 1709.01507 has 16); None for none.
        stochastic_depth: the probability of leaving out the last block in training; it rises linearly from
            block to block (arXiv 1603.09382, equation 4).
        activation_checkpointing: keep only what goes into each block, and compute its inside a second time in
            the backward pass: less memory, more time, the same numbers. Not under `torch.compile`.

    `stages` says what `freeze` counts, and what the receipt of `load_weights` tells apart.

    Raises `UsageError` for an argument outside its range.
    """

    def __init__(
        self,
        depths: Sequence[int],
        cardinality: int = 1,
        base_width: int = 64,
        *,
        block: Literal["bottleneck", "basic", "preact"] | type[Block] = "bottleneck",
        in_channels: int = 3,
        num_classes: int | None = None,
        norm: Literal["batch", "sync", "group", "frozen"] | Norm = "batch",
        stem: Literal["7x7", "deep", "cifar"] = "7x7",
        output_stride: int | None = None,
        depthwise: bool = False,
        stride_in_1x1: bool = False,
        se_reduction: int | None = None,
        stochastic_depth: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(depths, Sequence) or isinstance(depths, str) or not depths:
            raise UsageError(f"ResNeXt: depths={depths!r} must give the number of blocks of each stage")
        depths = [_count(f"depths[{i}]", depth) for i, depth in enumerate(depths)]
        width = _count("cardinality", cardinality) * _count("base_width", base_width)
        if not (isinstance(stochastic_depth, int | float) and 0 <= stochastic_depth < 1):
            raise UsageError(f"ResNeXt: stochastic_depth={stochastic_depth!r} must lie between 0 and 1")
        switches = {"depthwise": depthwise, "stride_in_1x1": stride_in_1x1}
        for name, value in {**switches, "activation_checkpointing": activation_checkpointing}.items():
            if not isinstance(value, bool):
                raise UsageError(f"ResNeXt: {name}={value!r} must be true or false")
        make_block: type[Block] = _chosen("block", block, BLOCKS)
        if not (isinstance(make_block, type) and issubclass(make_block, Block)):
            raise UsageError(f"ResNeXt: block={block!r} must be one of {', '.join(BLOCKS)}, or a Block")
        if stride_in_1x1 and not issubclass(make_block, Bottleneck):
            raise UsageError(f"ResNeXt: stride_in_1x1, but {make_block.__name__} has no 1×1 convolution")
        make_norm: Norm = _chosen("norm", norm, NORMS)
        if se_reduction is not None:
            _count("se_reduction", se_reduction)
        self.cardinality, self.base_width, self.stride_in_1x1 = cardinality, base_width, stride_in_1x1
        self.activation_checkpointing = activation_checkpointing

        self.conv1 = _chosen("stem", stem, STEMS)(_count("in_channels", in_channels), make_norm)
        # Blocks with pre-activation begin with a norm of their own.
        self.bn1 = None if make_block.preactivation else make_norm(64)
        self.pooled = stem != "cifar"
        self.stages: dict[str, tuple[str, ...]] = {
            "stem": ("conv1",) if self.bn1 is None else ("conv1", "bn1")
        }
        self.features: dict[str, FeatureSpec] = {}

        strides = [(4 if self.pooled else 1) * 2**i for i in range(len(depths))]
        if output_stride is not None and _count("output_stride", output_stride) not in strides:
            raise UsageError(f"ResNeXt: output_stride={output_stride} must be one of {strides}")
        reached = [min(stride, output_stride or stride) for stride in strides]
        stages = template(
            depths,
            width,
            make_block.expansion,
            strides,
            reached,
            stochastic_depth,
            cardinality=None if depthwise else cardinality,
            stride_in_1x1=stride_in_1x1,
            se_reduction=se_reduction,
            norm=make_norm,
        )
        for i, specs in enumerate(stages):
            layer, channels = f"layer{i + 1}", specs[-1].out_channels
            self.add_module(layer, nn.Sequential(*map(make_block, specs)))
            self.stages[layer] = (layer,)
            self.features[f"c{i + 2}"] = FeatureSpec(channels, reached[i])
        self.norm = None
        if make_block.preactivation:  # what the last block has added to is neither normalised nor activated
            self.norm = make_norm(channels)
            self.stages[f"layer{len(depths)}"] += ("norm",)
        if num_classes is not None:
            self.fc = nn.Linear(channels, _count("num_classes", num_classes))

        # As torchvision. The last norm of a block is left at 1, not 0: frozen at 0 it would switch the
        # block off for good.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float (N, in_channels, H, W), to {"c2": (N, C, ⌈H/4⌉, ⌈W/4⌉), … "c5"}.

        Channels and strides are those in `features`; other stems, depths and output strides have others.
        """
        if self.bn1 is None:
            x = self.conv1(images)
        else:
            x = F.relu(conv_norm(self.conv1, self.bn1, images), inplace=True)
        if self.pooled:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        maps = {}
        for i, name in enumerate(self.features, start=1):
            for block in self.get_submodule(f"layer{i}").children():
                x = recomputed(block, x) if recompute else block(x)
            maps[name] = x
        if self.norm is not None:
            maps[list(self.features)[-1]] = F.relu(self.norm(x))
        return maps

    def classify(self, images: Tensor) -> Tensor:
        """Normalised images to logits, (N, num_classes). Raises `UsageError` without `num_classes`."""
        if not hasattr(self, "fc"):
            raise UsageError("ResNeXt: a body without a classifier; build it with num_classes=…")
        *_, x = self(images).values()
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def template(
    depths: Sequence[int],
    width: int,
    expansion: int,
    strides: Sequence[int],
    reached: Sequence[int],
    stochastic_depth: float,
    cardinality: int | None,
    **shared: Any,
) -> Iterator[list[BlockSpec]]:
    """The blocks of each stage: alike within it, twice as wide in the next (arXiv 1611.05431, section 3.1).

    Args:
        width: inside the blocks of the first stage.
        strides: of the stages' maps in the plain network.
        reached: their strides here; where they are less, dilation makes up for it.
        cardinality: None for as many groups as channels.
        shared: what all blocks have in common.
    """
    channels, stride, dilation, n_blocks = 64, strides[0], 1, 0
    for i, depth in enumerate(depths):
        before, dilation = dilation, strides[i] // reached[i]
        specs = []
        for _ in range(depth):
            n_blocks += 1
            spec = BlockSpec(
                in_channels=channels,
                width=width * 2**i,
                out_channels=64 * 2**i * expansion,
                stride=reached[i] // stride,
                cardinality=cardinality or width * 2**i,
                dilations=(before, dilation),
                drop_rate=stochastic_depth * n_blocks / sum(depths),
                **shared,
            )
            specs.append(spec)
            channels, stride, before = spec.out_channels, reached[i], dilation
        yield specs


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"ResNeXt: {name}={value!r} must be a whole number of at least 1")
    return value


def _chosen(name: str, choice: str | T, choices: Mapping[str, T]) -> T:
    """The one that goes by this name, or the thing itself."""
    if isinstance(choice, str) and choice in choices:
        return choices[choice]
    if isinstance(choice, str) or not callable(choice):
        raise UsageError(f"ResNeXt: {name}={choice!r} must be one of {', '.join(choices)}")
    return choice
