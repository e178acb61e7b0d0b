"""Class maps of COCO data: painted from instances, or read from PNG files with category ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco, image, write
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from resnext_backbones.errors import UsageError
from tasks.data.coco import CocoAnnotations, CocoDataset, read_coco
from tasks.data.coco_data import CocoData
from tasks.data.semantic import class_map, read_class_map

CLASSES = [{"id": 9, "name": "b"}, {"id": 2, "name": "a"}, {"id": 40, "name": "c"}]  # labels 2, 1, 3


def rectangle(k: int, category: int, x1: int, y1: int, x2: int, y2: int, **more: Any) -> dict[str, Any]:
    """An annotation whose polygon covers exactly the pixels x1…x2 - 1, y1…y2 - 1."""
    outline = [x1, y1, x2, y1, x2, y2, x1, y2]
    box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
    return annotation(k, box, category_id=category, segmentation=[outline], area=area) | more


def read(folder: Path, annotations: list[dict[str, Any]], **more: Any) -> CocoAnnotations:
    return read_coco(*write(folder, coco(annotations, categories=CLASSES, **more)))


def painted(folder: Path, annotations: list[dict[str, Any]]) -> np.ndarray:
    drawn = class_map(read(folder, annotations), 0)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (HEIGHT, WIDTH)
    return drawn.numpy()


# Painted.


def test_labels_are_painted_on_background(tmp_path: Path) -> None:
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    assert (painted(tmp_path, []) == expected).all()
    expected[2:7, 1:11] = 2
    expected[20:30, 40:60] = 3
    found = painted(tmp_path, [rectangle(1, 9, 1, 2, 11, 7), rectangle(2, 40, 40, 20, 60, 30)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_small_things_lie_on_large_ones_and_all_on_crowds(tmp_path: Path, order: tuple[int, ...]) -> None:
    things = [
        rectangle(1, 2, 0, 0, 20, 20),
        rectangle(2, 9, 5, 5, 15, 15),
        rectangle(3, 40, 8, 8, 10, 10, iscrowd=0),
    ]
    whole = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    crowd = annotation(4, [0, 0, WIDTH, HEIGHT], category_id=2, iscrowd=1, segmentation=whole, area=1)
    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    expected[:20, :20], expected[5:15, 5:15], expected[8:10, 8:10] = 1, 2, 3
    found = painted(tmp_path, [*(things[k] for k in order), crowd])
    np.testing.assert_array_equal(found, expected)


def test_of_equal_things_the_later_one_is_on_top(tmp_path: Path) -> None:
    found = painted(tmp_path, [rectangle(1, 2, 0, 0, 9, 9), rectangle(2, 9, 0, 0, 9, 9)])
    assert (found[:9, :9] == 2).all()


def test_the_area_of_the_file_counts_and_without_it_the_box(tmp_path: Path) -> None:
    """The large one says that it is small."""
    found = painted(tmp_path, [rectangle(1, 2, 0, 0, 20, 20, area=5), rectangle(2, 9, 5, 5, 15, 15)])
    assert (found[:20, :20] == 1).all()
    without = [rectangle(k, c, *box) for k, c, box in [(1, 9, (5, 5, 15, 15)), (2, 2, (0, 0, 20, 20))]]
    for record in without:
        del record["area"]
    assert (painted(tmp_path, without)[5:15, 5:15] == 2).all()


def test_of_what_cannot_be_drawn_the_box_is_ignored(tmp_path: Path) -> None:
    wrong: list[Any] = [
        None,
        [],
        [[1, 2, 3, 4]],
        [[0, 0, 9, 0, 1e9, 9]],
        "?",
        {"size": [1, 1], "counts": [0, 1]},
    ]
    faulty = [annotation(k, category_id=2, segmentation=s) for k, s in enumerate(wrong, start=2)]
    found = painted(tmp_path, [annotation(1, category_id=2), *faulty, rectangle(50, 9, 0, 0, 5, 5)])
    assert (found == 255).sum() == 20 * 10  # the box of `annotation`, the same for all
    assert (found == 2).sum() == 25


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_maps_are_those_that_pycocotools_paints(real_data: Path, split: str) -> None:
    path = real_data / f"coco33/annotations/instances_{split}.json"
    ours, theirs = read_coco(path, real_data / "coco33" / split), COCO(str(path))
    label = {category: k for k, category in enumerate(sorted(theirs.getCatIds()), start=1)}
    crowds = 0
    for index, image_id in enumerate(ours.image_ids.tolist()):
        info = theirs.loadImgs(image_id)[0]
        expected = np.zeros((info["height"], info["width"]), np.uint8)
        records = theirs.loadAnns(theirs.getAnnIds(image_id))
        for a in sorted(records, key=lambda a: (not a["iscrowd"], -a["area"])):
            expected[rle.decode(theirs.annToRLE(a)) == 1] = 255 if a["iscrowd"] else label[a["category_id"]]
            crowds += a["iscrowd"]
        np.testing.assert_array_equal(class_map(ours, index).numpy(), expected)
    assert split == "val2017" or crowds > 0


def test_crowds_are_ignored_in_training_too(tmp_path: Path) -> None:
    """Learned as background they would be what a network is punished for finding."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, 50 * HEIGHT]}  # ten columns at the left
    annotations = [
        rectangle(1, 9, 20, 0, 30, 10),
        annotation(2, [0, 0, 10, HEIGHT], category_id=2, iscrowd=1, segmentation=crowd),
        annotation(3, [0, 0, 10, HEIGHT], image_id=2, category_id=2, iscrowd=1, segmentation=crowd),
    ]
    read(tmp_path, annotations, images=[image(1), image(2)])
    where = {"annotations": "annotations.json", "images": "images"}
    data = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
    train, val = data.dataset("train"), data.dataset("val")
    assert len(train) == len(val) == 2
    for index in range(2):
        learned, judged = train.load(index)[1], val.load(index)[1]
        assert torch.equal(learned["semantic"], judged["semantic"])
        assert (judged["semantic"][:, :10] == 255).all()
        assert not (judged["semantic"][:, 10:20]).any()
        assert "original_semantic" in judged
        assert "original_semantic" not in learned


def test_a_faulty_box_takes_no_pixel_from_its_class_map(tmp_path: Path) -> None:
    """The box is of no use here, the outline is what is painted."""
    annotations = [rectangle(k, 9, 20, 0, 30, 10, bbox=[20, 0, 0, 0]) for k in range(1, 9)]
    read(tmp_path, annotations)
    where = {"annotations": "annotations.json", "images": "images"}
    data = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
    data.setup("fit")
    assert (data.dataset("train").load(0)[1]["semantic"][:10, 20:30] == 2).all()


# From PNG files.


def png(folder: Path, values: Any, name: str = "1.png", mode: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.array(values, np.uint8))
    if mode == "P":
        picture.putpalette([7, 8, 9] * 256)
    picture.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "P"])
def test_values_are_category_ids(tmp_path: Path, mode: str) -> None:
    """With gaps; 0 and 255 are ignored; label k is class k - 1, since nothing is added as background."""
    values = [[2, 9, 40], [0, 255, 9]]
    found = read_class_map(png(tmp_path, values, mode=mode), read(tmp_path, []), (2, 3))
    assert found.dtype == torch.uint8
    assert found.tolist() == [[0, 1, 2], [255, 255, 1]]


def test_a_category_may_have_the_id_0(tmp_path: Path) -> None:
    zero = [{"id": 0, "name": "ground"}, {"id": 7, "name": "x"}]
    annotations = read_coco(*write(tmp_path, coco([], categories=zero)))
    assert read_class_map(png(tmp_path, [[0, 7, 255]]), annotations, (1, 3)).tolist() == [[0, 1, 255]]


def test_a_category_of_a_larger_id_than_a_png_holds_is_of_no_harm(tmp_path: Path) -> None:
    large = [{"id": 7, "name": "x"}, {"id": 1203, "name": "y"}]
    painted_ = [annotation(1, category_id=1203, segmentation=[[0, 0, 9, 0, 9, 9, 0, 9]])]
    write(tmp_path, coco(painted_, categories=large))
    where = {"annotations": "annotations.json", "images": "images"}
    data = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
    data.setup("fit")  # painted, only their number counts
    assert data.names == ["background", "x", "y"]
    assert (data.dataset("val").load(0)[1]["semantic"][:9, :9] == 2).all()


@pytest.mark.parametrize("category", [255, 256, 1203])
def test_category_ids_that_a_png_cannot_hold_are_refused(tmp_path: Path, category: int) -> None:
    write(tmp_path, coco([], categories=[{"id": 1, "name": "x"}, {"id": category, "name": "y"}]))
    png(tmp_path / "maps", np.ones((HEIGHT, WIDTH)))
    where = {"annotations": "annotations.json", "images": "images", "semantic": "maps"}
    with pytest.raises(UsageError, match=r"class maps hold 255 classes at most, with ids below"):
        CocoData(str(tmp_path), where, where, target="semantic", num_workers=0).setup("fit")


def test_255_classes_can_be_painted_and_256_cannot(tmp_path: Path) -> None:
    where = {"annotations": "annotations.json", "images": "images"}
    for number, fits in ((254, True), (255, False)):  # and the background
        write(tmp_path, coco(categories=[{"id": k, "name": f"c{k}"} for k in range(1, number + 1)]))
        data = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
        if fits:
            data.setup("fit")
        else:
            with pytest.raises(UsageError, match="255 classes at most"):
                data.setup("fit")


def test_what_is_no_category_is_named(tmp_path: Path) -> None:
    path = png(tmp_path, [[2, 3, 77, 0]])
    with pytest.raises(UsageError) as caught:
        read_class_map(path, read(tmp_path, []), (1, 4))
    assert str(caught.value).startswith(f"{path}: values 3; 77 are no category ids of {tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_map_of_another_size_than_its_image_is_refused(tmp_path: Path) -> None:
    path = png(tmp_path, np.zeros((HEIGHT, WIDTH)))
    with pytest.raises(UsageError, match=f"{HEIGHT}×{WIDTH}, its image is {WIDTH}×{HEIGHT}"):
        read_class_map(path, read(tmp_path, []), (WIDTH, HEIGHT))


def test_a_file_is_found_by_its_image_and_a_missing_one_is_named(tmp_path: Path) -> None:
    annotations = read(tmp_path, [], images=[image(1, "a/1.jpg"), image(2, "b/2.png")])
    png(tmp_path / "maps", np.full((HEIGHT, WIDTH), 40), "a/1.png")
    dataset = CocoDataset(annotations, "val", training=False, target="semantic", class_maps=tmp_path / "maps")
    _, target = dataset.load(0)
    assert (target["semantic"] == 2).all()
    assert torch.equal(target["original_semantic"], target["semantic"])
    with pytest.raises(UsageError, match=r"val: image 2 'b/2\.png': .*maps/b/2\.png"):
        dataset.load(1)


@pytest.mark.parametrize("content", [b"", b"no image", "colour"])
def test_a_file_that_is_no_map_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "1.png"
    if content == "colour":
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"1\.png"):
        read_class_map(path, read(tmp_path, []), (HEIGHT, WIDTH))


def test_maps_need_no_annotated_object(tmp_path: Path) -> None:
    """A file of images and categories is enough where the pixels stand in PNG files."""
    write(tmp_path, coco([], categories=CLASSES))
    png(tmp_path / "maps", np.full((HEIGHT, WIDTH), 9))
    where = {"annotations": "annotations.json", "images": "images", "semantic": "maps"}
    data = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
    data.setup("fit")
    assert (data.dataset("train").load(0)[1]["semantic"] == 1).all()


# The classes' names.


def test_background_comes_first_where_maps_are_painted(tmp_path: Path) -> None:
    write(tmp_path, coco([rectangle(1, 9, 0, 0, 9, 9)], categories=CLASSES))
    where = {"annotations": "annotations.json", "images": "images"}
    painted_ = CocoData(str(tmp_path), where, where, target="semantic", num_workers=0)
    assert painted_.names == ["background", "a", "b", "c"]
    assert painted_.model_arguments == {"num_classes": 4}
    given = {**where, "semantic": "maps"}
    read_ = CocoData(str(tmp_path), given, given, target="semantic", num_workers=0)
    assert read_.names == ["a", "b", "c"]
    assert read_.model_arguments == {"num_classes": 3}
    boxes = CocoData(str(tmp_path), where, where, target="boxes", num_workers=0)
    assert boxes.names == ["a", "b", "c"]


def test_painted_and_given_maps_do_not_mix(tmp_path: Path) -> None:
    """One has a background as class 0 and the other has none: all classes would be one off."""
    write(tmp_path, coco([rectangle(1, 9, 0, 0, 9, 9)], categories=CLASSES))
    png(tmp_path / "maps", np.full((HEIGHT, WIDTH), 9))
    where = {"annotations": "annotations.json", "images": "images"}
    given = {**where, "semantic": "maps"}
    for train, val in ((where, given), (given, where)):
        data = CocoData(str(tmp_path), train, val, target="semantic", num_workers=0)
        with pytest.raises(UsageError, match=r"data\.val.*semantic"):
            data.setup("fit")


def test_the_embedded_maps_are_those_that_are_painted(tiny_shapes: list[str]) -> None:
    """Drawn as pixels, not from the polygons: on few pixels, in the thick of it, do they differ."""
    root = Path(tiny_shapes[0].partition("=")[2])
    path = root / "annotations/instances_val.json"
    annotations = read_coco(path, root / "val")
    ids = [c["id"] for c in json.loads(path.read_text())["categories"]]
    assert annotations.category_ids == sorted(ids)
    same = []
    for index in range(len(annotations)):
        name = Path(annotations.file_name(index)).with_suffix(".png").name
        expected = np.asarray(Image.open(root / "semantic/val" / name))
        same.append((class_map(annotations, index).numpy() == expected).mean())
    assert min(same) > 0.98
