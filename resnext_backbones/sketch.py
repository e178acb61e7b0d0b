"""What a classifier's levels are, measured on a sketch of it: a copy that has shapes and no data."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .weight_files import first_line

STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


@dataclass(frozen=True)
class Grid:
    """How the cells of a level lie along n pixels: (n - first) // stride + 1 of them.

    That is so for every chain of convolutions and pools, since a floor of a floor is one floor. `first`
    pixels make the first cell: 1 where every kernel is padded (ResNet), `stride` where patches are cut (VGG),
    more where kernels are not padded (75 for c5 of Inception-v3).
    """

    stride: int
    first: int

    @property
    def centre(self) -> int:
        """The pixel that the first cell is centred on, for kernels padded alike on both sides."""
        return (self.first - 1) // 2

    def pixels(self, cells: int) -> int:
        """The fewest that make so many cells."""
        return self.first + self.stride * (cells - 1)


SIZES = (256, 320), (320, 256)  # of images, told apart: a map's height, its width and its channels


@dataclass(frozen=True)
class Unit:
    """What a module of the network did with a sketch of an image; stride 0 where its output is no map."""

    name: str
    leaf: bool
    input: object
    output: object
    stride: float
    channels_last: bool


def sketched(net: Any) -> Any:
    """A copy without data, in evaluation mode: it computes shapes, in milliseconds."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(x): torch.empty_like(x, device="meta") for x in tensors}).eval()


def attempt(run: Callable[[Tensor], Any], name: str, in_channels: int, height: int, width: int) -> Any:
    """`run` on the sketch of an image; `UsageError` where it fails."""
    try:
        with torch.no_grad():
            return run(torch.empty(1, in_channels, height, width, device="meta"))
    except Exception as error:
        raise UsageError(
            f"{name} cannot be a body: it does not take images of {height}×{width} px, perhaps of one size "
            f"only ({first_line(error)})"
        ) from error


def observed(net: nn.Module, run: Callable[[Tensor], Any], name: str, in_channels: int) -> list[Unit]:
    """The units of `net`, in the order in which `run` calls them."""
    calls: list[tuple[str, nn.Module, object, object]] = []

    def note(unit: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        calls.append((unit, module, next(iter(args), None), output))

    for unit, module in units_of(net):
        module.register_forward_hook(partial(note, unit))
    for size in SIZES:
        attempt(run, name, in_channels, *size)
    half = len(calls) // 2
    return [
        Unit(unit, not any(module.children()), x, y, *stride_of(shape_of(y), shape_of(other)))
        for (unit, module, x, y), (*_, other) in zip(calls[:half], calls[half:], strict=True)
    ]


def units_of(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Blocks and layers by name: plain containers are looked into, what computes by itself is not."""
    for name, child in net.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from units_of(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def shape_of(output: object) -> Sequence[int]:
    return output.shape if isinstance(output, Tensor) else ()


def stride_of(tall: Sequence[int], wide: Sequence[int]) -> tuple[float, bool]:
    """From a map's shapes for both `SIZES`: its stride, 0 if it is no map; and whether channels come last."""
    axes = [axis for axis, (a, b) in enumerate(zip(tall, wide, strict=False)) if a != b]
    if len(tall) != 4 or axes not in ([1, 2], [2, 3]):
        return 0, False
    return (SIZES[1][0] - SIZES[0][0]) / (wide[axes[0]] - tall[axes[0]]), axes == [1, 2]


def last_of_each(strides: list[float], name: str) -> list[int]:
    """Where the last 4, 8, 16 and 32 stand; `UsageError` where one is missing."""
    if missing := sorted(set(STRIDES.values()) - set(strides)):
        found = ", ".join(f"{stride:.3g}" for stride in sorted({*strides} - {0})) or "none"
        raise UsageError(
            f"{name} cannot be a body: it has no map of stride {', '.join(map(str, missing))} (it has "
            f"{found}); take a network with four levels, such as resnet50"
        )
    return [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES.values()]


def stem_of(units: list[Unit]) -> list[str]:
    """The names of those before stride 4, or, if there are none, of the first and the leaves behind it."""
    stem = list(itertools.takewhile(lambda unit: 0 < unit.stride < 4, units))
    if not stem:
        norms = itertools.takewhile(lambda unit: unit.leaf and unit.stride <= 4, units[1:])
        stem = [units[0], *norms]
    return [unit.name for unit in stem]


def staged(sketch: Any, in_channels: int, stem: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names of modules by stage, as `freeze` counts them."""
    sketch.requires_grad_()
    parameters = dict(sketch.named_parameters())
    with torch.enable_grad():
        maps = sketch.maps(torch.empty(1, in_channels, *SIZES[0], device="meta"))
    stage_of: dict[str, str] = {}
    for level, x in reversed([*zip(STRIDES, maps, strict=True)]):
        gradients = torch.autograd.grad(x.sum(), [*parameters.values()], allow_unused=True, retain_graph=True)
        used = (name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)
        stage_of |= dict.fromkeys(used, level)
    prefixes = tuple(f"net.{name}." for name in stem)
    stage_of |= dict.fromkeys((name for name in parameters if name.startswith(prefixes)), "stem")
    stage = "stem"
    for (
        name
    ) in parameters:  # one that evaluation does not reach, since it is cached, goes with the one before
        stage = stage_of.setdefault(name, stage)

    stages: dict[str, list[str]] = {stage: [] for stage in ("stem", *STRIDES)}
    for name, stage in owners(sketch.net, "net.", stage_of):
        stages[stage].append(name)
    return {stage: tuple(names) for stage, names in stages.items()}


def owners(module: nn.Module, prefix: str, stage_of: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The largest modules whose parameters are all of one stage."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        found = {stage for parameter, stage in stage_of.items() if parameter.startswith(f"{path}.")}
        if len(found) == 1:
            yield path, found.pop()
        else:
            yield from owners(child, f"{path}.", stage_of)
