"""Pictures, judged by their pixels."""

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from tasks.drawing.pictures import (
    HATCH,
    INK,
    PAPER,
    RIGHT,
    WRONG,
    captioned,
    class_colour,
    contact_sheet,
    draw,
    draw_classes,
    save_jpeg,
    save_png,
    side_by_side,
)

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
    assert picture.width == 640


def test_wrong_lengths_are_errors():
    with pytest.raises(ValueError, match="zip"):
        draw(grey(), boxes((0, 0, 9, 9)), torch.tensor([1, 2]), NAMES)


def disc(height: int, width: int, x: int, y: int, radius: int) -> torch.Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).to(torch.uint8)


def test_a_mask_is_tinted_and_outlined_where_it_is():
    mask = disc(480, 640, 300, 200, 50)
    box = boxes((240, 140, 360, 260))
    picture = array(draw(grey(), box, torch.tensor([2]), [""], masks=mask[None]))
    colour = np.array(class_colour(2))
    inside = (0.55 * np.array(GREY) + 0.45 * colour).astype(np.uint8)
    np.testing.assert_array_equal(picture[200, 300], inside)
    np.testing.assert_array_equal(picture[200, 250], colour)  # its leftmost pixel
    np.testing.assert_array_equal(picture[200, 248], GREY)
    changed = (picture[145:255, 245:355] != GREY).any(axis=2)
    np.testing.assert_array_equal(changed, mask[145:255, 245:355].bool().numpy())


def test_run_length_codes_and_booleans_are_masks_too():
    masks = torch.stack([disc(120, 160, 50, 50, 30), disc(120, 160, 80, 60, 40)])
    box, labels = boxes((20, 20, 81, 81), (40, 20, 121, 101)), torch.tensor([1, 1])
    codes = [rle.encode(np.asfortranarray(mask.numpy())) for mask in masks]
    drawn = draw(grey(120, 160), box, labels, NAMES, masks=masks)
    for other in (masks.bool(), codes):
        np.testing.assert_array_equal(
            array(draw(grey(120, 160), box, labels, NAMES, masks=other)), array(drawn)
        )


def test_objects_of_one_class_have_different_tints():
    masks = torch.stack([disc(480, 640, x, 200, 40) for x in (100, 250, 400)])
    box = boxes(*((x - 50, 150, x + 50, 250) for x in (100, 250, 400)))
    picture = array(draw(grey(), box, torch.tensor([3, 3, 3]), [""] * 3, masks=masks))
    assert len({tuple(picture[200, x]) for x in (100, 250, 400)}) == 3
    assert {tuple(picture[200, x - 40]) for x in (100, 250, 400)} == {class_colour(3)}


def test_masks_grow_with_the_image_and_empty_ones_do_no_harm():
    masks = torch.zeros(2, 48, 64, dtype=torch.uint8)
    masks[0, 10:20, 30:40] = 1
    box = boxes((30, 10, 40, 20), (0, 0, 64, 48))
    picture = array(draw(grey(48, 64), box, torch.tensor([1, 1]), ["", ""], masks=masks))
    factor = picture.shape[1] // 64
    assert (picture[15 * factor, 35 * factor] != GREY).any()
    assert tuple(picture[15 * factor, 45 * factor]) == GREY


def test_a_mask_of_another_size_is_an_error():
    for masks in (torch.ones(1, 20, 30), [rle.encode(np.ones((20, 30), dtype=np.uint8, order="F"))]):
        with pytest.raises(ValueError, match="20×30 for an image of 480×640"):
            draw(grey(), boxes((0, 0, 9, 9)), torch.tensor([1]), NAMES, masks=masks)


def test_keypoints_are_joined_where_they_are_visible():
    nan = float("nan")
    points = torch.tensor([[[100, 100, 2], [200, 100, 1], [300, 300, 0], [nan, 9, 1], [1e30, 9, 1]]])
    edges = [(0, 1), (1, 2), (1, 3), (1, 4)]
    args = grey(), boxes((400, 400, 470, 470)), torch.tensor([1]), [""]
    picture, bare = array(draw(*args, keypoints=points, edges=edges)), array(draw(*args))
    assert tuple(picture[100, 150]) == class_colour(1)
    assert tuple(picture[100, 100]) == tuple(picture[100, 200]) == PAPER
    y, x = np.nonzero((picture != bare).any(axis=2))
    assert (x.min(), x.max()) == pytest.approx((98, 203), abs=2)  # the dots, and the line between them
    assert (y.min(), y.max()) == pytest.approx((98, 103), abs=2)
    dots = array(draw(*args, keypoints=points))
    assert tuple(dots[100, 150]) == GREY


def test_strokes_grow_with_large_images():
    small, large = (
        draw(grey(side, side), boxes((side / 4,) * 2 + (side / 2,) * 2), torch.tensor([1]), ["cat"])
        for side in (1000, 3000)
    )
    assert large.size == (3000, 3000)
    assert count(large, class_colour(1)) == pytest.approx(9 * count(small, class_colour(1)), rel=0.1)


def test_where_names_would_hide_the_image_a_legend_counts_the_classes():
    box = torch.rand(90, 4, generator=torch.Generator().manual_seed(0)) * 400
    labels = torch.tensor([1] * 60 + [2] * 30)
    picture = draw(grey(), box, labels, ["cell", "nucleus"], torch.rand(90))
    assert picture.height > 480
    strip = array(picture)[480:]
    for label in (1, 2):
        assert (strip == class_colour(label)).all(axis=2).sum() > 50
    few = draw(grey(), box[:5], labels[:5], ["cell", "nucleus"])
    assert few.size == (640, 480)


def test_classes_of_pixels():
    classes = torch.zeros(480, 640, dtype=torch.uint8)
    classes[100:200, 100:300] = 1
    classes[300:400, 400:600] = 255
    picture = array(draw_classes(grey(), classes, ["sky", "road"]))
    for (y, x), label in (((50, 50), 1), ((150, 200), 2)):
        tinted = (0.55 * np.array(GREY) + 0.45 * np.array(class_colour(label))).astype(np.uint8)
        np.testing.assert_array_equal(picture[y, x], tinted)
    hatched = picture[300:400, 400:600]
    share = (hatched == HATCH).all(axis=2).mean()
    assert 0.4 < share < 0.6
    assert ((hatched == HATCH) | (hatched == GREY)).all(axis=2).all()
    legend = picture[480:]
    for colour in (class_colour(1), class_colour(2), HATCH):
        assert (legend == colour).all(axis=2).sum() > 50


def test_a_background_keeps_the_colours_of_the_image():
    classes = torch.zeros(480, 640, dtype=torch.uint8)
    classes[100:200, 100:300] = 1
    picture = array(draw_classes(grey(), classes, ["background", "cat"]))
    changed = (picture[:480] != GREY).any(axis=2)
    np.testing.assert_array_equal(changed, classes.bool().numpy())


@pytest.mark.parametrize("ground", [(), ("background",)])
def test_a_class_has_one_colour_as_an_object_and_in_a_map(ground):
    for label in range(1, 3):
        mask = disc(480, 640, 300, 200, 50)
        classes = torch.where(mask.bool(), label - 1 + len(ground), 255).to(torch.uint8)
        as_map = array(draw_classes(grey(), classes, [*ground, *NAMES]))
        as_object = array(draw(grey(), boxes((0, 0, 9, 9)), torch.tensor([label]), NAMES, masks=mask[None]))
        for x in (250, 300):  # its edge and its middle
            np.testing.assert_array_equal(as_map[200, x], as_object[200, x])


def test_a_class_map_of_another_size_is_brought_to_the_image_by_its_nearest_pixels():
    classes = torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8)
    small = array(draw_classes(grey(), classes, ["background", "a", "b"]))
    full = classes.repeat_interleave(240, 0).repeat_interleave(320, 1)
    np.testing.assert_array_equal(small, array(draw_classes(grey(), full, ["background", "a", "b"])))


def test_many_classes_and_such_without_a_name():
    classes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    picture = draw_classes(grey(), classes, ["one"])
    assert picture.width == 640
    assert 480 < picture.height < 2 * 480


@pytest.mark.parametrize(("right", "edge"), [(True, RIGHT), (False, WRONG), (None, PAPER)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (600, 20), (300, 700)])
def test_captions(height, width, right, edge):
    image = grey(height, width)
    picture = captioned(image, NAMES[2], right)
    factor = max(1, math.ceil(480 / max(height, width)))
    assert count(picture, GREY) == pytest.approx(height * width * factor**2, rel=0.01)  # but for the text
    for corner in ((0, 0), (picture.width - 1, picture.height - 1)):
        assert picture.getpixel(corner) == edge
    assert count(picture, INK) > 100  # some of the text
    short = captioned(image, "", right)
    mark = array(short)[4:-4, 4:-4]
    assert ((mark == edge).all(axis=2).sum() > 20) or right is None


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

    def fail(self, file, **settings):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(image, path)
    assert path.read_bytes() == before
    assert [p.name for p in Path(path.parent).iterdir()] == ["a.png"]


def test_jpegs_are_jpegs(tmp_path):
    save_jpeg(Image.new("RGB", (64, 48), "red"), tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
