"""`check_backbone` passes what keeps the contract, the library's own networks first, and names every way of
breaking it."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import pytest
import torch
import torch.nn.functional as F
from conftest import mostly_slow
from torch import Tensor, nn

from resnext_backbones import VARIANTS, Backbone, FeatureSpec, ResNeXt, UsageError, check_backbone, convert
from resnext_backbones.conformance import CHECKS


class Honest(nn.Module):
    """Two levels, from convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = {"c1": FeatureSpec(4, 2), "c2": FeatureSpec(6, 4)}
        self.a = nn.Conv2d(3, 4, 3, 2, 1)
        self.b = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c1 = self.a(images)
        return {"c1": c1, "c2": self.b(c1)}


class WrongOrder(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(reversed(super().forward(images).items()))


class MissingLevel(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"c1": super().forward(images)["c1"]}


class NotADict(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return list(super().forward(images).values())  # type: ignore[return-value]


class WrongChannels(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.features["c2"] = FeatureSpec(8, 4)


class RoundsDown(Honest):
    """Right on sizes that divide, wrong on odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 2, 2)


class Restless(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: F.dropout(x) for name, x in super().forward(images).items()}


class Counting(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        return super().forward(images)


class SpareHead(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)


class Detached(Honest):
    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images)


class NotFinite(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            name: x.sum() - x.sum() + torch.log(x - x.max()) for name, x in super().forward(images).items()
        }


class CoarsestFirst(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.features = dict(reversed(self.features.items()))


class Undeclared(Honest):
    def __init__(self) -> None:
        super().__init__()
        del self.features


class InPlace(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images.mul_(2))


class NotFloat(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: x.round().int() for name, x in super().forward(images).items()}


class Neighbourly(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images - images.mean())


class Crowd(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images * len(images))


class NeedsCompany(Honest):
    """A batch norm over a pooled image, as in an unguarded ASPP."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = super().forward(images)
        return {**maps, "c2": maps["c2"] + self.bn(maps["c2"].mean((2, 3), keepdim=True))}


class NanGradient(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: x + (x - x).sqrt() for name, x in super().forward(images).items()}


class Thawing(Honest):
    """Changes a weight by hand, as a spectral norm or a weight decay inside forward would."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.training:
            with torch.no_grad():
                self.a.weight.mul_(0.9)
        return super().forward(images)


class ThawingStage(Thawing):
    stages: ClassVar = {"stem": ("a",), "rest": ("b",)}


class Unloadable(Honest):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {f"old_{name}": value for name, value in state.items()}


class ForgetfulConv(nn.Conv2d):
    def _load_from_state_dict(self, *args: Any) -> None:
        pass  # takes nothing in, and reports nothing missing


class LoadsNothing(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.a = ForgetfulConv(3, 4, 3, 2, 1)


class Single(Honest):
    def __deepcopy__(self, memo: Any) -> Self:
        return self


class Uncopyable(Honest):
    def __deepcopy__(self, memo: Any) -> Self:
        raise RuntimeError("only one of me")


class Unpicklable(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: x * 2


class WrongWhenPickled(Honest):
    factor = 1.0

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.factor = 2.0

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)._with(self.state_dict())

    @classmethod
    def _with(cls, state: Any) -> Self:
        new = cls()
        new.load_state_dict(state)
        return new

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: x * self.factor for name, x in super().forward(images).items()}


class ReadsMemory(Honest):
    """Takes for granted that pixels lie one row after another."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images.view(len(images), -1).view(images.shape))


class ReadsStrides(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        n, c, h, w = images.shape
        return super().forward(images.as_strided((n, c, h, w), (c * h * w, h * w, w, 1)))


class WrongWhenExported(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images * 2 if torch.compiler.is_exporting() else images)


class WrongWhenCopied(Honest):
    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()  # with other random weights


class Unfreezing(Honest):
    """Lets the optimizer move what was frozen."""

    stages: ClassVar = {"stem": ("a",), "rest": ("b",)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.a.weight.requires_grad_(True)
        return super().forward(images)


class ThawingLater(Honest):
    stages: ClassVar = {"stem": ("a",), "c1": (), "c2": ("b",)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.training:
            with torch.no_grad():
                self.b.weight.mul_(0.9)
        return super().forward(images)


class NoSuchStage(Honest):
    stages: ClassVar = {"stem": ("conv1",)}


class SecondByFirst(Honest):
    """Normalises every image by the first of its batch."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images - images[:1].mean())


class HiddenStatistic(Honest):
    """Its running mean is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.mean += 0.1 * images.detach().square().mean()
        return super().forward(images - self.mean)


class HiddenCounter(HiddenStatistic):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.mean += 1
        return Honest.forward(self, images)


class OtherPrecision(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: x.half() for name, x in super().forward(images).items()}


class EvenOnly(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[-1] % 4:
            raise ValueError("input must be\ndivisible by 4")
        return super().forward(images)


class Unexportable(Honest):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images * 2 if images.max().item() > 0 else images)


FAULTS = {
    InPlace: "changes the images",
    NotFloat: "c1 of images in torch.float32 must be a tensor of this kind, got torch.int32",
    Neighbourly: "c1 of an image depends on what else is in its batch",
    Crowd: "c1 of an image depends on what else is in its batch",
    NeedsCompany: r"forward of images \(1, 3, 64, 64\) ends in: Expected more than 1 value per channel",
    NanGradient: "the gradient of a.weight is not finite",
    Thawing: "a.weight is frozen, but a training step changes it",
    ThawingStage: "a.weight is frozen, but a training step changes it",
    Unloadable: "a.weight is not in the state dict",
    LoadsNothing: "c1 differs after a round trip through the state dict",
    Single: "a deep copy shares a.weight",
    Uncopyable: "cannot be copied: only one of me",
    Unpicklable: "cannot be pickled",
    WrongWhenPickled: "c1 differs after pickling",
    ReadsMemory: "view size is not compatible .* in channels-last memory",
    ReadsStrides: "c1 differs for images in channels-last memory",
    Unexportable: "torch.export refuses it",
    WrongWhenExported: "c1 differs after torch.export",
    WrongWhenCopied: "c1 differs in a deep copy",
    Unfreezing: "a.weight is frozen, but a training step changes it",
    ThawingLater: "b.weight is frozen, but a training step changes it",
    NoSuchStage: r"stages\['stem'\] names conv1, which it does not have",
    SecondByFirst: "c1 of an image depends on what else is in its batch",
    HiddenStatistic: "c1 differs after a round trip through the state dict",
    HiddenCounter: "mean is changed by a forward pass in evaluation",
    OtherPrecision: "c1 of images in torch.float32 must be a tensor of this kind, got torch.float16",
    EvenOnly: r"forward of images \(2, 3, 96, 65\) ends in: input must be",
    WrongOrder: r"in this order, got \['c2', 'c1'\]",
    MissingLevel: r"got \['c1'\]",
    NotADict: "must return a dict .* got list",
    WrongChannels: r"c2 .* is \(2, 6, 16, 16\), but FeatureSpec\(channels=8, stride=4\)",
    RoundsDown: r"c1 of images \(2, 3, 96, 65\)",
    Restless: "c1 differs between two evaluations",
    Counting: "seen is changed by a forward pass in evaluation",
    SpareHead: "no gradient reaches fc.weight",
    Detached: "no gradient leaves forward",
    NotFinite: "c1 .* is not finite",
    CoarsestFirst: "finest first",
    Undeclared: "features must be a dict",
}


def test_the_honest_one_passes_and_is_left_as_it_was() -> None:
    body = Honest().train()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    assert isinstance(body, Backbone)
    check_backbone(body)
    assert body.training
    assert all(p.grad is None for p in body.parameters())
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


def test_a_wholly_frozen_body_passes() -> None:
    check_backbone(Honest().requires_grad_(False))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match=FAULTS[fault]) as caught:
        check_backbone(fault())
    assert fault.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [Crowd, ReadsStrides, WrongWhenExported])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_hide_no_fault(fault: type[nn.Module], dtype: torch.dtype) -> None:
    check_backbone(Honest().to(dtype))
    with pytest.raises(UsageError, match=FAULTS[fault]):
        check_backbone(fault().to(dtype))


class ExtraState(Honest):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 2}


class Quantised(Honest):
    """Its first parameter is of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a.weight = nn.Parameter(torch.ones(4, 3, 3, 3, dtype=torch.int8), requires_grad=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c1 = F.conv2d(images, self.a.weight.to(images.dtype), self.a.bias, 2, 1)
        return {"c1": c1, "c2": self.b(c1)}


class PlainNorm(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6, affine=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = super().forward(images)
        return {**maps, "c2": self.bn(maps["c2"])}


class Buffers(nn.Module):
    """No parameters; a fixed filter in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.features = {"c1": FeatureSpec(1, 2)}
        self.register_buffer("filter", torch.ones(1, 3, 3, 3, dtype=torch.float64))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"c1": F.conv2d(images, self.filter, stride=2, padding=1)}


@pytest.mark.parametrize("body", [ExtraState, Quantised, PlainNorm, Buffers])
def test_unusual_but_right_ones_pass(body: type[nn.Module]) -> None:
    subject = body()
    state = torch.get_rng_state()
    check_backbone(subject)
    assert torch.equal(torch.get_rng_state(), state)  # nobody's random numbers are used up


@pytest.mark.parametrize(
    ("subject", "arguments", "message"),
    [
        (42, {}, "int is not an nn.Module"),
        (nn.Identity(), {}, "Identity.features must be a dict"),
        (Honest().to("meta"), {}, "on meta computes nothing"),
        (Honest(), {"sizes": (64, 65)}, "64 in sizes is no"),
        (Honest(), {"sizes": ((64, 0),)}, r"\(64, 0\) in sizes is no"),
        (Honest(), {"in_channels": 4}, "forward of images .* ends in: "),
    ],
)
def test_what_cannot_be_checked_is_one_line(subject: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_backbone(subject, **arguments)
    assert "\n" not in str(caught.value)


def test_a_check_can_be_left_out_by_name() -> None:
    check_backbone(Unexportable(), skip=["exported"])
    with pytest.raises(UsageError, match=r"skip=\['export'\] names no check; there are maps, "):
        check_backbone(Honest(), skip=["export"])
    with pytest.raises(UsageError, match="sizes is empty"):
        check_backbone(Honest(), sizes=())


def test_every_check_has_a_body_that_fails_it() -> None:
    """By that check alone: all others are left out."""
    finders = {
        "maps": WrongChannels,
        "deterministic": Counting,
        "batch_of_one": NeedsCompany,
        "gradients": SpareHead,
        "frozen": Thawing,
        "state_dict": Unloadable,
        "copied": Single,
        "pickled": Unpicklable,
        "channels_last": ReadsMemory,
        "exported": Unexportable,
    }
    assert list(finders) == [check.__name__ for check in CHECKS]
    for check, body in finders.items():
        others = [other for other in finders if other != check]
        with pytest.raises(UsageError):
            check_backbone(body(), skip=others)


IMAGENET, CIFAR = ((64, 64), (96, 65), (33, 130)), ((16, 16), (17, 24), (9, 33))
OPTIONS: dict[str, dict[str, Any]] = {
    "se": {"se_reduction": 16},
    "depthwise": {"cardinality": 1, "base_width": 32, "depthwise": True},
    "stride in 1x1": {"stride_in_1x1": True},
    "deep stem": {"stem": "deep"},
    "cifar stem": {"stem": "cifar"},
    "dilated": {"output_stride": 8},
    "stochastic depth": {"stochastic_depth": 0.2},
    "group norm": {"norm": "group"},
    "sync norm": {"norm": "sync"},
    "frozen norm": {"norm": "frozen"},
    "grey": {"in_channels": 1},
    "recomputed": {"activation_checkpointing": True},
    "pre-activation": {"block": "preact"},
    "everything": {
        "se_reduction": 8,
        "stem": "deep",
        "output_stride": 16,
        "norm": "group",
        "in_channels": 4,
        "stochastic_depth": 0.1,
        "activation_checkpointing": True,
        "stride_in_1x1": True,
    },
}


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, "resnet18", "resnext50_32x4d", "resnext29_32x4d"))
def test_every_variant(name: str, shallow: Callable[..., ResNeXt]) -> None:
    check_backbone(shallow(name), sizes=CIFAR if name.startswith("resnext29") else IMAGENET)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str) -> None:
    arguments = {"cardinality": 8, "base_width": 4, **OPTIONS[option]}
    body = ResNeXt((1, 2, 1, 1), **arguments)
    check_backbone(body, in_channels=arguments.get("in_channels", 3))


@pytest.mark.parametrize("form", ["a", "b"])
@pytest.mark.parametrize("block", ["bottleneck", "preact"])
def test_every_form(form: str, block: str) -> None:
    check_backbone(convert(ResNeXt((1, 1, 1, 2), 4, 8, block=block), form))


@pytest.mark.parametrize("name", ["resnext29_8x64d", "resnext29_1x64d"])
def test_cifar_with_pre_activation(name: str, shallow: Callable[..., ResNeXt]) -> None:
    check_backbone(shallow(name, block="preact"), sizes=CIFAR)
