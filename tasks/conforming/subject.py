"""The task under test, and what a check says of it."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tasks.base import BaseTask, parameter_groups
from tasks.data.module import ImageData
from tasks.data.samplers import EvalSampler

Made = tuple[BaseTask, ImageData]


class Fault(Exception):
    """What a check found; its text says what is wrong and what to do."""


class NotApplicable(Exception):
    """Why a check says nothing about this task."""


class Subject:
    """The task under test: made anew as often as needed, and batches to test it on."""

    def __init__(self, make: Callable[[], Made], steps: int, folder: Path) -> None:
        self.make, self.steps, self.folder = make, steps, folder
        task, data = self.fresh()
        self.name = type(task).__name__
        self.training = first_batch(data, "train")
        self.evaluation = first_batch(data, "val")
        self.weights: dict[str, Tensor] | None = None
        self.falls: tuple[float, float] | None = None

    def fresh(self, seed: int = 0) -> Made:
        return made(self.make, seed)

    def learned(self) -> Made:
        """With weights that know the training batch, so that something is found in it."""
        task, data = self.fresh()
        if self.weights is None:
            self.falls = overfit(task, self.training, self.steps)
            self.weights = copy.deepcopy(task.state_dict())
        task.load_state_dict(self.weights)
        return task, data


def made(make: Callable[[], Made], seed: int) -> Made:
    torch.manual_seed(seed)
    task, data = make()
    data.setup("fit")
    data.num_workers = 0
    return task, data


def first_batch(data: ImageData, split: str) -> Any:
    dataset: Any = data.prepared(split)
    sampler: Any = data.train_sampler(0, 1) if split == "train" else EvalSampler(len(dataset))
    return next(iter(DataLoader(dataset, data.batch_size, sampler=sampler, collate_fn=type(data).collate)))


def named_losses(task: BaseTask, batch: Any) -> dict[str, Tensor]:
    found = task.losses(batch)
    if not isinstance(found, dict) or not found:
        raise Fault(f"`losses` gives {type(found).__name__}; give a dict of at least one name and scalar")
    for name, loss in found.items():
        if not isinstance(name, str) or not name or "/" in name or name == "loss":
            raise Fault(
                f"`losses` names one {name!r}; give it a name of its own, without '/' (the sum is logged as "
                "'loss')"
            )
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            said = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise Fault(f"the loss {name} is {said}; give a tensor of one float, of shape []")
        if not loss.isfinite():
            raise Fault(f"the loss {name} is {loss.item()}")
    if not torch.stack(list(found.values())).sum().requires_grad:
        raise Fault("no loss depends on a parameter; is it under no_grad, or detached?")
    return found


def overfit(task: BaseTask, batch: Any, steps: int) -> tuple[float, float]:
    """Trains on one batch; the loss before and after, with the same random numbers at each step."""
    optimizer = torch.optim.AdamW(parameter_groups(task.model, 0.0), lr=3e-3)
    totals = []
    for _ in range(steps + 1):
        torch.manual_seed(0)
        total = torch.stack(list(task.losses(copy.deepcopy(batch)).values())).sum()
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 10.0)
        optimizer.step()
    return totals[0], float(np.mean(totals[-3:]))


@contextlib.contextmanager
def evaluated(task: BaseTask) -> Iterator[None]:
    task.eval()
    with torch.no_grad():
        yield


def said(error: BaseException) -> str:
    """An error on one line; of a process's, what was raised there."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.multiprocessing.ProcessRaisedException):
        return lines[-1][:300]
    return f"{type(error).__name__}: {lines[0][:300]}"
