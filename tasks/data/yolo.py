"""Datasets in the form of YOLO (docs.ultralytics.com/datasets): `data.yaml`, and a text file an image.

A line of a text file is an object: the class's number from 0 and a box `cx cy w h` or an outline
`x1 y1 x2 y2 …` (also of a turned box), all as shares of the image's width and height. The file of
`…/images/a/1.jpg` is `…/labels/a/1.txt`; an image without one, or with an empty one, shows no object.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from resnext_backbones.errors import UsageError
from tasks.data.faults import counted, fault, listed
from tasks.data.foreign import Document, Source, digest
from tasks.data.images import image_size
from tasks.data.tree import IMAGE_SUFFIXES, listing, progress_bar, suffix

TEXT = frozenset((".txt",))
NAME_LISTS = ("classes.txt", "labels.txt", "notes.txt")  # tools leave them among the labels
FARTHEST = 2.0  # a share beyond this is none: the numbers are pixels

Line = tuple[int, list[float]]  # the class from 0, and what follows it


def yolo(root: Path, split: str, *, max_pixels: int, follow_symlinks: bool) -> Source:
    """Finds a split's files; see `tasks.data.convert.convert_yolo`."""
    path = _description(root)
    root = path.parent
    text = path.read_bytes()
    described = _mapping(path, text)
    names = _names(path, described)
    images = _images(path, described, split, follow_symlinks)
    labels = {image: _label_file(image) for image in images}
    there = _text_files(root, {os.path.dirname(label) for label in labels.values()}, follow_symlinks)
    texts = {image: _read(root / label) if label in there else None for image, label in labels.items()}
    spare = sorted(there - set(labels.values()))
    parts: list[bytes | str] = [split, text, *spare]
    for image, label in texts.items():
        parts += [image, str((root / image).stat().st_size), b"\0" if label is None else label]
    read = partial(_document, root, names, texts, labels, spare, max_pixels)
    return Source("yolo", root, split, digest(parts), read)


# What `data.yaml` says.


def _description(root: Path) -> Path:
    if root.is_file():
        return root
    found = [root / "data.yaml"] if (root / "data.yaml").is_file() else sorted(root.glob("*.y*ml"))
    if len(found) != 1:
        there = f"holds {', '.join(path.name for path in found)}" if found else "holds no data.yaml"
        raise UsageError(f"{root}: {there}; give the file that names classes and splits as data.root")
    return found[0]


def _mapping(path: Path, text: bytes) -> Mapping[str, Any]:
    try:
        described = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise UsageError(f"{path}: not YAML: {told}") from None
    if not isinstance(described, Mapping):
        raise UsageError(f"{path}: `names` and the splits `train`, `val` are expected, each with its value")
    if "kpt_shape" in described:
        raise UsageError(
            f"{path}: `kpt_shape`: keypoints are not read in YOLO's form; convert them to COCO's"
        )
    return described


def _names(path: Path, described: Mapping[str, Any]) -> list[str]:
    """The classes' names by their number, from a list or from a mapping of numbers."""
    given = described.get("names")
    if isinstance(given, Mapping):
        numbered = sorted(given.items(), key=lambda item: str(item[0]).zfill(9))
        numbers = [str(number) for number, _ in numbered]
        if numbers != [str(k) for k in range(len(numbers))]:
            raise UsageError(f"{path}: `names`: the classes' numbers are {listed(numbers)}, not 0, 1, …")
        given = [name for _, name in numbered]
    if not isinstance(given, list) or not given:
        raise UsageError(f"{path}: `names` is missing; a list of the classes' names is expected")
    # nothing but numbers and texts is ever printed: YAML's aliases make a text of any length of a few lines
    odd = [str(name) if isinstance(name, bool) else type(name).__name__ for name in given if not _plain(name)]
    names = [str(name).strip() for name in given if _plain(name)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if odd or twice or "" in names:
        raise UsageError(
            f"{path}: `names`: {listed(odd or twice) or 'an empty name'}; different names are wanted, in "
            "quotes where YAML takes them for something else"
        )
    number = described.get("nc", len(names))
    if number != len(names):
        number = number if _plain(number) else "no number"
        raise UsageError(f"{path}: `nc` is {number}, but `names` has {len(names)}; make them agree")
    return names


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _images(path: Path, described: Mapping[str, Any], split: str, follow_symlinks: bool) -> list[str]:
    """The images of a split, relative to `data.yaml`: those in folders, or listed in text files."""
    given = described.get(split)
    if given is None and split == "val":
        given = described.get("valid")
    entries = [given] if isinstance(given, str) else given
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries) or not entries:
        there = sorted(str(key) for key in described if key not in ("names", "nc", "path"))
        raise UsageError(f"{path}: says nothing of {split!r}; it has {', '.join(there) or 'no splits'}")
    root = path.parent
    base = described.get("path")
    base = base if isinstance(base, str) else "."
    images: list[str] = []
    for entry in entries:
        place = _place(path, base, entry)
        if place.is_dir():
            tree = listing(place, (root,), follow_symlinks=follow_symlinks)
            images += [(place / name).relative_to(root).as_posix() for name in tree.by_suffix()[0]]
        else:
            images += _listed(path.parent, place)
    if not images:
        raise UsageError(f"{path}: {split}: no image in {listed(entries)}")
    return sorted(set(images))


def _place(path: Path, base: str, entry: str) -> Path:
    """Where an entry leads: `path` is often that of another machine, the entry a folder too far up."""
    root = path.parent.resolve()
    below = Path(entry.removeprefix("../"))
    candidates = [root / base / entry, root / entry, root / base / below, root / below]
    for candidate in candidates:
        plain = Path(os.path.normpath(candidate))
        if plain.is_relative_to(root) and plain.exists():
            return path.parent / plain.relative_to(root)
    raise UsageError(
        f"{path}: {entry!r} is neither a folder nor a list of images below {path.parent}; correct it, "
        "relative to the file"
    )


def _listed(root: Path, place: Path) -> list[str]:
    images = []
    for line in place.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if line.strip():
            plain = os.path.normpath(os.path.join(os.path.dirname(place.relative_to(root)), line.strip()))
            images.append(plain.replace(os.sep, "/"))
    outside = [image for image in images if image.startswith(("../", "/"))]
    if outside or not images:
        raise UsageError(f"{place}: {listed(outside) or 'nothing'} listed; images below {root} are expected")
    missing = [
        image for image in images if suffix(image) not in IMAGE_SUFFIXES or not (root / image).is_file()
    ]
    if missing:
        raise UsageError(f"{place}: {counted(len(missing), 'image')} missing: {listed(missing)}")
    return images


# Text files.


def _label_file(image: str) -> str:
    """Where an image's objects stand: the last folder `images` is called `labels`."""
    parts = image.split("/")
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return os.path.splitext("/".join(parts))[0] + ".txt"


def _text_files(root: Path, folders: set[str], follow_symlinks: bool) -> set[str]:
    """The text files in these folders, all relative to `root`, which links leave only if they may."""
    inside = root.resolve()
    found: set[str] = set()
    for folder in sorted(folders):
        if not (root / folder).is_dir():
            continue
        links = [root / folder]
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if suffix(entry.name) in TEXT and entry.name not in NAME_LISTS and entry.is_file():
                    found.add(f"{folder}/{entry.name}".removeprefix("/"))
                    links += [Path(entry.path)] if entry.is_symlink() else []
        leaving = [str(link) for link in links if not link.resolve().is_relative_to(inside)]
        if leaving and not follow_symlinks:
            raise UsageError(
                f"{root}: {counted(len(leaving), 'link')} out of the dataset's folder: {listed(leaving)}; "
                "where links may lead elsewhere, set data.follow_symlinks=true"
            )
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _document(
    root: Path,
    names: Sequence[str],
    texts: Mapping[str, bytes | None],
    labels: Mapping[str, str],
    spare: Sequence[str],
    max_pixels: int,
) -> Document:
    lines = _parsed(root, names, texts, labels)
    document = Document([{"id": k, "name": name} for k, name in enumerate(names, start=1)])
    shared = sorted(label for label, number in Counter(labels.values()).items() if number > 1)
    with progress_bar() as progress:
        for image in progress.track(texts, description="measuring images"):
            height, width = image_size(root / image, max_pixels)
            document.add_image(image, height, width)
            for index, shares in lines[image]:
                _add(document, index + 1, shares, height, width)
    bare = [image for image, text in texts.items() if text is None]
    document.faults += [
        *fault("without a text file: there is no object in it", "kept", "image", bare),
        *fault("without an image", "left out", "text file", spare),
        *fault("of several images", "used", "text file", shared),
        *fault("repeats another one of its image", "kept", "object", document.twice()),
    ]
    return document


def _add(document: Document, category_id: int, shares: list[float], height: int, width: int) -> None:
    if len(shares) == 4:
        cx, cy, w, h = shares
        corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        document.add(category_id, corners)
        return
    xs, ys = [x * width for x in shares[::2]], [y * height for y in shares[1::2]]
    outline = [round(v, 4) for point in zip(xs, ys, strict=True) for v in point]
    twice = sum(x * ys[k - 1] - xs[k - 1] * y for k, (x, y) in enumerate(zip(xs, ys, strict=True)))
    corners = (min(xs), min(ys), max(xs), max(ys))
    document.add(category_id, corners, segmentation=[outline], area=round(abs(twice) / 2, 4))


def _parsed(
    root: Path, names: Sequence[str], texts: Mapping[str, bytes | None], labels: Mapping[str, str]
) -> dict[str, list[Line]]:
    parsed: dict[str, list[Line]] = {}
    wrong: list[str] = []
    for image, text in texts.items():
        parsed[image] = []
        for number, line in enumerate(
            (text or b"").decode("utf-8-sig", errors="replace").splitlines(), start=1
        ):
            if not line.strip():
                continue
            try:
                parsed[image].append(_line(line, len(names)))
            except ValueError as error:
                wrong.append(f"{labels[image]}, line {number}: {error}")
    if wrong:
        raise UsageError(
            f"{root}: {counted(len(wrong), 'line')} not in YOLO's form: {listed(wrong)}; correct them"
        )
    return parsed


def _line(line: str, number: int) -> Line:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        raise ValueError("something other than numbers") from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a number that is not finite")
    index, shares = values[0], values[1:]
    if not index.is_integer() or not 0 <= index < number:
        raise ValueError(f"class {index:g}; the {number} classes are 0 to {number - 1}")
    if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
        raise ValueError(
            f"{len(shares)} numbers after the class; 4 of a box or pairs of an outline are expected"
        )
    if max(map(abs, shares)) > FARTHEST:
        raise ValueError(f"{max(shares, key=abs):g} is no share of the image's side; are these pixels?")
    return int(index), shares
