"""An exponential moving average of the weights: judged and kept in place of the weights that learn."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from resnext_backbones.errors import UsageError

STATE = "averaging_state"


class EMA(Callback):
    """average ← decay · average + (1 - decay) · weights, after every so many optimizer steps.

    The first update copies the weights; before it there is no average, and validation judges the weights
    themselves. Then the decay rises as min(decay, (1 + n) / (10 + n)) with the number n of updates
    (TensorFlow's `ExponentialMovingAverage(num_updates)`), so that a short run does not end near its random
    start: about the last ninth of the run counts until `decay` is reached.

    Averaged is what learns and the buffers beside it, as timm (utils/model_ema.py, `ModelEmaV3`) and
    torchvision (references/classification/utils.py, `use_buffers=True`) do: running statistics of the last
    weights are not those of averaged ones. What is no floating-point number, such as a batch norm's count of
    batches, is that of the weights. Frozen parameters are not held twice.

    While a split is judged, and after the last step, the average is in the network. A checkpoint's
    `state_dict` is always the average, for whoever predicts with it or begins from it; the weights that learn
    are in `current_model_state`, where Lightning's callback has them too.

    Lightning's own (`EMAWeightAveraging`, 2.6) judges the initial weights until the first update, truncates
    averaged integers, copies the whole task with its frozen parameters, and writes average and weights the
    wrong way round into a checkpoint that is saved during a validation, as Ctrl-C does.

    Args:
        decay: at most, 0…1. timm's default is 0.9998. Other recipes' decay is per update of theirs:
            torchvision's `--model-ema-decay 0.99998 --model-ema-steps 32` at batch 1024 in 600 epochs comes
            to 0.99891 (1 - 0.00002 · 1024 · 32 / 600) every 32 steps.
        every_n_steps: optimizer steps from one update to the next.

    Raises UsageError for a decay or interval out of range.
    """

    def __init__(self, decay: float = 0.9998, every_n_steps: int = 1) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UsageError(f"callbacks.ema.decay={decay}: a number from 0 to below 1 is wanted")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise UsageError(f"callbacks.ema.every_n_steps={every_n_steps}: a number of at least 1 is wanted")
        self.decay, self.every_n_steps = decay, every_n_steps
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._live: dict[str, Tensor] = {}  # what is averaged, in the network
        self._held: dict[str, Tensor] = {}  # the average; while that is in the network, the weights
        self._swapped = False
        self._updates = 0
        self._step = 0  # of the latest update: a batch that is only accumulated is none

    def decay_after(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the network is on its device, and its tensors change in place only."""
        tensors = pl_module.state_dict(keep_vars=True)
        self._live = {name: tensors[name] for name in self._held or _changing(trainer, tensors)}
        self._held = {name: held.to(self._live[name].device) for name, held in self._held.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step or trainer.global_step % self.every_n_steps:
            return
        if self._held:
            average = get_ema_multi_avg_fn(self.decay_after(self._updates))
            average(list(self._held.values()), list(self._live.values()), None)
        else:
            self._held = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._updates += 1
        self._step = trainer.global_step

    # Judging.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, held in self._held.items():
            other = held.clone()
            held.copy_(self._live[name])
            self._live[name].copy_(other)
        self._swapped = not self._swapped

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin_anew()

    # Checkpoints.

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._held:  # no update yet, or the fit is over
            return
        held = {id(self._live[name]): tensor for name, tensor in self._held.items()}
        tensors = pl_module.state_dict(keep_vars=True).items()  # of which two names may be one
        kept = {name: held.get(id(tensor), tensor.detach()) for name, tensor in tensors}
        live = checkpoint["state_dict"]
        average, weights = (live, kept) if self._swapped else (kept, live)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights
        checkpoint[STATE] = {"names": list(self._held), "updates": self._updates, "step": self._step}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on where the checkpoint was written; one without an average begins an average here."""
        if trainer.state.fn != "fit" or STATE not in checkpoint:
            return
        state = checkpoint[STATE]
        self._held = {name: checkpoint["state_dict"][name].clone() for name in state["names"]}
        self._updates, self._step = state["updates"], state["step"]
        pl_module.load_state_dict(checkpoint["current_model_state"])


def _changing(trainer: Trainer, tensors: dict[str, Tensor]) -> list[str]:
    """Of a state dict what the optimizer moves, now or in a later epoch, and buffers; each tensor once."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    learning = {id(parameter) for group in groups for parameter in group["params"]}
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        changes = id(tensor) in learning or not isinstance(tensor, nn.Parameter)
        if changes and tensor.is_floating_point():
            names.setdefault(id(tensor), name)
    return list(names.values())
