"""What there is to draw of each object: its box, name, colour, mask and keypoints."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

from tasks.drawing.marks import Box, Colour, class_colour, shade

Mask = Tensor | Mapping[str, Any]
"""uint8 or bool [H, W], or a run-length code of pycocotools."""


class Drawn(NamedTuple):
    box: Box  # in pixels of the picture
    label: int
    name: str
    text: str  # the name with its score
    crowd: bool
    colour: Colour  # of this object, a shade of its class's
    mask: Mask | None
    points: list[tuple[float, float] | None]


def objects(
    image: Tensor,
    factor: int,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None,
    crowd: Tensor | None,
    masks: Tensor | Sequence[Mask] | None,
    keypoints: Tensor | None,
) -> list[Drawn | None]:
    """What there is to draw; None for a box of which nothing can be shown."""
    height, width = image.shape[-2:]
    number = len(boxes)
    crowds = [False] * number if crowd is None else crowd.bool().tolist()
    confidences = [None] * number if scores is None else scores.float().tolist()
    poses = [[]] * number if keypoints is None else keypoints.float().tolist()
    outlines = [None] * number if masks is None else masks
    so_far: Counter[int] = Counter()
    drawn: list[Drawn | None] = []
    for corners, label, score, is_crowd, mask, pose in zip(
        boxes.float().tolist(), labels.tolist(), confidences, crowds, outlines, poses, strict=True
    ):
        box = _within(corners, width, height)
        if box is None:
            drawn.append(None)
            continue
        name = "crowd" if is_crowd else names[label - 1] if 0 < label <= len(names) else f"class {label}"
        drawn.append(
            Drawn(
                box=(box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor),
                label=label,
                name=name,
                text=name if score is None else f"{name} {score:.2f}",
                crowd=is_crowd,
                colour=shade(class_colour(label), so_far[label]),
                mask=mask,
                points=[_point(point, width, height, factor) for point in pose],
            )
        )
        so_far[label] += 1
    return drawn


def _within(corners: Sequence[float], width: int, height: int) -> Box | None:
    """The box clipped to the image, its corners in order; None where nothing of it can be shown."""
    if not all(math.isfinite(v) for v in corners):
        return None
    x0, x1 = sorted((corners[0], corners[2]))
    y0, y1 = sorted((corners[1], corners[3]))
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        return None
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def _point(point: Sequence[float], width: int, height: int, factor: int) -> tuple[float, float] | None:
    """Where a keypoint is drawn; None where it is not labelled, or further away than an image's size."""
    x, y, visibility = point
    if visibility > 0 and -width <= x <= 2 * width and -height <= y <= 2 * height:  # false also for NaN
        return x * factor, y * factor
    return None


def decoded(mask: Mask, image: Tensor) -> NDArray[np.bool_]:
    """A mask as pixels, bool [H, W]; ValueError if it is not of the image's size."""
    size = tuple(image.shape[-2:])
    given = tuple(mask["size"] if isinstance(mask, Mapping) else mask.shape)
    if given != size:
        raise ValueError(f"a mask of {given[0]}×{given[1]} for an image of {size[0]}×{size[1]}")
    array = rle.decode(mask) if isinstance(mask, Mapping) else mask.detach().cpu().numpy()
    return array.astype(bool)
