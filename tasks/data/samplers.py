"""Which images, in which order, on which process: a function of seed, epoch and position, of nothing else."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

Item = tuple[int, int]
"""(epoch, index of the image): what training asks a dataset for, so that augmentation can be seeded by it."""


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(length)` that depends on `seed` and `epoch` alone."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(length, generator=generator).tolist()


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers, such that neighbouring numbers give unrelated seeds.

    The finaliser of SplitMix64 (Steele et al. 2014), applied once a number.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class TrainSampler(Sampler[Item]):
    """This process's share of each epoch's permutation, the same number of samples on every process.

    The permutation is dealt out in turn (`order[rank::world_size]`), so that a global batch holds the same
    images whatever the number of processes. It is filled up from its own start to whole global batches:
    every image is seen each epoch, every batch is full.

    Args:
        length: images in the dataset.
        batch_size: images a batch of one process.
        seed, rank, world_size: see above.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._resume_at: Item = (0, 0)

    @property
    def batches(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """In `epoch`, leave out the first `batch` batches: they were trained on before the interruption."""
        self._resume_at = (epoch, batch)

    def __iter__(self) -> Iterator[Item]:
        order = epoch_order(self.length, self.seed, self.epoch)
        positions = range(self.rank, len(self) * self.world_size, self.world_size)
        share = [order[position % self.length] for position in positions]
        epoch, batch = self._resume_at
        first = batch * self.batch_size if epoch == self.epoch else 0
        return ((self.epoch, index) for index in share[first:])


class EvalSampler(Sampler[int]):
    """This process's share of the images, in order and not padded: no image is evaluated twice.

    Only a process without any image gets image 0, since Lightning asks for at least one batch on each; the
    metric keeps one report an image id.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = list(range(rank, length, world_size)) or [0]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class TrainLoader(DataLoader):
    """A loader over `TrainSampler` that Lightning can resume in the middle of an epoch.

    Args:
        progress: gives (epoch, batches trained on in it). The loader cannot count them itself, since its
            workers run ahead of the training.
    """

    def __init__(self, *args: Any, progress: Callable[[], Item], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        epoch, batch = self._progress()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.resume_at(state["epoch"], state["batch"])  # type: ignore[attr-defined]
