"""The records of a COCO file as arrays, after making sure that their ids, sizes and boxes make sense."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_backbones.errors import UsageError
from tasks.data.coco_file import CocoFile, Ids, whole_numbers
from tasks.data.faults import NAMED, listed

FARTHEST = 1e9  # pixels; no image has them, and sums of larger numbers would lose the box's sides
LARGEST_SIDE = 1 << 24  # pixels

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """Arrays in the order of the file: I images, K categories, N annotations.

    image_ids: int64 [I]. sizes: int64 [I, 2], height and width. category_ids: int64 [K]. ids, image_id,
    category_id: int64 [N]. xywh: float64 [N, 4]. crowd: bool [N]. as_text: the ids that are written as text.
    """

    image_ids: Ids
    sizes: Ids
    category_ids: Ids
    ids: Ids
    image_id: Ids
    category_id: Ids
    xywh: NDArray[np.float64]
    crowd: Mask
    as_text: tuple[str, ...]


def read_columns(path: Path, file: CocoFile) -> Columns:
    """Arrays of a file's records; `path` is named in errors.

    Raises:
        UsageError: ids are no integers or occur twice, an annotation's category is unknown, a category's
            name occurs twice, an image has no size, a box is absurdly far away, a crowd mark is not 0 or 1.
    """
    images, annotations, categories = file.images or [], file.annotations or [], file.categories or []
    (image_ids, image_id), text_images = whole_numbers(
        path,
        {
            "images[{}].id": [r.id for r in images],
            "annotations[{}].image_id": [r.image_id for r in annotations],
        },
    )
    (category_ids, category_id), text_categories = whole_numbers(
        path,
        {
            "categories[{}].id": [r.id for r in categories],
            "annotations[{}].category_id": [r.category_id for r in annotations],
        },
    )
    (ids,), text_ids = whole_numbers(path, {"annotations[{}].id": [r.id for r in annotations]})
    sizes = np.array([(r.height, r.width) for r in images], dtype=np.float64).reshape(-1, 2)
    xywh = np.array([r.bbox for r in annotations], dtype=np.float64).reshape(-1, 4)
    marks = np.array([r.iscrowd for r in annotations], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of sizes that no integer holds, which are refused below
        whole_sizes = sizes.astype(np.int64)
    text = {"image": text_images, "category": text_categories, "annotation": text_ids}
    columns = Columns(
        image_ids=image_ids,
        sizes=whole_sizes,
        category_ids=category_ids,
        ids=ids,
        image_id=image_id,
        category_id=category_id,
        xywh=xywh,
        crowd=marks == 1,
        as_text=tuple(what for what, as_text in text.items() if as_text),
    )
    _refuse_senseless(path, file, columns, sizes, marks)
    return columns


def _refuse_senseless(
    path: Path, file: CocoFile, columns: Columns, sizes: NDArray[np.float64], marks: NDArray[np.float64]
) -> None:
    """`sizes` and crowd `marks` are given as they stand in the file, before they became whole and bool."""
    images, categories = file.images or [], file.categories or []
    image_ids, category_ids, ids = columns.image_ids, columns.category_ids, columns.ids
    image_id, category_id, xywh = columns.image_id, columns.category_id, columns.xywh

    def refuse(wrong: NDArray[Any], what: str, place: Callable[[int], str], remedy: str) -> None:
        indices = np.flatnonzero(wrong).tolist()
        if indices:
            named = listed([place(i) for i in indices[:NAMED]], len(indices))
            raise UsageError(f"{path}: {what}: {named}; {remedy}")

    def of_image(field: str, values: Any) -> Callable[[int], str]:
        return lambda i: (
            f"images[{i}].{field} = {_plain(values[i])} (image {image_ids[i]} {images[i].file_name!r})"
        )

    def of_category(field: str, values: Any) -> Callable[[int], str]:
        return lambda i: f"categories[{i}].{field} = {_plain(values[i])} ({categories[i].name!r})"

    def of_annotation(field: str, values: Any) -> Callable[[int], str]:
        def place(i: int) -> str:
            image = next((f" {images[k].file_name!r}" for k in np.flatnonzero(image_ids == image_id[i])), "")
            whose = f"annotation {ids[i]}, image {image_id[i]}{image}"
            return f"annotations[{i}].{field} = {_plain(values[i])} ({whose})"

        return place

    names = np.array([r.name for r in categories], dtype=object)
    refuse(
        repeated(category_ids),
        "category ids that occur twice",
        of_category("id", category_ids),
        "give each category an id of its own",
    )
    refuse(
        repeated(names),
        "category names that occur twice",
        of_category("name", names),
        "give each category a name of its own",
    )
    refuse(
        repeated(image_ids),
        "image ids that occur twice",
        of_image("id", image_ids),
        "give each image an id of its own",
    )
    refuse(
        repeated(ids),
        "annotation ids that occur twice",
        of_annotation("id", ids),
        "give each annotation an id of its own",
    )
    refuse(
        np.any((sizes < 1) | (sizes > LARGEST_SIDE) | (sizes != np.floor(sizes)), axis=1),
        "images without a usable `height` and `width`",
        of_image("[height, width]", sizes),
        "write each image's size in pixels",
    )
    refuse(
        np.any(np.abs(xywh) > FARTHEST, axis=1),
        "boxes with absurdly large numbers",
        of_annotation("bbox", xywh),
        "correct or remove them",
    )
    refuse(
        (marks != 0) & (marks != 1),
        "crowd marks that are neither 0 nor 1",
        of_annotation("iscrowd", marks),
        "correct them",
    )
    refuse(
        position(category_id, category_ids) < 0,
        "annotations of unknown categories",
        of_annotation("category_id", category_id),
        f"the categories are {listed([str(k) for k in category_ids])}; correct them or add the missing ones",
    )


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def repeated(values: NDArray[Any]) -> Mask:
    """Which values occurred before; bool [N]."""
    order = np.argsort(values, kind="stable")
    again = np.zeros(len(values), dtype=bool)
    again[order[1:]] = values[order[1:]] == values[order[:-1]]
    return again


def position(values: Ids, among: Ids) -> Ids:
    """For each value its index in `among`, or -1 where it is not there; int64 [N]."""
    if not len(among):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(among, kind="stable")
    nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[nearest] == values, nearest, -1)
