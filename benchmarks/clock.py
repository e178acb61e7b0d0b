"""A run whose length is a time: its learning rate follows the share that has passed, and it stops with it.

So two programs of different speed get the same minutes without a guess of how many steps fill them, and a
machine that slows down shortens nobody's schedule. `benchmarks.plain_loop` uses the schedule in its own loop;
ours gets both by their import paths, in the places of the schedule and of a callback:

    uv run train.py … trainer.max_epochs=10000 scheduler._target_=benchmarks.clock.cosine_over_time \
        ++scheduler.seconds=240 ++callbacks.clock._target_=benchmarks.clock.StopInTime
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tasks.base import DivergedError
from tasks.checkpoint import replacing
from tasks.provenance import git_state, versions
from tasks.schedule import warmup_cosine

PARTS = 10_000  # of the time, as which the cosine over steps is taken


class OverTime(LambdaLR):
    """A learning rate over elapsed time, set anew after each step.

    Args:
        seconds: of the run.
        factor: of the optimizer's rate, from (steps taken, share of the time that has passed, 0…1).
    """

    def __init__(self, optimizer: Optimizer, seconds: float, factor: Callable[[int, float], float]) -> None:
        self.seconds = seconds
        self.began: float | None = None
        super().__init__(optimizer, lambda step: factor(step, self.share))

    def begin(self) -> None:
        """The clock runs from the first call on: when the first batch is there."""
        if self.began is None:
            self.began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def share(self) -> float:
        return min(1.0, self.elapsed / self.seconds)


def cosine_over_time(
    optimizer: Optimizer, total_steps: int | None = None, *, seconds: float, warmup: float, final: float = 0.0
) -> OverTime:
    """`tasks.schedule.warmup_cosine` with elapsed time in the place of steps; `total_steps` says nothing."""
    nothing = SGD([torch.zeros(1)], lr=1.0)
    factor = warmup_cosine(nothing, PARTS, warmup=warmup, final=final).lr_lambdas[0]
    return OverTime(optimizer, seconds, lambda _, share: factor(round(share * PARTS)))


class StopInTime(Callback):
    """Starts and reads the schedule's clock in train.py; leaves `trained.json`, as the plain loop does."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        schedule_of(trainer).begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if schedule_of(trainer).share >= 1 and not trainer.should_stop:
            trainer.should_stop = True
            self._leave(trainer, diverged=None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, DivergedError):
            self._leave(trainer, diverged=trainer.global_step)

    def _leave(self, trainer: Trainer, diverged: int | None) -> None:
        leave_trained(
            Path(trainer.default_root_dir),
            diverged,
            trainer.global_step,
            schedule_of(trainer).elapsed,
            workers=trainer.datamodule.num_workers,  # type: ignore[attr-defined]
            precision=str(trainer.precision),
        )


def schedule_of(trainer: Trainer) -> OverTime:
    (config,) = trainer.lr_scheduler_configs
    assert isinstance(config.scheduler, OverTime), f"the schedule is {config.scheduler}: it has no clock"
    return config.scheduler


def leave_trained(
    folder: Path, diverged: int | None, steps: int, seconds: float, *, workers: int, precision: str
) -> None:
    """Writes what training came to: `diverged` at which step, if so, and in what it was computed."""
    found = {
        "diverged": diverged,
        "steps": steps,
        "seconds": seconds,
        "workers": workers,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "trained.json") as file:
        file.write(json.dumps(found, indent=2).encode())
