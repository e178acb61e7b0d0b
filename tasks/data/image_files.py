"""The image files an annotation file names: all there, and none outside the image folder.

A folder is listed once instead of asking for each file: on a network file system the difference is minutes.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from resnext_backbones.errors import UsageError
from tasks.data.faults import NAMED, counted, listed


def check_image_files(images: Path, names: Sequence[str], *, follow_symlinks: bool = False) -> None:
    """Makes sure that each of `names` is a file within the folder `images`, without opening any.

    follow_symlinks: links may lead out of the folder; otherwise they are refused.

    Raises:
        UsageError: the folder is missing, a name leaves it, or files are missing.
    """
    try:
        root = images.resolve(strict=True)
        if not root.is_dir():
            raise UsageError(f"{images}: not a folder; give the folder that holds the images")
    except OSError:
        raise UsageError(f"{images}: there is no such image folder; {_nearest(images)}") from None

    escaping = [name for name in names if _escapes(name)]
    if not escaping:
        by_folder: dict[str, list[str]] = defaultdict(list)
        for name in names:
            folder, _, file = name.rpartition("/")
            by_folder[folder].append(file)
        missing: list[str] = []
        for folder, files in by_folder.items():
            inside = _within(root / folder, root) or follow_symlinks
            there, links = _listing(root / folder)
            leaving = [f for f in files if f in links and not (follow_symlinks or _within(links[f], root))]
            escaping += [_join(folder, f) for f in (leaving if inside else files)]
            missing += [_join(folder, f) for f in files if f not in there]
    if escaping:
        number = counted(len(escaping), "image file")
        raise UsageError(
            f"{images}: {number} outside the image folder: {_quoted(escaping)}; names are "
            "relative to the folder; where links in it may lead elsewhere, set data.follow_symlinks=true"
        )
    if missing:
        number = f"{len(missing)} of {counted(len(names), 'image file')}"
        raise UsageError(
            f"{images}: {number} missing: {_quoted(missing)}; check "
            "the image folder, or take these images out of the annotation file"
        )


def _escapes(name: str) -> bool:
    windows_drive = name[1:2] == ":"
    parts = name.replace("\\", "/").split("/")
    return not name or name[0] in "/\\" or windows_drive or ".." in parts or "\0" in name


def _within(path: Path | str, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _listing(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The names of a folder's files, and the paths of those that are links."""
    there, links = set(), {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    there.add(entry.name)
                    if entry.is_symlink():
                        links[entry.name] = entry.path
    except (FileNotFoundError, NotADirectoryError):
        pass
    return there, links


def _join(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names[:NAMED]], len(names))


def _nearest(images: Path) -> str:
    folder = images.parent
    if not folder.is_dir():
        return f"nor is there a folder {folder}; check data.root"
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    return f"{folder} holds the folders {', '.join(found[:NAMED])}" if found else f"{folder} holds no folders"
