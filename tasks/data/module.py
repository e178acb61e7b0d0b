"""The datamodule of COCO files: one annotation file and one image folder a split."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.coco import CocoAnnotations, CocoDataset, read_coco
from tasks.data.images import MAX_PIXELS
from tasks.data.samplers import EvalSampler, Item, TrainLoader, TrainSampler
from tasks.data.shapes import write_shapes
from tasks.data.transforms import MIN_SIDE, Prepared, collate

Split = str | Mapping[str, str]


class CocoData(LightningDataModule):
    """Images with annotations in COCO's format.

    Args:
        root: folder of the dataset.
        train, val, test: each the name of a split (`root/annotations/instances_{split}.json` and
            `root/{split}/`, COCO's own layout) or a mapping with the paths `annotations` and `images`,
            absolute or relative to `root`. Without `test`, the test stage is judged on `val`.
        target: what the task learns from, set by the task.
        image_size: shorter side and longest allowed longer side an image is resized to, in pixels.
        jitter: range of a random factor on `image_size` in training.
        augment: transforms of `torchvision.transforms.v2` by name, applied in this order in training.
        batch_size: images a batch of one process.
        num_workers: processes that load images; None: one a core, but one core is left to the training.
        seed: of the order of images and of augmentation.
        follow_symlinks: links in the image folders may lead out of them.
        max_pixels: larger images are refused (decompression bombs).
        bit_depth: for 16-bit images, the number of bits that are in use.
        min_image_side: training leaves out images with a shorter side, in pixels.
        max_drop_fraction: more faulty annotations than this share end the run.
        worker_timeout: seconds after which a silent worker ends the run.
    """

    def __init__(
        self,
        root: str,
        train: Split = "train2017",
        val: Split = "val2017",
        test: Split | None = None,
        *,
        target: str = "boxes",
        image_size: Sequence[int] = (800, 1333),
        jitter: Sequence[float] = (1.0, 1.0),
        augment: Mapping[str, v2.Transform] | None = None,
        batch_size: int = 2,
        num_workers: int | None = None,
        seed: int = 0,
        follow_symlinks: bool = False,
        max_pixels: int = MAX_PIXELS,
        bit_depth: int | None = None,
        min_image_side: int = 8,
        max_drop_fraction: float = 0.01,
        worker_timeout: int = 300,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0)):
            if not isinstance(value, int) or value < least:
                raise UsageError(f"data.{name}={value}: a whole number of at least {least} is wanted")
        self.root = Path(root)
        self.splits: dict[str, Split] = {"train": train, "val": val, "test": test or val}
        self.test_is_val = test is None
        self.target = target
        self.image_size, self.jitter = _pair("data.image_size", image_size), _pair("data.jitter", jitter)
        self.augment = dict(augment or {})
        self.batch_size, self.seed = batch_size, seed
        self.num_workers = _workers() if num_workers is None else num_workers
        self.follow_symlinks = follow_symlinks
        self.reading: dict[str, Any] = {"max_pixels": max_pixels, "bit_depth": bit_depth}
        self.cleaning: dict[str, Any] = {
            "min_image_side": min_image_side,
            "max_drop_fraction": max_drop_fraction,
        }
        self.worker_timeout = worker_timeout
        self._annotations: dict[tuple[Path, Path, bool], CocoAnnotations] = {}

    # What is where.

    def paths(self, split: str) -> tuple[Path, Path]:
        """Annotation file and image folder of `train`, `val` or `test`."""
        where = self.splits[split]
        if isinstance(where, str):
            return self.root / "annotations" / f"instances_{where}.json", self.root / where
        unknown = set(where) ^ {"annotations", "images"}
        if unknown:
            raise UsageError(
                f"data.{split}={dict(where)}: give a split's name, or both paths: "
                f"data.{split}='{{annotations: FILE, images: FOLDER}}'"
            )
        return self.root / where["annotations"], self.root / where["images"]

    def annotation_file(self, split: str) -> Path:
        return self.paths(split)[0]

    def annotations(self, split: str) -> CocoAnnotations:
        """A split's annotations, read once: for `train` what can be learned from, else as they are."""
        paths, training = self.paths(split), split == "train"
        key = (*paths, training)
        if key not in self._annotations:
            read = read_coco(*paths, follow_symlinks=self.follow_symlinks)
            self._annotations[key] = read.clean(**self.cleaning) if training else read
        return self._annotations[key]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The training split's classes in the order of their labels 1…K, as plain containers."""
        return [{"id": c.id, "name": c.name} for c in self.annotations("train").categories]

    @property
    def names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, so that a fault shows before anything is trained."""
        train = self.annotations("train")
        for split in ("val", "test"):
            other = self.annotations(split)
            mine = [(c.id, c.name) for c in train.categories]
            theirs = [(c.id, c.name) for c in other.categories]
            if mine != theirs:
                odd = sorted(set(mine) ^ set(theirs))[:20]
                raise UsageError(
                    f"{self.annotation_file(split)}: its categories differ from those of "
                    f"{self.annotation_file('train')}: {odd}; make both lists of (id, name) equal"
                )

    def dataset(self, split: str) -> CocoDataset:
        """A split's images with their objects, decoded and not resized."""
        training = split == "train"
        return CocoDataset(
            self.annotations(split), split, training=training, target=self.target, **self.reading
        )

    def train_batches(self, world_size: int) -> int:
        """Batches an epoch of one process."""
        return TrainSampler(len(self.annotations("train")), self.batch_size, 0, 0, world_size).batches

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        self._name_boxes_lost_by_resizing()
        dataset = Prepared(
            self.dataset("train"),
            self.image_size,
            jitter=self.jitter,
            augment=list(self.augment.values()),
            seed=self.seed,
            training=True,
        )
        sampler = TrainSampler(
            len(dataset), self.batch_size, self.seed, trainer.global_rank, trainer.world_size
        )
        return TrainLoader(dataset, sampler=sampler, progress=self._progress, **self._loading())

    def _name_boxes_lost_by_resizing(self) -> None:
        annotations = self.annotations("train")
        sizes = annotations.sizes[annotations.image_of()].double()
        short, long = (side * self.jitter[0] for side in self.image_size)
        scale = torch.minimum(short / sizes.amin(dim=1), long / sizes.amax(dim=1))
        lost = (annotations.xywh[:, 2:] * scale[:, None]).amin(dim=1) < MIN_SIDE
        if lost.any():
            ids = annotations.ids[lost].tolist()
            rank_zero_warn(
                f"{annotations.path}: {len(ids)} boxes have a side of less than {MIN_SIDE:g} pixel at "
                f"data.image_size={list(self.image_size)} and are not trained on (ids {ids[:20]})"
            )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        dataset = Prepared(self.dataset(split), self.image_size)
        sampler = EvalSampler(len(dataset), trainer.global_rank, trainer.world_size)
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def state_dict(self) -> dict[str, Any]:
        """Part of every checkpoint: a run does not go on with other annotations than it began with."""
        return {split: self._fingerprint(split) for split in ("train", "val")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn != "fit":  # a detector may be judged on any images with the same classes
            return
        for split, known in state_dict.items():
            if self._fingerprint(split) != known:
                raise UsageError(
                    f"{self.annotation_file(split)} has changed since the run began; put the old file back, "
                    "or start a new run, with backbone.weights=FOLDER to begin from this one's weights"
                )

    @cache  # noqa: B019 - there is one datamodule a run
    def _fingerprint(self, split: str) -> str:
        with self.annotation_file(split).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _loading(self) -> dict[str, Any]:
        workers = self.num_workers
        return {
            "batch_size": self.batch_size,
            "collate_fn": collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "timeout": self.worker_timeout if workers else 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _progress(self) -> Item:
        """Epoch and batches trained on in it, for checkpoints within an epoch."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        batches = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return loop.epoch_progress.current.processed, batches  # type: ignore[attr-defined]


def _pair(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    if len(values) != 2:
        raise UsageError(f"{name}={list(values)}: two numbers are wanted")
    return values[0], values[1]


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


class ShapesData(CocoData):
    """The embedded dataset, written to `root` on first use (`tasks.data.shapes`).

    Args:
        images: how many each split has.
        Otherwise those of `CocoData`.
    """

    def __init__(self, root: str, images: Mapping[str, int], **settings: Any) -> None:
        super().__init__(root, **settings)
        self.images = dict(images)

    def prepare_data(self) -> None:
        write_shapes(self.root, **self.images)
