"""What every task shares: steps, names in the log, parameter groups, learning rate, the guard against NaN.

A task fills in `losses(batch)`, `metric(split)`, `update(metric, batch)`, and `picture` for people to look
at.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resnext_backbones.errors import UsageError
from tasks.data.samplers import mix
from tasks.ema import EMA
from tasks.loggers import JsonlLogger
from tasks.schedule import warmup_of
from tasks.stages import UNDECAYED, with_body_decay
from tasks.unfreezing import Unfreezing

MOST_CHARTS = 100  # of classes; more than these are logged to metrics.jsonl only
LEAST_FOR_NORMS = 4  # images


class DivergedError(RuntimeError):
    """A loss became NaN or infinite; the optimizer has not stepped on it."""


@dataclass(frozen=True)
class Recipe:
    """What a run's settings come to on the hardware at hand; printed and logged at its start."""

    optimizer: str
    learning_rate: float
    reference_batch_size: int | None
    batch_size: int
    devices: int
    accumulate: int
    epochs: int | None
    total_steps: int
    weight_decay: float
    decayed_parameters: int
    undecayed_parameters: int
    frozen_parameters: int
    body_lr_decay: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # by stage, where they differ
    learning_parameters: Mapping[str, int] = field(default_factory=dict)  # by epoch, where they differ
    warmup_steps: int = 0
    average_decay: float | None = None  # None: the weights are not averaged
    average_every_n_steps: int | None = None

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.devices * self.accumulate

    def __str__(self) -> str:
        scaled = f" (given for batches of {self.reference_batch_size})" if self.reference_batch_size else ""
        learned = self.decayed_parameters + self.undecayed_parameters
        epochs = f" in {self.epochs} epoch{'s' * (self.epochs > 1)}" if self.epochs else ""
        stages = ", ".join(f"{stage} {rate:.3g}" for stage, rate in self.learning_rates.items())
        later = ", ".join(f"{n:,} from epoch {epoch} on" for epoch, n in self.learning_parameters.items())
        warmup = f", warm-up {_steps(self.warmup_steps)}" if self.warmup_steps else ""
        average = ""
        if self.average_decay is not None:
            every = _steps(self.average_every_n_steps or 1).removeprefix("1 ")
            average = f"; average of decay {self.average_decay:g} every {every}"
        return (
            f"{self.optimizer}, learning rate {self.learning_rate:.3g}{scaled}{stages and f' ({stages})'}, "
            f"weight decay {self.weight_decay:g} on {self.decayed_parameters:,} of {learned:,} parameters "
            f"({self.frozen_parameters:,} frozen{later and f'; {later} learn'}); "
            f"batch {self.global_batch} = {self.batch_size} a device × {self.devices} × "
            f"{self.accumulate} accumulated; {_steps(self.total_steps)}{epochs}{warmup}{average}"
        )

    def warnings(self) -> list[str]:
        """A line about each setting that does not come to its end in so few steps."""
        total, rising, every = self.total_steps, self.warmup_steps, self.average_every_n_steps or 0
        lines = []
        if 0 < total <= rising:
            lines.append(
                f"the warm-up of {_steps(rising)} is not shorter than the run of {_steps(total)}: the rate "
                f"rises to {total / (rising + 1):.1%} of {self.learning_rate:.3g} and no further; lower "
                "scheduler.warmup"
            )
        if 0 < total < every:
            lines.append(
                f"callbacks.ema.every_n_steps={every} is more than the run has, {_steps(total)}: there is no "
                "average; lower it"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "global_batch": self.global_batch}


def _steps(number: int) -> str:
    return f"{number:,} step{'s' * (number != 1)}"


class BaseTask(LightningModule):
    """A model that learns one task.

    Args:
        model: the network.
        optimizer: makes the optimizer from parameter groups; carries `lr` and `weight_decay` as keywords
            (a `functools.partial`, or Hydra's `_partial_: true`).
        scheduler: makes the learning rate's schedule from (optimizer, total_steps), stepped every step.
        reference_batch_size: the global batch that `lr` is meant for; `lr` is scaled in proportion to the
            real one, devices × batch × accumulation (Goyal et al., arXiv 1706.02677). None: not scaled.
        body_lr_decay: the body's last stage learns with so many times the rate of what is above it, the stage
            below that with so many times its rate, and so on down to the stem (`tasks.stages`), above 0, up
            to 1. None: one rate for all.
        seed: random numbers of a training step are a function of it, the epoch and the step, so that a
            resumed run draws what an uninterrupted one would have drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler],
        *,
        reference_batch_size: int | None = None,
        body_lr_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self._optimizer, self._scheduler = optimizer, scheduler
        self._reference_batch_size, self._body_lr_decay = reference_batch_size, body_lr_decay
        self.metrics: dict[str, Any] = {}
        self.numbers: dict[str, float] = {}  # of the last judgement of each split
        self.recipe: Recipe | None = None
        # What every checkpoint carries along: configuration and classes, in plain containers.
        self.record: dict[str, Any] = {}

    # What a task fills in.

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Each loss as a scalar; their sum is minimised and each is logged under its name."""
        raise NotImplementedError

    def predict(self, batch: Any) -> Any:
        """What is found in each image of a batch, which may be without targets."""
        raise NotImplementedError

    def metric(self, split: str) -> Any:
        """What judges a split (`tasks.metrics`): has `reset()` and `compute() -> {name: number}`."""
        raise NotImplementedError

    def update(self, metric: Any, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """Feeds a batch's predictions to the metric; returns them, and the losses as training has them."""
        raise NotImplementedError

    def picture(self, batch: Any, i: int, found: Any, min_score: float) -> Image.Image:
        """Image `i` of a batch with the truth and what was found in it."""
        raise NotImplementedError

    def prediction(self, found: Any, about: Mapping[str, Any]) -> Any:
        """An image's entry of `predict` as a `Prediction` of `tasks.prediction.predictions`.

        For `tasks.load.load_task`, of a task that is no subclass of one of this project's. about: the fields
        that every `Prediction` has.
        """
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """Of the classes, in the order of their labels."""
        return [category["name"] for category in self.record["categories"]]

    # Steps.

    def on_fit_start(self) -> None:
        self._start("val")  # a file that cannot be judged by is refused now, not after an epoch

    def on_train_start(self) -> None:
        assert self.recipe is not None
        self.print(f"recipe: {self.recipe}")
        for line in self.recipe.warnings():
            self.print(f"warning: {line}")
        live = any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.model.modules())
        if live and self.recipe.batch_size < LEAST_FOR_NORMS:
            self.print(
                f"warning: batch norms learn from {self.recipe.batch_size} images at a time, which is few: "
                "pretrained weights freeze them (backbone.weights=SOURCE); otherwise raise data.batch_size, "
                "or take +backbone.norm=group"
            )
        for logger in self.loggers:
            logger.log_hyperparams({"recipe": self.recipe.as_dict()})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(mix(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(total.item()):
            raise DivergedError(self._diverged(losses, batch))
        self._log_losses("train", losses, batch)
        return total

    def _log_losses(self, split: str, losses: Mapping[str, Tensor], batch: Any) -> None:
        numbers = {"loss": torch.stack(list(losses.values())).sum(), **losses}
        self.log_dict(
            {f"{split}/{name}": loss for name, loss in numbers.items()},
            batch_size=len(batch.image_ids),
            sync_dist=split != "train",  # a split's loss is the mean over the images of all processes
        )

    def _diverged(self, losses: Mapping[str, Tensor], batch: Any) -> str:
        bad = ", ".join(f"{k} = {v.item()}" for k, v in losses.items() if not math.isfinite(v.item()))
        fine = ", ".join(f"{k} = {v.item():.4g}" for k, v in losses.items() if math.isfinite(v.item()))
        return (
            f"{bad or 'the sum of the losses is not finite'} at step {self.global_step} of epoch "
            f"{self.current_epoch} on images {batch.image_ids.tolist()} ({fine or 'none is finite'}). "
            "The run stops before the optimizer's step; no checkpoint was overwritten. "
            "A lower optimizer.lr, a longer scheduler.warmup or trainer.precision=32-true often helps."
        )

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self._judge("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self._judge("test", batch)

    def _judge(self, split: str, batch: Any) -> Any:
        found, losses = self.update(self.metrics[split], batch)
        self._log_losses(split, losses, batch)
        return found

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _start(self, split: str) -> None:
        if split not in self.metrics:
            self.metrics[split] = self.metric(split)
        self.metrics[split].reset()

    def _finish(self, split: str) -> None:
        if self.trainer.sanity_checking:  # two batches say nothing about a split
            return
        metric = self.metrics[split]
        # A run cut short on purpose is judged on what it saw; otherwise the metric wants the whole split.
        limit = {"val": self.trainer.limit_val_batches, "test": self.trainer.limit_test_batches}[split]
        whole = isinstance(limit, float) and limit == 1.0  # the integer 1 means one batch
        numbers = metric.compute(None if whole else metric.reported)
        named = {f"{split}/{name}": value for name, value in numbers.items()}
        monitor = getattr(self.trainer.checkpoint_callback, "monitor", None) or ""
        if monitor.startswith(f"{split}/") and monitor not in named:
            rank_zero_warn(f"{monitor} cannot be computed: {split} holds nothing to judge it by")
            named[monitor] = math.nan
        of_classes = {f"{split}/{name}": value for name, value in metric.class_numbers.items()}
        self.numbers |= named | of_classes  # in full precision, which Lightning's log has not
        if len(of_classes) <= MOST_CHARTS:
            named |= of_classes
        else:
            for logger in self.loggers:
                if isinstance(logger, JsonlLogger):
                    logger.log_metrics(of_classes, self.global_step)
        self.log_dict(named)

    # Optimization.

    def configure_optimizers(self) -> Any:
        keywords = getattr(self._optimizer, "keywords", {})
        groups = parameter_groups(self.model, keywords.get("weight_decay", 0.0))
        learning_rate = keywords["lr"] * self._batch_scale()
        if self._body_lr_decay is not None:
            groups = with_body_decay(groups, self.model, learning_rate, self._body_lr_decay)
        self.recipe = self._derive(keywords, learning_rate, groups)
        optimizer = self._optimizer(groups, lr=learning_rate)
        scheduler = self._scheduler(optimizer, total_steps=self.recipe.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _batch_scale(self) -> float:
        """The global batch by the one that the learning rate is meant for."""
        trainer = self.trainer
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        global_batch = batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return global_batch / self._reference_batch_size if self._reference_batch_size else 1.0

    def _derive(
        self, keywords: Mapping[str, Any], learning_rate: float, groups: Sequence[Mapping[str, Any]]
    ) -> Recipe:
        trainer = self.trainer
        learned = [p for group in groups for p in group["params"]]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        unfreezing = next((c for c in callbacks if isinstance(c, Unfreezing)), None)
        later = unfreezing.learning(self.model) if unfreezing else {}
        average = next((c for c in callbacks if isinstance(c, EMA)), None)
        total_steps = self._total_steps()
        return Recipe(
            optimizer=getattr(self._optimizer, "func", self._optimizer).__name__,
            learning_rate=learning_rate,
            reference_batch_size=self._reference_batch_size,
            batch_size=trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            devices=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            epochs=trainer.max_epochs if trainer.max_epochs != -1 else None,
            total_steps=total_steps,
            weight_decay=keywords.get("weight_decay", 0.0),
            decayed_parameters=sum(p.numel() for p in learned if _decays(p)),
            undecayed_parameters=sum(p.numel() for p in learned if not _decays(p)),
            frozen_parameters=sum(p.numel() for p in self.model.parameters() if not p.requires_grad),
            body_lr_decay=self._body_lr_decay,
            learning_rates={
                group["name"].removesuffix(UNDECAYED): group["lr"] for group in groups if "name" in group
            },
            learning_parameters={str(epoch): number for epoch, number in later.items()},
            warmup_steps=warmup_of(self._scheduler, total_steps),
            average_decay=average.decay if average else None,
            average_every_n_steps=average.every_n_steps if average else None,
        )

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Lightning's `estimated_stepping_batches` would open the loader before a resumed run's position is
        known, and the loader would then begin its epoch anew.
        """
        trainer = self.trainer
        batches = trainer.datamodule.train_batches(trainer.world_size)  # type: ignore[attr-defined]
        limit = trainer.limit_train_batches
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit or batches)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
        if trainer.max_epochs == -1:
            steps = trainer.max_steps
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm also for fused optimizers, which Lightning refuses under any mixed precision.

        Only float16's loss scaler gives it a reason to; there its own, clear refusal stands.
        """
        if self.trainer.precision == "16-mixed":  # whose scaler leaves out steps that are not finite
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        by_value = gradient_clip_algorithm == "value"
        most = math.inf if by_value or gradient_clip_val is None else gradient_clip_val
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), most)
        if not math.isfinite(norm.item()):
            raise DivergedError(self._unbounded())
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _unbounded(self) -> str:
        bad = [n for n, p in self.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return (
            f"the gradient is not finite at step {self.global_step} of epoch {self.current_epoch}, though "
            f"the loss is: {', '.join(bad[:5]) or 'only its norm overflows'}. The run stops before the "
            "optimizer's step; no checkpoint was overwritten. A lower optimizer.lr, a longer "
            "scheduler.warmup or trainer.precision=32-true often helps."
        )

    # Checkpoints hold plain containers only.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["record"] = self.record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UsageError if the checkpoint's labels stand for other classes than this task's."""
        theirs, mine = (record.get("categories") for record in (checkpoint.get("record", {}), self.record))
        if theirs is not None and mine is not None and theirs != mine:
            differing = [c for c in [*theirs, *mine] if c not in theirs or c not in mine]
            raise UsageError(
                f"the checkpoint was trained on other classes than the data's: {differing[:10]} are not in "
                "both; give the data that it was trained for"
            )


def takes(model: nn.Module, *arguments: str) -> bool:
    """Whether a network can be called with just these arguments."""
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    return True


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: with weight decay, and norms and biases without it.

    A norm's scale and every bias have one dimension, a weight has at least two; decaying them only costs
    accuracy (He et al., arXiv 1812.01187, §3.1).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if _decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
    ]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1
