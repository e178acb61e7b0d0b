"""Segmentations: whether one can be drawn, and its mask at the size that is needed.

pycocotools does not return from a polygon with a vertex at 1e9, raises half a dozen exceptions for others,
and takes masks of a wrong size without a word; so all is judged before anything that draws sees it.
"""

import math
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

WRONG_SIZE = "mask of another size than its image"

Size = tuple[int, int]  # height, width
Window = tuple[int, int, int, int]  # top, left, height, width
Part = tuple[NDArray[np.uint8], int, int]  # the mask within its bounding box, and where that begins: y, x


def segmentation_fault(segmentation: bytes, height: int, width: int) -> str | None:
    """Says why a segmentation cannot be used for an image of `height` × `width`; None if it can.

    segmentation: JSON as it stands in the file: a list of polygons, or a run-length code with `size` and
    `counts`, which are a list of numbers or COCO's compressed string. Empty or `null`: none to judge.
    """
    value, fault = _read(segmentation, height, width)
    if fault is None and isinstance(value, list) and not rle.area(_outlined(value, height, width)):
        return "polygons that cover no pixel"
    return fault


def render(segmentation: bytes, original_size: Size, size: Size, window: Window | None = None) -> Tensor:
    """An object's mask in an image that was resized, drawn at that size: uint8 [h, w], 1 inside.

    Polygons are scaled and then drawn by pycocotools, so that no mask of the original's size is made.
    A run-length code is decoded at its own size, one at a time, and resampled within its bounding box: a
    pixel is inside if at least half of the original's pixels are whose centres lie in it; enlarging repeats
    pixels. What cannot be drawn (see `segmentation_fault`) gives an empty mask.

    Args:
        segmentation: JSON as it stands in the file, in pixels of `original_size`.
        original_size: height and width of the image as annotated.
        size: height and width it was resized to.
        window: the part of the resized image that is wanted (top, left, height, width), exactly as if it were
            cut out of the whole mask; None for all of it.
    """
    top, left, height, width = window or (0, 0, *size)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    value, fault = _read(segmentation, *original_size)
    if value is None or fault:
        return mask
    draw = _drawn if isinstance(value, list) else _resampled
    part, y, x = draw(value, original_size, size)
    y1, y2 = max(top, y), min(top + height, y + part.shape[0])
    x1, x2 = max(left, x), min(left + width, x + part.shape[1])
    if y1 < y2 and x1 < x2:
        inside = torch.from_numpy(part[y1 - y : y2 - y, x1 - x : x2 - x])
        mask[y1 - top : y2 - top, x1 - left : x2 - left] = inside
    return mask


def _read(segmentation: bytes, height: int, width: int) -> tuple[Any, str | None]:
    """What the JSON says and what is wrong with its form; (None, None) where there is no segmentation."""
    try:
        value = msgspec.json.decode(segmentation) if segmentation else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, "segmentation that cannot be read"
    if value is None:
        return None, None
    if isinstance(value, list):
        return value, _polygons(value, height, width)
    if isinstance(value, dict):
        return value, _runs(value, height, width)
    return value, "segmentation that is neither polygons nor a run-length code"


def _outlined(polygons: list[list[float]], height: int, width: int) -> dict[str, Any]:
    """The union of polygons as a run-length code."""
    return rle.merge(rle.frPyObjects(polygons, height, width))


def _drawn(polygons: list[list[float]], original_size: Size, size: Size) -> Part:
    x, y = size[1] / original_size[1], size[0] / original_size[0]
    scaled = [[v * (y if k % 2 else x) for k, v in enumerate(polygon)] for polygon in polygons]
    code = _outlined(scaled, *size)
    left, top, width, height = (int(v) for v in rle.toBbox(code))
    return rle.decode(code)[top : top + height, left : left + width], top, left


def _resampled(code: dict[str, Any], original_size: Size, size: Size) -> Part:
    packed = rle.frPyObjects(code, *original_size) if isinstance(code["counts"], list) else code
    y, x = size[0] / original_size[0], size[1] / original_size[1]
    left, top, width, height = (int(v) for v in rle.toBbox(packed))
    x1, x2 = math.floor(left * x), min(math.ceil((left + width) * x), size[1])
    y1, y2 = math.floor(top * y), min(math.ceil((top + height) * y), size[0])
    if x1 >= x2 or y1 >= y2:
        return np.zeros((0, 0), dtype=np.uint8), 0, 0
    # What the part covers of the original, and the rest of the original's pixels that it touches
    above, before = math.floor(y1 / y), math.floor(x1 / x)
    around = rle.decode(packed)[above : math.ceil(y2 / y), before : math.ceil(x2 / x)]
    down = y1 / y - above, min(y2 / y - above, around.shape[0])
    across = x1 / x - before, min(x2 / x - before, around.shape[1])
    # Transposed, as it lies in memory. 254 and 127: half of the pixels is exactly one half, whatever the
    # rounding within Pillow
    image = Image.fromarray(around.T * np.uint8(254))
    box = (down[0], across[0], down[1], across[1])
    share = image.resize((y2 - y1, x2 - x1), Image.Resampling.BOX, box=box)
    return (np.asarray(share).T >= 127).astype(np.uint8), y1, x1


def _polygons(polygons: list[Any], height: int, width: int) -> str | None:
    if not polygons:
        return "segmentation without a polygon"
    for polygon in polygons:
        if not isinstance(polygon, list):
            return "polygons not in lists of their own"
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in polygon):
            return "polygon with something other than numbers"
        if len(polygon) % 2:
            return "polygon with an odd number of coordinates"
        if len(polygon) < 6:
            return "polygon of fewer than three points"
        if not (_near(polygon[0::2], width) and _near(polygon[1::2], height)):
            return "polygon with a vertex far outside its image"
    return None


def _near(coordinates: list[float], side: int) -> bool:
    """Not further than one image away."""
    return all(-side <= v <= 2 * side for v in coordinates)


def _runs(code: dict[str, Any], height: int, width: int) -> str | None:
    if code.get("size") != [height, width]:
        return WRONG_SIZE
    counts = code.get("counts")
    runs = decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return "run-length code that cannot be read"
    if sum(runs) != height * width:
        return "run-length code of another length than its image"
    return None if any(runs[1::2]) else "mask that covers no pixel"


def decompress(counts: str) -> list[int] | None:
    """The run lengths of COCO's compressed string; None where it is none.

    Five bits a character from 48 upwards, the sixth marks that more follow, lowest bits first, signed; from
    the fourth run on a number is the difference to the one two before (cocoapi, `maskApi.c: rleFrString`).
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs if not shift else None
