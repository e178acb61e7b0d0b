"""Loading: every kind of source, every fault of one, the receipt. Freezing: what must not move, does not."""

import hashlib
import json
import os
import pickle
import re
import urllib.error
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN

from resnext_backbones import (
    FPN,
    BasicBlock,
    FrozenBatchNorm2d,
    ResNeXt,
    UsageError,
    freeze,
    freeze_norms,
    load_weights,
    resnet18,
)

State = dict[str, torch.Tensor]

# Counted by hand: a norm has 4 tensors, a basic block 2 × (1 + 4), its projection 1 + 4.
STAGES = {"stem": 5, "layer1": 10, "layer2": 15, "layer3": 15, "layer4": 15}


def tiny(**kwargs: Any) -> ResNeXt:
    return ResNeXt(BasicBlock, (1, 1, 1, 1), base_width=8, **kwargs)


def state_of(**kwargs: Any) -> State:
    """Of a network whose every tensor, statistics among them, is random."""
    state = tiny(**kwargs).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v + 7 for k, v in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def assert_holds(body: nn.Module, state: State) -> None:
    for name, value in body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[name]), name


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
    assert {stage: counts["loaded"] for stage, counts in receipt.stages.items()} == STAGES
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


def refused(body: nn.Module, source: str | Path, *words: str, **kwargs: Any) -> None:
    """The load ends in one line with these words, and the body is as it was."""
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_weights(body, source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (*words, str(source))), message
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


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
    assert receipt.stages["layer3"] == {"loaded": 14, "missing": 1, "clashing": 0}
    assert_holds(body, {**state, "layer3.0.conv1.weight": kept})


def test_clashing_shapes_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(state_of(num_classes=5), path)
    body = tiny(num_classes=3)
    refused(body, path, "fc.weight is [3, 512] here, [5, 512] there")
    refused(
        tiny(num_classes=3, in_channels=1), path, "conv1.weight is [64, 1, 7, 7] here", allow_partial="fc"
    )

    receipt = load_weights(body, path, allow_partial=("fc",))
    assert [(clash.name, clash.here, clash.there) for clash in receipt.clashing] == [
        ("fc.weight", (3, 512), (5, 512)),
        ("fc.bias", (3,), (5,)),
    ]
    assert receipt.stages["fc"] == {"loaded": 0, "missing": 0, "clashing": 2}


def test_another_network_is_refused_even_in_part(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"encoder.blocks.0.weight": torch.ones(3)}, path)
    refused(tiny(), path, "encoder.blocks.0.weight", "conv1.weight", allow_partial=True)
    torch.save(under("model.", state_of()), path)
    refused(tiny(), path, "'mod.'", "model.conv1.weight", allow_partial=True, prefix="mod")


def test_two_bodies_in_one_source_are_not_guessed_between(tmp_path: Path) -> None:
    path, student, teacher = tmp_path / "a.pth", state_of(), state_of()
    torch.save({**under("student.", student), **under("teacher.", teacher)}, path)
    refused(tiny(), path, "'student.'", "'teacher.'", "prefix=")
    body = tiny()
    load_weights(body, path, prefix="teacher")
    assert_holds(body, teacher)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = state_of()
    state["layer4.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "a.pth")
    refused(tiny(), tmp_path / "a.pth", "NaN", "layer4.0.conv1.weight")


# Sources that cannot be read


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_is_unpickled(legacy: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "a.pth", tmp_path / "exploded"
    torch.save({**state_of(), "x": Bomb(mark)}, path, _use_new_zipfile_serialization=not legacy)
    refused(tiny(), path, "more than tensors")
    path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    refused(tiny(), path, "more than tensors")
    assert not mark.exists()


def test_unreadable_files_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    refused(tiny(), path, "no weights at")
    path.write_bytes(b"")
    refused(tiny(), path, "empty")
    path.write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    refused(tiny(), path, "web page")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tiny(), path, "git lfs pull")
    path.write_bytes(bytes(range(256)) * 8)
    refused(tiny(), path, "damaged")
    torch.save([torch.ones(3)], path)
    refused(tiny(), path, "no tensors under names")
    torch.save(torch.ones(3), path)
    refused(tiny(), path)
    loop: dict[str, Any] = {}
    loop["again"] = loop
    torch.save(loop, path)
    refused(tiny(), path, "damaged")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state_of(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(tiny(), path, "again")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    refused(tiny(), tmp_path, "checkpoints/best.ckpt")


# torchvision's names


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for downloads, and no network."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub"


def test_a_failed_download_says_how_to_go_on(hub: Path) -> None:
    name = "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"
    where = str(hub / "checkpoints/resnext50_32x4d-1a0047aa.pth")
    refused(resnet18(), name, "cannot download", "Name or service not known", "https://", where)


def test_misspelt_names_get_the_nearest(hub: Path) -> None:
    refused(tiny(), "ResNeXt50_32x4d_Weights.IMAGENET1K_V2", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2")
    refused(tiny(), "ResNet18_Weights.IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1")
    refused(tiny(), "resnext50", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2")
    refused(tiny(), "https://example.org/a.pth", "download it")


def test_a_name_is_downloaded_once_and_checked(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, remote = state_of(), tmp_path / "remote.pth"
    torch.save(state, remote)
    digest = hashlib.sha256(remote.read_bytes()).hexdigest()
    url = f"https://example.org/models/tiny-{digest[:8]}.pth"
    asked = []

    def download(address: str, path: str, hash_prefix: str) -> None:
        asked.append((address, hash_prefix))
        Path(path).write_bytes(remote.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torchvision.models, "get_weight", lambda name: SimpleNamespace(url=url))
    for _ in range(2):
        body = tiny()
        assert load_weights(body, "Tiny_Weights.V1").sha256 == digest
        assert_holds(body, state)
    assert asked == [(url, digest[:8])]

    cached = hub / f"checkpoints/tiny-{digest[:8]}.pth"
    cached.write_bytes(cached.read_bytes()[:-10])
    refused_cached = pytest.raises(UsageError, match=re.escape(f"{cached} is damaged"))
    with refused_cached:
        load_weights(tiny(), "Tiny_Weights.V1")


def test_every_torchvision_address_carries_its_hash() -> None:
    models = torchvision.models
    for weights in (w for name in models.list_models() for w in models.get_model_weights(name)):
        if not type(weights).__name__.endswith("_QuantizedWeights"):  # these are of no use to a float body
            assert re.search(r"-[0-9a-f]{8,}\.pth$", weights.url), weights


# The receipt


def test_receipt_is_plain_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(under("module.", state_of(num_classes=5)), path)
    receipt = load_weights(tiny(num_classes=3), path, allow_partial=("fc",))
    plain = receipt.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["clashing"][0] == {"name": "fc.weight", "here": [3, 512], "there": [5, 512]}
    table = str(receipt)
    assert str(path) in table
    assert "'module.'" in table
    assert receipt.sha256[:12] in table
    assert re.search(r"layer4 +15 +0 +0", table)
    assert re.search(r"fc +0 +0 +2", table)
    assert "fc.bias is [3] here, [5] there" in table


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
