"""Which images, in which order, on which process: a function of seed, epoch and position, of nothing else."""

from collections.abc import Callable, Iterator
from math import fsum  # exact, so that the order of the factors changes nothing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from resnext_backbones.errors import UsageError

Item = tuple[int, int, int]
"""(epoch, copy, index of the image): what training asks a dataset for; augmentation is seeded by it.

copy: how often the image came before in this epoch."""

Position = tuple[int, int]
"""(epoch, batches of it that were trained on)."""

# What is drawn besides an epoch's order, each from a generator of its own
BATCHES, ROUNDING, REPEATED, SUBSET, HOLDOUT = range(1, 6)


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))


def permutation(length: int, *numbers: int) -> Tensor:
    """A permutation of `range(length)`, int64, that depends on `numbers` (seed, epoch, …) alone."""
    return torch.randperm(length, generator=generator(*numbers))


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
    """This process's share of each epoch's samples, the same number on every process.

    The epoch's samples are dealt out in turn (`order[rank::world_size]`), so that a global batch holds the
    same samples whatever the number of processes. They are filled up from their own start to whole global
    batches: every image is seen each epoch, every batch is full. An image that comes more than once in an
    epoch comes as copy 0, 1, …, so that each is augmented differently. In a batch of one process, taken as a
    ring, copies of an image do not stand side by side unless they are half of it: `Mix` mixes neighbours.

    Args:
        length: images in the dataset.
        batch_size: images a batch of one process.
        seed, rank, world_size: see above.
        aspect: width by height of each image, float [length]. A global batch then holds images wider than
            high or others, since a mixed one would be mostly padding (Detectron2's
            `AspectRatioGroupedDataset`). What is left of both kinds shares one batch, at most two, and all
            batches come in random order: an epoch is as long as without, but for rounding, and images of a
            rare kind are not seen more often than others.
        repeat_factors: how often an epoch shows each image on average, float64 [length], each at least 1;
            see `repeat_factors`. An epoch's length is their sum, rounded, the same every epoch.
        repeats: so many copies of an image stand in the same global batch (repeated augmentation: Hoffer et
            al. 2019, arXiv 1901.09335; DeiT's `RASampler`). An epoch stays as long as without, so it sees
            only one in `repeats` images, and `repeats` epochs see all of them.

    Raises:
        UsageError: `repeats` does not divide the global batch.
        ValueError: a factor is below 1.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        aspect: Tensor | None = None,
        repeat_factors: Tensor | None = None,
        repeats: int = 1,
    ) -> None:
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.global_batch = batch_size * world_size
        if repeats < 1 or self.global_batch % repeats:
            raise UsageError(
                f"data.repeats={repeats} does not divide the {self.global_batch} images of a batch of all "
                "processes; the copies of an image would fall into several batches"
            )
        if repeat_factors is not None and not bool((repeat_factors >= 1).all()):
            raise ValueError("a repeat factor is below 1: its image would be missing from some epochs")
        wide = torch.ones(length, dtype=torch.bool) if aspect is None else aspect > 1
        self.kinds = [kind for kind in (wide.nonzero().squeeze(1), (~wide).nonzero().squeeze(1)) if len(kind)]
        self.factors, self.repeats = repeat_factors, repeats
        self.epoch = 0
        self._resume_at: Position = (0, 0)
        self.batches = -(-sum(self._seen(kind) for kind in self.kinds) * repeats // self.global_batch)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """In `epoch`, leave out the first `batch` batches: they were trained on before the interruption."""
        self._resume_at = (epoch, batch)

    def __iter__(self) -> Iterator[Item]:
        images, epoch = self.global_batches().flatten(), self.epoch
        share = torch.stack([occurrence(images), images], dim=1)[self.rank :: self.world_size]
        share = share.view(-1, self.batch_size, 2)[:, halves_in_turns(self.batch_size)].flatten(0, 1)
        interrupted, batch = self._resume_at
        first = batch * self.batch_size if epoch == interrupted else 0
        return ((epoch, copy, index) for copy, index in share[first:].tolist())

    def global_batches(self) -> Tensor:
        """The epoch's images of all processes, int64 [batches, global batch], equal ones side by side."""
        number = self.global_batch // self.repeats  # of different images in a batch
        kinds = [self._images_of(kind) for kind in self.kinds]
        whole, rest = zip(*(k.tensor_split([len(k) // number * number]) for k in kinds), strict=True)
        images = torch.cat([*whole, *rest])
        filled = torch.arange(self.batches * number) % len(images)
        filled = filled.view(-1, number).sort(dim=1).values  # there may be fewer images than fit a batch
        batches = images[filled].repeat_interleave(self.repeats, dim=1)
        if len(self.kinds) == 1:
            return batches
        return batches[permutation(len(batches), self.seed, self.epoch, BATCHES)]

    def _images_of(self, kind: Tensor) -> Tensor:
        # With r repeats an order serves r epochs, each of which takes its part of it, fill-ups included
        cycle, part = divmod(self.epoch, self.repeats)
        order = self._order(kind, cycle)
        seen = self._seen(kind)
        return order[torch.arange(part * seen, (part + 1) * seen) % len(order)]

    def _order(self, kind: Tensor, cycle: int) -> Tensor:
        """All images of a kind in random order, as often as their factors say."""
        order = kind[permutation(len(kind), self.seed, cycle)]
        if self.factors is None:
            return order
        offset = torch.rand((), generator=generator(self.seed, cycle, ROUNDING), dtype=torch.float64)
        order = order.repeat_interleave(rounded(self.factors[order], float(offset)))
        return order[permutation(len(order), self.seed, cycle, REPEATED)]

    def _length(self, kind: Tensor) -> int:
        return len(kind) if self.factors is None else round(fsum(self.factors[kind].tolist()))

    def _seen(self, kind: Tensor) -> int:
        """How many images of a kind an epoch shows, each `repeats` times."""
        return -(-self._length(kind) // self.repeats)


def halves_in_turns(number: int) -> Tensor:
    """The first, the first of the second half, the second, …: 5 gives [0, 3, 1, 4, 2].

    Entries that stood side by side, less than half of all, are then no neighbours, the last and the first
    counted as such too.
    """
    return torch.argsort(torch.arange(number) % -(-number // 2), stable=True)


def occurrence(values: Tensor) -> Tensor:
    """For each entry, how many equal ones stand before it: [5, 3, 5, 5] gives [0, 0, 1, 2]."""
    order = torch.argsort(values, stable=True)
    _, counts = values[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    before = torch.empty_like(values)
    before[order] = torch.arange(len(values)) - starts
    return before


def rounded(factors: Tensor, offset: float) -> Tensor:
    """Factors rounded up or down at random, to whole numbers with the right mean and always the same sum.

    Systematic sampling: the fractional parts stand one after the other on a line, and the part on which one
    of the points `offset`, `offset + 1`, … falls is rounded up. Over all offsets each factor is met on
    average, but for half a point in all at most, by which the parts are shrunk, or grow towards 1, so that
    the line holds a whole number of points.

    Args:
        factors: float [N], not negative. offset: uniform in 0…1, drawn once an epoch.

    Returns:
        int64 [N], whose sum is that of the factors, rounded.
    """
    factors = factors.double()
    whole = factors.floor()
    points = round(fsum(factors.tolist())) - int(whole.sum())
    part = factors - whole
    missing = points - part.sum()
    if missing > 0:
        room = (1 - part) * (part > 0)
        part += room * (missing / room.sum())
    elif points:
        part *= points / part.sum()
    ends = part.cumsum(dim=0)
    below = (ends - offset).ceil().clamp(0, points)
    below[-1] = points
    return (whole + below.diff(prepend=below.new_zeros(1))).long()


def repeat_factors(image_of: Tensor, labels: Tensor, images: int, threshold: float) -> Tensor:
    """How often an epoch is to show each image so that rare classes are seen more often.

    Repeat factor sampling of LVIS (Gupta et al. 2019, arXiv 1908.03195): a class on the share
    f of the images has the factor max(1, sqrt(threshold / f)), an image the largest of its classes' factors,
    and 1 without any.

    Args:
        image_of, labels: int64 [N], the image (0…images - 1) and the class (from 0) of each object.
        images: how many there are, those without objects included.
        threshold: classes on a smaller share of the images than this are repeated (LVIS takes 0.001).

    Returns:
        float64 [images], each at least 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            f"data.repeat_threshold={threshold}: a share of the images is wanted, above 0, up to 1"
        )
    factors = torch.ones(images, dtype=torch.float64)
    if not len(labels):
        return factors
    classes = int(labels.max()) + 1
    pairs = torch.unique(image_of * classes + labels)  # a class counts once an image
    image, label = pairs // classes, pairs % classes
    share = torch.bincount(label, minlength=classes) / images
    of_class = (threshold / share.double()).sqrt()
    return factors.scatter_reduce(0, image, of_class[label], "amax")  # the ones take part


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

    def __init__(self, *args: Any, progress: Callable[[], Position], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        epoch, batch = self._progress()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.resume_at(state["epoch"], state["batch"])  # type: ignore[attr-defined]


def subset(length: int, fraction: float, seed: int, labels: Tensor | None = None) -> Tensor:
    """A random part of a dataset, in which the parts for smaller fractions are contained.

    Args:
        length: images in the dataset.
        fraction: what share of them is taken, at least one.
        seed: the same seed gives the same part.
        labels: int64 [length]; then of each class this share is taken, at least one of each.

    Returns:
        int64, ascending indices.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"data.fraction={fraction}: a share of the images is wanted, above 0, up to 1")
    rank, size = _shuffled(length, labels, seed, SUBSET)
    return (rank < _share(size, fraction).clamp(min=1)).nonzero().squeeze(1)


def holdout(length: int, fraction: float, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Splits a dataset at random into one part to train on and one to validate on.

    Args:
        length: images in the dataset.
        fraction: what share of them is held out for validation, at least one.
        seed: the same seed gives the same split.
        labels: int64 [length]; then of each class this share is held out, at least one of each that has two.

    Returns:
        The indices to train on and those held out, int64, ascending, without a common one; no class (without
        labels: not the dataset) loses all its images to validation.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"data.val_fraction={fraction}: a share of the images is wanted, between 0 and 1")
    if length < 2:
        raise UsageError(f"data.val_fraction={fraction}: {length} images cannot be split into two parts")
    rank, size = _shuffled(length, labels, seed, HOLDOUT)
    held_out = rank < torch.minimum(_share(size, fraction).clamp(min=1), size - 1)
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def _shuffled(length: int, labels: Tensor | None, seed: int, draw: int) -> tuple[Tensor, Tensor]:
    """Each image's place in a random order of its class, and how many its class has; int64 [length] each."""
    labels = torch.zeros(length, dtype=torch.int64) if labels is None else labels
    order = permutation(length, seed, 0, draw)
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(dim=0) - counts
    rank = torch.empty(length, dtype=torch.int64)
    rank[by_class] = torch.arange(length)
    return rank - starts[labels], counts[labels]


def _share(size: Tensor, fraction: float) -> Tensor:
    return (size.double() * fraction).round().long()
