"""The end of a training that no longer gets better."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from resnext_backbones.errors import UsageError


class StopEarly(EarlyStopping):
    """Lightning's `EarlyStopping`, judged after each validation; it says why it stopped.

    A validation whose metric cannot be computed (NaN: nothing to judge by) does not count. A run that was
    stopped and is resumed trains no further, unless `patience` was raised.

    Args:
        monitor: the metric's name.
        mode: "max" or "min".
        patience: validations in a row that bring nothing better, at least 1.
        min_delta: what counts as better, in the metric's own unit.

    Raises UsageError for a metric that validation does not give.
    """

    def __init__(self, monitor: str, mode: str, patience: int = 10, min_delta: float = 0.0) -> None:
        whole = isinstance(patience, int) and patience >= 1
        if not whole or not isinstance(min_delta, int | float) or min_delta < 0:
            raise UsageError(
                f"callbacks.early_stopping: patience={patience}, min_delta={min_delta}: a whole number of at "
                "least 1 and a number of at least 0 are wanted"
            )
        super().__init__(
            monitor, min_delta, patience, mode=mode, check_finite=False, check_on_train_epoch_end=False
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        numbers = trainer.callback_metrics
        if self.monitor not in numbers:
            known = ", ".join(name for name in numbers if name.startswith("val/"))
            raise UsageError(
                f"callbacks.early_stopping.monitor={self.monitor}: no such number; there are {known}"
            )
        if numbers[self.monitor].isnan():
            return
        asked_before = self.wait_count >= self.patience
        super().on_validation_end(trainer, pl_module)
        if asked_before and self.wait_count < self.patience:  # better again, while min_epochs went on
            trainer.should_stop = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not before: `trainer.min_epochs` may have asked for more epochs, and then it went on."""
        over = trainer.current_epoch == trainer.max_epochs  # anyhow
        if self.wait_count >= self.patience and trainer.should_stop and not over:
            more = f"callbacks.early_stopping.patience={2 * self.patience}"
            pl_module.print(
                f"stopped after epoch {trainer.current_epoch}: {self._why()}; to train on, resume with "
                f"{more} or ~callbacks.early_stopping"
            )

    def _why(self) -> str:
        change = "risen" if self.mode == "max" else "fallen"
        least = f" by more than {abs(self.min_delta):g}" if self.min_delta else ""
        return (
            f"{self.monitor} has not {change}{least} in {self.wait_count} validation"
            f"{'s' * (self.wait_count > 1)}; the best was {float(self.best_score):.4g}"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # which may have been raised
