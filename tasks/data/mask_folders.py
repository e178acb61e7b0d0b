"""Images with one PNG a picture that holds the class of each pixel: data for semantic segmentation."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.data.annotations import Packed
from tasks.data.faults import Fault, counted, fault, listed
from tasks.data.images import IGNORED, MAX_PIXELS, decode, opened
from tasks.data.inspection import Inspection, pixel_statistics, pixels_of
from tasks.data.pool import Crashed, spread
from tasks.data.transforms import nearest
from tasks.data.tree import left_out, listing, no_folder, progress_bar, suffix
from tasks.pictures import draw_classes

MASK_SUFFIXES = frozenset((".png", ".bmp", ".tif", ".tiff"))  # without loss; JPEG would invent classes
LAYOUTS = (  # image folder and mask folder of a split
    ("images/{}", "masks/{}"),
    ("img_dir/{}", "ann_dir/{}"),  # MMSegmentation
    ("{}", "semantic/{}"),  # beside COCO's folders; the embedded dataset
)
SECONDS_PER_MASK = 120.0

Sample = tuple[Tensor, dict[str, Any]]
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
    endings: tuple[str, str] = ("", ""),
    training: bool = False,
    workers: int = 1,
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
        endings: of the names of images and of masks without their suffix, where they differ. For Cityscapes
            ("_leftImg8bit", "_gtFine_labelTrainIds"); files without such an ending are not looked at.
        training: images without a mask are an error; otherwise they are left out, counted and named.
        workers: processes that read masks to find the classes.
        follow_symlinks: links may lead out of the folders and out of `root`.

    Raises:
        UsageError: a folder is missing; there is no pair; an image or a mask has two partners; masks are
            JPEG; an image has no mask (in training); the classes' names are unusable; a mask cannot be read
            while looking for classes; links lead out.
    """
    root = Path(root)
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
    names = _names(root, classes)
    if not names:
        names = _counted_names([masks / mask_of[stem] for stem in pairs], workers)
    return MaskFolders(
        path=images,
        masks=masks,
        names=names,
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


def _counted_names(masks: Sequence[Path], workers: int) -> list[str]:
    largest = 0
    with progress_bar() as progress:
        bar = progress.add_task("looking for classes in the masks", total=len(masks))
        for number, found in spread(_largest, masks, workers, SECONDS_PER_MASK):
            if isinstance(found, Crashed):
                raise UsageError(f"{masks[number]}: the mask cannot be read: {found}")
            largest = max(largest, found)
            progress.advance(bar)
    if largest == 0:
        raise UsageError(
            f"{masks[0].parent}: the masks hold no value but 0 and {IGNORED}, which is ignored; write "
            "0, 1, … for the classes, the background being one of them"
        )
    return [f"class {value}" for value in range(largest + 1)]


def _largest(path: Path) -> int:
    mask = read_mask(path)
    return int(mask.max(initial=0, where=mask != IGNORED))


class MaskImages(Dataset):
    """The images of a split with their masks, decoded but not resized.

    Sample: an image, uint8 [3, H, W], RGB, and a dict:
        semantic: `tv_tensors.Mask`, uint8 [H, W], 0…K-1, and 255 where ignored.
        image_id: int, the index. original_size: height and width (ints) of the mask as it is stored.
        original_semantic: uint8 [H0, W0], the mask as it is stored; in evaluation only.

    Args:
        annotations: from `read_mask_folders`.
        split: its name, for errors.
        training: without `original_semantic`.
        max_pixels: larger images and masks are refused.
        bit_depth: for 16-bit images, the number of bits that are in use.

    Raises:
        UsageError: on access, named with split, index and file: an image or mask that cannot be decoded; a
            mask of another size than its image; values that are no class.
    """

    def __init__(
        self,
        annotations: MaskFolders,
        split: str,
        *,
        training: bool,
        max_pixels: int = MAX_PIXELS,
        bit_depth: int | None = None,
    ) -> None:
        self.annotations, self.split, self.training = annotations, split, training
        self.max_pixels, self.bit_depth = max_pixels, bit_depth

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width, from the header of the mask."""
        with self._named(index), opened(self.annotations.mask_path(index), self.max_pixels) as mask:
            return mask.height, mask.width

    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Sample:
        """The sample.

        at_least: the height and width it will be resized to. A JPEG is then decoded at a fraction of its
        size, as `images.decode` says, and its mask is brought to that size, each pixel the nearest one.
        """
        with self._named(index):
            mask = self._mask(index)
            self._same_size(index, mask.shape)
            image = decode(
                self.annotations.image_path(index),
                mask.shape,
                max_pixels=self.max_pixels,
                bit_depth=self.bit_depth,
                at_least=at_least,
            )
        original = torch.from_numpy(mask)
        size = (image.shape[-2], image.shape[-1])
        target = {
            "semantic": tv_tensors.Mask(original.clone()) if size == mask.shape else nearest(original, size),
            "image_id": index,
            "original_size": (mask.shape[0], mask.shape[1]),
        }
        if not self.training:
            target["original_semantic"] = original
        return tv_tensors.Image(image), target

    def _mask(self, index: int) -> NDArray[np.uint8]:
        path, number = self.annotations.mask_path(index), len(self.annotations.names)
        mask = read_mask(path, max_pixels=self.max_pixels)
        unknown = (mask >= number) & (mask != IGNORED)
        if unknown.any():
            values, counts = np.unique(mask[unknown], return_counts=True)
            named = listed([f"{v} ({counted(int(n), 'pixel')})" for v, n in zip(values, counts, strict=True)])
            raise UsageError(
                f"{path}: values that are no class: {named}; the {number} classes are 0 to {number - 1}, and "
                f"{IGNORED} is ignored"
            )
        return mask

    def _same_size(self, index: int, size: tuple[int, ...]) -> None:
        path = self.annotations.image_path(index)
        with opened(path, self.max_pixels) as image:
            stored = (image.height, image.width)
        # a mask may have been made from the image as it is shown, turned by its EXIF orientation
        if size not in (stored, stored[::-1]):
            raise UsageError(
                f"{path} has height×width {stored[0]}×{stored[1]}, but its mask "
                f"{self.annotations.mask_path(index)} {size[0]}×{size[1]}; make both of one size"
            )

    def image_id(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        """What to call an image in an error: its number and its file."""
        return f"image {index} {self.annotations.file_name(index)!r}"

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.split}: {self.name(index)}: {error}") from None

    # For `tasks.data.check`.

    def inspect(self, index: int) -> Inspection:
        _, target = self.load(index)
        return Inspection(pixels=pixels_of(target["semantic"]))

    def unjudgeable(self) -> list[str]:
        return []

    def statistics(self, inspections: Sequence[Inspection]) -> list[Table | str]:
        return pixel_statistics(self.annotations.names, inspections)

    def worth_showing(self) -> list[int]:
        return list(range(len(self)))

    def picture(self, image: Tensor, target: dict[str, Any]) -> Image.Image:
        """A sample's image under the colours of its mask."""
        return draw_classes(image, target["semantic"].as_subclass(Tensor), self.annotations.names)
