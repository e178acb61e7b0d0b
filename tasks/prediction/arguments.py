"""Which images the words of a command line mean: files, folders, patterns."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnext_backbones.errors import UsageError
from tasks.data.faults import counted, listed
from tasks.data.tree import IMAGE_SUFFIXES, suffix


@dataclass(frozen=True)
class Chosen:
    """files: the images, each once, as absolute paths. root: a folder that all of them are in. skipped: what
    was not taken, a line each."""

    files: list[str]
    root: Path
    skipped: list[str]

    def relative(self, index: int) -> str:
        """An image's name below `root`, with "/" between folders."""
        return Path(os.path.relpath(self.files[index], self.root)).as_posix()

    def own_names(self) -> list[str]:
        """A name of its own for each image, without ending, to write what is found in it.

        The ending is kept where two images in a folder differ by nothing else.
        """
        names = [self.relative(index) for index in range(len(self.files))]
        stems = [os.path.splitext(name)[0] for name in names]
        number = Counter(stem.casefold() for stem in stems)  # some file systems do not tell cases apart
        taken: set[str] = set()
        result = []
        for name, stem in zip(names, stems, strict=True):
            own = stem if number[stem.casefold()] == 1 else name
            while own.casefold() in taken:
                own += "-2"
            taken.add(own.casefold())
            result.append(own)
        return result


def chosen_images(words: Sequence[str]) -> Chosen:
    """Finds the images.

    words: each a file, a folder, of which all images below it are taken, or a pattern with `*`, `?`, `[…]`,
        and `**` for folders in any depth. Hidden files, and files with another ending than an image's, are
        left out.

    Raises:
        UsageError: a word names nothing, a folder cannot be read, or there is no image at all.
    """
    files: dict[str, None] = {}
    bases: list[str] = []
    others: list[str] = []
    hidden: list[str] = []
    twice = 0
    for word in words:
        base, found = _found(word, hidden)
        bases.append(os.path.abspath(base))
        for file in found:
            if suffix(file) not in IMAGE_SUFFIXES and (suffix(file) or file != word):
                others.append(file)
                continue
            twice += os.path.abspath(file) in files
            files[os.path.abspath(file)] = None
    skipped = []
    if others:
        what = f"{counted(len(others), 'file')} with another ending than an image's"
        skipped.append(f"skipped {what}: {listed(others)}")
    if hidden:
        skipped.append(f"skipped {counted(len(hidden), 'hidden file')}: {listed(hidden)}")
    if twice:
        skipped.append(f"skipped {counted(twice, 'image')}, named more than once")
    if not files:
        reason = f" ({'; '.join(skipped)})" if skipped else ""
        raise UsageError(f"{' '.join(words)[:200]}: no image in it{reason}; give images, or folders of them")
    return Chosen(list(files), Path(os.path.commonpath(bases)), skipped)


def _found(word: str, hidden: list[str]) -> tuple[str, list[str]]:
    """The folder that what a word means is seen from, and the files."""
    if os.path.isdir(word):
        return word, list(_below(word, hidden))
    if os.path.exists(word):
        return os.path.dirname(word), [word]
    if not glob.has_magic(word):
        raise UsageError(f"{word}: there is no such file or folder")
    matches = sorted(glob.glob(word, recursive=True))
    base = word[: min(word.index(sign) for sign in "*?[" if sign in word)]
    files = [match for match in matches if os.path.isfile(match)]
    folders = {match for match in matches if os.path.isdir(match)}
    if not matches:
        raise UsageError(f"{word}: no file matches this pattern")
    if not files:  # photos/2*: the folders themselves were meant
        files = [file for folder in sorted(folders) for file in _below(folder, hidden)]
    return os.path.dirname(base), files


def _below(folder: str, hidden: list[str]) -> Iterator[str]:
    """All files below a folder, sorted; links are followed, but not in circles."""
    seen: set[tuple[int, int]] = set()

    def unreadable(fault: OSError) -> None:
        raise UsageError(f"{fault.filename}: the folder cannot be read: {fault.strerror}")

    for path, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden.extend(os.path.join(path, name) for name in sorted(names) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(path, name) for name in sorted(names) if not name.startswith("."))
