"""The two evaluators behind `CocoAP`, whose precision and recall are the same to the last bit.

Each takes an annotation file, detections, what is compared, the images to judge and the keypoints' spreads.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnext_backbones.errors import UsageError

# A detection below this score takes no part in the confusion matrix, as in MMDetection's
# (tools/analysis_tools/confusion_matrix.py); a detector's hundred guesses an image would bury the rest.
CONFUSION_SCORE = 0.3

TIDE_ERRORS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN")


class Tide(NamedTuple):
    """What each kind of error costs (Bolya et al., arXiv 2008.08115, §2.2), at their thresholds: found from
    IoU 0.50, background below 0.10."""

    delta_ap: dict[str, float]  # AP50 gained were there none: Cls, Loc, Both, Dupe, Bkg, Miss; FP, FN
    counts: dict[str, int]  # how many of each of the first six


class Judged(NamedTuple):
    """What an evaluator finds: over IoU thresholds T, recall levels R, classes K, areas A, and numbers of
    detections M; −1 marks what there is no ground truth for."""

    precision: np.ndarray  # [T, R, K, A, M] float64
    recall: np.ndarray  # [T, K, A, M] float64
    # From hotcoco, of boxes and masks only:
    tide: Tide | None = None
    confusion: np.ndarray | None = None  # [K + 1, K + 1] int64, rows truth, the last ones background


def available(engine: str) -> str:
    """`engine`, or pycocotools with a warning where hotcoco cannot be imported."""
    if engine == "hotcoco":
        try:
            import hotcoco  # noqa: F401
        except ImportError as fault:
            warnings.warn(
                f"pycocotools computes AP, the same but more slowly, and no TIDE errors: {fault}",
                stacklevel=3,
            )
            return "pycocotools"
    return engine


def evaluate_hotcoco(
    annotations: Path, detections: Any, iou_type: str, image_ids: list[int], sigmas: list[float] | None
) -> Judged:
    from hotcoco import COCO, COCOeval

    try:
        truth = COCO(annotations)
    except ValueError as fault:
        raise UsageError(str(fault)) from fault
    judge = COCOeval(truth, truth.load_res(detections), iou_type)
    precision, recall = _run(judge, image_ids, sigmas)
    if iou_type == "keypoints":  # neither is defined on object keypoint similarity
        return Judged(precision, recall)
    errors = judge.tide_errors()
    confusion = judge.confusion_matrix(min_score=CONFUSION_SCORE)["matrix"]
    return Judged(
        precision,
        recall,
        Tide({error: errors["delta_ap"][error] for error in TIDE_ERRORS}, errors["counts"]),
        confusion.astype(np.int64),
    )


def evaluate_pycocotools(
    annotations: Path, detections: Any, iou_type: str, image_ids: list[int], sigmas: list[float] | None
) -> Judged:
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
        return Judged(*_run(COCOeval(truth, found, iou_type), image_ids, sigmas))


def _run(judge: Any, image_ids: list[int], sigmas: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    judge.params.imgIds = image_ids
    if sigmas is not None:
        judge.params.kpt_oks_sigmas = np.array(sigmas)
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"], judge.eval["recall"]


ENGINES = {"hotcoco": evaluate_hotcoco, "pycocotools": evaluate_pycocotools}
