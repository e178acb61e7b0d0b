"""What was found in one image: objects, a class for every pixel, or probabilities of classes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.images import Size
from tasks.data.keypoints import TO_CENTRE
from tasks.drawing.pictures import captioned, draw, draw_classes
from tasks.prediction.given import Given, as_tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found in one image.

    index: its place among the images given, from 0. name: the file as given, "image 3" for what was no file.
    size: height and width, the image turned as its EXIF orientation says. class_names: of the K classes.
    reading: how image files are read, `max_pixels` and `bit_depth` of `tasks.prediction.given.as_tensor`.
    """

    index: int
    name: str
    size: Size
    class_names: tuple[str, ...]
    reading: dict[str, Any]

    def draw(self, image: Given, score: float = 0.0) -> Image.Image:
        """A picture of it on the image it was found in; of objects those that score at least `score`."""
        pixels = as_tensor(image, **self.reading)
        if tuple(pixels.shape[-2:]) != self.size:
            raise UsageError(f"{self.name}: draws on an image of {self.size}, not {tuple(pixels.shape[-2:])}")
        return self._drawn(pixels, score)

    def _drawn(self, image: Tensor, score: float) -> Image.Image:
        raise NotImplementedError

    def row(self) -> dict[str, Any]:
        """What `predictions.csv` says of it, by column; of a prediction of a plug-in's own kind."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Objects(Prediction):
    """Objects, the most certain first, in pixels of the image itself.

    boxes: float32 [N, 4], xyxy. scores: float32 [N], 0…1. labels: int64 [N], 1…K. rles: N run-length codes
    of pycocotools, None without masks. keypoints: float32 [N, P, 3] (x, y, 1; as in COCO's files, where whole
    numbers are the centres of pixels), None without them. edges: pairs of keypoints, from 0, that are joined.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    rles: list[dict[str, Any]] | None = None
    keypoints: Tensor | None = None
    edges: tuple[tuple[int, int], ...] = ()

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    def at_least(self, score: float) -> "Objects":
        """Those of them with at least this score."""
        keep = self.scores >= score
        kept = keep.nonzero().squeeze(1).tolist()
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            rles=None if self.rles is None else [self.rles[k] for k in kept],
            keypoints=None if self.keypoints is None else self.keypoints[keep],
        )

    def _drawn(self, image: Tensor, score: float) -> Image.Image:
        shown = self.at_least(score)
        return draw(
            image,
            shown.boxes,
            shown.labels,
            self.class_names,
            shown.scores,
            masks=shown.rles,
            keypoints=None if shown.keypoints is None else shown.keypoints + torch.tensor(TO_CENTRE),
            edges=self.edges,
        )


@dataclass(frozen=True, eq=False)
class ClassMap(Prediction):
    """classes: the class of every pixel, uint8 [H, W], 0…K - 1."""

    classes: Tensor

    def _drawn(self, image: Tensor, score: float) -> Image.Image:
        return draw_classes(image, self.classes, self.class_names)


@dataclass(frozen=True, eq=False)
class ClassScores(Prediction):
    """probabilities: of the classes, float32 [K], their sum 1."""

    probabilities: Tensor

    @property
    def top(self) -> tuple[str, float]:
        """The most probable class and its probability."""
        return self.best(1)[0]

    def best(self, number: int) -> list[tuple[str, float]]:
        """The most probable classes, at most `number`, and their probabilities."""
        values, classes = self.probabilities.topk(min(number, len(self.probabilities)))
        return [(self.class_names[c], p) for c, p in zip(classes.tolist(), values.tolist(), strict=True)]

    def _drawn(self, image: Tensor, score: float) -> Image.Image:
        name, probability = self.top
        return captioned(image, f"{name} {probability:.2f}", right=None)
