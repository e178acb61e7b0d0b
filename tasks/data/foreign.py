"""What a dataset in another form than COCO's holds, and its COCO file, made once and kept up to date."""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from resnext_backbones.errors import UsageError
from tasks.data.faults import Fault, counted

DIGITS = 12  # of the digest, in a file's name
VERSION = 1  # raised whenever the same sources give another file


@dataclass
class Document:
    """The lists of a COCO file, and what was odd in what they were made from."""

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add_image(self, file_name: str, height: int, width: int) -> None:
        """The image that the next annotations belong to. file_name: relative to the folder of the dataset."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file_name, "width": width, "height": height})

    def add(self, category_id: int, corners: tuple[float, float, float, float], **more: Any) -> None:
        """An object of the last image. corners: x1, y1, x2, y2 in pixels, from edge to edge."""
        x1, y1, x2, y2 = corners
        record = {
            "id": len(self.annotations) + 1,
            "image_id": len(self.images),
            "category_id": category_id,
            "bbox": [_rounded(v) for v in (x1, y1, x2 - x1, y2 - y1)],
            "area": _rounded(max(0.0, x2 - x1) * max(0.0, y2 - y1)),
            "iscrowd": 0,
        }
        self.annotations.append(record | more)

    def twice(self) -> list[int]:
        """The annotations that repeat an earlier one of their image."""
        seen: set[Any] = set()
        repeated = []
        for record in self.annotations:
            key = (
                record["image_id"],
                record["category_id"],
                *record["bbox"],
                str(record.get("segmentation")),
            )
            if key in seen:
                repeated.append(record["id"])
            seen.add(key)
        return repeated

    def summary(self) -> str:
        objects = counted(len(self.annotations), "object")
        return f"{counted(len(self.images), 'image')}, {objects} of {len(self.categories)} classes"


@dataclass(frozen=True)
class Source:
    """A split of a dataset in another form.

    kind: short name of the form. root: the folder of the dataset, to which images are relative. split: its
    name. digest: another one whenever `read` would give something else. read: reads it.
    """

    kind: str
    root: Path
    split: str
    digest: str
    read: Callable[[], Document]


def digest(parts: Iterable[bytes | str]) -> str:
    """One hash of many texts, which differs wherever one of them does."""
    whole = hashlib.sha256(str(VERSION).encode())
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


class _Made(msgspec.Struct):
    digest: str = ""
    summary: str = ""
    notes: list[str] = []


class _Info(msgspec.Struct):
    made: _Made = msgspec.field(default_factory=_Made)


class _Existing(msgspec.Struct):
    info: _Info = msgspec.field(default_factory=_Info)


def coco_file(source: Source, cache: Path | None) -> tuple[Path, str]:
    """The COCO file of a source, written if it is not there yet.

    It is `annotations/{kind}_{split}-{digest}.json` below the dataset's folder, or, where nothing can be
    written there, below `cache`: another file for other sources, so that a run that is under way keeps its
    own. It appears whole or not at all, also when two processes write it at once. Returns its path and what
    is to be said about it. Files of other sources stay, since nobody knows which run still evaluates with
    them; they are counted.

    Raises:
        UsageError: it can be written nowhere; there is a file of that name with something else in it.
    """
    below = Path("annotations") / f"{_stem(source)}-{source.digest[:DIGITS]}.json"
    places = [folder / below for folder in (source.root, cache) if folder is not None]
    for path in places:
        made = _existing(path, source)
        if made is not None:
            return path, _text(source, path, made)
    document = source.read()
    notes = [str(fault) for fault in document.faults]
    made = _Made(source.digest, document.summary(), notes)
    content = {
        "info": {"description": f"{source.kind}, {source.split}", "made": msgspec.to_builtins(made)},
        "images": document.images,
        "annotations": document.annotations,
        "categories": document.categories,
    }
    reason = ""
    for path in places:
        try:
            _write(path, json.dumps(content, separators=(",", ":")))
        except OSError as error:
            reason = reason or str(error.strerror)
            continue
        return path, _text(source, path, made)
    raise UsageError(
        f"{places[0]}: the COCO file made from {source.root} cannot be written ({reason}); make the folder "
        "writable, or give one that is: data.cache=FOLDER"
    )


def _stem(source: Source) -> str:
    """What the names of all COCO files of a split begin with."""
    return f"{source.kind}_{'all' if source.split == '.' else source.split.replace('/', '-')}"


def _existing(path: Path, source: Source) -> _Made | None:
    try:
        made = msgspec.json.decode(path.read_bytes(), type=_Existing).info.made
    except OSError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        made = _Made()
    if made.digest != source.digest:
        raise UsageError(f"{path}: was not made from {source.root}; remove it")
    return made


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).chmod(0o644)  # mkstemp makes it private
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _text(source: Source, path: Path, made: _Made) -> str:
    lines = [f"{source.split} of {source.root}: {made.summary}; as a COCO file: {path}", *made.notes]
    others = len(list(path.parent.glob(f"{glob.escape(_stem(source))}-{'[0-9a-f]' * DIGITS}.json"))) - 1
    if others:
        lines.append(f"kept {counted(others, 'file')} beside it, made of the same split in another state")
    return "\n  ".join(lines)


def _rounded(value: float) -> float:
    """To a ten-thousandth of a pixel: beyond it stand only the rounding errors of a product."""
    return round(value, 4)
