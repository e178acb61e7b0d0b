"""`check_backbone` passes what keeps the contract and names every way of breaking it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnext_backbones import Backbone, FeatureSpec, UsageError, check_backbone


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


FAULTS = {
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
