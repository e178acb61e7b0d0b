"""A trained network that takes images as they are and prepares them exactly as in evaluation."""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.classification import ClassificationTask
from tasks.data.batches import collate
from tasks.data.class_transforms import PreparedClasses, collate_classes
from tasks.data.images import MAX_PIXELS, Size
from tasks.data.prepared import Prepared
from tasks.detection import DetectionTask
from tasks.prediction.given import Given, Images, Read, Readable, Together
from tasks.prediction.predictions import ClassMap, ClassScores, Objects, Prediction
from tasks.segmentation import SemanticTask

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Predictor:
    """A trained network that takes images as they are (see `tasks.load.load_task`).

    Args:
        task: with its record; moved to `device` and put into evaluation mode.
        device: where it computes.
        precision: as the run had it, see `tasks.building.precision`.
        trust: whether the record may lift the limit on an image's pixels (`MAX_PIXELS`).

    A task that is none of ours says by its `prediction` what is given back; its images are prepared as a
    classifier's if `data.image_size` is one number, as a detector's if it is two.

    Raises UsageError if the task is none of ours and has no `prediction`, or its record does not say how
    images are prepared.
    """

    def __init__(
        self, task: BaseTask, device: torch.device, precision: str | int, trust: bool = False
    ) -> None:
        ours = isinstance(task, DetectionTask | SemanticTask | ClassificationTask)
        if not ours and not has_own_prediction(task):
            raise UsageError(
                f"{type(task).__name__} does not say what its predictions are: it needs a `prediction`, see "
                "tasks.base.BaseTask"
            )
        self.task, self.device = task.to(device).eval(), device
        task.model.to(memory_format=torch.channels_last)
        self.dtype = AUTOCAST.get(str(precision))
        self.categories: list[dict[str, Any]] = task.record["categories"]
        self.class_names = tuple(task.names)
        self.skeleton: dict[str, Any] | None = task.record.get("skeleton")
        self.edges = tuple((int(a), int(b)) for a, b in (self.skeleton or {}).get("edges", ()))
        data = task.record["config"]["data"]
        most = recorded(data, "max_pixels", MAX_PIXELS)
        if most > MAX_PIXELS and not trust:  # else a stranger's file would let decompression bombs in
            warnings.warn(
                f"the checkpoint's data.max_pixels={most} is not followed: images of more than {MAX_PIXELS} "
                "pixels are refused. If you trust where it comes from, give trust=True (--trust)",
                stacklevel=3,
            )
            most = MAX_PIXELS
        self.reading = {"max_pixels": most, "bit_depth": data.get("bit_depth")}
        self.worker_timeout = recorded(data, "worker_timeout", 300)
        self._data = data
        self.prepared([])  # a fault in the record shows now

    def predict(
        self,
        images: Given | Iterable[Given],
        batch_size: int = 8,
        *,
        score: float = 0.0,
        workers: int = 0,
        progress: bool = False,
    ) -> list[Prediction]:
        """What is found in each image, in the order given.

        Args:
            images: one image, or any number; those of a folder, by
                `tasks.prediction.arguments.chosen_images(["X"]).files`.
            batch_size: images computed at once.
            score: objects that score less are left out. (The network itself reports none below its
                `score_threshold`.)
            workers: processes that decode a list of images; 0: this one.
            progress: whether a bar on stderr shows how far it is.

        Raises:
            UsageError: an image cannot be read, or is none; it is named. A worker died, or was silent for the
                run's `data.worker_timeout` seconds.
        """
        given = [images] if isinstance(images, Given) else list(images)
        found = self.iterate(given, batch_size, score=score, workers=workers)
        if progress:
            console = Console(stderr=True)
            return list(track(found, "predicting", len(given), console=console, transient=True))
        return list(found)

    def iterate(
        self,
        images: Given | Iterable[Given],
        batch_size: int = 8,
        *,
        score: float = 0.0,
        workers: int = 0,
        on_fault: Callable[[int, str], None] | None = None,
    ) -> Iterator[Prediction]:
        """As `predict`, but one after the other, so that memory does not grow with their number.

        on_fault: called with index and reason for an image that cannot be read, in place of raising; the next
            ones are still predicted.
        """
        if batch_size < 1 or workers < 0:
            raise UsageError(f"batch_size={batch_size}, workers={workers}: at least 1 and 0 are wanted")
        if isinstance(images, Given):
            images = [images]
        if isinstance(images, Sequence):
            yield from self._predicted(images, 0, batch_size, score, workers, on_fault)
            return
        rest, start = iter(images), 0
        while part := list(islice(rest, batch_size)):  # a generator's images are not all held at once
            yield from self._predicted(part, start, batch_size, score, 0, on_fault)
            start += len(part)

    def prepared(self, images: Sequence[Given]) -> Dataset:
        """The images as the network is fed with them in evaluation."""
        given = Images(images, self.reading)
        size = self._data.get("image_size")
        try:
            if self._square:
                sides = {size} if isinstance(size, int) else set(size)
                known = ("crop_ratio", "interpolation")
                cropping = {key: self._data[key] for key in known if key in self._data}
                return PreparedClasses(given, int(sides.pop()), **cropping)
            short, long = size
            return Prepared(given, (short, int(long)))
        except (TypeError, ValueError, KeyError) as fault:
            raise UsageError(
                f"the checkpoint's data.image_size={size} does not say how images are prepared"
            ) from fault

    @property
    def _square(self) -> bool:
        """Whether images are cropped to a square, as classifiers see them."""
        return isinstance(self.task, ClassificationTask) or isinstance(self._data.get("image_size"), int)

    def _predicted(
        self,
        images: Sequence[Given],
        start: int,
        batch_size: int,
        score: float,
        workers: int,
        on_fault: Callable[[int, str], None] | None,
    ) -> Iterator[Prediction]:
        collate_fn = collate_classes if self._square else collate
        workers = min(workers, -(-len(images) // batch_size))
        loader = DataLoader(
            Readable(self.prepared(images)),
            batch_size,
            collate_fn=Together(collate_fn),
            num_workers=workers,
            timeout=self.worker_timeout if workers else 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_ctrl_c,
        )
        for read in loaded(loader):
            for place, reason in read.faults:
                if on_fault is None:
                    raise UsageError(reason)
                on_fault(start + place, reason)
            if read.batch is None:
                continue
            places = read.batch.image_ids.tolist()
            for place, size, found in zip(places, read.sizes, self._found(read.batch), strict=True):
                yield self._prediction(found, images[place], start + place, size, score)

    def _found(self, batch: Any) -> Any:
        batch = batch._replace(images=batch.images.to(self.device, non_blocking=True))
        precision: AbstractContextManager[Any] = nullcontext()
        if self.dtype is not None:
            precision = torch.autocast(self.device.type, self.dtype)
        try:
            with torch.inference_mode(), precision:
                return self.task.predict(batch)
        except torch.OutOfMemoryError as fault:
            number, _, *size = batch.images.shape
            raise UsageError(
                f"out of memory with {number} images of {size[0]}×{size[1]} on {self.device}: take a smaller "
                "batch size"
            ) from fault

    def _prediction(self, found: Any, image: Given, index: int, size: Size, score: float) -> Prediction:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"
        about: dict[str, Any] = {
            "index": index,
            "name": name,
            "size": size,
            "class_names": self.class_names,
            "reading": self.reading,
        }
        if has_own_prediction(self.task):
            return self.task.prediction(found, about)
        if isinstance(self.task, SemanticTask):
            return ClassMap(**about, classes=own_copy(found))
        if isinstance(self.task, ClassificationTask):
            return ClassScores(**about, probabilities=own_copy(found))
        objects = Objects(
            **about,
            boxes=own_copy(found["boxes"]),
            scores=own_copy(found["scores"]),
            labels=own_copy(found["labels"]),
            rles=found.get("rles"),
            keypoints=own_copy(found["keypoints"]) if "keypoints" in found else None,
            edges=self.edges,
        )
        return objects.at_least(score) if score > 0 else objects


def has_own_prediction(task: BaseTask) -> bool:
    """Whether what the task finds is of a kind of its own, as a plug-in's may be."""
    return type(task).prediction is not BaseTask.prediction


def recorded(data: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of a run's data configuration; older runs lack some."""
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or value < 0:
        raise UsageError(
            f"the checkpoint's data.{key}={value}: no whole number; the file is damaged or was changed"
        )
    return value


def loaded(loader: DataLoader) -> Iterator[Read]:
    """What a loader gives; a worker that died or is silent is a mistake that can be mended."""
    try:
        yield from loader
    except RuntimeError as fault:
        if not str(fault).startswith("DataLoader"):
            raise
        reason = str(fault).splitlines()[0].rstrip(".")
        raise UsageError(
            f"images cannot be read, {reason}: take fewer workers (their memory may be short), or 0 to see "
            "which image it is"
        ) from fault


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to all processes; this one ends when the loader does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def own_copy(tensor: Tensor) -> Tensor:
    """On the CPU, with memory of its own, and free for autograd, which inference mode's tensors are not."""
    return tensor.cpu().clone()
