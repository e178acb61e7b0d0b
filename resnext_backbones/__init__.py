"""ResNeXt and ResNet bodies, a feature pyramid on top, and the loading and freezing of weights.

from resnext_backbones import FPN, freeze, load_weights, resnext50_32x4d

body = resnext50_32x4d()
print(load_weights(body, "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"))
freeze(body, at=2)
maps = FPN(body)(images)  # {"p2": (N, 256, H/4, W/4), …, "p6"}
"""

from .adapters import TimmBody, TorchvisionBody
from .blocks import BasicBlock, Block, BlockSpec, Bottleneck, PreActBottleneck
from .conformance import check_backbone
from .errors import UsageError
from .features import Backbone, FeatureSpec
from .forms import convert
from .fpn import FPN
from .norm import FrozenBatchNorm2d, conv_norm, freeze_norms
from .receipt import Clash, Receipt
from .resnext import ResNeXt
from .variants import (
    VARIANTS,
    Variant,
    base_width_for,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnet200,
    resnext26_32x4d,
    resnext29_1x64d,
    resnext29_8x64d,
    resnext29_16x64d,
    resnext29_32x4d,
    resnext50_2x40d,
    resnext50_4x24d,
    resnext50_8x14d,
    resnext50_32x4d,
    resnext101_1x100d,
    resnext101_2x40d,
    resnext101_2x64d,
    resnext101_4x24d,
    resnext101_8x14d,
    resnext101_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    resnext152_32x8d,
    seresnext50_32x4d,
    seresnext101_32x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .weights import freeze, load_weights, save_weights

__all__ = [
    "FPN",
    "VARIANTS",
    "Backbone",
    "BasicBlock",
    "Block",
    "BlockSpec",
    "Bottleneck",
    "Clash",
    "FeatureSpec",
    "FrozenBatchNorm2d",
    "PreActBottleneck",
    "Receipt",
    "ResNeXt",
    "TimmBody",
    "TorchvisionBody",
    "UsageError",
    "Variant",
    "base_width_for",
    "check_backbone",
    "conv_norm",
    "convert",
    "freeze",
    "freeze_norms",
    "load_weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "resnext26_32x4d",
    "resnext29_1x64d",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "resnext29_32x4d",
    "resnext50_2x40d",
    "resnext50_4x24d",
    "resnext50_8x14d",
    "resnext50_32x4d",
    "resnext101_1x100d",
    "resnext101_2x40d",
    "resnext101_2x64d",
    "resnext101_4x24d",
    "resnext101_8x14d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext152_32x8d",
    "save_weights",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
