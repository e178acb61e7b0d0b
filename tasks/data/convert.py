"""Pascal VOC and YOLO datasets as COCO files, made on first use and made anew whenever their sources change.

Read with the standard library and not with hotcoco's `from_voc` and `from_yolo`: these know no splits
(`ImageSets`, `data.yaml`), no nested folders, no outlines, no images without text file, lose the suffix of
YOLO's images, and do not say what they met. Where hotcoco reads a dataset, tests make sure that both agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.data.foreign import Source, coco_file
from tasks.data.images import MAX_PIXELS
from tasks.data.voc import voc
from tasks.data.yolo import yolo


@dataclass(frozen=True)
class Converted:
    """annotations: the COCO file. images: what its `file_name` are relative to. text: what was found."""

    annotations: Path
    images: Path
    text: str


def convert_voc(
    root: Path | str,
    split: str,
    classes: Sequence[str] | None = None,
    *,
    one_based: bool = True,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_symlinks: bool = False,
) -> Converted:
    """Makes a COCO file of a split of a dataset in the form of Pascal VOC.

    Read are the development kit's layout, `Annotations/*.xml`, `JPEGImages/*.jpg` and
    `ImageSets/Main/{split}.txt`, and a folder a split, `{split}/**/*.xml` with the images beside them or in
    `images` beside `annotations`. With split "." all of `root` is one split.

    The box of pixels `xmin` to `xmax`, both within it and counted from 1, is `x = xmin - 1`,
    `width = xmax - xmin + 1`. Boxes are not cleaned: `read_coco` names those that are faulty. Difficult
    objects become crowds, which training leaves out and evaluation ignores; the development kit ignores them
    too, but it compares by intersection over union, and COCO's metric with crowds by intersection over the
    detection's area.

    Args:
        root: the folder with `Annotations`, or the one above (`VOCdevkit`) if it holds one such folder only.
        split: name of a list of images, or a folder.
        classes: in the order of their labels. Without it, the lines of `root/labels.txt`; without that, all
            names in all XML files below `root`, sorted: the same for each split.
        one_based: whether pixels are counted from 1; some tools count from 0, as `x = xmin`.
        cache: a folder for the COCO file where `root` cannot be written.
        max_pixels: larger images are refused where they are measured, as their XML file lacks a size.
        follow_symlinks: links may lead out of `root`.

    Raises:
        UsageError: files are missing or of a wrong form (XML files with a document type are refused, since
            entities can grow without bound), images have two XML files, an object is of another class.
    """
    source = voc(
        Path(root),
        split,
        classes,
        one_based=one_based,
        max_pixels=max_pixels,
        follow_symlinks=follow_symlinks,
    )
    return _converted(source, cache)


def convert_yolo(
    root: Path | str,
    split: str,
    *,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_symlinks: bool = False,
) -> Converted:
    """Makes a COCO file of a split of a dataset in the form of YOLO, as ultralytics describes it.

    Boxes and outlines are read, also those of turned boxes; images without a text file or with an empty one
    show nothing of the classes. Sizes are those of the images as they are shown, turned by EXIF. Boxes are
    not cleaned: `read_coco` names those that are faulty.

    Args:
        root: the folder of `data.yaml`, or that file. `path` in it counts where it leads into this folder;
            otherwise the splits are looked for below it, also where they begin with "../".
        split: `train`, `val` or `test`, as in `data.yaml`: a folder of images, a text file that lists
            images, or several.
        cache: a folder for the COCO file where `root` cannot be written.
        max_pixels: larger images are refused.
        follow_symlinks: links may lead out of the folder.

    Raises:
        UsageError: `data.yaml` or images are missing or unusable; lines of text files are of a wrong form, of
            an unknown class, or hold pixels instead of shares; they are keypoints.
    """
    source = yolo(Path(root), split, max_pixels=max_pixels, follow_symlinks=follow_symlinks)
    return _converted(source, cache)


def _converted(source: Source, cache: Path | None) -> Converted:
    path, text = coco_file(source, cache)
    return Converted(path, source.root, text)
