"""Why detections are wrong: TIDE's errors and confusion matrices against cases worked out by hand."""

import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pycocotools import mask as masks

from resnext_backbones.errors import UsageError
from tasks.metrics.coco import CocoAP

A, B = 1, 2  # labels
SIDE = 100  # of every box; the picture has 1000 × 1000 pixels
APART = 60  # pixels between two boxes whose IoU is (100 - 60) / (100 + 60) = 0.25

Thing = tuple[int, int, int]  # label, x, y
Detection = tuple[int, int, int, float]  # and score


def truth(path: Path, *images: list[Thing]) -> Path:
    annotations = [
        {
            "image_id": image_id,
            "category_id": label,
            "bbox": [x, y, SIDE, SIDE],
            "segmentation": [[x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]],
            "area": SIDE**2,
            "iscrowd": 0,
        }
        for image_id, things in enumerate(images, start=1)
        for label, x, y in things
    ]
    content = {
        "images": [{"id": i, "width": 1000, "height": 1000} for i in range(1, len(images) + 1)],
        "categories": [{"id": A, "name": "ape"}, {"id": B, "name": "bee"}],
        "annotations": [{"id": i} | a for i, a in enumerate(annotations, start=1)],
    }
    file = path / "truth.json"
    file.write_text(json.dumps(content))
    return file


def found(*detections: Detection) -> dict[str, Any]:
    boxes = [[x, y, x + SIDE, y + SIDE] for _, x, y, _ in detections]
    squares = [[[x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]] for _, x, y, _ in detections]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([score for *_, score in detections]),
        "labels": torch.tensor([label for label, *_ in detections], dtype=torch.int64),
        "rles": [masks.frPyObjects(square, 1000, 1000)[0] for square in squares],
    }


def judged(path: Path, things: list[Thing], *detections: Detection) -> CocoAP:
    metric = CocoAP(truth(path, things), ["bbox", "segm"])
    metric.update([1], [found(*detections)])
    return metric


TWICE = [(A, 0, 0), (A, 300, 0)]
HALF = 51 / 101  # precision is 1 at the recalls 0, 0.01 … 0.5 of 101, and 0 at the others
THIRDS = 50 / 101 / 3  # 2/3 instead of 1 at the other 50

CASES = {
    "Cls": ([(A, 0, 0), (B, 300, 0)], [(A, 0, 0, 0.9), (A, 300, 0, 0.8)], 1 / 2),
    "Loc": (TWICE, [(A, 0, 0, 0.9), (A, 300 + APART, 0, 0.8)], 1 - HALF),
    # bees: the false one comes first, so precision is 1/2; half of that is half of the mean over two classes
    "Both": ([(A, 0, 0), (B, 300, 0)], [(A, 0, 0, 0.9), (B, APART, 0, 0.8), (B, 300, 0, 0.7)], 1 / 4),
    "Dupe": (TWICE, [(A, 0, 0, 0.9), (A, 1, 0, 0.8), (A, 300, 0, 0.7)], THIRDS),
    "Bkg": (TWICE, [(A, 0, 0, 0.9), (A, 700, 700, 0.8), (A, 300, 0, 0.7)], THIRDS),
    "Miss": (TWICE, [(A, 0, 0, 0.9)], 1 - HALF),
}


@pytest.mark.parametrize("error", CASES)
def test_one_error_and_what_it_costs(tmp_path: Path, error: str) -> None:
    things, detections, cost = CASES[error]
    metric = judged(tmp_path, things, *detections)
    numbers = metric.compute()
    kinds = list(CASES)
    for prefix, iou_type in (("", "bbox"), ("mask_", "segm")):
        costs = {kind: numbers[f"{prefix}TIDE_{kind}"] for kind in kinds}
        assert costs == pytest.approx(dict.fromkeys(kinds, 0.0) | {error: cost})
        assert metric.judged[iou_type].tide.counts == dict.fromkeys(kinds, 0) | {error: 1}
    if error in ("Dupe", "Bkg"):
        assert (numbers["TIDE_FP"], numbers["TIDE_FN"]) == pytest.approx((cost, 0))
    if error == "Miss":
        assert (numbers["TIDE_FP"], numbers["TIDE_FN"]) == pytest.approx((0, cost))


EVERY_ERROR = (
    [(A, 0, 0), (A, 200, 0), (A, 400, 0), (B, 600, 0), (B, 0, 300)],
    (A, 0, 0, 0.9),
    (B, 200, 0, 0.8),  # another class
    (A, 400 + APART, 0, 0.7),  # too far off
    (A, 0, 0, 0.6),  # the first again
    (A, 800, 800, 0.5),  # nothing there
    (B, 600, 0, 0.95),
    (B, 200 + APART, 0, 0.35),  # another class and too far off; the bee at (0, 300) is missed
)


def test_every_error_in_one_image(tmp_path: Path) -> None:
    metric = judged(tmp_path, *EVERY_ERROR)
    numbers = metric.compute()
    assert metric.judged["bbox"].tide.counts == dict.fromkeys(CASES, 1)
    # Apes: precision is 1 up to recall 1/3 (34 of 101); bees: up to 1/2 (51). One ape more: up to 2/3 (67).
    base = (34 + 51) / 202
    assert numbers["AP50"] == pytest.approx(base)
    one_more_ape = (67 - 34) / 202
    costs = {"Cls": one_more_ape, "Loc": one_more_ape, "Both": 0, "Dupe": 0, "Bkg": 0, "Miss": 50 / 202}
    costs |= {"FP": 0, "FN": 1 - base}
    assert {name: numbers[f"TIDE_{name}"] for name in costs} == pytest.approx(costs)


def test_confusion(tmp_path: Path) -> None:
    # Rows ape, bee, nothing. The second ape is taken for a bee, the third is missed since what is near
    # overlaps by 0.25 only; so are a bee and three apes and a bee found where there is nothing left to find.
    metric = judged(tmp_path, *EVERY_ERROR, (A, 500, 900, 0.2))  # below 0.3: not counted
    metric.compute()
    for iou_type in ("bbox", "segm"):
        confusion = metric.judged[iou_type].confusion
        assert confusion.tolist() == [[1, 1, 1], [0, 1, 1], [3, 1, 0]]
        assert confusion.dtype == np.int64


def test_no_ground_truth_gives_no_number(tmp_path: Path) -> None:
    metric = judged(tmp_path, [], (A, 0, 0, 0.9))
    assert metric.compute() == {}


def test_recall_by_class(tmp_path: Path) -> None:
    # A fifth of its width off, the ape's IoU is 80 / 120 = 0.67: above 0.50, 0.55, 0.60, 0.65, four of ten.
    metric = judged(tmp_path, [(A, 0, 0), (B, 300, 0)], (A, 20, 0, 0.9), (B, 300, 0, 0.8), (B, 600, 0, 0.9))
    metric.compute()
    assert metric.per_class_recall_of["bbox"] == pytest.approx({"ape": 0.4, "bee": 1.0})
    assert metric.per_class_of["bbox"] == pytest.approx({"ape": 0.4, "bee": 0.5})
    assert metric.per_class_name == "AP"


# A split that is a part of its file.

THREE = ([(A, 0, 0)], [(A, 0, 0)], [(B, 300, 0)])


def test_a_split_of_some_images_of_the_file(tmp_path: Path) -> None:
    metric = CocoAP(truth(tmp_path, *THREE), image_ids=[1, 3])
    metric.update([1, 3], [found((A, 0, 0, 0.9)), found((A, 700, 0, 0.5), (B, 300, 0, 0.9))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is the whole split
        numbers = metric.compute()
    assert numbers["AP"] == pytest.approx(1.0)  # the ape of image 2 is not missed
    assert metric.judged["bbox"].confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert numbers["TIDE_Miss"] == 0

    metric.reset()
    metric.update([1], [found((A, 0, 0, 0.9))])
    with pytest.raises(RuntimeError, match=r"truth\.json: 1 images were not reported .*\[3\]"):
        metric.compute()
    with pytest.warns(UserWarning, match="1 of the split's 2 images only"):
        assert metric.compute(metric.reported)["AP"] == pytest.approx(1.0)
    metric.update([2, 3], [found(), found()])
    with pytest.raises(RuntimeError, match=r"1 images were reported and are not to be judged .*\[2\]"):
        metric.compute()


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_a_split_of_no_image(tmp_path: Path, engine: Literal["hotcoco", "pycocotools"]) -> None:
    metric = CocoAP(truth(tmp_path, *THREE), engine=engine, image_ids=[])  # hotcoco would judge all three
    assert metric.compute() == {}
    assert metric.per_class == {}
    assert metric.draw(tmp_path, "val") == []


def test_images_that_the_file_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"truth\.json: 1 of the split's 2 images are not in the file: \[9\]"
    ):
        CocoAP(truth(tmp_path, *THREE), image_ids=[1, 9])


def test_a_keypoint_that_is_not_finite(tmp_path: Path) -> None:
    metric = CocoAP(truth(tmp_path, [(A, 0, 0)]), ["keypoints"])
    keypoints = torch.zeros(1, 17, 3)
    keypoints[0, 3, 1] = math.nan
    with pytest.raises(RuntimeError, match="image 1: a keypoint is not finite"):
        metric.update([1], [found((A, 0, 0, 0.9)) | {"keypoints": keypoints}])


# Pictures.


def test_pictures(tmp_path: Path) -> None:
    metric = judged(tmp_path, *EVERY_ERROR)
    assert metric.draw(tmp_path, "val") == []  # nothing is judged yet
    metric.compute()
    written = metric.draw(tmp_path / "new", "val")
    pictures = ("pr_curve", "per_class", "tide", "confusion")
    assert [p.name for p in written] == [f"{p}_val_{t}.png" for t in ("bbox", "segm") for p in pictures]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)


def test_pycocotools_knows_no_errors(tmp_path: Path) -> None:
    metric = CocoAP(truth(tmp_path, EVERY_ERROR[0]), engine="pycocotools")
    metric.update([1], [found(*EVERY_ERROR[1:])])
    assert not any("TIDE" in name for name in metric.compute())
    assert [p.name for p in metric.draw(tmp_path, "val")] == [
        "pr_curve_val_bbox.png",
        "per_class_val_bbox.png",
    ]
