"""Detectron2's and Caffe2's networks: their names, their colour order, their pixels, their strides."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from small_weights import State, assert_holds, refused, state_of, tiny, under

from resnext_backbones import FPN, ResNeXt, UsageError, load_weights

NORMS = ("weight", "bias", "running_mean", "running_var")
BGR = {  # of Detectron2's ResNeXt-101 32×8d
    "format": "detectron2",
    "channel_order": "BGR",
    "pixel_mean": "[103.53, 116.28, 123.675]",
    "pixel_std": "[57.375, 57.12, 58.395]",
}


def bottleneck(**kwargs: object) -> ResNeXt:
    return ResNeXt((2, 1, 1, 1), cardinality=2, base_width=4, **kwargs)


def detectron2_names(depths: tuple[int, ...], convolutions: int = 3) -> dict[str, str]:
    """Detectron2's name to torchvision's, spelt out from detectron2/modeling/backbone/resnet.py."""
    pairs = {"stem.conv1": ("conv1", "bn1")}
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            here, there = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            pairs |= {
                f"{there}.conv{i}": (f"{here}.conv{i}", f"{here}.bn{i}") for i in range(1, convolutions + 1)
            }
            if block == 0:
                pairs[f"{there}.shortcut"] = (f"{here}.downsample.0", f"{here}.downsample.1")
    names = {}
    for there, (conv, norm) in pairs.items():
        names[f"{there}.weight"] = f"{conv}.weight"
        names |= {f"{there}.norm.{leaf}": f"{norm}.{leaf}" for leaf in NORMS}
    return names


def caffe2_names(depths: tuple[int, ...]) -> dict[str, str]:
    """Caffe2's name to torchvision's, as Detectron2's logs list them (issue 1726 of its repository)."""
    leaves = dict(zip(("gamma", "beta", "running_mean", "running_var"), NORMS, strict=True))
    names = {"conv1_w": "conv1.weight", "pred_w": "fc.weight", "pred_b": "fc.bias"}
    names |= {f"res_conv1_bn_{leaf}": f"bn1.{ours}" for leaf, ours in leaves.items()}
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            here, there = f"layer{stage}.{block}", f"res{stage + 1}_{block}_branch"
            pairs = {
                f"{there}2{letter}": (f"{here}.conv{i}", f"{here}.bn{i}") for i, letter in enumerate("abc", 1)
            }
            if block == 0:
                pairs[f"{there}1"] = (f"{here}.downsample.0", f"{here}.downsample.1")
            for branch, (conv, norm) in pairs.items():
                names[f"{branch}_w"] = f"{conv}.weight"
                names |= {f"{branch}_bn_{leaf}": f"{norm}.{ours}" for leaf, ours in leaves.items()}
    return names


def renamed(state: State, names: dict[str, str]) -> State:
    assert {name for name in state if not name.endswith("tracked")} == set(names.values())
    return {there: state[here] for there, here in names.items()}


def save(state: State, path: Path, **metadata: str) -> Path:
    safetensors.torch.save_file(state, path, metadata or None)
    return path


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up.", "model.backbone.bottom_up.", "backbone."])
def test_detectron2s_names(prefix: str, tmp_path: Path) -> None:
    body = bottleneck()
    state = state_of(body)
    theirs = under(prefix, renamed(state, detectron2_names((2, 1, 1, 1))))
    extra = {"proposal_generator.rpn_head.conv.weight": torch.ones(2)}
    path = save(theirs | extra, tmp_path / "a.safetensors", channel_order="RGB")
    receipt = load_weights(body, path)
    assert_holds(body, state)
    assert receipt.missing == ()
    assert receipt.unexpected == tuple(extra)
    assert receipt.normalisation is None


def test_detectron2s_names_of_basic_blocks(tmp_path: Path) -> None:
    body = tiny()
    state = state_of(body)
    names = detectron2_names((1, 1, 1, 1), convolutions=2)
    names = {there: here for there, here in names.items() if not there.startswith("res2.0.shortcut")}
    load_weights(body, save(renamed(state, names), tmp_path / "a.safetensors", channel_order="RGB"))
    assert_holds(body, state)


def test_torchvisions_weights_as_detectron2_converts_them(tmp_path: Path) -> None:
    """The rule of detectron2/tools/convert-torchvision-to-d2.py, applied to torchvision's own network."""
    theirs = torchvision.models.resnext50_32x4d(weights=None)
    state = {k: v for k, v in state_of(theirs).items() if not k.endswith("tracked")}
    converted = {}
    for name, value in state.items():
        key = name if "layer" in name else f"stem.{name}"
        for i in (1, 2, 3, 4):
            key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        converted[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    path = save(converted, tmp_path / "a.safetensors", channel_order="RGB")
    body = torchvision.models.resnext50_32x4d(weights=None)
    receipt = load_weights(body, path, allow_partial="fc")  # which that rule calls stem.fc
    assert receipt.missing == ("fc.weight", "fc.bias")
    assert_holds(body, {**state, "fc.weight": body.fc.weight, "fc.bias": body.fc.bias})


def test_detectron2s_pyramid(tmp_path: Path) -> None:
    names = {f"backbone.bottom_up.{k}": f"body.{v}" for k, v in detectron2_names((2, 1, 1, 1)).items()}
    for i, level in enumerate((2, 3, 4, 5)):
        for leaf in ("weight", "bias"):
            names[f"backbone.fpn_lateral{level}.{leaf}"] = f"fpn.inner_blocks.{i}.0.{leaf}"
            names[f"backbone.fpn_output{level}.{leaf}"] = f"fpn.layer_blocks.{i}.0.{leaf}"
    backbone = FPN(bottleneck(), 16)
    state = state_of(backbone)
    path = save(renamed(state, names), tmp_path / "a.safetensors", channel_order="RGB")
    assert load_weights(backbone, path).unexpected == ()
    assert_holds(backbone, state)


def test_detectron2s_pyramid_of_retinanet_begins_at_c3(tmp_path: Path) -> None:
    names = {f"backbone.bottom_up.{k}": f"body.{v}" for k, v in detectron2_names((2, 1, 1, 1)).items()}
    for leaf in ("weight", "bias"):
        for i, level in enumerate((3, 4, 5)):
            names[f"backbone.fpn_lateral{level}.{leaf}"] = f"fpn.inner_blocks.{i}.0.{leaf}"
            names[f"backbone.fpn_output{level}.{leaf}"] = f"fpn.layer_blocks.{i}.0.{leaf}"
        for level in ("p6", "p7"):
            names[f"backbone.top_block.{level}.{leaf}"] = f"fpn.extra_blocks.{level}.{leaf}"
    backbone = FPN(bottleneck(), 16, extra_levels="conv_c5", finest="c3")
    state = state_of(backbone)
    load_weights(backbone, save(renamed(state, names), tmp_path / "a.safetensors", channel_order="RGB"))
    assert_holds(backbone, state)


def test_caffe2s_names(tmp_path: Path) -> None:
    body = bottleneck(num_classes=3)
    state = state_of(body)
    theirs = renamed(state, caffe2_names((2, 1, 1, 1))) | {"conv1_w_momentum": torch.ones(2)}
    receipt = load_weights(body, save(theirs, tmp_path / "a.safetensors", channel_order="RGB"))
    assert_holds(body, state)
    assert receipt.unexpected == ("conv1_w_momentum",)
    refused(bottleneck(), save(theirs, tmp_path / "a.safetensors"), "channel_order")


def test_caffe2s_norms_without_statistics_are_refused(tmp_path: Path) -> None:
    state = renamed(state_of(bottleneck(num_classes=3)), caffe2_names((2, 1, 1, 1)))
    state = {k.replace("gamma", "s").replace("beta", "b"): v for k, v in state.items() if "running" not in k}
    path = save(state, tmp_path / "a.safetensors", channel_order="BGR")
    refused(bottleneck(), path, "Caffe2", "no statistics", "branch")


# Colour order and pixels


@pytest.mark.parametrize("names", ["detectron2", "torchvision"])
def test_a_network_of_bgr_is_turned_to_read_rgb(names: str, tmp_path: Path) -> None:
    theirs, ours = bottleneck().eval(), bottleneck().eval()
    state = theirs.state_dict()
    if names == "detectron2":
        known = detectron2_names((2, 1, 1, 1))
        state = renamed({k: v for k, v in state.items() if not k.endswith("tracked")}, known)
    receipt = load_weights(ours, save(state, tmp_path / "a.safetensors", **BGR))
    rgb = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, maps = theirs(rgb.flip(1)), ours(rgb)
    for name in expected:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-4, atol=1e-4)
    # What the literature gives for ImageNet, RGB in 0…1.
    assert receipt.normalisation["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert receipt.normalisation["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert receipt.metadata == BGR


def test_a_network_of_bgr_is_turned_before_its_stem_is_fitted(tmp_path: Path) -> None:
    state = state_of()
    path = save(state, tmp_path / "a.safetensors", channel_order="bgr")
    body = tiny(in_channels=4)
    load_weights(body, path)
    weight = state["conv1.weight"]
    expected = torch.stack([weight[:, 2], weight[:, 1], weight[:, 0], weight[:, 2]], 1) * 3 / 4
    torch.testing.assert_close(body.conv1.weight.data, expected)


def test_pixels_that_were_not_scaled(tmp_path: Path) -> None:
    """Detectron2's R-50 of MSRA takes pixels of 0…255 less their mean: a deviation of 1 ÷ 255 in 0…1."""
    metadata = BGR | {"pixel_std": "[1.0, 1.0, 1.0]"}
    receipt = load_weights(tiny(), save(state_of(), tmp_path / "a.safetensors", **metadata))
    assert receipt.normalisation["std"] == pytest.approx([1 / 255] * 3)


def test_colours_are_not_guessed(tmp_path: Path) -> None:
    state = renamed(state_of(bottleneck()), detectron2_names((2, 1, 1, 1)))
    path = save(state, tmp_path / "a.safetensors", format="detectron2")
    refused(bottleneck(), path, "Detectron2", "RGB or BGR", "channel_order", "docs/backbones.md")
    torch.save({"model": state}, tmp_path / "model_final.pth")
    refused(bottleneck(), tmp_path / "model_final.pth", "channel_order")
    refused(bottleneck(), save(state, path, channel_order="GRB"), "channel_order=GRB", "RGB or BGR")
    refused(bottleneck(), save(state_of(bottleneck()), path, channel_order=""), "RGB or BGR")
    refused(
        tiny(in_channels=4), save(state_of(in_channels=4), path, channel_order="BGR"), "not of 3 channels"
    )


@pytest.mark.parametrize(("said", "built"), [("true", False), ("False", True)])
def test_another_place_of_the_stride_is_refused(said: str, built: bool, tmp_path: Path) -> None:
    state = renamed(state_of(bottleneck()), detectron2_names((2, 1, 1, 1)))
    path = save(state, tmp_path / "a.safetensors", stride_in_1x1=said, **BGR)
    refused(bottleneck(stride_in_1x1=built), path, f"stride_in_1x1={said.lower()}")
    assert load_weights(bottleneck(stride_in_1x1=not built), path).missing == ()
    path = save(state, tmp_path / "a.safetensors", stride_in_1x1="1", **BGR)
    with pytest.raises(UsageError, match="true or false"):
        load_weights(bottleneck(), path)
