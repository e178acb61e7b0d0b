"""Datasets in the form of Pascal VOC: one XML file an image (host.robots.ox.ac.uk/pascal/VOC).

Two layouts: the development kit's (`Annotations`, `JPEGImages`, lists of images in `ImageSets/Main`), and
the one of exporting tools (a folder a split, XML files and images in it or in folders of their own).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from resnext_backbones.errors import UsageError
from tasks.data.faults import NAMED, counted, fault, listed
from tasks.data.foreign import Document, Source, digest
from tasks.data.images import image_size
from tasks.data.tree import listing, no_folder

XML = frozenset((".xml",))
IMAGE_FOLDERS = ("JPEGImages", "images")
BY_KIND = frozenset(("Annotations", "annotations", *IMAGE_FOLDERS))  # folders that part XML files from images


@dataclass(frozen=True)
class _Object:
    """One object; corners as they stand in the file."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    truncated: bool


@dataclass(frozen=True)
class _File:
    """One XML file. size: height and width, None where the file has none."""

    size: tuple[int, int] | None
    objects: list[_Object]


def voc(
    root: Path,
    split: str,
    classes: Sequence[str] | None,
    *,
    one_based: bool,
    max_pixels: int,
    follow_symlinks: bool,
) -> Source:
    """Finds a split's files; see `tasks.data.convert.convert_voc`."""
    root = _development_kit(root)
    annotations, images = _files(root, split, follow_symlinks)
    # of all splits, for the classes: each split is to have the same
    whole = root / "Annotations" if _list(root, split).is_file() else root
    everywhere = _by_name(root, whole, XML, follow_symlinks).values()
    texts = {path: _read(root / path) for path in sorted(everywhere)}
    given = _given_classes(root, classes)
    parts: list[bytes | str] = [
        split,
        str(one_based),
        *(given or []),
        "images",
        *images,
        *images.values(),
    ]
    for path, text in texts.items():
        parts += [path, text]
    read = partial(_document, root, split, annotations, images, texts, given, one_based, max_pixels)
    return Source("voc", root, split, digest(parts), read)


def _development_kit(root: Path) -> Path:
    """`VOCdevkit` may be given for the one year in it."""
    if (root / "Annotations").is_dir() or not root.is_dir():
        return root
    years = sorted(path for path in root.glob("VOC*") if (path / "Annotations").is_dir())
    if len(years) > 1:
        raise UsageError(
            f"{root}: holds {', '.join(path.name for path in years)}; give one of them as data.root"
        )
    return years[0] if years else root


def _files(root: Path, split: str, follow_symlinks: bool) -> tuple[dict[str, str], dict[str, str]]:
    """XML files and images of the split by the name they share; all paths relative to `root`."""
    names = _list(root, split)
    if names.is_file():
        wanted = _names(names)
        folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
        annotations = _by_name(root, root / "Annotations", XML, follow_symlinks)
        images = _by_name(root, folder, None, follow_symlinks)
        for what, there in (("annotation file", annotations), ("image", images)):
            missing = [name for name in wanted if name not in there]
            if missing:
                raise UsageError(f"{names}: {counted(len(missing), what)} missing: {listed(missing)}")
        return {name: annotations[name] for name in wanted}, {name: images[name] for name in wanted}
    folder = root / split
    if Path(split).is_absolute() or ".." in Path(split).parts:
        raise UsageError(f"{folder}: a split is a folder below data.root={root}, or a list of images in it")
    if not folder.is_dir():
        lists = sorted(path.stem for path in names.parent.glob("*.txt"))[:NAMED]
        if lists:
            raise UsageError(f"{names}: there is no such list of images; there are {', '.join(lists)}")
        raise no_folder(folder, "images and XML files")
    return (
        _by_name(root, folder, XML, follow_symlinks),
        _by_name(root, folder, None, follow_symlinks),
    )


def _list(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _names(path: Path) -> list[str]:
    """The names of a list of images; in a class's own list each is followed by -1, 0 or 1."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list of images cannot be read ({error})") from None
    names = [re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in lines if line.strip()]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice or not names:
        what = f"listed more than once: {listed(twice)}" if twice else "the list is empty"
        raise UsageError(f"{path}: {what}; correct the list")
    return names


def _by_name(
    root: Path, folder: Path, suffixes: frozenset[str] | None, follow_symlinks: bool
) -> dict[str, str]:
    """Files below `folder`, relative to `root`, by what XML file and image have in common of their paths."""
    if not folder.is_dir():
        raise no_folder(folder, "images" if suffixes is None else "XML files")
    tree = listing(folder, (root,), follow_symlinks=follow_symlinks)
    files = tree.by_suffix()[0] if suffixes is None else tree.by_suffix(suffixes)[0]
    prefix = folder.relative_to(root).as_posix()
    found: dict[str, str] = {}
    for file in files:
        parts = [part for part in os.path.splitext(file)[0].split("/") if part not in BY_KIND]
        name = "/".join(parts)
        path = file if prefix == "." else f"{prefix}/{file}"
        if name in found:
            raise UsageError(f"{root}: {found[name]!r} and {path!r} have the same name; rename one of them")
        found[name] = path
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _given_classes(root: Path, classes: Sequence[str] | None) -> list[str] | None:
    """The classes that were asked for or stand in `labels.txt`, one a line."""
    path: Path | str = "data.classes"
    if classes is None:
        path = root / "labels.txt"
        if not path.is_file():
            return None
        lines = _read(path).decode("utf-8-sig", errors="replace").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if not classes or len(set(classes)) < len(classes):
        raise UsageError(
            f"{path}: the classes are {listed(classes) or 'missing'}; different names are wanted, one a line"
        )
    return list(classes)


def _document(
    root: Path,
    split: str,
    annotations: dict[str, str],
    images: dict[str, str],
    texts: dict[str, bytes],
    given: list[str] | None,
    one_based: bool,
    max_pixels: int,
) -> Document:
    files = _parsed(root, texts)
    classes = given or sorted({thing.name for file in files.values() for thing in file.objects})
    if not classes:
        raise UsageError(
            f"{root}: no object in any of {counted(len(files), 'XML file')}; there are no classes"
        )
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    document = Document([{"id": label, "name": name} for name, label in label_of.items()])
    strange = [
        f"{annotations[name]} {thing.name!r}"
        for name in sorted(annotations)
        for thing in files[annotations[name]].objects
        if thing.name not in label_of
    ]
    if strange:
        raise UsageError(
            f"{root}: {counted(len(strange), 'object')} of a class that is not trained on: {listed(strange)}"
            f"; the classes are {listed(classes)}"
        )
    measured: list[str] = []
    difficult: list[int] = []
    truncated: list[int] = []
    at_zero: list[int] = []
    for name in sorted(annotations.keys() & images.keys()):
        file = files[annotations[name]]
        if file.size is None:
            measured.append(images[name])
        document.add_image(images[name], *(file.size or image_size(root / images[name], max_pixels)))
        for thing in file.objects:
            x1, y1, x2, y2 = thing.corners
            if one_based:
                x1, y1 = x1 - 1, y1 - 1
            # the development kit leaves difficult objects out of account, as COCO's metric does crowds
            document.add(label_of[thing.name], (x1, y1, x2, y2), iscrowd=int(thing.difficult))
            number = len(document.annotations)
            for marked, numbers in (
                (thing.difficult, difficult),
                (thing.truncated, truncated),
                (one_based and min(x1, y1) < 0, at_zero),
            ):
                if marked:
                    numbers.append(number)
    if not document.images:
        raise UsageError(f"{root / split}: there is no image with an XML file of the same name")
    first = "begins before pixel 1; where files count from 0 and not as VOC does, set data.one_based=false"
    unlabelled = [images[name] for name in sorted(images.keys() - annotations)]
    document.faults += [
        *fault("without an XML file", "left out", "image", unlabelled),
        *fault("without an image", "left out", "XML file", sorted(annotations.keys() - images)),
        *fault("without a size in its XML file", "measured", "image", measured),
        *fault("difficult: neither learned from nor judged", "ignored", "object", difficult),
        *fault("truncated by the edge or by other things", "kept", "object", truncated),
        *fault(first, "kept", "object", at_zero),
        *fault("repeats another one of its image", "kept", "object", document.twice()),
    ]
    return document


def _parsed(root: Path, texts: dict[str, bytes]) -> dict[str, _File]:
    files, wrong = {}, []
    for path, text in texts.items():
        try:
            files[path] = _file(_tree(text))
        except (ValueError, expat.ExpatError) as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        raise UsageError(
            f"{root}: {counted(len(wrong), 'XML file')} not in the form of Pascal VOC: {listed(wrong)}; "
            "correct or remove them"
        )
    return files


def _tree(text: bytes) -> Element:
    """The elements of an XML file without a document type, since its entities can grow without bound."""

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type or entities")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.buffer_text = builder.data, True
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(text, True)
    return builder.close()


def _file(element: Element) -> _File:
    if element.tag != "annotation":
        raise ValueError(f"<annotation> is expected, not <{element.tag}>")
    size = element.find("size")
    sides = (0.0, 0.0) if size is None else (_number(size, "height", 0.0), _number(size, "width", 0.0))
    objects = [_object(child) for child in element.findall("object")]
    known = (int(sides[0]), int(sides[1]))
    return _File(known if min(known) > 0 else None, objects)


def _object(element: Element) -> _Object:
    name = (element.findtext("name") or "").strip()
    box = element.find("bndbox")
    if not name or box is None:
        raise ValueError("an <object> without <name> or <bndbox>")
    x1, y1, x2, y2 = (_number(box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    difficult, truncated = (bool(_number(element, tag, 0.0)) for tag in ("difficult", "truncated"))
    return _Object(name, (x1, y1, x2, y2), difficult, truncated)


def _number(element: Element, tag: str, default: float | None = None) -> float:
    text = (element.findtext(tag) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"<{tag}> {text!r} is not a number")
    return value
