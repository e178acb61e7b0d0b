"""What accompanies a run: progress in the terminal, pictures of detections, a clean stop on Ctrl-C."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
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
from torch import Tensor

from tasks.data.transforms import DetectionBatch
from tasks.pictures import contact_sheet, draw, save_png, side_by_side
from tasks.wandb_run import log_boxes


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
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        done = trainer.fit_loop.total_batch_idx + 1
        self._open(total, done)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._losses = time.monotonic(), {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        current = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        for name, value in current.items():
            old = self._losses.get(name, float(value))
            self._losses[name] = old + (float(value) - old) / min(50, batch_idx + 1)
        text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {self._describe(trainer)}"
        self._advance(text)

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
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._print(f"{epoch}  {self._describe(trainer)}  {seconds:.0f} s")

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
            self._last_line = time.monotonic()
            self._print(text)

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


class Pictures(Callback):
    """Ground truth beside predictions for the same few images after each validation and after the test.

    They go to `folder` as PNG and to W&B as images with interactive boxes.

    Args:
        folder: where the pictures are written.
        images: how many.
        min_score: predictions below it are not drawn.
    """

    def __init__(self, folder: str | Path, images: int = 8, min_score: float = 0.5) -> None:
        self.folder, self.images, self.min_score = Path(folder), images, min_score
        self._kept: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._keep(trainer, batch, outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "test")

    def _keep(self, trainer: Trainer, batch: DetectionBatch, detections: list[dict[str, Tensor]]) -> None:
        if not trainer.is_global_zero:
            return
        for i in range(min(len(batch.image_ids), self.images - len(self._kept))):
            height, width = batch.sizes[i].tolist()
            scale = (batch.sizes[i] / batch.original_sizes[i]).flip(0).repeat(2).float()
            found = detections[i]
            keep = found["scores"] >= self.min_score
            predicted = {k: v[keep].cpu() for k, v in found.items()}
            predicted["boxes"] = predicted["boxes"] * scale.cpu()
            truth = {k: v.cpu() for k, v in batch.targets[i].items()}
            self._kept.append((batch.images[i, :, :height, :width].cpu(), truth, predicted))

    def _show(self, trainer: Trainer, split: str) -> None:
        kept, self._kept = self._kept, []
        if not kept or trainer.sanity_checking:
            return
        names = trainer.datamodule.names  # type: ignore[attr-defined]
        pairs = [
            side_by_side(
                draw(image, truth["boxes"], truth["labels"], names, crowd=truth.get("iscrowd")),
                draw(image, found["boxes"], found["labels"], names, scores=found["scores"]),
                ("ground truth", "predictions"),
            )
            for image, truth, found in kept
        ]
        name = f"{split}_epoch{trainer.current_epoch + 1:03d}.png" if split == "val" else f"{split}.png"
        save_png(contact_sheet(pairs, columns=2), self.folder / name)
        for logger in trainer.loggers:
            log_boxes(logger, trainer.global_step, f"{split}/pictures", kept, dict(enumerate(names, start=1)))


class Interrupted(Exception):
    """A signal asked for the end. `saved` is the checkpoint that was written, None while evaluating."""

    def __init__(self, number: int, saved: Path | None) -> None:
        name = signal.Signals(number).name
        if saved is None:
            super().__init__(f"stopped by {name} while evaluating; what was trained is as it was")
        else:
            again = f"to go on: python train.py resume={saved.parents[1]}"
            super().__init__(f"stopped by {name}; the state is saved in {saved}; {again}")
        self.exit_code = 128 + number


class StopOnSignal(Callback):
    """Ctrl-C (SIGINT) and SIGTERM end a stage after the current step; a fit saves a checkpoint of that step.

    The handler only sets a flag, which is read between batches: saving inside a handler could catch the
    optimizer half-way through its step. A second Ctrl-C ends at once.

    Args:
        checkpoint: where the state is saved.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = Path(checkpoint)
        self._pid = os.getpid()
        self._received: int | None = None
        self._old: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        in_worker = os.getpid() != self._pid  # forked loader workers inherit the handler
        if in_worker and number == signal.SIGINT:
            return  # Ctrl-C reaches every process of the terminal; the training decides when workers end
        if in_worker or self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._received is None:
            return
        fitting = trainer.state.fn == "fit"
        if fitting:
            trainer.save_checkpoint(self.checkpoint)
        raise Interrupted(self._received, self.checkpoint if fitting else None)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A validation that was broken off starts anew on resume; Lightning would run only its rest."""
        if trainer.validating and trainer.state.fn == "fit":
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["total"].update(begun)
            progress["current"].update(dict.fromkeys(begun, 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
