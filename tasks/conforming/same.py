"""Whether two things hold the same bits, and where they do not."""

import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def state_of(task: nn.Module) -> dict[str, Tensor]:
    """Its tensors by name, also those that no state dict has."""
    return {name: x.detach().clone() for name, x in (*task.named_parameters(), *task.named_buffers())}


def differing(one: Any, other: Any, where: str = "") -> str | None:
    """Where two nested containers first differ, None where they hold the same bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        return None if same else where or "a tensor"
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        pairs: Any = ((key, one[key], other[key]) for key in one)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        names = getattr(one, "_fields", range(len(one)))
        pairs = zip(names, one, other, strict=True)
    elif type(one) is type(other) and type(one).__eq__ is not object.__eq__:
        return None if one == other else where or repr(one)[:40]
    else:
        return None if type(one) is type(other) else where or "its form"
    inner = (differing(a, b, f"{where}.{key}" if where else str(key)) for key, a, b in pairs)
    return next(filter(None, inner), None)


def random_state() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),  # noqa: NPY002, which libraries still draw from
        "python": pickle.dumps(random.getstate()),
    }
