"""A run's folder: where it is, and how a run goes on from it."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from resnext_backbones.errors import UsageError
from tasks.provenance import without_secrets

CONFIG = "config.yaml"

# What may change when a run goes on; network, data and seed are part of what it is.
CHANGEABLE = ("stages", "trainer", "logger", "callbacks", "optimizer", "scheduler", "resume", "runs_dir")
CHANGEABLE_DATA = ("num_workers", "worker_timeout", "root", "max_pixels", "max_drop_fraction")


def open_folder(cfg: DictConfig, choices: Mapping[str, str]) -> Path:
    """Names and makes the folder of a new run, and keeps its configuration there, without secrets."""
    if cfg.run_id is None:
        name = "-".join([choices["task"], choices["backbone"], datetime.now().strftime("%Y%m%d-%H%M%S")])
        taken = (name if n == 1 else f"{name}-{n}" for n in range(1, 1000))
        cfg.run_id = next(n for n in taken if not (Path(cfg.runs_dir) / n).exists())
    if not re.fullmatch(r"[\w][\w.=-]{0,127}", str(cfg.run_id)):
        raise UsageError(f"run_id={cfg.run_id}: give a name of letters, digits, '.', '_', '=' and '-'")
    folder = Path(cfg.run_dir)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(
            f"{folder} exists: go on with that run by resume={folder}, or give another run_id"
        ) from None
    except OSError as fault:
        raise UsageError(f"{folder} cannot be made ({fault.strerror}): give another runs_dir") from fault
    save_config(cfg, folder)
    return folder


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Writes the configuration, without secrets, as `config.yaml`; its paths still refer to `run_dir`."""
    plain = without_secrets(OmegaConf.to_container(cfg, resolve=False))
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def resumed(cfg: DictConfig, overrides: Iterable[str], say: Callable[[str], None]) -> DictConfig:
    """The configuration kept in the folder `cfg.resume`, with this command line's overrides on top.

    Raises:
        UsageError: the folder is not a run's, or an override changes the network, the data or the seed.
    """
    folder = Path(os.path.abspath(cfg.resume))
    try:
        kept = OmegaConf.load(folder / CONFIG)
    except (OSError, ValueError) as fault:
        raise UsageError(
            f"resume={folder}: {folder / CONFIG} cannot be read ({fault}); give the folder of a run"
        ) from fault
    assert isinstance(kept, DictConfig)
    with open_dict(kept):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            if key == "resume":
                continue
            value = OmegaConf.select(cfg, key)
            same = value is not None and value == OmegaConf.select(kept, key)
            if not (_changeable(key) or same):
                raise UsageError(
                    f"{key}: network, data and seed cannot change when {folder} goes on; "
                    "start a new run, with backbone.weights=FOLDER to begin from its weights"
                )
            OmegaConf.update(kept, key, value, merge=False, force_add=True)
            say(f"override: {override.input_line}")
        # Everything else refers to these, so a folder may have been moved.
        kept.runs_dir, kept.run_id, kept.resume = str(folder.parent), folder.name, str(folder)
    return kept


def _changeable(key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in CHANGEABLE or (first == "data" and rest in CHANGEABLE_DATA)
