"""Torchvision's and timm's classifiers as bodies, against the networks themselves and their papers."""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet18_Weights

from resnext_backbones import FPN, UsageError, check_backbone, freeze, freeze_norms
from resnext_backbones.adapters import ClassifierBody, TimmBody, TorchvisionBody

Kind = type[TorchvisionBody] | type[TimmBody]
LEVELS = ("c2", "c3", "c4", "c5")
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

# Channels of the last maps of strides 4, 8, 16 and 32, as the papers print them.
TORCHVISION = {
    "alexnet": (64, 192, 256, 256),  # arXiv 1404.5997
    "convnext_tiny": (96, 192, 384, 768),  # arXiv 2201.03545, table 9
    "densenet121": (256, 512, 1024, 1024),  # arXiv 1608.06993, table 1 with k = 32
    "efficientnet_b0": (24, 40, 112, 1280),  # arXiv 1905.11946, table 1
    "googlenet": (192, 480, 832, 1024),  # arXiv 1409.4842, table 1
    "inception_v3": (192, 288, 768, 2048),  # arXiv 1512.00567, table 1
    "mobilenet_v2": (24, 32, 96, 1280),  # arXiv 1801.04381, table 2
    "mobilenet_v3_small": (16, 24, 48, 576),  # arXiv 1905.02244, table 2
    "regnet_y_400mf": (48, 104, 208, 440),  # arXiv 2003.13678, appendix B, with their SE at 400 MF
    "resnet18": (64, 128, 256, 512),  # arXiv 1512.03385, table 1
    "shufflenet_v2_x0_5": (24, 48, 96, 1024),  # arXiv 1807.11164, table 5
    "swin_t": (96, 192, 384, 768),  # arXiv 2103.14030, section 3.3
    "vgg11_bn": (256, 512, 512, 512),  # arXiv 1409.1556, table 1
}
SWIN = "swin_tiny_patch4_window7_224"
TIMM = {
    "convnext_atto": (40, 80, 160, 320),  # arXiv 2301.00808, appendix
    "densenet121": (256, 512, 1024, 1024),
    "efficientnet_b0": (24, 40, 112, 320),  # timm's features end before the last convolution
    "hrnet_w18_small": (128, 256, 512, 1024),  # arXiv 1908.07919, the head for classification
    "inception_v3": (192, 288, 768, 2048),
    "mobilenetv3_small_050": (8, 16, 24, 288),  # half of the table, rounded to eights
    SWIN: (24, 48, 96, 192),  # a quarter of the width, see SLIM
    "twins_svt_small": (64, 128, 256, 512),  # arXiv 2104.13840
    "vgg11_bn": (256, 512, 512, 512),
}
SLIM = {SWIN: {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}}
SLOW = {"alexnet", "densenet121", "efficientnet_b0", "googlenet", "hrnet_w18_small", "regnet_y_400mf"}
SLOW |= {"shufflenet_v2_x0_5", "twins_svt_small", "swin_t", "inception_v3", "mobilenet_v2"}
SLOW |= {"convnext_tiny", "vgg11_bn", "mobilenet_v3_small", "mobilenetv3_small_050", SWIN}
BODIES = [
    pytest.param(
        *(kind, name, channels),
        id=f"{kind.__name__[:-4]}-{name}",
        marks=[pytest.mark.slow] if name in SLOW or (kind, name) == (TimmBody, "inception_v3") else [],
    )
    for kind, table in ((TorchvisionBody, TORCHVISION), (TimmBody, TIMM))
    for name, channels in table.items()
]


@functools.cache
def built(kind: Kind, name: str) -> ClassifierBody:
    """One body for all tests, in evaluation mode; who changes it takes a copy."""
    torch.manual_seed(0)
    return kind(name, **SLIM.get(name, {})).eval()


def sizes(maps: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {level: tuple(x.shape) for level, x in maps.items()}


@pytest.mark.parametrize(("kind", "name", "channels"), BODIES)
def test_contract_and_pyramid(kind: Kind, name: str, channels: tuple[int, ...]) -> None:
    body = built(kind, name)
    assert {level: (spec.channels, spec.stride) for level, spec in body.features.items()} == {
        f"c{i + 2}": (channels[i], 4 * 2**i) for i in range(4)
    }
    check_backbone(body, sizes=((64, 64), (33, 97)))
    with torch.no_grad():
        maps = FPN(body, out_channels=8).eval()(torch.randn(1, 3, 65, 96))
    assert sizes(maps) == {
        "p2": (1, 8, 17, 24),
        "p3": (1, 8, 9, 12),
        "p4": (1, 8, 5, 6),
        "p5": (1, 8, 3, 3),
        "p6": (1, 8, 2, 2),
    }


# Names


@pytest.mark.parametrize(("kind", "name", "channels"), BODIES)
def test_names_without_the_prefix_are_those_of_the_classifier(
    kind: Kind, name: str, channels: tuple[int, ...]
) -> None:
    body = built(kind, name)
    if kind is TimmBody:
        classifier = timm.create_model(name, **SLIM.get(name, {}))
    else:
        kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        classifier = torchvision.models.get_model(name, weights=None, **kwargs)
    published = {name: x.shape for name, x in classifier.state_dict().items()}
    ours = {name.removeprefix(body.weights_prefix): x.shape for name, x in body.state_dict().items()}
    assert ours.items() <= published.items()
    assert len(ours) > 10 or name == "alexnet"


# Values: the network's own, by its own names


def seen(net: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What modules of torchvision's own network put out."""
    found: dict[str, Tensor] = {}
    for level, name in zip(LEVELS, names, strict=True):
        hook = functools.partial(lambda level, *args: found.update({level: args[-1].clone()}), level)
        net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        net.eval()(images)
    return found


def torchvisions(body: ClassifierBody, name: str, **kwargs: Any) -> nn.Module:
    net = torchvision.models.get_model(name, weights=None, **kwargs)
    missing, unexpected = net.load_state_dict(
        {key.removeprefix("net."): x for key, x in body.state_dict().items()}, strict=False
    )
    assert missing  # the head
    assert not unexpected
    return net


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("mobilenet_v2", ["features.3", "features.6", "features.13", "features.18"]),
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        pytest.param(
            "regnet_y_400mf", [f"trunk_output.block{i}" for i in range(1, 5)], marks=pytest.mark.slow
        ),
    ],
)
def test_a_network_that_rounds_up_gives_its_own_maps(name: str, modules: list[str]) -> None:
    body, images = built(TorchvisionBody, name), torch.randn(1, 3, 65, 94)
    theirs = seen(torchvisions(body, name), modules, images)
    with torch.no_grad():
        ours = body(images)
    for level in LEVELS:
        assert torch.equal(ours[level], theirs[level])


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("vgg11_bn", ["features.13", "features.20", "features.27", "features.28"]),
        ("convnext_tiny", ["features.2.0", "features.4.0", "features.6.0", "features.7.2"]),
        ("swin_t", ["features.1.1", "features.3.1", "features.5.5", "permute"]),
        pytest.param(
            "densenet121",
            ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_network_that_rounds_down_sees_zeros_at_the_right_and_the_bottom(
    name: str, modules: list[str]
) -> None:
    body, images = built(TorchvisionBody, name), torch.randn(1, 3, 72, 68)
    to = {"vgg11_bn": (96, 96), "convnext_tiny": (96, 96), "swin_t": (72, 68), "densenet121": (93, 93)}[name]
    padded = F.pad(images, (0, to[1] - 68, 0, to[0] - 72))
    theirs = seen(torchvisions(body, name), modules, padded)
    if name == "swin_t":  # channels stand last inside, and first behind `permute`
        theirs |= {level: theirs[level].permute(0, 3, 1, 2) for level in ("c2", "c3", "c4")}
    with torch.no_grad():
        ours = body(images)
    for level, height, width in (("c2", 18, 17), ("c3", 9, 9), ("c4", 5, 5), ("c5", 3, 3)):
        assert torch.equal(ours[level], theirs[level][:, :, :height, :width])


def test_inception_is_the_published_one_on_a_padded_image() -> None:
    """Table 1 has 3×3 kernels without padding: those of stride 2 on cells of 1, 2, 4, 8 and 16 px, and two of
    stride 1 on cells of 2 and 4 px. Each moves the first cell's centre by one such cell: for the four levels
    to 9, 13, 21 and 37 px. 37 zeros in front bring them to -28, -24, -16 and 0 px: 7, 3, 1 and 0 cells too
    many. Behind, the last cell of c5 decides: 3 and 4 of them take 75 + 2 · 32 and 75 + 3 · 32 px.
    """
    body, images = built(TorchvisionBody, "inception_v3"), torch.randn(1, 3, 70, 99)
    net = torchvisions(body, "inception_v3", aux_logits=False, init_weights=False, transform_input=False)
    halved = (images * STD + MEAN - 0.5) / 0.5  # what torchvision's transform_input does
    padded = F.pad(halved, (37, 171 - 37 - 99, 37, 139 - 37 - 70))
    theirs = seen(net, ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"], padded)
    with torch.no_grad():
        ours = body(images)
    for level, skip, height, width in (("c2", 7, 18, 25), ("c3", 3, 9, 13), ("c4", 1, 5, 7), ("c5", 0, 3, 4)):
        expected = theirs[level][:, :, skip : skip + height, skip : skip + width]
        rounding = 1e-5 * expected.abs().max().item()  # random weights make values grow from layer to layer
        torch.testing.assert_close(ours[level], expected, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TorchvisionBody, "inception_v3"),
        (TorchvisionBody, "resnet18"),
        pytest.param(TimmBody, "inception_v3", marks=pytest.mark.slow),
    ],
)
def test_cells_are_centred_on_multiples_of_the_stride(kind: Kind, name: str) -> None:
    """A pixel that is no number spoils the cells around its own, alike on all sides."""
    images = torch.randn(1, 3, 224, 256)
    images[:, :, 96, 128] = torch.nan
    with torch.no_grad():
        maps = built(kind, name)(images)
    for level, row, column in (("c2", 24, 32), ("c3", 12, 16)):
        rows, columns = maps[level][0].isnan().any(0).nonzero(as_tuple=True)
        assert rows.min() > 0
        assert rows.max() < maps[level].shape[2] - 1
        assert (rows.min() + rows.max(), columns.min() + columns.max()) == (2 * row, 2 * column)


@pytest.mark.parametrize(
    "name",
    [
        *("vgg11_bn", "mobilenetv3_small_050", "convnext_atto", SWIN),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "hrnet_w18_small")),
    ],
)
def test_timms_maps_are_those_of_its_feature_extractor(name: str) -> None:
    kwargs = SLIM.get(name, {}) | ({"strict_img_size": False} if name == SWIN else {})
    peer = timm.create_model(name, features_only=True, **kwargs).eval()
    strides, channels = peer.feature_info.reduction(), peer.feature_info.channels()
    body, images = built(TimmBody, name), torch.randn(1, 3, 96, 64)
    flat = {key.replace(".", "_"): x for key, x in body.net.state_dict().items()}  # as some of timm's are
    peer.load_state_dict({key: flat[key.replace(".", "_")] for key in peer.state_dict()})
    with torch.no_grad():
        ours, theirs = body(images), dict(zip(strides, peer(images), strict=True))
    for level, spec in body.features.items():
        assert spec.channels == channels[strides.index(spec.stride)]
        x = theirs[spec.stride]
        x = x.permute(0, 3, 1, 2) if name == SWIN else x
        torch.testing.assert_close(ours[level], x, rtol=1e-5, atol=1e-5)


def test_images_are_converted_to_what_published_weights_want() -> None:
    """These of timm want a mean and a deviation of ½."""
    body = TimmBody("test_resnet.r160_in1k").eval()
    assert body.normalisation == {"mean": [0.5] * 3, "std": [0.5] * 3}
    rgb = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours = body((rgb - MEAN) / STD)["c5"]
        theirs = body.net.forward_features((rgb - 0.5) / 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        *(("resnet18", 0.485), ("inception_v3", 0.485)),
        pytest.param("efficientnet_v2_l", 0.5, marks=pytest.mark.slow),
    ],
)
def test_normalisation_is_that_of_torchvisions_weights(name: str, mean: float) -> None:
    with torch.device("meta"):
        normalisation = TorchvisionBody(name).normalisation
    assert normalisation is not None
    assert normalisation["mean"][0] == mean


# Stages and freezing


STAGES: dict[tuple[Kind, str], list[str]] = {
    (TorchvisionBody, "resnet18"): ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"],
    (TorchvisionBody, "vgg11_bn"): [
        "features.0 features.1 features.4 features.5",
        "features.8 features.9 features.11 features.12",
        "features.15 features.16 features.18 features.19",
        "features.22 features.23 features.25 features.26",
        "",  # the last pool
    ],
    (TorchvisionBody, "convnext_tiny"): [
        "features.0",
        "features.1 features.2.0",
        "features.2.1 features.3 features.4.0",
        "features.4.1 features.5 features.6.0",
        "features.6.1 features.7",
    ],
    (TorchvisionBody, "swin_t"): [
        "features.0",
        "features.1",
        "features.2 features.3",
        "features.4 features.5",
        "features.6 features.7 norm",
    ],
    (TorchvisionBody, "mobilenet_v2"): [
        "features.0 features.1",
        "features.2 features.3",
        "features.4 features.5 features.6",
        " ".join(f"features.{i}" for i in range(7, 14)),
        " ".join(f"features.{i}" for i in range(14, 19)),
    ],
    (TimmBody, SWIN): ["patch_embed", "layers.0", "layers.1", "layers.2", "layers.3"],
    (TimmBody, "convnext_atto"): ["stem", "stages.0", "stages.1", "stages.2", "stages.3"],
}


@pytest.mark.parametrize(("kind", "name"), STAGES)
def test_stages(kind: Kind, name: str) -> None:
    expected = [tuple(f"net.{module}" for module in stage.split()) for stage in STAGES[kind, name]]
    assert list(built(kind, name).stages.items()) == list(zip(("stem", *LEVELS), expected, strict=True))


@pytest.mark.parametrize("at", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("kind", "name"), [(TorchvisionBody, "mobilenet_v2"), (TimmBody, "mobilenetv3_small_050")]
)
def test_frozen_maps_stay_and_the_others_learn(kind: Kind, name: str, at: int) -> None:
    body, images = copy.deepcopy(built(kind, name)), torch.randn(2, 3, 64, 64)
    freeze(body, at=at)
    with torch.no_grad():
        before = body(images)
        for parameter in body.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        body.train()(images)  # moves the statistics of what is not frozen
        after = body.eval()(images)
    assert [level for level in LEVELS if torch.equal(before[level], after[level])] == list(LEVELS[: at - 1])
    assert any(parameter.requires_grad for parameter in body.parameters()) is (at < 5)


@pytest.mark.parametrize(
    ("kind", "name"), [(TorchvisionBody, "mobilenet_v2"), (TimmBody, "mobilenetv3_small_050")]
)
def test_frozen_norms_compute_what_live_ones_did(kind: Kind, name: str) -> None:
    """timm's have an activation inside."""
    body, images = copy.deepcopy(built(kind, name)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        body.train()(images)  # gives the norms statistics
        expected = body.eval()(images)
        found = freeze_norms(body).train()(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    for level in LEVELS:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-4)


# Arguments


def test_arguments_reach_the_builders() -> None:
    body: ClassifierBody = TimmBody("test_resnet", in_chans=4)
    assert sizes(body(torch.randn(2, 4, 33, 64)))["c5"] == (2, 96, 2, 2)
    body = TorchvisionBody("resnet18", norm_layer=functools.partial(nn.GroupNorm, 8))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(TorchvisionBody, "convnext_tiny", stochastic_depth_prob=0.9),
        functools.partial(TimmBody, "convnext_atto", drop_path_rate=0.9),
    ],
)
def test_stochastic_depth_is_for_training(build: Callable[[], ClassifierBody]) -> None:
    body, images = build(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for training in (True, False, True):
            first, second = body.train(training)(images), body(images)
            assert torch.equal(first["c4"], second["c4"]) is not training


# Refusals


REFUSED: dict[str, tuple[Kind, Any, dict[str, Any], str]] = {
    "no four levels": (TorchvisionBody, "squeezenet1_0", {}, r"no map of stride 32 \(it has 2, 4, 8, 16\)"),
    "dilated": (
        TorchvisionBody,
        "resnet50",
        {"replace_stride_with_dilation": [False, False, True]},
        r"no map of stride 32 \(it has 2, 4, 8, 16\)",
    ),
    "one size": (TorchvisionBody, "vit_b_16", {}, "256×320 px, .*Expected 224"),
    "windows of one size": (TorchvisionBody, "maxvit_t", {}, "does not take images of 256×320 px"),
    "a detector": (TorchvisionBody, "fasterrcnn_resnet50_fpn", {}, "no classifier .*nearest are .*resnet50"),
    "quantised": (TorchvisionBody, "quantized_resnet18", {}, "no classifier"),
    "of videos": (TorchvisionBody, "r3d_18", {}, "no classifier"),
    "misspelt": (TorchvisionBody, "resnt50", {}, "'resnt50'; its nearest are resnet50,"),
    "no name": (TorchvisionBody, None, {}, "no classifier None"),
    "a huge name": (TorchvisionBody, "x" * 10**6, {}, "no classifier 'xxx"),
    "no such argument": (TorchvisionBody, "resnet18", {"in_chans": 4}, "resnet18 .*in_chans"),
    "weights": (TorchvisionBody, "resnet18", {"weights": "DEFAULT"}, "leave out weights.*load_weights"),
    "timm: one stride": (TimmBody, "samvit_base_patch16_224", {}, r"no map of stride 4, 8, 32 \(it has 16\)"),
    "timm: no stride 4": (TimmBody, "efficientvit_m0", {}, r"no map of stride 4, 8 \(it has 16, 32, 64\)"),
    "timm: one size": (TimmBody, "vit_tiny_patch16_224", {}, "256×320 px, .*doesn't match model"),
    "timm: misspelt": (TimmBody, "convnxt_atto", {}, "'convnxt_atto'; its nearest are convnext_atto,"),
    "torchvision: dilated": (
        TorchvisionBody,
        "resnet18",
        {"output_stride": 8},
        "not dilate.*Semantic FPN",
    ),
    "timm: dilated": (TimmBody, "resnet18", {"output_stride": 8}, "not dilate.*Semantic FPN"),
    "timm: no tag": (TimmBody, "resnet18.nobody", {}, "resnet18.nobody cannot be built .*nobody"),
    "timm: elsewhere": (TimmBody, "hf-hub:timm/resnet18", {}, "timm has no network 'hf-hub:timm/resnet18'"),
    "timm: no name": (TimmBody, None, {}, "timm has no network None"),
    "timm: no such argument": (TimmBody, "resnet18", {"in_channels": 4}, "resnet18 .*in_channels"),
    "timm: weights": (TimmBody, "resnet18", {"pretrained": True}, "leave out pretrained.*load_weights"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refusals(fault: str) -> None:
    kind, name, kwargs, message = REFUSED[fault]
    with pytest.raises(UsageError, match=message) as caught, torch.device("meta"):
        kind(name, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


class Picky(nn.Module):
    """Takes maps whose width divides by a number."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.divisor:
            raise ValueError(f"{x.shape[-1]} does not divide by {self.divisor}")
        return x


class Doubling(ResNet):
    """Does something by itself between two modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.layer4(self.layer3(self.layer2(x) * 2))


def picky(divisor: int, padding: int = 1) -> ResNet:
    net = torchvision.models.resnet18()
    net.relu, net.maxpool.padding = Picky(divisor), padding
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Doubling(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]),
            "between layer2.0 and layer3.0",
        ),
        (lambda: picky(32), "97×160 px, .*80 does not divide by 32"),
        (lambda: picky(16, padding=0), "do not grow evenly"),
        (lambda: picky(16), None),
    ],
)
def test_odd_networks(
    build: Callable[[], nn.Module], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*, weights: ResNet18_Weights | None = None) -> ResNet:
        return build()

    odd.__module__ = torchvision.models.resnet.__name__
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "odd", odd)
    if message is None:  # one that takes multiples of 32 gets them
        assert sizes(TorchvisionBody("odd")(torch.randn(2, 3, 33, 65)))["c3"] == (2, 128, 5, 9)
    else:
        with pytest.raises(UsageError, match=message):
            TorchvisionBody("odd")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'resnext-backbones\[timm\]'"):
        TimmBody("resnet18")


def test_a_timm_without_feature_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.resnet.ResNet, "forward_intermediates")
    with pytest.raises(UsageError, match=r"gives no maps of test_resnet; .*pip install -U timm"):
        TimmBody("test_resnet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "mobilenetv3_small_050", "convnext_atto", "resnet10t"])
def test_all_of_a_network_can_be_frozen(name: str) -> None:
    body = TimmBody(name)
    freeze(body, at=5)
    assert [name for name, p in body.named_parameters() if p.requires_grad] == []
