"""What pictures are drawn with: colours of classes, tints of masks, a pen whose strokes suit the size."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tasks.data.images import BACKGROUND

LONGEST_SIDE = 480  # pixels; a smaller image is enlarged until its text can be read
TEXT_SIZE = 14
GAP = 6
PAPER, INK = (255, 255, 255), (30, 30, 30)

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

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
RIGHT, WRONG = _OKABE_ITO[2], _OKABE_ITO[5]  # bluish green and vermilion


def class_colour(label: int) -> Colour:
    """The RGB colour of class `label` (1…K): always the same one, and another one for another class."""
    index = (int(label) - 1) % (1 << 16)
    if index < len(_OKABE_ITO):
        return _OKABE_ITO[index]
    # steps by the golden ratio never come round to the same hue; lightness helps where hue does not
    hue, lightness = index * 0.618034 % 1, (0.38, 0.55, 0.72)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def map_colour(value: int, names: Sequence[str]) -> Colour:
    """The colour of a class map's `value` (0…K - 1): that of the class's objects, of which a background at 0
    is none."""
    return class_colour(value if names and names[0] == BACKGROUND else value + 1)


def shade(colour: Colour, number: int) -> Colour:
    """The colour of a class for one of its objects: darker, itself, lighter, in turns."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(v / 255 for v in colour))
    factor = (1.0, 0.6, 1.35, 0.8, 1.6)[number % 5]
    red, green, blue = colorsys.hls_to_rgb(hue, min(0.9, lightness * factor), saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(image: Tensor) -> tuple[Image.Image, int]:
    """A uint8 [3, H, W] image as a picture whose longer side has at least `LONGEST_SIDE` pixels, and the
    whole factor by which it grew."""
    height, width = image.shape[-2:]
    factor = max(1, math.ceil(LONGEST_SIDE / max(height, width)))
    picture = Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    return picture, factor


def unit_of(width: int, height: int) -> float:
    """By how much strokes and text are larger than on a picture of up to 1000 pixels."""
    return max(1.0, max(width, height) / 1000)


def tint(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], fill: Colour, edge: Colour, width: int) -> None:
    """Colours what `mask` [H, W] covers of `pixels` [H, W, 3] in place, half through, with a contour."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, region = mask[window], pixels[window]
    region[inside] = (region[inside] * 0.55 + np.array(fill) * 0.45).astype(np.uint8)
    region[inside & ~_eroded(inside, width)] = edge


def _eroded(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """What of `mask` has mask `width` pixels further on in all four directions."""
    height, length = mask.shape
    wide = np.pad(mask, width)
    up, down = wide[:height, width:-width], wide[2 * width :, width:-width]
    left, right = wide[width:-width, :length], wide[width:-width, 2 * width :]
    return mask & up & down & left & right


class Pen:
    """Draws on a picture, with strokes and text of a size that fits it."""

    def __init__(self, picture: Image.Image) -> None:
        self.width, self.height = picture.size
        self.unit = unit_of(*picture.size)
        self.font = font(self.unit)
        self._draw = ImageDraw.Draw(picture)
        self._taken: list[Box] = []

    def frame(self, box: Box, colour: Colour, dashed: bool = False) -> None:
        """A rectangle, with a dark edge around it so that it shows on any ground."""
        right, bottom = self.width - 1, self.height - 1
        x0, y0 = min(round(box[0]), right), min(round(box[1]), bottom)
        x1, y1 = max(x0, min(round(box[2]), right)), max(y0, min(round(box[3]), bottom))
        edge = round(self.unit)
        if not dashed:
            self._draw.rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), outline=INK, width=edge)
            self._draw.rectangle((x0, y0, x1, y1), outline=colour, width=2 * edge)
            return
        dash, space = 8 * edge, 6 * edge
        for x in range(x0, x1 + 1, dash + space):
            for y in (y0, y1):
                self._draw.line((x, y, min(x + dash, x1), y), fill=colour, width=3 * edge)
        for y in range(y0, y1 + 1, dash + space):
            for x in (x0, x1):
                self._draw.line((x, y, x, min(y + dash, y1)), fill=colour, width=3 * edge)

    def skeleton(
        self, points: Sequence[tuple[float, float] | None], edges: Sequence[Sequence[int]], colour: Colour
    ) -> None:
        """Lines between those points that are there, and a dot on each of them."""
        joined = [(points[a], points[b]) for a, b in edges]
        lines = [(*a, *b) for a, b in joined if a is not None and b is not None]
        for width, ink in ((5, INK), (3, colour)):
            for line in lines:
                self._draw.line(line, fill=ink, width=round(width * self.unit))
        radius = 2.5 * self.unit
        for point in points:
            if point is not None:
                self._draw.circle(point, radius, fill=PAPER, outline=INK, width=round(self.unit))

    def plate_size(self, text: str) -> tuple[int, int]:
        """Width and height of the plate that `tag` draws."""
        margin = 2 * round(3 * self.unit)
        return math.ceil(self.font.getlength(text)) + margin, round((TEXT_SIZE + 4) * self.unit)

    def tag(self, box: Box, text: str, colour: Colour) -> None:
        """Text on a plate above `box`, below it or inside, within the picture and off the other plates."""
        margin = round(3 * self.unit)
        text = fitting(text, self.width - 2 * margin, self.font)
        width, height = self.plate_size(text)
        x = max(0, min(round(box[0]), self.width - width))
        places = [
            (x, max(0, min(y, self.height - height)))
            for y in (round(box[1]) - height, round(box[3]), round(box[1]), round(box[3]) - height)
        ]
        plates: list[Box] = [(x, y, x + width - 1, y + height - 1) for x, y in places]
        # where no place is free the first one serves: a covered name is better than a name without its box
        plate = next((p for p in plates if not any(_overlap(p, other) for other in self._taken)), plates[0])
        self._taken.append(plate)
        self._draw.rectangle(plate, fill=colour)
        brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = (0, 0, 0) if brightness > 125 else PAPER
        self._draw.text((plate[0] + margin, plate[1] + height / 2), text, ink, self.font, anchor="lm")


def with_legend(picture: Image.Image, entries: Sequence[tuple[Colour, str]]) -> Image.Image:
    """The picture over a strip with a patch of each colour and its text; the last row says what has no place.

    The strip grows by rows to at most a third of the picture's height (and always has two).
    """
    if not entries:
        return picture
    unit = unit_of(*picture.size)
    face, gap, line = font(unit), round(GAP * unit), round((TEXT_SIZE + GAP) * unit)
    patch = round(TEXT_SIZE * unit)
    most = max(2, picture.height // 3 // line)
    places: list[tuple[int, int, Colour | None, str]] = []
    x, row = gap, 0
    for number, (colour, text) in enumerate(entries):
        text = fitting(text, picture.width - 4 * gap - patch, face)
        width = patch + math.ceil(face.getlength(text)) + 3 * gap
        if x > gap and x + width > picture.width:
            x, row = gap, row + 1
        if row == most - 1 and number < len(entries) - 1:
            places.append((gap, row, None, f"and {len(entries) - number} more"))
            break
        places.append((x, row, colour, text))
        x += width
    strip = picture.height + gap
    sheet = Image.new("RGB", (picture.width, strip + (places[-1][1] + 1) * line + gap // 2), PAPER)
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for x, row, patch_colour, text in places:
        y = strip + row * line
        if patch_colour is not None:
            pen.rectangle((x, y, x + patch - 1, y + patch - 1), fill=patch_colour, outline=INK)
            x += patch + gap
        pen.text((x, y + patch / 2), text, INK, face, anchor="lm")
    return sheet


def font(unit: float = 1.0) -> Font:
    return ImageFont.load_default(round(TEXT_SIZE * unit))


def fitting(text: str, width: float, face: Font) -> str:
    """`text` on one line, cut with "…" where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _overlap(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
