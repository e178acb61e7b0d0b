"""What every metric of a split shares: a state by image id, brought together once and judged once.

The state is `{image id: what was found}`. Processes bring theirs together once, sorted by image id, and one
of them judges the whole split; so neither the number of processes nor the order or size of batches changes
a number.

A metric fills in one verb, `_judge(found)`.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from tasks.metrics.between import Between

Found = TypeVar("Found")
Numbers = dict[str, float]


class SplitMetric(Generic[Found]):
    """Judges the images of a split.

    Args:
        image_ids: the split's images; None where only those reported are known.
        source: what the split is read from, named in messages.
    """

    per_class_name: str  # what `per_class` holds: "AP", "accuracy", "IoU"

    def __init__(self, image_ids: Iterable[int] | None, source: str) -> None:
        self._between = Between()
        self._image_ids = None if image_ids is None else {int(i) for i in image_ids}
        self._source = source
        self.reset()

    def reset(self) -> None:
        """Forgets everything reported; call it before a split is judged."""
        self._found: dict[int, Found] = {}
        self.per_class_of: dict[str, Numbers] = {}

    @property
    def reported(self) -> set[int]:
        """Ids of the images this process has reported; after `compute`, on rank 0, of all."""
        return set(self._found)

    @property
    def per_class(self) -> Numbers:
        """After `compute`: `per_class_name` by class name (of several kinds, the first of `per_class_of`)."""
        return next(iter(self.per_class_of.values()), {})

    @property
    def class_numbers(self) -> Numbers:
        """After `compute`: what the log says of each class, named like "IoU/road"."""
        return {f"{self.per_class_name}/{name}": value for name, value in self.per_class.items()}

    def compute(self, image_ids: Iterable[int] | None = None) -> Numbers:
        """The numbers of the whole split, the same on every process; every process must call it.

        `image_ids` judges only these images, of all processes together, and says so: for runs cut short on
        purpose, as `compute(metric.reported)`. Rank 0 holds what all processes found afterwards.

        Raises RuntimeError, on every process, if the images reported are not exactly those to be judged.
        """
        asked = None if image_ids is None else {int(i) for i in image_ids}
        numbers, self.per_class_of = self._between.on_first(self._bring_together, (self._found, asked))
        return numbers

    def _bring_together(
        self, shards: Sequence[tuple[dict[int, Found], set[int] | None]]
    ) -> tuple[Numbers, dict[str, Numbers]]:
        merged: dict[int, Found] = {}
        for found, _ in shards:  # in the order of ranks: the first to report an image owns it
            merged = found | merged
        self._found = dict(sorted(merged.items()))
        subsets = [subset for _, subset in shards if subset is not None]
        self._check_images(set().union(*subsets) if subsets else None)
        return self._judge(self._found) if self._found else ({}, {})  # to hotcoco no image means every image

    def _check_images(self, asked: set[int] | None) -> None:
        known = self.reported if self._image_ids is None else self._image_ids
        expected = known if asked is None else asked
        for problem, ids in {
            "were not reported": expected - self.reported,
            "were reported and are not to be judged": self.reported - expected,
            "are not of this split": expected - known,
        }.items():
            if ids:
                raise RuntimeError(
                    f"{self._source}: {len(ids)} images {problem} ({len(expected)} are to be judged): "
                    f"{sorted(ids)[:20]}"
                )
        if expected != known:
            warnings.warn(
                f"{self._source}: {self.per_class_name} is of {len(expected)} of the split's {len(known)} "
                "images only",
                stacklevel=5,
            )

    def _judge(self, found: Mapping[int, Found]) -> tuple[Numbers, dict[str, Numbers]]:
        """The numbers, and those by class name for each kind; called on rank 0 with ids ascending, at
        least one.
        """
        raise NotImplementedError


def distinct(names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """Class names, with its id behind each that several classes have."""
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({i})" for name, i in zip(names, ids, strict=True)]
