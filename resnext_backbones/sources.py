"""Where weights come from: a file, a run's folder, torchvision's or timm's name, an address."""

import contextlib
import difflib
import hashlib
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torchvision.models import WeightsEnum
from torchvision.transforms._presets import ObjectDetection

from .errors import UsageError
from .receipt import Normalisation, few
from .weight_files import SUFFIXES, first_line, read, refuse_pickle, sha256

TORCHVISION_NAME = re.compile(r"\w+_Weights\.\w+")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # as torch.hub has it
TIMEOUT = 20  # seconds without an answer; the downloaders wait for ever, or try for minutes


# torchvision's builders set the eps of these networks' frozen norms to 0, which no weight tells.
WITHOUT_EPS = {
    f"{name}_ResNet50_FPN_Weights.COCO_V1" for name in ("FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet")
}


@dataclass(frozen=True)
class Source:
    """A file of weights, and what its publisher says of it.

    Attributes:
        classes: names in the order of labels, a detector's without the background; None where nobody says.
        keypoints: names.
        norm_eps: with which its batch norms compute, where that is not what such networks have.
        warning: what makes it doubtful; empty where nothing does.
    """

    path: Path
    name: str
    normalisation: Normalisation | None = None
    licence: str | None = None
    classes: tuple[str, ...] | None = None
    keypoints: tuple[str, ...] | None = None
    norm_eps: float | None = None
    warning: str = ""


def find(source: str | Path) -> Source:
    """The file behind `source`, downloaded if need be; `UsageError` where there is none."""
    if not isinstance(source, str | Path) or not str(source).strip():  # a command line may give anything
        raise UsageError(
            f"weights={few([str(source)])}: give a file, a run's folder or a name; null for none"
        )
    try:
        return _found(source)
    except OSError as error:  # of a cache that cannot be read or written
        raise UsageError(f"{source}: cannot use {error.filename}: {error.strerror}") from error


def _found(source: str | Path) -> Source:
    name = str(source)
    if name.startswith("timm:"):
        return _of_timm(name.removeprefix("timm:"))
    if re.match(r"https?://", name, re.IGNORECASE):
        path = _of_address(name)
        return _published(path, name, Path(urlsplit(name).path).name) or Source(path, name)
    if "://" in name:
        raise UsageError(f"{source}: only http:// and https:// addresses are fetched; download it yourself")
    if (local := _local(Path(source))) is not None:
        return _published(local.path, name, local.path.name) or local
    if TORCHVISION_NAME.fullmatch(name):
        return _of_torchvision(name)
    near = _nearest(name, _torchvision_names(), cutoff=0.5) or "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"
    raise UsageError(
        f"no weights at {source}: give a file, a run's folder, an address, a name of timm's (timm:NAME), or "
        f"torchvision's, such as {near}"
    )


def best_else_last(folder: Path) -> Path | None:
    """The checkpoint of a run's folder to judge it by; None where it has none."""
    files = (folder / "checkpoints" / f"{kind}.ckpt" for kind in ("best", "last"))
    return next((file for file in files if file.is_file()), None)


def _local(path: Path) -> Source | None:
    """The file itself, or the checkpoint of a run's folder; None where there is neither."""
    try:
        if path.is_file():
            return Source(path, str(path))
        if not path.is_dir():
            return None
    except OSError:  # a name that no file can have
        return None
    if (file := best_else_last(path)) is None:
        raise UsageError(
            f"{path} is a folder without checkpoints/best.ckpt or last.ckpt; give a run or a file"
        )
    early = f"{path} has no best.ckpt; last.ckpt is taken, which may be of a run that was stopped early"
    return Source(file, str(file), warning=early if file.name == "last.ckpt" else "")


def _of_torchvision(name: str) -> Source:
    """Kept where torchvision keeps its weights, under the name that carries their hash."""
    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError):
        near = _nearest(name, _torchvision_names())
        raise UsageError(f"torchvision has no weights {name}; its nearest names are {near}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", _file_name(weights))
    digest = path.stem.rsplit("-", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _impatient():
                torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, HTTPException) as error:  # no network, no space; another hash
            raise UsageError(
                f"cannot download {name} ({first_line(error)}); fetch {weights.url} by other means, put it "
                f"at {path}"
            ) from error
    if not sha256(path).startswith(digest):
        raise UsageError(
            f"{path} is damaged, its SHA-256 does not begin with {digest}; delete it and try again"
        )
    return _as_published(path, repr(weights), weights)  # DEFAULT is another name of one of them


def _published(path: Path, name: str, file_name: str) -> Source | None:
    """What torchvision says of a file, where it is one of its own by name and hash; None where it is not."""
    if (hashed := HASH_IN_NAME.search(file_name)) is None:
        return None
    for known in _torchvision_names():
        weights = torchvision.models.get_weight(known)
        if _file_name(weights) == file_name and sha256(path).startswith(hashed[1]):
            return _as_published(path, f"{name}, {known}", weights)
    return None


def _file_name(weights: WeightsEnum) -> str:
    return str(weights.url).rsplit("/", 1)[1]


def _as_published(path: Path, name: str, weights: WeightsEnum) -> Source:
    images = weights.transforms()
    known = {key: [float(x) for x in getattr(images, key, ())] for key in ("mean", "std")}
    classes = weights.meta.get("categories")
    if isinstance(images, ObjectDetection):
        classes = classes and classes[1:]  # the first is the background
        if not repr(weights).startswith("SSD"):  # the others' builders leave this to generalized_rcnn.py
            known = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return Source(
        path,
        name,
        normalisation=known if known["mean"] else None,
        licence=weights.meta.get("license"),
        classes=tuple(classes) if classes else None,
        keypoints=tuple(weights.meta.get("keypoint_names", ())) or None,
        norm_eps=0.0 if repr(weights) in WITHOUT_EPS else None,
    )


def _of_timm(name: str) -> Source:
    """Kept where the Hugging Face hub's client keeps its files, or by `_of_address`."""
    try:
        from timm.models import get_pretrained_cfg, list_pretrained
    except ImportError as error:
        raise UsageError(
            f"timm:{name}: timm is not installed ({first_line(error)}); pip install 'resnext-backbones[timm]'"
        ) from error
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # the architecture exists, the tag does not
        cfg = None
    if cfg is None or not cfg.has_weights:
        names = list_pretrained()
        kin = [n for n in names if n.partition(".")[0] == name.partition(".")[0]]
        near = _nearest(name, kin or names)
        raise UsageError(f"timm:{name[:100]}: timm has no such weights; its nearest names are {near}")
    return Source(
        _of_hub(cfg) if cfg.hf_hub_id else _of_address(str(cfg.url)),
        f"timm:{cfg.architecture}.{cfg.tag}" if cfg.tag else f"timm:{cfg.architecture}",
        normalisation={"mean": [float(x) for x in cfg.mean], "std": [float(x) for x in cfg.std]},
        licence=None if cfg.license == "unknown" else cfg.license,
    )


def _of_hub(cfg: Any) -> Path:
    """The file of a timm configuration, from the hub client's cache if it is there, else from the hub."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, tag = cfg.hf_hub_id.partition("@")
    revision = tag or None
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return _undamaged(Path(cached))
    for file in files:
        url = hf_hub_url(repository, file, revision=revision)
        try:
            get_hf_file_metadata(url, timeout=TIMEOUT)  # asks once, where the download would ask for minutes
            return Path(hf_hub_download(repository, file, revision=revision))
        except Exception as error:  # the client's own kinds change from release to release
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise UsageError(
                f"cannot download {repository} ({first_line(error)}); fetch {url} by other means and give "
                "the file's path"
            ) from error
    raise UsageError(
        f"{repository} has none of {', '.join(files)}; fetch its weights and give the file's path"
    )


def _undamaged(path: Path) -> Path:
    """The hub client's cache links to a file that is named by its SHA-256."""
    if path.is_symlink():
        blob = path.parent / os.readlink(path)
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            raise UsageError(f"{blob} is damaged, its SHA-256 is not its name; delete it and try again")
    return path


def _of_address(url: str) -> Path:
    """The file at an address, downloaded once and kept under its SHA-256, which later uses check.

    What it must be stands behind the address (`#sha256=` and 64 digits) or in its last name, torch.hub's way
    (`-1a0047aa.pth`). Otherwise what comes first is trusted, and the receipt shows what to pin.
    """
    address, digest = _parsed(url)
    path = urlsplit(address).path
    suffix = Path(path).suffix.lower()
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = Path(torch.hub.get_dir(), "resnext_backbones", key)
    kept = [file for file in folder.glob(f"*{suffix}") if re.fullmatch(f"{digest}[0-9a-f]*", file.stem)]
    if len(kept) > 1:
        versions = few(file.stem for file in kept)
        raise UsageError(
            f"{folder} has several versions of {address}: {versions}; add #sha256= and the digits of one, or "
            "delete the others"
        )
    if not kept:
        return _downloaded(address, digest, folder, suffix)
    if sha256(kept[0]) != kept[0].stem:
        raise UsageError(f"{kept[0]} is damaged, its SHA-256 is not its name; delete it and try again")
    return kept[0]


def _parsed(url: str) -> tuple[str, str]:
    """The address without its fragment, and the SHA-256 or its beginning that is asked of the file."""
    address, _, fragment = url.partition("#")
    try:
        parts = urlsplit(address)
        known = bool(parts.hostname) and parts.username is None and address.isascii()
    except ValueError:
        known = False
    if not known or not address.isprintable():
        shown = ascii(address.rpartition("@")[2])[1:-1]
        raise UsageError(f"{shown} is no address to fetch; give http(s)://host/name without user or password")
    path = Path(parts.path)
    refuse_pickle(path, address)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{address} must end in one of {', '.join(SUFFIXES)}, to say how the file is read")
    if fragment:
        if not (pin := re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)):
            raise UsageError(f"{url}: after # can only stand sha256= and 64 hexadecimal digits")
        return address, pin[1].lower()
    in_name = HASH_IN_NAME.search(path.name)
    return address, in_name[1] if in_name else ""


def _downloaded(address: str, digest: str, folder: Path, suffix: str) -> Path:
    """Nothing but a whole file of weights with the right SHA-256 stays in `folder`, under its SHA-256."""
    part = folder / f".{uuid.uuid4().hex}{suffix}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _impatient():
                torch.hub.download_url_to_file(address, str(part))
        except (OSError, ValueError, HTTPException) as error:
            raise UsageError(
                f"cannot download {address} ({first_line(error)}); check the address, or fetch it by other "
                "means and give the file's path"
            ) from error
        found = sha256(part)
        if not found.startswith(digest):
            raise UsageError(
                f"{address}: the SHA-256 of what came is {found}, not {digest}…; add #sha256={found} only if "
                "you know it to be right"
            )
        read(part, address)  # a download cut short, or a web page in its place, ends here
        os.replace(part, folder / f"{found}{suffix}")
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return folder / f"{found}{suffix}"


_COUNTING = threading.Lock()
_downloads = 0
_timeout_before: float | None = None


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """A time limit for torch.hub's downloader, which sets none and hangs where packets are swallowed."""
    global _downloads, _timeout_before
    with _COUNTING:  # the limit is the process's: the last of several downloads at once takes it back
        if _downloads == 0:
            _timeout_before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(TIMEOUT)
        _downloads += 1
    try:
        yield
    finally:
        with _COUNTING:
            _downloads -= 1
            if _downloads == 0:
                socket.setdefaulttimeout(_timeout_before)


def _torchvision_names() -> list[str]:
    models = torchvision.models
    return [
        repr(member)
        for weights in map(models.get_model_weights, models.list_models())
        for member in weights
        if TORCHVISION_NAME.fullmatch(repr(member))  # not the quantised ones
    ]


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.0) -> str:
    known = {near.lower(): near for near in names}
    close = difflib.get_close_matches(name[:100].lower(), known, 3, cutoff)
    return ", ".join(known[near] for near in close)
