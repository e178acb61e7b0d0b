"""What a configuration names, built: network with its weights, task, trainer, loggers."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue
from rich.text import Text
from torch import nn

from resnext_backbones import Receipt, freeze, freeze_norms, load_weights
from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.checkpoint import AtomicCheckpointIO, read_checkpoint
from tasks.data.module import ImageData
from tasks.folder import best_of
from tasks.handover import load_network
from tasks.plugins import provider
from tasks.pretrained import (
    normalisation,
    refuse_idle_norms,
    refuse_other_channels,
    restore_normalisation,
    take_normalisation,
)
from tasks.provenance import plain, without_secrets
from tasks.stopping import StopOnSignal
from tasks.terminal import say
from tasks.unfreezing import Unfreezing
from tasks.wandb_run import wandb_logger

HAND_OVER = ("weights", "freeze_at", "unfreeze", "freeze_norms")  # of `backbone`, not the body's


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
            target = cfg[key].get("_target_")
            of_plugin = f" (of {plugin})" if (plugin := provider(target)) else ""
            raise UsageError(f"{key}: {target}{of_plugin}: {reason}") from fault
        raise


def build_task(cfg: DictConfig, data: ImageData) -> tuple[BaseTask, Receipt | None]:
    """The network in the task that trains it, and the receipt of the weights it begins with."""
    body, receipt = build_body(cfg)
    model = build_model(cfg, body, **data.model_arguments)
    receipt = hand_over(cfg, data, model, body, receipt)
    model.to(memory_format=torch.channels_last)
    optimizer, scheduler = build(cfg, "optimizer"), build(cfg, "scheduler")
    task = build(cfg, "task", model=model, optimizer=optimizer, scheduler=scheduler, seed=cfg.seed)
    task.record = {
        "config": without_secrets(OmegaConf.to_container(cfg, resolve=True)),
        "categories": data.categories,
        "skeleton": data.skeleton and plain(asdict(data.skeleton)),
        "normalisation": getattr(body, "normalisation", None) or normalisation(model),
    }
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{type(model).__name__} on {cfg.backbone._target_.rpartition('.')[2]}: {parameters:,} parameters")
    return task, receipt


def build_model(cfg: DictConfig, body: nn.Module, **arguments: Any) -> nn.Module:
    """The network on its body, as it is built; `model.weights` is none of its arguments."""
    settings = cfg.copy()
    with open_dict(settings):
        settings.model.pop("weights", None)
    model: nn.Module = build(settings, "model", body=body, **arguments)
    return model


def hand_over(
    cfg: DictConfig, data: ImageData, model: nn.Module, body: nn.Module, receipt: Receipt | None
) -> Receipt | None:
    """`model.weights` into the network, and with weights of any kind the normalisation they learned with.

    Returns the receipt: of the body's weights as it was given, or of the network's.
    """
    if not begins_anew(cfg):
        file = best_of(cfg.ckpt_path) if cfg.resume is None else cfg.resume
        record = read_checkpoint(file).get("record")  # not there where it is none of ours
        recorded = record.get("normalisation") if isinstance(record, Mapping) else None
        restore_normalisation(model, body, recorded, file)
        return receipt
    if (weights := cfg.model.get("weights")) is not None:
        classes = [category["name"] for category in data.categories]
        keypoints = data.skeleton.names if data.skeleton else ()
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        parts = ("model", "backbone")
        settings = {f"{part}.{key}": value for part in parts for key, value in config[part].items()}
        settings |= config.get("choices", {})
        receipt = load_network(model, body, weights, classes, keypoints, settings)
        say(Text(without_secrets(str(receipt))))
    if receipt is not None and (line := take_normalisation(receipt, model, body)):
        say(Text(line))
    return receipt


def begins_anew(cfg: DictConfig) -> bool:
    """Whether no checkpoint is loaded into the network, so that it begins with the weights it is given."""
    return cfg.resume is None and cfg.ckpt_path is None


def build_body(cfg: DictConfig) -> tuple[nn.Module, Receipt | None]:
    """The body with its weights; early stages and norms stay as they are by default if pretrained.

    Where a checkpoint is loaded into the network anyhow, the weights it once began with are not read again.
    Those of `model.weights` come later, into the stages and norms that are frozen here.
    """
    weights, freeze_at, frozen_norms = (cfg.backbone[key] for key in ("weights", "freeze_at", "freeze_norms"))
    whole = cfg.model.get("weights")
    pretrained = weights is not None or whole is not None
    if weights is not None and whole is not None:
        raise UsageError(
            f"model.weights={whole} brings a body along: leave out backbone.weights={weights}, or set it to "
            "null where an experiment has it"
        )
    if not pretrained and (freeze_at or frozen_norms):
        raise UsageError(
            f"backbone.freeze_at={freeze_at}, backbone.freeze_norms={frozen_norms} would keep random numbers "
            "as they are: give backbone.weights=SOURCE or model.weights=SOURCE, or leave them out"
        )
    arguments = OmegaConf.masked_copy(cfg.backbone, [key for key in cfg.backbone if key not in HAND_OVER])
    body = build(OmegaConf.create({"backbone": arguments}), "backbone")
    refuse_other_channels(body)
    receipt = None
    if begins_anew(cfg):
        if weights is not None:
            receipt = load_weights(body, weights)
            say(Text(without_secrets(str(receipt))))  # as text, since rich would unfold the dataclass
        elif whole is None:
            refuse_idle_norms(body)
    if frozen_norms if frozen_norms is not None else pretrained:
        freeze_norms(body)
    freeze(body, freeze_at if freeze_at is not None else 2 if pretrained else 0)
    return body, receipt


def build_trainer(cfg: DictConfig, folder: Path, summary: Mapping[str, Any]) -> Trainer:
    """Lightning's trainer with our checkpoints, our samplers and the loggers."""
    settings = cfg.copy()
    settings.trainer.precision = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    return build(
        settings,
        "trainer",
        callbacks=build_callbacks(cfg),
        logger=build_loggers(settings, folder, summary),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # our samplers know their rank, and do not pad
        num_sanity_val_steps=0,  # two batches say nothing about a split
        enable_model_summary=False,
    )


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    callbacks = [build(cfg.callbacks, name) for name, chosen in cfg.callbacks.items() if chosen]
    if cfg.backbone.get("unfreeze") is not None:
        callbacks.append(Unfreezing(cfg.backbone.unfreeze))
    return sorted(callbacks, key=lambda one: isinstance(one, StopOnSignal))  # which saves what others count


def refuse_wrong_parts(cfg: DictConfig) -> None:
    """Raises UsageError for what no optimizer, schedule or callback takes, by building them once.

    They cost nothing, and so a mistake is said before data are read and a folder is made.
    """
    build(cfg, "optimizer")
    build(cfg, "scheduler")
    build_callbacks(cfg)


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
