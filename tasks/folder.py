"""A run's folder: where it is, and how a run goes on from it."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.markup import escape
from yaml import YAMLError  # type: ignore[import-untyped]

from resnext_backbones.errors import UsageError
from resnext_backbones.sources import best_else_last
from tasks.checkpoint import find_checkpoint, read_checkpoint
from tasks.provenance import without_secrets

CONFIG = "config.yaml"

# What may change when a run goes on; network, data and seed are part of what it is.
CHANGEABLE = ("stages", "trainer", "logger", "callbacks", "optimizer", "scheduler", "resume", "runs_dir")
# Groups whose settings stand under another key than their own name.
CALLBACKS = {"callbacks.ema": "ema", "callbacks.early_stopping": "early_stopping"}
ELSEWHERE = {"tta": "task.views"} | {key: group for group, key in CALLBACKS.items()}
THIS_CALL = ("stages", "task.views")  # asked of one call: the folder keeps what it began with
PREPARATION = ("target", "image_size", "crop_ratio", "interpolation")  # of data, what a network learned with
CHANGEABLE_DATA = ("num_workers", "worker_timeout", "root", "max_pixels", "max_drop_fraction")


def open_folder(cfg: DictConfig, choices: Mapping[str, str]) -> Path:
    """Names and makes the folder of a new run, and keeps its configuration there, without secrets."""
    if cfg.run_id is None:
        name = "-".join([choices["task"], choices["backbone"], datetime.now().strftime("%Y%m%d-%H%M%S")])
        taken = (name if n == 1 else f"{name}-{n}" for n in range(1, 1000))
        cfg.run_id = next(n for n in taken if not (Path(cfg.runs_dir) / n).exists())
    if not re.fullmatch(r"[\w][\w.=-]{0,127}", str(cfg.run_id)):
        raise UsageError(f"run_id={cfg.run_id}: give a name of letters, digits, '.', '_', '=' and '-'")
    with open_dict(cfg):
        cfg.choices = dict(choices)
        if "root" in cfg.data:  # so that the run goes on from any working directory
            cfg.data.root = os.path.abspath(cfg.data.root)
    folder = Path(cfg.run_dir)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        begun = best_else_last(folder) is not None
        way = f"go on with that run by resume={folder}" if begun else "it has no checkpoint, so delete it"
        raise UsageError(f"{folder} exists: {way}, or give another run_id") from None
    except OSError as fault:
        raise UsageError(f"{folder} cannot be made ({fault.strerror}): give another runs_dir") from fault
    save_config(cfg, folder)
    return folder


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Writes the configuration, without secrets, as `config.yaml`; its paths still refer to `run_dir`."""
    plain = without_secrets(OmegaConf.to_container(cfg, resolve=False))
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def resumed(
    cfg: DictConfig, overrides: Sequence[str], choices: Mapping[str, str], say: Callable[[str], None]
) -> DictConfig:
    """The configuration kept in the folder `cfg.resume`, with this command line's overrides on top.

    Where it trains on, the folder keeps it, but for what is asked of this call alone (`THIS_CALL`).

    Raises:
        UsageError: the folder is not a run's, or an override changes the network, the data or the seed.
    """
    folder = Path(os.path.abspath(cfg.resume))
    kept = _kept(folder, f"resume={cfg.resume}")
    before = kept.copy()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    with open_dict(kept):
        for override in sorted(parsed, key=lambda o: o.key_or_group not in choices):  # groups, then keys
            group = override.key_or_group
            key = ELSEWHERE.get(group, group)
            value = OmegaConf.select(cfg, key)
            again = group in choices and choices[group] == kept.choices.get(group)
            if key == "resume" or again:
                continue
            if group in choices and key not in cfg and group not in ELSEWHERE:
                raise UsageError(
                    f"{override.input_line}: cannot be chosen when {folder} goes on; give its keys one by one"
                )
            if key == "callbacks.ema" and value is None and OmegaConf.select(kept, key) is not None:
                raise UsageError(
                    f"{override.input_line}: {folder} averages its weights, which cannot end when it goes on"
                )
            if not _changeable(key) and value != OmegaConf.select(kept, key):
                raise UsageError(
                    f"{key}: network, data and seed cannot change when {folder} goes on; "
                    "start a new run, with model.weights=FOLDER or backbone.weights=FOLDER to begin from its "
                    "weights"
                )
            OmegaConf.update(kept, key, value, merge=False, force_add=True)
            if group in choices and key not in THIS_CALL:
                kept.choices[group] = choices[group]
            elif value is None and key in CALLBACKS:
                kept.choices[CALLBACKS[key]] = "none"
            say(escape(f"override: {override.input_line}"))  # whose brackets are no markup
        # Everything else refers to these, so a folder may have been moved.
        kept.runs_dir, kept.run_id, kept.resume = str(folder.parent), folder.name, str(folder)
    if "fit" in kept.stages:
        save_config(_without_this_call(kept, before), folder)
    return kept


def _without_this_call(kept: DictConfig, before: DictConfig) -> DictConfig:
    """What the folder keeps: `kept` with what was asked of this call alone as it was `before`."""
    lasting = kept.copy()
    with open_dict(lasting):
        for key in THIS_CALL:
            if (value := OmegaConf.select(before, key)) != OmegaConf.select(lasting, key):
                OmegaConf.update(lasting, key, value, merge=False)
    return lasting


def of_checkpoint(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """`cfg` with network, task and data of the checkpoint `cfg.ckpt_path`, and what is asked for on top.

    Where other data are chosen (`data=…`), they are still prepared as the network knows it.
    """
    record = read_checkpoint(best_of(cfg.ckpt_path)).get("record", {}).get("config")
    if record is None:  # not one of ours: the command line says what it holds
        return cfg
    asked = {o.key_or_group for o in OverridesParser.create().parse_overrides(list(overrides))}
    asked |= {"task.views"} if "tta" in asked else set()  # what that group sets
    kept = OmegaConf.create(record)
    with open_dict(cfg), open_dict(kept):
        for part in ("backbone", "model", "task", "data"):
            if part in asked and part != "data":
                continue
            given = {key: OmegaConf.select(cfg, key) for key in asked if key.startswith(f"{part}.")}
            if part in asked:
                given = {f"data.{key}": kept.data[key] for key in PREPARATION if key in kept.data} | given
            else:
                cfg[part] = kept[part]
            for key, value in given.items():
                OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def best_of(path: str | Path) -> Path:
    """The checkpoint to judge: a file itself, of a run's folder the best, else the last."""
    return best_else_last(Path(path)) or find_checkpoint(path)


def _kept(folder: Path, said: str) -> DictConfig:
    try:
        kept = OmegaConf.load(folder / CONFIG)
    except (OSError, ValueError, YAMLError) as fault:
        raise UsageError(
            f"{said}: {folder / CONFIG} cannot be read ({fault}); give a run's folder"
        ) from fault
    if not isinstance(kept, DictConfig) or not OmegaConf.is_dict(kept.get("choices")):
        raise UsageError(f"{said}: {folder / CONFIG} is not a run's configuration; give a run's folder")
    return kept


def _changeable(key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in CHANGEABLE or (first == "data" and rest in CHANGEABLE_DATA) or key == "task.views"
