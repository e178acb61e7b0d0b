"""`data.batch_size=auto`: the largest batch that one GPU takes in training and evaluation, by trial."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch.optim import Optimizer

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.data.alike import MULTIPLE
from tasks.data.batches import DetectionBatch
from tasks.data.module import AUTO, ImageData
from tasks.data.prepared import Prepared
from tasks.data.segmentations import Size
from tasks.data.transforms import resized
from tasks.stages import parameters_by_stage

KEPT_FREE = 0.1  # of the memory that is free: fragments, a copy of the weights, pictures
SAMPLES = 8  # different ones in a trial's batch; with more images they come again
STEPS = 2  # of a trial: the first makes gradients and the optimizer's state, beside which the second runs

# How libraries say that an allocation failed, or that a tensor is too large for them
TOO_LARGE = ("out of memory", "ALLOC_FAILED", "INT_MAX", "CUDNN_STATUS_NOT_SUPPORTED")


def refuse_auto(cfg: DictConfig, stages: Sequence[str]) -> None:
    """Raises UsageError where `data.batch_size=auto` finds nothing: on a CPU, without a fit, on several GPUs.

    On several GPUs each process would try its own, and all have to take the smallest number found, by one
    `all_reduce` of the minimum after `largest_batch`; until that is built, a number is wanted.
    """
    if cfg.data.get("batch_size") != AUTO or not set(stages) - {"check"}:
        return
    if "fit" not in stages:
        raise UsageError(
            f"data.batch_size={AUTO} finds what training takes, and stages={list(stages)} has no fit; give a "
            "number, e.g. data.batch_size=8"
        )
    trainer = cfg.trainer
    if trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        raise UsageError(
            f"data.batch_size={AUTO} finds what fits a GPU; on a CPU give a number, e.g. data.batch_size=4"
        )
    if number_of_gpus(trainer.get("devices", 1)) != 1 or trainer.get("num_nodes", 1) != 1:
        raise UsageError(
            f"data.batch_size={AUTO} finds what fits one GPU, trainer.devices={trainer.devices} are more: "
            "find it with trainer.devices=1, and give that number, which is of one device"
        )


def number_of_gpus(devices: Any) -> int:
    """What Lightning takes `trainer.devices` for: a number, indices ([0, 1], "0,1"), "auto" or -1 for all."""
    if devices in ("auto", "-1", -1):
        return torch.cuda.device_count()
    if isinstance(devices, str) and "," in devices:
        return len([index for index in devices.split(",") if index.strip()])
    return int(devices) if isinstance(devices, int | str) else len(devices)


def found_batch_size(
    task: BaseTask,
    data: ImageData,
    optimizer: Callable[..., Optimizer],
    trainer: Trainer,
    say: Callable[[str], None],
    least_frozen: int | None = None,
) -> int:
    """The largest batch that fits the trainer's device, with a tenth of the free memory to spare.

    Tried are steps of training of a copy of the network, with losses, gradients, clipping and the optimizer's
    state, and predictions, on the most demanding images (`Demanding`) of `train` and `val`. The task, random
    states and the datamodule stay as they are.

    Args:
        task: on the CPU, not yet fitted.
        optimizer: makes the optimizer from parameters, with a keyword `lr`.
        trainer: of which the device and the precision are taken.
        say: is told what was found.
        least_frozen: stages of the body that are frozen at the end, where some begin to learn later
            (`backbone.unfreeze`): the trial takes that time's memory.

    Raises UsageError if not even one image fits.
    """
    device = trainer.strategy.root_device
    most, multiple = len(data.annotations("train")), data.sampling().get("repeats", 1)
    with isolate_rng(), most_of_the_memory(device):
        demanding = Demanding(data, "train"), Demanding(data, "val")
        trial = Trial(task, optimizer, trainer, *demanding, least_frozen)
        found = largest_batch(trial.fits, most, multiple)
    if not found:
        raise UsageError(
            f"data.batch_size={AUTO}: a step of training with {multiple} of the largest images does not fit "
            f"{device}; take a smaller data.image_size, model or backbone"
        )
    height, width = trial.training.shape
    all_of_them = ", all there are" if found == most else ""
    say(
        f"data.batch_size={AUTO}: {found} images of up to {height}×{width} fit {device}{all_of_them}, with "
        f"{KEPT_FREE:.0%} of its free memory to spare"
    )
    return found


def largest_batch(fits: Callable[[int], bool], most: int, multiple: int = 1) -> int:
    """The largest number of images, up to `most`, that fits: by doubling, then by bisection.

    fits: whether a number of images does; if so, all smaller ones are taken to.
    multiple: only multiples of it are tried, at least one, also where `most` is less.

    Returns 0 where not even the smallest fits. Begins with two: batch norm of one image's single cell fails.
    """
    most = max(1, most // multiple)
    low, high = 0, min(2, most)  # low fits; high is to be tried
    while fits(high * multiple):
        low = high
        if low == most:
            return low * multiple
        high = min(2 * low, most)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * multiple):
            low = middle
        else:
            high = middle
    return low * multiple


class Demanding:
    """Batches of the images of a split that take most memory.

    Of `train` the images with the most objects, at the largest size that augmentation gives them (several
    shorter sides, jitter), in padding for the widest and the highest of all, since a batch may hold both. Of
    other splits the largest, since `alike` takes images of another padding apart. The same few come again in
    larger batches. Of classifiers all images are of one size.
    """

    def __init__(self, data: ImageData, split: str) -> None:
        self.prepared = data.prepared(split)
        self.collate = type(data).collate
        annotations = data.annotations(split)
        self.length = len(annotations)
        indices = range(len(annotations))
        self.order = list(indices[:SAMPLES])
        self.padding = self.single = (0, 0)
        if isinstance(self.prepared, Prepared):
            self.prepared.shorts = [max(self.prepared.shorts)]
            self.prepared.jitter = (self.prepared.jitter[1],) * 2
            sizes = [largest(self.prepared, index) for index in indices]
            heights, widths = zip(*sizes, strict=True)
            self.padding = max(heights), max(widths)
            self.single = max(sizes, key=math.prod)
            demand = [math.prod(size) for size in sizes]
            if split == "train" and hasattr(annotations, "rows"):  # whose objects are counted
                demand = [rows.stop - rows.start for rows in map(annotations.rows, indices)]
            self.order = sorted(indices, key=demand.__getitem__, reverse=True)[:SAMPLES]
        self.shape = (0, 0)  # height and width of the last batch, with padding
        self._samples: list[Any] = []

    def batch(self, number: int) -> Any:
        """So many images, or all there are, on the CPU."""
        number = min(number, self.length)
        while len(self._samples) < min(number, len(self.order)):
            self._samples.append(self.prepared[0, 0, self.order[len(self._samples)]])
        batch = self.collate([self._samples[i % len(self._samples)] for i in range(number)])
        if isinstance(batch, DetectionBatch):
            batch = padded(batch, *(self.single if number == 1 else self.padding))
        self.shape = tuple(batch.images.shape[-2:])
        return batch


def largest(prepared: Prepared, index: int) -> Size:
    """An image's size, height and width, where jitter and several sides make it largest."""
    factor = max(prepared.jitter)
    short, long = round(max(prepared.shorts) * factor), round(prepared.long * factor)
    height, width = resized(*prepared.dataset.image_size(index), short, long)
    most = prepared.crop or (height, width)
    return min(height, most[0]), min(width, most[1])


def padded(batch: DetectionBatch, height: int, width: int) -> DetectionBatch:
    """The batch with padding at the right and at the bottom as for an image of this size, and no less."""
    rows, columns = (
        max(0, -(-side // MULTIPLE) * MULTIPLE - there)
        for side, there in zip((height, width), batch.images.shape[-2:], strict=True)
    )
    images = F.pad(batch.images, (0, columns, 0, rows))
    return batch._replace(images=images.contiguous(memory_format=torch.channels_last))


class Trial:
    """Steps of training, whose learning rate is 0, so that none can diverge, with a copy of the network."""

    def __init__(
        self,
        task: BaseTask,
        optimizer: Callable[..., Optimizer],
        trainer: Trainer,
        training: Demanding,
        evaluation: Demanding,
        least_frozen: int | None,
    ) -> None:
        self.device, self.precision = trainer.strategy.root_device, trainer.precision_plugin
        self.training, self.evaluation = training, evaluation
        copy = deepcopy(task)
        self.precision.convert_module(copy).to(self.device).train()
        if least_frozen is not None:
            stages = parameters_by_stage(copy.model, "backbone.unfreeze").values()
            for parameter in (p for stage in list(stages)[least_frozen:] for p in stage):
                parameter.requires_grad_(True)
        self.task, self.optimizer = copy, optimizer([p for p in copy.parameters() if p.requires_grad], lr=0.0)

    def fits(self, number: int) -> bool:
        """Whether training and evaluation with batches of so many images find memory."""
        try:
            self._train(self.training.batch(number))
            self._evaluate(self.evaluation.batch(number))
        except RuntimeError as fault:
            if not is_too_large(fault):
                raise
            fitting = False
            self.task.train()
        else:
            fitting = True
        self.optimizer.state.clear()
        self.optimizer.zero_grad()
        if not fitting:  # not before the fault is gone, whose traceback keeps what the steps held
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fitting

    def _train(self, batch: Any) -> None:
        batch = self.task.transfer_batch_to_device(batch, self.device, 0)
        for _ in range(STEPS):
            with self.precision.forward_context():
                total = torch.stack(list(self.task.losses(batch).values())).sum()
            self.optimizer.zero_grad()  # here as in Lightning: those of the last step are there until now
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
            self.optimizer.step()
            total.item()  # until then a GPU may be behind

    def _evaluate(self, batch: Any) -> None:
        """By the views of the stages, beside gradients and the optimizer's state."""
        batch = self.task.transfer_batch_to_device(batch, self.device, 0)
        self.task.eval()
        with torch.no_grad(), self.precision.forward_context():
            self.task.predict(batch)
        self.task.train()


def is_too_large(fault: RuntimeError) -> bool:
    """Whether an error says that memory ran out, or that a tensor is too large for an operation."""
    return isinstance(fault, torch.OutOfMemoryError) or any(words in str(fault) for words in TOO_LARGE)


@contextmanager
def most_of_the_memory(device: torch.device) -> Iterator[None]:
    """Inside, torch takes no more than what is free on a GPU at the beginning, but for `KEPT_FREE` of it."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((1 - KEPT_FREE) * free / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
