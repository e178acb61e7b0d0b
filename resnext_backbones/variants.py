"""The published networks, one builder each, and the rule that gave them their widths.

Keyword arguments of a builder are `ResNeXt`'s: in_channels, num_classes, norm, output_stride, block, ….
All take normalised images, float (N, 3, H, W), and return c2 … c5 (CIFAR's: c2 … c4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError
from .resnext import ResNeXt


def base_width_for(cardinality: int) -> int:
    """The width d of a branch that keeps the template block's complexity at this cardinality.

    Solves C · (2 · 256 · d + 9 · d²) = 69,632 (arXiv 1611.05431, equation 4; so many weights has ResNet-50's
    block with 256 channels) and rounds: 1/64, 2/40, 4/24, 8/14, 32/4, as in table 2. Since one block is not
    the network and d is rounded, networks differ: at table 2's cardinalities by 4.4 % of the multiply-adds at
    most, up to 64 by 22 % (52, where d is 3), beyond by more. How much, is reported by
    `python -m resnext_backbones --equal`.

    Raises `UsageError` for a cardinality below 1, or so large that less than half a channel would be left.
    """
    if isinstance(cardinality, bool) or not isinstance(cardinality, int) or cardinality < 1:
        raise UsageError(f"base_width_for: cardinality={cardinality!r} must be a whole number of at least 1")
    width = round((math.sqrt(512**2 + 4 * 9 * 69_632 / cardinality) - 512) / (2 * 9))
    if width < 1:
        raise UsageError(
            f"base_width_for: cardinality={cardinality} leaves a branch less than half a channel; 269 is most"
        )
    return width


# ImageNet, cardinality 1.


def resnet18(**kwargs: Any) -> ResNeXt:
    """ResNet-18 (arXiv 1512.03385, table 1)."""
    return ResNeXt((2, 2, 2, 2), block="basic", **kwargs)


def resnet34(**kwargs: Any) -> ResNeXt:
    """ResNet-34 (arXiv 1512.03385, table 1)."""
    return ResNeXt((3, 4, 6, 3), block="basic", **kwargs)


def resnet50(**kwargs: Any) -> ResNeXt:
    """ResNet-50, 1×64d (arXiv 1611.05431, table 1, left column)."""
    return ResNeXt((3, 4, 6, 3), **kwargs)


def resnet101(**kwargs: Any) -> ResNeXt:
    """ResNet-101, 1×64d (arXiv 1611.05431, tables 3 and 4)."""
    return ResNeXt((3, 4, 23, 3), **kwargs)


def resnet152(**kwargs: Any) -> ResNeXt:
    """ResNet-152 (arXiv 1512.03385, table 1)."""
    return ResNeXt((3, 8, 36, 3), **kwargs)


def resnet200(**kwargs: Any) -> ResNeXt:
    """ResNet-200's depth (arXiv 1603.05027, table 5; 1611.05431, table 4), there with `block="preact"`."""
    return ResNeXt((3, 24, 36, 3), **kwargs)


def wide_resnet50_2(**kwargs: Any) -> ResNeXt:
    """Wide ResNet-50-2 (arXiv 1605.07146, table 8): bottlenecks twice as wide inside."""
    return ResNeXt((3, 4, 6, 3), base_width=128, **kwargs)


def wide_resnet101_2(**kwargs: Any) -> ResNeXt:
    """Wide ResNet-101-2: bottlenecks twice as wide inside (torchvision's; after arXiv 1605.07146)."""
    return ResNeXt((3, 4, 23, 3), base_width=128, **kwargs)


# ImageNet, ResNeXt as cardinality × base width.


def resnext26_32x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50's template at half its depth: small enough to train a detector on a CPU."""
    return ResNeXt((2, 2, 2, 2), 32, 4, **kwargs)


def resnext50_2x40d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50, 2×40d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 6, 3), 2, 40, **kwargs)


def resnext50_4x24d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50, 4×24d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 6, 3), 4, 24, **kwargs)


def resnext50_8x14d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50, 8×14d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 6, 3), 8, 14, **kwargs)


def resnext50_32x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-50, 32×4d (arXiv 1611.05431, table 1, right column)."""
    return ResNeXt((3, 4, 6, 3), 32, 4, **kwargs)


def resnext101_2x40d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 2×40d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 23, 3), 2, 40, **kwargs)


def resnext101_4x24d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 4×24d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 23, 3), 4, 24, **kwargs)


def resnext101_8x14d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 8×14d (arXiv 1611.05431, table 3)."""
    return ResNeXt((3, 4, 23, 3), 8, 14, **kwargs)


def resnext101_32x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 32×4d (arXiv 1611.05431, tables 3 and 4)."""
    return ResNeXt((3, 4, 23, 3), 32, 4, **kwargs)


def resnext101_1x100d(**kwargs: Any) -> ResNeXt:
    """The wider ResNet-101, 1×100d, of twice the complexity (arXiv 1611.05431, table 4)."""
    return ResNeXt((3, 4, 23, 3), 1, 100, **kwargs)


def resnext101_2x64d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 2×64d, of twice the complexity (arXiv 1611.05431, table 4)."""
    return ResNeXt((3, 4, 23, 3), 2, 64, **kwargs)


def resnext101_64x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 64×4d, of twice the complexity (arXiv 1611.05431, table 4)."""
    return ResNeXt((3, 4, 23, 3), 64, 4, **kwargs)


def resnext101_32x8d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-101, 32×8d (torchvision; Detectron2's X-101-32x8d)."""
    return ResNeXt((3, 4, 23, 3), 32, 8, **kwargs)


def resnext152_32x8d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-152, 32×8d (Detectron2's X-152-32x8d)."""
    return ResNeXt((3, 8, 36, 3), 32, 8, **kwargs)


def seresnext50_32x4d(**kwargs: Any) -> ResNeXt:
    """SE-ResNeXt-50, 32×4d (arXiv 1709.01507, table 1, right column), under timm's names."""
    return ResNeXt((3, 4, 6, 3), 32, 4, se_reduction=16, **kwargs)


def seresnext101_32x4d(**kwargs: Any) -> ResNeXt:
    """SE-ResNeXt-101, 32×4d (arXiv 1709.01507, table 2), under timm's names."""
    return ResNeXt((3, 4, 23, 3), 32, 4, se_reduction=16, **kwargs)


# CIFAR, 32×32 pixels, three stages (arXiv 1611.05431, section 5.3); `block="preact"` is that of its table 7.


def resnext29_1x64d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-29, 1×64d, for CIFAR (arXiv 1611.05431, figure 7)."""
    return ResNeXt((3, 3, 3), 1, 64, stem="cifar", **kwargs)


def resnext29_8x64d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-29, 8×64d, for CIFAR (arXiv 1611.05431, table 7)."""
    return ResNeXt((3, 3, 3), 8, 64, stem="cifar", **kwargs)


def resnext29_16x64d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-29, 16×64d, for CIFAR (arXiv 1611.05431, table 7)."""
    return ResNeXt((3, 3, 3), 16, 64, stem="cifar", **kwargs)


def resnext29_32x4d(**kwargs: Any) -> ResNeXt:
    """ResNeXt-29, 32×4d, for CIFAR."""
    return ResNeXt((3, 3, 3), 32, 4, stem="cifar", **kwargs)


@dataclass(frozen=True)
class Variant:
    """A builder with what was published of its network.

    `top1` is the accuracy on the validation split (ImageNet-1K's for 1000 classes, CIFAR-10's test split for
    10), one centre crop, in per cent; None where none was published. `source` says where.
    """

    build: Callable[..., ResNeXt]
    top1: float | None
    source: str
    image_size: int = 224
    num_classes: int = 1000


# Accuracies are 100 − the errors printed there; torchvision's are those of IMAGENET1K_V1, its recipe nearest
# to the papers'.
PAPER, SE, TORCHVISION = "arXiv 1611.05431", "arXiv 1709.01507", "torchvision, IMAGENET1K_V1"
VARIANTS: dict[str, Variant] = {
    "resnet18": Variant(resnet18, 69.758, TORCHVISION),
    "resnet34": Variant(resnet34, 73.314, TORCHVISION),
    "resnet50": Variant(resnet50, 76.1, f"{PAPER}, table 3"),
    "resnet101": Variant(resnet101, 78.0, f"{PAPER}, table 3"),
    "resnet152": Variant(resnet152, 78.312, TORCHVISION),
    "resnet200": Variant(resnet200, 78.3, f"{PAPER}, table 4, pre-activation"),
    "wide_resnet50_2": Variant(wide_resnet50_2, 78.468, TORCHVISION),
    "wide_resnet101_2": Variant(wide_resnet101_2, 78.848, TORCHVISION),
    "resnext26_32x4d": Variant(resnext26_32x4d, None, ""),
    "resnext50_2x40d": Variant(resnext50_2x40d, 77.0, f"{PAPER}, table 3"),
    "resnext50_4x24d": Variant(resnext50_4x24d, 77.4, f"{PAPER}, table 3"),
    "resnext50_8x14d": Variant(resnext50_8x14d, 77.7, f"{PAPER}, table 3"),
    "resnext50_32x4d": Variant(resnext50_32x4d, 77.8, f"{PAPER}, table 3"),
    "resnext101_2x40d": Variant(resnext101_2x40d, 78.3, f"{PAPER}, table 3"),
    "resnext101_4x24d": Variant(resnext101_4x24d, 78.6, f"{PAPER}, table 3"),
    "resnext101_8x14d": Variant(resnext101_8x14d, 78.7, f"{PAPER}, table 3"),
    "resnext101_32x4d": Variant(resnext101_32x4d, 78.8, f"{PAPER}, table 3"),
    "resnext101_1x100d": Variant(resnext101_1x100d, 78.7, f"{PAPER}, table 4"),
    "resnext101_2x64d": Variant(resnext101_2x64d, 79.3, f"{PAPER}, table 4"),
    "resnext101_64x4d": Variant(resnext101_64x4d, 79.6, f"{PAPER}, table 4"),
    "resnext101_32x8d": Variant(resnext101_32x8d, 79.312, TORCHVISION),
    "resnext152_32x8d": Variant(resnext152_32x8d, None, ""),
    "seresnext50_32x4d": Variant(seresnext50_32x4d, 78.90, f"{SE}, table 2"),
    "seresnext101_32x4d": Variant(seresnext101_32x4d, 79.30, f"{SE}, table 2"),
    "resnext29_1x64d": Variant(resnext29_1x64d, None, "", 32, 10),
    "resnext29_8x64d": Variant(resnext29_8x64d, 96.35, f"{PAPER}, table 7, pre-activation", 32, 10),
    "resnext29_16x64d": Variant(resnext29_16x64d, 96.42, f"{PAPER}, table 7, pre-activation", 32, 10),
    "resnext29_32x4d": Variant(resnext29_32x4d, None, "", 32, 10),
}
