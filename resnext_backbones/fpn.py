"""Feature pyramid (arXiv 1612.03144) on any body: c2 … c5 to p2 … p6."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .errors import UsageError
from .features import FeatureSpec, declared_features


class StridedLevels(LastLevelP6P7):
    """torchvision's p6 and p7, but no convolution of stride 2 sees a map that is one pixel wide.

    On a CPU, torch 2.15's gradient of its weights in bfloat16 is then memory nobody wrote to: NaN as a rule.
    A column of zeros beside the pixel changes nothing else.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(_widened(p[-1] if self.use_P5 else c[-1]))
        p7 = self.p7(_widened(F.relu(p6)))
        return [*p, p6, p7], [*names, "p6", "p7"]


def _widened(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x


class FPN(nn.Module):
    """A body with a feature pyramid on top; itself a `Backbone`, and what torchvision's detectors expect.

    A level is named by the logarithm of its stride: p2 has stride 4, p6 has 64. Parameters are named as in
    torchvision's `BackboneWithFPN` (`body.…`, `fpn.inner_blocks.0.0.weight`), so its detectors' weights load.

    Args:
        body: a `Backbone` whose strides double from level to level.
        out_channels: of every level.
        extra_levels: coarser levels on top. "pool": p6 is every second pixel of p5 (the FPN paper, Faster and
            Mask R-CNN). "conv_c5", "conv_p5": p6 and p7 by strided convolutions from c5 (RetinaNet,
            arXiv 1708.02002) or from p5 (FCOS, arXiv 1904.01355, and torchvision's first RetinaNet). None.
        finest: the body's first level to use, its very first by default; RetinaNet and FCOS start at "c3".

    Raises `UsageError` for a body that cannot carry the pyramid.
    """

    def __init__(
        self,
        body: nn.Module,
        out_channels: int = 256,
        extra_levels: Literal["pool", "conv_c5", "conv_p5"] | None = "pool",
        finest: str | None = None,
    ) -> None:
        super().__init__()
        kind = type(body).__name__
        features = declared_features(body)
        names = list(features)
        if finest is not None and finest not in names:
            raise UsageError(f"FPN: finest={finest!r} is not a level of {kind}; it has {names}")
        self.levels = names[names.index(finest) if finest is not None else 0 :]
        specs = [features[name] for name in self.levels]

        # Top-down, a map is doubled and added to the next: other ratios would be resampled without a word.
        strides = [spec.stride for spec in specs]
        if strides[0] & (strides[0] - 1) or strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise UsageError(f"FPN: strides must be powers of two that double, those of {kind} are {strides}")

        extra: nn.Module | None
        match extra_levels:
            case None:
                extra, n_extra = None, 0
            case "pool":
                extra, n_extra = LastLevelMaxPool(), 1
            case "conv_c5" | "conv_p5":
                source = specs[-1].channels if extra_levels == "conv_c5" else out_channels
                extra, n_extra = StridedLevels(source, out_channels), 2
                # torchvision guesses it from the channels, wrongly where c5 and p5 have equally many.
                extra.use_P5 = extra_levels == "conv_p5"
            case _:
                raise UsageError(f"FPN: extra_levels={extra_levels!r}; take pool, conv_c5, conv_p5 or null")

        self.body = body
        self.fpn = FeaturePyramidNetwork([spec.channels for spec in specs], out_channels, extra)
        self.out_channels = out_channels
        self.features = {
            f"p{stride.bit_length() - 1}": FeatureSpec(out_channels, stride)
            for stride in [*strides, *(strides[-1] * 2**i for i in range(1, n_extra + 1))]
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float (N, C, H, W), to {"p2": (N, out_channels, ⌈H/4⌉, ⌈W/4⌉), …}."""
        maps = self.body(images)
        maps = self.fpn({name: maps[name] for name in self.levels})
        return dict(zip(self.features, maps.values(), strict=True))
