"""What one network hands over to another: bodies from task to task, whole networks, the rows of classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small_checkpoints import BODY, FEW, KINDS, changed, made
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models._api import WeightsEnum

from resnext_backbones import FPN, FrozenBatchNorm2d, ResNeXt, UsageError, load_weights, resnet50, sources
from resnext_backbones.norm import freeze_norms
from resnext_backbones.weights import save_weights
from tasks.building import build, build_task
from tasks.class_rows import match
from tasks.handover import load_network
from tasks.load import load_task
from tasks.models.c4 import C4RCNN, faster_rcnn_c4
from tasks.models.classifier import Classifier
from tasks.models.one_stage import fcos, retinanet
from tasks.models.rcnn import faster_rcnn, keypoint_rcnn, mask_rcnn
from tasks.models.semantic import deeplabv3, semantic_fpn

SIDE = 128  # of the images on which detections are compared
RCNN = {"fpn_channels": 16, "head_channels": 32}
PETS = ("cat", "dog", "bird")
OTHERS = ("dog", "fish", "cat", "horse", "cow")  # of which two are pets


def tiny(**kwargs: Any) -> ResNeXt:
    return ResNeXt((1, 1, 1, 1), block="basic", base_width=8, **kwargs)


BUILD: dict[str, Callable[..., nn.Module]] = {
    "faster": lambda k, **kw: faster_rcnn(tiny(), k, **RCNN | kw),
    "mask": lambda k, **kw: mask_rcnn(tiny(), k, mask_channels=8, **RCNN | kw),
    "keypoint": lambda k, **kw: keypoint_rcnn(
        tiny(), k, kw.pop("points", 2), keypoint_channels=8, **RCNN | kw
    ),
    "retinanet": lambda k, **kw: retinanet(tiny(), k, **{"fpn_channels": 16} | kw),
    "fcos": lambda k, **kw: fcos(tiny(), k, **{"fpn_channels": 64} | kw),
    "semantic": lambda k, **kw: semantic_fpn(tiny(), k, **{"fpn_channels": 16, "head_channels": 64} | kw),
    "deeplab": lambda k, **kw: deeplabv3(tiny(output_stride=8), k),
    "classifier": lambda k, **kw: Classifier(tiny(), k),
}


def body_of(model: nn.Module) -> ResNeXt:
    return next(module for module in model.modules() if isinstance(module, ResNeXt))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor, statistics of norms among them, has numbers that no constructor gives."""
    torch.manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.05)
    return model.eval()


def as_run(
    model: nn.Module, path: Path, classes: tuple[str, ...], points: tuple[str, ...] = (), **settings: Any
) -> str:
    """A checkpoint as a run writes it."""
    record = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "skeleton": {"names": list(points), "edges": []} if points else None,
        "config": {"model": settings, "choices": {"backbone": "tiny"}},
    }
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "record": record}, path)
    return str(path)


def plain(model: nn.Module, path: Path) -> str:
    """A file of a state dict, which says nothing but that."""
    torch.save(model.state_dict(), path)
    return str(path)


def handed(model: nn.Module, source: str, classes: tuple[str, ...], points: tuple[str, ...] = ()) -> Any:
    return load_network(model, body_of(model), source, classes, points)


def refused(model: nn.Module, source: str, *words: str, classes: tuple[str, ...] = PETS) -> None:
    """In one line with these words, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        handed(model, source, classes)
    message = str(caught.value)
    assert "\n" not in message
    assert source in message
    assert all(word in message for word in words), message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# torchvision's detectors, by their names.


@pytest.fixture(scope="module")
def lively() -> dict[str, Tensor]:
    """torchvision's Mask R-CNN with random weights under which much is found, statistics that were measured,
    and variances so small that the norms' eps counts."""
    torch.manual_seed(0)
    net = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=SIDE, max_size=SIDE
    ).train()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the statistics become those of the one batch
    with torch.no_grad():
        net.backbone(torch.randn(2, 3, SIDE, SIDE))
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1).mul_(1e-3**0.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.running_var *= 1e-3
    for layer, std in (
        (net.rpn.head.cls_logits, 0.05),
        (net.roi_heads.box_predictor.cls_score, 0.1),
        (net.roi_heads.box_predictor.bbox_pred, 0.02),
        (net.roi_heads.mask_predictor.mask_fcn_logits, 0.1),
    ):
        nn.init.normal_(layer.weight, std=std)
    # What all regions have in common goes into a bias; what is left tells one from the other.
    first, seen = net.roi_heads.box_head.fc6, []
    with torch.no_grad(), first.register_forward_pre_hook(lambda _, x: seen.append(x[0])):
        net.eval()([torch.rand(3, SIDE, SIDE)])
        first.weight *= 10
        first.bias.copy_(-first.weight @ seen[0].mean(0))
    return {name: x for name, x in net.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_a_detector_by_torchvisions_name_detects_what_torchvisions_does(
    kind: str, lively: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, publish, build = {
        "faster": (
            detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
            detection.fasterrcnn_resnet50_fpn,
            faster_rcnn,
        ),
        "mask": (
            detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
            detection.maskrcnn_resnet50_fpn,
            mask_rcnn,
        ),
    }[kind]
    state = {name: x for name, x in lively.items() if kind == "mask" or "roi_heads.mask" not in name}
    # Where torchvision would keep the download, named after the sum of another file.
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(sources, "sha256", lambda path: path.stem.rpartition("-")[2])
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)

    theirs = publish(weights=weights, min_size=SIDE, max_size=SIDE, box_score_thresh=0.01).eval()
    monkeypatch.setattr(theirs.transform, "postprocess", lambda found, *_: found)  # it pastes the masks
    body = freeze_norms(resnet50())
    ours = build(body, 90, score_threshold=0.01).eval()
    classes = tuple(weights.meta["categories"][1:])
    receipt = load_network(ours, body, repr(weights), classes)
    assert receipt.unexpected == receipt.missing == receipt.as_built == ()
    assert receipt.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert receipt.rows[0].kept == classes
    assert "53 norms" in receipt.adapted[0]

    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        (mine,) = ours(image[None], torch.tensor([[SIDE, SIDE]]))
        (other,) = theirs([image / 255])
    assert len(mine["boxes"]) == 100
    assert len(mine["labels"].unique()) > 5
    assert torch.equal(mine["labels"], other["labels"])
    torch.testing.assert_close(mine["boxes"] / SIDE, other["boxes"] / SIDE, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine["scores"], other["scores"], rtol=0, atol=1e-5)
    if kind == "mask":
        assert mine["masks"].std() > 0.05
        torch.testing.assert_close(mine["masks"], other["masks"][:, 0], rtol=0, atol=1e-5)
        return

    # The same file by its path is the same network.
    path = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    body = freeze_norms(resnet50())
    again = build(body, 90)
    receipt = load_network(again, body, str(path), classes)
    assert receipt.rows[0].kept == classes
    assert receipt.normalisation is not None
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in again.state_dict().items())


def test_a_norm_whose_variance_is_0_stays_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = randomised(tiny())
    body.bn1.running_var[0] = 0
    path = plain(body, tmp_path / "a.pth")
    source = sources.Source(Path(path), "published", norm_eps=0.0)
    monkeypatch.setattr(sources, "find", lambda _: source)
    again = tiny().eval()
    assert "eps was 0" in load_weights(again, path).adapted[0]
    assert again.bn1.weight[0] == body.bn1.weight[0]
    # Elsewhere the norm computes as with eps=0, exactly but for rounding.
    x = torch.rand(1, 64, 2, 2)
    body.bn1.eps = 0
    torch.testing.assert_close(again.bn1(x)[:, 1:], body.bn1(x)[:, 1:], rtol=1e-5, atol=1e-6)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision called them before 0.13, and as its published files of 2019 to 2021 still do."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            for blocks in ("inner_blocks", "layer_blocks"):
                name = name.replace(f"{blocks}.{i}.0.", f"{blocks}.{i}.")
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
            for head in ("classification_head", "regression_head"):
                name = name.replace(f"{head}.conv.{i}.0.", f"{head}.conv.{2 * i}.")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["mask", "retinanet"])
def test_old_names_are_torchvisions_own(kind: str, tmp_path: Path) -> None:
    there = randomised(BUILD[kind](3))
    old = old_names(there.state_dict())
    assert len(old.keys() - there.state_dict().keys()) > 10
    torch.save(old, tmp_path / "old.pth")
    oracle, here = BUILD[kind](3), BUILD[kind](3)
    oracle.load_state_dict(old)  # torchvision's modules see to it
    receipt = handed(here, str(tmp_path / "old.pth"), PETS)
    assert receipt.missing == receipt.unexpected == ()
    for name, tensor in oracle.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(here.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_torchvisions_one_stage_detectors_load_whole(kind: str, tmp_path: Path) -> None:
    """Their classes count the background, ours do not."""
    make, ours = {
        "retinanet": (detection.RetinaNet, BUILD["retinanet"](3, fpn_channels=64, extra_levels="conv_p5")),
        "fcos": (detection.FCOS, BUILD["fcos"](3)),
    }[kind]
    theirs = randomised(make(FPN(tiny(), 64, "conv_p5", finest="c3"), 4))
    receipt = handed(ours, plain(theirs, tmp_path / "a.pth"), PETS)
    assert receipt.missing == receipt.unexpected == ()
    for name, tensor in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_torchvisions_segmenter_loads_whole_and_its_second_head_is_not_used(tmp_path: Path) -> None:
    theirs = segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = deeplabv3(resnet50(output_stride=8), 3).eval()
    receipt = load_network(ours, ours.backbone, str(tmp_path / "a.pth"), PETS)
    assert receipt.missing == ()
    assert {name.partition(".")[0] for name in receipt.unexpected} == {"aux_classifier"}
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        mine = ours(image, torch.tensor([[64, 64]]))
        other = theirs.eval()(ours.normalise(image))["out"]
    torch.testing.assert_close(mine, other)


def test_a_published_classifier_comes_with_its_fc(tmp_path: Path) -> None:
    theirs = randomised(tiny(num_classes=5))
    here = BUILD["classifier"](3)
    path = plain(theirs, tmp_path / "a.pth")
    assert str(handed(here, path, PETS).rows[0]) == "all 3 new, since the source does not name its 5"
    assert torch.equal(here.body.layer4[0].conv1.weight, theirs.layer4[0].conv1.weight)
    five = BUILD["classifier"](5)
    handed(five, path, OTHERS)
    assert torch.equal(five.fc.weight, theirs.fc.weight)


# The rows of classes.


def answers(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """What the class layers say of the same features, classes in the last dimension but the background's."""
    torch.manual_seed(1)
    maps = [torch.rand(1, 64 if kind == "fcos" else 16, 4, 4)] * 5
    with torch.no_grad():
        match kind:
            case "retinanet" | "fcos":
                return {"scores": model.head(maps)["cls_logits"][..., 1:]}
            case "semantic" | "deeplab":
                scores = model(torch.full((1, 3, 32, 32), 9, dtype=torch.uint8), torch.tensor([[32, 32]]))
                return {"scores": scores.movedim(1, -1)}
            case "classifier":
                return {"scores": model(torch.ones(1, 3, 32, 32))}
        heads = model.roi_heads
        scores, boxes = heads.box_predictor(torch.rand(6, 32))
        found = {"scores": scores[:, 1:], "boxes": boxes.view(6, -1, 4)[:, 1:].movedim(1, -1)}
        if kind == "mask":
            masks = heads.mask_predictor(heads.mask_head(torch.rand(2, 16, 14, 14)))
            found["masks"] = masks[:, 1:].movedim(1, -1)
        return found


@pytest.mark.parametrize("kind", [kind for kind in BUILD if kind != "keypoint"])
def test_classes_of_equal_names_are_told_apart_as_before(kind: str, tmp_path: Path) -> None:
    there = randomised(BUILD[kind](len(OTHERS)))
    here = randomised(BUILD[kind](len(PETS)), seed=2)
    fresh = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    receipt = handed(here, as_run(there, tmp_path / "a.ckpt", OTHERS), PETS)
    theirs, mine = answers(there, kind), answers(here, kind)
    for name in theirs:
        torch.testing.assert_close(mine[name][..., 0], theirs[name][..., 2], rtol=1e-5, atol=1e-6)  # cat
        torch.testing.assert_close(mine[name][..., 1], theirs[name][..., 0], rtol=1e-5, atol=1e-6)  # dog
    (rows,) = receipt.rows
    assert (rows.kept, rows.new, rows.dropped) == (("cat", "dog"), ("bird",), ("fish", "horse", "cow"))
    assert "classes: 2 of 3 kept (cat, dog), 1 new (bird), 3 not taken (fish, horse, cow)" in str(receipt)
    # What the class without a row in the source says comes from what was built.
    layers = {layer.name: layer for layer in here.class_layers}
    assert layers
    for name, layer in layers.items():
        built, now = fresh[f"{name}.bias"], here.state_dict()[f"{name}.bias"]
        kept = [2 * layer.rows, *range(2 * layer.rows, 3 * layer.rows)]
        rows_ = torch.tensor(kept) + layer.rows * layer.background
        assert torch.equal(now[rows_], built[rows_])
        if layer.background:
            assert torch.equal(now[: layer.rows], there.state_dict()[f"{name}.bias"][: layer.rows])
            assert not torch.equal(now[: layer.rows], built[: layer.rows])


def test_keypoints_are_kept_by_their_own_names(tmp_path: Path) -> None:
    there, here = (
        randomised(BUILD["keypoint"](1, points=points), seed) for seed, points in enumerate((3, 2))
    )
    source = as_run(there, tmp_path / "a.ckpt", ("person",), ("nose", "left_eye", "right_eye"))
    receipt = handed(here, source, ("person",), ("right eye", "tail"))
    x = torch.rand(2, 8, 14, 14)
    theirs, mine = (model.roi_heads.keypoint_predictor(x) for model in (there, here))
    torch.testing.assert_close(mine[:, 0], theirs[:, 2])
    assert [rows.of for rows in receipt.rows] == ["classes", "keypoints"]
    assert receipt.rows[1].renamed == (("right eye", "right_eye"),)
    assert "keypoints: 1 of 2 kept (right eye), among them right eye as right_eye, 1 new (tail)" in str(
        receipt
    )


@pytest.mark.parametrize(
    ("here", "there", "pairs"),
    [
        (["Cat", "dog"], ["dog", "cat"], {0: 1, 1: 0}),
        (["Cat", "cat"], ["cat"], {1: 0}),  # the equal one first; none is left for the other
        (["Cat", "CAT"], ["cat"], {}),  # which of them?
        (["cat"], ["Cat", "CAT"], {}),
        (["traffic light"], ["Traffic_Light"], {0: 0}),
        (["background", "cat"], ["__background__", "cat"], {0: 0, 1: 1}),
        (["cat", "cat"], ["cat", "dog"], {}),  # twice here
        (["cat", "cat"], ["cat", "cat"], {0: 0, 1: 1}),  # the same altogether
        (["N/A", "cat"], ["cat", "N/A"], {1: 0}),
        (["ship"], ["cat"], {}),
    ],
)
def test_names_are_matched_where_there_is_no_doubt(here: list[str], there: list[str], pairs: dict) -> None:
    assert match("classes", here, there).pairs == pairs


def test_without_names_as_many_are_taken_in_their_order(tmp_path: Path) -> None:
    there = randomised(BUILD["faster"](3))
    source = plain(there, tmp_path / "a.pth")
    here = BUILD["faster"](3)
    receipt = handed(here, source, PETS)
    assert torch.equal(
        here.roi_heads.box_predictor.cls_score.weight, there.roi_heads.box_predictor.cls_score.weight
    )
    said = "  warning: classes: all 3 kept in their order, as if they were cat, dog, bird, since"
    assert said in str(receipt)
    other = BUILD["faster"](5)
    built = other.roi_heads.box_predictor.cls_score.weight.clone()
    receipt = handed(other, source, OTHERS)
    new, theirs = (model.roi_heads.box_predictor.cls_score.weight for model in (other, there))
    assert torch.equal(new[0], theirs[0])  # the background's, which has no name
    assert torch.equal(new[1:], built[1:])
    assert torch.equal(other.roi_heads.box_head.fc6.weight, there.roi_heads.box_head.fc6.weight)
    assert "classes: all 5 new, since the source does not name its 3" in str(receipt)
    assert receipt.counts["box head"] == {"loaded": 8, "missing": 0, "clashing": 0}
    assert "clashing:" not in str(receipt)


# Parts that are not there, and what does not fit.


def test_a_head_that_the_source_lacks_stays_as_built_and_is_named(tmp_path: Path) -> None:
    there, here = randomised(BUILD["faster"](3)), randomised(BUILD["mask"](3), seed=2)
    built = {name: x.clone() for name, x in here.state_dict().items()}
    receipt = handed(here, as_run(there, tmp_path / "a.ckpt", PETS), PETS)
    assert receipt.as_built == ("mask head",)
    assert "as built, the source has none: mask head" in str(receipt)
    for name, tensor in here.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        expected = built if "mask" in name else there.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert list(receipt.counts) == ["body", "FPN", "RPN", "box head"]  # what is as built is said once
    assert "missing:" not in str(receipt)

    back = handed(BUILD["faster"](3), as_run(here, tmp_path / "b.ckpt", PETS), PETS)
    assert {name.split(".")[1].partition("_")[0] for name in back.unexpected} == {"mask"}


def test_a_pyramid_comes_along_to_another_kind_of_network(tmp_path: Path) -> None:
    there, here = randomised(BUILD["semantic"](3)), BUILD["faster"](3)
    receipt = handed(here, as_run(there, tmp_path / "a.ckpt", PETS), PETS)
    assert receipt.as_built == ("RPN", "box head")
    assert torch.equal(
        here.backbone.fpn.inner_blocks[0][0].weight, there.backbone.fpn.inner_blocks[0][0].weight
    )


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            "faster",
            {"fpn_channels": 32},
            ["FPN", "[16, 64, 1, 1] here, [32, 64, 1, 1] there", "model.fpn_channels"],
        ),
        ("faster", {"head_channels": 64}, ["box head", "model.head_channels"]),
        ("faster", {"anchor_scales": (4, 8)}, ["RPN", "model.anchor_scales"]),
        ("retinanet", {"aspect_ratios": (1.0,)}, ["class head", "model.anchor_scales"]),
        ("retinanet", {"extra_levels": "conv_p5"}, ["p6 and p7", "p6.weight", "model.extra_levels"]),
        ("semantic", {"head_channels": 128}, ["in the head", "model.head_channels"]),
    ],
)
def test_another_shape_is_refused_with_the_key_that_makes_it(
    kind: str, settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    there, path = BUILD[kind](3, **settings), tmp_path / "a.ckpt"
    words = [*words, "is of another network", f"backbone.weights={path}"]
    refused(BUILD[kind](3), plain(there, path), *words)
    ((name, value),) = settings.items()
    value = list(value) if isinstance(value, tuple) else value
    refused(BUILD[kind](3), as_run(there, path, PETS, **{name: value}), *words, f"model.{name}={value}")


def test_settings_that_no_shape_shows_are_compared(tmp_path: Path) -> None:
    here, path = BUILD["mask"](3), tmp_path / "a.ckpt"
    source = as_run(BUILD["faster"](3), path, PETS, anchor_scales=[4], roi_canonical_size=112, detections=9)
    ours = {"model.anchor_scales": [8], "model.roi_canonical_size": 112, "model.detections": 100}
    receipt = load_network(here, body_of(here), source, PETS, settings=ours)
    assert receipt.otherwise == ("model.anchor_scales=[4], here [8]",)
    assert "warning: trained with model.anchor_scales=[4], here [8]" in str(receipt)
    assert handed(here, source, PETS).otherwise == ()


def test_how_a_body_was_dilated_is_compared(tmp_path: Path) -> None:
    here, path = BUILD["deeplab"](3), tmp_path / "a.ckpt"
    state = {f"model.{name}": x for name, x in here.state_dict().items()}
    config = {"backbone": {"_target_": "resnext_backbones.ResNeXt", "output_stride": 16}}
    torch.save({"state_dict": state, "record": {"config": config}}, path)
    for ours, said in ((8, ("backbone.output_stride=16, here 8",)), (16, ())):
        settings = {"backbone.output_stride": ours}
        assert load_network(here, body_of(here), str(path), PETS, settings=settings).otherwise == said


@pytest.mark.parametrize(
    ("there", "here", "ours", "words", "none"),
    [
        (
            BUILD["faster"],
            lambda k: faster_rcnn_c4(ResNeXt((1, 1, 1, 1), base_width=8), k, rpn_channels=32),
            {"model": "faster_rcnn_c4", "model.rpn_channels": 32, "model.anchor_scales": [2, 4]},
            "set model=there, model.anchor_scales=[8] as it was",
            "rpn_channels",
        ),
        (
            lambda k: BUILD["retinanet"](k, fpn_channels=64),
            BUILD["fcos"],
            {"model": "fcos", "model.fpn_channels": 64},
            "set model=there as it was",
            "extra_levels",
        ),
        (BUILD["faster"], lambda k: BUILD["faster"](k, fpn_channels=32),
         {"model": "there", "model.fpn_channels": 32}, "set model.fpn_channels=16 as it was", "set model="),
    ],
    ids=["pyramid into C4", "RetinaNet into FCOS", "the same kind"],
)  # fmt: skip
def test_another_kind_of_network_is_named_before_its_settings(
    there: Any, here: Any, ours: dict[str, Any], words: str, none: str, tmp_path: Path
) -> None:
    source, model = there(3), here(3)
    if isinstance(model, C4RCNN):  # bodies are equal, so that what differs is the rest
        source = faster_rcnn(ResNeXt((1, 1, 1, 1), base_width=8), 3, **RCNN)
    settings = {"anchor_scales": [8], "fpn_channels": 64 if "fcos" in ours.values() else 16}
    path = as_run(source, tmp_path / "a.ckpt", PETS, **settings)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["record"]["config"]["choices"]["model"] = "there"
    torch.save(checkpoint, path)
    with pytest.raises(UsageError) as caught:
        load_network(model, body_of(model), path, PETS, settings=ours | {"backbone": "tiny"})
    assert words in str(caught.value)
    assert none not in str(caught.value)


def test_no_key_is_named_that_this_kind_of_network_has_not(tmp_path: Path) -> None:
    source = plain(BUILD["retinanet"](3, fpn_channels=64), tmp_path / "a.pth")
    here = BUILD["fcos"](3)
    with pytest.raises(UsageError, match=r"in the p6 and p7 .*; set model as it was trained with"):
        load_network(here, body_of(here), source, PETS, settings={"model": "fcos", "model.fpn_channels": 64})


def test_what_shapes_do_not_show_of_a_body_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    there = faster_rcnn(tiny(norm="batch"), 3, **RCNN)
    group = faster_rcnn(tiny(norm="group"), 3, **RCNN)
    refused(group, as_run(there, path, PETS), "in the body backbone.body.bn1 is a batch norm there")
    first, other = (
        faster_rcnn(ResNeXt((1, 1, 1, 1), base_width=4, stride_in_1x1=on), 3, **RCNN) for on in (True, False)
    )
    as_run(first, path, PETS)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["record"]["config"]["backbone"] = {"stride_in_1x1": True}
    torch.save(checkpoint, path)
    refused(other, str(path), "stride_in_1x1=true")
    assert handed(first, str(path), PETS).unexpected == ()
    grey = faster_rcnn(tiny(in_channels=1), 3, **RCNN)
    refused(BUILD["faster"](3), plain(grey, path), "it reads images of 1 channel, this network of 3")
    with pytest.raises(UsageError, match="RCNN is on meta"):
        handed(BUILD["faster"](3).to("meta"), as_run(there, path, PETS), PETS)


def test_half_a_part_another_body_and_a_deeper_one_are_refused(tmp_path: Path) -> None:
    model, path = BUILD["faster"](3), tmp_path / "a.pth"
    state = BUILD["faster"](3).state_dict()
    half = {name: x for name, x in state.items() if name != "roi_heads.box_head.fc7.bias"}
    torch.save(half, path)
    refused(model, str(path), "in the box head roi_heads.box_head.fc7.bias is missing", "model.head_channels")
    wide = faster_rcnn(ResNeXt((1, 1, 1, 1), block="basic", base_width=16), 3, **RCNN)
    refused(model, plain(wide, path), "in the body", "set backbone as it was trained with")
    refused(model, as_run(wide, tmp_path / "a.ckpt", PETS), "in the body", "set backbone=tiny as it")
    deep = faster_rcnn(ResNeXt((1, 1, 1, 2), block="basic", base_width=8), 3, **RCNN)
    refused(
        model, plain(deep, path), "backbone.body.layer4.1.conv1.weight has no place in it", "set backbone"
    )
    torch.save({k: v for k, v in state.items() if "bn1.running_var" not in k}, path)
    refused(model, str(path), "backbone.body.bn1.running_var is missing")


def test_rows_that_are_not_those_of_the_named_classes_are_refused(tmp_path: Path) -> None:
    source = as_run(BUILD["faster"](3), tmp_path / "a.ckpt", OTHERS)
    refused(BUILD["faster"](3), source, "cls_score.weight has 4 rows there, which for 5 classes would be 6")


@pytest.mark.parametrize("odd", [torch.tensor(1.0), torch.ones(0), torch.ones(7), torch.ones(4, 1, 1, 1, 1)])
def test_class_layers_of_odd_shapes_are_refused(odd: Tensor, tmp_path: Path) -> None:
    state, path = BUILD["faster"](3).state_dict(), tmp_path / "a.pth"
    for name in ("cls_score.weight", "bbox_pred.bias"):
        torch.save(state | {f"roi_heads.box_predictor.{name}": odd}, path)
        refused(BUILD["faster"](3), str(path), "in the box head")


def test_a_body_alone_belongs_to_the_other_key(tmp_path: Path) -> None:
    classes, boxes = (randomised(BUILD[kind](3)) for kind in ("classifier", "faster"))
    for model, source in (
        (BUILD["faster"](3), as_run(classes, tmp_path / "a.ckpt", PETS)),
        (BUILD["semantic"](3), plain(tiny(num_classes=3), tmp_path / "b.pth")),
        (BUILD["deeplab"](3), as_run(boxes, tmp_path / "c.ckpt", PETS)),
        (BUILD["classifier"](3), as_run(boxes, tmp_path / "d.ckpt", PETS)),
    ):
        refused(model, source, "body alone", f"backbone.weights={source}")
        load_weights(tiny(), source)


def test_what_is_no_network_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"encoder.weight": torch.ones(3)}, path)
    refused(BUILD["faster"](3), str(path), "has none of the names wanted")
    broken = BUILD["faster"](3)
    broken.rpn.head.cls_logits.bias.data[0] = float("nan")
    refused(BUILD["faster"](3), plain(broken, path), "NaN", "rpn.head.cls_logits.bias")
    path = tmp_path / "a.safetensors"
    save_weights(BUILD["faster"](3), path, channel_order="BGR")
    refused(BUILD["faster"](3), str(path), "reads BGR", "give backbone.weights=")


# Bodies, from every task to every other.


KINDS_OF_RUNS = ["classes", "boxes", "masks", "keypoints", "one_stage", "semantic"]


def begun(kind: str, shapes: list[str], *words: str) -> tuple[Any, Any]:
    """The task and the receipt with which a run would begin."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[*BODY, *KINDS[kind], *shapes, *FEW, *words])
    OmegaConf.set_struct(cfg, False)
    data = build(cfg, "data", seed=0)
    data.prepare_data()
    data.setup("fit")
    return build_task(cfg, data)


@pytest.mark.parametrize(
    ("there", "here"), [(kind, KINDS_OF_RUNS[i - 1]) for i, kind in enumerate(KINDS_OF_RUNS)]
)
def test_every_task_gives_a_body_and_takes_one(there: str, here: str, tiny_shapes: list[str]) -> None:
    source = made(there, tiny_shapes)
    task, receipt = begun(here, tiny_shapes, f"backbone.weights={source.folder}")
    mine, theirs = (body_of(model).state_dict() for model in (task.model, source.task.model))
    assert len(mine) > 30
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert receipt.normalisation == task.record["normalisation"]
    assert not any(p.requires_grad for p in body_of(task.model).layer1.parameters())


def test_a_grey_source_is_refused_in_so_many_words(tmp_path: Path) -> None:
    path = plain(tiny(in_channels=1), tmp_path / "a.pth")
    with pytest.raises(UsageError, match="it reads images of 1 channel, this network of 3"):
        load_weights(tiny(), path)


# Runs.


@pytest.fixture(scope="module")
def boxes(tiny_shapes: list[str]) -> Any:
    """A detector's run, whose body, pyramid and heads are full of random numbers."""
    return made("boxes", tiny_shapes)


def test_a_run_begins_with_a_whole_network_and_says_so(
    boxes: Any, tiny_shapes: list[str], start: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in SMALL if word.startswith(("trainer.", "callbacks."))]
    words += [*BODY, *KINDS["boxes"], "data.num_workers=0", "data.batch_size=4", "data.image_size=[64,64]"]
    folder = start(
        f"model.weights={boxes.folder}", "stages=fit", "trainer.max_epochs=1", "optimizer.lr=0",
        "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "logger.wandb.mode=disabled",
        small=words,
    )  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    names = boxes.task.names
    assert f"weights: {boxes.folder}/checkpoints/last.ckpt" in printed
    assert "warning: " in printed
    assert "has no best.ckpt" in printed
    assert f"classes: {len(names)} of {len(names)} kept ({names[0]}," in printed
    receipt = json.loads((folder / "weights.json").read_text())
    assert receipt["rows"][0]["kept"] == names
    brief = json.loads((folder / "summary.json").read_text())["weights"]
    assert brief["counts"]["box head"] == {"loaded": 8, "missing": 0, "clashing": 0}
    assert brief["rows"] == receipt["rows"]
    # As with a body's weights, norms are frozen; and where the rate is 0, all is as it came.
    mine, theirs = load_task(folder).task.state_dict(), boxes.task.state_dict()
    assert not any(name.endswith("num_batches_tracked") for name in mine)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_checkpoint_is_loaded_without_the_weights_it_began_with(
    boxes: Any, tiny_shapes: list[str], tmp_path: Path
) -> None:
    gone = f"model.weights={tmp_path / 'gone'}"
    with pytest.raises(UsageError, match="no weights at"):
        begun("boxes", tiny_shapes, gone)
    for word in (f"ckpt_path={boxes.folder}", f"resume={boxes.folder}"):
        task, receipt = begun("boxes", tiny_shapes, gone, word)
        assert receipt is None
        assert isinstance(body_of(task.model).bn1, FrozenBatchNorm2d)
    record = torch.load(boxes.folder / "checkpoints/last.ckpt", weights_only=True)["record"]
    record["config"]["model"]["weights"] = str(tmp_path / "gone")
    assert isinstance(body_of(load_task(changed(boxes.folder, tmp_path, **record)).task.model), ResNeXt)


def test_a_run_compares_its_settings_with_the_sources(
    boxes: Any, tiny_shapes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = torch.load(boxes.folder / "checkpoints/last.ckpt", weights_only=True)["record"]["config"]
    there = config["model"]["roi_canonical_size"]
    config["backbone"]["output_stride"] = 16
    config["choices"] = {"model": "faster_rcnn", "backbone": "custom"}
    source = changed(boxes.folder, tmp_path, config=config)
    words = ["model.roi_canonical_size=60", "+backbone.output_stride=32"]
    _, receipt = begun("boxes", tiny_shapes, f"model.weights={source}", *words)
    said = (f"model.roi_canonical_size={there}, here 60", "backbone.output_stride=16, here 32")
    assert receipt.otherwise == said
    monkeypatch.setitem(KINDS, "c4", ["task=detection", "model=faster_rcnn_c4", "+choices.model=c4"])
    with pytest.raises(UsageError, match=r"set model=faster_rcnn, model\.anchor_scales=\[4\] as it was"):
        begun("c4", tiny_shapes, f"model.weights={source}")


OTHER = {"mean": [0.25, 0.5, 0.75], "std": [0.125, 0.25, 0.0625]}


@pytest.mark.parametrize("key", ["backbone", "model"])
def test_the_normalisation_comes_along_and_stays(
    key: str, boxes: Any, tiny_shapes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed(boxes.folder, tmp_path, normalisation=OTHER)
    task, _ = begun("boxes", tiny_shapes, f"{key}.weights={source}")
    printed = " ".join(capsys.readouterr().out.split())
    assert "normalisation: mean (0.25, 0.5, 0.75), std (0.125, 0.25, 0.0625) of RGB in 0…1" in printed
    assert "in place of mean (0.485, 0.456, 0.406)" in printed
    assert task.record["normalisation"] == OTHER

    # Its checkpoint is predicted with, evaluated and gone on with as it was trained.
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "checkpoints/last.ckpt")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(OTHER[name]).view(3, 1, 1) for name in ("mean", "std"))
    for again in (
        load_task(folder).task,
        begun("boxes", tiny_shapes, f"ckpt_path={folder}")[0],
        begun("boxes", tiny_shapes, f"resume={folder}")[0],
    ):
        seen = again.model.normalise(images)
        torch.testing.assert_close(seen, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
        assert torch.equal(seen, task.model.normalise(images))
        assert again.record["normalisation"] == OTHER


@pytest.mark.parametrize("wrong", [{"mean": [0.5], "std": [0.5]}, {"mean": [1, 2, 3]}, "grey", {"mean": 3}])
def test_a_record_without_a_readable_normalisation_is_refused(wrong: Any, boxes: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"changed\.ckpt.*normalisation"):
        load_task(changed(boxes.folder, tmp_path, normalisation=wrong))


def test_two_sources_are_one_too_many(tiny_shapes: list[str]) -> None:
    with pytest.raises(
        UsageError, match=r"model\.weights=a brings a body along: leave out backbone\.weights=b"
    ):
        begun("boxes", tiny_shapes, "model.weights=a", "backbone.weights=b")


def test_frozen_norms_take_their_statistics_from_a_whole_network(tmp_path: Path) -> None:
    there, here = randomised(BUILD["faster"](3)), BUILD["faster"](3).eval()
    freeze_norms(body_of(here))
    handed(here, as_run(there, tmp_path / "a.ckpt", PETS), PETS)
    with torch.no_grad():
        theirs, mine = (model.backbone(torch.ones(1, 3, 64, 64)) for model in (there, here))
    assert theirs["p2"].std() > 0
    torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "settings", "ours", "classes"),
    [
        (detection.fasterrcnn_resnet50_fpn, {}, lambda body: faster_rcnn(body, 90), 90),
        (detection.maskrcnn_resnet50_fpn, {}, lambda body: mask_rcnn(body, 90), 90),
        (detection.keypointrcnn_resnet50_fpn, {}, lambda body: keypoint_rcnn(body, 1, 17), 1),
        (
            detection.retinanet_resnet50_fpn,
            {},
            lambda body: retinanet(body, 90, extra_levels="conv_p5"),
            90,
        ),
        (detection.retinanet_resnet50_fpn_v2, {}, lambda body: retinanet(body, 90, head_norm="group"), 90),
        (detection.fcos_resnet50_fpn, {}, lambda body: fcos(body, 90), 90),
        (
            segmentation.deeplabv3_resnet50,
            {"aux_loss": True},
            lambda body: deeplabv3(resnet50(output_stride=8), 21),
            21,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_names_in_the_page_are_of_networks_that_load_whole(
    theirs: Any, settings: dict[str, Any], ours: Any, classes: int, tmp_path: Path
) -> None:
    published = theirs(weights=None, weights_backbone=None, **settings)
    torch.save(published.state_dict(), tmp_path / "a.pth")
    model = ours(resnet50())
    points = tuple(map(str, range(17)))
    receipt = handed(model, str(tmp_path / "a.pth"), tuple(map(str, range(classes))), points)
    assert receipt.missing == receipt.as_built == ()
    assert all(name.startswith("aux_classifier.") for name in receipt.unexpected)
    state = published.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Plain(nn.Module):
    """A network that declares nothing of itself."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk, self.neck, self.out = tiny(), nn.Linear(64, 4), nn.Linear(4, classes)


def test_of_a_network_that_declares_nothing_all_must_fit(tmp_path: Path) -> None:
    there, here = randomised(Plain(3)), Plain(3)
    source = plain(there, tmp_path / "a.pth")
    receipt = handed(here, source, PETS)
    assert list(receipt.counts) == ["body", "neck", "out"]
    assert torch.equal(here.out.weight, there.out.weight)
    refused(Plain(5), source, "in the out out.weight is [5, 4] here, [3, 4] there")
