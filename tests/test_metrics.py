"""CocoAP on cases small enough to work out by hand."""

import builtins
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools import mask as masks

from resnext_backbones.errors import UsageError
from tasks.metrics.coco import CocoAP

BOX = [10.0, 10.0, 60.0, 60.0]  # xyxy; 2500 square pixels: "medium"
ENGINES = ["hotcoco", "pycocotools"]


def annotation(image_id: int, category_id: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "id": image_id * 100 + category_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 50, 50],
        "area": 2500,
        "iscrowd": 0,
    } | others


def coco(path: Path, images: int, annotations: list[dict[str, Any]], **others: Any) -> Path:
    """A file of images 1…N, and of three classes whose ids are neither dense nor in order."""
    content = {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": n} for i, n in ((7, "pear"), (1, "apple"), (90, "plum"))],
        "annotations": annotations,
    } | others
    file = path / "truth.json"
    file.write_text(json.dumps(content))
    return file


def found(*scores: float, label: int = 1, box: list[float] = BOX) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([box] * len(scores)).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.full((len(scores),), label),
    }


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def test_perfect(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 1, [annotation(1)]), engine=engine)
    metric.update([1], [found(0.9)])
    # What the file has no ground truth for, small and large objects, is left out.
    numbers = metric.compute()
    assert {n: v for n, v in numbers.items() if "TIDE" not in n} == pytest.approx(
        dict.fromkeys(["AP", "AP50", "AP75", "AP_medium", "AR1", "AR10", "AR100", "AR_medium"], 1.0)
    )
    assert metric.per_class == pytest.approx({"apple": 1.0})  # pear and plum: no ground truth


def test_images_without_ground_truth_count(tmp_path: Path, engine: str) -> None:
    # A better scored false positive in each of two empty images: precision is 1/3 at every recall.
    metric = CocoAP(coco(tmp_path, 3, [annotation(1)]), engine=engine)
    metric.update([1, 2, 3], [found(0.5), found(0.9), found(0.8)])
    numbers = metric.compute()
    assert numbers["AP"] == pytest.approx(1 / 3)
    assert numbers["AR100"] == 1.0


def test_labels_are_ranks_of_category_ids(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 1, [annotation(1, 1), annotation(1, 7), annotation(1, 90)]), engine=engine)
    metric.update([1], [found(0.9, label=2)])
    metric.compute()
    assert metric.per_class == pytest.approx({"apple": 0.0, "pear": 1.0, "plum": 0.0})
    assert metric.results("bbox") == [
        {"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "score": pytest.approx(0.9)}
    ]


def test_crowd_neither_rewards_nor_punishes(tmp_path: Path, engine: str) -> None:
    crowd = annotation(2, iscrowd=1, segmentation={"size": [100, 100], "counts": [0, 10000]})
    metric = CocoAP(coco(tmp_path, 2, [annotation(1), crowd]), engine=engine)
    metric.update([1, 2], [found(0.5), found(0.9, 0.8, 0.7)])
    assert metric.compute()["AP"] == pytest.approx(1.0)


def test_sizes_follow_the_annotated_area_not_the_box(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 1, [annotation(1, area=1000)]), engine=engine)  # small: below 32²
    metric.update([1], [found(0.9)])
    numbers = metric.compute()
    assert numbers["AP_small"] == pytest.approx(1.0)
    assert "AP_medium" not in numbers


def test_overlap_decides_thresholds(tmp_path: Path, engine: str) -> None:
    # 50×50 annotated, 50×36 found inside: IoU 0.72 passes 0.50, 0.55, 0.60, 0.65 and 0.70, half of the ten.
    metric = CocoAP(coco(tmp_path, 1, [annotation(1)]), engine=engine)
    metric.update([1], [found(0.9, box=[10, 10, 60, 46])])
    numbers = metric.compute()
    assert [numbers[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([0.5, 1.0, 0.0])


def test_tied_scores_are_ordered_by_image_id_not_by_arrival(tmp_path: Path, engine: str) -> None:
    # Image 1 is right, image 2 empty, both score 0.5: image 1 comes first, so precision is 1 at recall 1.
    file = coco(tmp_path, 2, [annotation(1)])
    for order in ([1, 2], [2, 1]):
        metric = CocoAP(file, engine=engine)
        metric.update(order, [found(0.5), found(0.5)])
        assert metric.compute()["AP"] == pytest.approx(1.0)
        assert [result["image_id"] for result in metric.results("bbox")] == [1, 2]


def test_a_hundred_detections_an_image_count(tmp_path: Path, engine: str) -> None:
    file = coco(tmp_path, 1, [annotation(1)])
    far = torch.tensor([0.0, 0.0, 5.0, 5.0])
    for wrong, recall in ((99, 1.0), (100, 0.0)):
        metric = CocoAP(file, engine=engine)
        prediction = found(*[0.9] * wrong, 0.5)
        prediction["boxes"][:wrong] = far
        metric.update([1], [prediction])
        assert metric.compute()["AR100"] == recall


def test_batches_change_nothing(tmp_path: Path) -> None:
    file = coco(tmp_path, 6, [annotation(i) for i in (1, 2, 4, 5)])
    predictions = {i: found(0.1 * i, 0.05 * i) for i in range(1, 7)}
    results = []
    for size in (1, 2, 4, 6):
        ids = random.Random(size).sample(range(1, 7), 6)
        metric = CocoAP(file)
        for start in range(0, 6, size):
            batch = ids[start : start + size]
            metric.update(batch, [predictions[i] for i in batch])
        results.append(metric.compute())
    assert all(r == results[0] for r in results)
    assert 0.1 < results[0]["AP"] < 0.9  # two false positives of high score keep it from being trivial


def test_no_detection_at_all_is_zero(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 2, [annotation(1)]), engine=engine)
    metric.update([1, 2], [found(), found()])
    assert {v for n, v in metric.compute().items() if "TIDE" not in n} == {0.0}
    assert metric.per_class == {"apple": 0.0}
    metric.save(tmp_path, "test")
    assert json.loads((tmp_path / "predictions_test_bbox.json").read_text()) == []


def test_no_ground_truth_at_all_gives_no_number(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 1, []), engine=engine)
    metric.update([1], [found(0.9)])
    assert metric.compute() == {}
    assert metric.per_class == {}


def test_first_report_of_an_image_stands(tmp_path: Path) -> None:
    metric = CocoAP(coco(tmp_path, 1, [annotation(1)]))
    metric.update([1], [found(0.9)])
    metric.update([1], [found(0.95, box=[70, 70, 90, 90])])
    assert metric.compute()["AP"] == pytest.approx(1.0)
    metric.reset()
    metric.update([1], [found()])
    assert metric.compute()["AP"] == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"id": 0},  # pycocotools alone scores a perfect detection of it 0
        {"id": 3.0, "image_id": 1.0, "category_id": 1.0},
        {"area": None},
        "area",
        "iscrowd",
    ],
    ids=str,
)
def test_unusual_annotations(tmp_path: Path, engine: str, change: Any) -> None:
    odd = annotation(1) | change if isinstance(change, dict) else annotation(1)
    if isinstance(change, str):
        del odd[change]
    metric = CocoAP(coco(tmp_path, 1, [odd]), engine=engine)
    metric.update([1], [found(0.9)])
    numbers = metric.compute()
    assert numbers["AP"] == pytest.approx(1.0)
    assert numbers["AP_medium"] == pytest.approx(1.0)


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "bat"}, {"id": 7, "name": "bat"}]
    file = coco(tmp_path, 1, [annotation(1), annotation(1, 7)], categories=categories)
    metric = CocoAP(file)
    metric.update([1], [found(0.9, label=2)])
    metric.compute()
    assert metric.per_class == pytest.approx({"bat (1)": 0.0, "bat (7)": 1.0})


# Masks and keypoints.


def test_boxes_and_masks_together(tmp_path: Path, engine: str) -> None:
    # The box fits, the mask is its left half: mask IoU 0.5 passes one threshold of ten.
    square, half = [[10, 10, 60, 10, 60, 60, 10, 60]], [[10, 10, 35, 10, 35, 60, 10, 60]]
    metric = CocoAP(coco(tmp_path, 1, [annotation(1, segmentation=square)]), ["bbox", "segm"], engine)
    metric.update([1], [found(0.9) | {"rles": masks.frPyObjects(half, 100, 100)}])
    numbers = metric.compute()
    assert [numbers[name] for name in ("AP", "mask_AP", "mask_AP50")] == pytest.approx([1.0, 0.1, 1.0])
    assert metric.per_class == pytest.approx({"apple": 1.0})
    assert metric.per_class_of["segm"] == pytest.approx({"apple": 0.1})
    metric.save(tmp_path, "val")  # run lengths come as bytes, which JSON has none of
    (saved,) = json.loads((tmp_path / "predictions_val_segm.json").read_text())
    assert masks.area(saved["segmentation"]) == 25 * 50
    assert (tmp_path / "predictions_val_bbox.json").exists()


def keypoint_file(path: Path, points: int) -> Path:
    person = annotation(1, num_keypoints=points, keypoints=[20, 20, 2] * points)
    return coco(path, 1, [person])


def test_keypoints_with_their_own_sigmas(tmp_path: Path, engine: str) -> None:
    # OKS = exp(−d² / (2 · area · (2σ)²)) (cocodataset.org/#keypoints-eval); this d gives 0.72, and half of
    # the thresholds are below it.
    sigma, area = 0.1, 2500
    d = math.sqrt(-2 * area * (2 * sigma) ** 2 * math.log(0.72))
    metric = CocoAP(keypoint_file(tmp_path, 5), ["keypoints"], engine, keypoint_sigmas=[sigma] * 5)
    keypoints = torch.tensor([[[20 + d, 20, 1.0]] * 5])
    metric.update([1], [found(0.9) | {"keypoints": keypoints}])
    numbers = metric.compute()
    assert [numbers[f"keypoint_{n}"] for n in ("AP", "AP50", "AP75", "AR")] == pytest.approx([0.5, 1, 0, 0.5])


@pytest.mark.parametrize("sigmas", [None, [0.1] * 4])
def test_sigmas_must_fit_the_keypoints(tmp_path: Path, sigmas: list[float] | None) -> None:
    with pytest.raises(UsageError, match=r"truth\.json: .*annotations\[0\] has 5 keypoints.*keypoint_sigmas"):
        CocoAP(keypoint_file(tmp_path, 5), ["keypoints"], keypoint_sigmas=sigmas)


# What is refused.


def test_images_reported_must_be_those_of_the_file(tmp_path: Path) -> None:
    file = coco(tmp_path, 3, [annotation(1)])
    metric = CocoAP(file)
    metric.update([1], [found(0.9)])
    with pytest.raises(RuntimeError, match=r"2 images were not reported .*\[2, 3\]"):
        metric.compute()
    metric.update([2, 3, 44], [found()] * 3)
    with pytest.raises(RuntimeError, match=r"1 images were reported and are not to be judged .*\[44\]"):
        metric.compute()


def test_a_part_of_the_images_only_when_asked(tmp_path: Path, engine: str) -> None:
    metric = CocoAP(coco(tmp_path, 3, [annotation(1), annotation(2)]), engine=engine)
    metric.update([1, 3], [found(0.5), found(0.9)])
    with pytest.warns(UserWarning, match=r"truth\.json: AP is of 2 of the split's 3 images only"):
        numbers = metric.compute(metric.reported)
    assert numbers["AP"] == pytest.approx(0.5)  # image 2's apple is not missed; image 3's false one counts


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_with_its_image(tmp_path: Path, value: float) -> None:
    metric = CocoAP(coco(tmp_path, 2, [annotation(1)]))
    with pytest.raises(RuntimeError, match=f"image 2: .* score {value} is not finite"):
        metric.update([1, 2], [found(0.9), found(0.5, value)])
    with pytest.raises(RuntimeError, match=r"image 2: .*is not finite"):
        metric.update([1, 2], [found(), found(0.5, box=[0, 0, value, 5])])


@pytest.mark.parametrize("label", [0, 4, -1])
def test_a_label_without_a_class_is_refused(tmp_path: Path, label: int) -> None:
    metric = CocoAP(coco(tmp_path, 2, []))
    with pytest.raises(UsageError, match=rf"label {label} of image 2 is not in 1…3.*truth\.json"):
        metric.update([1, 2], [found(0.9), found(0.9, label=label)])


def test_results_of_other_images_or_categories_are_refused(tmp_path: Path) -> None:
    metric = CocoAP(coco(tmp_path, 2, []))
    result = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.5}
    for change in ({"image_id": 9}, {"category_id": 2}):
        with pytest.raises(UsageError, match=r"truth\.json"):
            metric.update_results([1, 2], [result | change])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "truncated"),
        ('{"images": []}', "categories"),
        ('{"images": [{"id": "x"}], "categories": []}', r"images\["),
    ],
)
def test_a_file_that_is_no_coco_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "odd.json"
    with pytest.raises(UsageError, match=r"odd\.json"):
        CocoAP(file)
    file.write_text(content)
    with pytest.raises(UsageError, match=rf"odd\.json: .*{message}"):
        CocoAP(file)


def test_unknown_kind_or_engine(tmp_path: Path) -> None:
    file = coco(tmp_path, 1, [])
    with pytest.raises(UsageError, match="hotcoco"):
        CocoAP(file, engine="torchmetrics")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="segm"):
        CocoAP(file, ["boxes"])


def test_pycocotools_steps_in_for_hotcoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_hotcoco(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "hotcoco":
            raise ImportError("No module named 'hotcoco'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hotcoco)
    with pytest.warns(UserWarning, match="pycocotools computes AP.*No module named 'hotcoco'"):
        metric = CocoAP(coco(tmp_path, 1, [annotation(1)]))
    metric.update([1], [found(0.9)])
    assert metric.compute()["AP"] == pytest.approx(1.0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    metric = CocoAP(coco(tmp_path, 1, [annotation(1)]))
    metric.update([1], [found(0.9)])
    metric.compute()
    metric.save(tmp_path, "val")
    before = (tmp_path / "predictions_val_bbox.json").read_text()
    metric._found[1].rows[0, 4] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        metric.save(tmp_path, "val")
    assert (tmp_path / "predictions_val_bbox.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions_val_bbox.json", "truth.json"]
