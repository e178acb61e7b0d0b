"""Where weights come from: a torchvision name, a file, a run's folder; and how bytes become named tensors."""

import difflib
import hashlib
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor

from .errors import UsageError

TORCHVISION_NAME = re.compile(r"\w+_Weights\.\w+")


def find(source: str | Path) -> Path:
    """The file behind a torchvision name, a run's folder or a path; `UsageError` where there is none."""
    path, name = Path(source), str(source)
    if path.is_dir():
        for kind in ("best", "last"):
            if (checkpoint := path / "checkpoints" / f"{kind}.ckpt").is_file():
                return checkpoint
        raise UsageError(
            f"{source} is a folder without checkpoints/best.ckpt or last.ckpt; give a run or a file"
        )
    if path.is_file():
        return path
    if TORCHVISION_NAME.fullmatch(name):
        return _torchvision_file(name)
    if "://" in name:
        raise UsageError(f"{source} is an address; download it, check its SHA-256 and give the file's path")
    near = _nearest(name, cutoff=0.5) or "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"
    raise UsageError(
        f"no weights at {source}: give a file, a run's folder, or torchvision's name, such as {near}"
    )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by dotted name; of a checkpoint, those of its `state_dict`.

    Nothing but tensors and plain containers is unpickled. Raises `UsageError` for any file that is not a
    whole file of weights.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Only the zip format can be mapped; torchvision's older files are of the one before it.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        tensors = dict(_flatten(content))
    except Exception as error:  # whatever a reader says of bytes it did not expect
        raise UsageError(f"cannot read weights from {path}: {_diagnose(path, error)}") from error
    if not tensors:
        raise UsageError(f"{path} holds no tensors under names; give a file of a state_dict")
    return tensors


def sha256(path: Path) -> str:
    """Hexadecimal, of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(node: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(key, str):  # an optimizer's moments stand under numbers, and are no weights
                yield from _flatten(value, f"{path}.{key}" if path else key)


def _torchvision_file(name: str) -> Path:
    """Where torchvision keeps the weights of this name; downloaded if they are not there."""
    try:
        url = torchvision.models.get_weight(name).url
    except (ValueError, KeyError):
        near = _nearest(name, cutoff=0.0)
        raise UsageError(f"torchvision has no weights {name}; its nearest names are {near}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    digest = path.stem.rsplit("-", 1)[1]
    if not path.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # the downloader sets none, and hangs on a network that swallows packets
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # no network, no space; another hash
            raise UsageError(
                f"cannot download {name} ({_first_line(error)}); fetch {url} by other means, put it at {path}"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    if not sha256(path).startswith(digest):
        raise UsageError(
            f"{path} is damaged, its SHA-256 does not begin with {digest}; delete it and try again"
        )
    return path


def _nearest(name: str, cutoff: float) -> str:
    models = torchvision.models
    names = {
        f"{weights.__name__}.{member}".lower(): f"{weights.__name__}.{member}"
        for weights in map(models.get_model_weights, models.list_models())
        for member in weights.__members__
        if TORCHVISION_NAME.fullmatch(f"{weights.__name__}.{member}")  # not the quantised ones
    }
    return ", ".join(names[near] for near in difflib.get_close_matches(name.lower(), names, 3, cutoff))


def _diagnose(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(200).lstrip()
    except OSError as fault:
        return _first_line(fault)
    if not head:
        return "the file is empty; download or copy it again"
    if head.startswith(b"<"):
        return "it is a web page; download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is cut short; download or copy it again"
    if "Weights only load failed" in str(error) and head.startswith((b"PK", b"\x80")):
        return "it holds more than tensors, which could run code when unpickled; save its state_dict alone"
    return f"it is damaged or no file of weights ({_first_line(error)}); download or copy it again"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
