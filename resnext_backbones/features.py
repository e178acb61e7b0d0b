"""What a backbone is: named feature maps with declared channels and strides."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from .errors import UsageError


@dataclass(frozen=True)
class FeatureSpec:
    """One feature map, (N, channels, ceil(H / stride), ceil(W / stride)) for images (N, C, H, W)."""

    channels: int
    stride: int


@runtime_checkable
class Backbone(Protocol):
    """A body (c2 … c5), or a body with a neck (p2 … p6); whoever consumes it cannot tell them apart.

    `features` declares what `forward` returns: the same keys in the same order, finest map first. Consumers
    read channels and strides there and never infer them. What is declared is checked by `check_backbone`.
    """

    features: dict[str, FeatureSpec]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images, float (N, C, H, W) and already normalised, to feature maps."""
        ...


def declared_features(backbone: nn.Module) -> dict[str, FeatureSpec]:
    """`backbone.features`, after a look at it: `UsageError` unless it declares maps, finest first."""
    kind = type(backbone).__name__
    if not isinstance(backbone, nn.Module):
        raise UsageError(f"{kind} is not an nn.Module")
    features = getattr(backbone, "features", None)
    if not (isinstance(features, dict) and features):
        raise UsageError(f"{kind}.features must be a dict of names to FeatureSpec, got {features!r:.80}")
    for name, spec in features.items():
        if not (isinstance(name, str) and isinstance(spec, FeatureSpec)):
            raise UsageError(f"{kind}.features[{name!r}] must be a FeatureSpec, got {spec!r:.80}")
        if spec.channels < 1 or spec.stride < 1:
            raise UsageError(f"{kind}.features[{name!r}] = {spec}: channels and stride must be positive")
    strides = [spec.stride for spec in features.values()]
    if strides != sorted(strides):
        raise UsageError(f"{kind}.features must stand finest first, but their strides are {strides}")
    return features
