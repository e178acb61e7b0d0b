"""A clean stop on Ctrl-C and SIGTERM, after the current step and with a checkpoint of it."""

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


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

    A step is the optimizer's: no checkpoint holds half a sum of accumulated gradients. Where a validation
    follows the step, or the epoch's end, the stop waits for its first batch or the next step: Lightning would
    skip that validation on resume.

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
        if not within_accumulation(trainer) and not validation_follows(trainer):
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not within_accumulation(trainer):
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


def within_accumulation(trainer: Trainer) -> bool:
    """Whether gradients of this fit wait for more batches before the optimizer steps."""
    done = trainer.fit_loop.batch_idx + 1
    return (
        trainer.state.fn == "fit" and done % trainer.accumulate_grad_batches != 0 and not ends_epoch(trainer)
    )


def validation_follows(trainer: Trainer) -> bool:
    """Whether the epoch ends with this batch, or stops here for a validation (`val_check_interval`).

    Counted as `_TrainingEpochLoop._should_check_val_fx` does: over the run where
    `check_val_every_n_epoch` is null, within the epoch otherwise.
    """
    loop = trainer.fit_loop.epoch_loop
    over_the_run = trainer.check_val_every_n_epoch is None
    done = (loop.total_batch_idx if over_the_run else loop.batch_idx) + 1
    interval = (loop._should_check_val_epoch() and trainer.val_check_batch) or math.inf
    return ends_epoch(trainer) or done % interval == 0


def ends_epoch(trainer: Trainer) -> bool:
    return trainer.is_last_batch or trainer.fit_loop.batch_idx + 1 == trainer.num_training_batches
