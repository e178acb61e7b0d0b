"""An image file as a tensor: 8 bits, RGB, as the annotations see it. Decoded by Pillow.

torchvision's own decoders are deprecated and have no limit on pixels: a file of 23 kB became half a gigabyte.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from resnext_backbones.errors import UsageError

MAX_PIXELS = 100_000_000
# Of class maps: pixels that are neither learned from nor judged; the class of what belongs to no object.
IGNORED, BACKGROUND = 255, "background"

# Only these are tried: some of Pillow's other readers start programs (EPS) or are hardly ever tested.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")

# The Exif standard's orientations (tag 274) and what undoes each
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # to how it was stored
_TRANSPOSED = (5, 6, 7, 8)  # those that swap height and width
_pillow_limit = threading.Lock()

Size = tuple[int, int]


class WrongSize(UsageError):
    """An image of another size than what belongs to it."""


def decode(
    path: Path | str,
    size_hw: Size | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    bit_depth: int | None = None,
    at_least: Size | None = None,
) -> Tensor:
    """Decodes an image of one of `FORMATS` to uint8 [3, H, W], RGB, channels last in memory.

    Palette, grey, CMYK and 1-bit images become RGB; of an alpha channel the colours are kept as they are and
    the transparency is dropped, as Detectron2 and torchvision do. Of several frames the first one is taken.

    Args:
        path: the file.
        size_hw: height and width the annotations were made for. The file's EXIF orientation is applied only
            where it is what makes the sizes agree. Without it the image is turned as EXIF says.
        max_pixels: an image with more is refused before it is decoded.
        bit_depth: for images of more than 8 bits, the number of bits in use; 0…2**bit_depth - 1 becomes
            0…255.
        at_least: height and width the image will be resized to. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
            size where each side stays at least twice that long; the result is then smaller than `size_hw`.

    Raises:
        UsageError: the file is missing, empty, damaged, no image, too large, of another size than `size_hw`
            (`WrongSize`), or has more than 8 bits and no `bit_depth`.
    """
    return decode_and_measure(path, size_hw, max_pixels=max_pixels, bit_depth=bit_depth, at_least=at_least)[0]


def decode_and_measure(
    path: Path | str,
    size_hw: Size | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    bit_depth: int | None = None,
    at_least: Size | None = None,
) -> tuple[Tensor, Size]:
    """As `decode`, and height and width of the whole image, for one that `at_least` makes smaller."""
    path = Path(path)
    with opened(path, max_pixels) as image:
        deep = _is_deep_colour(image)  # first of all: no longer to be seen once EXIF made Pillow decode
        by_pillow = _turned_by_pillow(image)
        stored = _turned((image.height, image.width), by_pillow)
        orientation = _orientation(path, image, stored, size_hw)
        whole = _turned(stored, orientation)
        if at_least is not None:
            height, width = at_least[::-1] if orientation in _TRANSPOSED else at_least
            image.draft(None, (2 * width, 2 * height))
        rgb = _to_rgb(path, image, deep, bit_depth)
        if by_pillow in _BACK:
            rgb = rgb.transpose(_BACK[by_pillow])
        if orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), whole


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> Size:
    """Height and width of an image as it is to be looked at, turned as its EXIF orientation says.

    Raises:
        UsageError: the file is missing, no image, or has more than `max_pixels`.
    """
    with opened(path, max_pixels) as image:
        stored = _turned((image.height, image.width), _turned_by_pillow(image))
        return _turned(stored, _orientation(path, image, stored, None))


@contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A Pillow image whose pixels are still in the file; whatever is wrong with it becomes a `UsageError`."""
    try:
        with _open(path, max_pixels) as image:
            yield image
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such image file") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path}: {_no_image(path)}") from None
    # a damaged file makes Pillow raise almost anything: OSError, SyntaxError, struct.error, EOFError, …
    except Exception as error:
        raise UsageError(f"{path}: the image cannot be decoded ({error}); replace the file") from None


@contextmanager
def _open(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Reads the header; the pixels stay in the file."""
    with _pillow_limit, warnings.catch_warnings():
        # Pillow only warns up to twice its limit, and that limit is a global: ours is checked instead
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise UsageError(
                f"{path}: {height}×{width} are more than {max_pixels} pixels; make the image smaller, or "
                "raise data.max_pixels if it is what you mean"
            )
        yield image


def _turned_by_pillow(image: Image.Image) -> int:
    """The EXIF orientation that Pillow undoes by itself while it decodes, as it does of TIFF only; else 1."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1


def _orientation(path: Path, image: Image.Image, stored: Size, size_hw: Size | None) -> int:
    """The EXIF orientation to undo so that the annotations fit; 1 for none."""
    if stored == size_hw:
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if size_hw is None or (stored[::-1] == tuple(size_hw) and orientation in _TRANSPOSED):
        return orientation
    raise WrongSize(
        f"{path}: the image has height×width {stored[0]}×{stored[1]} (EXIF orientation {orientation}), its "
        f"annotations {size_hw[0]}×{size_hw[1]}; correct `height` and `width`, or restore the image"
    )


def _turned(size: Size, orientation: int) -> Size:
    return size[::-1] if orientation in _TRANSPOSED else size


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow would keep only the upper 8 of 16 bits."""
    colour = image.format in ("PNG", "TIFF") and not image.mode.startswith(("I", "F"))
    return colour and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _to_rgb(path: Path, image: Image.Image, deep_colour: bool, bit_depth: int | None) -> Image.Image:
    deep_grey = image.mode.startswith(("I", "F"))
    if (deep_colour or deep_grey) and bit_depth is None:
        raise UsageError(
            f"{path}: its pixels have more than 8 bits (mode {image.mode}); say how many are in use: "
            "data.bit_depth=16, or 12, …"
        )
    if deep_colour and bit_depth != 16:
        raise UsageError(f"{path}: colour images of 16 bits are only read with data.bit_depth=16")
    if deep_grey:
        assert bit_depth is not None
        return _scaled(path, image, bit_depth)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # drops the transparency without Pillow's warning
    return image.convert("RGB")


def _scaled(path: Path, image: Image.Image, bit_depth: int) -> Image.Image:
    largest = 2**bit_depth - 1
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= largest):
        raise UsageError(
            f"{path}: its values reach from {values.min():g} to {values.max():g}, data.bit_depth={bit_depth} "
            f"allows 0 to {largest}; state the right depth"
        )
    return Image.fromarray(np.rint(values * (255 / largest)).astype(np.uint8)).convert("RGB")


def _no_image(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "the file is empty; replace it, or take the image out of the annotation file"
    if begin.lstrip().startswith(b"<"):
        return f"a web page, not an image (it begins with {begin[:20]!r}); download it again"
    if begin.startswith(b"version https://git-lfs"):
        return "a pointer to a Git LFS object, not the image itself; run `git lfs pull`"
    return f"no image of a known format ({', '.join(FORMATS)}); replace or convert the file"
