"""Images for classification: a folder a class, or a flat folder with a list of what each image shows.

Read are torchvision's `ImageFolder` layout and ImageNet's: class folders named by WordNet ids, Kaggle's tree
(`ILSVRC/Data/CLS-LOC`), a flat `val` with Kaggle's `LOC_val_solution.csv` or a list `val.txt`, Tiny ImageNet.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Packed
from tasks.data.class_lists import Listed, read_class_list, readable_names
from tasks.data.faults import Fault, counted, fault, listed
from tasks.data.tree import IMAGE_SUFFIXES, left_out, listing, no_folder, progress_bar, suffix

KAGGLE = "ILSVRC/Data/CLS-LOC"
LISTING_THREADS = 8  # a network's file system answers many questions at once


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """The images of a split and their classes. `len()` is the number of images N.

    path: the split's folder. classes: K identifiers, the folders' names; label k (0…K-1) stands for
    `classes[k]`. names: what to call them, all different. files: paths relative to `path`, grouped by class
    and sorted. labels: int64 [N]. faults: what was left out.
    """

    path: Path
    classes: list[str]
    names: list[str]
    files: Packed
    labels: Tensor
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def file_name(self, index: int) -> str:
        return os.fsdecode(self.files[index])

    def image_path(self, index: int) -> Path:
        return self.path / self.file_name(index)

    def counts(self) -> Tensor:
        """Images of each class, int64 [K]."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def overview(self) -> str:
        """What is known without opening an image, on one line."""
        seen = int((self.counts() > 0).sum())
        return f"{counted(len(self), 'image')} of {seen} of {len(self.classes)} classes"


def read_class_folders(
    root: Path | str,
    split: str,
    classes: Sequence[str] | None = None,
    *,
    follow_symlinks: bool = False,
) -> ClassFolders:
    """Lists the images of a split, `root/split/CLASS/**/*.jpg` and the like, without opening any.

    Args:
        root: folder of the dataset.
        split: folder of the split, relative to `root` or to its `ILSVRC/Data/CLS-LOC`.
        classes: the classes in the order of their labels, for another split than the one that is trained
            on: those of that one. Without it, the class folders of this split, sorted by name as
            torchvision's `ImageFolder` does.
        follow_symlinks: links may lead out of `root`.

    A folder of images without class folders is read with the first of these lists that is there:
    `LOC_{split}_solution.csv`, `{split}_annotations.txt`, `{split}.txt`, in the split's folder, the one above
    or `root`. A line holds an image's name and its class or, as Caffe's, the number of its class from 0.

    WordNet ids get readable names from `LOC_synset_mapping.txt`, `classnames.txt` or `words.txt` in `root`.
    Files that are no images are left out, counted and named; names that begin with a dot are ignored.

    Raises:
        UsageError: there is no such folder, no image, or no list for a flat folder; a class folder is not of
            `classes`; two classes differ only in upper and lower case; a class has no image (where `classes`
            is not given, otherwise it is a fault); links lead out of `root`; the list names other images or
            classes than there are.
    """
    root = Path(root)
    folder = _split_folder(root, split)
    given = None if classes is None else _distinct(list(classes), "data.classes")
    folders = _class_folders(folder)
    flat = not folders or folders == ["images"]
    if flat:
        read = read_class_list(root, folder, split, given, follow_symlinks=follow_symlinks)
    else:
        read = _from_folders(root, folder, folders, given, follow_symlinks)
    known, files, labels, faults = read
    if not files:
        raise UsageError(f"{folder}: there is no image in it; put the images of each class into its folder")
    empty = sorted(set(range(len(known))) - set(labels))
    if empty and given is None:
        raise UsageError(
            f"{folder}: {counted(len(empty), 'class folder')} without an image: "
            f"{listed([known[k] for k in empty])}; add images or delete the folders"
        )
    return ClassFolders(
        path=folder,
        classes=known,
        names=readable_names(root, known),
        files=Packed.of([os.fsencode(name) for name in files]),
        labels=torch.tensor(labels, dtype=torch.int64),
        faults=(*faults, *fault("without an image", "kept", "class name", [known[k] for k in empty])),
    )


def _split_folder(root: Path, split: str) -> Path:
    candidates = (root / split, root / KAGGLE / split)
    found = [folder for folder in candidates if folder.is_dir()]
    if not found:
        raise no_folder(root / split, "images")
    return found[0]


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _distinct(classes: list[str], where: Path | str) -> list[str]:
    """The classes, if none occurs twice: "Cat" and "cat" are one folder on half of all machines."""
    number = Counter(name.casefold() for name in classes)
    same = sorted(name for name in classes if number[name.casefold()] > 1)
    if same:
        raise UsageError(
            f"{where}: class names that are equal but for upper and lower case: {listed(same)}; "
            "merge or rename them"
        )
    return classes


def _from_folders(
    root: Path, folder: Path, folders: list[str], given: list[str] | None, follow_symlinks: bool
) -> Listed:
    classes = _distinct(folders, folder) if given is None else given
    unknown = sorted(set(folders) - set(classes))
    if unknown:
        raise UsageError(
            f"{folder}: {counted(len(unknown), 'class folder')} of a class that is not trained on: "
            f"{listed(unknown)}; the classes are {listed(classes)}; remove or rename the folder"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    files, labels, odd = [], [], []
    with os.scandir(folder) as entries:
        top = sorted(e.name for e in entries if not e.name.startswith(".") and not e.is_dir())
    outside = [name for name in top if suffix(name) in IMAGE_SUFFIXES]
    others = [name for name in top if suffix(name) not in IMAGE_SUFFIXES]
    ordered = sorted(folders, key=label_of.__getitem__)
    with (
        progress_bar() as progress,
        ThreadPoolExecutor(LISTING_THREADS) as pool,
    ):
        bar = progress.add_task(f"listing {folder}", total=len(ordered))
        trees = pool.map(
            lambda name: listing(folder / name, (root, folder), follow_symlinks=follow_symlinks), ordered
        )
        for name, tree in zip(ordered, trees, strict=True):
            images, rest = tree.by_suffix()
            files += [f"{name}/{image}" for image in images]
            labels += [label_of[name]] * len(images)
            others += [f"{name}/{other}" for other in rest]
            odd += [f"{name}/{other}" for other in tree.odd]
            progress.advance(bar)
    faults = [*fault("outside the class folders", "left out", "image", outside), *left_out(others, odd)]
    return classes, files, labels, faults
