"""What is found in images: in their pixels, well formed, of images prepared as in evaluation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.base import BaseTask
from tasks.conforming.subject import Fault, evaluated
from tasks.prediction.predictions import ClassMap, ClassScores, Objects, Prediction

LEVELS = 4  # of 0…255, by which an image may differ on average


def pixels(task: BaseTask, batch: Any, found: Any) -> str | None:
    """Whether `predict` speaks of the image's pixels; returns what could not be seen.

    What it finds in the same image, said to be of twice the size, must be twice as large.
    """
    if not hasattr(batch, "original_sizes"):
        return None
    with evaluated(task):
        doubled = task.predict(batch._replace(original_sizes=2 * batch.original_sizes))
    remedy = "give it in the pixels of the image as annotated (batch.original_sizes), not of the network's"
    seen = False
    for one, two, size in zip(found, doubled, batch.original_sizes.tolist(), strict=True):
        if isinstance(one, Tensor) and one.ndim == 2:
            seen = True
            if list(one.shape) != size or list(two.shape) != [2 * side for side in size]:
                raise Fault(f"the class map of an image of {size} is {list(one.shape)}; {remedy}")
        if isinstance(one, Mapping) and "boxes" in one:
            seen = seen or len(one["boxes"]) > 0
            if not close(2 * one["boxes"], two["boxes"]):
                raise Fault(f"boxes of an image said to be twice as large are not twice as large; {remedy}")
            if "keypoints" in one and not close(
                2 * (one["keypoints"][..., :2] + 0.5), two["keypoints"][..., :2] + 0.5
            ):
                raise Fault(f"keypoints of an image twice as large are not twice as far; {remedy}")
            for code in one.get("rles", ()):
                if list(code["size"]) != size:
                    raise Fault(f"a mask of an image of {size} is {list(code['size'])}; {remedy}")
    return None if seen else "nothing was found, so whether it is in the image's pixels was not seen"


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=0.1)


def acceptable(given: Prediction, size: tuple[int, int]) -> None:
    """Raises Fault unless what the predictor gives of an image of this height and width is well formed."""
    if not isinstance(given, Prediction):
        raise Fault(f"`prediction` gives a {type(given).__name__}; give a tasks.prediction Prediction")
    if given.size != size:
        raise Fault(f"the prediction of an image of {size} says {given.size}")
    if isinstance(given, Objects):
        height, width = size
        limits = torch.tensor([width, height, width, height]) + 1.0
        boxes, scores, labels = given.boxes, given.scores, given.labels
        if not boxes.shape == (len(scores), 4) or labels.shape != scores.shape:
            raise Fault(
                f"boxes {list(boxes.shape)}, scores {list(scores.shape)}, labels {list(labels.shape)}"
            )
        if not bool(((boxes >= -1) & (boxes <= limits)).all()):
            raise Fault(f"a box lies outside of its image of {height} × {width}")
        if not bool(((scores >= 0) & (scores <= 1)).all()) or not bool((scores.diff() <= 0).all()):
            raise Fault("scores are not in 0…1, the highest first")
        if not bool(((labels >= 1) & (labels <= len(given.class_names))).all()):
            raise Fault(f"a label is not in 1…{len(given.class_names)}; 0 is background and not reported")
    elif isinstance(given, ClassMap):
        if given.classes.dtype != torch.uint8 or tuple(given.classes.shape) != size:
            raise Fault(f"the class map of an image of {size} is {given.classes.dtype} {given.classes.shape}")
    elif isinstance(given, ClassScores):
        if given.probabilities.shape != (len(given.class_names),):
            raise Fault(f"{given.probabilities.shape} probabilities of {len(given.class_names)} classes")
        if not abs(float(given.probabilities.sum()) - 1) < 1e-3:
            raise Fault("the probabilities of an image do not sum to 1; is there a softmax too few?")
    else:
        row = given.row()
        if not isinstance(row, dict) or not row or not all(isinstance(name, str) for name in row):
            raise Fault(f"{type(given).__name__}.row must give a dict of columns for predictions.csv")


def alike_prepared(predicted: Tensor, judged: Tensor) -> None:
    """Raises Fault unless an image reaches the network in prediction as in evaluation.

    A JPEG decoded at a fraction of its size differs a little from one that was decoded whole.
    """
    same = predicted.shape == judged.shape
    if not same or (predicted.float() - judged.float()).abs().mean() > LEVELS:
        how = f"{list(predicted.shape)} for {list(judged.shape)}" if not same else "of other pixels"
        raise Fault(
            f"an image is prepared for prediction otherwise than for evaluation ({how}): prediction reads "
            "image_size, crop_ratio and interpolation of the data's configuration, so name them there"
        )
