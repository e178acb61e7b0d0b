"""Other people's classifiers as bodies, to compare with: torchvision's and timm's, without their heads.

Which levels a network has and how their cells lie is measured (`sketch.py`), not looked up.
"""

import difflib
import inspect
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .errors import UsageError
from .features import FeatureSpec
from .receipt import Normalisation
from .sketch import (
    SIZES,
    STRIDES,
    Grid,
    attempt,
    last_of_each,
    observed,
    sketched,
    staged,
    stem_of,
    stride_of,
)
from .weight_files import first_line

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
        stages: for `freeze`. A level has the modules that its map needs and no finer one does; those that run
            before stride 4 is reached are the stem, or else the first module and the norms behind it.
        normalisation: {"mean": […], "std": […]} that published weights want, of RGB in 0…1; None where images
            are not RGB.
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
        except UsageError:  # not any size will do: HRNet's branches must meet, Swin's patches be whole
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
            kwargs = {"init_weights": True, "transform_input": True} | kwargs
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
    if "output_stride" in kwargs:
        raise UsageError(
            f"{name}: leave out output_stride; bodies of other libraries do not dilate here. Take one of "
            "this library (resnet50, say), or a head that needs no dilation (Semantic FPN)"
        )
    try:
        return builder(**kwargs)
    except Exception as error:
        raise UsageError(f"{name} cannot be built with {kwargs!s:.80}: {first_line(error)}") from error


def nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name)[:80].lower(), known, 3, cutoff=0)
    return f"its nearest are {', '.join(near)}"
