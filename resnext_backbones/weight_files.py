"""Files of weights: how bytes become named tensors and the metadata beside them, and the way back."""

import argparse
import hashlib
import itertools
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UsageError
from .receipt import Normalisation, few

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
PARTS = ("model", "backbone")  # of a run's configuration, which say what its network is

MOST_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Content:
    """What a file of weights holds, and what it says of itself; a run's checkpoint does so in its record.

    Attributes:
        tensors: by dotted name; of a checkpoint, those of its `state_dict`.
        metadata: of a `.safetensors` file.
        normalisation: of a record, as it stands there.
        classes, keypoints: names of a record; None where it has none.
        settings: of the run, by key: `model.fpn_channels`, `backbone.norm`, and which `model` and `backbone`
            were chosen.
        reached: how far the run had got, "epoch 3, step 1200"; empty where nothing says so.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    normalisation: Any = None
    classes: tuple[str, ...] | None = None
    keypoints: tuple[str, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reached: str = ""


def read(path: Path, name: str | None = None) -> Content:
    """What a file of weights holds.

    Nothing but tensors and plain containers is unpickled. `name` is what errors call the file. Raises
    `UsageError` for any file that is not a whole file of weights.
    """
    name = name or str(path)
    refuse_pickle(path, name)
    try:
        content = (_read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch)(path)
    except Exception as error:  # whatever a reader says of bytes it did not expect
        raise UsageError(f"cannot read weights from {name}: {_diagnose(path, error)}") from error
    if not content.tensors:
        raise UsageError(f"{name} holds no tensors under names; give a file of a state_dict")
    odd = [
        key for key, x in content.tensors.items() if x.layout != torch.strided or x.is_quantized or x.is_meta
    ]
    if odd:
        raise UsageError(f"{name} holds sparse, quantised or empty tensors: {few(odd)}; save them as dense")
    return content


def refuse_pickle(path: Path, name: str) -> None:
    """`UsageError` for a file that only unpickling could read."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise UsageError(
            f"{name} is a pickle, which can run code and is not opened here; save its arrays as .safetensors "
            "where you trust it, as docs/backbones.md shows under Weights"
        )


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A `.safetensors` file, whole or not at all: until it is complete, what stood at `path` stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Copies, since the format knows neither channels last nor one memory under two names.
    plain = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }
    try:
        safetensors.torch.save_file(plain, part, dict(metadata))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write weights to {path}: {first_line(error)}; give another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def version(path: Path) -> tuple[int, int, int]:
    """What changes when the file is replaced or written to."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def sha256(path: Path) -> str:
    """Hexadecimal, of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def normalisation_of(content: Content, name: str) -> Normalisation | None:
    """What a file says of the images; Detectron2's `pixel_mean` and `pixel_std` are of 0…255.

    Raises `UsageError` if it says so in another way than a run, `save_weights` or Detectron2.
    """
    metadata = content.metadata
    order = -1 if reads_bgr(metadata, name) else 1
    try:
        if content.normalisation is not None:
            return checked_normalisation(content.normalisation)
        if "normalisation" in metadata:
            return checked_normalisation(json.loads(metadata["normalisation"]))
        if "pixel_mean" in metadata or "pixel_std" in metadata:
            mean, std = (json.loads(metadata[key])[::order] for key in ("pixel_mean", "pixel_std"))
            return checked_normalisation({"mean": [x / 255 for x in mean], "std": [x / 255 for x in std]})
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{name}: its metadata has no readable normalisation ({error!r:.80}); it should be like "
            '{"normalisation": "{\\"mean\\": [0.485, 0.456, 0.406], \\"std\\": [0.229, 0.224, 0.225]}"}'
        ) from error
    return None


def checked_normalisation(value: Any) -> Normalisation:
    """`value` if it is mean and standard deviation of each channel; ValueError otherwise."""
    mean, std = ([float(x) for x in value[key]] for key in ("mean", "std"))
    if not mean or len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean {mean}, std {std}")
    return {"mean": mean, "std": std}


def reads_bgr(metadata: Mapping[str, str], name: str) -> bool:
    """Whether `channel_order` says that the network was trained on BGR. `UsageError` if it says neither."""
    order = metadata.get("channel_order", "RGB").upper()
    if order not in ("RGB", "BGR"):
        raise UsageError(f"{name}: its metadata has channel_order={few([order])}; it must be RGB or BGR")
    return order == "BGR"


def first_line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_safetensors(path: Path) -> Content:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Content(tensors, file.metadata() or {})


def _read_torch(path: Path) -> Content:
    # Only the zip format can be mapped; torchvision's older files are of the one before it.
    # The reference scripts of torchvision and timm keep their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not (isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping)):
        return Content(_flatten(content))
    record = _mapping(content.get("record"))
    config, categories = _mapping(record.get("config")), record.get("categories")
    return Content(
        _flatten(content["state_dict"]),
        normalisation=record.get("normalisation"),
        classes=_names([_mapping(c).get("name") for c in categories] if isinstance(categories, list) else []),
        keypoints=_names(_mapping(record.get("skeleton")).get("names")),
        settings={
            **_mapping(config.get("choices")),
            **{f"{part}.{key}": value for part in PARTS for key, value in _mapping(config.get(part)).items()},
        },
        reached=", ".join(
            f"{what} {content[key]}"
            for what, key in (("epoch", "epoch"), ("step", "global_step"))
            if isinstance(content.get(key), int)
        ),
    )


def _mapping(value: Any) -> Mapping[Any, Any]:
    """`value` if it is one; what a file may hold besides says nothing."""
    return value if isinstance(value, Mapping) else {}


def _names(value: Any) -> tuple[str, ...] | None:
    known = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(value) if known and value else None


def _flatten(content: Any) -> dict[str, Tensor]:
    """The tensors in nested dictionaries by dotted path; ValueError where there is no end to them."""
    tensors: dict[str, Tensor] = {}
    seen = itertools.count(1)

    def enter(node: Any, path: str) -> None:
        if next(seen) > MOST_ENTRIES:  # a dictionary within itself many times over would take years
            raise ValueError(f"it has more than {MOST_ENTRIES:,} entries")
        if isinstance(node, Tensor):
            tensors[path] = node
        elif isinstance(node, Mapping):
            for key, value in node.items():
                if isinstance(key, str):
                    enter(value, f"{path}.{key}" if path else key)
                else:  # an optimizer's moments stand under numbers, and are no weights
                    next(seen)

    enter(content, "")
    return tensors


def _diagnose(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(200).lstrip()
    except OSError as fault:
        return first_line(fault)
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
    return f"it is damaged or no file of weights ({first_line(error)}); download or copy it again"
