"""A mask as COCO writes it: its box, its outlines as polygons, its run lengths."""

import numpy as np
from numpy.typing import NDArray

Corner = tuple[int, int]  # x, y between pixels
Mask = NDArray[np.bool_]  # [H, W]


def box(mask: Mask) -> list[int]:
    """x, y, width, height of a mask in pixels; zeros where it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def runs(mask: Mask) -> dict[str, list[int]]:
    """Uncompressed COCO run lengths: down the columns, beginning with the zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = [0, *changes.tolist(), flat.size]
    counts = np.diff(ends).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def polygons(mask: Mask) -> list[list[int]]:
    """The outlines of a mask as COCO polygons [x, y, x, y, …] along pixel edges, one for each connected part.

    Rasterised by pycocotools they give back the same mask. COCO's polygons have no holes: a hole is joined
    to the outline around it by a line of no width, walked there and back.
    """
    loops = _boundaries(mask)
    outlines = [loop for loop in loops if _signed_area(loop) > 0]
    joined = [list(loop) for loop in outlines]
    for hole in (loop for loop in loops if _signed_area(loop) < 0):
        homes = (i for i, outline in enumerate(outlines) if _encloses(outline, min(hole)))
        around = joined[min(homes, key=lambda i: _signed_area(outlines[i]))]
        apart = np.abs(np.array(around)[:, None] - np.array(hole)).sum(axis=2)
        i, j = divmod(int(apart.argmin()), len(hole))
        around[i + 1 : i + 1] = [*hole[j:], *hole[: j + 1], around[i]]
    return [[v for corner in loop for v in corner] for loop in joined]


def _boundaries(mask: Mask) -> list[list[Corner]]:
    """The corners of each boundary, walked with the mask on the right hand: holes run the other way round."""
    left, above, width, height = box(mask)
    padded = np.pad(mask[above : above + height, left : left + width], 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    leaving = np.stack([se & ~ne, sw & ~se, nw & ~sw, ne & ~nw])  # edges to the right, down, left, up

    direction, y, x = np.nonzero(leaving)
    number = np.full(leaving.shape, -1)
    number[leaving] = np.arange(len(x))
    end_x, end_y = x + np.array([1, 0, -1, 0])[direction], y + np.array([0, 1, 0, -1])[direction]
    # to turn right before going on straight or left keeps parts that touch at a corner apart
    onward = np.stack([number[(direction + turn) % 4, end_y, end_x] for turn in (1, 0, 3)])
    choice = (onward >= 0).argmax(axis=0)
    following = onward[choice, np.arange(len(x))].tolist()
    is_corner = (choice != 1).tolist()
    ends = list(zip((end_x + left).tolist(), (end_y + above).tolist(), strict=True))

    loops = []
    unwalked = dict.fromkeys(range(len(ends)))
    while unwalked:
        edge, loop = next(iter(unwalked)), []
        while edge in unwalked:
            del unwalked[edge]
            if is_corner[edge]:
                loop.append(ends[edge])
            edge = following[edge]
        loops.append(loop)
    return loops


def _signed_area(loop: list[Corner]) -> int:
    x, y = np.array(loop).T
    return int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())


def _encloses(outline: list[Corner], first: Corner) -> bool:
    """Whether the pixel to the left of a hole's first corner lies in `outline`, by the even-odd rule."""
    x, y = np.array(outline).T
    below = y > first[1] + 0.5
    crossings = (below != np.roll(below, -1)) & (x >= first[0])  # such edges are vertical
    return bool(crossings.sum() % 2)
