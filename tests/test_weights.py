"""Loading: every kind of source, every fault of one, the receipt. Freezing: what must not move, does not."""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from small_weights import STAGES, assert_holds, refused, state_of, tiny, under
from timm.models import adapt_input_conv
from torch import nn
from torchvision.models.detection import FasterRCNN

from resnext_backbones import (
    FPN,
    FrozenBatchNorm2d,
    ResNeXt,
    UsageError,
    freeze,
    freeze_norms,
    load_weights,
    resnet18,
    resnext26_32x4d,
    weight_files,
)
from resnext_backbones.weights import save_weights

# Every kind of source


class Holder(nn.Module):
    """A task's shape: its network under `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def classifier_checkpoint() -> dict[str, Any]:
    model = nn.ModuleDict({"body": tiny(num_classes=5)})
    return {"state_dict": Holder(model).state_dict(), "epoch": 3, "optimizer_states": [{"state": {}}]}


def detector_checkpoint() -> dict[str, Any]:
    return {
        "state_dict": Holder(FasterRCNN(FPN(tiny(), 16), 3)).state_dict(),
        "callbacks": {"x": {"best": 0.5}},
    }


def ema_checkpoint() -> dict[str, Any]:
    return {
        "current_model_state": under("model.body.", state_of()),
        "state_dict": under("model.body.", state_of()),
    }


@pytest.mark.parametrize(
    ("content", "prefix"),
    [
        (state_of(), ""),
        (OrderedDict(under("module.", state_of())), "module."),
        ({"model": state_of(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "model."),
        (classifier_checkpoint(), "model.body."),
        (detector_checkpoint(), "model.backbone.body."),
        (ema_checkpoint(), "model.body."),
    ],
    ids=["state_dict", "DataParallel", "reference script", "classifier", "detector", "averaged"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_of_torch(content: dict[str, Any], prefix: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    body = tiny()
    receipt = load_weights(body, path)

    state = content.get("state_dict", content.get("model", content))
    inner = prefix.removeprefix("model.") if "model" in content else prefix
    assert_holds(body, {name.removeprefix(inner): value for name, value in state.items()})
    assert receipt.prefix == prefix
    assert receipt.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {stage: counts["loaded"] for stage, counts in receipt.counts.items()} == STAGES
    assert len(receipt.loaded) == sum(STAGES.values())
    assert receipt.missing == receipt.clashing == ()
    unused = "fc.", "backbone.fpn.", "rpn.", "roi_heads."  # neither counters nor an optimizer's moments
    assert all(
        name.removeprefix("model.").removeprefix("body.").startswith(unused) for name in receipt.unexpected
    )


def test_what_the_body_has_no_use_for_is_listed(tmp_path: Path) -> None:
    torch.save(classifier_checkpoint(), tmp_path / "a.ckpt")
    receipt = load_weights(tiny(), tmp_path / "a.ckpt")
    assert receipt.unexpected == ("model.body.fc.weight", "model.body.fc.bias")


def test_safetensors(tmp_path: Path) -> None:
    state = state_of()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    body = tiny()
    assert load_weights(body, str(tmp_path / "a.safetensors")).loaded
    assert_holds(body, state)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in state_of().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    body = tiny()
    load_weights(body, tmp_path / "a.safetensors")
    assert body.conv1.weight.dtype == torch.float32
    assert torch.equal(body.conv1.weight, state["conv1.weight"].float())


def test_a_run_gives_its_best_else_its_last(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    last, best = state_of(), state_of()
    torch.save({"state_dict": last}, tmp_path / "checkpoints/last.ckpt")
    body = tiny()
    load_weights(body, tmp_path)
    assert_holds(body, last)
    torch.save({"state_dict": best}, tmp_path / "checkpoints/best.ckpt")
    load_weights(body, tmp_path)
    assert_holds(body, best)


def test_which_checkpoint_of_a_run_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    content = {"state_dict": state_of(), "epoch": 3, "global_step": 1200}
    torch.save(content, folder / "last.ckpt")
    receipt = load_weights(tiny(), tmp_path)
    assert receipt.source == f"{folder / 'last.ckpt'} (epoch 3, step 1200)"
    assert f"  warning: {tmp_path} has no best.ckpt" in str(receipt)
    assert receipt.as_dict()["warning"] == receipt.warning
    torch.save(content | {"epoch": 2, "global_step": 800}, folder / "best.ckpt")
    receipt = load_weights(tiny(), tmp_path)
    assert receipt.source == f"{folder / 'best.ckpt'} (epoch 2, step 800)"
    assert "warning" not in str(receipt)
    assert "warning" not in str(load_weights(tiny(), folder / "last.ckpt"))  # which was asked for


def test_live_and_frozen_norms_read_each_other(tmp_path: Path) -> None:
    state = state_of()
    torch.save(state, tmp_path / "live.pth")
    frozen = freeze_norms(tiny())
    load_weights(frozen, tmp_path / "live.pth")
    assert_holds(frozen, state)
    torch.save(frozen.state_dict(), tmp_path / "frozen.pth")
    live = tiny()
    assert load_weights(live, tmp_path / "frozen.pth").missing == ()  # the counters are no fault
    assert_holds(live, state)


def test_torchvisions_own_networks(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = resnet18(num_classes=1000)
    load_weights(ours, tmp_path / "a.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval().classify(images), theirs(images))


# A source that does not cover the body


def test_a_renamed_tensor_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    state, path = state_of(), tmp_path / "a.pth"
    state["layer3.0.conv9.weight"] = state.pop("layer3.0.conv1.weight")
    torch.save(state, path)
    refused(tiny(), path, "layer3.0.conv1.weight is missing", "59 of 60")

    body = tiny()
    kept = body.layer3[0].conv1.weight.clone()
    receipt = load_weights(body, path, allow_partial=True)
    assert receipt.missing == ("layer3.0.conv1.weight",)
    assert receipt.unexpected == ("layer3.0.conv9.weight",)
    assert receipt.counts["layer3"] == {"loaded": 14, "missing": 1, "clashing": 0}
    assert_holds(body, {**state, "layer3.0.conv1.weight": kept})


def test_clashing_shapes_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(state_of(num_classes=5), path)
    body = tiny(num_classes=3)
    refused(body, path, "fc.weight is [3, 512] here, [5, 512] there")
    refused(tiny(num_classes=3, stem="cifar"), path, "conv1.weight is [64, 3, 3, 3] here", allow_partial="fc")

    receipt = load_weights(body, path, allow_partial=("fc",))
    assert [(clash.name, clash.here, clash.there) for clash in receipt.clashing] == [
        ("fc.weight", (3, 512), (5, 512)),
        ("fc.bias", (3,), (5,)),
    ]
    assert receipt.counts["fc"] == {"loaded": 0, "missing": 0, "clashing": 2}


def test_another_network_is_refused_even_in_part(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"encoder.blocks.0.weight": torch.ones(3)}, path)
    refused(tiny(), path, "encoder.blocks.0.weight", "conv1.weight", allow_partial=True)
    torch.save(under("model.", state_of()), path)
    refused(tiny(), path, "'mod.'", "model.conv1.weight", allow_partial=True, prefix="mod")


def test_a_wrong_prefix_is_told_which_one_fits(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(detector_checkpoint(), path)
    refused(
        tiny(),
        path,
        "0 of 60 tensors of ResNeXt",
        "'model.'",
        "under 'model.backbone.body.' 60",
        prefix="model",
    )
    refused(tiny(), path, "0 of 60", "under 'model.backbone.body.' 60 fit", prefix="", allow_partial=True)

    # Also where something fits by chance: a second network's classifier.
    state = {**under("body.", state_of()), **under("other.", {"conv1.weight": torch.ones(64, 3, 7, 7)})}
    torch.save(state, path)
    refused(tiny(), path, "1 of 60", "'other.'", "under 'body.' 60 fit", prefix="other")
    assert load_weights(tiny(), path, prefix="body.").prefix == "body."


def test_two_bodies_in_one_source_are_not_guessed_between(tmp_path: Path) -> None:
    path, student, teacher = tmp_path / "a.pth", state_of(), state_of()
    torch.save({**under("student.", student), **under("teacher.", teacher)}, path)
    refused(tiny(), path, "'student.'", "'teacher.'", "prefix=")
    body = tiny()
    load_weights(body, path, prefix="teacher")
    assert_holds(body, teacher)


def test_of_a_network_and_its_average_the_average_is_taken(tmp_path: Path) -> None:
    """As torchvision's reference scripts save them: train.py and utils.ExponentialMovingAverage."""
    path, live, averaged = tmp_path / "a.pth", state_of(), state_of()
    ema = {"n_averaged": torch.tensor(3), **under("module.", averaged)}
    torch.save({"model": live, "model_ema": ema, "epoch": 3}, path)
    body = tiny()
    receipt = load_weights(body, path)
    assert receipt.prefix == "model_ema.module."
    assert "prefix 'model_ema.module.'" in str(receipt)
    assert_holds(body, averaged)
    assert load_weights(body, path, prefix="model").prefix == "model."
    assert_holds(body, live)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = state_of()
    state["layer4.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "a.pth")
    refused(tiny(), tmp_path / "a.pth", "NaN", "layer4.0.conv1.weight")
    state["layer4.0.conv1.weight"] = state_of()["layer4.0.conv1.weight"].double() * 1e300
    torch.save(state, tmp_path / "a.pth")
    refused(tiny(), tmp_path / "a.pth", "infinite", "layer4.0.conv1.weight")  # too large for float32


# Other numbers of input channels


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 9])
def test_the_stem_is_fitted_to_the_images_as_timm_does_it(channels: int, tmp_path: Path) -> None:
    path, state = tmp_path / "a.pth", state_of()
    torch.save(state, path)
    body = tiny(in_channels=channels)
    receipt = load_weights(body, path)
    assert receipt.adapted == (f"conv1.weight: 3 → {channels} input channels",)
    assert receipt.counts["stem"] == {"loaded": 5, "missing": 0, "clashing": 0}
    theirs = adapt_input_conv(channels, state["conv1.weight"].clone())
    torch.testing.assert_close(body.conv1.weight.data, theirs, rtol=1e-6, atol=0)
    assert_holds(body, {**state, "conv1.weight": body.conv1.weight})
    assert "3 → " in str(receipt)


def test_a_grey_image_gives_what_its_rgb_copy_gave(tmp_path: Path) -> None:
    path, colour, grey = tmp_path / "a.pth", tiny().eval(), tiny(in_channels=1).eval()
    torch.save(colour.state_dict(), path)
    load_weights(grey, path)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        theirs, ours = colour(images.expand(-1, 3, -1, -1)), grey(images)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_every_kind_of_body_has_its_stem_fitted(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(state_of(FPN(tiny(), 16)), path)
    assert load_weights(FPN(tiny(in_channels=4), 16), path).adapted[0].startswith("body.conv1.weight: 3 → 4")
    torch.save(state_of(stem="deep"), path)
    assert load_weights(tiny(stem="deep", in_channels=1), path).adapted[0].startswith("conv1.0.weight: 3 → 1")


def test_only_a_stem_for_rgb_is_fitted(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(state_of(in_channels=4), path)
    refused(tiny(in_channels=1), path, "conv1.weight is [64, 1, 7, 7] here, [64, 4, 7, 7] there")
    refused(tiny(), path, "conv1.weight is [64, 3, 7, 7] here, [64, 4, 7, 7] there")
    body = tiny()
    body.conv1 = nn.Conv2d(6, 64, 7, groups=2, bias=False)  # (64, 3, 7, 7), and yet not of RGB
    torch.save(state_of(), path)
    assert load_weights(body, path).adapted == ()


# Bodies that wrap somebody else's network


class Wrapped(nn.Module):
    weights_prefix = "net."

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.net = tiny(**kwargs)
        self.scale = nn.Parameter(torch.ones(1))


def test_published_names_are_a_wrapped_networks_own(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pth", state_of()
    torch.save({**under("module.", state), "module.scale": torch.full((1,), 3.0)}, path)
    body = Wrapped(in_channels=4)
    receipt = load_weights(body, path)
    assert receipt.prefix == "module."
    assert receipt.loaded[:2] == ("scale", "net.conv1.weight")
    assert receipt.adapted == ("net.conv1.weight: 3 → 4 input channels",)
    assert receipt.missing == receipt.unexpected == ()
    assert_holds(body.net, {**state, "conv1.weight": body.net.conv1.weight})
    assert body.scale.item() == 3

    torch.save(state, path)
    refused(Wrapped(), path, "scale is missing", "60 of 61")
    save_weights(body, tmp_path / "b.safetensors")
    again = tiny(in_channels=4)
    assert load_weights(again, tmp_path / "b.safetensors").unexpected == ("scale",)
    assert_holds(again, body.net.state_dict())
    torch.save(under("model.", body.state_dict()), path)  # a checkpoint of ours
    assert load_weights(body, path, allow_partial=("scale",)).prefix == "model.net."


# The receipt


def test_receipt_is_plain_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(under("module.", state_of(num_classes=5)), path)
    receipt = load_weights(tiny(num_classes=3), path, allow_partial=("fc",))
    plain = receipt.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["clashing"][0] == {"name": "fc.weight", "here": [3, 512], "there": [5, 512]}
    assert plain["stages"]["fc"] == {"loaded": [], "missing": [], "clashing": ["fc.weight", "fc.bias"]}
    assert len(plain["stages"]["layer4"]["loaded"]) == plain["counts"]["layer4"]["loaded"] == 15
    table = str(receipt)
    assert str(path) in table
    assert "'module.'" in table
    assert receipt.sha256[:12] in table
    assert re.search(r"layer4 +15 +0 +0", table)
    assert re.search(r"fc +0 +0 +2", table)
    assert "fc.bias is [3] here, [5] there" in table
    assert "licence" not in table
    assert "trained on" not in table


def test_the_receipts_summary_has_counts_instead_of_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    save_weights(tiny(num_classes=5), path, normalisation=statistics, licence="CC0-1.0")
    receipt = load_weights(tiny(), path)
    assert receipt.summary() == {
        "source": str(path),
        "sha256": receipt.sha256,
        "prefix": "",
        "normalisation": statistics,
        "licence": "CC0-1.0",
        "adapted": [],
        "counts": {stage: {"loaded": n, "missing": 0, "clashing": 0} for stage, n in STAGES.items()},
        "unexpected": 2,
    }
    assert "licence: CC0-1.0" in str(receipt)
    assert "0.25" in str(receipt)


def test_a_checkpoint_says_how_its_images_were_normalised(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    statistics = {"mean": [0.485], "std": [0.229]}
    torch.save({"state_dict": state_of(), "record": {"normalisation": statistics}}, path)
    assert load_weights(tiny(), path).normalisation == statistics
    for record in ({"normalisation": None}, {}, None, [1], "text"):
        torch.save({"state_dict": state_of(), "record": record}, path)
        assert load_weights(tiny(), path).normalisation is None
    torch.save({"state_dict": state_of(), "record": {"normalisation": [1, 2]}}, path)
    refused(tiny(), path, "normalisation")


@pytest.mark.parametrize(
    "record",
    [
        {"config": {"model": {"a": {(1, 2): 3}}, "choices": "none"}},  # which JSON has no place for
        {"config": {"backbone": [1]}, "categories": [1, {"name": 2}], "skeleton": {"names": "ab"}},
        {"categories": {"name": "cat"}, "skeleton": [1]},
    ],
)
def test_what_else_a_record_holds_does_no_harm(record: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": state_of(), "record": record, "epoch": "x"}, tmp_path / "a.ckpt")
    assert load_weights(tiny(), tmp_path / "a.ckpt").source == str(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "text", ["", "null", "{", "[" * 9999, "[1, 2]", '{"mean": 1, "std": 2}', '{"mean": [1e999], "std": [1]}',
             '{"mean": [1' + "0" * 400 + '], "std": [1]}', '{"mean": [0.5], "std": [-1]}', "\x1b[31m"]
)  # fmt: skip
@pytest.mark.parametrize("key", ["normalisation", "pixel_mean"])
def test_metadata_that_cannot_be_read_ends_in_one_line(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state_of(), path, {key: text, "pixel_std": "[1]"})
    refused(tiny(), path, "normalisation")


# Saving


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    body = resnext26_32x4d(num_classes=3).to(memory_format=torch.channels_last)
    body.load_state_dict(state_of(body))
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [1 / 3, 1e-7, 57.12 / 255]}
    save_weights(body, path, normalisation=statistics, licence="Apache-2.0", source="runs/x", epochs="12")
    again = resnext26_32x4d(num_classes=3)
    receipt = load_weights(again, path)
    assert_holds(again, body.state_dict())
    assert receipt.normalisation == statistics
    assert receipt.licence == "Apache-2.0"
    assert receipt.metadata["source"] == "runs/x"
    assert receipt.metadata["epochs"] == "12"
    assert receipt.metadata["network"] == "ResNeXt"
    assert json.loads(receipt.metadata["features"])["c5"] == {"channels": 2048, "stride": 32}
    with safetensors.safe_open(path, "pt") as file:  # torch's own strict load takes it as it is
        body.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_one_tensor_under_two_names_is_saved(tmp_path: Path) -> None:
    body = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    body["b"].weight = body["a"].weight
    save_weights(body, tmp_path / "a.safetensors")
    before = body["a"].weight.clone()
    nn.init.zeros_(body["a"].weight)
    load_weights(body, tmp_path / "a.safetensors")
    assert torch.equal(body["a"].weight, before)
    assert body["b"].weight is body["a"].weight


def test_where_a_network_strides_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first, other = (ResNeXt((1, 1), base_width=4, stride_in_1x1=on) for on in (True, False))
    save_weights(first, path)
    assert load_weights(ResNeXt((1, 1), base_width=4, stride_in_1x1=True), path).missing == ()
    refused(other, path, "stride_in_1x1=true")
    save_weights(other, path)
    refused(first, path, "stride_in_1x1=false")
    refused(FPN(first, 8), path, "stride_in_1x1=false", allow_partial=True)


def test_where_the_network_of_a_run_strides_is_known(tmp_path: Path) -> None:
    path, first, other = (
        tmp_path / "a.ckpt",
        *(ResNeXt((1, 1), base_width=4, stride_in_1x1=on) for on in (True, False)),
    )

    def of_run(body: nn.Module, **settings: Any) -> Path:
        torch.save({"state_dict": body.state_dict(), "record": {"config": {"backbone": settings}}}, path)
        return path

    assert load_weights(first, of_run(first, stride_in_1x1=True)).missing == ()
    refused(other, path, "stride_in_1x1=true")
    refused(first, of_run(other, stride_in_1x1=False), "stride_in_1x1=false")
    refused(first, of_run(other, _target_="resnext_backbones.ResNeXt"), "stride_in_1x1=false")
    assert load_weights(first, of_run(first, _target_="theirs.ResNet")).missing == ()  # who knows
    refused(other, of_run(other, stride_in_1x1="perhaps"), "stride_in_1x1=perhaps", "true or false")


def test_saving_over_what_was_just_loaded(tmp_path: Path) -> None:
    path, body = tmp_path / "a.safetensors", tiny()
    save_weights(body, path)
    again = tiny()
    load_weights(again, path)
    nn.init.ones_(again.conv1.weight)
    save_weights(again, path)
    load_weights(body, path)
    assert_holds(body, again.state_dict())


@pytest.mark.parametrize(
    ("step", "fault", "raised"),
    [
        ("write", OSError(28, "No space left on device"), UsageError),
        ("write", KeyboardInterrupt(), KeyboardInterrupt),
        ("rename", PermissionError(13, "Permission denied"), UsageError),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(
    step: str, fault: BaseException, raised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(tiny(), path)
    before = path.read_bytes()

    def half(tensors: Any, part: Path, metadata: Any) -> None:
        part.write_bytes(b"half")
        raise fault

    def fail(*args: object) -> None:
        raise fault

    if step == "write":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr("os.replace", fail)
    with pytest.raises(raised):
        save_weights(tiny(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("a.pth", "a", "none/a.safetensors", "folder.safetensors"):
        with pytest.raises(UsageError, match=re.escape(name)):
            save_weights(tiny(), tmp_path / name)
    statistics: list[Any] = [
        {"mean": [1.0]},
        {"mean": [1.0], "std": [0.0]},
        {"mean": [1.0], "std": [1.0, 1.0]},
    ]
    statistics += [
        [1],
        "x",
        {"mean": [math.nan], "std": [1.0]},
        {"mean": [], "std": []},
        {"mean": 1, "std": 1},
    ]
    for normalisation in statistics:
        with pytest.raises(UsageError, match="normalisation="):
            save_weights(tiny(), path, normalisation=normalisation)
    with pytest.raises(UsageError, match="epochs=3"):
        save_weights(tiny(), path, epochs=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="network='x'"):
        save_weights(tiny(), path, network="x")
    body = tiny()
    body.bn1.running_var[3] = torch.inf
    with pytest.raises(UsageError, match=r"infinite values in bn1\.running_var"):
        save_weights(body, path)
    assert not path.exists()


# Freezing


@pytest.mark.parametrize("at", range(6))
def test_frozen_stages_do_not_move(at: int) -> None:
    body = tiny(num_classes=3)
    freeze(body, at)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in body.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        body.train()
        body.classify(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    after = body.state_dict()
    still = {name for name in after if torch.equal(after[name], before[name])}
    frozen = ["conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."][: at + 1 if at else 0]
    assert still == {name for name in after if name.startswith(tuple(frozen))}
    assert isinstance(body.bn1, FrozenBatchNorm2d) == (at > 0)


@pytest.mark.parametrize("at", [-1, 6, True, 1.5, "2"])
def test_freezing_beyond_the_stages_is_refused(at: Any) -> None:
    with pytest.raises(UsageError, match=r"take 0 … 5"):
        freeze(tiny(), at)


def test_freezing_wants_declared_stages() -> None:
    with pytest.raises(UsageError, match=r"fpn\.body"):
        freeze(FPN(tiny(), 16), 2)


# Another network


def test_a_deeper_network_is_refused(tmp_path: Path) -> None:
    deeper = ResNeXt((1, 2, 1, 1), block="basic", base_width=8)
    save_weights(deeper, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"layer2\.1\.bn1\.bias has no place in it"):
        load_weights(tiny(), tmp_path / "a.safetensors")
    receipt = load_weights(tiny(), tmp_path / "a.safetensors", allow_partial=["layer2"])
    assert "layer2.1.bn2.bias" in receipt.unexpected


def test_a_network_with_more_in_its_blocks_is_refused(tmp_path: Path) -> None:
    save_weights(tiny(se_reduction=8), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"layer1\.0\.se\.fc1\.weight has no place in it"):
        load_weights(tiny(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["batch", "frozen"])
def test_batch_norms_are_no_group_norms(kind: Any, tmp_path: Path) -> None:
    """Their weights have the same names and shapes, and mean something else without the statistics."""
    save_weights(tiny(norm=kind), tmp_path / "a.safetensors")
    refused(tiny(norm="group"), tmp_path / "a.safetensors", "layer1.0.bn1 is a batch norm there")
    save_weights(tiny(norm="group"), tmp_path / "a.safetensors")
    refused(tiny(norm=kind), tmp_path / "a.safetensors", "bn1.running_mean is missing")
    assert load_weights(tiny(norm="group"), tmp_path / "a.safetensors").unexpected == ()


def test_what_lies_outside_the_stages_is_no_fault(tmp_path: Path) -> None:
    torch.save(detector_checkpoint(), tmp_path / "a.ckpt")
    assert any("rpn." in name for name in load_weights(tiny(), tmp_path / "a.ckpt").unexpected)


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"allow_partial=\['fcc'\]: ResNeXt has the stages"):
        load_weights(tiny(), tmp_path / "a.safetensors", allow_partial=("fcc",))


def test_nothing_is_loaded_into_meta(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="ResNeXt is on meta"):
        load_weights(tiny().to("meta"), tmp_path / "a.safetensors")


def test_arguments_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    """As torchvision's and timm's training scripts save them."""
    torch.save({"model": tiny().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    assert load_weights(tiny(), tmp_path / "a.pth").prefix == "model."


def test_a_file_that_unfolds_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MOST_ENTRIES", 1000)
    for innermost in (torch.zeros(1), 1, {0: {}}):  # also where no tensor comes up that could be counted
        content: dict[str, Any] = {"x": innermost}
        for _ in range(20):
            content = {"a": content, "b": content}
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UsageError, match="more than 1,000 entries"):
            load_weights(tiny(), tmp_path / "a.pth")


def test_freezing_is_all_or_nothing() -> None:
    body = tiny()
    body.layer2[0].bn2 = nn.BatchNorm2d(128, affine=False)
    with pytest.raises(UsageError, match=r"cannot freeze 0\.bn2, a .*BatchNorm2d"):
        freeze(body, at=5)
    assert all(p.requires_grad for p in body.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in body.modules())


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run's best.ckpt may be; the receipt's SHA-256 would be of other weights."""
    path = tmp_path / "a.safetensors"
    save_weights(tiny(), path)
    read = weight_files.read

    def replaced_meanwhile(*args: Any) -> Any:
        save_weights(tiny(), path)
        return read(*args)

    monkeypatch.setattr(weight_files, "read", replaced_meanwhile)
    refused(tiny(), path, "was written while it was read")


def test_an_equal_file_may_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that download the same weights each put them under the same name."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_weights(tiny(), path)
    read = weight_files.read

    def replaced_meanwhile(*args: Any) -> Any:
        shutil.copy(path, other)
        os.replace(other, path)
        return read(*args)

    monkeypatch.setattr(weight_files, "read", replaced_meanwhile)
    assert load_weights(tiny(), path).sha256 == weight_files.sha256(path)
