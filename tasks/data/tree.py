"""The files below a folder, listed without opening or asking for any: a million names take seconds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from resnext_backbones.errors import UsageError
from tasks.data.faults import NAMED, Fault, counted, fault, listed

# Endings of what `images.decode` reads; others are not taken for images.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
)


@dataclass
class Tree:
    """What lies below a folder; all paths relative to it, with "/" between, sorted.

    files: regular files and links to them. odd: links that lead nowhere or in circles, pipes and devices.
    """

    files: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    def by_suffix(self, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> tuple[list[str], list[str]]:
        """The files with one of these endings, upper or lower case, and the others."""
        chosen: list[str] = []
        others: list[str] = []
        for name in self.files:
            (chosen if suffix(name) in suffixes else others).append(name)
        return chosen, others


def suffix(name: str) -> str:
    """The ending of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def listing(folder: Path | str, roots: Sequence[Path], *, follow_symlinks: bool = False) -> Tree:
    """Lists all files below `folder`. Names that begin with a dot are left out, as `ls` does.

    roots: links must stay within one of these folders, unless `follow_symlinks`.

    Raises:
        UsageError: links lead out of `roots`, or a folder cannot be read.
    """
    inside = [os.path.realpath(root) for root in roots]
    tree = Tree()
    leaving: list[str] = []
    # path, path relative to `folder`, and the true paths of the folders on the way here
    start = os.path.realpath(folder)
    if not follow_symlinks and not any(_within(start, root) for root in inside):
        raise _leaving(folder, ["."])
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(str(folder), "", (start,))]
    while waiting:
        path, prefix, above = waiting.pop()
        try:
            with os.scandir(path) as entries:
                found = list(entries)
        except OSError as error:
            raise UsageError(f"{path}: the folder cannot be read ({error.strerror})") from None
        for entry in found:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if not follow_symlinks and not any(_within(real, root) for root in inside):
                    leaving.append(name)
                elif os.path.isdir(real) and real not in above:
                    waiting.append((entry.path, name + "/", (*above, real)))
                else:
                    (tree.files if os.path.isfile(real) else tree.odd).append(name)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, name + "/", (*above, f"{above[-1]}/{entry.name}")))
            else:
                (tree.files if entry.is_file(follow_symlinks=False) else tree.odd).append(name)
    if leaving:
        raise _leaving(folder, sorted(leaving))
    tree.files.sort()
    tree.odd.sort()
    return tree


def progress_bar() -> Progress:
    """A bar on standard error that leaves nothing behind, and shows nothing where nobody looks at it."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def left_out(others: Sequence[str], odd: Sequence[str]) -> list[Fault]:
    """What to say of files that are not read."""
    return [
        *fault("not an image, by its ending", "left out", "file", others),
        *fault("a link that leads nowhere or in a circle, or no regular file", "left out", "file", odd),
    ]


def no_folder(folder: Path, what: str) -> UsageError:
    """That `folder` is missing, and which folders are there instead."""
    if folder.exists():
        return UsageError(f"{folder}: not a folder; give the folder of {what}")
    near = folder.parent
    if not near.is_dir():
        return UsageError(
            f"{folder}: no such folder of {what}, nor is there a folder {near}; check data.root"
        )
    there = sorted(entry.name for entry in near.iterdir() if entry.is_dir())
    found = f"the folders {', '.join(there[:NAMED])}" if there else "no folders"
    return UsageError(f"{folder}: there is no such folder of {what}; {near} holds {found}")


def _leaving(folder: Path | str, links: Sequence[str]) -> UsageError:
    named = listed([repr(name) for name in links[:NAMED]], len(links))
    return UsageError(
        f"{folder}: {counted(len(links), 'link')} out of the dataset's folder: {named}; where links may lead "
        "elsewhere, set data.follow_symlinks=true"
    )


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
