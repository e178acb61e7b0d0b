"""What the datamodules of all sources share: loaders, the share of each process, resuming within an epoch."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext_backbones.errors import UsageError
from tasks.data.check import start_report
from tasks.data.images import MAX_PIXELS
from tasks.data.keypoints import Skeleton
from tasks.data.samplers import EvalSampler, TrainLoader, TrainSampler, holdout

SPLITS = ("train", "val", "test")
AUTO = "auto"  # in place of `batch_size`: `tasks.batch_size` finds what fits


class ImageData(LightningDataModule):
    """Images of three splits with what one task learns from.

    A source fills in `annotations`, `categories`, `dataset`, `prepared` and `fingerprint`, and where it has
    more to say `image_ids`, `sampling` and `model_arguments`.

    Args:
        root: folder of the dataset.
        target: what the task learns from, of the source's `TARGETS`; set by the task.
        train, val, test: where each split is, in the source's terms. Without `val`, a share of `train` is
            held out; without `test`, the test stage is judged on `val`.
        val_fraction: the share of the training images that is held out to validate on; None: there is a
            split.
        fraction: share of the training images that is used, for learning curves; a smaller share is part of a
            larger one.
        batch_size: images a batch of one process; "auto": what fits a GPU, which `tasks.batch_size` finds
            before the fit and `tasks.run` puts here; until then one.
        num_workers: processes that load images; None: one a core, but one core is left to the training.
        seed: of the order of images and of augmentation.
        split_seed: of the choice of a fraction and of what is held out, so that runs with several seeds are
            judged on the same images.
        follow_symlinks: links in the image folders may lead out of them.
        max_pixels: larger images are refused (decompression bombs).
        bit_depth: for 16-bit images, the number of bits that are in use.
        worker_timeout: seconds after which a silent worker ends the run.
    """

    TARGETS: ClassVar[tuple[str, ...]] = ()
    collate: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        root: str,
        target: str,
        train: Any,
        val: Any,
        test: Any,
        *,
        val_fraction: float | None = None,
        fraction: float = 1.0,
        batch_size: int | Literal["auto"] = 2,
        num_workers: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        follow_symlinks: bool = False,
        max_pixels: int = MAX_PIXELS,
        bit_depth: int | None = None,
        worker_timeout: int = 300,
    ) -> None:
        super().__init__()
        number = 1 if batch_size == AUTO else batch_size
        for name, value, least in (("batch_size", number, 1), ("num_workers", num_workers or 0, 0)):
            if not isinstance(value, int) or value < least:
                raise UsageError(f"data.{name}={value}: a whole number of at least {least} is wanted")
        if not 0 < fraction <= 1:
            raise UsageError(f"data.fraction={fraction}: a share above 0 and up to 1 is wanted")
        if target not in self.TARGETS:
            raise UsageError(
                f"data.target={target}: {type(self).__name__} is read for {', '.join(self.TARGETS)}; choose "
                f"{' or '.join(map(learning_from, self.TARGETS))}, or another data=…"
            )
        self.root, self.target = Path(root), target
        refuse_unclear_val(val, val_fraction)
        self.splits: dict[str, Any] = {"train": train, "val": val or train, "test": test or val or train}
        self.test_is_val = test is None
        self.val_fraction, self.fraction = val_fraction, fraction
        self.batch_size, self.seed, self.split_seed = int(number), seed, split_seed
        self.num_workers = spare_cores() if num_workers is None else num_workers
        self.follow_symlinks = follow_symlinks
        self.reading: dict[str, Any] = {"max_pixels": max_pixels, "bit_depth": bit_depth}
        self.worker_timeout = worker_timeout

    # What a source fills in.

    def annotations(self, split: str) -> Any:
        """What is known of a split without decoding an image (`inspection.Described`), read once."""
        raise NotImplementedError

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The classes in the order of their labels, as plain containers with `id` and `name`."""
        raise NotImplementedError

    def dataset(self, split: str) -> Any:
        """A split's images with what is known of them, decoded and not resized."""
        raise NotImplementedError

    def prepared(self, split: str) -> Dataset:
        """A split as the network is fed with it: augmented for `train`, else not."""
        raise NotImplementedError

    def fingerprint(self, split: str) -> str:
        """Another one wherever a split is another one, whatever its images hold."""
        raise NotImplementedError

    def image_ids(self, split: str) -> Sequence[int]:
        """Of all images of a split, as batches name them."""
        return range(len(self.annotations(split)))

    def sampling(self) -> dict[str, Any]:
        """Arguments of `TrainSampler` beyond the common ones."""
        return {}

    @property
    def skeleton(self) -> Skeleton | None:
        """Of the keypoints, where they are the target."""
        return None

    @property
    def names(self) -> list[str]:
        """The classes' names."""
        return [category["name"] for category in self.categories]

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the network's builder has to know of the data."""
        return {"num_classes": len(self.categories)}

    def report(self) -> str:
        """What is known of each split without decoding an image, a line each, faults named."""
        return start_report(
            {s: self.annotations(s) for s in SPLITS if not (s == "test" and self.test_is_val)}
        )

    # Parts of a split.

    def held_out(self, length: int, source: str, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Indices of those to train on and those held out, of `length` images; by class with `labels`."""
        assert self.val_fraction is not None
        train, val = holdout(length, self.val_fraction, self.split_seed, labels)
        if not len(train) or not len(val):
            raise UsageError(
                f"{source}: {length} images cannot be split with data.val_fraction={self.val_fraction}"
            )
        return train, val

    # Lightning's hooks.

    def train_sampler(self, rank: int, world_size: int) -> TrainSampler:
        length = len(self.annotations("train"))
        return TrainSampler(length, self.batch_size, self.seed, rank, world_size, **self.sampling())

    def train_batches(self, world_size: int) -> int:
        """Batches an epoch of one process."""
        return self.train_sampler(0, world_size).batches

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        sampler = self.train_sampler(trainer.global_rank, trainer.world_size)
        return TrainLoader(
            self.prepared("train"), sampler=sampler, progress=self._progress, **self._loading()
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        dataset = self.prepared(split)
        sampler = EvalSampler(len(dataset), trainer.global_rank, trainer.world_size)  # type: ignore[arg-type]
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def state_dict(self) -> dict[str, Any]:
        """Part of every checkpoint: a run does not go on with other data than it began with."""
        return {split: self.fingerprint(split) for split in ("train", "val")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn != "fit":  # a network may be judged on any images with the same classes
            return
        for split, known in state_dict.items():
            if self.fingerprint(split) != known:
                raise UsageError(
                    f"{self.annotations(split).path} has changed since the run began; put back what was "
                    "there, or start a new run, with backbone.weights=FOLDER to begin from this one's weights"
                )

    def _loading(self) -> dict[str, Any]:
        workers = self.num_workers
        return {
            "batch_size": self.batch_size,
            "collate_fn": type(self).collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "timeout": self.worker_timeout if workers else 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _progress(self) -> tuple[int, int]:
        """Epoch and batches trained on in it, for checkpoints within an epoch."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        batches = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return loop.epoch_progress.current.processed, batches  # type: ignore[attr-defined]


TASK = {
    "label": "classification",
    "boxes": "detection",
    "masks": "instance_segmentation",
    "keypoints": "keypoints",
    "semantic": "semantic_segmentation",
}


def learning_from(target: str) -> str:
    return f"task={TASK[target]}" if target in TASK else f"a task that learns from data.target={target}"


def refuse_unclear_val(val: Any, val_fraction: float | None) -> None:
    if val is not None and val_fraction is not None:
        raise UsageError(
            f"data.val={val} and data.val_fraction={val_fraction}: both are given; leave one out, with "
            "data.val=null to hold a share of the training images out"
        )
    if val is None and (val_fraction is None or not 0 < val_fraction < 1):
        raise UsageError(
            f"data.val is not given and data.val_fraction={val_fraction}: name a split, or hold a share "
            "of the training images out with data.val_fraction=0.2"
        )


def pair(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    if len(values) != 2:
        raise UsageError(f"{name}={list(values)}: two numbers are wanted")
    return values[0], values[1]


def spare_cores() -> int:
    """Processes that load images by default, 1…8: one a core, but one core is left to the network."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))
