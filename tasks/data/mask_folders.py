"""Images with one PNG a picture that holds the class of each pixel: data for semantic segmentation."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Packed
from tasks.data.faults import Fault, counted, fault, listed
from tasks.data.images import IGNORED, MAX_PIXELS, opened
from tasks.data.pool import Crashed, spread
from tasks.data.tree import left_out, listing, no_folder, progress_bar, suffix

MASK_SUFFIXES = frozenset((".png", ".bmp", ".tif", ".tiff"))  # without loss; JPEG would invent classes
LAYOUTS = (  # image folder and mask folder of a split
    ("images/{}", "masks/{}"),
    ("img_dir/{}", "ann_dir/{}"),  # MMSegmentation
    ("{}", "semantic/{}"),  # beside COCO's folders; the embedded dataset
)
SECONDS_PER_MASK = 120.0

Split = str | Mapping[str, str]


def read_mask(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decodes a class map to uint8 [H, W]: each pixel's class as it stands in the file.

    Of a palette image the index counts and not the colour, as Pascal VOC has it. Other images are grey, of
    1, 8, 16 or 32 bits. EXIF is not looked at.

    Raises:
        UsageError: the file is missing, damaged or too large, has colours, or a value is not in 0…255.
    """
    path = Path(path)
    with opened(path, max_pixels) as image:
        if image.format == "JPEG":
            raise UsageError(f"{path}: JPEG changes the values of pixels; save class maps as PNG")
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise UsageError(
                f"{path}: a colour image (mode {image.mode}), not a class map; save it as PNG with a palette "
                "or in grey, its values the numbers of the classes"
            )
        values = np.asarray(image)
    if values.dtype not in (np.uint8, np.bool_) and not (values.min() >= 0 and values.max() <= IGNORED):
        raise UsageError(
            f"{path}: values from {values.min()} to {values.max()}; classes are 0 to {IGNORED - 1}, "
            f"and {IGNORED} is ignored"
        )
    return values.astype(np.uint8)


@dataclass(frozen=True, eq=False)
class MaskFolders:
    """The images of a split and their masks. `len()` is the number of images N.

    path: the image folder. masks: the mask folder. names: of the K classes; value k (0…K-1) of a mask stands
    for `names[k]`. image_files, mask_files: [N], relative to the two folders, sorted. faults: what was left
    out.
    """

    path: Path
    masks: Path
    names: list[str]
    image_files: Packed
    mask_files: Packed
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.image_files.start)

    def file_name(self, index: int) -> str:
        return os.fsdecode(self.image_files[index])

    def image_path(self, index: int) -> Path:
        return self.path / self.file_name(index)

    def mask_path(self, index: int) -> Path:
        return self.masks / os.fsdecode(self.mask_files[index])

    def overview(self) -> str:
        """What is known without opening an image, on one line."""
        return f"{counted(len(self), 'image')} with a mask, {len(self.names)} classes"


def read_mask_folders(
    root: Path | str,
    split: Split,
    classes: Sequence[str] | None = None,
    *,
    also: Sequence[Split] = (),
    endings: tuple[str, str] = ("", ""),
    training: bool = False,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    follow_symlinks: bool = False,
) -> MaskFolders:
    """Pairs the images of a split with their masks, by path without ending, and finds the classes' names.

    Args:
        root: folder of the dataset.
        split: its name in one of the `LAYOUTS`, or a mapping with the paths `images` and `masks`, absolute or
            relative to `root`, and perhaps `list`, a text file that names the images of the split, one a
            line and without ending (Pascal VOC's `ImageSets/Segmentation/train.txt`). Folders within the two
            (Cityscapes' cities) must be the same in both.
        classes: the names of the classes 0…K-1. Without it, the lines of `root/classes.txt`; without that,
            every mask is read, and the classes up to the largest value are called "class 0", "class 1", ….
        also: other splits whose masks are then read too, for a class that this one lacks.
        endings: of the names of images and of masks without their suffix, where they differ. For Cityscapes
            ("_leftImg8bit", "_gtFine_labelTrainIds"); files without such an ending are not looked at.
        training: images without a mask are an error; otherwise they are left out, counted and named. Masks
            are read until one shows a class above 0.
        workers: processes that read masks to find the classes.
        max_pixels: larger masks are refused.
        follow_symlinks: links may lead out of the folders and out of `root`.

    Raises:
        UsageError: a folder is missing; there is no pair; an image or a mask has two partners; masks are
            JPEG; an image has no mask (in training); the classes' names are unusable; a mask cannot be read
            while looking for classes; no mask holds another value than 0 and 255; links lead out.
    """
    root = Path(root)
    pairs = partial(_pairs, root, endings=endings, follow_symlinks=follow_symlinks)
    found = pairs(split, training=training)
    names = _names(root, classes)
    if not names:
        others = [pairs(other) for k, other in enumerate(also) if other not in (split, *also[:k])]
        masks = [folders.mask_path(k) for folders in (found, *others) for k in range(len(folders))]
        names = [f"class {value}" for value in range(_largest_of(masks, workers, max_pixels) + 1)]
    if len(names) < 2 or (training and _only_ignored(found, max_pixels)):
        raise UsageError(
            f"{found.masks}: the masks hold no value but 0 and {IGNORED}, which is ignored; write 1 in place "
            f"of {IGNORED}, and 0 for the background"
        )
    return replace(found, names=names)


def _pairs(
    root: Path, split: Split, *, endings: tuple[str, str], training: bool = False, follow_symlinks: bool
) -> MaskFolders:
    """The images of a split and their masks; the names are still missing."""
    images, masks = _folders(root, split)
    image_tree, mask_tree = (
        listing(folder, (root, folder), follow_symlinks=follow_symlinks) for folder in (images, masks)
    )
    image_files, other_images = image_tree.by_suffix()
    mask_files, other_masks = mask_tree.by_suffix(MASK_SUFFIXES)
    image_of, mask_of = _by_stem(images, image_files, endings[0]), _by_stem(masks, mask_files, endings[1])
    if isinstance(split, Mapping) and "list" in split:
        wanted = _wanted(root / split["list"], image_of)
        image_of, mask_of = ({k: v for k, v in of.items() if k in wanted} for of in (image_of, mask_of))
    pairs = sorted(image_of.keys() & mask_of.keys())
    unmasked = [image_of[stem] for stem in sorted(image_of.keys() - mask_of.keys())]
    if not pairs or (training and unmasked):
        lossy = any(suffix(name) in (".jpg", ".jpeg") for name in other_masks)
        reason = "; JPEG changes the values of pixels, save class maps as PNG" if lossy else ""
        raise UsageError(
            f"{images}: {len(unmasked)} of {counted(len(image_of), 'image')} without a mask in {masks}: "
            f"{listed(unmasked) or 'there is none'}{reason}; a mask is called as its image and ends in .png"
        )
    imageless = [mask_of[stem] for stem in sorted(mask_of.keys() - image_of.keys())]
    faults = [
        *fault("without a mask", "left out", "image", unmasked),
        *fault("without an image", "left out", "mask", imageless),
        *left_out([*other_images, *other_masks], [*image_tree.odd, *mask_tree.odd]),
    ]
    return MaskFolders(
        path=images,
        masks=masks,
        names=[],
        image_files=Packed.of([os.fsencode(image_of[stem]) for stem in pairs]),
        mask_files=Packed.of([os.fsencode(mask_of[stem]) for stem in pairs]),
        faults=tuple(faults),
    )


def _folders(root: Path, split: Split) -> tuple[Path, Path]:
    if isinstance(split, Mapping):
        if {"images", "masks"} - set(split) or set(split) - {"images", "masks", "list"}:
            raise UsageError(
                f"{dict(split)}: give a split's name, or both paths: '{{images: FOLDER, masks: FOLDER}}'"
            )
        candidates = [(root / split["images"], root / split["masks"])]
    else:
        candidates = [(root / a.format(split), root / b.format(split)) for a, b in LAYOUTS]
    for images, masks in candidates:
        if images.is_dir() and masks.is_dir():
            return images, masks
    if isinstance(split, Mapping):
        missing = next(folder for folder in candidates[0] if not folder.is_dir())
        raise no_folder(missing, "images" if missing == candidates[0][0] else "masks")
    looked = " nor ".join(f"{a} with {b}" for a, b in candidates)
    raise UsageError(
        f"{root}: there is neither {looked}; give both folders of a split: {{images: FOLDER, masks: FOLDER}}"
    )


def _by_stem(folder: Path, files: Sequence[str], ending: str) -> dict[str, str]:
    """Files by their path without ending and suffix."""
    found: dict[str, str] = {}
    twice = []
    for file in files:
        stem = os.path.splitext(file)[0]
        if not stem.endswith(ending):
            continue
        key = stem.removesuffix(ending)
        if key in found:
            twice.append(f"{found[key]!r} and {file!r}")
        found[key] = file
    if twice:
        raise UsageError(
            f"{folder}: files that differ only in their suffix: {listed(twice)}; remove one each"
        )
    return found


def _wanted(path: Path, image_of: Mapping[str, str]) -> set[str]:
    """The images that a list names."""
    try:
        wanted = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list of images cannot be read ({error})") from None
    missing = sorted(wanted - image_of.keys())
    if missing:
        raise UsageError(f"{path}: {counted(len(missing), 'image')} missing: {listed(missing)}")
    return wanted


def _names(root: Path, classes: Sequence[str] | None) -> list[str]:
    """The names that were given or stand in `classes.txt`; empty where there are none."""
    path: Path | str = "data.classes"
    if classes is None:
        path = root / "classes.txt"
        if not path.is_file():
            return []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: the classes cannot be read ({error}); save it as UTF-8") from None
        classes = [line.strip() for line in lines]
        while classes and not classes[-1]:
            classes.pop()
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice or not 1 < len(classes) <= IGNORED or "" in classes:
        raise UsageError(
            f"{path}: {counted(len(classes), 'name')} of classes"
            f"{', more than once: ' + listed(twice) if twice else ''}"
            f"; from 2 to {IGNORED} different names are wanted, one a line, the first that of value 0"
        )
    return list(classes)


def _largest_of(masks: Sequence[Path], workers: int, max_pixels: int) -> int:
    """The largest value in all masks, but for `IGNORED`."""
    largest = 0
    with progress_bar() as progress:
        bar = progress.add_task("looking for classes in the masks", total=len(masks))
        look = partial(_largest, max_pixels=max_pixels)
        for number, found in spread(look, masks, workers, SECONDS_PER_MASK):
            if isinstance(found, Crashed):
                raise UsageError(f"{masks[number]}: the mask cannot be read: {found}")
            largest = max(largest, found)
            progress.advance(bar)
    return largest


def _only_ignored(folders: MaskFolders, max_pixels: int) -> bool:
    """Whether `IGNORED` is the only value above 0: two classes are often written as 0 and 255.

    One mask with a class above 0 proves the contrary. They are looked at in random order, since those of
    empty images may come first by name.
    """
    ignored = False
    with progress_bar() as progress:
        shuffled = random.Random(0).sample(range(len(folders)), len(folders))
        for index in progress.track(shuffled, description="looking for classes in the masks"):
            mask = read_mask(folders.mask_path(index), max_pixels=max_pixels)
            if _largest_class(mask) > 0:
                return False
            ignored = ignored or bool((mask == IGNORED).any())
    return ignored


def _largest(path: Path, max_pixels: int) -> int:
    return _largest_class(read_mask(path, max_pixels=max_pixels))


def _largest_class(mask: NDArray[np.uint8]) -> int:
    return int(mask.max(initial=0, where=mask != IGNORED))
