"""Frozen stages of the body that begin to learn in a later epoch."""

from collections.abc import Mapping
from itertools import pairwise

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import Parameter

from resnext_backbones.errors import UsageError
from tasks.stages import parameters_by_stage


class Unfreezing(Callback):
    """`backbone.unfreeze`: from an epoch on, fewer of the body's stages are frozen (arXiv 1801.06146, §3.3).

    The optimizer holds from the start whatever will learn at some time. What is frozen still requires no
    gradient and so has none: no optimizer moves it, decays it or keeps a state of it. What is frozen is a
    function of the epoch alone, so a resumed run needs to know nothing else. Norms that were made constants
    (`resnext_backbones.freeze`) stay constants, so that unfreezing changes no output.

    Args:
        schedule: {epoch: frozen stages from then on}, as `freeze_at` counts stages; epochs from 1, as the
            progress does. `{3: 1, 5: 0}`: all but the stem learn from epoch 3 on, all from epoch 5 on.

    Raises UsageError, in `setup` at the latest, for a schedule that does not fall from what is frozen at
    first, or that reaches beyond the run, and on several devices.
    """

    def __init__(self, schedule: Mapping[int, int]) -> None:
        self.said = f"backbone.unfreeze={schedule}"
        self.schedule = dict(sorted(schedule.items())) if _whole_numbers(schedule) else {}
        if not self.schedule:
            raise UsageError(
                f"{self.said}: {{EPOCH: FROZEN STAGES}} in whole numbers is wanted, such as {{3: 1}}"
            )
        if min(self.schedule) < 2:
            raise UsageError(
                f"{self.said}: epochs count from 1, and what is frozen in the first is backbone.freeze_at"
            )
        self._first = 0  # stages frozen in epoch 1
        self._stages: dict[str, list[Parameter]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1:  # DDP would wait for the gradients of all that is to learn at some time
            raise UsageError(
                f"{self.said}: on {trainer.world_size} devices stages cannot begin to learn later; give "
                "trainer.devices=1, or backbone.freeze_at alone"
            )
        self._stages = parameters_by_stage(pl_module.model, self.said)  # type: ignore[arg-type]
        frozen = [not any(p.requires_grad for p in parameters) for parameters in self._stages.values()]
        self._first = [*frozen, False].index(False)
        levels = [self._first, *self.schedule.values()]
        if any(later >= earlier for earlier, later in pairwise(levels)) or levels[-1] < 0:
            raise UsageError(
                f"{self.said}: the numbers must fall, down to 0 at the lowest, from the {self._first} stages "
                "frozen at first (backbone.freeze_at)"
            )
        if trainer.max_epochs not in (None, -1) and max(self.schedule) > trainer.max_epochs:
            raise UsageError(
                f"{self.said}: the run ends with epoch {trainer.max_epochs} (trainer.max_epochs), before "
                f"epoch {max(self.schedule)}"
            )
        self._freeze(levels[-1])  # all that will learn is for the optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also of a run resumed within an epoch, whose start is not announced again."""
        self._freeze(self.frozen(trainer.current_epoch + 1))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self._freeze(self.frozen(epoch))
        if epoch in self.schedule:
            released = list(self._stages)[self.frozen(epoch) : self.frozen(epoch - 1)]
            pl_module.print(f"from epoch {epoch} on these stages learn, too: {', '.join(released)}")

    @property
    def least(self) -> int:
        """Stages frozen at the end."""
        return min(self.schedule.values())

    def frozen(self, epoch: int) -> int:
        """Stages frozen in an epoch, which counts from 1."""
        return min((at for since, at in self.schedule.items() if since <= epoch), default=self._first)

    def learning(self, model: nn.Module) -> dict[int, int]:
        """Parameters that learn, from epoch 1 on and from each epoch on that unfreezes."""
        numbers = {}
        for epoch in (1, *self.schedule):
            stages = list(self._stages.values())[: self.frozen(epoch)]
            frozen = {id(p) for parameters in stages for p in parameters}
            numbers[epoch] = sum(p.numel() for p in model.parameters() if id(p) not in frozen)
        return numbers

    def _freeze(self, at: int) -> None:
        for i, parameters in enumerate(list(self._stages.values())[: self._first]):
            for parameter in parameters:
                parameter.requires_grad_(i >= at)


def _whole_numbers(schedule: object) -> bool:
    return isinstance(schedule, Mapping) and all(
        isinstance(number, int) and not isinstance(number, bool)
        for pair in schedule.items()
        for number in pair
    )
