"""Whether a backbone keeps its promises: a kit for everyone who writes one."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .counting import evaluating
from .errors import UsageError
from .features import FeatureSpec, declared_features
from .weights import freeze

Maps = dict[str, Tensor]


def check_backbone(
    backbone: nn.Module,
    in_channels: int = 3,
    sizes: Sequence[tuple[int, int]] = ((64, 64), (96, 65), (33, 130)),
    skip: Collection[str] = (),
) -> None:
    """Raise `UsageError`, naming the first fault, unless `backbone` keeps the contract of `Backbone`.

    Tried on copies, with two random images of every (height, width) in `sizes`; odd sizes belong among them,
    since real images have them. After the declaration itself (`declared_features`), in this order:

        maps           names, order, shapes as declared, the images' dtype, finite, for every size; images
                       untouched
        deterministic  evaluation twice gives the same bits and changes no state
        batch_of_one   an image's maps do not depend on its neighbours; one image can be trained on
        gradients      training sends a finite gradient to every trainable parameter (one without makes
                       distributed training stop)
        frozen         frozen stages (`stages`; without them, all parameters) stay as they are in training
        state_dict     saved after a training step and loaded (`weights_only`) into a copy from before, it
                       computes the same
        copied         a deep copy computes the same and shares no memory
        pickled        so does a pickled one (spawned processes need it)
        channels_last  that memory format gives the same numbers but for rounding
        exported       so does what `torch.export` makes of it

    Args:
        backbone: on any device; it is left as it is.
        in_channels: of the images.
        sizes: in pixels. A stride of 32 needs 33 at least: a batch norm cannot be trained on one value.
        skip: names of checks to leave out, for a backbone that never promised them.
    """
    unknown = sorted(set(skip) - {check.__name__ for check in CHECKS})
    if unknown:
        names = ", ".join(check.__name__ for check in CHECKS)
        raise UsageError(f"check_backbone: skip={unknown} names no check; there are {names}")
    if not sizes:
        raise UsageError("check_backbone: sizes is empty; give at least one (height, width)")
    for size in sizes:
        if not (
            isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        ):
            raise UsageError(f"check_backbone: {size!r} in sizes is no (height, width) in pixels")
    features = declared_features(backbone)
    generator = torch.Generator().manual_seed(0)
    tensors = [*backbone.parameters(), *backbone.buffers()]
    like = next((x for x in tensors if x.is_floating_point()), torch.empty(0))
    if like.is_meta:
        raise UsageError("check_backbone: a backbone on meta computes nothing; build it on a device")
    batches = [torch.randn(2, in_channels, *size, generator=generator).to(like) for size in sizes]
    subject = Subject(backbone, features, batches)
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        for check in CHECKS:
            if check.__name__ not in skip:
                check(subject)


@dataclass
class Subject:
    """The backbone under test, and images to test it on."""

    backbone: nn.Module
    features: dict[str, FeatureSpec]
    batches: list[Tensor]

    def fresh(self, training: bool = False) -> nn.Module:
        try:
            return copy.deepcopy(self.backbone).train(training)
        except Exception as error:  # whatever a constructor's leftovers say of being copied
            raise self.fault(f"cannot be copied: {_first_line(error)}") from error

    def fault(self, text: str) -> UsageError:
        return UsageError(f"{type(self.backbone).__name__}: {text}")

    def run(self, backbone: Callable[[Tensor], object], images: Tensor) -> Maps:
        """The maps, once they are found to be what was declared."""
        given = images.clone()
        shape = tuple(images.shape)
        try:
            maps = backbone(images)
        except Exception as error:  # whatever a network says of images that it does not take
            raise self.fault(f"forward of images {shape} ends in: {_first_line(error)}") from error
        if not isinstance(maps, dict) or list(maps) != list(self.features):
            got = list(maps) if isinstance(maps, dict) else type(maps).__name__
            raise self.fault(f"forward must return a dict of {list(self.features)} in this order, got {got}")
        for name, spec in self.features.items():
            x = maps[name]
            if getattr(x, "dtype", None) != images.dtype:
                got = getattr(x, "dtype", type(x).__name__)
                raise self.fault(
                    f"{name} of images in {images.dtype} must be a tensor of this kind, got {got}"
                )
            size = (math.ceil(side / spec.stride) for side in shape[2:])
            expected = (shape[0], spec.channels, *size)
            if tuple(x.shape) != expected:
                raise self.fault(f"{name} of images {shape} is {tuple(x.shape)}, but {spec} says {expected}")
            if not x.isfinite().all():
                raise self.fault(f"{name} of images {shape} is not finite")
        if not torch.equal(images, given):
            raise self.fault("forward changes the images it is given")
        return maps

    @torch.no_grad()
    def evaluate(self, backbone: Callable[[Tensor], object], images: Tensor) -> Maps:
        return self.run(backbone, images)

    def agree(self, maps: Maps, others: Maps, what: str, rounding: int = 0) -> None:
        """`rounding` is in units of the last place of a map's largest value; 0 means the same bits."""
        for name, x in maps.items():
            error = (x - others[name]).abs().max().item()
            tolerance = min(rounding * torch.finfo(x.dtype).eps, 0.03)  # half precisions have few places
            if not error <= tolerance * x.abs().max().item():
                raise self.fault(f"{name} {what} (by up to {error:.2g})")


def maps(subject: Subject) -> None:
    backbone = subject.fresh()
    for images in subject.batches:
        subject.evaluate(backbone, images)


def deterministic(subject: Subject) -> None:
    backbone = subject.fresh()
    before = _state(backbone)
    for images in subject.batches:
        first, second = subject.evaluate(backbone, images), subject.evaluate(backbone, images)
        subject.agree(first, second, "differs between two evaluations of the same images")
    if changed := _changed(before, _state(backbone)):
        raise subject.fault(f"{changed[0]} is changed by a forward pass in evaluation mode")


def batch_of_one(subject: Subject) -> None:
    images = subject.batches[0]
    backbone = subject.fresh()
    both = subject.evaluate(backbone, images)
    for i, image in enumerate(images.split(1)):
        own = {name: x[i : i + 1] for name, x in both.items()}
        alone = subject.evaluate(backbone, image)
        subject.agree(own, alone, "of an image depends on what else is in its batch", ROUNDING)
    subject.run(subject.fresh(training=True), images[:1])


def gradients(subject: Subject) -> None:
    backbone = subject.fresh(training=True)
    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if not trainable:
        return
    loss = _loss(subject.run(backbone, subject.batches[0]))
    if not loss.requires_grad:
        raise subject.fault("no gradient leaves forward in training mode; is it under no_grad?")
    found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    for name, gradient in zip(trainable, found, strict=True):
        if gradient is None:
            raise subject.fault(f"no gradient reaches {name}; use it in forward or do not build it")
        if not gradient.isfinite().all():
            raise subject.fault(f"the gradient of {name} is not finite")


def frozen(subject: Subject) -> None:
    stages = getattr(subject.backbone, "stages", None) or {}
    for at in {min(2, len(stages)), len(stages)}:
        backbone = subject.fresh()
        if stages:
            freeze(backbone, at)
            modules = [f"{name}." for stage in list(stages)[:at] for name in stages[stage]]
            still = {name for name in backbone.state_dict() if name.startswith(tuple(modules))}
        else:
            still = {name for name, _ in backbone.requires_grad_(False).named_parameters()}
        before = _state(backbone)
        _train(subject, backbone)
        if moved := sorted(still & set(_changed(before, _state(backbone)))):
            raise subject.fault(f"{moved[0]} is frozen, but a training step changes it")


def state_dict(subject: Subject) -> None:
    images = subject.batches[0]
    backbone, other = subject.fresh(), subject.fresh()
    _train(subject, backbone)
    backbone.eval()
    lost = [name for name, _ in backbone.named_parameters() if name not in backbone.state_dict()]
    if lost:
        raise subject.fault(f"the parameter {lost[0]} is not in the state dict, so no checkpoint holds it")
    file = io.BytesIO()
    torch.save(backbone.state_dict(), file)
    file.seek(0)
    try:
        other.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        raise subject.fault(f"its own state dict cannot be loaded: {_first_line(error)}") from error
    expected, loaded = subject.evaluate(backbone, images), subject.evaluate(other, images)
    subject.agree(expected, loaded, "differs after a round trip through the state dict")


def copied(subject: Subject) -> None:
    twin = subject.fresh()
    own = {tensor.data_ptr() for tensor in _state(subject.backbone, clone=False).values() if tensor.numel()}
    copies = _state(twin, clone=False).items()
    if shared := [name for name, tensor in copies if tensor.numel() and tensor.data_ptr() in own]:
        raise subject.fault(f"a deep copy shares {shared[0]} with the original")
    images = subject.batches[0]
    with evaluating(subject.backbone):
        expected = subject.evaluate(subject.backbone, images)
    subject.agree(expected, subject.evaluate(twin, images), "differs in a deep copy")


def pickled(subject: Subject) -> None:
    images = subject.batches[0]
    backbone = subject.fresh()
    try:
        twin = pickle.loads(pickle.dumps(backbone))
    except Exception as error:
        raise subject.fault(f"cannot be pickled: {_first_line(error)}") from error
    expected, found = subject.evaluate(backbone, images), subject.evaluate(twin, images)
    subject.agree(expected, found, "differs after pickling")


def channels_last(subject: Subject) -> None:
    images = subject.batches[0]
    expected = subject.evaluate(subject.fresh(), images)
    other = subject.fresh().to(memory_format=torch.channels_last)
    try:
        found = subject.evaluate(other, images.contiguous(memory_format=torch.channels_last))
    except UsageError as error:
        raise UsageError(f"{error}, in channels-last memory") from error
    subject.agree(expected, found, "differs for images in channels-last memory", ROUNDING)


def exported(subject: Subject) -> None:
    images = subject.batches[0]
    backbone = subject.fresh()
    try:
        program = torch.export.export(backbone, (images,)).module()
    except Exception as error:
        raise subject.fault(f"torch.export refuses it: {_first_line(error)}") from error
    expected, found = subject.evaluate(backbone, images), subject.evaluate(program, images)
    subject.agree(expected, found, "differs after torch.export", ROUNDING)


CHECKS = (
    *(maps, deterministic, batch_of_one, gradients, frozen),
    *(state_dict, copied, pickled, channels_last, exported),
)
ROUNDING = 100  # sums in another order; at full depth, 28 were the most that was seen


def _loss(maps: Maps) -> Tensor:
    # Squares, since the sum of a batch-normalised map is constant and has no gradient.
    return torch.stack([x.float().square().mean() for x in maps.values()]).sum()


def _train(subject: Subject, backbone: nn.Module) -> None:
    """One step, of whatever can be trained."""
    backbone.train()
    loss = _loss(subject.run(backbone, subject.batches[0]))
    if trainable := [p for p in backbone.parameters() if p.requires_grad]:
        loss.backward()
        torch.optim.SGD(trainable, lr=0.01).step()


def _state(backbone: nn.Module, clone: bool = True) -> dict[str, Tensor]:
    """Its tensors by name, also those that no state dict has."""
    state = {**dict(backbone.named_buffers()), **backbone.state_dict()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: tensor.clone() for name, tensor in tensors.items()} if clone else tensors


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
