"""From the small mask of a box to the run lengths of its pixels, without drawing it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor


def paste(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Masks of boxes as run-length codes of a whole image, one instance at a time.

    Probabilities stand at the centres of a mask's cells, are interpolated bilinearly and fall to 0 within
    half a cell outside, as in Detectron2 (`mask_ops.py: _do_paste_mask`) and torchvision
    (`paste_masks_in_image`). A pixel belongs to the object where its centre lies in the box and its
    probability is `threshold` or more.

    Along a column of pixels the probability is linear between the rows of the mask, so the pixels at which it
    crosses the threshold are computed, and no pixel between them is looked at: time and memory of an instance
    grow with the width of its box, not with its area.

    Args:
        masks: float [N, S, S], probabilities within the boxes.
        boxes: float [N, 4], xyxy, pixels of the image; they may reach beyond it or be empty.
        height, width: of the image.
        threshold: above 0, at most 1.

    Returns:
        N dicts of pycocotools, `size` [height, width] and compressed `counts`.

    Raises `ValueError` for values that are not finite and for a threshold out of its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie above 0 and be at most 1")
    if not (masks.isfinite().all() and boxes.isfinite().all()):
        raise ValueError("masks or boxes hold NaN or infinite values")
    return [
        rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        for counts in (
            _runs(mask, box, height, width, threshold)
            for mask, box in zip(masks.double().cpu().numpy(), boxes.double().cpu().numpy(), strict=True)
        )
    ]


def _runs(
    mask: NDArray[np.float64], box: NDArray[np.float64], height: int, width: int, threshold: float
) -> list[int]:
    """Lengths of runs outside and inside the object by turns, column by column from the left."""
    x0, y0, x1, y1 = box
    size = len(mask)
    left, right = _pixels(x0, x1, width)
    top, bottom = _pixels(y0, y1, height)
    if left >= right or top >= bottom:
        return [height * width]

    # The mask at the columns of pixels: [rows of cells and a row of zeros at either end, pixels].
    cells = np.pad(mask, 1)
    x = (np.arange(left, right) + 0.5 - x0) * size / (x1 - x0) + 0.5  # cell i of `cells` is centred on i
    cell = x.astype(np.int64)
    lines = cells[:, cell] + (cells[:, cell + 1] - cells[:, cell]) * (x - cell)

    # Each column begins and ends outside, so that its crossings are up and down by turns.
    inside = lines >= threshold
    column, row = np.nonzero((inside[1:] != inside[:-1]).T)
    before, after = lines[row, column], lines[row + 1, column]
    y = row + (threshold - before) / (after - before)
    y = y0 + (y - 0.5) * (y1 - y0) / size - 0.5  # pixel i is centred on i
    starts = np.clip(np.ceil(y[0::2]).astype(np.int64), top, bottom)
    ends = np.clip(np.floor(y[1::2]).astype(np.int64) + 1, top, bottom)

    offsets = (left + column[0::2]) * height
    starts, ends = (offsets + rows for rows in (starts, ends))
    edges = np.stack([starts, ends], axis=1)[starts < ends].ravel()
    # Where a run ends with one column and the next begins with the next, they are one.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    runs = np.diff(edges, prepend=0, append=height * width)
    return np.trim_zeros(runs, "b").tolist()  # none outside where the object reaches the last pixel


def _pixels(low: float, high: float, side: int) -> tuple[int, int]:
    """The pixels of a side, first and behind the last, whose centres lie in [low, high)."""
    first, last = (int(np.clip(np.ceil(edge - 0.5), 0, side)) for edge in (low, high))
    return first, last
