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

from tasks.metrics.coco import CocoAP

# In the order of pycocotools' stats.
BOX_NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
BOX_NAMES += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
KEYPOINT_NAMES = [
    "AP",
    "AP50",
    "AP75",
    "AP_medium",
    "AP_large",
    "AR",
    "AR50",
    "AR75",
    "AR_medium",
    "AR_large",
]
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


def coco_alone(numbers: dict[str, float]) -> dict[str, float]:
    """Without TIDE's, which pycocotools does not know."""
    return {name: value for name, value in numbers.items() if "TIDE" not in name}


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
    assert list(coco_alone(numbers)) == [PREFIXES[iou_type] + name for name in BOX_NAMES]
    assert [round(value, 3) for value in coco_alone(numbers).values()] == PUBLISHED[iou_type]


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
    assert numbers["keypoint_AP"] == pytest.approx(0.50488448844, abs=1e-11)
    assert list(numbers) == [f"keypoint_{name}" for name in KEYPOINT_NAMES]


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_engines_agree_to_the_last_bit(real_data: Path, iou_type: str) -> None:
    annotations, results = vector(real_data, iou_type)
    fast, slow = (judged(annotations, results, iou_type, engine) for engine in ENGINES)
    assert coco_alone(fast.compute()) == slow.compute() == oracle(annotations, results, iou_type)
    assert fast.per_class == slow.per_class
    assert fast.per_class_recall_of == slow.per_class_recall_of
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
    assert coco_alone(numbers) == slow.compute() == oracle(with_info(annotations, tmp_path), saved, "bbox")
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


def shards(annotations: Path, world: int) -> list[list[int]]:
    """Image ids by rank, uneven; with three processes the last has none."""
    ids = image_ids(annotations)[::-1]
    return [ids[:70], ids[70:]] if world == 2 else [ids[:90], ids[90:], []]


def of_images(results: list[dict], ids: list[int]) -> list[dict]:
    return [result for result in results if result["image_id"] in set(ids)]


def work(rank: int, world: int, folder: Path, annotations: Path, results: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = shards(annotations, world)[rank]
    metric = CocoAP(annotations)
    metric.update_results(mine, of_images(results, mine))
    whole = metric.compute()
    metric.save(folder, "val")

    metric.reset()
    if rank == 1:  # what a padded sampler does; that it says "nothing" shows whose report stood
        metric.update_results(shards(annotations, world)[0][:5], [])
    metric.update_results(mine, of_images(results, mine))
    repeated = metric.compute()
    again = metric.compute()  # rank 0 holds everything by now

    metric.reset()
    metric.update_results(mine[1:], of_images(results, mine[1:]))
    with pytest.raises(RuntimeError, match="2 images were not reported"):
        metric.compute()  # must not leave any process waiting
    partly = metric.compute(metric.reported)
    report = {"whole": whole, "repeated": repeated, "again": again, "partly": partly}
    (folder / f"rank{rank}.json").write_text(json.dumps(report | {"per_class": metric.per_class}))
    del metric  # with its process group
    dist.barrier()  # nobody leaves while another still reads from it
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*AP is of:UserWarning")
@pytest.mark.parametrize("world", [2, 3])
def test_number_of_processes_changes_no_number(real_data: Path, tmp_path: Path, world: int) -> None:
    annotations, results = vector(real_data, "bbox")
    mp.spawn(work, (world, tmp_path, annotations, results), nprocs=world)

    one = judged(annotations, results, "bbox").compute()
    assert one["AP"] == 0.5045806987249628
    fewer = [i for shard in shards(annotations, world) for i in shard[1:]]
    part = CocoAP(annotations)
    part.update_results(fewer, of_images(results, fewer))
    partly = part.compute(fewer)
    assert partly != one
    for rank in range(world):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["whole"] == report["repeated"] == report["again"] == one
        assert report["partly"] == partly
        assert report["per_class"] == part.per_class
    assert oracle(annotations, tmp_path / "predictions_val_bbox.json", "bbox") == coco_alone(one)
