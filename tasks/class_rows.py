"""Which rows of a layer are which class's, in two networks that learned different classes."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resnext_backbones.receipt import Clash, few
from tasks.models.parts import ClassLayer

NOBODY = "N/A"  # torchvision's name for the ids that COCO left without a class


@dataclass(frozen=True)
class Rows:
    """The classes (or keypoints) of a source that another network goes on with.

    Attributes:
        of: "classes" or "keypoints".
        pairs: from a class here to the same one there, both counted from 0 without the background.
        there: how many the source has.
        kept, new: names here that it has, and has not.
        dropped: names there that are not taken.
        renamed: of those kept which are written otherwise there, both names.
        named: whether the source names them at all.
    """

    of: str
    pairs: dict[int, int]
    there: int
    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    named: bool

    @property
    def guessed(self) -> bool:
        """Whether rows come along whose classes are only assumed."""
        return bool(self.pairs) and not self.named

    def as_dict(self) -> dict[str, Any]:
        names = {"kept": self.kept, "new": self.new, "dropped": self.dropped}
        plain = {"of": self.of, "named": self.named, "there": self.there}
        return plain | {key: list(value) for key, value in names.items()} | {"renamed": dict(self.renamed)}

    def __str__(self) -> str:
        here = len(self.kept) + len(self.new)
        if self.guessed:
            return (
                f"all {here} kept in their order, as if they were {few(self.kept)}, since the source does "
                "not name its own"
            )
        if not self.named:
            return f"all {here} new, since the source does not name its {self.there}"
        said = [f"{len(self.kept)} of {here} kept" + (f" ({few(self.kept)})" if self.kept else "")]
        pairs = few(f"{mine} as {theirs}" for mine, theirs in self.renamed)
        said += [f"among them {pairs}"] if self.renamed else []
        said += [f"{len(self.new)} new ({few(self.new)})"] if self.new else []
        said += [f"{len(self.dropped)} not taken ({few(self.dropped)})"] if self.dropped else []
        return ", ".join(said)


def match(of: str, here: Sequence[str], there: Sequence[str] | int) -> Rows:
    """The rows that come along: those of equal names, and where none are known, as many in their order.

    Names that differ in capitals, spaces, hyphens or underscores only are equal, too, where that leaves one
    of each among those without an equal.

    Args:
        of: "classes" or "keypoints".
        here: names, in the order of rows.
        there: names, or only how many there are.
    """
    if isinstance(there, int):
        same = {i: i for i in range(there)} if there == len(here) else {}
        kept, new = (tuple(here), ()) if same else ((), tuple(here))
        return Rows(of, same, there, kept, new, (), (), named=False)
    if list(here) == list(there):  # also what bears no name of its own
        pairs = {i: i for i in range(len(here))}
    else:
        pairs = _pairs(dict(enumerate(here)), dict(enumerate(there)))
    left = {i: _folded(name) for i, name in enumerate(here) if i not in pairs and name != NOBODY}
    free = {j: _folded(name) for j, name in enumerate(there) if j not in pairs.values() and name != NOBODY}
    alike = _pairs(left, free)
    pairs = dict(sorted((pairs | alike).items()))
    return Rows(
        of,
        pairs,
        len(there),
        kept=tuple(here[i] for i in pairs),
        new=tuple(name for i, name in enumerate(here) if i not in pairs),
        dropped=tuple(n for j, n in enumerate(there) if j not in pairs.values() and n != NOBODY),
        renamed=tuple((here[i], there[j]) for i, j in sorted(alike.items())),
        named=True,
    )


def _pairs(here: Mapping[int, str], there: Mapping[int, str]) -> dict[int, int]:
    """From each name to its equal, of names that stand once on either side."""
    mine, theirs = _once(here), _once(there)
    return {mine[name]: theirs[name] for name in mine if name in theirs and name != NOBODY}


def _once(names: Mapping[int, str]) -> dict[str, int]:
    counts = Counter(names.values())
    return {name: i for i, name in names.items() if counts[name] == 1}


def _folded(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")


def count(layer: ClassLayer, there: Tensor) -> int:
    """How many classes a tensor of this kind of layer has rows for, parts of one left out."""
    length = there.shape[_axis(layer, there)] if there.ndim else 0
    return max(0, length // (layer.groups * layer.rows) - layer.background)


def misfit(name: str, layer: ClassLayer, here: Tensor, there: Tensor, rows: Rows) -> str | None:
    """What keeps the rows of a tensor from being taken, if anything does."""
    axis = _axis(layer, here)
    if there.ndim != here.ndim or _without(axis, here.shape) != _without(axis, there.shape):
        return str(Clash(name, tuple(here.shape), tuple(there.shape)))
    wanted = layer.groups * (rows.there + layer.background) * layer.rows
    if there.shape[axis] != wanted:
        return (
            f"{name} has {there.shape[axis]} rows there, which for {rows.there} {rows.of} would be {wanted}"
        )
    return None


def taken(layer: ClassLayer, here: Tensor, there: Tensor, rows: Rows) -> Tensor:
    """`here` with the rows that come along, the background's among them."""
    new = here.clone()
    views = [
        tensor.movedim(_axis(layer, tensor), 0).unflatten(0, (layer.groups, -1, layer.rows))
        for tensor in (new, there)
    ]
    first = int(layer.background)
    pairs = ({0: 0} if layer.background else {}) | {i + first: j + first for i, j in rows.pairs.items()}
    views[0][:, list(pairs)] = views[1][:, list(pairs.values())]
    return new


def _axis(layer: ClassLayer, tensor: Tensor) -> int:
    return 1 if layer.transposed and tensor.ndim > 1 else 0


def _without(axis: int, shape: Collection[int]) -> list[int]:
    return [length for i, length in enumerate(shape) if i != axis]
