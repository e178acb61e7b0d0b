"""What the images of a flat folder show, as a list beside them says, and readable names of WordNet ids."""

import csv
import os
from collections import Counter
from pathlib import Path

from resnext_backbones.errors import UsageError
from tasks.data.faults import Fault, counted, listed
from tasks.data.tree import left_out, listing

NAME_FILES = ("LOC_synset_mapping.txt", "classnames.txt", "words.txt")
DEVKIT = "ILSVRC2012_validation_ground_truth.txt"

Listed = tuple[list[str], list[str], list[int], list[Fault]]
"""Classes; image files, relative to the split's folder; the label of each; faults."""


def read_class_list(
    root: Path, folder: Path, split: str, classes: list[str] | None, *, follow_symlinks: bool = False
) -> Listed:
    """Lists the images of a folder, and looks up in a list file what each shows.

    The first of `LOC_{split}_solution.csv` (Kaggle's), `{split}_annotations.txt` (Tiny ImageNet's) and
    `{split}.txt` (Caffe's) is read that lies in the folder, the one above or `root`. A line holds an image's
    name, with or without its ending, and its class or the number of its class in `classes`, from 0.

    Raises:
        UsageError: there is no such list, it cannot be read or names an image twice; images are missing or
            not listed; a class is not of `classes`, or is a number and there are no `classes`.
    """
    path = _list_file(root, folder, split)
    shown = _shown(path)
    if classes is None:
        classes = sorted(set(shown.values()))
        if all(name.isdecimal() for name in classes):
            raise UsageError(
                f"{path}: its classes are numbers; give data.classes, the classes' names in this order"
            )
    label_of = {name: label for label, name in enumerate(classes)}
    numbered = not any(name in label_of for name in shown.values())
    tree = listing(folder, (root, folder), follow_symlinks=follow_symlinks)
    images, others = tree.by_suffix()

    files, labels, unlisted, unknown = [], [], [], []
    for file in images:
        name = os.path.basename(file)
        said = shown.pop(name, None) or shown.pop(os.path.splitext(name)[0], None)
        if said is None:
            unlisted.append(file)
        elif numbered and said.isdecimal() and int(said) < len(classes):
            files.append(file)
            labels.append(int(said))
        elif said in label_of:
            files.append(file)
            labels.append(label_of[said])
        else:
            unknown.append(f"{file} {said!r}")
    for what, wrong, remedy in (
        ("of a class that is not trained on", unknown, f"the classes are {listed(classes)}"),
        ("listed but missing", sorted(shown), "restore them, or take them out of the list"),
        ("not listed", unlisted, "add them to the list, or remove them"),
    ):
        if wrong:
            raise UsageError(
                f"{folder}, listed in {path}: {counted(len(wrong), 'image')} {what}: {listed(wrong)}; "
                f"{remedy}"
            )
    order = sorted(range(len(files)), key=lambda i: (labels[i], files[i]))
    faults = left_out([other for other in others if folder / other != path], tree.odd)
    return classes, [files[i] for i in order], [labels[i] for i in order], faults


def _list_file(root: Path, folder: Path, split: str) -> Path:
    name = Path(split).name
    names = (f"LOC_{name}_solution.csv", f"{name}_annotations.txt", f"{name}.txt")
    for place in (folder, folder.parent, root):
        for path in (place / name for name in names):
            if path.is_file():
                return path
    reason = f"no class folders in it, and no list {', '.join(names)} that says what each image shows"
    if any([*root.glob(DEVKIT), *root.glob(f"*/data/{DEVKIT}")]):
        # its numbers are explained in a MATLAB file only, and are not in the order of the WordNet ids
        reason += f"; {DEVKIT} alone does not name the classes"
    raise UsageError(
        f"{folder}: {reason}; sort the images into class folders, or put Kaggle's {names[0]} into {root}"
    )


def _shown(path: Path) -> dict[str, str]:
    """Image name, with or without its ending, and class, as a list file says."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list cannot be read ({error}); save it as UTF-8") from None
    lines = text.splitlines()
    if path.suffix == ".csv":  # ImageId,PredictionString: a class and a box for each object, all of one class
        rows = [[word for cell in row[:2] for word in cell.split()[:1]] for row in csv.reader(lines)][1:]
    else:
        rows = [line.split("\t" if "\t" in line else None)[:2] for line in lines]
    wrong = [f"line {k}" for k, row in enumerate(rows, start=1 + len(lines) - len(rows)) if len(row) == 1]
    rows = [row for row in rows if row]
    if wrong or not rows:
        raise UsageError(
            f"{path}: {listed(wrong) or 'the list is empty'}: a line holds the name of an image and its class"
        )
    shown = {os.path.basename(name): said for name, said in rows}
    if len(shown) < len(rows):
        twice = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
        raise UsageError(f"{path}: {counted(len(twice), 'image')} listed more than once: {listed(twice)}")
    return shown


def readable_names(root: Path, classes: list[str]) -> list[str]:
    """Names to show for WordNet ids: of each the first synonym that a list in `root` gives.

    All are different, for results go by them: ImageNet's two cranes carry their ids.
    """
    path = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if path is None:
        return list(classes)
    told = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        identifier, _, name = line.strip().replace("\t", " ").partition(" ")
        told[identifier] = name.split(",")[0].strip()
    names = [told.get(identifier) or identifier for identifier in classes]
    number = Counter(names)
    return [
        name if number[name] == 1 else f"{name} ({identifier})"
        for name, identifier in zip(names, classes, strict=True)
    ]
