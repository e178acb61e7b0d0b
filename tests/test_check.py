"""What a dataset's check and the lines at a run's start report; segmentations and workers that misbehave."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco, image, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from tasks.data.check import check_dataset, start_report
from tasks.data.coco import CocoDataset, part_of, read_coco
from tasks.data.keypoints import skeleton_of
from tasks.data.pool import Crashed, spread
from tasks.data.segmentations import decompress, segmentation_fault

SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def dataset(folder: Path, document: Any, training: bool = False) -> CocoDataset:
    return CocoDataset(read_coco(*write(folder, document)), "val", training=training)


# Segmentations.


def fault_of(value: Any) -> str | None:
    return segmentation_fault(json.dumps(value).encode(), HEIGHT, WIDTH)


@pytest.mark.parametrize("value", [None, SQUARE, [*SQUARE, [1, 1, 5, 1, 5, 5.5]], [[-5, -5, 65, -5, 65, 45]]])
def test_good_polygons_have_no_fault(value: Any) -> None:
    assert fault_of(value) is None


def test_no_segmentation_is_no_fault() -> None:
    assert segmentation_fault(b"", HEIGHT, WIDTH) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "without a polygon"),
        ([[]], "fewer than three points"),
        ([[1, 1]], "fewer than three points"),
        ([[1, 1, 5, 5]], "fewer than three points"),
        ([[1, 1, 5, 1, 5, 5, 1]], "odd number"),
        ([1, 1, 5, 5], "not in lists of their own"),
        ([*SQUARE, []], "fewer than three points"),
        ([[1, 1, 5, 1, 5, "5"]], "other than numbers"),
        ([[1, 1, 5, 1, 5, None]], "other than numbers"),
        ([[1, 1, 5, 1, 5, True]], "other than numbers"),
        ([[1, 1, 5, 1, 5, 1e9]], "far outside"),
        ([[1, 1, 5, 1, -61, 5]], "far outside"),
        ([[1, 1, 5, 1, 5, 81]], "far outside"),
        ([[10**400, 1, 5, 1, 5, 5]], "far outside"),
        ([[-9, -9, -5, -9, -5, -5]], "cover no pixel"),
        ("abc", "neither polygons nor"),
        (7, "neither polygons nor"),
    ],
)
def test_faulty_polygons_are_told_apart_and_never_drawn(value: Any, expected: str) -> None:
    start = time.monotonic()
    fault = fault_of(value)
    assert fault is not None
    assert expected in fault
    assert time.monotonic() - start < 1


def mask(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.random(), dtype=np.uint8)


@pytest.mark.parametrize("seed", range(10))
def test_run_lengths_are_decompressed_as_the_mask_itself_counts_them(seed: int) -> None:
    flat = mask(seed).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    if flat[0]:
        runs = [0, *runs]
    assert decompress(rle.encode(mask(seed))["counts"].decode()) == runs


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_for_run_lengths_is_judged(text: str) -> None:
    runs = decompress(text)
    assert runs is None or all(type(run) is int for run in runs)
    assert fault_of({"size": [HEIGHT, WIDTH], "counts": text}) != ""


def test_good_run_lengths_have_no_fault() -> None:
    packed = rle.encode(mask())["counts"].decode()
    assert fault_of({"size": [HEIGHT, WIDTH], "counts": packed}) is None
    assert fault_of({"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}) is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ({"counts": [HEIGHT * WIDTH]}, "another size"),
        ({"size": [WIDTH, HEIGHT], "counts": rle.encode(mask())["counts"].decode()}, "another size"),
        ({"size": [HEIGHT, WIDTH]}, "cannot be read"),
        ({"size": [HEIGHT, WIDTH], "counts": "garbage!"}, "cannot be read"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, -5, HEIGHT * WIDTH - 5]}, "cannot be read"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 5.0, HEIGHT * WIDTH - 15]}, "cannot be read"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 5]}, "another length"),
        ({"size": [HEIGHT, WIDTH], "counts": "04"}, "another length"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "covers no pixel"),
    ],
)
def test_faulty_run_lengths_are_told_apart(code: dict[str, Any], expected: str) -> None:
    assert expected in (fault_of(code) or "")


@pytest.mark.parametrize("name", ["coco33/annotations/instances_val2017.json", "fruits_nuts/trainval.json"])
def test_real_segmentations_are_without_fault(real_data: Path, name: str) -> None:
    document = json.loads((real_data / name).read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in document["images"]}
    for record in document["annotations"]:
        text = json.dumps(record["segmentation"]).encode()
        assert segmentation_fault(text, *sizes[record["image_id"]]) is None


# Workers.


def _job(item: Any) -> Any:
    if item == "die":
        os._exit(3)
    if item == "hang":
        time.sleep(60)
    if item == "raise":
        raise ValueError("no")
    return item * 2


def test_every_item_gets_a_result_though_workers_die_and_hang() -> None:
    items = [1, "die", 2, "hang", 3, "die", *range(10, 30)]
    start = time.monotonic()
    results = dict(spread(_job, items, workers=2, timeout=2.0))
    assert time.monotonic() - start < 20
    assert sorted(results) == list(range(len(items)))
    assert "ended with code 3" in results[1]
    assert "no result within 2 s" in results[3]
    assert isinstance(results[5], Crashed)
    good = {k: v for k, v in results.items() if not isinstance(v, Crashed)}
    assert good == {k: item * 2 for k, item in enumerate(items) if isinstance(item, int)}


def test_an_exception_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="no"):
        list(spread(_job, [1, "raise", 2], workers=1, timeout=30.0))


def test_nothing_to_do_needs_no_worker() -> None:
    assert list(spread(_job, [], workers=4, timeout=1.0)) == []


# The lines at the start of a run.


def test_the_start_of_a_run_says_what_is_known(tmp_path: Path) -> None:
    document = coco(
        [
            annotation(1),
            annotation(2, iscrowd=1),
            annotation(9, bbox=[1, 1, 0, 5]),
            annotation(4, image_id=3),
        ],
        images=[image(k) for k in (1, 2, 3)],
        categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    )
    annotations = read_coco(*write(tmp_path, document))
    assert start_report({"train": annotations.clean(), "val": annotations}).splitlines() == [
        "train: 3 images (1 without objects), 2 objects of 1 of 2 classes, 1 crowd left out",
        f"warning: {tmp_path / 'annotations.json'}:",
        "  dropped 1 annotation: box without area (id 9)",
        "val: 3 images (1 without objects), 3 objects of 1 of 2 classes, 1 crowd",
        f"warning: {tmp_path / 'annotations.json'}:",
        "  kept 1 annotation: box without area (id 9)",
    ]


# The check of all images and annotations.


def test_a_good_dataset_passes_and_is_pictured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = coco(
        [annotation(k, image_id=k, segmentation=SQUARE) for k in range(20)],
        images=[image(k) for k in range(20)],
    )
    report = check_dataset({"val": dataset(tmp_path, document)}, tmp_path / "out", workers=2)
    assert report.ok
    assert report.faults == {"val": []}
    assert capsys.readouterr().out.strip() == report.text.strip()
    assert "val: 20 images (0 without objects), 20 objects of 1 of 1 classes, 0 crowds" in report.text
    with Image.open(report.pictures["val"]) as sheet:
        assert report.pictures["val"] == tmp_path / "out/check_val.png"
        assert sheet.width > 4 * WIDTH
        assert (
            len(np.unique(np.array(sheet).reshape(-1, 3), axis=0)) > 2
        )  # boxes are drawn on the grey images


def test_class_and_size_statistics(tmp_path: Path) -> None:
    document = coco(
        [
            annotation(1, area=32**2 - 1),
            annotation(2, area=32**2),
            annotation(3, area=96**2),
            annotation(4, area=96**2 + 1, image_id=2),
            annotation(5, category_id=2, image_id=2, area=5),
            annotation(6, category_id=2, iscrowd=1),
        ],
        images=[image(1), image(2, width=80)],
        categories=[{"id": k, "name": n} for k, n in enumerate(("[red]", "b", "c"), start=1)],
    )
    text = check_dataset({"val": dataset(tmp_path, document)}, tmp_path, workers=1).text
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["[red]", "4", "2", "1", "2", "1"],
        ["b", "1", "1", "1", "0", "0"],
        ["all", "5", "2", "2", "2", "1"],
    ]
    assert "images: 60–80 wide, 40–40 high, 2 sizes; 2–3 objects each" in text
    assert "1 of 3 classes without an object: c" in text


def test_images_that_stop_a_run_are_named(tmp_path: Path) -> None:
    document = coco([annotation(k, image_id=k) for k in range(5)], images=[image(k) for k in range(5)])
    path, images = write(tmp_path, document)
    (images / "1.png").write_bytes(b"")
    (images / "2.png").write_bytes(b"<html>")
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(images / "3.png")
    found = CocoDataset(read_coco(path, images), "val", training=False)
    report = check_dataset({"val": found}, tmp_path, workers=2)
    assert not report.ok
    assert [(f.kind, f.count, f.ids) for f in report.faults["val"]] == [
        ("image that cannot be used", 3, (1, 2, 3))
    ]
    for line in ("val: image 1 '1.png': ", "a web page", "its annotations 40×60"):
        assert line in report.text


def test_a_dataset_without_one_usable_image_is_reported(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco())
    (images / "1.png").write_bytes(b"")
    report = check_dataset({"val": CocoDataset(read_coco(path, images), "val", training=False)}, tmp_path, 1)
    assert not report.ok
    assert report.pictures == {}


def test_faulty_segmentations_are_named_by_kind_and_cost_no_time(tmp_path: Path) -> None:
    document = coco(
        [
            annotation(1, segmentation=SQUARE),
            annotation(2, segmentation=[[0, 0, 1e9, 0, 5, 5]]),
            annotation(3, segmentation=[[0, 0, 5, 5]]),
            annotation(4, segmentation=[[0, 0, 5, 5]]),
            annotation(5, segmentation={"size": [1, 2], "counts": [2]}),
        ]
    )
    start = time.monotonic()
    report = check_dataset({"val": dataset(tmp_path, document)}, tmp_path, workers=1)
    assert time.monotonic() - start < 10
    assert report.ok  # boxes are learned and judged without them
    assert {f.kind: f.ids for f in report.faults["val"]} == {
        "mask of another size than its image": (5,),
        "polygon of fewer than three points": (3, 4),
        "polygon with a vertex far outside its image": (2,),
    }


def test_a_file_the_evaluator_cannot_read_fails_the_check(tmp_path: Path) -> None:
    """hotcoco decodes every segmentation, though boxes are judged without them."""
    document = coco([annotation(1), annotation(2, segmentation=[[0, 0, 5, 5, 0, "x"]])])
    report = check_dataset({"val": dataset(tmp_path, document)}, tmp_path, workers=1)
    assert not report.ok
    assert "cannot be judged by this file" in report.text
    assert check_dataset({"train": dataset(tmp_path, document, training=True)}, tmp_path, workers=1).ok


class Hanging(CocoDataset):
    def load(self, index: int, at_least: tuple[int, int] | None = None) -> Any:
        if index == 1:
            time.sleep(60)
        if index == 2:
            os._exit(9)
        return super().load(index, at_least)


def test_an_image_that_hangs_or_kills_its_decoder_is_named(tmp_path: Path) -> None:
    document = coco([annotation(k, image_id=k) for k in range(4)], images=[image(k) for k in range(4)])
    hanging = Hanging(read_coco(*write(tmp_path, document)), "val", training=False)
    report = check_dataset({"val": hanging}, tmp_path, workers=2, seconds_per_image=1.0)
    assert not report.ok
    assert report.faults["val"][0].ids == (1, 2)
    assert "image 1 '1.png': no result within 1 s" in report.text
    assert "image 2 '2.png': its process ended with code 9" in report.text


@pytest.mark.parametrize("target", ["masks", "keypoints", "semantic"])
def test_what_other_tasks_learn_from_is_checked_and_drawn(
    real_data: Path, tmp_path: Path, target: str
) -> None:
    kind = "person_keypoints" if target == "keypoints" else "instances"
    root = real_data / "coco33"
    read = read_coco(root / f"annotations/{kind}_val2017.json", root / "val2017")
    annotations = part_of(read, torch.arange(4))
    skeleton = skeleton_of(annotations) if target == "keypoints" else None
    pictures = {}
    for name, options in (("boxes", {}), (target, {"target": target, "skeleton": skeleton})):
        data = CocoDataset(annotations, "val", training=False, **options)
        report = check_dataset({"val": data}, tmp_path / name, workers=2)
        assert report.ok
        pictures[name] = np.array(Image.open(report.pictures["val"]))
    assert pictures["boxes"].shape != pictures[target].shape or (pictures["boxes"] != pictures[target]).any()
    # the pixels of all classes, of what is ignored and of the background are all pixels
    pixels = sum(h * w for h, w in annotations.sizes.tolist())
    rows = [line.split("│")[1:-1] for line in report.text.splitlines() if line.startswith("│")]
    counted = sum(int(row[3]) for row in rows if len(row) == 5 and "%" in row[4])
    assert counted == (pixels if target == "semantic" else 0)


def test_a_class_map_that_cannot_be_used_stops_a_run(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco([annotation(1)], images=[image(1), image(2)]))
    (tmp_path / "maps").mkdir()
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "maps/1.png")
    Image.new("L", (WIDTH, HEIGHT), 7).save(tmp_path / "maps/2.png")
    data = CocoDataset(
        read_coco(path, images), "val", training=False, target="semantic", class_maps=tmp_path / "maps"
    )
    report = check_dataset({"val": data}, tmp_path, workers=1)
    assert not report.ok
    assert report.faults["val"][0].ids == (2,)
    assert "maps/2.png" in report.text


def test_the_real_datasets_pass(real_data: Path, tmp_path: Path) -> None:
    def real(annotations: str, images: str, training: bool) -> CocoDataset:
        return CocoDataset(read_coco(real_data / annotations, real_data / images), images, training=training)

    report = check_dataset(
        {
            "train": real("coco33/annotations/instances_train2017.json", "coco33/train2017", True),
            "val": real("bccd/annotations/instances_val.json", "bccd/val", False),
            "nuts": real("fruits_nuts/trainval.json", "fruits_nuts/images", False),
        },
        tmp_path,
        workers=2,
    )
    assert report.ok
    assert {split: [str(f) for f in faults] for split, faults in report.faults.items()} == {
        "train": [],
        "val": ["kept 1 annotation: box without area (id 887)"],
        "nuts": [],
    }
    assert set(report.pictures) == {"train", "val", "nuts"}
