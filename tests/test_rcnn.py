"""The detector against torchvision's own, on the same weights and pixels."""

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from resnext_backbones import FPN, resnet18, resnext26_32x4d
from tasks.models.rcnn import StridedAnchors, faster_rcnn

SMALL = {"fpn_channels": 32, "head_channels": 64, "rpn_batch": 32, "roi_batch": 32, "proposals_train": 50}


def targets(*boxes_of_image):
    return [
        {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.ones(len(boxes), dtype=torch.int64),
        }
        for boxes in boxes_of_image
    ]


@pytest.fixture(scope="module")
def pair():
    """Ours and torchvision's Faster R-CNN with the same random weights and a lively box head."""
    torch.manual_seed(0)
    ours = faster_rcnn(resnet18(), 4, score_threshold=0.0).eval()
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 5, 10)  # keeps activations in range without training
    torch.nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.3)
    theirs = FasterRCNN(
        FPN(resnet18()), 5, min_size=128, max_size=160, box_score_thresh=0.0, rpn_pre_nms_top_n_test=1000
    )
    theirs.rpn.anchor_generator = AnchorGenerator(
        tuple((8 * s,) for s in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5
    )
    theirs.roi_heads.box_roi_pool.featmap_names = ["p2", "p3", "p4", "p5"]
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


def test_parameter_names_are_torchvisions(pair):
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_detections_are_torchvisions(pair):
    ours, theirs = pair
    image = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    with torch.no_grad():
        (mine,) = ours(image[None], torch.tensor([[128, 160]]))
        (other,) = theirs([image / 255])
    assert len(mine["boxes"]) > 10
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-3)


def test_losses_are_torchvisions(pair, monkeypatch):
    ours, theirs = pair
    images, sizes = torch.randint(0, 256, (1, 3, 128, 160), dtype=torch.uint8), [(128, 160)]
    truth = targets([[10, 10, 60, 60], [30, 40, 90, 120]])
    # The same normalised pixels: a last bit's difference could decide which proposals are sampled.
    same = ImageList(ours.normalise(images, sizes), sizes)
    monkeypatch.setattr(theirs.transform, "forward", lambda *_: (same, truth))
    for model in pair:
        model.train().backbone.eval()  # batch statistics of one image would magnify rounding
    torch.manual_seed(1)
    mine = ours(images, torch.tensor(sizes), truth)
    torch.manual_seed(1)
    other = theirs([images[0] / 255], truth)
    for model in pair:
        model.eval()
    assert set(mine) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    for name, loss in mine.items():
        torch.testing.assert_close(loss, other[name], rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("boxes", [[], [[4, 4, 60, 60]]])
def test_images_without_objects_train(boxes):
    torch.manual_seed(0)
    model = faster_rcnn(resnet18(), 3, **SMALL).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    losses = model(images, torch.tensor([[64, 64], [50, 40]]), targets([], boxes))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters())


def test_padding_does_not_reach_the_network():
    model = faster_rcnn(resnet18(), 3, **SMALL)
    images = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    normalised = model.normalise(images, [(40, 48)])
    assert normalised[:, :, 40:].abs().max() == 0
    assert normalised[:, :, :, 48:].abs().max() == 0
    assert normalised[:, :, :40, :48].abs().min() > 0


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
