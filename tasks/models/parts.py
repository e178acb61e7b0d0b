"""What a network is made of, said by the network itself, so that weights are handed over part by part."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Part:
    """Modules that come along together or not at all.

    Attributes:
        name: for people.
        modules: whose parameters these are, by dotted name.
        keys: of the configuration, which decide on their shapes and on what they mean.
    """

    name: str
    modules: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ClassLayer:
    """A layer with numbers of its own for each class, which are another network's only by the class's name.

    Along the channels that it gives stand `groups` times the classes, the background before them, and of
    each class `rows`.

    Attributes:
        name: of the module, dotted.
        rows: of a class: 4 where each has a box of its own.
        groups: 9 where each of nine anchors has scores of its own.
        background: whether what comes before the first class is the background.
        of: what has the rows; a network's classes and its keypoints are named apart.
        transposed: whether it is a transposed convolution, whose weight has what it gives in second place.
    """

    name: str
    rows: int = 1
    groups: int = 1
    background: bool = True
    of: Literal["classes", "keypoints"] = "classes"
    transposed: bool = False
