"""What ran and what came of it: versions, git state, configuration without secrets, summary.json."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from tasks.checkpoint import replacing

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "hotcoco",
    "pycocotools",
    "wandb",
)
SECRET_NAME = r"(?:token(?!i)|secret|passw|passphrase|api[-_]?key|access[-_]?key|credential)"
SECRET = re.compile(SECRET_NAME, re.I)
SECRET_IN_COMMAND = re.compile(rf"""([\w.+-]*{SECRET_NAME}[\w.-]*=)(?:"[^"]*"|'[^']*'|\S+)""", re.I)
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
REDACTED = "<redacted>"


@rank_zero_only
def write_summary(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Merge `values` into the folder's `summary.json`, key by key and level by level, replaced at once."""
    path = Path(folder) / "summary.json"
    summary: dict[str, Any] = {}
    if path.exists():
        try:
            summary = json.loads(path.read_bytes())
        except ValueError:
            warnings.warn(f"{path}: not JSON, it is written anew", stacklevel=2)
    with replacing(path) as file:
        text = json.dumps(merged(summary, plain(values)), allow_nan=False, indent=2, ensure_ascii=False)
        file.write(text.encode() + b"\n")


def merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def plain(value: Any) -> Any:
    """`value` in JSON's own types; tensors and arrays become numbers and lists, anything unknown its text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        number = float(value)
        if math.isnan(number):
            return "NaN"
        return number if math.isfinite(number) else f"{'-' * (number < 0)}Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def without_secrets(config: Any) -> Any:
    """A copy of `config` in plain containers, references resolved, fit for files and for W&B.

    The value of every key that speaks of a token, a secret, a password, a credential or an API key becomes
    `<redacted>`, and so do such values in a command line, and user names and passwords inside URLs.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    if isinstance(config, Mapping):
        return {
            key: REDACTED if SECRET.search(str(key)) and value is not None else without_secrets(value)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [without_secrets(entry) for entry in config]
    if isinstance(config, str):
        return SECRET_IN_COMMAND.sub(rf"\1{REDACTED}", USER_IN_URL.sub(REDACTED, config))
    return config


def git_state(folder: str | os.PathLike[str] = Path(__file__).parent) -> dict[str, Any]:
    """`{"commit": <hash>, "dirty": <bool>}` of the repository at `folder`; None where there is none.

    Nothing under `docs/` has a part in a run, and a benchmark writes its table there: it makes nothing dirty.
    """
    but_docs = ("--", ":/", ":(top,exclude)docs")

    def git(*words: str) -> str:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            env=environment, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", *but_docs)),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages a result depends on, and the hardware's name."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    gpu = torch.cuda.is_available()
    return found | {
        "cuda": torch.version.cuda if gpu else None,
        "hardware": torch.cuda.get_device_name() if gpu else processor(),
        "devices": torch.cuda.device_count() if gpu else os.cpu_count(),
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
