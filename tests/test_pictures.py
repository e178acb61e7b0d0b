"""Pictures, judged by their pixels."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.pictures import INK, PAPER, class_colour, contact_sheet, draw, save_png, side_by_side

NAMES = ["cat", "dog", "a very long name of a class that nobody would ever want to read to its end " * 3]
GREY = (90, 90, 90)


def grey(height: int = 480, width: int = 640) -> torch.Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def boxes(*corners: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((array(picture) == colour).all(axis=2).sum())


def painted(picture: Image.Image) -> tuple[int, int, int, int]:
    """The extent (x0, y0, x1, y1) of what is not the grey ground."""
    y, x = np.nonzero((array(picture) != GREY).any(axis=2))
    return x.min(), y.min(), x.max(), y.max()


def test_channels_and_places_are_kept():
    image = torch.zeros(3, 500, 700, dtype=torch.uint8)
    image[0, 10, 20], image[1, 30, 40], image[2, 499, 699] = 200, 150, 100
    picture = draw(image, boxes(), torch.empty(0, dtype=torch.int64), NAMES)
    assert picture.size == (700, 500)
    assert picture.getpixel((20, 10)) == (200, 0, 0)
    assert picture.getpixel((40, 30)) == (0, 150, 0)
    assert picture.getpixel((699, 499)) == (0, 0, 100)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (128, 128, (512, 512)),
        (96, 120, (480, 384)),
        (1, 1, (480, 480)),
        (200, 479, (958, 400)),
        (480, 3, (3, 480)),
    ],
)
def test_small_images_grow_by_a_whole_factor(height, width, size):
    picture = draw(grey(height, width), boxes(), torch.empty(0, dtype=torch.int64), NAMES)
    assert picture.size == size
    assert count(picture, GREY) == size[0] * size[1]


def test_a_box_is_framed_where_it_is_in_its_class_colour():
    picture = draw(grey(), boxes((100, 200, 300, 400)), torch.tensor([2]), NAMES)
    colour = class_colour(2)
    for x, y in [(100, 300), (300, 300), (200, 200), (200, 400)]:
        assert picture.getpixel((x, y)) == colour
    assert picture.getpixel((200, 300)) == GREY
    assert painted(picture)[1] >= 200 - 25  # the name stands right above


def test_the_box_grows_with_the_image():
    picture = draw(grey(120, 160), boxes((25, 50, 75, 100)), torch.tensor([1]), NAMES)
    assert picture.getpixel((3 * 25, 3 * 75)) == picture.getpixel((3 * 75, 3 * 75)) == class_colour(1)


def test_the_name_and_the_score_are_written():
    box, label = boxes((100, 200, 300, 400)), torch.tensor([1])
    bare = draw(grey(), box, label, [""])
    named = draw(grey(), box, label, ["cat"])
    scored = draw(grey(), box, label, ["cat"], torch.tensor([0.987], dtype=torch.bfloat16))
    widths = [int((array(p)[190] == class_colour(1)).all(axis=1).sum()) for p in (bare, named, scored)]
    assert widths[0] < widths[1] < widths[2]
    two_digits = draw(grey(), box, label, ["cat 0.99"])
    np.testing.assert_array_equal(array(scored), array(two_digits))


def test_a_label_without_a_name_shows_its_number():
    box = boxes((100, 200, 300, 400))
    for label in (0, 7):
        nameless, named = (
            draw(grey(), box, torch.tensor([label]), n) for n in (NAMES, [f"class {label}"] * 7)
        )
        assert label == 0 or (array(nameless) == array(named)).all()
        assert count(nameless, class_colour(label)) > 100


def test_crowds_are_dashed_and_called_so():
    box, label = boxes((100, 200, 300, 400)), torch.tensor([1])
    crowd = draw(grey(), box, label, ["cat"], crowd=torch.tensor([1]))
    single = draw(grey(), box, label, ["crowd"])
    on_edge = (array(crowd)[220:400, 300] == class_colour(1)).all(axis=1)
    assert 0.4 < on_edge.mean() < 0.8
    assert np.abs(np.diff(on_edge.astype(int))).sum() > 10
    np.testing.assert_array_equal(array(crowd)[182:198], array(single)[182:198])  # the plates are the same


@pytest.mark.parametrize("corner", [(0, 0), (630, 0), (0, 470), (630, 470), (300, 2)])
def test_names_stay_within_the_picture(corner):
    box = boxes((*corner, corner[0] + 9, corner[1] + 9))
    for name in ("horse", NAMES[2]):
        picture = draw(grey(), box, torch.tensor([1]), [name])
        assert count(picture, class_colour(1)) > 300
        middle = draw(grey(), boxes((300, 240, 309, 249)), torch.tensor([1]), [name])
        assert count(picture, (0, 0, 0)) == pytest.approx(count(middle, (0, 0, 0)), rel=0.05)


def test_names_of_boxes_at_one_place_do_not_cover_each_other():
    box = boxes((100, 200, 300, 400))
    alone = [count(draw(grey(), box, torch.tensor([k]), NAMES), (0, 0, 0)) for k in (1, 2)]
    both = draw(grey(), box.repeat(2, 1), torch.tensor([1, 2]), NAMES)
    assert min(alone) > 0
    assert count(both, (0, 0, 0)) == sum(alone)


def test_small_boxes_lie_on_large_ones():
    both = boxes((100, 100, 140, 140), (100, 100, 400, 400))
    picture = draw(grey(), both, torch.tensor([1, 2]), ["", ""])
    assert picture.getpixel((100, 130)) == class_colour(1)
    assert picture.getpixel((100, 300)) == class_colour(2)


def test_boxes_reaching_out_are_drawn_to_the_border():
    picture = draw(grey(), boxes((-50, -1e9, 700, 1e9)), torch.tensor([1]), NAMES)
    assert picture.getpixel((0, 300)) == picture.getpixel((639, 300)) == class_colour(1)


def test_degenerate_and_inverted_boxes():
    points = boxes((50, 100, 50, 100), (640, 480, 640, 480), (0, 0, 0, 0))
    assert count(draw(grey(), points, torch.tensor([1, 1, 1]), NAMES), class_colour(1)) > 0
    inverted, proper = (
        draw(grey(), boxes(c), torch.tensor([1]), NAMES) for c in [(300, 400, 100, 200), (100, 200, 300, 400)]
    )
    np.testing.assert_array_equal(array(inverted), array(proper))


def test_what_cannot_be_drawn_is_counted():
    inf, nan = float("inf"), float("nan")
    bad = boxes((nan, 0, 9, 9), (0, 0, inf, 9), (700, 10, 800, 20), (-9, -9, -5, -5))
    picture = draw(grey(), bad, torch.ones(4, dtype=torch.int64), NAMES, torch.tensor([nan, 0, 0.5, 1]))
    assert count(picture, class_colour(1)) == 0
    x0, y0, x1, y1 = painted(picture)
    assert x0 == 0
    assert y0 > 440
    assert y1 == 479
    assert 60 < x1 < 250


def test_eighty_classes_have_eighty_colours():
    colours = [class_colour(k) for k in range(1, 81)]
    assert len(set(colours)) == 80
    lightness = [colorsys.rgb_to_hls(*(v / 255 for v in c))[1] for c in colours]
    assert min(lightness) > 0.2  # all show on dark ground beside the dark edge
    apart = np.linalg.norm(np.array(colours[:8])[:, None] - np.array(colours[:8]), axis=2) + 999 * np.eye(8)
    assert apart.min() > 60
    corners = torch.rand(80, 4) * 480
    names = [f"class number {k}" for k in range(80)]
    picture = draw(grey(), corners, torch.arange(1, 81), names, torch.rand(80), torch.rand(80) > 0.5)
    assert picture.size == (640, 480)


def test_wrong_lengths_are_errors():
    with pytest.raises(ValueError, match="zip"):
        draw(grey(), boxes((0, 0, 9, 9)), torch.tensor([1, 2]), NAMES)


def test_side_by_side_shows_both_under_titles():
    left, right = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (100, 80), "blue")
    sheet = side_by_side(left, right, ("truth", NAMES[2]))
    assert count(sheet, (255, 0, 0)) == 60 * 40
    assert count(sheet, (0, 0, 255)) == 100 * 80
    header = array(sheet)[: sheet.height - 80]
    assert (header[:, :60] == INK).all(axis=2).sum() > 10
    assert (header[:, 66:] == INK).all(axis=2).sum() > 10
    assert side_by_side(left, left).height == sheet.height - 40


def test_contact_sheet_holds_every_picture_whole():
    colours = [(10 * k, 0, 255 - 10 * k) for k in range(5)]
    pictures = [Image.new("RGB", (30 + k, 20 + k), c) for k, c in enumerate(colours)]
    sheet = contact_sheet(pictures, columns=2)
    for picture, colour in zip(pictures, colours, strict=True):
        assert count(sheet, colour) == picture.width * picture.height
    assert count(sheet, PAPER) > 0
    assert sheet.width < 3 * 34 < 4 * 34 - 34 + sheet.height
    first = [np.argwhere((array(sheet) == c).all(axis=2))[0] for c in colours]
    assert first[0][0] < first[2][0] < first[4][0]  # three rows
    assert first[0][1] < first[1][1]  # two columns


def test_contact_sheet_of_few_and_of_none():
    one = contact_sheet([Image.new("RGB", (30, 20), "red")], columns=4)
    assert one.width < 60
    assert count(contact_sheet([]), PAPER) > 0


def test_save_png_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "pictures" / "a.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    save_png(image, path)
    np.testing.assert_array_equal(array(Image.open(path)), array(image))
    before = path.read_bytes()

    def fail(self, file, format):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(image, path)
    assert path.read_bytes() == before
    assert [p.name for p in Path(path.parent).iterdir()] == ["a.png"]
