"""COCO's average precision: predictions judged once against the annotations as written."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from resnext_backbones.errors import UsageError
from tasks.checkpoint import replacing
from tasks.metrics.between import is_first
from tasks.metrics.coco_engines import ENGINES, Judged, available
from tasks.metrics.coco_numbers import PREFIX, class_precision, class_recall, summary
from tasks.metrics.coco_pictures import draw
from tasks.metrics.coco_truth import check_sigmas, images_and_classes
from tasks.metrics.split import Numbers, SplitMetric, distinct

FIELD = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # in COCO's results format


class Found(NamedTuple):
    """What was found in one image."""

    rows: np.ndarray  # [N, 6] float64: x, y, width, height, score, category id
    shapes: dict[str, list[Any]]  # by iou type: a run-length mask or flat keypoints for each row


class CocoAP(SplitMetric[Found]):
    """Average precision and recall of a split, as COCO defines them (Lin et al., arXiv 1405.0312).

    Judged against the annotation file exactly as it stands: crowds, areas, category ids and images without
    annotations count as they do in pycocotools, whose numbers are reproduced to the last bit. An annotation
    without `area` has its box's, one without `iscrowd` is no crowd (pycocotools refuses both).

    Numbers, in 0…1: `AP`, `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`, `AR1`, `AR10`, `AR100`,
    `AR_small`, `AR_medium`, `AR_large`, for masks prefixed `mask_`; for keypoints, prefixed `keypoint_`,
    `AP`, `AP50`, `AP75`, `AP_medium`, `AP_large` and the same of `AR`. What the split has no ground truth for
    is left out.

    For boxes and masks, from hotcoco only, also what each kind of error costs in AP50: `TIDE_Cls` (wrong
    class), `TIDE_Loc` (too little overlap), `TIDE_Both`, `TIDE_Dupe` (found twice), `TIDE_Bkg` (nothing
    there), `TIDE_Miss`; `TIDE_FP` and `TIDE_FN`, all false positives and negatives (Bolya et al., arXiv
    2008.08115). They are computed each time: 500,000 boxes or 200,000 masks in 5,000 images take
    1.3 seconds.

    After `compute`, beside `per_class_of[iou_type]` (AP by class name): on rank 0 `judged[iou_type]`, the
    arrays behind all this, TIDE's counts, and the confusion matrix of detections that score at least 0.3.
    (A detection of a crowd stands there as one of background.)

    Args:
        annotations: a COCO file.
        iou_types: what is compared, of "bbox", "segm" and "keypoints".
        engine: "pycocotools" gives the same numbers more slowly, without TIDE's, and steps in where there is
            no hotcoco.
        image_ids: the split, where it is not all images of the file.
        keypoint_sigmas: the spread of each keypoint (cocodataset.org/#keypoints-eval); needed where they are
            not COCO's 17.

    Raises UsageError if the file is no COCO file, lacks one of `image_ids`, or if the sigmas do not fit its
    keypoints.
    """

    per_class_name = "AP"

    def __init__(
        self,
        annotations: Path | str,
        iou_types: Sequence[str] = ("bbox",),
        engine: Literal["hotcoco", "pycocotools"] = "hotcoco",
        *,
        image_ids: Collection[int] | None = None,
        keypoint_sigmas: Sequence[float] | None = None,
    ) -> None:
        self.annotations = Path(annotations)
        self.iou_types = tuple(iou_types)
        if not self.iou_types or not set(self.iou_types) <= set(PREFIX) or engine not in ENGINES:
            raise UsageError(
                f"{iou_types}, {engine!r}: iou types are {list(PREFIX)}, engines {list(ENGINES)}"
            )
        self._evaluate = ENGINES[available(engine)]
        self._sigmas = None if keypoint_sigmas is None else list(keypoint_sigmas)
        if "keypoints" in self.iou_types:
            check_sigmas(self.annotations, 17 if self._sigmas is None else len(self._sigmas))
        in_file, self._classes = images_and_classes(self.annotations)
        super().__init__(in_file if image_ids is None else image_ids, source=str(self.annotations))
        self._check_known(in_file)
        self.names = distinct(list(self._classes.values()), list(self._classes))
        self._categories = np.array([0, *self._classes])  # label -> category id; 0 is background
        for iou_type in self.iou_types:  # what the evaluator refuses shows now, not after an epoch
            one = sorted(in_file)[:1]
            self._evaluate(self.annotations, self._detections(iou_type), iou_type, one, self._sigmas)

    @property
    def class_numbers(self) -> Numbers:
        """After `compute`: what the log says of each class, named like "AP/person" and "mask_AR/person"."""
        kinds = {t: f"{PREFIX[t]}AP" for t in self.iou_types}
        kinds |= {f"{t} AR": f"{PREFIX[t]}AR" for t in self.iou_types}
        return {
            f"{kinds[kind]}/{name}": value
            for kind, of in self.per_class_of.items()
            for name, value in of.items()
        }

    def reset(self) -> None:
        super().reset()
        self.judged: dict[str, Judged] = {}

    def update(self, image_ids: Sequence[int], predictions: Sequence[Mapping[str, Any]]) -> None:
        """Takes one prediction an image; of an image reported twice the first report stands.

        A prediction holds `boxes` [N, 4] (xyxy in pixels of the image as annotated), `scores` [N], `labels`
        [N] (1…K, the category ids in ascending order), on any device; for `segm` also `rles` (N run-length
        masks as pycocotools encodes them), for `keypoints` also `keypoints` [N, K, 3] (x, y, visibility).

        Raises RuntimeError for a number that is not finite, UsageError for a label outside 1…K.
        """
        if len(image_ids) == 0:
            return
        boxes, scores, labels = (  # a batch leaves the device in three copies, not three an image
            torch.cat([p[key].detach() for p in predictions]).cpu() for key in ("boxes", "scores", "labels")
        )
        counts = [len(p["scores"]) for p in predictions]
        ids = np.repeat(np.asarray(image_ids), counts)
        outside = ((labels < 1) | (labels >= len(self._categories))).numpy()
        if outside.any():
            raise UsageError(
                f"label {int(labels[outside][0])} of image {ids[outside][0]} is not in 1…"
                f"{len(self._classes)}: give the model as many classes as {self.annotations} has"
            )
        corners = boxes.double().numpy()
        numbers = (corners[:, :2], corners[:, 2:] - corners[:, :2], scores.double().numpy())
        rows = np.column_stack((*numbers, self._categories[labels.numpy()]))
        _check_finite(ids, rows)
        parts = np.split(rows, np.cumsum(counts)[:-1])
        for image_id, part, prediction in zip(image_ids, parts, predictions, strict=True):
            shapes = {t: _shapes(t, prediction, int(image_id)) for t in self.iou_types if t != "bbox"}
            self._found.setdefault(int(image_id), Found(part, shapes))

    def update_results(self, image_ids: Iterable[int], results: Iterable[Mapping[str, Any]]) -> None:
        """Takes detections in COCO's results format; `image_ids` names also images without any."""
        by_image: dict[int, list[Mapping[str, Any]]] = {int(i): [] for i in image_ids}
        for r in results:
            if r["image_id"] not in by_image or r["category_id"] not in self._classes:
                raise UsageError(
                    f"a result has image id {r['image_id']}, category id {r['category_id']}: one of them is "
                    f"not among the images given, or not in {self.annotations}"
                )
            by_image[r["image_id"]].append(r)
        for image_id, found in by_image.items():
            boxes = (r["bbox"] if "bbox" in self.iou_types else [0.0] * 4 for r in found)
            rows = [[*box, r["score"], r["category_id"]] for box, r in zip(boxes, found, strict=True)]
            array = np.array(rows, dtype=np.float64).reshape(-1, 6)
            _check_finite(np.full(len(array), image_id), array)
            shapes = {t: [r[FIELD[t]] for r in found] for t in self.iou_types if t != "bbox"}
            self._found.setdefault(image_id, Found(array, shapes))

    def _judge(self, found: Mapping[int, Found]) -> tuple[Numbers, dict[str, Numbers]]:
        self.judged = {
            t: self._evaluate(self.annotations, self._detections(t), t, list(found), self._sigmas)
            for t in self.iou_types
        }
        numbers = [summary(iou_type, judged) for iou_type, judged in self.judged.items()]
        precision = {t: class_precision(judged, self.names) for t, judged in self.judged.items()}
        recall = {f"{t} AR": class_recall(judged, self.names) for t, judged in self.judged.items()}
        return {name: number for part in numbers for name, number in part.items()}, precision | recall

    @property
    def per_class_recall_of(self) -> dict[str, Numbers]:
        """After `compute`: AR of at most 100 detections an image, by iou type and class name."""
        return {t: self.per_class_of[f"{t} AR"] for t in self.iou_types if f"{t} AR" in self.per_class_of}

    def _detections(self, iou_type: str) -> np.ndarray | list[dict[str, Any]]:
        """What an engine reads: for boxes [N, 7], image id, x, y, width, height, score, category id."""
        if iou_type != "bbox":
            return self.results(iou_type)
        rows = [found.rows for found in self._found.values()]
        ids = np.repeat(np.array(list(self._found), dtype=np.float64), [len(r) for r in rows])
        return np.column_stack((ids, np.concatenate([np.empty((0, 6)), *rows])))

    def results(self, iou_type: str) -> list[dict[str, Any]]:
        """This process's detections in COCO's results format; after `compute`, on rank 0, those of all."""
        return [result for image in self._results(iou_type) for result in image]

    def _results(self, iou_type: str) -> Iterator[list[dict[str, Any]]]:
        for image_id, (rows, shapes) in self._found.items():
            shape = rows[:, :4].tolist() if iou_type == "bbox" else shapes[iou_type]
            yield [
                {"image_id": image_id, "category_id": int(category), FIELD[iou_type]: s, "score": score}
                for s, (score, category) in zip(shape, rows[:, 4:].tolist(), strict=True)
            ]

    def save(self, folder: Path | str, split: str) -> None:
        """Writes `predictions_<split>_<iou type>.json` for each iou type; after `compute`, from rank 0."""
        if not is_first():
            return
        for iou_type in self.iou_types:
            path = Path(folder) / f"predictions_{split}_{iou_type}.json"
            images = (json.dumps(image, allow_nan=False)[1:-1] for image in self._results(iou_type) if image)
            with replacing(path) as file:  # image by image: all at once would fill the memory
                file.write(b"[")
                file.writelines((",\n" * (i > 0) + image).encode() for i, image in enumerate(images))
                file.write(b"]")

    def draw(self, folder: Path | str, split: str) -> list[Path]:
        """Draws after `compute`, from rank 0, and returns what it wrote: for each iou type
        `pr_curve_<split>_<iou type>.png`, `per_class_…`, and with hotcoco, of boxes and masks, `tide_…` and
        `confusion_…`.
        """
        if not is_first():
            return []
        return [
            path
            for iou_type, judged in self.judged.items()
            for path in draw(judged, self.per_class_of[iou_type], self.names, iou_type, Path(folder), split)
        ]

    def _check_known(self, in_file: set[int]) -> None:
        assert self._image_ids is not None
        if missing := self._image_ids - in_file:
            raise UsageError(
                f"{self.annotations}: {len(missing)} of the split's {len(self._image_ids)} images are not in "
                f"the file: {sorted(missing)[:20]}; give the file that the split was made from"
            )


def _check_finite(image_ids: np.ndarray, rows: np.ndarray) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        *box, score, _ = rows[bad][0].tolist()
        raise RuntimeError(f"image {image_ids[bad][0]}: box {box} (x, y, w, h), score {score} is not finite")


def _shapes(iou_type: str, prediction: Mapping[str, Any], image_id: int) -> list[Any]:
    if iou_type == "keypoints":
        keypoints = prediction["keypoints"].detach().cpu().double().flatten(1)
        if not keypoints.isfinite().all():
            raise RuntimeError(f"image {image_id}: a keypoint is not finite")
        return keypoints.tolist()
    return [
        {"size": r["size"], "counts": r["counts"].decode() if isinstance(r["counts"], bytes) else r["counts"]}
        for r in prediction["rles"]
    ]
