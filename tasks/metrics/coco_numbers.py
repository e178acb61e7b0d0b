"""COCO's summary: named numbers from the arrays of precision and recall that an evaluator gives."""

from collections.abc import Mapping, Sequence

import numpy as np

from tasks.metrics.coco_engines import Judged

PREFIX = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}  # of a metric's name


def summary(iou_type: str, judged: Judged) -> dict[str, float]:
    """COCO's numbers and TIDE's. IoU thresholds 0 and 5 are 0.50 and 0.75, area 0 is every size."""
    sizes = ["medium", "large"] if iou_type == "keypoints" else ["small", "medium", "large"]
    precision, recall = judged.precision, judged.recall

    def by_threshold(name: str, v: np.ndarray) -> dict[str, np.ndarray]:
        return {name: v[..., 0, -1], f"{name}50": v[0, ..., 0, -1], f"{name}75": v[5, ..., 0, -1]}

    def by_size(name: str, v: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{name}_{size}": v[..., area, -1] for area, size in enumerate(sizes, start=1)}

    if iou_type == "keypoints":
        recalls = by_threshold("AR", recall)
    else:
        recalls = {f"AR{most}": recall[..., 0, m] for m, most in enumerate((1, 10, 100))}
    values = by_threshold("AP", precision) | by_size("AP", precision) | recalls | by_size("AR", recall)
    numbers = _present(values)
    if judged.tide is not None and numbers:
        numbers |= {f"TIDE_{error}": delta for error, delta in judged.tide.delta_ap.items()}
    return {PREFIX[iou_type] + name: number for name, number in numbers.items()}


def class_precision(judged: Judged, names: Sequence[str]) -> dict[str, float]:
    return _present({name: judged.precision[:, :, k, 0, -1] for k, name in enumerate(names)})


def class_recall(judged: Judged, names: Sequence[str]) -> dict[str, float]:
    return _present({name: judged.recall[:, k, 0, -1] for k, name in enumerate(names)})


def _present(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.mean(v[v > -1])) for name, v in values.items() if (v > -1).any()}
