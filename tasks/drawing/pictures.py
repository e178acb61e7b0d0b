"""Pictures of images with what is known or was found in them, drawn with Pillow alone.

`draw` boxes, masks and keypoints, `draw_classes` of pixels, or a `captioned` image; put ground truth and
predictions `side_by_side`, many on a `contact_sheet`, and `save_png` or `save_jpeg`.
"""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from tasks.data.images import IGNORED
from tasks.drawing.marks import (
    BACKGROUND,
    GAP,
    INK,
    LONGEST_SIDE,
    PAPER,
    RIGHT,
    TEXT_SIZE,
    WRONG,
    Colour,
    Pen,
    class_colour,
    enlarged,
    fitting,
    font,
    map_colour,
    tint,
    unit_of,
    with_legend,
)
from tasks.drawing.objects import Mask, decoded
from tasks.drawing.objects import objects as to_draw

CROWDED = 0.3  # share of a picture that plates with names may cover; beyond it a legend names the classes

HATCH = (128, 128, 128)


def draw(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    crowd: Tensor | None = None,
    *,
    masks: Tensor | Sequence[Mask] | None = None,
    keypoints: Tensor | None = None,
    edges: Sequence[Sequence[int]] = (),
) -> Image.Image:
    """Draw objects with their class names onto an image.

    An image whose longer side is below `LONGEST_SIDE` is enlarged by a whole factor; strokes and text grow
    with larger ones. Boxes that cannot be drawn (not finite, or outside the image) are counted in a note at
    the bottom. Where names would cover too much of the picture, a legend under it counts the classes instead.

    Args:
        image: uint8 [3, H, W], RGB.
        boxes: [N, 4], xyxy in pixels of `image`.
        labels: int [N], 1…K.
        names: K class names; a label without a name shows its number.
        scores: [N] in 0…1, shown with two digits.
        crowd: bool [N]; crowds are dashed and called so.
        masks: of the image's size, uint8 or bool [N, H, W], or N run-length codes of pycocotools. The tints
            of a class's objects differ in lightness; the contour has the class's colour.
        keypoints: [N, P, 3], x and y as of boxes (the first pixel's centre is 0.5, 0.5) and visibility; where
            that is 0 nothing is drawn.
        edges: pairs of keypoints, from 0, that are joined by lines.

    Raises:
        ValueError: numbers of objects differ, or a mask has another size than the image.
    """
    picture, factor = enlarged(image)
    objects = to_draw(image, factor, boxes, labels, names, scores, crowd, masks, keypoints)
    drawn = [o for o in objects if o is not None]
    drawn.sort(key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1]), reverse=True)  # small ones on top

    if masks is not None:
        pixels = np.array(picture)
        for o in drawn:
            if o.mask is not None:
                inside = decoded(o.mask, image).repeat(factor, axis=0).repeat(factor, axis=1)
                width = round(1.5 * unit_of(*picture.size))
                tint(pixels, inside, o.colour, class_colour(o.label), width)
        picture = Image.fromarray(pixels)
    pen = Pen(picture)
    for o in drawn:
        pen.frame(o.box, class_colour(o.label), dashed=o.crowd)
    for o in drawn:
        pen.skeleton(o.points, edges, o.colour)
    covered = sum(math.prod(pen.plate_size(o.text)) for o in drawn)
    crowded = len(drawn) > 8 and covered > CROWDED * picture.width * picture.height
    for o in drawn:
        if not crowded:
            pen.tag(o.box, o.text, class_colour(o.label))
    if omitted := len(objects) - len(drawn):
        note = f"{omitted} {'box' if omitted == 1 else 'boxes'} not drawable"
        pen.tag((0, picture.height, 0, picture.height), note, PAPER)
    if not crowded:
        return picture
    counts = Counter((o.label, o.name) for o in drawn)
    legend = [(class_colour(label), f"{name} ({number})") for (label, name), number in counts.most_common()]
    return with_legend(picture, legend)


def draw_classes(image: Tensor, classes: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw the class of every pixel onto an image, half through, over a legend with each class's share.

    The background keeps the image's colours; pixels that are ignored are hatched. Contours part the classes.

    Args:
        image: uint8 [3, H, W], RGB; enlarged as by `draw`.
        classes: uint8 [h, w], 0…K - 1, 255 ignored. One of another size is brought to the image's.
        names: K class names; a class without a name shows its number.
    """
    picture, _ = enlarged(image)
    drawn = classes.detach().cpu().numpy()
    places = np.array(Image.fromarray(drawn).resize(picture.size, Image.Resampling.NEAREST))
    pixels = np.array(picture)
    width = max(1, round(unit_of(*picture.size)))
    present, counts = np.unique(drawn, return_counts=True)
    legend: list[tuple[Colour, str]] = []
    for share, index in sorted(zip(counts.tolist(), present.tolist(), strict=True), reverse=True):
        name = names[index] if index < len(names) else f"class {index}"
        if index == IGNORED:
            colour, name = HATCH, "ignored"
            y, x = np.ogrid[: picture.height, : picture.width]
            pixels[(places == IGNORED) & ((x + y) // (4 * width) % 2 == 0)] = HATCH
        elif name == BACKGROUND:
            colour = PAPER
        else:
            colour = map_colour(index, names)
            tint(pixels, places == index, colour, colour, width)
        percent = f"{share / drawn.size:.1%}" if share >= drawn.size / 1000 else "<0.1%"
        legend.append((colour, f"{name} {percent}"))
    return with_legend(Image.fromarray(pixels), legend)


def captioned(image: Tensor, text: str, right: bool | None) -> Image.Image:
    """An image over a line of text.

    image: uint8 [3, H, W], RGB; enlarged as by `draw`. text: on one line, cut where it is too long. right:
    adds an edge, with a tick in green for True or a cross in orange for False; None for neither.
    """
    picture, _ = enlarged(image)
    unit = unit_of(*picture.size)
    edge, face = round(4 * unit), font(unit)
    line = round((TEXT_SIZE + 2 * GAP) * unit)
    gap = round(GAP * unit)
    colour = PAPER if right is None else RIGHT if right else WRONG
    width = max(picture.width, 8 * line)  # of a narrow image the text would be cut to nothing
    sheet = Image.new("RGB", (width + 2 * edge, picture.height + line + 2 * edge), colour)
    sheet.paste(PAPER, (edge, edge, edge + width, edge + picture.height + line))
    sheet.paste(picture, (edge + (width - picture.width) // 2, edge))
    pen = ImageDraw.Draw(sheet)
    x, y = edge + gap, edge + picture.height
    if right is not None:
        size = round(TEXT_SIZE * unit)
        _mark(pen, (x, y + (line - size) // 2), size, right, colour)
        x += size + gap
    text = fitting(text, edge + width - gap - x, face)
    pen.text((x, y + line / 2), text, INK, face, anchor="lm")
    return sheet


def _mark(pen: ImageDraw.ImageDraw, corner: tuple[int, int], size: int, right: bool, colour: Colour) -> None:
    """A tick or a cross, as lines: Pillow's own font has neither."""
    tick = [[(0.1, 0.55), (0.4, 0.85), (0.9, 0.15)]]
    cross = [[(0.1, 0.1), (0.9, 0.9)], [(0.1, 0.9), (0.9, 0.1)]]
    for stroke in tick if right else cross:
        points = [(corner[0] + x * size, corner[1] + y * size) for x, y in stroke]
        pen.line(points, fill=colour, width=max(2, size // 5), joint="curve")


def side_by_side(
    left: Image.Image, right: Image.Image, titles: tuple[str, str] = ("ground truth", "predictions")
) -> Image.Image:
    """Two pictures next to each other, each under its title."""
    bar = TEXT_SIZE + 2 * GAP
    sheet = Image.new("RGB", (left.width + GAP + right.width, bar + max(left.height, right.height)), PAPER)
    pen = ImageDraw.Draw(sheet)
    x = 0
    for picture, title in zip((left, right), titles, strict=True):
        text = fitting(title, picture.width - 2 * GAP, font())
        pen.text((x + GAP, bar / 2), text, INK, font(), anchor="lm")
        sheet.paste(picture, (x, bar))
        x += picture.width + GAP
    return sheet


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures in rows of `columns`, centred in cells of the largest one's size; blank if there are none."""
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, math.ceil(len(pictures) / columns))
    width = max((p.width for p in pictures), default=LONGEST_SIDE)
    height = max((p.height for p in pictures), default=LONGEST_SIDE)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), PAPER)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        x = GAP + column * (width + GAP) + (width - picture.width) // 2
        y = GAP + row * (height + GAP) + (height - picture.height) // 2
        sheet.paste(picture, (x, y))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write `path` whole or not at all; its folder is made if need be."""
    _save(image, path, format="PNG")


def save_jpeg(image: Image.Image, path: Path) -> None:
    """As `save_png`, for photographs: a tenth of the size."""
    _save(image, path, format="JPEG", quality=90)


def _save(image: Image.Image, path: Path, **settings: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name[:100]}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, **settings)
        Path(part).chmod(0o644)  # mkstemp makes it private
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
