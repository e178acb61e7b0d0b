"""Files of weights: how bytes become named tensors and the metadata beside them, and the way back."""

import argparse
import hashlib
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UsageError
from .receipt import Normalisation, few

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

MOST_TENSORS = 1_000_000


def read(path: Path, name: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by dotted name, and its metadata; of a checkpoint, those of its `state_dict`.

    Nothing but tensors and plain containers is unpickled. `name` is what errors call the file. Raises
    `UsageError` for any file that is not a whole file of weights.
    """
    name = name or str(path)
    refuse_pickle(path, name)
    try:
        tensors, metadata = (_read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch)(
            path
        )
    except Exception as error:  # whatever a reader says of bytes it did not expect
        raise UsageError(f"cannot read weights from {name}: {_diagnose(path, error)}") from error
    if not tensors:
        raise UsageError(f"{name} holds no tensors under names; give a file of a state_dict")
    odd = [key for key, x in tensors.items() if x.layout != torch.strided or x.is_quantized or x.is_meta]
    if odd:
        raise UsageError(f"{name} holds sparse, quantised or empty tensors: {few(odd)}; save them as dense")
    return tensors, metadata


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


def normalisation_of(metadata: Mapping[str, str], name: str) -> Normalisation | None:
    """What the metadata says of the images; Detectron2's `pixel_mean` and `pixel_std` are of 0…255.

    Raises `UsageError` if it says so in another way than `save_weights` or Detectron2.
    """
    order = -1 if reads_bgr(metadata, name) else 1
    try:
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


def names_of(metadata: Mapping[str, str], key: str) -> tuple[str, ...] | None:
    """The names that the metadata lists under `key`, `classes` or `keypoints`; None where it does not."""
    try:
        names = json.loads(metadata[key])
    except (ValueError, KeyError, RecursionError):
        return None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if known and names else None


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings of the network's run by key, `model.fpn_channels` say, as far as the metadata has them."""
    try:
        settings = json.loads(metadata["settings"])
    except (ValueError, KeyError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def reads_bgr(metadata: Mapping[str, str], name: str) -> bool:
    """Whether `channel_order` says that the network was trained on BGR. `UsageError` if it says neither."""
    order = metadata.get("channel_order", "RGB").upper()
    if order not in ("RGB", "BGR"):
        raise UsageError(f"{name}: its metadata has channel_order={few([order])}; it must be RGB or BGR")
    return order == "BGR"


def first_line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Only the zip format can be mapped; torchvision's older files are of the one before it.
    # The reference scripts of torchvision and timm keep their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    metadata = {}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        record = content.get("record")
        if isinstance(record, Mapping):
            metadata = _metadata_of(record)
        content = content["state_dict"]
    tensors = dict(itertools.islice(_flatten(content), MOST_TENSORS + 1))
    if len(tensors) > MOST_TENSORS:  # a dictionary within itself many times over would never end
        raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
    return tensors, metadata


def _metadata_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What the record of a run's checkpoint says of its images, classes, keypoints and network."""
    metadata = {}
    if record.get("normalisation") is not None:
        metadata["normalisation"] = json.dumps(record["normalisation"])
    categories, skeleton = record.get("categories"), record.get("skeleton")
    named = {
        "classes": [c.get("name") for c in categories if isinstance(c, Mapping)]
        if isinstance(categories, list)
        else [],
        "keypoints": skeleton.get("names") if isinstance(skeleton, Mapping) else [],
    }
    for key, names in named.items():
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            metadata[key] = json.dumps(names)
    config = record.get("config")
    if isinstance(config, Mapping) and isinstance(config.get("model"), Mapping):
        settings = {f"model.{key}": value for key, value in config["model"].items()}
        choices = config.get("choices")
        if isinstance(choices, Mapping) and "backbone" in choices:
            settings["backbone"] = choices["backbone"]
        metadata["settings"] = json.dumps(settings, default=str)
    return metadata


def _flatten(node: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(key, str):  # an optimizer's moments stand under numbers, and are no weights
                yield from _flatten(value, f"{path}.{key}" if path else key)


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
