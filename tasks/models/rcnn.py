"""Two-stage detectors: torchvision's proposal network and heads over a backbone that declares its strides."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from resnext_backbones import FPN, FeatureSpec

# ImageNet's mean and standard deviation of RGB in 0…255, which published weights were trained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class StridedAnchors(AnchorGenerator):
    """Anchors centred on each cell of each level, in float32 whatever the features' precision.

    torchvision infers a level's stride from the sizes of image and feature map, which is wrong for sizes
    that the stride does not divide, and makes anchors in the features' dtype, which under bf16 misplaces them
    by pixels. Here strides are the declared ones.

    Args:
        strides: pixels between cells, a level.
        scales: sides of the square anchors as multiples of the stride; 8 in FPN (arXiv 1612.03144, §4.1).
        aspect_ratios: height ÷ width.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float] = (8,),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(aspect_ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class Float32RPNHead(RPNHead):
    """torchvision's head, whose scores and deltas leave it as float32.

    Boxes decoded from bfloat16 deltas lose a fifth of a small object's IoU, and equal scores pile up.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's predictor, whose scores and deltas leave it as float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class RCNN(nn.Module):
    """A backbone, a region proposal network and the heads of its regions (Ren et al., arXiv 1506.01497).

    Parameters carry torchvision's names (`backbone.body.*`, `backbone.fpn.*`, `rpn.*`, `roi_heads.*`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses in training mode, the detections otherwise.

        Args:
            images: uint8 [B, 3, H, W], RGB, padded at the right and at the bottom.
            sizes: int64 [B, 2], height and width of each image within its padding.
            targets: in training mode, for each image `boxes` (float32 [N, 4], xyxy, pixels) and `labels`
                (int64 [N], 1…K); N may be 0.

        Returns:
            In training mode four scalars: `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`,
            `loss_box_reg`. Otherwise for each image `boxes` (float32 [N, 4], xyxy, pixels of the given
            image), `scores` (float32 [N], 0…1, descending) and `labels` (int64 [N]).
        """
        shapes = [(int(height), int(width)) for height, width in sizes.tolist()]
        x = self.normalise(images, shapes)
        features = self.backbone(x)
        proposals, rpn_losses = self.rpn(ImageList(x, shapes), features, targets)
        detections, roi_losses = self.roi_heads(features, proposals, shapes, targets)
        return {**rpn_losses, **roi_losses} if self.training else detections

    def normalise(self, images: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Zero mean, unit variance; the padding is exactly 0, as torchvision pads after it normalises."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        for image, (height, width) in zip(x, shapes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return x


def faster_rcnn(
    body: nn.Module,
    num_classes: int,
    *,
    fpn_channels: int = 256,
    anchor_scales: Sequence[float] = (8,),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rpn_batch: int = 256,
    proposals_train: int = 2000,
    proposals_test: int = 1000,
    roi_batch: int = 512,
    roi_canonical_size: int = 224,
    head_channels: int = 1024,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections: int = 100,
) -> RCNN:
    """Faster R-CNN on an FPN (Lin et al., arXiv 1612.03144, §4.2), with torchvision's settings as defaults.

    Args:
        body: gives c2…c5 (`resnext_backbones`, or anything that passes `check_backbone`).
        num_classes: classes without the background; labels are 1…num_classes.
        fpn_channels: channels of p2…p6.
        anchor_scales, aspect_ratios: see `StridedAnchors`.
        rpn_batch: anchors an image the proposal network's loss is computed on.
        proposals_train, proposals_test: boxes kept a level before suppression, and an image after it.
        roi_batch: proposals an image the box head's loss is computed on.
        roi_canonical_size: side in pixels of the region that is pooled from p4 (FPN, equation 1).
        head_channels: width of the box head's two layers.
        score_threshold, nms_threshold, detections: what is reported of an image at most.
    """
    backbone = FPN(body, fpn_channels)
    strides = {name: spec.stride for name, spec in backbone.features.items()}
    anchors = StridedAnchors(list(strides.values()), anchor_scales, aspect_ratios)
    top_n = {"training": proposals_train, "testing": proposals_test}
    rpn = RegionProposalNetwork(
        anchors,
        Float32RPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n=top_n,
        post_nms_top_n=top_n,
        nms_thresh=0.7,
    )
    pooled = dict(list(backbone.features.items())[: len(backbone.levels)])  # without the extra level
    roi_heads = RoIHeads(
        roi_align(pooled, 7, roi_canonical_size),
        TwoMLPHead(fpn_channels * 7 * 7, head_channels),
        Float32Predictor(head_channels, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=detections,
    )
    return RCNN(backbone, rpn, roi_heads)


def roi_align(
    features: Mapping[str, FeatureSpec], output_size: int, canonical_size: int
) -> MultiScaleRoIAlign:
    """RoIAlign over several levels by their declared strides (FPN, equation 1), none of them inferred."""
    pool = MultiScaleRoIAlign(list(features), output_size, sampling_ratio=2, canonical_scale=canonical_size)
    strides = [spec.stride for spec in features.values()]
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in strides]
    pool.map_levels = LevelMapper(levels[0], levels[-1], canonical_scale=canonical_size)
    return pool
