"""What a network costs: parameters, multiply-adds, time and memory of inference and of a training step.

from resnext_backbones.cost import cost

print(cost(resnext50_32x4d(num_classes=1000), (224, 224), batch_size=8, device="cpu").inference)

`python -m resnext_backbones.cost --help` compares networks by name.
"""

import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .counting import Counts, Forward, check_images, count, logits_or_maps, refusals
from .errors import UsageError

Mode = Literal["inference", "training"]
Loss = Callable[[Any], Tensor]

FEWEST_STEPS = 5  # below which quartiles say nothing
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """How it is measured, and on what.

    Attributes:
        input_size: height and width in pixels.
        batch_size: images in a step.
        in_channels: of the images.
        device: "cpu", "cuda" or "cuda:1".
        precision: "float32", or "bfloat16" by autocast.
        memory_format: of weights and images, "channels_last" or "contiguous".
        steps: timed ones of each network and mode, at most.
        warmup: steps before them.
        seconds: after which timing a network ends in each mode, but not before `FEWEST_STEPS` steps.
        device_name, threads, torch: found out. Threads are those of PyTorch on the CPU.
        tf32: whether convolutions in float32 are rounded to TF32, as on CUDA unless it is switched off.

    Raises `UsageError` for values outside these, and for a device that is not there.
    """

    input_size: tuple[int, int] = (224, 224)
    batch_size: int = 1
    in_channels: int = 3
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    steps: int = 30
    warmup: int = 3
    seconds: float = 10.0
    device_name: str = field(init=False)
    threads: int = field(init=False)
    torch: str = field(init=False)
    tf32: bool = field(init=False)

    def __post_init__(self) -> None:
        check_images(self.input_size, self.batch_size, self.in_channels)
        for name in ("steps", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}={value!r} must be a whole number of at least 1")
        if not self.seconds >= 0:
            raise UsageError(f"seconds={self.seconds!r} must be a number of at least 0")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.memory_format not in MEMORY_FORMATS:
            raise UsageError(
                f"memory_format={self.memory_format!r} must be one of {', '.join(MEMORY_FORMATS)}"
            )
        device = _available(self.device)
        on_cuda = device.type == "cuda"
        convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        found = {
            "input_size": tuple(self.input_size),
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "tf32": on_cuda and self.precision == "float32" and convolutions == "tf32",
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Timing:
    """What one step on a batch takes.

    Attributes:
        latency_ms: median time until the device has finished, in milliseconds.
        lower_ms, upper_ms: its quartiles.
        images_per_s: throughput, the batch size divided by the median.
        peak_bytes: held by tensors at most, those of the network (and of its optimizer) included.
        steps: how many were timed.
    """

    latency_ms: float
    lower_ms: float
    upper_ms: float
    images_per_s: float
    peak_bytes: int
    steps: int


@dataclass(frozen=True)
class Cost:
    """`Counts` of a network and its `Timing` in either mode (None where it was not measured)."""

    parameters: int
    macs: int
    uncounted: dict[str, int]
    inference: Timing | None
    training: Timing | None
    setting: Setting

    def as_dict(self) -> dict[str, Any]:
        """In JSON's own types, one level of nesting for `inference`, `training` and `setting`."""
        return asdict(self)


def cost(
    model: nn.Module,
    input_size: tuple[int, int] = (224, 224),
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    *,
    training: bool = True,
    forward: Forward = logits_or_maps,
    loss: Loss | None = None,
    **setting: Any,
) -> Cost:
    """Count and measure a copy of `model`, which itself stays untouched, as does PyTorch's random state.

    Inference is a forward pass in evaluation mode. A training step is forward and backward in training mode
    and a step of SGD with momentum, whose rate is 0: it works as hard, but all steps work on the same
    numbers. Images are random. Nothing is compiled; what is timed is the module as it stands.

    Peak memory on CUDA is that of PyTorch's allocator, workspaces of cuDNN included. On the CPU it is the
    running sum of PyTorch's own allocations in one profiled step; it leaves out what oneDNN takes for itself,
    the allocator's slack and the interpreter, so a process needs more.

    Args:
        input_size: height and width in pixels.
        batch_size: images in a step.
        device: "cpu" or "cuda".
        training: False for inference only.
        forward: calls the model on images (N, C, H, W), where it is not to be called by itself. A detector
            wants a list, and its targets in training: `lambda net, x: net(list(x), targets if net.training
            else None)`.
        loss: a scalar from what `forward` returns in training; by default the sum of the mean squares of all
            tensors in it, so that every parameter has a gradient.
        setting: what else `Setting` has: precision, memory_format, steps, warmup, seconds, in_channels.

    Raises `UsageError` for a setting that is none, a device that is not there, a model on "meta", images that
    the model does not take, and where memory ends.
    """
    chosen = Setting(input_size, batch_size, device=str(device), **setting)
    cuda_devices = [torch.device(chosen.device)] if chosen.device.startswith("cuda") else []
    with torch.random.fork_rng(cuda_devices):
        stepper = Stepper(model, chosen, forward, loss)
        for _ in rounds([stepper], training):
            pass
    return stepper.cost()


class Stepper:
    """A network ready to be timed: a copy on the device, with its images, its optimizer and its times.

    Between two steps it holds its weights and, once trained, their momentum; gradients and activations are
    gone. So many networks can wait on one device for their turns.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        forward: Forward = logits_or_maps,
        loss: Loss | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(model).__name__
        self.setting, self.forward, self.loss = setting, forward, loss or mean_squares
        self.device = torch.device(setting.device)
        self.times: dict[Mode, list[float]] = {"inference": [], "training": []}  # seconds
        self.peaks: dict[Mode, int] = {}
        if any(tensor.is_meta for tensor in _state(model)):
            raise UsageError(f"{self.name} is on meta, without weights: `count` is all that can be had of it")
        layout = MEMORY_FORMATS[setting.memory_format]
        shape = (setting.batch_size, setting.in_channels, *setting.input_size)
        with refusals(f"{self.name}, {self._batch()} on {setting.device}"):
            self.model = copy.deepcopy(model).to(self.device).to(memory_format=layout)
            like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self.images = images.to(self.device, like.dtype, memory_format=layout)
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.learned, lr=0.0, momentum=0.9) if self.learned else None
        self.counts: Counts = count(self.model, setting.input_size, setting.in_channels, forward)

    def infer(self) -> None:
        with torch.inference_mode(), self._autocast():
            self.forward(self.model, self.images)

    def learn(self) -> None:
        if self.optimizer is None:
            raise UsageError(f"{self.name}: nothing of it can be trained; measure inference only")
        with self._autocast():
            loss = self.loss(self.forward(self.model, self.images))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def prepare(self, mode: Mode) -> None:
        """Warm up, then see how much memory a step takes."""
        self.model.train(mode == "training")
        began = time.perf_counter()
        for _ in range(self.setting.warmup):
            self._timed(mode)
            if time.perf_counter() - began > self.setting.seconds:
                break
        with refusals(self._doing(mode)):
            self.peaks[mode] = self._held(mode) + _rise(self._step(mode), self.device)

    def time(self, mode: Mode) -> None:
        """One step more, after `prepare` for the same mode."""
        self.times[mode].append(self._timed(mode))

    def cost(self) -> Cost:
        """From the steps timed so far."""
        counts = self.counts
        inference, training = self._timing("inference"), self._timing("training")
        return Cost(counts.parameters, counts.macs, counts.uncounted, inference, training, self.setting)

    def _step(self, mode: Mode) -> Callable[[], None]:
        return self.infer if mode == "inference" else self.learn

    def _timed(self, mode: Mode) -> float:
        step = self._step(mode)
        with refusals(self._doing(mode)):
            _synchronise(self.device)
            began = time.perf_counter()
            step()
            _synchronise(self.device)
            return time.perf_counter() - began

    def _timing(self, mode: Mode) -> Timing | None:
        if not self.times[mode]:
            return None
        times = torch.tensor(self.times[mode], dtype=torch.float64)
        lower, median, upper = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return Timing(
            latency_ms=median * 1e3,
            lower_ms=lower * 1e3,
            upper_ms=upper * 1e3,
            images_per_s=self.setting.batch_size / median,
            peak_bytes=self.peaks[mode],
            steps=len(times),
        )

    def _held(self, mode: Mode) -> int:
        """Bytes of weights, images and, in training, momentum; each storage once."""
        tensors = [*_state(self.model), self.images]
        if mode == "training" and self.optimizer is not None:
            tensors += [x for state in self.optimizer.state.values() for x in tensors_in(state)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.precision == "bfloat16")

    def _doing(self, mode: Mode) -> str:
        return f"{self.name}, {mode} on {self._batch()}"

    def _batch(self) -> str:
        return "×".join(
            map(str, (self.setting.batch_size, self.setting.in_channels, *self.setting.input_size))
        )


def rounds(steppers: Sequence[Stepper], training: bool = True) -> Iterator[tuple[Mode, Stepper, float]]:
    """Time the networks in turns, A B C A B C …, so that whatever else the machine does slows all alike.

    Inference of all of them comes first, then training. Yields after every step its mode, its network and
    which fraction of the mode is done.
    """
    modes: tuple[Mode, ...] = ("inference", "training") if training else ("inference",)
    setting = steppers[0].setting
    for mode in modes:
        for stepper in steppers:
            yield mode, stepper, 0.0
            stepper.prepare(mode)
        end = time.perf_counter() + setting.seconds * len(steppers)
        for i in range(1, setting.steps + 1):
            for stepper in steppers:
                stepper.time(mode)
                yield mode, stepper, i / setting.steps
            if i >= FEWEST_STEPS and time.perf_counter() > end:
                break


def mean_squares(outputs: Any) -> Tensor:
    """The sum of the mean squares of all tensors in `outputs` that depend on parameters.

    Squares, since the sum of a batch-normalised map is constant and has no gradient.
    """
    squares = [x.float().square().mean() for x in tensors_in(outputs) if x.requires_grad]
    if not squares:
        raise UsageError("no output depends on a parameter, so there is nothing to train; give loss=…")
    return torch.stack(squares).sum()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(entry)


def _rise(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that `step` holds at most, above what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages are about its own doings
    # Not the profiler's table, which nets allocations by operator: the single ones, in order of time.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    assert profile.kineto_results is not None
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _available(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch built without CUDA
        raise UsageError(f"device={name!r} cannot be used: {' '.join(str(error).split()):.150}") from error
    raise UsageError(f"device={name!r}: take cpu or cuda")


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


if __name__ == "__main__":
    from .cost_cli import main

    sys.exit(main())
