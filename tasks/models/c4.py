"""Faster R-CNN without a pyramid: proposals and regions from c4, conv5 as the head of each region."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from resnext_backbones import FeatureSpec, ResNeXt, UsageError
from resnext_backbones.recompute import recomputed
from tasks.models.anchors import StridedAnchors
from tasks.models.parts import Part
from tasks.models.rcnn import RCNN, Float32Predictor, Float32RPNHead

LEVELS = ["c2", "c3", "c4", "c5"]


class C4(nn.Module):
    """A body up to c4; itself a `Backbone`.

    The body keeps its last stage, which the regions' head runs (`C5OnRegions`), so its weights have the names
    they have under every other model, and it is frozen by the same stages.

    Args:
        body: one of this project's for ImageNet. It gives c2 … c4 from now on.

    Raises `UsageError` for a body whose c5 is not one stage of its own.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        if not isinstance(body, ResNeXt) or list(body.features) != LEVELS or body.norm is not None:
            raise UsageError(
                f"model=faster_rcnn_c4: {type(body).__name__} has no c5 that can be run on regions alone; "
                "take a backbone of this project for ImageNet, without pre-activation, or model=faster_rcnn"
            )
        self.body = body
        self.c5_channels = body.features.pop("c5").channels  # ResNeXt runs as far as its `features` go
        self.features: dict[str, FeatureSpec] = {"c4": body.features["c4"]}
        self.out_channels = self.features["c4"].channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float (N, 3, H, W), to {"c4": (N, C, ⌈H/16⌉, ⌈W/16⌉)}."""
        return {"c4": self.body(images)["c4"]}


class C4RCNN(RCNN):
    """R-CNN on c4; what it is made of, for the hand-over of weights."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("RPN", ("rpn",), ("model.rpn_channels", "model.anchor_scales", "model.aspect_ratios")),
            Part("box head", ("roi_heads.box_predictor",), ("backbone",)),
        )


class C5OnRegions(nn.Module):
    """The body's last stage on each region, and the mean of what comes out (arXiv 1512.03385, appendix A).

    It has no parameters of its own: they are the body's.
    """

    def __init__(self, body: ResNeXt) -> None:
        super().__init__()
        self._body = (body,)  # in a tuple, or its parameters would have two names

    def forward(self, regions: Tensor) -> Tensor:
        """Regions of c4, float [N, C, 14, 14], to one vector each, [N, C5]."""
        (body,) = self._body
        recompute = body.activation_checkpointing and torch.is_grad_enabled()
        for block in body.get_submodule("layer4").children():
            regions = recomputed(block, regions) if recompute else block(regions)
        return regions.mean(dim=(2, 3))


def faster_rcnn_c4(
    body: nn.Module,
    num_classes: int,
    *,
    anchor_scales: Sequence[float] = (2, 4, 8, 16, 32),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rpn_channels: int = 512,
    rpn_batch: int = 256,
    candidates_train: int = 12000,
    candidates_test: int = 6000,
    proposals_train: int = 2000,
    proposals_test: int = 1000,
    roi_batch: int = 512,
    region_size: int = 14,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections: int = 100,
) -> C4RCNN:
    """Faster R-CNN as the ResNet and ResNeXt papers have it (arXiv 1512.03385, appendix A; 1611.05431, §5.4).

    One map, c4 (stride 16), gives proposals; each region of it goes through conv5 of its own. Defaults are
    Detectron2's (configs/Base-RCNN-C4.yaml), with RoIAlign in place of the papers' RoI pooling.

    Args:
        body: one of this project's for ImageNet (see `C4`).
        num_classes: classes without the background; labels are 1…num_classes.
        anchor_scales: sides of the square anchors ÷ 16, the stride; 2 … 32 are 32 … 512 pixels.
        aspect_ratios: height ÷ width.
        rpn_channels: of the proposal network's 3×3 convolution; 512 in py-faster-rcnn, Detectron2 takes c4's.
        rpn_batch: anchors an image the proposal network's loss is computed on.
        candidates_train, candidates_test: boxes kept before suppression.
        proposals_train, proposals_test: boxes kept after it.
        roi_batch: proposals an image the box head's loss is computed on.
        region_size: cells a side that a region is pooled to; conv5 halves them.
        score_threshold, nms_threshold, detections: what is reported of an image at most.

    Raises `UsageError` for a body whose c5 is not one stage of its own.
    """
    backbone = C4(body)
    stride = backbone.features["c4"].stride
    anchors = StridedAnchors([stride], anchor_scales, aspect_ratios)
    rpn = RegionProposalNetwork(
        anchors,
        rpn_head(backbone.out_channels, rpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n={"training": candidates_train, "testing": candidates_test},
        post_nms_top_n={"training": proposals_train, "testing": proposals_test},
        nms_thresh=0.7,
    )
    pool = MultiScaleRoIAlign(["c4"], region_size, sampling_ratio=2)
    pool.scales, pool.map_levels = [1 / stride], LevelMapper(0, 0)  # declared; one level needs no mapping
    roi_heads = RoIHeads(
        pool,
        C5OnRegions(backbone.body),
        Float32Predictor(backbone.c5_channels, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=detections,
    )
    return C4RCNN(backbone, rpn, roi_heads)  # type: ignore[arg-type]  # which only calls its backbone


def rpn_head(in_channels: int, channels: int, num_anchors: int) -> Float32RPNHead:
    """torchvision's head with a first convolution to another number of channels."""
    head = Float32RPNHead(channels, num_anchors)
    first: Any = head.conv[0]
    first[0] = nn.Conv2d(in_channels, channels, 3, padding=1)
    nn.init.normal_(first[0].weight, std=0.01)
    nn.init.zeros_(first[0].bias)
    return head
