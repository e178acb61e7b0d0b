"""What a backbone is: named feature maps with declared channels and strides, and a check of the promise."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
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
    if strides != sorted(set(strides)):
        raise UsageError(f"{kind}.features must stand finest first, each coarser than the last: {strides}")
    return features


def check_backbone(
    backbone: nn.Module,
    in_channels: int = 3,
    sizes: Sequence[tuple[int, int]] = ((64, 64), (96, 65), (33, 130)),
) -> None:
    """Raise `UsageError`, naming the first fault, unless `backbone` keeps the contract of `Backbone`.

    Tried on a copy, on two random images of every (height, width) in `sizes`; odd sizes belong among them,
    since real images have them. Checked: the declaration itself; names, order, dtype, shapes and finiteness
    of the maps; that evaluation is deterministic and changes no state; that training sends a gradient to
    every trainable parameter (one without makes distributed training stop).
    """
    kind = type(backbone).__name__
    features = declared_features(backbone)
    backbone = copy.deepcopy(backbone)
    generator = torch.Generator().manual_seed(0)
    first = next(backbone.parameters(), torch.empty(0))
    batches = [torch.randn(2, in_channels, *size, generator=generator).to(first) for size in sizes]

    backbone.eval()
    state = copy.deepcopy(backbone.state_dict())
    for images in batches:
        with torch.no_grad():
            maps, again = backbone(images), backbone(images)
        for result in (maps, again):
            _check_maps(result, images, features, kind)
        for name, x in maps.items():
            if not torch.equal(x, again[name]):
                raise UsageError(f"{kind}: {name} differs between two evaluations of the same images")
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, state[name]):
            raise UsageError(f"{kind}: {name} is changed by a forward pass in evaluation mode")

    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if trainable:
        backbone.train()
        maps = backbone(batches[0])
        _check_maps(maps, batches[0], features, kind)
        # Squares, since the sum of a batch-normalised map is constant and has no gradient.
        loss = torch.stack([x.float().square().mean() for x in maps.values()]).sum()
        if not loss.requires_grad:
            raise UsageError(f"{kind}: no gradient leaves forward in training mode; is it under no_grad?")
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            if gradient is None:
                raise UsageError(f"{kind}: no gradient reaches {name}; use it in forward or do not build it")
            if not gradient.isfinite().all():
                raise UsageError(f"{kind}: the gradient of {name} is not finite")


def _check_maps(maps: object, images: Tensor, features: dict[str, FeatureSpec], kind: str) -> None:
    if not isinstance(maps, dict) or list(maps) != list(features):
        got = list(maps) if isinstance(maps, dict) else type(maps).__name__
        raise UsageError(f"{kind}: forward must return a dict of {list(features)} in this order, got {got}")
    n, _, height, width = images.shape
    for name, spec in features.items():
        x = maps[name]
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            raise UsageError(f"{kind}: {name} must be a tensor of floats, got {getattr(x, 'dtype', type(x))}")
        expected = (n, spec.channels, math.ceil(height / spec.stride), math.ceil(width / spec.stride))
        if tuple(x.shape) != expected:
            raise UsageError(
                f"{kind}: {name} of images {tuple(images.shape)} is {tuple(x.shape)}, "
                f"but {spec} says {expected}"
            )
        if not x.isfinite().all():
            raise UsageError(f"{kind}: {name} of images {tuple(images.shape)} is not finite")
