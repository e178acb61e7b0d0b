"""One run: what its configuration names is built, its stages follow one another, its results are kept."""

import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from resnext_backbones import Receipt, freeze, freeze_norms, load_weights
from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.checkpoint import AtomicCheckpointIO, find_checkpoint
from tasks.data.check import check_dataset
from tasks.data.module import SPLITS, ImageData
from tasks.folder import best_of, of_checkpoint, open_folder, resumed
from tasks.pretrained import (
    keep_receipt,
    normalisation,
    other_normalisation,
    refuse_idle_norms,
    refuse_other_channels,
)
from tasks.provenance import git_state, plain, versions, without_secrets, write_summary
from tasks.wandb_run import WandbLogger, wandb_logger

STAGES = ("check", "fit", "validate", "test")
MOST_ROWS = 40  # of classes in the table at the end
HAND_OVER = ("weights", "freeze_at", "freeze_norms")  # of `backbone`, what is not an argument of the body
console = Console(highlight=False, soft_wrap=True)


def hush() -> None:
    """Lightning's remarks on settings that are as they should be drown what a user has to read."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*is deprecated"
    )  # inside Lightning, with torch 2.15
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty")  # resume
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # on two cores one is right
    warnings.filterwarnings(
        "ignore", message=".*smaller than the logging interval"
    )  # it counts on over epochs


@rank_zero_only
def say(text: Any) -> None:
    console.print(text)


def run(cfg: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> Path:
    """Runs the stages that `cfg` asks for and returns the run's folder.

    Args:
        cfg: the composed configuration (`configs/train.yaml`).
        overrides: what stood on the command line.
        choices: the option chosen in each group of the configuration.

    Raises:
        UsageError: a fault that the user can mend.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        DivergedError: a loss was not finite.
    """
    began = time.time()
    hush()
    stages = wanted(cfg)
    if cfg.resume is not None:
        cfg = resumed(cfg, overrides, choices, say)
        stages = wanted(cfg)
    elif cfg.ckpt_path is not None:
        cfg = of_checkpoint(cfg, overrides)
    seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data", seed=cfg.seed)
    data.prepare_data()
    data.setup("fit")
    say(data.report())
    folder = Path(cfg.run_dir) if cfg.resume is not None else open_folder(cfg, choices)
    chosen = cfg.choices
    summary: dict[str, Any] = {
        "command": without_secrets(" ".join(["python train.py", *overrides])),
        **{group: chosen[group] for group in ("task", "model", "backbone", "data")},
        "seed": cfg.seed,
        "versions": versions(),
        "git": git_state(),
    }
    write_summary(folder, summary)  # what can be said already, should the run not come to its end

    if "check" in stages:
        datasets = {s: data.dataset(s) for s in SPLITS if not (s == "test" and data.test_is_val)}
        if not check_dataset(datasets, folder, data.num_workers).ok:
            raise UsageError("the check found what would end training or evaluation; it is listed above")
    if set(stages) & set(STAGE):
        task, receipt = build_task(cfg, data)
        if cfg.resume is None:  # a run that goes on keeps the receipt it began with
            summary["weights"] = receipt and keep_receipt(receipt, folder)
            write_summary(folder, summary)
        trainer = build_trainer(cfg, folder, summary)
        try:
            results: dict[str, float] = {}
            for stage in filter(STAGE.get, stages):
                results |= STAGE[stage](cfg, trainer, task, data, folder)
        except BaseException:
            end_tracking(trainer.loggers, failed=True)
            raise
        end_tracking(trainer.loggers, failed=False)
        per_class = {split: metric.per_class_of for split, metric in task.metrics.items()}
        recipe = task.recipe and task.recipe.as_dict()
        write_summary(folder, {"recipe": recipe, "results": results, "per_class": per_class})
        say(table(results))
    write_summary(folder, {"seconds": round(time.time() - began, 1)})
    say(f"everything is in {folder}")
    return folder


# Building what the configuration names.


def wanted(cfg: DictConfig) -> list[str]:
    """The stages in their order; one alone may be given without brackets."""
    stages = [cfg.stages] if isinstance(cfg.stages, str) else list(cfg.stages)
    if "fit" in stages and cfg.ckpt_path is not None and cfg.resume is None:
        raise UsageError(
            f"ckpt_path={cfg.ckpt_path} is for evaluation: add stages=[validate] or stages=[test]; to go on "
            "with its training give resume=FOLDER, to begin from its body backbone.weights=FOLDER"
        )
    if not stages or (unknown := [stage for stage in stages if stage not in STAGES]):
        raise UsageError(f"stages={stages}: {unknown or 'nothing'} is not of {', '.join(STAGES)}")
    return stages


def build(cfg: DictConfig, key: str, **more: Any) -> Any:
    """The object that `cfg[key]` names by `_target_`; the user's own mistakes come out as UsageError."""
    try:
        return instantiate(cfg[key], _convert_="all", **more)  # lists and dicts, not Hydra's own kinds
    except MissingMandatoryValue as fault:
        missing = sorted(f"{key}.{name}" for name in cfg[key] if OmegaConf.is_missing(cfg[key], name))
        raise UsageError(f"{', '.join(missing)} is not given; add {missing[0]}=VALUE") from fault
    except InstantiationException as fault:
        if isinstance(fault.__cause__, UsageError):
            raise fault.__cause__ from None
        if isinstance(
            fault.__cause__,
            TypeError | ValueError | ImportError | AttributeError | MisconfigurationException | None,
        ):
            reason = str(fault).splitlines()[0] if fault.__cause__ is None else repr(fault.__cause__)
            raise UsageError(f"{key}: {cfg[key].get('_target_')}: {reason}") from fault
        raise


def build_task(cfg: DictConfig, data: ImageData) -> tuple[BaseTask, Receipt | None]:
    """The network in the task that trains it, and the receipt of the weights it begins with."""
    body, receipt = build_body(cfg)
    model = build(cfg, "model", body=body, **data.model_arguments)
    model.to(memory_format=torch.channels_last)
    optimizer, scheduler = build(cfg, "optimizer"), build(cfg, "scheduler")
    task = build(cfg, "task", model=model, optimizer=optimizer, scheduler=scheduler, seed=cfg.seed)
    task.record = {
        "config": without_secrets(OmegaConf.to_container(cfg, resolve=True)),
        "categories": data.categories,
        "skeleton": data.skeleton and plain(asdict(data.skeleton)),
        "normalisation": getattr(body, "normalisation", None) or normalisation(model),
    }
    if receipt is not None and (warning := other_normalisation(receipt, model, body)):
        say(Text(warning))
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{type(model).__name__} on {cfg.backbone._target_.rpartition('.')[2]}: {parameters:,} parameters")
    return task, receipt


def build_body(cfg: DictConfig) -> tuple[nn.Module, Receipt | None]:
    """The body with its weights; early stages and norms stay as they are by default if pretrained.

    Where a checkpoint is loaded into the network anyhow, the weights it once began with are not read again.
    """
    weights, freeze_at, frozen_norms = (cfg.backbone[key] for key in HAND_OVER)
    if weights is None and (freeze_at or frozen_norms):
        raise UsageError(
            f"backbone.freeze_at={freeze_at}, backbone.freeze_norms={frozen_norms} would keep random numbers "
            "as they are: give backbone.weights=SOURCE, or leave them out"
        )
    arguments = OmegaConf.masked_copy(cfg.backbone, [key for key in cfg.backbone if key not in HAND_OVER])
    body = build(OmegaConf.create({"backbone": arguments}), "backbone")
    refuse_other_channels(body)
    receipt = None
    if cfg.resume is None and cfg.ckpt_path is None:
        if weights is not None:
            receipt = load_weights(body, weights)
            say(Text(without_secrets(str(receipt))))  # as text, since rich would unfold the dataclass
        else:
            refuse_idle_norms(body)
    if frozen_norms if frozen_norms is not None else weights is not None:
        freeze_norms(body)
    freeze(body, freeze_at if freeze_at is not None else 2 if weights is not None else 0)
    return body, receipt


def build_trainer(cfg: DictConfig, folder: Path, summary: Mapping[str, Any]) -> Trainer:
    """Lightning's trainer with our checkpoints, our samplers and the loggers."""
    settings = cfg.copy()
    settings.trainer.precision = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    callbacks = [build(settings.callbacks, name) for name in settings.callbacks]
    return build(
        settings,
        "trainer",
        callbacks=callbacks,
        logger=build_loggers(settings, folder, summary),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # our samplers know their rank, and do not pad
        num_sanity_val_steps=0,  # two batches say nothing about a split
        enable_model_summary=False,
    )


def build_loggers(cfg: DictConfig, folder: Path, summary: Mapping[str, Any]) -> list[Logger]:
    provenance = {key: summary[key] for key in ("command", "versions", "git", "weights") if key in summary}
    config = {**OmegaConf.to_container(cfg, resolve=True), **provenance}  # type: ignore[dict-item]
    loggers = [build(cfg.logger, name) for name in cfg.logger if name != "wandb"]
    wandb = wandb_logger(
        **cfg.logger.wandb,
        run_id=cfg.run_id,
        name=f"{summary['model']}-{summary['backbone']}-{cfg.seed}",
        folder=folder,
        job_type=summary["task"],
        config=without_secrets(config),
    )
    return loggers + ([wandb] if wandb else [])


def end_tracking(loggers: Sequence[Logger], failed: bool) -> None:
    """A W&B run lasts over all stages, so it is ended here."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.close(failed)


def precision(asked: str | int, accelerator: str) -> str | int:
    """`auto` becomes bf16-mixed where the accelerator computes in bfloat16, 32-true elsewhere."""
    asked = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(str(asked), asked)
    if str(asked).endswith("-true") and not str(asked).startswith(("32", "64")):
        raise UsageError(
            f"trainer.precision={asked}: losses and boxes need float32; give bf16-mixed or 32-true"
        )
    if asked != "auto":
        return asked
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # elsewhere it is emulated, and slower than float32
        cpu = torch.cpu.get_capabilities() if accelerator in ("auto", "cpu") else {}
        fast = torch.backends.mkldnn.is_available() and any(cpu.get(k) for k in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


# The stages.


def fit(cfg: DictConfig, trainer: Trainer, task: BaseTask, data: ImageData, folder: Path) -> dict[str, float]:
    """Trains; returns the numbers of the best epoch on `val`."""
    checkpoint = str(find_checkpoint(cfg.resume)) if cfg.resume is not None else None
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    best = trainer.checkpoint_callback
    score = getattr(best, "best_model_score", None)
    return {} if score is None else {f"best {best.monitor}": float(score)}  # type: ignore[union-attr]


def validate(
    cfg: DictConfig, trainer: Trainer, task: BaseTask, data: ImageData, folder: Path
) -> dict[str, float]:
    (numbers,) = trainer.validate(
        task, data, ckpt_path=judged(cfg, trainer), weights_only=True, verbose=False
    )
    keep(task, folder, "val")
    return dict(numbers) | {k: v for k, v in task.numbers.items() if k.startswith("val/")}


def test(
    cfg: DictConfig, trainer: Trainer, task: BaseTask, data: ImageData, folder: Path
) -> dict[str, float]:
    if data.test_is_val:
        say("data.test is not given: the test stage is judged on data.val, which also chose the best epoch")
    checkpoint = judged(cfg, trainer)
    (numbers,) = trainer.test(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    keep(task, folder, "test")
    return dict(numbers) | {k: v for k, v in task.numbers.items() if k.startswith("test/")}


def keep(task: BaseTask, folder: Path, split: str) -> None:
    """What was predicted, and pictures of how well, in the run's folder."""
    metric = task.metrics[split]
    metric.save(folder, split)
    metric.draw(folder / "pictures", split)


STAGE = {"fit": fit, "validate": validate, "test": test}


def judged(cfg: DictConfig, trainer: Trainer) -> str | None:
    """The checkpoint to evaluate: the one asked for, else the fit's or the resumed run's best."""
    if cfg.ckpt_path is not None:
        path = str(best_of(cfg.ckpt_path))
    elif best := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        path = best
    elif cfg.resume is not None:
        path = str(best_of(cfg.resume))
    else:
        say("no checkpoint is given (ckpt_path=…): evaluating the network as it is")
        return None
    say(f"evaluating {path}")
    return path


def table(results: Mapping[str, float]) -> Table:
    """The final numbers, splits side by side; those of the classes, such as "AP/circle", at the end."""
    splits = [s for s in ("val", "test") if any(k.startswith(f"{s}/") for k in results)]
    out = Table("metric", *splits)
    names = dict.fromkeys(k.partition("/")[2] for k in results if k.partition("/")[0] in splits)
    of_classes = [name for name in names if "/" in name]
    if len(of_classes) > MOST_ROWS:  # the worst and the best of the last split
        of_classes.sort(key=lambda name: results.get(f"{splits[-1]}/{name}", math.nan))
        left_out = len(of_classes) - MOST_ROWS
        of_classes = [*of_classes[: MOST_ROWS // 2], *of_classes[-MOST_ROWS // 2 :]]
        out.caption = f"{left_out} classes between the worst and the best are in summary.json"
    for name in [*(name for name in names if "/" not in name), *of_classes]:
        kind, _, of = name.partition("/")
        text = Text(f"{kind} of {of}" if of else kind)
        out.add_row(text, *(_cell(results.get(f"{split}/{name}")) for split in splits))
    return out


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
