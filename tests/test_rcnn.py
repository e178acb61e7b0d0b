"""The two-stage detectors against torchvision's own, on the same weights and pixels."""

import pytest
import torch
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, box_iou

from resnext_backbones import FPN, UsageError, resnet18, resnet50, resnext26_32x4d
from tasks.models.anchors import StridedAnchors
from tasks.models.rcnn import (
    Float32KeypointPredictor,
    Float32MaskPredictor,
    faster_rcnn,
    keypoint_rcnn,
    mask_rcnn,
)

LEVELS = ["p2", "p3", "p4", "p5"]
SMALL = {"fpn_channels": 32, "head_channels": 64, "rpn_batch": 32, "roi_batch": 32, "proposals_train": 50}
EXTRA = {
    "faster": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "mask": {"loss_mask"},
    "keypoint": {"loss_keypoint"},
}


def build(kind, **settings):
    match kind:
        case "faster":
            return faster_rcnn(resnet18(), 4, **SMALL, **settings)
        case "mask":
            return mask_rcnn(resnet18(), 4, mask_channels=16, **SMALL, **settings)
        case "keypoint":
            return keypoint_rcnn(resnet18(), 4, 5, keypoint_channels=16, **SMALL, **settings)


def targets(*boxes_of_image):
    return [
        {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.ones(len(boxes), dtype=torch.int64),
        }
        for boxes in boxes_of_image
    ]


@pytest.fixture(scope="module", params=["faster", "mask", "keypoint"])
def pair(request):
    """Ours and torchvision's with the same random weights and a lively box head."""
    torch.manual_seed(0)
    ours = build(request.param, score_threshold=0.0, detections=20).eval()
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 5, 10)  # keeps activations in range without training
    torch.nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.3)
    theirs = FasterRCNN(
        FPN(resnet18(), 32),
        min_size=128,
        max_size=160,
        box_score_thresh=0.0,
        box_detections_per_img=20,
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=50,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=32,
        box_head=TwoMLPHead(32 * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, 5),
    )
    theirs.rpn.anchor_generator = AnchorGenerator(
        tuple((8 * s,) for s in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5
    )
    heads = theirs.roi_heads
    heads.box_roi_pool.featmap_names = LEVELS
    if request.param == "mask":
        heads.mask_roi_pool = MultiScaleRoIAlign(LEVELS, 14, 2)
        heads.mask_head = MaskRCNNHeads(32, (16,) * 4, 1)
        heads.mask_predictor = MaskRCNNPredictor(16, 16, 5)
    if request.param == "keypoint":
        heads.keypoint_roi_pool = MultiScaleRoIAlign(LEVELS, 14, 2)
        heads.keypoint_head = KeypointRCNNHeads(32, (16,) * 8)
        heads.keypoint_predictor = KeypointRCNNPredictor(16, 5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval(), request.param


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_parameters_are_torchvisions(kind):
    with torch.device("meta"):
        match kind:
            case "faster":
                ours, theirs = faster_rcnn(resnet50(), 90), FasterRCNN(FPN(resnet50()), 91)
            case "mask":
                ours, theirs = mask_rcnn(resnet50(), 90), MaskRCNN(FPN(resnet50()), 91)
            case "keypoint":
                ours = keypoint_rcnn(resnet50(), 1, 17)
                theirs = KeypointRCNN(FPN(resnet50()), 2, num_keypoints=17)
    names = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert names[0] == names[1]


def test_detections_are_torchvisions(pair, monkeypatch):
    ours, theirs, kind = pair
    # Theirs pastes masks and renames nothing; the heads' own answers are compared.
    monkeypatch.setattr(theirs.transform, "postprocess", lambda found, *_: found)
    image = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    with torch.no_grad():
        (mine,) = ours(image[None], torch.tensor([[128, 160]]))
        (other,) = theirs([image / 255])
    assert len(mine["boxes"]) > 10
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-3)
    if kind == "mask":
        assert mine["masks"].shape == (20, 28, 28)
        torch.testing.assert_close(mine["masks"], other["masks"][:, 0], rtol=1e-4, atol=1e-4)
    if kind == "keypoint":
        assert mine["keypoints"].shape == (20, 5, 3)
        torch.testing.assert_close(mine["keypoints"], other["keypoints"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine["keypoint_scores"], other["keypoints_scores"], rtol=1e-4, atol=1e-3)


def test_losses_are_torchvisions(pair, monkeypatch):
    ours, theirs, kind = pair
    images, sizes = torch.randint(0, 256, (1, 3, 128, 160), dtype=torch.uint8), [(128, 160)]
    truth = targets([[10, 10, 60, 60], [30, 40, 90, 120]])
    truth[0]["masks"] = (torch.rand(2, 128, 160) > 0.5).to(torch.uint8)
    truth[0]["keypoints"] = torch.rand(2, 5, 3) * torch.tensor([100, 100, 1]) + torch.tensor([0, 0, 0.5])
    truth[0]["keypoints"][..., 2].round_()
    # The same normalised pixels: a last bit's difference could decide which proposals are sampled.
    same = ImageList(ours.normalise(images, sizes), sizes)
    monkeypatch.setattr(theirs.transform, "forward", lambda *_: (same, truth))
    for model in (ours, theirs):
        model.train().backbone.eval()  # batch statistics of one image would magnify rounding
    torch.manual_seed(1)
    mine = ours(images, torch.tensor(sizes), truth)
    torch.manual_seed(1)
    other = theirs([images[0] / 255], truth)
    for model in (ours, theirs):
        model.eval()
    assert set(mine) == EXTRA["faster"] | EXTRA[kind]
    assert all(loss > 0 for loss in mine.values())
    for name, loss in mine.items():
        torch.testing.assert_close(loss, other[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("predictor", [Float32MaskPredictor(8, 8, 3), Float32KeypointPredictor(8, 3)])
def test_predictors_answer_in_float32(predictor):
    """Whatever autocast does to the operations behind their convolutions, which differs by device."""
    assert predictor.bfloat16()(torch.randn(2, 8, 14, 14, dtype=torch.bfloat16)).dtype == torch.float32


def test_heatmaps_are_enlarged_in_float32():
    torch.manual_seed(0)
    predictor = Float32KeypointPredictor(8, 3).bfloat16()
    (heatmap, *_) = predictor(torch.randn(1, 8, 14, 14, dtype=torch.bfloat16))[0]
    assert not torch.equal(heatmap, heatmap.bfloat16().float())


def test_keypoints_are_refused_without_any():
    with pytest.raises(UsageError, match="num_keypoints=0"):
        keypoint_rcnn(resnet18(), 1, 0)


def test_anchors_follow_declared_strides():
    # torchvision infers 30 // 4 = 7 as the stride of a map of 4 cells over 30 pixels; declared is 8.
    anchors = StridedAnchors([8], scales=[2], aspect_ratios=[1.0])
    images = type("Images", (), {"image_sizes": [(30, 30)], "tensors": torch.zeros(1, 3, 30, 30)})()
    (boxes,) = anchors(images, [torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)])
    assert boxes.dtype == torch.float32
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres[:4, 0].tolist() == [0, 8, 16, 24]
    assert (boxes[:, 2:] - boxes[:, :2]).unique().tolist() == [16]


def test_boxes_and_scores_are_float32_and_exact_under_autocast():
    torch.manual_seed(0)
    model = faster_rcnn(resnext26_32x4d(), 3, **SMALL, score_threshold=0.0).eval()
    images, sizes = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8), torch.tensor([[128, 128]])
    seen = {}
    decode = model.rpn.box_coder.decode
    model.rpn.box_coder.decode = lambda deltas, anchors: seen.setdefault("boxes", decode(deltas, anchors))
    head = model.rpn.head.register_forward_hook(lambda module, x, out: seen.setdefault("head", out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model(images, sizes)
    head.remove()
    assert found["boxes"].dtype == found["scores"].dtype == seen["boxes"].dtype == torch.float32
    assert all(deltas.dtype == torch.float32 for level in seen["head"] for deltas in level)
    # The same deltas decoded in float64: boxes of 16 pixels keep their place in a picture of 1,333.
    coder, far = (
        model.rpn.box_coder,
        torch.tensor([[1300.3, 780.7, 1316.3, 796.7]]).repeat(len(found["boxes"]), 1),
    )
    deltas = torch.randn(len(far), 4) * 0.1
    with torch.autocast("cpu", torch.bfloat16):
        boxes = decode(deltas, [far])[:, 0]
    exact = coder.decode_single(deltas.double(), far.double())
    assert torch.diag(box_iou(boxes.double(), exact)).min() >= 0.99


def test_scores_keep_their_order_under_autocast():
    """Rounded to bfloat16's eight bits, of 16,368 scores 1,949 were distinct."""
    torch.manual_seed(0)
    model = faster_rcnn(resnet18(), 3, **SMALL).eval()
    seen = []
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(lambda module, x, out: seen.append(out))
    images, sizes = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8), torch.tensor([[128, 128]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images, sizes)
    (objectness, _), (logits, _) = seen
    for scores in (torch.cat([level.flatten() for level in objectness]), logits.flatten()):
        assert len(scores) > 1000
        assert len(scores.unique()) > 0.99 * len(scores)


def test_padding_does_not_reach_the_network():
    model = faster_rcnn(resnet18(), 3, **SMALL)
    images = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    normalised = model.normalise(images, [(40, 48)])
    assert normalised[:, :, 40:].abs().max() == 0
    assert normalised[:, :, :, 48:].abs().max() == 0
    assert normalised[:, :, :40, :48].abs().min() > 0


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [  # torchvision's 2000 and 1000, before and after it; Detectron2's 2000 and 1000 in training
        ({}, (2000, 1000), (2000, 1000)),
        ({"proposals_train": 300, "proposals_test": 200}, (300, 200), (300, 200)),
        ({"candidates_train": 2000, "proposals_train": 1000}, (2000, 1000), (1000, 1000)),
        ({"candidates_test": 500}, (2000, 500), (2000, 1000)),
    ],
)
@pytest.mark.parametrize("builder", [faster_rcnn, mask_rcnn])
def test_as_many_candidates_as_proposals_unless_given(builder, settings, before, after):
    with torch.device("meta"):
        rpn = builder(resnet18(), 3, **settings).rpn
    for mode, most, kept in zip((True, False), before, after, strict=True):
        rpn.training = mode
        assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (most, kept)


@pytest.mark.parametrize(
    ("builder", "frozen", "expected"),
    [  # published for torchvision's layout with 91 classes, frozen norms, every layer counted
        ("resnext50_32x4d", True, 41_212_054),
        ("resnext50_32x4d", False, 41_280_278),
        ("resnext101_32x8d", True, 104_839_830),
        ("resnext101_64x4d", True, 99_503_766),
    ],
)
def test_parameter_counts(builder, frozen, expected):
    import resnext_backbones

    with torch.device("meta"):
        body = getattr(resnext_backbones, builder)()
        if frozen:
            resnext_backbones.freeze_norms(body)
        model = faster_rcnn(body, 90)
    assert sum(p.numel() for p in model.parameters()) == expected
