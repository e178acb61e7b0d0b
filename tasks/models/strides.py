"""Which pyramids are too fine for the heads on them."""

from collections.abc import Mapping

from torch import nn

from resnext_backbones import FeatureSpec, UsageError

FINEST = 4  # of ImageNet's networks, which these heads were designed for


def refuse_fine_strides(model: str, body: nn.Module, features: Mapping[str, FeatureSpec]) -> None:
    """`UsageError` where the finest of these maps, which `model` makes of the body's, has a stride below 4.

    On CIFAR's networks (strides 1, 2, 4) a head would work at the image's full size, with anchors of a few
    pixels.
    """
    finest = next(iter(features.values())).stride
    if finest < FINEST:
        raise UsageError(
            f"{model} needs maps of stride {FINEST} or more, the finest of this {type(body).__name__} has "
            f"{finest}: networks for CIFAR are for classification; take a backbone for ImageNet"
        )
