"""A body of one's own: depthwise convolutions as in ConvNeXt (Liu et al. 2022, arXiv 2201.03545)."""

from collections.abc import Sequence

from torch import Tensor, nn

from resnext_backbones import FeatureSpec

LEVELS = ("c2", "c3", "c4", "c5")


class DepthwiseNet(nn.Module):
    """Four stages of depthwise blocks behind a stem of stride 4.

    Whoever consumes a body reads `features` (channels and stride of each map, finest first). `stages` names
    the modules of the stem and of each level; it is needed to freeze early stages (`backbone.freeze_at`).

    Args:
        widths: channels of c2 … c5.
        depths: blocks of each.
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 96, 128), depths: Sequence[int] = (1, 1, 2, 1)
    ) -> None:
        super().__init__()
        self.features: dict[str, FeatureSpec] = {}
        self.stages: dict[str, tuple[str, ...]] = {"stem": ("stem",)}
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 7, stride=4, padding=3), norm(widths[0]))
        channels = widths[0]
        for number, (name, width, depth) in enumerate(zip(LEVELS, widths, depths, strict=True)):
            smaller = [nn.Conv2d(channels, width, 3, stride=2, padding=1)] if number else []
            self.add_module(name, nn.Sequential(*smaller, *(Block(width) for _ in range(depth))))
            self.features[name] = FeatureSpec(channels=width, stride=4 * 2**number)
            self.stages[name] = (name,)
            channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float [B, 3, H, W], to the maps that `features` declares."""
        x = self.stem(images)
        maps = {}
        for name in LEVELS:
            x = maps[name] = self.get_submodule(name)(x)
        return maps


class Block(nn.Module):
    """7×7 depthwise, norm, 1×1 to four times the width, GELU, 1×1 back; added to its input (§2.6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            norm(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def norm(width: int) -> nn.Module:
    """Over all channels and pixels of an image: no statistics to keep, the same for any batch."""
    return nn.GroupNorm(1, width)
