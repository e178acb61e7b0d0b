"""CocoAP against COCO's published evaluation results, and against pycocotools to the last bit."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.metrics import CocoAP

BOX_NAMES = (
    "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
)  # in the order of pycocotools' stats
KEYPOINT_NAMES = "AP AP50 AP75 AP_medium AP_large AR AR50 AR75 AR_medium AR_large".split()
PREFIXES = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}
ENGINES = ["hotcoco", "pycocotools"]

# val2014_fake_eval_res.txt, as published with cocodataset/cocoapi.
PUBLISHED = {
    "bbox": [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564],
    "segm": [0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381],
}


def oracle(annotations: Path, results: Path | list, iou_type: str) -> dict[str, float]:
    """pycocotools' own run and summary, its −1 left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        judge = COCOeval(
            truth, truth.loadRes(str(results) if isinstance(results, Path) else results), iou_type
        )
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = KEYPOINT_NAMES if iou_type == "keypoints" else BOX_NAMES
    pairs = zip(names, judge.stats.tolist(), strict=True)
    return {PREFIXES[iou_type] + name: value for name, value in pairs if value > -1}


def image_ids(annotations: Path) -> list[int]:
    return [image["id"] for image in json.loads(annotations.read_text())["images"]]


def vector(real_data: Path, iou_type: str) -> tuple[Path, list[dict]]:
    folder = real_data / "coco_eval_vectors"
    if iou_type == "keypoints":
        folder /= "keypoints_dataset"
        return folder / "gt_dataset.json", json.loads((folder / "dt_dataset.json").read_text())
    folder /= "cocoapi"
    found = folder / f"instances_val2014_fake{iou_type}100_results.json"
    return folder / "instances_val2014_100.json", json.loads(found.read_text())


def judged(annotations: Path, results: list[dict], iou_type: str, engine: str = "hotcoco") -> CocoAP:
    metric = CocoAP(annotations, [iou_type], engine)
    metric.update_results(image_ids(annotations), results)
    return metric


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("iou_type", "ap"), [("bbox", 0.5045806987249628), ("segm", 0.3195452758576433)], ids=["bbox", "segm"]
)
def test_published_numbers_of_cocoapi(real_data: Path, iou_type: str, ap: float, engine: str) -> None:
    numbers = judged(*vector(real_data, iou_type), iou_type, engine).compute()
    assert numbers[PREFIXES[iou_type] + "AP"] == ap
    assert list(numbers) == [PREFIXES[iou_type] + name for name in BOX_NAMES]
    assert [round(value, 3) for value in numbers.values()] == PUBLISHED[iou_type]


@pytest.mark.parametrize("engine", ENGINES)
def test_published_number_of_polygon_detections(real_data: Path, engine: str) -> None:
    folder = real_data / "coco_eval_vectors/segm_small"
    truth = json.loads((folder / "gt_dataset.json").read_text())
    size = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    results = []
    for found in json.loads((folder / "dt_dataset.json").read_text()):
        polygons = found["segmentation"]
        rle = masks.merge(masks.frPyObjects(polygons, *size[found["image_id"]]))
        results.append(
            {key: found[key] for key in ("image_id", "category_id", "score")} | {"segmentation": rle}
        )
    numbers = judged(folder / "gt_dataset.json", results, "segm", engine).compute()
    assert round(numbers["mask_AP"], 10) == 0.6947194719
    assert "mask_AP_small" not in numbers  # no small object in these images


@pytest.mark.parametrize("engine", ENGINES)
def test_published_number_of_keypoints(real_data: Path, engine: str) -> None:
    numbers = judged(*vector(real_data, "keypoints"), "keypoints", engine).compute()
    assert (
        round(numbers["keypoint_AP"], 11) == 0.50488448845
        or abs(numbers["keypoint_AP"] - 0.50488448844) < 1e-11
    )
    assert list(numbers) == [f"keypoint_{name}" for name in KEYPOINT_NAMES]


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_engines_agree_to_the_last_bit(real_data: Path, iou_type: str) -> None:
    annotations, results = vector(real_data, iou_type)
    fast, slow = (judged(annotations, results, iou_type, engine) for engine in ENGINES)
    assert fast.compute() == slow.compute() == oracle(annotations, results, iou_type)
    assert fast.per_class == slow.per_class
    assert np.mean(list(fast.per_class.values())) == pytest.approx(fast.compute()[PREFIXES[iou_type] + "AP"])


def jittered(annotations: Path, seed: int) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """Detections near the annotated boxes, some doubled, some missed, some with a wrong label or in images
    without annotations, more than 100 in one image, with many equal scores."""
    random = np.random.default_rng(seed)
    content = json.loads(annotations.read_text())
    ids = [image["id"] for image in content["images"]]
    label = {id: k for k, id in enumerate(sorted(c["id"] for c in content["categories"]), start=1)}
    predictions = []
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [a["bbox"] for a in own for _ in range(random.integers(0, 4))]
        labels = [label[a["category_id"]] for a in own for _ in range(3)][: len(boxes)]
        for _ in range(150 if image["id"] == ids[0] else random.integers(0, 3)):
            boxes.append([*random.uniform(0, 300, 2), *random.uniform(1, 200, 2)])
        labels += random.integers(1, len(label) + 1, len(boxes) - len(labels)).tolist()
        xywh = torch.tensor(np.array(boxes).reshape(-1, 4) + random.normal(0, 4, (len(boxes), 4))).float()
        xywh[:, 2:] = xywh[:, 2:].clamp(min=1)
        predictions.append(
            {
                "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
                "scores": torch.tensor(random.integers(1, 8, len(boxes)) / 8).float(),
                "labels": torch.tensor(labels, dtype=torch.int64),
            }
        )
    return ids, predictions


@pytest.mark.parametrize(
    "file",
    [
        "bccd/annotations/instances_val.json",  # neither `info` nor `licenses`
        "coco33/annotations/instances_val2017.json",  # crowds, empty images, gaps between category ids
        "fruits_nuts/trainval.json",  # image id 0
    ],
)
def test_saved_detections_judged_by_pycocotools_give_the_same_numbers(
    real_data: Path, tmp_path: Path, file: str
) -> None:
    annotations = real_data / file
    fast, slow = CocoAP(annotations), CocoAP(annotations, engine="pycocotools")
    for metric in (fast, slow):
        metric.update(*jittered(annotations, seed=0))
    numbers = fast.compute()
    fast.save(tmp_path, "val")
    saved = tmp_path / "predictions_val_bbox.json"
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]
    assert json.loads(saved.read_text()) == fast.results("bbox")
    assert 0.05 < numbers["AP"] < 0.95
    assert numbers == slow.compute() == oracle(with_info(annotations, tmp_path), saved, "bbox")
    assert fast.per_class == slow.per_class


def with_info(annotations: Path, folder: Path) -> Path:
    """A copy with the `info` that pycocotools insists on, and annotation ids from 1."""
    content = {"info": {}} | json.loads(annotations.read_text())
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    copy = folder / "truth.json"
    copy.write_text(json.dumps(content))
    return copy


# Several processes.


def work(rank: int, world: int, rendezvous: str, file: str, results: list[dict], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    ids = image_ids(Path(file))[::-1]
    bounds = {1: [0, 100], 2: [0, 70, 100], 3: [0, 90, 100, 100]}[world]  # uneven; the last of three has none
    mine = ids[bounds[rank] : bounds[rank + 1]]
    metric = CocoAP(file)
    metric.update_results(mine, [r for r in results if r["image_id"] in set(mine)])
    if rank > 0:  # a padded sampler's repetition; other detections show who owns the image
        metric.update_results(ids[:3], [])
    numbers = metric.compute()
    metric.save(out, "val")
    again = metric.compute()  # rank 0 holds everything now, and nothing is counted twice

    metric.reset()
    metric.update_results(mine[1:], [r for r in results if r["image_id"] in set(mine[1:])])
    with pytest.raises(RuntimeError, match="were not reported") as fault:
        metric.compute()
    partly = metric.compute(metric.reported)
    Path(out, f"{rank}.json").write_text(
        json.dumps([numbers, again, metric.per_class, partly, str(fault.value)])
    )
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_number_of_processes_changes_no_number(real_data: Path, tmp_path: Path, world: int) -> None:
    annotations, results = vector(real_data, "bbox")
    out = tmp_path / "out"
    out.mkdir()
    mp.spawn(work, (world, str(tmp_path / "store"), str(annotations), results, str(out)), nprocs=world)
    expected = judged(annotations, results, "bbox").compute()
    assert expected["AP"] == 0.5045806987249628
    first_of_each = {
        ids[0] for ids in np.split(image_ids(annotations)[::-1], [70] if world == 2 else [90]) if True
    }
    reports = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    for numbers, again, _, partly, fault in reports:
        assert numbers == again == expected
        assert partly == reports[0][3] != expected
        assert fault == reports[0][4]
    assert first_of_each
    assert oracle(annotations, out / "predictions_val_bbox.json", "bbox") == expected
