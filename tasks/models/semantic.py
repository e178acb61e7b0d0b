"""Networks of semantic segmentation: a body or a pyramid, and a class for every pixel."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from resnext_backbones import FPN, FeatureSpec, UsageError
from resnext_backbones.features import declared_features
from tasks.models.normalise import Normalised, shapes_of
from tasks.models.parts import ClassLayer, Part
from tasks.models.strides import refuse_fine_strides

GROUPS = 32  # of group norm


class SemanticNet(Normalised):
    """A backbone, and a classifier of the cells of its maps.

    Args:
        backbone: normalised images to maps.
        classifier: maps to scores [B, K, h, w].
    """

    classifier: "SemanticFPNHead | AtrousHead"

    def __init__(self, backbone: nn.Module, classifier: "SemanticFPNHead | AtrousHead") -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    @property
    def parts(self) -> tuple[Part, ...]:
        head = Part("head", ("classifier",), ("model.head_channels",))
        if isinstance(self.backbone, FPN):
            return (Part("FPN", ("backbone.fpn",), ("model.fpn_channels",)), head)
        return (head,)

    @property
    def class_layers(self) -> tuple[ClassLayer, ...]:
        return (ClassLayer(f"classifier.{self.classifier.last}", background=False),)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Scores of every pixel.

        Args:
            images: uint8 [B, 3, H, W], RGB, padded at the right and at the bottom.
            sizes: int64 [B, 2], height and width of each image within its padding.

        Returns:
            Logits, float32 [B, K, H, W]; in the padding they mean nothing.
        """
        scores = self.classifier(self.backbone(self.normalise(images, shapes_of(sizes))))
        return F.interpolate(scores.float(), images.shape[-2:], mode="bilinear", align_corners=False)


class SemanticFPNHead(nn.Module):
    """All levels of a pyramid at the finest one's size, added up (arXiv 1901.02446, figure 3).

    A level passes a 3×3 convolution, group norm, ReLU and a bilinear doubling for each level below it; the
    finest passes one convolution and no doubling.
    """

    last = "predictor"  # whose scores of the classes leave the head

    def __init__(self, features: Mapping[str, FeatureSpec], num_classes: int, channels: int) -> None:
        super().__init__()
        for i, (name, spec) in enumerate(features.items()):
            stages = [_stage(channels if j else spec.channels, channels) for j in range(max(1, i))]
            self.add_module(name, nn.Sequential(*stages))
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        sizes = [level.shape[-2:] for level in maps.values()]
        levels = []
        for i, (name, x) in enumerate(maps.items()):
            for j, stage in enumerate(self.get_submodule(name).children(), start=1):
                x = stage(x)
                if i:  # to the next level's size, which is twice its own but where that is odd
                    x = F.interpolate(x, sizes[i - j], mode="bilinear", align_corners=False)
            levels.append(x)
        return self.predictor(torch.stack(levels).sum(0))


def _stage(in_channels: int, channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, channels), nn.ReLU(inplace=True))


class PooledNorm(nn.BatchNorm2d):
    """Batch norm of image-wide means, which takes a batch of one as well.

    One image gives one value a channel, whose deviation from its own mean is always 0: batch norm raises
    there, and nothing would train with `data.batch_size=1`. Here such a batch is normalised by the running
    statistics, as in evaluation, and leaves them as they are: trained image by image the norm is an affine
    layer, much as Detectron2 has none in this place.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class AtrousHead(DeepLabHead):
    """torchvision's head on the coarsest of a body's maps, ready for batches of one image."""

    last = "4"

    def __init__(self, in_channels: int, num_classes: int, rates: tuple[int, int, int]) -> None:
        super().__init__(in_channels, num_classes, rates)
        pooling = self[0].convs[-1]
        pooling[2] = PooledNorm(pooling[2].num_features)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        *_, coarsest = maps.values()
        return super().forward(coarsest)


def semantic_fpn(
    body: nn.Module, num_classes: int, *, fpn_channels: int = 256, head_channels: int = 128
) -> SemanticNet:
    """Semantic FPN (Kirillov et al., arXiv 1901.02446, §3.1): scores at the body's finest stride, 4.

    Args:
        body: gives c2 … c5 (`resnext_backbones`, or anything that passes `check_backbone`).
        num_classes: K, of the masks; a background counts where the masks have it as a class.
        fpn_channels: of p2 … p5.
        head_channels: of the head, whose norms have 32 groups.

    Raises `UsageError` where `head_channels` is less than 64 or no multiple of 32, and for a body that
    cannot carry a pyramid, or whose finest map has a stride below 4.
    """
    if head_channels % GROUPS or head_channels < 2 * GROUPS:
        # With one channel a group, one cell of one image would be normalised by itself, to nothing.
        raise UsageError(
            f"semantic_fpn: head_channels={head_channels} must be a multiple of {GROUPS}, the groups of its "
            f"norms, and {2 * GROUPS} at least"
        )
    backbone = FPN(body, fpn_channels, extra_levels=None)
    refuse_fine_strides("Semantic FPN", body, backbone.features)
    return SemanticNet(backbone, SemanticFPNHead(backbone.features, num_classes, head_channels))


# Of the three dilated convolutions (arXiv 1706.05587, §3.3), so that they reach equally far in pixels.
ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


def deeplabv3(body: nn.Module, num_classes: int) -> SemanticNet:
    """DeepLabv3 (Chen et al., arXiv 1706.05587) with torchvision's head and names, without auxiliary loss.

    Args:
        body: with `output_stride` 8 or 16; only its coarsest map is used.
        num_classes: K, of the masks; a background counts where the masks have it as a class.

    Raises `UsageError` for a body of another stride.
    """
    coarsest = list(declared_features(body).values())[-1]
    if coarsest.stride not in ATROUS_RATES:
        raise UsageError(
            f"deeplabv3 needs a body whose last map has stride 8 or 16, that of this {type(body).__name__} "
            f"has {coarsest.stride}: give backbone.output_stride=8 with one of this project's bodies for "
            "ImageNet, or model=semantic_fpn"
        )
    return SemanticNet(body, AtrousHead(coarsest.channels, num_classes, ATROUS_RATES[coarsest.stride]))
