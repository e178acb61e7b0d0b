"""COCO's average precision: predictions keyed by image id, judged once against the annotations as written.

The state is `{image id: what was found}`. Processes bring theirs together once, sorted by image id, and one
of them runs one evaluation over the whole split; so neither the number of processes nor the order or size
of batches changes a number.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from resnext_backbones.errors import UsageError
from tasks.checkpoint import replacing
from tasks.metrics.coco_engines import ENGINES, available

PREFIX = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}  # of a metric's name
FIELD = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # in COCO's results format
PATIENCE = timedelta(hours=1)  # processes wait for the slowest one and for the evaluation


class Found(NamedTuple):
    """What was found in one image."""

    rows: np.ndarray  # [N, 6] float64: x, y, width, height, score, category id
    shapes: dict[str, list[Any]]  # by iou type: a run-length mask or flat keypoints for each row


class CocoAP:
    """Average precision and recall of a split, as COCO defines them (Lin et al., arXiv 1405.0312).

    Judged against the annotation file exactly as it stands: crowds, areas, category ids and images without
    annotations count as they do in pycocotools, whose numbers are reproduced to the last bit. An annotation
    without `area` has its box's, one without `iscrowd` is no crowd (pycocotools refuses both).

    Numbers, in 0…1: `AP`, `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`, `AR1`, `AR10`, `AR100`,
    `AR_small`, `AR_medium`, `AR_large`, for masks prefixed `mask_`; for keypoints, prefixed `keypoint_`,
    `AP`, `AP50`, `AP75`, `AP_medium`, `AP_large` and the same of `AR`. What the split has no ground truth for
    is left out.

    Args:
        annotations: a COCO file.
        iou_types: what is compared, of "bbox", "segm" and "keypoints".
        engine: "pycocotools" gives the same numbers more slowly, and steps in where there is no hotcoco.
        keypoint_sigmas: the spread of each keypoint (cocodataset.org/#keypoints-eval); needed where they are
            not COCO's 17.

    Raises UsageError if the file is no COCO file or the sigmas do not fit its keypoints.
    """

    def __init__(
        self,
        annotations: Path | str,
        iou_types: Sequence[str] = ("bbox",),
        engine: Literal["hotcoco", "pycocotools"] = "hotcoco",
        *,
        keypoint_sigmas: Sequence[float] | None = None,
    ) -> None:
        self._group: Any = None
        self.annotations = Path(annotations)
        self.iou_types = tuple(iou_types)
        if not set(self.iou_types) <= set(PREFIX) or engine not in ENGINES:
            raise UsageError(
                f"{iou_types}, {engine!r}: iou types are {list(PREFIX)}, engines {list(ENGINES)}"
            )
        self._evaluate = ENGINES[available(engine)]
        self._sigmas = None if keypoint_sigmas is None else list(keypoint_sigmas)
        if "keypoints" in self.iou_types:
            _check_sigmas(self.annotations, 17 if self._sigmas is None else len(self._sigmas))
        header = _read(self.annotations, _Header)
        self._image_ids = {int(image.id) for image in header.images}
        self._classes = {int(c.id): c.name for c in sorted(header.categories, key=lambda c: c.id)}
        self._categories = np.array([0, *self._classes])  # label -> category id; 0 is background
        self.reset()
        for iou_type in self.iou_types:  # what the evaluator refuses shows now, not after an epoch
            one = sorted(self._image_ids)[:1]
            self._evaluate(self.annotations, self._detections(iou_type), iou_type, one, self._sigmas)

    def reset(self) -> None:
        """Forgets everything reported; call it before a split is judged."""
        self._found: dict[int, Found] = {}
        self.per_class_of: dict[str, dict[str, float]] = {}

    @property
    def reported(self) -> set[int]:
        """Ids of the images this process has reported."""
        return set(self._found)

    @property
    def per_class(self) -> dict[str, float]:
        """After `compute`: AP by class name for the first iou type; `per_class_of[iou_type]` has each."""
        return self.per_class_of.get(self.iou_types[0], {})

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
            shapes = {t: _shapes(t, prediction) for t in self.iou_types if t != "bbox"}
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

    def compute(self, image_ids: Iterable[int] | None = None) -> dict[str, float]:
        """The numbers of the whole split, the same on every process; every process must call it.

        `image_ids` judges only these images, of all processes together, and says so: for runs cut short on
        purpose, as `compute(metric.reported)`. Rank 0 holds the predictions of all processes afterwards.

        Raises RuntimeError, on every process, if the images reported are not exactly those to be judged.
        """
        asked = None if image_ids is None else set(image_ids)
        shards = _gather((self._found, asked), self._side_group())
        outcome: Any = None
        if shards is not None:
            try:
                outcome = self._judge(shards)
            except Exception as fault:  # the processes that wait for the numbers must hear of it
                kind = UsageError if isinstance(fault, UsageError) else RuntimeError
                outcome = kind(f"{self.annotations}: {fault}").with_traceback(fault.__traceback__)
        outcome = _broadcast(outcome, self._side_group())
        if isinstance(outcome, Exception):
            raise outcome
        numbers, self.per_class_of = outcome
        return numbers

    def _side_group(self) -> Any:
        """Carries objects, which NCCL does not, with a patience of its own.

        Held by the metric, not by the module: a group that outlives the process group aborts the
        interpreter's exit now and then.
        """
        if self._group is None and _world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self._group

    def _judge(self, shards: Sequence[tuple[dict[int, Found], set[int] | None]]) -> tuple[dict, dict]:
        merged: dict[int, Found] = {}
        for found, _ in shards:  # in the order of ranks: the first to report an image owns it
            merged = found | merged
        self._found = dict(sorted(merged.items()))
        subsets = [subset for _, subset in shards if subset is not None]
        expected = set().union(*subsets) if subsets else self._image_ids
        _check_images(expected, self.reported, self._image_ids)
        numbers: dict[str, float] = {}
        per_class: dict[str, dict[str, float]] = {}
        names = list(self._classes.values())
        names = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in self._classes.items()]
        for iou_type in self.iou_types:
            precision, recall = self._evaluate(
                self.annotations, self._detections(iou_type), iou_type, sorted(expected), self._sigmas
            )
            numbers |= _numbers(iou_type, precision, recall)
            per_class[iou_type] = _present({n: precision[:, :, k, 0, -1] for k, n in enumerate(names)})
        return numbers, per_class

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
        if _world_size() > 1 and dist.get_rank() != 0:
            return
        for iou_type in self.iou_types:
            path = Path(folder) / f"predictions_{split}_{iou_type}.json"
            images = (json.dumps(image, allow_nan=False)[1:-1] for image in self._results(iou_type) if image)
            with replacing(path) as file:  # image by image: all at once would fill the memory
                file.write(b"[")
                file.writelines((",\n" * (i > 0) + image).encode() for i, image in enumerate(images))
                file.write(b"]")


def _numbers(iou_type: str, precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """COCO's summary. IoU thresholds 0 and 5 are 0.50 and 0.75, area 0 is every size."""
    sizes = ["medium", "large"] if iou_type == "keypoints" else ["small", "medium", "large"]

    def by_threshold(name: str, v: np.ndarray) -> dict[str, np.ndarray]:
        return {name: v[..., 0, -1], f"{name}50": v[0, ..., 0, -1], f"{name}75": v[5, ..., 0, -1]}

    def by_size(name: str, v: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{name}_{size}": v[..., area, -1] for area, size in enumerate(sizes, start=1)}

    if iou_type == "keypoints":
        recalls = by_threshold("AR", recall)
    else:
        recalls = {f"AR{most}": recall[..., 0, m] for m, most in enumerate((1, 10, 100))}
    values = by_threshold("AP", precision) | by_size("AP", precision) | recalls | by_size("AR", recall)
    return {PREFIX[iou_type] + name: mean for name, mean in _present(values).items()}


def _present(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.mean(v[v > -1])) for name, v in values.items() if (v > -1).any()}


# What is read of an annotation file here, and checks.

T = TypeVar("T")


class _Image(msgspec.Struct):
    id: int | float


class _Category(msgspec.Struct):
    id: int | float
    name: str


class _Header(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]


class _Pose(msgspec.Struct):
    keypoints: list[float] | None = None


class _Poses(msgspec.Struct):
    annotations: list[_Pose] = []


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as fault:
        raise UsageError(f"{path}: {fault.strerror}; give a COCO annotation file") from fault
    except msgspec.DecodeError as fault:
        raise UsageError(f"{path}: {fault}; give a COCO annotation file") from fault


def _check_sigmas(path: Path, sigmas: int) -> None:
    """With the wrong number of sigmas pycocotools fails obscurely and hotcoco gives a wrong number."""
    for i, pose in enumerate(_read(path, _Poses).annotations):
        if pose.keypoints and len(pose.keypoints) != 3 * sigmas:
            raise UsageError(
                f"{path}: annotations[{i}] has {len(pose.keypoints) / 3:g} keypoints and there are {sigmas} "
                "sigmas; give keypoint_sigmas, one for each keypoint"
            )


def _check_finite(image_ids: np.ndarray, rows: np.ndarray) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        *box, score, _ = rows[bad][0].tolist()
        raise RuntimeError(f"image {image_ids[bad][0]}: box {box} (x, y, w, h), score {score} is not finite")


def _check_images(expected: set[int], reported: set[int], known: set[int]) -> None:
    for problem, ids in {
        "were not reported": expected - reported,
        "were reported and are not to be judged": reported - expected,
        "are not in the file": expected - known,
    }.items():
        if ids:
            raise RuntimeError(
                f"{len(ids)} images {problem} ({len(expected)} are to be judged): {sorted(ids)[:20]}"
            )
    if expected != known:
        warnings.warn(f"AP is of {len(expected)} of the split's {len(known)} images only", stacklevel=4)


def _shapes(iou_type: str, prediction: Mapping[str, Any]) -> list[Any]:
    if iou_type == "keypoints":
        return prediction["keypoints"].detach().cpu().double().flatten(1).tolist()
    return [
        {"size": r["size"], "counts": r["counts"].decode() if isinstance(r["counts"], bytes) else r["counts"]}
        for r in prediction["rles"]
    ]


# Between processes.


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(mine: Any, group: Any) -> list[Any] | None:
    """Every process's object by rank, on rank 0; None elsewhere."""
    if _world_size() == 1:
        return [mine]
    everyone = [None] * _world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=group)
    return everyone


def _broadcast(mine: Any, group: Any) -> Any:
    """Rank 0's object, everywhere."""
    if _world_size() > 1:
        held = [mine]
        dist.broadcast_object_list(held, src=0, group=group)
        return held[0]
    return mine
