"""Whether a segmentation can be drawn, found out before anything that draws it sees it.

pycocotools does not return from a polygon with a vertex at 1e9, raises half a dozen exceptions for others,
and takes masks of a wrong size without a word.
"""

from typing import Any

import msgspec
from pycocotools import mask as rle

WRONG_SIZE = "mask of another size than its image"


def segmentation_fault(segmentation: bytes, height: int, width: int) -> str | None:
    """Says why a segmentation cannot be used for an image of `height` × `width`; None if it can.

    segmentation: JSON as it stands in the file: a list of polygons, or a run-length code with `size` and
    `counts`, which are a list of numbers or COCO's compressed string. Empty or `null`: none to judge.
    """
    try:
        value = msgspec.json.decode(segmentation) if segmentation else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "segmentation that cannot be read"
    if value is None:
        return None
    if isinstance(value, list):
        return _polygons(value, height, width)
    if isinstance(value, dict):
        return _runs(value, height, width)
    return "segmentation that is neither polygons nor a run-length code"


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
    drawn = rle.merge(rle.frPyObjects(polygons, height, width))
    return None if rle.area(drawn) else "polygons that cover no pixel"


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
