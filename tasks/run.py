"""One run: what its configuration names is built, its stages follow one another, its results are kept."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from resnext_backbones import sources
from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.batch_size import found_batch_size, refuse_auto
from tasks.building import begins_anew, build, build_task, build_trainer, precision, refuse_wrong_parts
from tasks.checkpoint import find_checkpoint
from tasks.data.check import check_dataset
from tasks.data.module import AUTO, SPLITS, ImageData
from tasks.folder import best_of, of_checkpoint, open_folder, resumed, save_config
from tasks.pretrained import keep_receipt
from tasks.provenance import git_state, versions, without_secrets, write_summary
from tasks.terminal import hush, say, table
from tasks.unfreezing import Unfreezing
from tasks.wandb_run import WandbLogger

STAGES = ("check", "fit", "validate", "test")


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
    refuse_auto(cfg, stages)
    if set(stages) & set(STAGE):
        refuse_wrong_parts(cfg)
    seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data", seed=cfg.seed)
    if begins_anew(cfg) and set(stages) & set(STAGE):
        find_weights(cfg)
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
        if cfg.data.get("batch_size") == AUTO:
            settle_batch_size(cfg, task, data, folder)
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


def find_weights(cfg: DictConfig) -> None:
    """Raises UsageError where there are no weights to begin with, before data are read and a folder is made.

    Downloads them if need be.
    """
    for weights in (cfg.backbone.weights, cfg.model.get("weights")):
        if weights is not None:
            sources.find(weights)


def settle_batch_size(cfg: DictConfig, task: BaseTask, data: ImageData, folder: Path) -> None:
    """Puts the number found for `data.batch_size=auto` into data, configuration, folder and checkpoints."""
    settings = cfg.copy()
    settings.trainer.precision = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trial = build(settings, "trainer", enable_model_summary=False, **silent)
    unfreeze = cfg.backbone.get("unfreeze")
    least_frozen = None if unfreeze is None else Unfreezing(unfreeze).least
    found = found_batch_size(task, data, build(cfg, "optimizer"), trial, say, least_frozen)
    cfg.data.batch_size = data.batch_size = task.record["config"]["data"]["batch_size"] = found
    save_config(cfg, folder)


def end_tracking(loggers: Sequence[Logger], failed: bool) -> None:
    """A W&B run lasts over all stages, so it is ended here."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.close(failed)


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
