"""A small body, weights for it, and what a refused load looks like."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnext_backbones import ResNeXt, UsageError, load_weights

State = dict[str, torch.Tensor]

# Counted by hand: a norm has 4 tensors, a basic block 2 × (1 + 4), its projection 1 + 4.
STAGES = {"stem": 5, "layer1": 10, "layer2": 15, "layer3": 15, "layer4": 15}


def tiny(**kwargs: Any) -> ResNeXt:
    return ResNeXt((1, 1, 1, 1), block="basic", base_width=8, **kwargs)


def state_of(body: nn.Module | None = None, **kwargs: Any) -> State:
    """Of a network, the tiny one by default, whose every tensor, statistics among them, is random."""
    state = (body or tiny(**kwargs)).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v + 7 for k, v in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def assert_holds(body: nn.Module, state: State) -> None:
    for name, value in body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[name]), name


def refused(body: nn.Module, source: str | Path, *words: str, **kwargs: Any) -> None:
    """The load ends in one line with these words, and the body is as it was."""
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_weights(body, source, **kwargs)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    assert all(word in message for word in (*words, str(source)[:60])), message
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
