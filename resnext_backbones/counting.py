"""Parameters and multiply-adds of a network, and what its multiply-adds leave out."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .errors import UsageError

Forward = Callable[[nn.Module, Tensor], Any]

# Operators on tensors that make or copy tensors and compute nothing.
PLAIN_COPY = re.compile(
    r"aten\.((empty|zeros|ones|full)_like|new_\w+|empty_strided|zero_|fill_|clone|copy_|_to_copy"
    r"|_unsafe_view|_reshape_alias|_local_scalar_dense)"
)


@dataclass(frozen=True)
class Counts:
    """What a network holds, and what it computes for one image.

    Attributes:
        parameters: of all `nn.Parameter`s, frozen ones too; buffers are none of them; shared ones count once.
        macs: multiply-adds of convolutions, matrix products and attention; biases do not count.
        uncounted: operators that run as well and are not in `macs`, such as "aten.relu_", with how often.
            Views, allocation and plain copies are not listed.
    """

    parameters: int
    macs: int
    uncounted: dict[str, int]


def logits_or_maps(model: nn.Module, images: Tensor) -> Any:
    """Logits of a body that carries a classifier (`fc` and `classify`), else what `forward` returns."""
    classify = getattr(model, "classify", None)
    return classify(images) if callable(classify) and hasattr(model, "fc") else model(images)


def count(
    model: nn.Module,
    input_size: tuple[int, int] = (224, 224),
    in_channels: int = 3,
    forward: Forward = logits_or_maps,
) -> Counts:
    """Count on one image, (1, in_channels, *input_size), in evaluation mode; the model stays as it is.

    The model may be on any device; on "meta" nothing is computed and no memory is needed. A multiply-add
    counts once, as in the papers' tables; `torch.utils.flop_counter` counts two, so its total is halved. It
    knows shapes only: a frozen norm folded into a convolution, or a lower precision, counts the same. The
    image is black, which matters only where the work depends on it, as in a detector.

    Args:
        input_size: height and width in pixels.
        forward: calls the model on images, where it is not to be called by itself.

    Raises `UsageError` for a size that is none, or that the model does not take.
    """
    check_images(input_size, 1, in_channels)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    executed = _Executed()
    with (
        refusals(f"{type(model).__name__} on {in_channels}×{input_size[0]}×{input_size[1]}"),
        evaluating(model),
        torch.no_grad(),
        executed,  # outside the counter: it sees what the counter has taken apart
        FlopCounterMode(display=False) as counter,
    ):
        forward(model, torch.zeros(1, in_channels, *input_size, dtype=like.dtype, device=like.device))
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        uncounted={
            str(operator): n
            for operator, n in sorted(executed.times.items(), key=lambda item: str(item[0]))
            if operator not in counter.flop_registry
        },
    )


class _Executed(TorchDispatchMode):
    """Which operators ran, and how often; without those that compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = func.is_view or torch.Tag.inplace_view in func.tags
        factory = not any("Tensor" in str(argument.type) for argument in func._schema.arguments)
        if not (view or factory or PLAIN_COPY.fullmatch(str(func.overloadpacket))):
            self.times[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """What a network or its device says of images that are too many, too large or too small, in one line."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
            raise UsageError(f"{what}: out of memory; take fewer or smaller images ({said:.200})") from error
        raise UsageError(f"{what}: {said:.300}; does it take images of this size and number?") from error


def check_images(input_size: tuple[int, int], batch_size: int, in_channels: int) -> None:
    """`UsageError` unless these are the sizes of a batch of images."""
    if not (isinstance(input_size, tuple | list) and len(input_size) == 2):
        raise UsageError(f"input_size={input_size!r} must be height and width, such as (224, 224)")
    sizes = {"height": input_size[0], "width": input_size[1], "batch_size": batch_size}
    for name, value in {**sizes, "in_channels": in_channels}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r} must be a whole number of at least 1")
