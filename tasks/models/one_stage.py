"""One-stage detectors: torchvision's RetinaNet and FCOS over a pyramid that declares its strides."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from resnext_backbones import FPN, UsageError
from tasks.models.anchors import StridedAnchors
from tasks.models.evaluation import evaluating
from tasks.models.normalise import Normalised, shapes_of
from tasks.models.parts import ClassLayer, Part
from tasks.models.strides import refuse_fine_strides


class Predictions(NamedTuple):
    """What the head says of a batch, A anchors an image in the order of levels, rows, columns."""

    outputs: dict[str, Tensor]  # float32 [B, A, …]: class logits, deltas, FCOS' centerness
    anchors: list[Tensor]  # float32 [A, 4] for each image
    levels: list[int]  # anchors of each level
    shapes: list[tuple[int, int]]


class OneStage(Normalised):
    """The face that all detectors have here, over torchvision's losses and suppression.

    Boxes, suppression and losses are float32, also under autocast. The head's last convolutions are not: in
    float32, a training step at 800×1333 took a tenth longer on a CPU. So bfloat16 leaves equal scores, among
    which order decides what is kept; `trainer.precision=32-true` does not.

    Labels are 1…K. As in torchvision, the head has K + 1 logits, of which the first, the background's, is
    never a target, so that networks published with 91 classes load with K = 90. Here it is never reported.
    """

    # What torchvision's half brings along.
    backbone: FPN
    head: Callable[[list[Tensor]], dict[str, Tensor]]
    anchor_generator: StridedAnchors
    compute_loss: Callable[..., dict[str, Tensor]]
    postprocess_detections: Callable[..., list[dict[str, Tensor]]]

    head_keys: tuple[str, ...] = ("model.fpn_channels",)  # see `Part.keys`
    names: Mapping[str, str] = {
        "classification": "loss_classifier",
        "bbox_regression": "loss_box_reg",
        "bbox_ctrness": "loss_centerness",
    }

    def __init__(self, backbone: FPN, num_classes: int, anchors: StridedAnchors, **settings: Any) -> None:
        super().__init__(backbone, num_classes + 1, anchor_generator=anchors, **settings)
        del self.transform  # resizes; images come with the size that they are to have

    @property
    def parts(self) -> tuple[Part, ...]:
        # Named from the outside in: whose name is the longest has a tensor.
        return (
            Part("FPN", ("backbone.fpn",), ("model.fpn_channels",)),
            Part("p6 and p7", ("backbone.fpn.extra_blocks",), ("model.extra_levels",)),
            Part("class head", ("head.classification_head",), self.head_keys),
            Part("box head", ("head.regression_head",), self.head_keys),
        )

    @property
    def class_layers(self) -> tuple[ClassLayer, ...]:
        per_cell = self.anchor_generator.num_anchors_per_location()[0]
        return (ClassLayer("head.classification_head.cls_logits", groups=per_cell),)

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
            In training mode the scalars `loss_classifier`, `loss_box_reg` and, of FCOS, `loss_centerness`.
            Otherwise for each image `boxes` (float32 [N, 4], xyxy, pixels of the given image), `scores`
            (float32 [N], 0…1, descending) and `labels` (int64 [N], 1…K).
        """
        predictions = self._predictions(images, sizes)
        if not self.training:
            return self._detections(predictions)
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training mode")
        return self._losses(predictions, targets)

    def evaluate(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, and the losses that training would compute, from one pass through the network.

        Norms stay in evaluation mode. Arguments and results are those of `forward`.
        """
        with evaluating(self, images.device):
            predictions = self._predictions(images, sizes)
            return self._detections(predictions), self._losses(predictions, targets)

    def _predictions(self, images: Tensor, sizes: Tensor) -> Predictions:
        shapes = shapes_of(sizes)
        x = self.normalise(images, shapes)
        maps = list(self.backbone(x).values())
        outputs = {name: output.float() for name, output in self.head(maps).items()}
        anchors = self.anchor_generator(ImageList(x, shapes), maps)
        per_cell = self.anchor_generator.num_anchors_per_location()
        levels = [n * level.shape[-2] * level.shape[-1] for n, level in zip(per_cell, maps, strict=True)]
        return Predictions(outputs, anchors, levels, shapes)

    def _losses(self, predictions: Predictions, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.compute_loss(targets, predictions.outputs, predictions.anchors)
        return {self.names[name]: loss for name, loss in losses.items()}

    def _detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        outputs, anchors, levels, shapes = predictions
        outputs = {**outputs, "cls_logits": outputs["cls_logits"][..., 1:]}
        detections = self.postprocess_detections(
            {name: list(output.split(levels, dim=1)) for name, output in outputs.items()},
            [list(boxes.split(levels)) for boxes in anchors],
            shapes,
        )
        for found in detections:
            found["labels"] = found["labels"] + 1
        return detections


class RetinaNet(OneStage, detection.RetinaNet):
    """RetinaNet (Lin et al., arXiv 1708.02002); parameters carry torchvision's names."""

    head_keys = ("model.anchor_scales", "model.aspect_ratios", "model.head_norm")


class FCOS(OneStage, detection.FCOS):
    """FCOS (Tian et al., arXiv 1904.01355); parameters carry torchvision's names."""

    def _losses(self, predictions: Predictions, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.compute_loss(targets, predictions.outputs, predictions.anchors, predictions.levels)
        return {self.names[name]: loss for name, loss in losses.items()}


def retinanet(
    body: nn.Module,
    num_classes: int,
    *,
    fpn_channels: int = 256,
    extra_levels: Literal["conv_c5", "conv_p5"] = "conv_c5",
    anchor_scales: Sequence[float] = (4, 5.0397, 6.3496),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    head_norm: Literal["group"] | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    candidates: int = 1000,
    detections: int = 100,
) -> RetinaNet:
    """RetinaNet on p3 … p7 (Lin et al., arXiv 1708.02002, §4): nine anchors a cell, focal loss.

    Args:
        body: gives … c3, c4, c5 (`resnext_backbones`, or anything that passes `check_backbone`).
        num_classes: classes without the background; labels are 1…num_classes.
        fpn_channels: of every level and of the heads.
        extra_levels: what p6 and p7 are made from: c5 as in the paper, or p5 as in torchvision's
            `RetinaNet_ResNet50_FPN_Weights`, which so load.
        anchor_scales: see `StridedAnchors`; here 4 × 2^(0, 1/3, 2/3), torchvision's before it rounds them.
        aspect_ratios: height ÷ width.
        head_norm: None as in the paper, or "group", 32 groups, as in torchvision's second RetinaNet, whose
            weights so load.
        score_threshold, nms_threshold, detections: what is reported of an image at most.
        candidates: boxes kept a level before suppression.

    Raises `UsageError` for another norm, where group norm does not fit `fpn_channels`, and for a body that
    cannot carry the pyramid, or whose c3 has a stride below 4.
    """
    if head_norm not in (None, "group"):
        raise UsageError(f"retinanet: head_norm={head_norm!r} must be group or null")
    if head_norm == "group":
        _check_groups("retinanet", fpn_channels)
    backbone = FPN(body, fpn_channels, extra_levels, finest="c3")
    refuse_fine_strides("RetinaNet", body, backbone.features)
    strides = [spec.stride for spec in backbone.features.values()]
    anchors = StridedAnchors(strides, anchor_scales, aspect_ratios)
    norm = partial(nn.GroupNorm, 32) if head_norm else None
    per_cell = anchors.num_anchors_per_location()[0]
    return RetinaNet(
        backbone,
        num_classes,
        anchors,
        head=RetinaNetHead(fpn_channels, per_cell, num_classes + 1, norm),
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        topk_candidates=candidates,
        detections_per_img=detections,
    )


def fcos(
    body: nn.Module,
    num_classes: int,
    *,
    fpn_channels: int = 256,
    center_sampling_radius: float = 1.5,
    score_threshold: float = 0.2,
    nms_threshold: float = 0.6,
    candidates: int = 1000,
    detections: int = 100,
) -> FCOS:
    """FCOS on p3 … p7 (Tian et al., arXiv 1904.01355), with torchvision's settings as defaults.

    Args:
        body: gives … c3, c4, c5 (`resnext_backbones`, or anything that passes `check_backbone`).
        num_classes: classes without the background; labels are 1…num_classes.
        fpn_channels: of every level and of the heads, whose norms have 32 groups.
        center_sampling_radius: an object is learned by cells at most so many strides from its centre (arXiv
            2006.09214, §2.1).
        score_threshold: of √(probability × centerness).
        nms_threshold, detections: what is reported of an image at most.
        candidates: boxes kept a level before suppression.

    Raises `UsageError` where `fpn_channels` is less than 64 or no multiple of 32, and for a body that cannot
    carry the pyramid, or whose c3 has a stride below 4.
    """
    _check_groups("fcos", fpn_channels)
    backbone = FPN(body, fpn_channels, "conv_p5", finest="c3")
    refuse_fine_strides("FCOS", body, backbone.features)
    return FCOS(
        backbone,
        num_classes,
        # One square of one stride a cell: torchvision's way to say where the cell is, and how large.
        StridedAnchors([spec.stride for spec in backbone.features.values()], (1,), (1.0,)),
        center_sampling_radius=center_sampling_radius,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        topk_candidates=candidates,
        detections_per_img=detections,
    )


def _check_groups(name: str, channels: int) -> None:
    """With one channel a group, the single cell of p7 would be normalised by itself, to nothing."""
    if channels % 32 or channels < 64:
        raise UsageError(
            f"{name}: fpn_channels={channels} must be a multiple of 32, the groups of its norms, and 64 "
            "at least"
        )
