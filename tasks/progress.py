"""Progress in the terminal: one bar over the whole fit, or lines where there is no terminal."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar(LightningProgressBar):
    """One bar over the whole fit with losses, the metric and the time left, and one line an epoch.

    `monitor` is the metric's name. Where there is no terminal (a pipe, a scheduler's log), lines replace the
    bar: one an epoch, and one every `every_seconds` in between.
    """

    def __init__(self, monitor: str = "", every_seconds: float = 30.0) -> None:
        super().__init__()
        self.monitor = monitor
        self.console = Console(stderr=True, highlight=False)
        self.every_seconds = every_seconds
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._enabled = True
        self._last_line = 0.0
        self._began = 0.0
        self._losses: dict[str, float] = {}

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:  # Lightning calls this on every rank but the first
        self._enabled = False

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._print(" ".join(map(str, args)))

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(trainer.num_training_batches * (trainer.max_epochs or 1))
        if trainer.max_steps != -1:
            steps = trainer.max_steps * trainer.accumulate_grad_batches
            total = steps if total < 0 else min(total, steps)
        done = trainer.fit_loop.total_batch_idx + 1
        self._open(total, done)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._losses = time.monotonic(), {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        current = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        for name, value in current.items():
            old = self._losses.get(name, float(value))
            self._losses[name] = old + (float(value) - old) / min(50, batch_idx + 1)
        batch = "" if self._progress else f", batch {batch_idx + 1}/{trainer.num_training_batches}"
        self._advance(f"{self._epoch(trainer)}{batch}  {self._describe(trainer)}")

    @staticmethod
    def _epoch(trainer: Trainer) -> str:
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        return f"epoch {trainer.current_epoch + 1}{last}"

    def _describe(self, trainer: Trainer) -> str:
        parts = [
            f"{name.removeprefix('train/').removeprefix('loss_')} {v:.3f}" for name, v in self._losses.items()
        ]
        if self.monitor in trainer.callback_metrics:
            parts.append(f"{self.monitor} {float(trainer.callback_metrics[self.monitor]):.3f}")
        return "  ".join(parts)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            seconds = time.monotonic() - self._began
            self._print(f"{self._epoch(trainer)}  {self._describe(trainer)}  {seconds:.0f} s")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    # Evaluation.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._open(int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            self._advance("validate")
        elif self._progress:
            total = int(sum(trainer.num_val_batches))
            self._progress.update(self._task, description=f"validate {batch_idx + 1}/{total}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(int(sum(trainer.num_test_batches)))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    # The bar itself.

    def _open(self, total: int, completed: int = 0) -> None:
        self._last_line = time.monotonic()
        if not self._enabled or not self.console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=completed)

    def _advance(self, text: str) -> None:
        if self._progress:
            self._progress.update(self._task, advance=1, description=text)
        elif self._enabled and time.monotonic() - self._last_line > self.every_seconds:
            self._print(text)

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(text, soft_wrap=True)
