"""Two-stage detectors: torchvision's proposal network and heads over a backbone that declares its strides."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_inference, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from resnext_backbones import FPN, UsageError
from tasks.models.anchors import StridedAnchors
from tasks.models.evaluation import evaluating
from tasks.models.normalise import Normalised, shapes_of
from tasks.models.parts import ClassLayer, Part
from tasks.models.strides import refuse_fine_strides

HEADS = {  # of a region, and what decides on them (`Part.keys`)
    "box": ("model.head_channels", "model.roi_canonical_size"),
    "mask": ("model.mask_channels", "model.roi_canonical_size"),
    "keypoint": ("model.keypoint_channels", "model.roi_canonical_size"),
}


class Float32RPNHead(RPNHead):
    """torchvision's head, whose last layers compute scores and deltas in float32 also under autocast.

    torchvision decodes boxes in the deltas' dtype: in bfloat16 a small object loses a fifth of its IoU. And
    most bfloat16 scores have equals, among which mere order would decide what is kept.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(level) for level in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            hidden = [level.float() for level in hidden]
            return [self.cls_logits(level) for level in hidden], [self.bbox_pred(level) for level in hidden]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's predictor, whose two layers compute scores and deltas in float32 also under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Float32MaskPredictor(MaskRCNNPredictor):
    """torchvision's predictor, whose logits leave it as float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Float32KeypointPredictor(KeypointRCNNPredictor):
    """torchvision's predictor, whose heatmaps are enlarged in float32: a maximum is looked for in them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.kps_score_lowres(x).float()
        x = F.interpolate(x, scale_factor=self.up_scale, mode="bilinear", align_corners=False)
        return x.contiguous()  # torchvision's loss takes a view of it, which channels last do not allow


class RCNN(Normalised):
    """A backbone, a region proposal network and the heads of its regions (Ren et al., arXiv 1506.01497).

    Parameters carry torchvision's names (`backbone.body.*`, `backbone.fpn.*`, `rpn.*`, `roi_heads.*`).
    """

    def __init__(self, backbone: FPN, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("FPN", ("backbone.fpn",), ("model.fpn_channels",)),
            Part("RPN", ("rpn",), ("model.anchor_scales", "model.aspect_ratios")),
            *(
                Part(f"{kind} head", (f"roi_heads.{kind}_head", f"roi_heads.{kind}_predictor"), keys)
                for kind, keys in HEADS.items()
                if getattr(self.roi_heads, f"{kind}_head") is not None
            ),
        )

    @property
    def class_layers(self) -> tuple[ClassLayer, ...]:
        layers = [
            ClassLayer("roi_heads.box_predictor.cls_score"),
            ClassLayer("roi_heads.box_predictor.bbox_pred", rows=4),
        ]
        if self.roi_heads.has_mask():
            layers.append(ClassLayer("roi_heads.mask_predictor.mask_fcn_logits"))
        if self.roi_heads.has_keypoint():
            name = "roi_heads.keypoint_predictor.kps_score_lowres"
            layers.append(ClassLayer(name, background=False, of="keypoints", transposed=True))
        return tuple(layers)

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses in training mode, the detections otherwise.

        Args:
            images: uint8 [B, 3, H, W], RGB, padded at the right and at the bottom.
            sizes: int64 [B, 2], height and width of each image within its padding.
            targets: in training mode, for each image `boxes` (float32 [N, 4], xyxy, pixels) and `labels`
                (int64 [N], 1…K); N may be 0. With a mask head also `masks` (uint8 [N, h, w], 0 or 1), with a
                keypoint head `keypoints` (float32 [N, k, 3]: x, y, visibility).

        Returns:
            In training mode four scalars: `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`,
            `loss_box_reg`; with their heads `loss_mask`, `loss_keypoint`. Otherwise for each image `boxes`
            (float32 [N, 4], xyxy, pixels of the given image), `scores` (float32 [N], 0…1, descending) and
            `labels` (int64 [N]); with their heads `masks` (float32 [N, 28, 28], 0…1, of the box's inside),
            `keypoints` (float32 [N, k, 3]: x, y, 1) and `keypoint_scores` (float32 [N, k], heatmap's logits).
        """
        given, features = self._features(images, sizes)
        if self.training:
            return self._losses(given, features, targets)
        return self._detections(given, features)

    def evaluate(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, and the losses that training would compute, from one pass through the backbone.

        Norms and dropout stay in evaluation mode. What is sampled for the losses is drawn from a fixed seed,
        and the random state is left as it was. Arguments and results are those of `forward`.
        """
        with evaluating(self, images.device):
            given, features = self._features(images, sizes)
            detections = self._detections(given, features)
            # Only these two, not the layers in them: they sample, and give losses for detections.
            self.rpn.training = self.roi_heads.training = True
            return detections, self._losses(given, features, targets)

    def maps(
        self, images: Tensor, sizes: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """What the heads see in given boxes, before it is cut out or a maximum is taken.

        Args:
            images, sizes: see `forward`.
            boxes, labels: for each image float32 [N, 4], xyxy, in its pixels, and int64 [N], 1…K.

        Returns:
            For each image, with their heads, `masks` (float32 [N, 28, 28], 0…1, of the box's inside, of the
            label's class) and `heatmaps` (float32 [N, k, 56, 56], logits).
        """
        given, features = self._features(images, sizes)
        heads, regions, shapes = self.roi_heads, list(boxes), given.image_sizes
        found: list[dict[str, Tensor]] = [{} for _ in regions]
        if heads.has_mask():
            inner = heads.mask_head(heads.mask_roi_pool(features, regions, shapes))
            masks = maskrcnn_inference(heads.mask_predictor(inner), list(labels))
            for result, of_image in zip(found, masks, strict=True):
                result["masks"] = of_image[:, 0]
        if heads.has_keypoint():
            inner = heads.keypoint_head(heads.keypoint_roi_pool(features, regions, shapes))
            heatmaps = heads.keypoint_predictor(inner).split([len(of_image) for of_image in regions])
            for result, of_image in zip(found, heatmaps, strict=True):
                result["heatmaps"] = of_image
        return found

    def of_maps(self, maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        """An image's `masks`, `keypoints` and `keypoint_scores`, as `forward` gives them, from its `maps`."""
        found = {"masks": maps["masks"]} if "masks" in maps else {}
        if "heatmaps" in maps:
            (points,), (scores,) = keypointrcnn_inference(maps["heatmaps"], [boxes])
            found |= {"keypoints": points, "keypoint_scores": scores}
        return found

    def _features(self, images: Tensor, sizes: Tensor) -> tuple[ImageList, dict[str, Tensor]]:
        shapes = shapes_of(sizes)
        x = self.normalise(images, shapes)
        return ImageList(x, shapes), self.backbone(x)

    def _losses(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        proposals, rpn_losses = self.rpn(images, features, targets)
        _, roi_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**rpn_losses, **roi_losses}

    def _detections(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(features, proposals, images.image_sizes)
        for found in detections:
            if "masks" in found:
                found["masks"] = found["masks"][:, 0]
            if "keypoints" in found:
                found["keypoint_scores"] = found.pop("keypoints_scores")
        return detections


def faster_rcnn(
    body: nn.Module,
    num_classes: int,
    *,
    fpn_channels: int = 256,
    anchor_scales: Sequence[float] = (8,),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rpn_batch: int = 256,
    candidates_train: int | None = None,
    candidates_test: int | None = None,
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
        candidates_train, candidates_test: boxes kept a level before suppression; None: as many as proposals.
        proposals_train, proposals_test: boxes kept an image after it.
        roi_batch: proposals an image the box head's loss is computed on.
        roi_canonical_size: side in pixels of the region that is pooled from p4 (FPN, equation 1).
        head_channels: width of the box head's two layers.
        score_threshold, nms_threshold, detections: what is reported of an image at most.

    Raises `UsageError` for a body that cannot carry a pyramid, or whose finest map has a stride below 4.
    """
    backbone = FPN(body, fpn_channels)
    refuse_fine_strides("R-CNN", body, backbone.features)
    strides = {name: spec.stride for name, spec in backbone.features.items()}
    anchors = StridedAnchors(list(strides.values()), anchor_scales, aspect_ratios)
    candidates = {
        "training": proposals_train if candidates_train is None else candidates_train,
        "testing": proposals_test if candidates_test is None else candidates_test,
    }
    rpn = RegionProposalNetwork(
        anchors,
        Float32RPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n=candidates,
        post_nms_top_n={"training": proposals_train, "testing": proposals_test},
        nms_thresh=0.7,
    )
    roi_heads = RoIHeads(
        roi_align(backbone, 7, roi_canonical_size),
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


def mask_rcnn(
    body: nn.Module,
    num_classes: int,
    *,
    mask_channels: int = 256,
    roi_canonical_size: int = 224,
    **settings: Any,
) -> RCNN:
    """Mask R-CNN on an FPN (He et al., arXiv 1703.06870, figure 4, right): Faster R-CNN and a head of masks.

    Four 3×3 convolutions on regions of 14×14, enlarged to 28×28, and one mask a class, each by its own
    sigmoid.

    Args:
        mask_channels: width of the mask head.
        settings: those of `faster_rcnn`.
    """
    model = faster_rcnn(body, num_classes, roi_canonical_size=roi_canonical_size, **settings)
    heads, channels = model.roi_heads, model.backbone.out_channels
    heads.mask_roi_pool = roi_align(model.backbone, 14, roi_canonical_size)
    heads.mask_head = MaskRCNNHeads(channels, (mask_channels,) * 4, dilation=1)
    heads.mask_predictor = Float32MaskPredictor(mask_channels, mask_channels, num_classes + 1)
    return model


def keypoint_rcnn(
    body: nn.Module,
    num_classes: int,
    num_keypoints: int,
    *,
    keypoint_channels: int = 512,
    roi_canonical_size: int = 224,
    **settings: Any,
) -> RCNN:
    """Keypoint R-CNN on an FPN (He et al., arXiv 1703.06870, §5): Faster R-CNN and a head of heatmaps.

    Eight 3×3 convolutions on regions of 14×14, enlarged to 56×56; a keypoint is the one cell of its heatmap
    that a softmax over all of them has to find. All classes share the heatmaps.

    Args:
        num_keypoints: of an object, 17 in COCO.
        keypoint_channels: width of the keypoint head.
        settings: those of `faster_rcnn`.

    Raises `UsageError` for fewer than one keypoint.
    """
    if num_keypoints < 1:
        raise UsageError(f"keypoint_rcnn: num_keypoints={num_keypoints}, but it needs one at least")
    model = faster_rcnn(body, num_classes, roi_canonical_size=roi_canonical_size, **settings)
    heads, channels = model.roi_heads, model.backbone.out_channels
    heads.keypoint_roi_pool = roi_align(model.backbone, 14, roi_canonical_size)
    heads.keypoint_head = KeypointRCNNHeads(channels, (keypoint_channels,) * 8)
    heads.keypoint_predictor = Float32KeypointPredictor(keypoint_channels, num_keypoints)
    return model


def roi_align(backbone: FPN, output_size: int, canonical_size: int) -> MultiScaleRoIAlign:
    """RoIAlign over the body's levels by their declared strides (FPN, equation 1), none of them inferred."""
    features = dict(list(backbone.features.items())[: len(backbone.levels)])  # without the extra level
    pool = MultiScaleRoIAlign(list(features), output_size, sampling_ratio=2, canonical_scale=canonical_size)
    strides = [spec.stride for spec in features.values()]
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in strides]
    pool.map_levels = LevelMapper(levels[0], levels[-1], canonical_scale=canonical_size)
    return pool
