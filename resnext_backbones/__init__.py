"""ResNeXt and ResNet bodies, a feature pyramid on top, and the loading and freezing of weights.

from resnext_backbones import FPN, freeze, load_weights, resnext50_32x4d

body = resnext50_32x4d()
print(load_weights(body, "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"))
freeze(body, at=2)
maps = FPN(body)(images)  # {"p2": (N, 256, H/4, W/4), …, "p6"}
"""

from .errors import UsageError
from .features import Backbone, FeatureSpec, check_backbone
from .fpn import FPN
from .norm import FrozenBatchNorm2d, conv_norm, freeze_norms
from .resnext import (
    BasicBlock,
    Bottleneck,
    ResNeXt,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext26_32x4d,
    resnext50_32x4d,
    resnext101_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .weights import Clash, Receipt, freeze, load_weights

__all__ = [
    "FPN",
    "Backbone",
    "BasicBlock",
    "Bottleneck",
    "Clash",
    "FeatureSpec",
    "FrozenBatchNorm2d",
    "Receipt",
    "ResNeXt",
    "UsageError",
    "check_backbone",
    "conv_norm",
    "freeze",
    "freeze_norms",
    "load_weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext26_32x4d",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
