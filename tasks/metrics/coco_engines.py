"""The two evaluators behind `CocoAP`, which give the same numbers to the last bit.

Each takes an annotation file, detections, what is compared, the images to judge and the keypoints' spreads,
and returns COCO's precision [T, R, K, A, M] and recall [T, K, A, M] over IoU thresholds, recall levels,
classes, areas and numbers of detections; −1 marks what there is no ground truth for.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from resnext_backbones.errors import UsageError


def available(engine: str) -> str:
    """`engine`, or pycocotools with a warning where hotcoco cannot be imported."""
    if engine == "hotcoco":
        try:
            import hotcoco  # noqa: F401
        except ImportError as fault:
            warnings.warn(f"pycocotools computes AP, the same but more slowly: {fault}", stacklevel=3)
            return "pycocotools"
    return engine


def evaluate_hotcoco(
    annotations: Path, detections: Any, iou_type: str, image_ids: list[int], sigmas: list[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    try:
        truth = COCO(annotations)
    except ValueError as fault:
        raise UsageError(str(fault)) from fault
    return _run(COCOeval(truth, truth.load_res(detections), iou_type), image_ids, sigmas)


def evaluate_pycocotools(
    annotations: Path, detections: Any, iou_type: str, image_ids: list[int], sigmas: list[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset = {"info": {}} | json.loads(annotations.read_bytes())
    for number, annotation in enumerate(dataset.setdefault("annotations", []), start=1):
        annotation["id"] = number  # a detection matched to an annotation with id 0 would count as unmatched
        annotation.setdefault("iscrowd", 0)
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "keypoints" in annotation:
            annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset, found.dataset = dataset, dataset | {"annotations": []}
        truth.createIndex()
        found.createIndex()
        if len(detections):  # loadRes fails on none
            found = truth.loadRes(detections)
        return _run(COCOeval(truth, found, iou_type), image_ids, sigmas)


def _run(judge: Any, image_ids: list[int], sigmas: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    judge.params.imgIds = image_ids
    if sigmas is not None:
        judge.params.kpt_oks_sigmas = np.array(sigmas)
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"], judge.eval["recall"]


ENGINES = {"hotcoco": evaluate_hotcoco, "pycocotools": evaluate_pycocotools}
