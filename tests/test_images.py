"""Image files of every kind become 8-bit RGB as annotated, or are refused with a reason."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from resnext_backbones.errors import UsageError
from tasks.data.images import decode, image_size

HEIGHT, WIDTH = 24, 40


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)  # type: ignore[arg-type]
    return path


def gradient() -> Image.Image:
    """RGB, different in every corner and channel."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], axis=2).astype(np.uint8))


def means(image: torch.Tensor) -> list[float]:
    return image.float().mean(dim=(1, 2)).tolist()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by its specification (W3C PNG, 5 and 11.2); Pillow does not write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_keep_every_value(tmp_path: Path, suffix: str) -> None:
    image = decode(saved(tmp_path / f"a.{suffix}", gradient()), (HEIGHT, WIDTH))
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.array(gradient()))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif", "jp2"])
def test_other_formats_are_read(tmp_path: Path, suffix: str) -> None:
    image = decode(saved(tmp_path / f"a.{suffix}", Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50))))
    np.testing.assert_allclose(means(image), [200, 100, 50], atol=4)


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    assert means(decode(saved(tmp_path / "a.jpg", gradient(), format="PNG")))[0] == pytest.approx(117)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 77, "png", [77, 77, 77]),
        ("L", 77, "jpg", [77, 77, 77]),
        ("1", 1, "png", [255, 255, 255]),
        ("LA", (77, 10), "png", [77, 77, 77]),
        ("RGBA", (200, 100, 50, 0), "png", [200, 100, 50]),
        ("CMYK", (255, 0, 0, 0), "tiff", [0, 255, 255]),
        ("CMYK", (0, 0, 0, 255), "jpg", [0, 0, 0]),
        ("CMYK", (0, 255, 0, 0), "jpg", [255, 0, 255]),
        ("YCbCr", (128, 128, 128), "jpg", [128, 128, 128]),
    ],
)
def test_every_mode_becomes_three_channels(
    tmp_path: Path, mode: str, colour: object, suffix: str, expected: list[int]
) -> None:
    """The colours are kept and transparency is dropped."""
    path = saved(tmp_path / f"a.{suffix}", Image.new(mode, (WIDTH, HEIGHT), colour))  # type: ignore[arg-type]
    image = decode(path, (HEIGHT, WIDTH))
    assert image.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(means(image), expected, atol=2)


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 100, 50, 10, 20, 30])
    picture.putdata([0, 1])
    expected = [[[200, 10]], [[100, 20]], [[50, 30]]]
    assert decode(saved(tmp_path / "a.png", picture)).tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(tmp_path / "b.png", picture, transparency=b"\x00\x80")).tolist() == expected


def test_real_rgba_images_keep_their_colours(real_data: Path) -> None:
    path = sorted((real_data / "nuclei/train").glob("*.png"))[0]
    with Image.open(path) as picture:
        assert picture.mode == "RGBA"
        expected = np.array(picture)[:, :, :3]
    np.testing.assert_array_equal(decode(path).permute(1, 2, 0).numpy(), expected)


# EXIF.


def oriented(path: Path, orientation: int, picture: Image.Image | None = None) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    return saved(path, picture or gradient(), exif=exif)


@pytest.mark.parametrize("suffix", ["png", "tiff"])  # Pillow turns TIFFs by itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_only_where_that_makes_it_fit_its_annotations(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = oriented(tmp_path / f"a.{suffix}", orientation)
    stored = np.array(gradient())
    with Image.open(path) as picture:
        turned = np.array(ImageOps.exif_transpose(picture))
    as_stored = decode(path, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(as_stored.permute(1, 2, 0).numpy(), stored)
    as_shown = decode(path)
    np.testing.assert_array_equal(as_shown.permute(1, 2, 0).numpy(), turned)
    assert image_size(path) == as_shown.shape[-2:]
    if orientation < 5:
        with pytest.raises(
            UsageError, match=f"24×40 .EXIF orientation {orientation}., its annotations 40×24"
        ):
            decode(path, (WIDTH, HEIGHT))
    else:
        np.testing.assert_array_equal(decode(path, (WIDTH, HEIGHT)).permute(1, 2, 0).numpy(), turned)


def test_a_size_that_no_turn_explains_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = oriented(tmp_path / "a.png", 6)
    with pytest.raises(
        UsageError, match=r"a\.png: .*24×40 .*its annotations 24×41; correct `height` and `width`"
    ):
        decode(path, (HEIGHT, WIDTH + 1))


# More than eight bits.


@pytest.mark.parametrize(("suffix", "bits"), [("png", 16), ("tiff", 16), ("png", 12)])
def test_deep_grey_images_need_their_scale(tmp_path: Path, suffix: str, bits: int) -> None:
    largest = 2**bits - 1
    values = np.array([[0, largest // 3, largest]], dtype=np.uint16)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(values))
    with pytest.raises(UsageError, match=r"more than 8 bits .*data\.bit_depth=16"):
        decode(path)
    assert decode(path, bit_depth=bits).tolist() == [[[0, 85, 255]]] * 3
    with pytest.raises(UsageError, match=f"from 0 to {largest}, data.bit_depth=8 allows 0 to 255"):
        decode(path, bit_depth=8)


def test_float_images_need_their_scale(tmp_path: Path) -> None:
    values = np.array([[0, 1365, 4095]], dtype=np.float32)
    path = saved(tmp_path / "a.tiff", Image.fromarray(values))
    with pytest.raises(UsageError, match="more than 8 bits"):
        decode(path)
    assert decode(path, bit_depth=12).tolist() == [[[0, 85, 255]]] * 3
    bad = saved(tmp_path / "nan.tiff", Image.fromarray(values * np.float32("nan")))
    with pytest.raises(UsageError, match="its values reach from nan"):
        decode(bad, bit_depth=12)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colour_images_need_their_scale(tmp_path: Path, colour: int, channels: int) -> None:
    """Pillow keeps their upper eight bits without a word: twelve bits in use would come out almost black."""
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, colour, b"\0" + struct.pack(f">{channels}H", *[0x80FF] * channels)))
    for size in (None, (1, 1)):
        with pytest.raises(UsageError, match="more than 8 bits"):
            decode(path, size)
    with pytest.raises(UsageError, match=r"only read with data\.bit_depth=16"):
        decode(path, bit_depth=12)
    assert decode(path, bit_depth=16).flatten().tolist() == [128, 128, 128]


def test_a_stated_depth_leaves_ordinary_images_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", gradient())
    assert torch.equal(decode(path, bit_depth=12), decode(path))


# What is no image, or too much of one.


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image of a known format"),
        (jpeg()[:500], "cannot be decoded"),
        (jpeg()[:-200], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "no image of a known format|cannot be decoded"),
        (png(64, 64, 8, 2, bytes(range(193)) * 64)[:-90], "cannot be decoded"),
        (b"BM" + b"\xff" * 60, "no image of a known format|cannot be decoded|more than"),
    ],
)
def test_a_bad_file_is_refused_with_its_path_and_a_remedy(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=expected) as caught:
        decode(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jpg: there is no such image file"):
        decode(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="cannot be decoded"):
        decode(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_bytes_give_an_image_or_an_error(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(jpeg() if seed % 2 else png(8, 8, 8, 2, b"\0" + bytes(24 * 8 + 7)))
    for at in rng.integers(0, len(data), 8):
        data[at] = rng.integers(256)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    try:
        assert decode(path).dtype == torch.uint8
    except UsageError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - either outcome is right


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A one-bit image of 192 million pixels in less than 50 kB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(16_000, 12_000, 1, 0, bytes(12_000 * 2001)))
    assert path.stat().st_size < 50_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"12000×16000 are more than 100000000 pixels.*data\.max_pixels"):
            decode(path)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own limit, for everybody else


def test_the_pixel_limit_is_inclusive(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", gradient())
    assert decode(path, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(UsageError, match="more than 959 pixels"):
        decode(path, max_pixels=HEIGHT * WIDTH - 1)


# Decoding at a fraction of the size.


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        ((480, 640), (480, 640)),
        ((241, 320), (480, 640)),
        ((120, 160), (240, 320)),
        ((120, 161), (480, 640)),
        ((60, 80), (120, 160)),
        ((30, 40), (60, 80)),
        ((3, 4), (60, 80)),
    ],
)
def test_a_jpeg_is_reduced_only_while_it_stays_twice_as_large(
    tmp_path: Path, at_least: tuple[int, int], expected: tuple[int, int]
) -> None:
    path = saved(tmp_path / "a.jpg", gradient().resize((640, 480)), quality=95)
    image = decode(path, (480, 640), at_least=at_least)
    assert tuple(image.shape[-2:]) == expected
    whole = torch.nn.functional.adaptive_avg_pool2d(decode(path).float(), (30, 40))
    reduced = torch.nn.functional.adaptive_avg_pool2d(image.float(), (30, 40))
    assert (whole - reduced).abs().max() < 4


def test_a_reduced_jpeg_is_turned_as_well(tmp_path: Path) -> None:
    path = oriented(tmp_path / "a.jpg", 6, gradient().resize((640, 480)))
    assert decode(path, (640, 480), at_least=(160, 120)).shape == (3, 320, 240)
    assert decode(path, (640, 480), at_least=(160, 121)).shape == (3, 640, 480)


def test_other_formats_are_never_reduced(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", gradient())
    assert decode(path, at_least=(2, 2)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "a.png", gradient()), tmp_path / "b.jpg"
    bad.write_bytes(jpeg()[:400])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        decode(good)
        for path, options in ((bad, {}), (good, {"max_pixels": 1}), (good, {"size_hw": (1, 1)})):
            with pytest.raises(UsageError):
                decode(path, **options)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before
