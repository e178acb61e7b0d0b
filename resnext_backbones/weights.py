"""Weights into a body, with a receipt, and out of it; the freezing of what need not be learned again."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import sources, weight_files
from .errors import UsageError
from .foreign_names import torchvision_names
from .norm import FrozenBatchNorm2d, check_freezable, freeze_norms
from .receipt import Clash, Normalisation, Receipt, few

LEARNED = ("weight", "bias")  # buffers come and go from release to release, and say little of a network
AVERAGED = "model_ema."  # beside `model` in the checkpoints of torchvision's reference scripts


@dataclass(frozen=True)
class Opened:
    """What a source holds, and what it and its publisher say of it.

    See `sources.Source`, `weight_files.Content` and `Receipt`; `stride_in_1x1` is None where nobody says.
    """

    name: str
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    normalisation: Normalisation | None
    licence: str | None
    classes: tuple[str, ...] | None
    keypoints: tuple[str, ...] | None
    norm_eps: float | None
    settings: dict[str, Any]
    stride_in_1x1: bool | None
    warning: str


def open_source(source: str | Path) -> Opened:
    """The tensors of `source` under torchvision's names; `UsageError` where it cannot be read.

    What can stand for `source` is said at `load_weights`.
    """
    file = sources.find(source)
    before = weight_files.version(file.path)
    sha256 = weight_files.sha256(file.path)
    content = weight_files.read(file.path)
    if weight_files.version(file.path) != before and weight_files.sha256(file.path) != sha256:
        # the SHA-256 could be of another file than the tensors; an equal file may come at any time, from a
        # process that downloads the same
        raise UsageError(f"{source} was written while it was read; try again, or give a checkpoint at rest")
    return Opened(
        name=f"{file.name} ({content.reached})" if content.reached else file.name,
        sha256=sha256,
        tensors=torchvision_names(content.tensors, content.metadata, file.path),
        metadata=content.metadata,
        normalisation=file.normalisation or weight_files.normalisation_of(content, str(source)),
        licence=file.licence or content.metadata.get("licence"),
        classes=file.classes or content.classes,
        keypoints=file.keypoints or content.keypoints,
        norm_eps=file.norm_eps,
        settings=content.settings,
        stride_in_1x1=_strides_said(content, source),
        warning=file.warning,
    )


def _strides_said(content: weight_files.Content, source: str | Path) -> bool | None:
    """`stride_in_1x1` of the metadata or the run's body, which is false where a body of ours is not told."""
    said = content.metadata.get("stride_in_1x1", content.settings.get("backbone.stride_in_1x1"))
    if said is None:
        ours = str(content.settings.get("backbone._target_")).startswith(f"{__package__}.")
        return False if ours else None
    if (said := str(said).lower()) not in ("true", "false"):
        raise UsageError(f"{source}: it says stride_in_1x1={few([said])}, which must be true or false")
    return said == "true"


def load_weights(
    body: nn.Module,
    source: str | Path,
    allow_partial: bool | Collection[str] = False,
    prefix: str | None = None,
) -> Receipt:
    """Copy into `body` the tensors of `source` that bear its names.

    Args:
        body: any module; names are matched below the prefix under which most of them fit. Where it wraps
            somebody else's network, its `weights_prefix` ("net.") is no part of the names in the source.
        source: one of these.

            - A torchvision name (`ResNeXt50_32X4D_Weights.IMAGENET1K_V2`) or a timm name, with or without its
              tag (`timm:resnext50_32x4d.a1_in1k`; needs the extra `timm`).
            - An address, `https://…/name.safetensors`, with its SHA-256 behind it (`#sha256=` and 64 digits)
              or, torch.hub's way, in its name (`name-1a0047aa.pth`). Without either, the first download is
              trusted, and later uses are checked against it.
            - A `.safetensors` file, a file of `torch.save` (`.pth`, `.pt`, `.ckpt`, `.bin`), this project's
              checkpoints among them, or a run's folder (`checkpoints/best.ckpt`, else `last.ckpt`).

            What is downloaded is kept and checked; nothing is unpickled but tensors and plain containers.
            Detectron2's and Caffe2's names are understood in `.safetensors` files whose metadata says
            `channel_order`, RGB or BGR; a BGR network is turned to read RGB.
        allow_partial: True accepts a load that leaves tensors of the body as they are, since they are missing
            in the source or have another shape there; the names of stages (`("fc",)`) accept it only there.
        prefix: said explicitly, where a source holds the body twice.

    Of a network and its moving average, under `model` and `model_ema` (torchvision's reference scripts), the
    average is taken.

    A first convolution of three input channels is fitted to a body with another number of them: one channel
    gets the sum over RGB, so that a grey image gives what its RGB copy gave; n channels get RGB repeated,
    times 3 ÷ n (timm/models/_manipulate.py). From another number than three nothing is fitted.

    Raises `UsageError`, and leaves the body untouched, where the source cannot be read or does not cover the
    body.
    """
    opened = open_source(source)
    tensors, metadata = opened.tensors, opened.metadata
    check_strides(body, opened.stride_in_1x1, source)
    state = to_fill(body)
    own = {name.removeprefix(getattr(body, "weights_prefix", "")): name for name in state}
    fits = fits_by_prefix(tensors, {there: state[name] for there, name in own.items()})
    if prefix is None:
        prefix = best_prefix(fits, tensors, own, source)
    elif prefix:
        prefix = prefix.rstrip(".") + "."
    found = {name: tensors[prefix + there] for there, name in own.items() if prefix + there in tensors}
    adapted = _fit_stem(body, found, weight_files.reads_bgr(metadata, str(source)), source)
    adapted += fit_eps(body, found, opened.norm_eps)

    clashing = [
        Clash(name, tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in found.items()
        if tensor.shape != state[name].shape
    ]
    clashing_names = [clash.name for clash in clashing]
    missing = [name for name in state if name not in found]
    loaded = [name for name in found if name not in clashing_names]
    under = f"under the prefix {prefix!r}{_better_prefix(fits, prefix)}"
    if not loaded:
        raise UsageError(
            f"{source}: 0 of {len(state)} tensors of {type(body).__name__} fit {under}; it has "
            f"{few(tensors)}, wanted are {few(own)}; take weights of the same network"
        )
    used = {prefix + there for there in own}
    unused = [name for name in tensors if name not in used and not is_counter(name)]
    excused = _excused(body, allow_partial)
    faults = [f"{name} is missing" for name in missing if _stage(body, name) not in excused]
    faults += [in_words(body, clash) for clash in clashing if _stage(body, clash.name) not in excused]
    faults += _homeless(body, state, unused, prefix, excused)
    if faults:
        raise UsageError(
            f"{source} does not cover {type(body).__name__}: {len(loaded)} of {len(state)} tensors fit "
            f"{under}, but {few(faults)}; build the network they are of, or set allow_partial"
        )
    new = {name: converted(found[name], state[name], name, source) for name in loaded}

    body.load_state_dict(new, strict=False)
    return Receipt(
        source=opened.name,
        sha256=opened.sha256,
        prefix=prefix,
        normalisation=opened.normalisation,
        licence=opened.licence,
        metadata=metadata,
        stages=_by_stage(body, loaded=loaded, missing=missing, clashing=clashing_names),
        clashing=tuple(clashing),
        adapted=adapted,
        unexpected=tuple(unused),
        warning=opened.warning,
    )


def save_weights(
    body: nn.Module,
    path: str | Path,
    *,
    normalisation: Normalisation | None = None,
    licence: str | None = None,
    source: str | None = None,
    **metadata: str,
) -> None:
    """Write the tensors of `body` as `.safetensors`, from which `load_weights` restores them to the last bit.

    The file is complete or not there at all. It says what the network is called, what its `features` are, and
    what is given here.

    Args:
        body: any module. A `weights_prefix` is left out of the names, so that who wrapped a published network
            writes a file in the published names.
        path: ends in `.safetensors`, in a folder that exists; a file that stands there is replaced.
        normalisation: {"mean": […], "std": […]} of the images that the body was trained on, RGB in 0…1; the
            `normalisation` of a receipt is one.
        licence: of the weights, as an SPDX identifier where there is one.
        source: what the weights were made from.
        metadata: more of the kind, `epochs="12"`.

    Raises `UsageError` for a path that cannot be written, tensors that are not finite, or metadata that is no
    text.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise UsageError(f"{path}: weights are saved as NAME.safetensors in a folder that exists")
    known = {"network": type(body).__name__}
    if any(hasattr(module, "stride_in_1x1") for module in body.modules()):
        known["stride_in_1x1"] = str(_strides_in_1x1(body)).lower()
    if isinstance(features := getattr(body, "features", None), dict):
        known["features"] = json.dumps({name: vars(spec) for name, spec in features.items()})
    if normalisation is not None:
        try:
            known["normalisation"] = json.dumps(weight_files.checked_normalisation(normalisation))
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f'normalisation={normalisation!r:.80}: give {{"mean": […], "std": […]}}, a number a channel'
            ) from error
    known |= {key: text for key, text in (("licence", licence), ("source", source)) if text is not None}
    for key, text in {**known, **metadata}.items():
        if not isinstance(text, str) or (key in metadata and key in known):
            raise UsageError(
                f"metadata {key}={text!r:.80}: give text, under a name other than {', '.join(known)}"
            )
    state = body.state_dict()
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UsageError(f"{path} is not written: NaN or infinite values in {few(broken)}")
    prefix = getattr(body, "weights_prefix", "")
    weight_files.write(path, {name.removeprefix(prefix): x for name, x in state.items()}, known | metadata)


def freeze(body: nn.Module, at: int) -> None:
    """Freeze the first `at` stages, as Detectron2 counts: 0 none, 1 the stem, 2 stem and c2, … 5 all of them.

    Their parameters stop learning and their batch norms become frozen ones, so that statistics do not move
    either, whatever `.train()` is called. `fc` is no stage: a classifier frozen at 5 is a linear probe.

    `body` must say what its stages are: `stages`, a dict of each stage's name to the names of its modules, in
    order. Raises `UsageError` where it does not, or has fewer than `at`. Optimizers are to be built after.
    """
    stages = getattr(body, "stages", None)
    kind = type(body).__name__
    if not isinstance(stages, Mapping):
        raise UsageError(f"{kind} cannot be frozen by stage: it has no `stages` (of an FPN, freeze fpn.body)")
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= len(stages):
        raise UsageError(f"freeze at {at!r}: {kind} has {len(stages)} stages, so take 0 … {len(stages)}")
    modules = {name: _submodule(body, stage, name) for stage in list(stages)[:at] for name in stages[stage]}
    for module in modules.values():
        check_freezable(module)  # all of them, before anything is changed
    for name, module in modules.items():
        module.requires_grad_(False)
        body.set_submodule(name, freeze_norms(module))


def _submodule(body: nn.Module, stage: str, name: str) -> nn.Module:
    try:
        return body.get_submodule(name)
    except AttributeError as error:
        raise UsageError(
            f"{type(body).__name__}.stages[{stage!r}] names {name}, which it does not have"
        ) from error


def fits_by_prefix(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """How many of the body's tensors stand under each prefix of the source: of its shape, and by name."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    depth = max((name.count(".") + 1 for name in needed), default=0)
    for key, tensor in tensors.items():
        parts = key.split(".")
        for i in range(max(0, len(parts) - depth), len(parts)):
            name = ".".join(parts[i:])
            if name in needed:
                prefix = key.removesuffix(name)
                names[prefix] += 1
                shapes[prefix] += tensor.shape == needed[name].shape
    return {prefix: (shapes[prefix], names[prefix]) for prefix in names}


def best_prefix(
    fits: Mapping[str, tuple[int, int]], has: Collection[str], wanted: Collection[str], source: str | Path
) -> str:
    """The prefix under which most of the body's tensors are in the source, those of the same shape first."""
    if not fits:
        raise UsageError(
            f"{source} has none of the names wanted under any prefix: it has {few(has)}, wanted are "
            f"{few(wanted)}; take weights of the same network"
        )
    most = max(fits.values())
    best = [prefix for prefix, fit in fits.items() if fit == most]
    averaged = [prefix for prefix in best if prefix.startswith(AVERAGED)]
    if len(best) == 2 and len(averaged) == 1:
        return averaged[0]
    if len(best) > 1:
        raise UsageError(
            f"{source} fits equally well under the prefixes {few(map(repr, best))}; save one of them alone, "
            "or give prefix=… to load_weights"
        )
    return best[0]


def _better_prefix(fits: Mapping[str, tuple[int, int]], prefix: str) -> str:
    """What to say where more fits under another prefix than under this one."""
    best = max(fits, key=lambda known: fits[known], default=prefix)
    better = fits.get(best, (0, 0)) > fits.get(prefix, (0, 0))
    return f" (under {few([repr(best)])} {fits[best][0]} fit)" if better else ""


def _fit_stem(body: nn.Module, found: dict[str, Tensor], bgr: bool, source: str | Path) -> tuple[str, ...]:
    """Make the first convolution read RGB, and as many channels as the body has; says what it did."""
    convolutions = ((name, m) for name, m in body.named_modules() if isinstance(m, nn.Conv2d))
    name, conv = next(convolutions, ("", None))
    name = f"{name}.weight".removeprefix(".")
    if conv is None or name not in found:
        return ()
    weight = found[name]
    if bgr and (weight.ndim != 4 or weight.shape[1] != 3):
        raise UsageError(
            f"{source} is said to read BGR, but {name} is {list(weight.shape)}: not of 3 channels"
        )
    if bgr:
        weight = found[name] = weight.flip(1)
    n, here = conv.in_channels, conv.weight.shape
    same_but_channels = weight.ndim == 4 and (weight.shape[0], *weight.shape[2:]) == (here[0], *here[2:])
    if n == 3 or conv.groups != 1 or not same_but_channels or weight.shape[1] != 3:
        return ()
    weight = weight.float()
    found[name] = (
        weight.sum(1, keepdim=True) if n == 1 else weight.repeat(1, -(-n // 3), 1, 1)[:, :n] * (3 / n)
    )
    return (f"{name}: 3 → {n} input channels",)


def fit_eps(module: nn.Module, found: dict[str, Tensor], eps: float | None) -> tuple[str, ...]:
    """Make batch norms compute as those of the source did, with `eps`; says what it did.

    A norm multiplies by weight ÷ √(variance + eps), so that another eps goes into the weight.
    """
    fitted = 0
    for name, norm in module.named_modules():
        if eps is None or not isinstance(norm, FrozenBatchNorm2d | _BatchNorm) or norm.eps == eps:
            continue
        weight, variance = found.get(f"{name}.weight"), found.get(f"{name}.running_var")
        if weight is None or variance is None or weight.shape != variance.shape:
            continue
        there = variance.double() + eps
        ratio = ((variance.double() + norm.eps) / there).sqrt()
        factor = ratio.where(there > 0, 1)  # there, eps was all that kept it from dividing by 0
        found[f"{name}.weight"] = (weight.double() * factor).to(weight.dtype)
        fitted += 1
    return (f"{fitted} norms, whose eps was {eps:g}: the difference is in their weights",) if fitted else ()


def check_strides(body: nn.Module, there: bool | None, source: str | Path) -> None:
    """Where a bottleneck strides cannot be seen in its weights; with the other way they are worth little."""
    if there is not None and there != _strides_in_1x1(body):
        said = str(there).lower()
        raise UsageError(
            f"{source} is of a network with stride_in_1x1={said}, unlike this {type(body).__name__}; build "
            f"it with stride_in_1x1={said}"
        )


def _strides_in_1x1(body: nn.Module) -> bool:
    return any(getattr(module, "stride_in_1x1", False) for module in body.modules())


def converted(tensor: Tensor, here: Tensor, name: str, source: str | Path) -> Tensor:
    """The tensor in the body's dtype, if it can stand there."""
    if here.is_floating_point() and not tensor.is_floating_point():
        raise UsageError(
            f"{source} has {tensor.dtype} in {few([name])}; take weights that are floating-point"
        )
    tensor = tensor.to(here.dtype)
    if not tensor.isfinite().all():
        raise UsageError(f"{source} holds NaN or infinite values in {few([name])}; take another file")
    return tensor


def to_fill(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors but for counters; `UsageError` where they are on meta, where nothing can be loaded."""
    state = {name: tensor for name, tensor in module.state_dict().items() if not is_counter(name)}
    if any(tensor.is_meta for tensor in state.values()):
        raise UsageError(
            f"{type(module).__name__} is on meta, where nothing can be loaded; build it on a device"
        )
    return state


def out_of_place(name: str, state: Mapping[str, Tensor]) -> str | None:
    """What it means that `state` has no place for a tensor of the source; None where it means nothing.

    A norm without statistics of its own, group norm say, would make something else of a batch norm's weights.
    """
    norm, _, leaf = name.rpartition(".")
    if leaf == "running_mean" and f"{norm}.weight" in state:
        return f"{few([norm])} is a batch norm there, and another norm here"
    return f"{few([name])} has no place in it" if name.endswith(LEARNED) else None


def in_words(module: nn.Module, clash: Clash) -> str:
    """The clash; where it is the number of channels that the first convolution reads, in so many words."""
    convolutions = (f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    here, there = clash.here, clash.there
    alike = len(there) == 4 and (here[0], here[2:]) == (there[0], there[2:])
    if clash.name != next(convolutions, None) or not alike:
        return str(clash)
    plural = "s" * (there[1] != 1)
    return f"{clash}: it reads images of {there[1]} channel{plural}, this network of {here[1]}"


def _excused(body: nn.Module, allow_partial: bool | Collection[str]) -> set[str]:
    if isinstance(allow_partial, bool):
        return {_stage(body, name) for name in body.state_dict()} if allow_partial else set()
    stages = {allow_partial} if isinstance(allow_partial, str) else set(allow_partial)
    known = {_stage(body, name) for name in body.state_dict()}
    if unknown := sorted(stages - known):
        raise UsageError(
            f"allow_partial={unknown}: {type(body).__name__} has the stages {', '.join(sorted(known))}"
        )
    return stages


def _homeless(
    body: nn.Module, state: Mapping[str, Tensor], unused: list[str], prefix: str, excused: set[str]
) -> Iterator[str]:
    """Weights for its stages that the body has not: of a deeper network, one with more in its blocks, or with
    other norms."""
    for name in unused:
        if not name.startswith(prefix):
            continue
        here = getattr(body, "weights_prefix", "") + name.removeprefix(prefix)
        stage, fault = _stage_within(body, here), out_of_place(here, state)
        if stage is not None and stage not in excused and fault is not None:
            yield fault


def _stage(body: nn.Module, name: str) -> str:
    return _stage_within(body, name) or name.split(".")[0]


def _stage_within(body: nn.Module, name: str) -> str | None:
    for stage, modules in getattr(body, "stages", {}).items():
        if any(name.startswith(f"{module}.") for module in modules):
            return stage
    return None


def _by_stage(body: nn.Module, **fates: list[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    order = dict.fromkeys(_stage(body, name) for name in body.state_dict())
    return {
        stage: {
            fate: tuple(name for name in names if _stage(body, name) == stage)
            for fate, names in fates.items()
        }
        for stage in order
    }


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches that a norm has seen, with which nothing computes."""
    return name.endswith("num_batches_tracked")
