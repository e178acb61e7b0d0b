"""Other people's classifiers as bodies, to compare with: torchvision's and timm's, without their heads.

Which levels a network has and how their cells lie is measured, on a sketch of it: shapes without data.
"""

import copy
import difflib
import inspect
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .errors import UsageError
from .features import FeatureSpec
from .receipt import Normalisation
from .weight_files import first_line

STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
IMAGENET: Normalisation = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # of RGB in 0…1
HALVES: Normalisation = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class ClassifierBody(nn.Module):
    """What both adapters share: images padded as the network wants them, its maps cut to ⌈size / stride⌉.

    Nothing inside the network is changed, so every value is one that it computes. Zeros (the mean colour) are
    added at the right and the bottom for cells that would be cut off; none where the network rounds up by
    itself, as a ResNet does. Where its kernels are not padded, zeros come to the left and the top as well,
    such that cell 0 of every level is centred on pixel 0.

    Images come normalised by ImageNet's statistics, as for every body; they are converted where the network's
    published weights were made with others.

    Attributes:
        net: the classifier up to c5; parameters have their published names.
        features: channels and strides, measured.
        stages: for `freeze`. A level has the modules that its map needs and no finer map does. The stem of
            them are those that run before stride 4 is reached; in a network that begins with stride 4, its
            first module and the norms behind it.
        normalisation: what images are converted to, {"mean": […], "std": […]}; None without conversion for
            other images than RGB.
        weights_prefix: what stands here before the names of published weights.
    """

    weights_prefix: ClassVar[str] = "net."
    features: dict[str, FeatureSpec]
    stages: dict[str, tuple[str, ...]]

    def __init__(self, net: nn.Module, wanted: Normalisation | None) -> None:
        super().__init__()
        self.inlet = nn.Identity() if wanted in (None, IMAGENET) else Renormalise(**wanted)
        self.net = net

    def maps(self, images: Tensor) -> list[Tensor]:
        """The network's own maps of strides 4, 8, 16, 32, (N, C, h, w), of the sizes that it makes them."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images, float (N, C, H, W), to {"c2": (N, channels, ⌈H/4⌉, ⌈W/4⌉), … "c5"}."""
        images = self.inlet(images)
        if self.rounds_up:
            return dict(zip(self.features, self.maps(images), strict=True))
        height, width = images.shape[-2:]
        images = F.pad(images, (self.lead, self.tail(width), self.lead, self.tail(height)))
        return {
            level: x[..., self.cells(level, height), self.cells(level, width)]
            for level, x in zip(self.features, self.maps(images), strict=True)
        }

    def cells(self, level: str, n: int) -> slice:
        """Those of the network's cells that are the body's, along a side of n pixels."""
        stride = STRIDES[level]
        return slice(self.skip[level], self.skip[level] + (n + stride - 1) // stride)

    def tail(self, n: int) -> int:
        """Zeros that n pixels need behind them for the last cell of every level."""
        ends = [grid.pixels(self.cells(level, n).stop) for level, grid in self.grids.items()]
        return max(0, max(ends) - self.lead - n)

    def measure(self, name: str, in_channels: int, stem: Sequence[str]) -> None:
        """Set `features`, `stages`, and where the cells of each level lie."""
        sketch = sketched(self)

        @cache
        def shapes(n: int) -> dict[str, torch.Size]:
            maps = attempt(sketch.maps, name, in_channels, n, n)
            return {level: x.shape for level, x in zip(STRIDES, maps, strict=True)}

        def first(level: str) -> int:
            cells, sizes = shapes(256)[level][-1], range(257, 257 + STRIDES[level])
            one_more = sizes[bisect_left(sizes, cells + 1, key=lambda n: shapes(n)[level][-1])]
            return one_more - STRIDES[level] * cells

        self.features = {level: FeatureSpec(shapes(256)[level][1], STRIDES[level]) for level in STRIDES}
        self.stages = staged(sketch, in_channels, stem)
        try:
            self.grids = {level: Grid(STRIDES[level], first(level)) for level in STRIDES}
        except (
            UsageError
        ):  # not any size will do: HRNet's branches must meet, timm's Swin wants whole patches
            self.grids = {level: Grid(STRIDES[level], first=STRIDES[level]) for level in STRIDES}
        self.rounds_up = all(grid.first == 1 for grid in self.grids.values())
        unpadded = any(grid.first > grid.stride for grid in self.grids.values())
        self.lead = max(grid.first for grid in self.grids.values()) // 2 if unpadded else 0
        self.skip = {level: -((grid.centre - self.lead) // grid.stride) for level, grid in self.grids.items()}

        height, width = 97, 160
        maps = attempt(sketched(self), name, in_channels, height, width)
        sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES.values()]
        if sizes != [tuple(x.shape[2:]) for x in maps.values()]:
            raise UsageError(f"{name} cannot be a body: its maps do not grow evenly with the image")


class TorchvisionBody(ClassifierBody):
    """A classifier of torchvision as a body: `TorchvisionBody("convnext_tiny")`, with random weights.

    A level is the output of the network's last module of its stride: c5 of MobileNetV2 has the 1280 channels
    of its last convolution, and c2 … c4 of ConvNeXt come from the norms before the next stage.

    Args:
        name: as in `torchvision.models.list_models`, "vgg16_bn" say.
        kwargs: for torchvision's builder (`norm_layer`, `stochastic_depth_prob`, …).

    Raises `UsageError` for what is no classifier of torchvision; for arguments that its builder does not
    take; and for networks without four levels, for images of one size only, or not a chain of modules.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        models = torchvision.models
        known = models.list_models(module=models)
        if not (isinstance(name, str) and name.lower() in known):
            raise UsageError(f"torchvision has no classifier {name!r:.80}; {nearest(name, known)}")
        builder = models.get_model_builder(name)
        preset = models.get_model_weights(builder).DEFAULT.transforms()
        normalisation = wanted = {"mean": [*preset.mean], "std": [*preset.std]}
        if "transform_input" in inspect.signature(inspect.get_annotations(builder)["return"]).parameters:
            # Inception and GoogLeNet take what everybody takes, and convert it themselves.
            kwargs = {"aux_logits": False, "init_weights": True, "transform_input": True} | kwargs
            wanted = HALVES if kwargs.pop("transform_input") else IMAGENET
        classifier = built(partial(builder, weights=None), name, kwargs)

        sketch = sketched(classifier)
        units = observed(sketch, sketch, name, 3)
        ends = last_of_each([unit.stride for unit in units], name)
        units = units[: ends[-1] + 1]
        for before, after in itertools.pairwise(units):
            if after.input is not before.output:
                raise UsageError(
                    f"{name} is no chain of modules, so no body: more happens between {before.name} and "
                    f"{after.name}"
                )
        super().__init__(nested({unit.name: classifier.get_submodule(unit.name) for unit in units}), wanted)
        self.normalisation = normalisation
        self.chain = [unit.name for unit in units]
        self.taps = {units[end].name: units[end].channels_last for end in ends}
        self.measure(name, 3, stem_of(units))

    def maps(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for name in self.chain:
            x = self.net.get_submodule(name)(x)
            if name in self.taps:
                maps.append(x.permute(0, 3, 1, 2) if self.taps[name] else x)
        return maps


class TimmBody(ClassifierBody):
    """A classifier of timm as a body: `TimmBody("convnext_atto")`, with random weights.

    A level is the last of timm's own features of its stride (`features_only=True`).

    Args:
        name: as in `timm.list_models`; it may carry the tag of weights ("convnext_atto.d2_in1k"), which says
            how these want images normalised.
        kwargs: for `timm.create_model` (`in_chans`, `drop_path_rate`, …). `strict_img_size=False` is added
            where the network knows it, so that Swin takes images of any size.

    Raises `UsageError` where timm is not installed (the extra `timm`) or has no such network; for arguments
    that it does not take; and for networks without four levels, or for images of one size only.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        try:
            import timm
        except ImportError as error:
            raise UsageError(
                f"TimmBody({name!r:.80}) needs timm ({error}): pip install 'resnext-backbones[timm]'"
            ) from error
        if not (isinstance(name, str) and timm.is_model(name)):
            raise UsageError(f"timm has no network {name!r:.80}; {nearest(name, timm.list_models())}")

        def builder(**kwargs: Any) -> Any:
            try:
                return timm.create_model(name, strict_img_size=False, **kwargs)
            except TypeError:
                return timm.create_model(name, **kwargs)

        net = built(builder, name, kwargs)
        if not hasattr(net, "forward_intermediates"):
            raise UsageError(
                f"timm {timm.__version__} gives no maps of {name}; 1.0.31 does: pip install -U timm"
            )
        config = net.pretrained_cfg
        in_channels = kwargs.get("in_chans", config["input_size"][0])
        rgb = in_channels == len(config["mean"]) == 3
        normalisation = {key: [*map(float, config[key])] for key in ("mean", "std")} if rgb else None

        run = partial(sketched(net).forward_intermediates, intermediates_only=True)
        maps = zip(*(attempt(run, name, in_channels, *size) for size in SIZES), strict=True)
        ends = last_of_each([stride_of(a.shape, b.shape)[0] for a, b in maps], name)
        ends = net.prune_intermediate_layers(ends, prune_norm=True)
        super().__init__(net, normalisation)
        self.normalisation = normalisation
        self.taps = list(ends)
        sketch = sketched(self)
        self.measure(name, in_channels, stem_of(observed(sketch.net, sketch.maps, name, in_channels)))

    def maps(self, images: Tensor) -> list[Tensor]:
        net: Any = self.net
        return net.forward_intermediates(images, indices=self.taps, intermediates_only=True)


class Renormalise(nn.Module):
    """Images (N, 3, H, W) that were normalised by ImageNet's statistics, as if by others."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values).view(3, 1, 1) for values in (IMAGENET["mean"], IMAGENET["std"], mean, std)
        )
        self.register_buffer("scale", old_std / new_std, persistent=False)
        self.register_buffer("shift", (old_mean - new_mean) / new_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


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
            f"{name} cannot be a body: it does not take images of {height}×{width} px ({first_line(error)})"
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


def staged(sketch: ClassifierBody, in_channels: int, stem: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names of modules by stage, see `ClassifierBody.stages`."""
    sketch.requires_grad_()
    parameters = dict(sketch.named_parameters())
    with torch.enable_grad():
        maps = sketch.maps(torch.empty(1, in_channels, *SIZES[0], device="meta"))
    stage_of = dict.fromkeys(parameters, "c5")
    for level, x in reversed([*zip(STRIDES, maps, strict=True)]):
        gradients = torch.autograd.grad(x.sum(), [*parameters.values()], allow_unused=True, retain_graph=True)
        used = (name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)
        stage_of |= dict.fromkeys(used, level)
    prefixes = tuple(f"net.{name}." for name in stem)
    stage_of |= dict.fromkeys((name for name in parameters if name.startswith(prefixes)), "stem")

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


def nested(modules: Mapping[str, nn.Module]) -> nn.Sequential:
    """Modules under their dotted names."""
    root = nn.Sequential()
    for name, module in modules.items():
        *path, leaf = name.split(".")
        parent: nn.Module = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Sequential())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, module)
    return root


def built(builder: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
    """The classifier; `UsageError` where its builder refuses."""
    for given in kwargs.keys() & {"weights", "pretrained", "checkpoint_path", "features_only"}:
        raise UsageError(f"{name}: leave out {given}; a body has no head, and load_weights gives it weights")
    try:
        return builder(**kwargs)
    except Exception as error:
        raise UsageError(f"{name} cannot be built with {kwargs}: {first_line(error)}") from error


def nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name)[:80].lower(), known, 3, cutoff=0)
    return f"its nearest are {', '.join(near)}"
