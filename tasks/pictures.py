"""Pictures of images with their boxes, drawn with Pillow alone.

`draw` one image, put ground truth and predictions `side_by_side`, many on a `contact_sheet`, and `save_png`.
"""

import colorsys
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LONGEST_SIDE = 480  # pixels; a smaller image is enlarged until its text can be read
TEXT_SIZE = 14
GAP = 6
PAPER, INK = (255, 255, 255), (30, 30, 30)

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Okabe and Ito's colours for colour-blind readers (https://jfly.uni-koeln.de/color), without black
_OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def class_colour(label: int) -> Colour:
    """The RGB colour of class `label` (1…K): always the same one, and another one for another class."""
    index = (int(label) - 1) % (1 << 16)
    if index < len(_OKABE_ITO):
        return _OKABE_ITO[index]
    # steps by the golden ratio never come round to the same hue; lightness helps where hue does not
    hue, lightness = index * 0.618034 % 1, (0.38, 0.55, 0.72)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    crowd: Tensor | None = None,
) -> Image.Image:
    """Draw boxes with their class names onto an image.

    image: uint8 [3, H, W], RGB. boxes: [N, 4], xyxy in pixels of `image`. labels: int [N], 1…K. names: K
    class names; a label without a name shows its number. scores: [N] in 0…1, shown with two digits.
    crowd: bool [N]; crowds are dashed and called so. An image whose longer side is below `LONGEST_SIDE` is
    enlarged by a whole factor. Boxes that cannot be drawn (not finite, or outside the image) are counted in
    a note at the bottom.
    """
    height, width = image.shape[-2:]
    factor = max(1, math.ceil(LONGEST_SIDE / max(height, width)))
    picture = Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)

    shown: list[tuple[Box, int, str, bool]] = []
    omitted = 0
    crowds = [False] * len(boxes) if crowd is None else crowd.bool().tolist()
    confidences = [None] * len(boxes) if scores is None else scores.float().tolist()
    for corners, label, score, is_crowd in zip(
        boxes.float().tolist(), labels.tolist(), confidences, crowds, strict=True
    ):
        box = _within(corners, width, height)
        if box is None:
            omitted += 1
            continue
        text = "crowd" if is_crowd else names[label - 1] if 0 < label <= len(names) else f"class {label}"
        if score is not None:
            text += f" {score:.2f}"
        scaled = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
        shown.append((scaled, label, text, is_crowd))

    shown.sort(key=lambda s: (s[0][2] - s[0][0]) * (s[0][3] - s[0][1]), reverse=True)  # small ones on top
    pen = ImageDraw.Draw(picture)
    for box, label, _, is_crowd in shown:
        _frame(pen, box, class_colour(label), dashed=is_crowd)
    taken: list[Box] = []
    for box, label, text, _ in shown:
        _tag(pen, box, text, class_colour(label), taken)
    if omitted:
        note = f"{omitted} {'box' if omitted == 1 else 'boxes'} not drawable"
        _tag(pen, (0, picture.height, 0, picture.height), note, PAPER, taken)
    return picture


def side_by_side(
    left: Image.Image, right: Image.Image, titles: tuple[str, str] = ("ground truth", "predictions")
) -> Image.Image:
    """Two pictures next to each other, each under its title."""
    bar = TEXT_SIZE + 2 * GAP
    sheet = Image.new("RGB", (left.width + GAP + right.width, bar + max(left.height, right.height)), PAPER)
    pen = ImageDraw.Draw(sheet)
    x = 0
    for picture, title in zip((left, right), titles, strict=True):
        pen.text((x + GAP, bar / 2), _fitting(title, picture.width - 2 * GAP), INK, _font(), anchor="lm")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG")
        Path(part).chmod(0o644)  # mkstemp makes it private
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _within(corners: Sequence[float], width: int, height: int) -> Box | None:
    """The box clipped to the image, its corners in order; None where nothing of it can be shown."""
    if not all(math.isfinite(v) for v in corners):
        return None
    x0, x1 = sorted((corners[0], corners[2]))
    y0, y1 = sorted((corners[1], corners[3]))
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        return None
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def _frame(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, dashed: bool) -> None:
    """A rectangle of two pixels' width, with a dark edge around it so that it shows on any ground."""
    right, bottom = pen.im.size[0] - 1, pen.im.size[1] - 1
    x0, y0 = min(round(box[0]), right), min(round(box[1]), bottom)
    x1, y1 = max(x0, min(round(box[2]), right)), max(y0, min(round(box[3]), bottom))
    if not dashed:
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=INK)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        return
    dash, space = 8, 6
    for x in range(x0, x1 + 1, dash + space):
        for y in (y0, y1):
            pen.line((x, y, min(x + dash, x1), y), fill=colour, width=3)
    for y in range(y0, y1 + 1, dash + space):
        for x in (x0, x1):
            pen.line((x, y, x, min(y + dash, y1)), fill=colour, width=3)


def _tag(pen: ImageDraw.ImageDraw, box: Box, text: str, colour: Colour, taken: list[Box]) -> None:
    """Text on a plate above `box`, below it or inside, within the picture and off the plates `taken`."""
    picture_width, picture_height = pen.im.size
    text = _fitting(text, picture_width - 6)
    width, height = math.ceil(_font().getlength(text)) + 6, TEXT_SIZE + 4
    x = max(0, min(round(box[0]), picture_width - width))
    places = [
        (x, max(0, min(y, picture_height - height)))
        for y in (round(box[1]) - height, round(box[3]), round(box[1]), round(box[3]) - height)
    ]
    plates: list[Box] = [(x, y, x + width - 1, y + height - 1) for x, y in places]
    # where no place is free the first one serves: a covered name is better than a name without its box
    plate = next((p for p in plates if not any(_overlap(p, other) for other in taken)), plates[0])
    taken.append(plate)
    pen.rectangle(plate, fill=colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if brightness > 125 else PAPER
    pen.text((plate[0] + 3, plate[1] + height / 2), text, ink, _font(), anchor="lm")


def _overlap(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _fitting(text: str, width: float) -> str:
    """`text` on one line, cut with "…" where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
