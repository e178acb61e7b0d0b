"""Confusion matrices: who was taken for whom."""

from collections.abc import Sequence

import numpy as np


def confusion_matrix(truths: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was predicted for each: int64 [K, K], rows truth, columns prediction.

    Counted by numpy and not by torchmetrics, which under `use_deterministic_algorithms` holds every element
    against every cell (a picture of 512 × 512 in 150 classes would take 47 GB).
    """
    cells = truths.astype(np.int64) * classes + predictions
    return np.bincount(cells.ravel(), minlength=classes**2).reshape(classes, classes)


def share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """`parts / wholes`, NaN where there is no whole."""
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """The values that are not NaN, by class name."""
    return {name: v for name, v in zip(names, values.tolist(), strict=True) if v == v}
