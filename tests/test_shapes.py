"""The embedded dataset, judged from its files by pycocotools and by counting anew."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from resnext_backbones.errors import UsageError
from tasks.data import shapes
from tasks.data.outlines import polygons
from tasks.data.shapes import write_shapes
from tasks.data.shapes_draw import CLASSES, scene

COUNTS = {"train": 120, "val": 40, "test": 60}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", seed=3, **COUNTS)


@pytest.fixture(scope="module")
def coco(root) -> COCO:
    return COCO(root / "annotations" / "instances_train.json")


def pixels(root: Path, coco: COCO, image_id: int) -> np.ndarray:
    return np.asarray(Image.open(root / "train" / coco.imgs[image_id]["file_name"]).convert("RGB"))


def objects(coco: COCO, image_id: int) -> list[dict]:
    return sorted(coco.imgToAnns[image_id], key=lambda a: a["id"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is in it --------------------------------------------------------------------------------------


def test_layout(root):
    for split, count in COUNTS.items():
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
        assert sorted(p.name for p in (root / split).iterdir()) == [i["file_name"] for i in content["images"]]
        for image in content["images"]:
            size = Image.open(root / split / image["file_name"]).size
            assert size == (image["width"], image["height"]) == (128, 128)
        ids = [annotation["id"] for annotation in content["annotations"]]
        assert len(set(ids)) == len(ids)
        assert content["categories"][0]["name"] == "circle"
        assert [c["id"] for c in content["categories"]] == list(range(1, len(CLASSES) + 1))


def test_a_newcomer_gets_128_pixels_and_at_least_150_test_images():
    defaults = {name: p.default for name, p in inspect.signature(write_shapes).parameters.items()}
    assert defaults["test"] >= 150
    assert defaults["image_size"] == 128


def test_mask_box_and_area_agree_for_pycocotools(coco):
    for annotation in coco.anns.values():
        encoded = coco.annToRLE(annotation)
        assert rle.area(encoded) == annotation["area"] > 0
        assert rle.toBbox(encoded).tolist() == annotation["bbox"]
        y, x = np.nonzero(rle.decode(encoded))
        extent = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        assert extent == annotation["bbox"]
        assert isinstance(annotation["segmentation"], dict if annotation["iscrowd"] else list)


def test_masks_of_an_image_are_disjoint(coco):
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in objects(coco, image_id)]
        assert np.sum(masks, axis=0).max() <= 1 if masks else True


def test_every_class_is_common_and_sides_are_8_to_96(coco):
    single = [a for a in coco.anns.values() if not a["iscrowd"]]
    sides = np.array([max(a["bbox"][2:]) for a in single])
    assert sides.min() >= 8
    assert sides.max() <= 96
    assert np.mean((sides >= 16) & (sides <= 64)) > 0.7
    assert sides.min() < 14 < 60 < sides.max()  # the whole range is used
    counts = np.bincount([a["category_id"] for a in single], minlength=len(CLASSES) + 1)[1:]
    assert len(counts) >= 6
    assert counts.min() > 0.5 * counts.mean()


def test_a_twentieth_is_empty_and_a_twentieth_crowded(coco):
    empty = [i for i in coco.imgs if not coco.imgToAnns[i]]
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert len(empty) == len(crowds) == len({a["image_id"] for a in crowds}) == COUNTS["train"] // 20
    for crowd in crowds:
        assert isinstance(crowd["segmentation"]["counts"], list)  # uncompressed, as in COCO's files
        assert sum(crowd["segmentation"]["counts"]) == 128 * 128
        assert crowd["area"] > 300
        assert crowd["num_keypoints"] == 0


def test_at_least_three_in_ten_are_partly_covered_and_none_mostly(coco):
    shown = []
    for image_id in coco.imgs:
        drawn = scene(3, "train", image_id - 1).shapes
        annotated = objects(coco, image_id)
        assert [s.label for s in drawn] == [a["category_id"] for a in annotated]
        for shape, annotation in zip(drawn, annotated, strict=True):
            if annotation["iscrowd"]:
                continue
            whole = [rle.decode(rle.frPyObjects([p.ravel().tolist()], 128, 128))[..., 0] for p in shape.loops]
            outline = (whole[0] - (whole[1] if len(whole) > 1 else 0)).astype(bool)
            seen = coco.annToMask(annotation).astype(bool)
            rim = 2 * sum(annotation["bbox"][2:]) + 8  # the two rasterisers may differ along the edge
            assert (seen & ~outline).sum() <= rim
            shown.append((seen & outline).sum() / outline.sum())
    assert np.mean(np.array(shown) < 0.93) >= 0.3
    assert min(shown) > 0.4


def test_the_topmost_shape_is_seen_whole(coco):
    for image_id in coco.imgs:
        if not (drawn := scene(3, "train", image_id - 1).shapes) or drawn[-1].crowd:
            continue
        points = np.concatenate(drawn[-1].loops).clip(0, 128)
        x, y, width, height = objects(coco, image_id)[-1]["bbox"]
        extent = [*points.min(axis=0), *points.max(axis=0)]
        # the last pixels of a sharp tip are less than half covered
        np.testing.assert_allclose([x, y, x + width, y + height], extent, atol=2.5)


def test_keypoints_are_the_extremes_and_know_what_hides_them(coco):
    for category in coco.cats.values():
        assert category["keypoints"] == ["top", "right", "bottom", "left", "centre"]
        assert all(1 <= i <= 5 for bone in category["skeleton"] for i in bone)
    seen = set()
    for image_id in coco.imgs:
        annotated = objects(coco, image_id)
        for number, annotation in enumerate(annotated):
            points = np.array(annotation["keypoints"]).reshape(5, 3)
            assert annotation["num_keypoints"] == (points[:, 2] > 0).sum()
            if annotation["iscrowd"]:
                continue
            for x, y, v in points:
                seen.add(v)
                if v == 0:
                    assert (x, y) == (0, 0)
                    continue
                near = (slice(max(int(y) - 2, 0), int(y) + 3), slice(max(int(x) - 2, 0), int(x) + 3))
                above = [coco.annToMask(a)[near] for a in annotated[number + 1 :]]
                if v == 1:
                    assert np.any(above)
                else:
                    assert not above or not np.all(np.any(above, axis=0))
            if (points[:, 2] == 2).all():
                x, y, width, height = annotation["bbox"]
                extremes = [points[0, 1], points[1, 0], points[2, 1], points[3, 0]]
                np.testing.assert_allclose(extremes, [y, x + width, y + height, x], atol=2.5)
    assert seen == {0, 1, 2}


def test_the_ground_is_textured_and_shapes_stand_out(root, coco):
    contrast = []
    for image_id in coco.imgs:
        image = pixels(root, coco, image_id).astype(float)
        masks = [coco.annToMask(a).astype(bool) for a in objects(coco, image_id)]
        ground = ~np.any([np.zeros((128, 128), bool), *masks], axis=0)
        blocks = image.mean(axis=2).reshape(16, 8, 16, 8).std(axis=(1, 3))
        bare = ground.reshape(16, 8, 16, 8).all(axis=(1, 3))
        assert blocks[bare].mean() > 1  # nowhere flat: 8 × 8 pixels of ground differ
        contrast += [np.linalg.norm(image[m].mean(axis=0) - image[ground].mean(axis=0)) for m in masks]
    assert np.mean(np.array(contrast) > 40) > 0.9


# --- for the other tasks --------------------------------------------------------------------------------


def test_class_maps_are_what_painting_the_instances_gives(root, coco):
    names = (root / "classes.txt").read_text().splitlines()
    assert names == ["background", *CLASSES]
    for image_id, record in coco.imgs.items():
        painted = np.zeros((128, 128), dtype=np.uint8)
        for annotation in objects(coco, image_id):
            inside = coco.annToMask(annotation).astype(bool)
            painted[inside] = 255 if annotation["iscrowd"] else annotation["category_id"]
        path = (root / "semantic" / "train" / record["file_name"]).with_suffix(".png")
        with Image.open(path) as stored:
            assert stored.mode == "P"
            np.testing.assert_array_equal(np.asarray(stored), painted)
            assert len(set(stored.convert("RGB").get_flattened_data())) == len(np.unique(painted))


def test_class_folders_hold_cuttings_of_the_images(root, coco):
    """Each is found again in its image, where the annotation of its class has the middle."""
    cuttings = sorted((root / "classes" / "train").glob("*/*.png"))
    assert {path.parent.name for path in cuttings} == set(CLASSES)
    number = dict.fromkeys(CLASSES, 0)
    for image_id in coco.imgs:
        drawn = scene(3, "train", image_id - 1)
        annotated = [a for a in objects(coco, image_id) if not a["iscrowd"] and max(a["bbox"][2:]) >= 16]
        for annotation in annotated[:-3:-1]:
            name = CLASSES[annotation["category_id"] - 1]
            number[name] += 1
            with Image.open(root / "classes" / "train" / name / f"{number[name]:06d}.png") as cutting:
                assert cutting.size == (64, 64)
                mean = np.asarray(cutting.convert("RGB"), dtype=float).mean(axis=(0, 1))
            x, y, width, height = annotation["bbox"]
            side = max(width, height)
            # the cutting is 1.2 to 1.7 times as wide as the shape, moved into the image near an edge
            around = [
                drawn.image[top : top + s, left : left + s].mean(axis=(0, 1))
                for s in (min(128, round(side * f)) for f in np.arange(1.2, 1.71, 0.02))
                for left in (int(np.clip(x + (width - s) // 2, 0, 128 - s)),)
                for top in (int(np.clip(y + (height - s) // 2, 0, 128 - s)),)
            ]
            assert min(np.abs(np.array(around) - mean).max(axis=1)) < 3
    assert sum(number.values()) == len(cuttings)


def test_a_newcomer_gets_at_least_40_images_of_each_class():
    """Two shapes of each image, of which some are too small: counted on a tenth of the default's images."""
    cut_out = [label for index in range(100) for label, _ in shapes.cuttings(scene(0, "train", index))]
    assert len(cut_out) > 150
    assert np.bincount(cut_out, minlength=7)[1:].min() >= 4


# --- the polygons ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.booleans()))
def test_polygons_give_back_any_mask(mask):
    parts = polygons(mask)
    drawn = [rle.decode(rle.frPyObjects([p], *mask.shape))[..., 0] for p in parts]
    np.testing.assert_array_equal(np.sum(drawn, axis=0) if drawn else np.zeros(mask.shape), mask)
    for part in parts:
        corners = list(zip(part[::2], part[1::2], strict=True))
        assert len(corners) >= 4
        assert all(a != b for a, b in pairwise([*corners, corners[0]]))


def test_polygons_of_two_parts_and_of_a_hole():
    mask = np.zeros((7, 9), dtype=bool)
    mask[1:6, 1:6] = True
    mask[2:5, 2:5] = False
    mask[0, 8] = True
    ring, dot = sorted(polygons(mask), key=len, reverse=True)
    assert set(zip(dot[::2], dot[1::2], strict=True)) == {(8, 0), (9, 0), (9, 1), (8, 1)}
    corners = set(zip(ring[::2], ring[1::2], strict=True))
    assert corners == {(1, 1), (6, 1), (6, 6), (1, 6), (2, 2), (5, 2), (5, 5), (2, 5)}


# --- the files ------------------------------------------------------------------------------------------


def test_two_writes_are_equal_and_seeds_differ(tmp_path):
    small = {"train": 20, "val": 3, "test": 3}
    first, second, other = (
        write_shapes(tmp_path / n, seed, **small) for n, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert files(first) == files(second)
    assert not {v for k, v in files(first).items() if k.endswith(".jpg")} & set(files(other).values())


def test_an_image_does_not_depend_on_how_many_there_are(root, tmp_path):
    few = write_shapes(tmp_path / "few", seed=3, train=7, val=0, test=2)
    cuttings = [str(path.relative_to(few)) for path in few.glob("classes/*/*/*.png")]
    assert len(cuttings) > 10
    for name in ("train/000007.jpg", "test/000002.jpg", "semantic/train/000007.png", *cuttings):
        assert (few / name).read_bytes() == (root / name).read_bytes()


def test_no_image_occurs_twice(root):
    hashes = [hashlib.sha256(p.read_bytes()).digest() for split in COUNTS for p in (root / split).iterdir()]
    assert len(set(hashes)) == len(hashes) == sum(COUNTS.values())


def test_a_finished_dataset_is_left_alone(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write_shapes(root, seed=3, **COUNTS) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_another_dataset_of_shapes_is_not_overwritten(root):
    with pytest.raises(UsageError, match=r"shapes: .*seed 3 instead of 4; delete the folder or give another"):
        write_shapes(root, seed=4, **COUNTS)


def test_a_dataset_of_an_older_version_is_told_apart(tmp_path):
    root, counts = tmp_path / "shapes", {"train": 1, "val": 1, "test": 1}
    write_shapes(root, **counts)
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    before = files(root)
    with pytest.raises(UsageError, match=r"a shapes dataset of version 1 instead of 3; delete the folder"):
        write_shapes(root, **counts)
    assert files(root) == before


@pytest.mark.parametrize("name", ["photo.jpg", "dataset.json"])
def test_foreign_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("[1]")
    with pytest.raises(UsageError, match="holds other files") as caught:
        write_shapes(tmp_path, train=1, val=1, test=1)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {name: b"[1]"}


def test_an_empty_folder_is_filled_and_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "shapes").mkdir()
    write_shapes(tmp_path / "shapes", train=1, val=1, test=1)
    assert (tmp_path / "shapes" / "dataset.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: is a file"):
        write_shapes(tmp_path / "file")
    with pytest.raises(UsageError, match=r"shapes: cannot write .*another data\.root"):
        write_shapes(tmp_path / "file" / "shapes")


def test_too_small_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"image_size 16: .* at least 32"):
        write_shapes(tmp_path / "shapes", image_size=16)
    assert any(s.label for i in range(9) for s in scene(0, "val", i, image_size=32).shapes)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(seed, split, index, size):
        if index == 2:
            raise KeyboardInterrupt
        return scene(seed, split, index, size)

    monkeypatch.setattr(shapes, "scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "shapes", train=5, val=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed_but_not_that_of_a_running_one(tmp_path):
    killed, running = tmp_path / ".shapes-killed.part", tmp_path / ".shapes-running.part"
    for part in (killed, running):
        (part / "train").mkdir(parents=True)
    day_ago = time.time() - 86400
    os.utime(killed, (day_ago, day_ago))
    write_shapes(tmp_path / "shapes", train=1, val=1, test=1)
    assert not killed.exists()
    assert running.exists()


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_dataset(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tasks.data.shapes import write_shapes;"
        "write_shapes(Path(sys.argv[1]), train=60, val=2, test=2)"
    )
    root = tmp_path / "both"
    command = [sys.executable, "-c", code, str(root)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["both"]
    assert files(root) == files(write_shapes(tmp_path / "alone", train=60, val=2, test=2))


def test_the_later_of_two_writers_keeps_the_first_ones_dataset(tmp_path, monkeypatch):
    root, counts = tmp_path / "shapes", {"train": 2, "val": 1, "test": 1}

    def overtaken(seed, split, index, size):
        monkeypatch.undo()
        write_shapes(root, **counts)
        (root / "mark").touch()
        return scene(seed, split, index, size)

    monkeypatch.setattr(shapes, "scene", overtaken)
    assert write_shapes(root, **counts) == root
    assert (root / "mark").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
