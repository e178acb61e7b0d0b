"""`python -m resnext_backbones.cost`: networks by name, measured in turns; a table, JSON, CSV, a picture."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from .adapters import TimmBody, TorchvisionBody
from .cost import MEMORY_FORMATS, PRECISIONS, Cost, Setting, Stepper, Timing, rounds
from .cost_plot import Point, check_target, plot
from .errors import UsageError
from .printing import as_csv, as_json, as_table, to_stdout
from .variants import VARIANTS

PROGRAM = "python -m resnext_backbones.cost"
EXAMPLES = f"""
networks:
  resnext50_32x4d          ours, with its classifier (--body: without)
  torchvision:convnext_tiny, timm:regnety_032
                           other people's classifiers as bodies, without their heads
  my.module.Net            anything callable without arguments that makes an nn.Module

examples:
  {PROGRAM} resnext50_32x4d resnet50
  {PROGRAM} resnet50 resnext50_32x4d --batch 8 --threads 1 --json > cost.json
  {PROGRAM} resnet50 torchvision:resnet50 --body --size 800 1333 --inference-only
  {PROGRAM} resnet50 resnet101 resnext50_32x4d --device cuda --precision bfloat16 --batch 64 --plot top1.png

Networks take turns, A B C A B C ..., so that other programs disturb all alike; the table shows medians with
their interquartile range (--json and --csv: quartiles). GMACs are of one image; operators that they leave
out are named under the table. A training step is forward, backward and SGD with momentum.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    steppers: list[Stepper] = []
    try:
        setting = _setting(args)
        for name in args.networks:  # a slip in the last name must not wait for the others to be built
            if name not in VARIANTS and "." not in name and ":" not in name:
                raise _unknown(name)
        if args.plot is not None:
            check_target(args.plot)
            _check_points(args.networks, args.y)
        try:
            _measure(args, setting, steppers)
        finally:  # also of what was interrupted, or failed on one network, the rest is shown
            if any(stepper.times["inference"] for stepper in steppers):
                _show(steppers, setting, args)
        if args.plot is not None:
            _draw(steppers, setting, args)
    except UsageError as error:
        return _end(str(error), 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    return 0


def build(name: str, body: bool = False) -> nn.Module:
    """The network that a word on the command line names; `UsageError` where there is none."""
    source, colon, rest = name.partition(":")
    if colon and source == "torchvision":
        return TorchvisionBody(rest)
    if colon and source == "timm":
        return TimmBody(rest)
    if name in VARIANTS:
        variant = VARIANTS[name]
        return variant.build() if body else variant.build(num_classes=variant.num_classes)
    module, dot, attribute = name.rpartition(".")
    if dot and not colon:
        return _imported(name, module, attribute)
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(VARIANTS)},"
    return UsageError(f"no network {name}; {hint} (or torchvision:NAME, timm:NAME, my.module.Net)")


def _imported(name: str, module: str, attribute: str) -> nn.Module:
    try:
        network = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{name} cannot be built: {error}; give what makes a network without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name} makes a {type(network).__name__}, not an nn.Module")
    return network


def _measure(args: argparse.Namespace, setting: Setting, steppers: list[Stepper]) -> None:
    """Fills `steppers`, so that what is measured before an interruption is not lost."""
    modes = ("inference",) if args.inference_only else ("inference", "training")
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    # No thread of its own that refreshes it: that would run while a network is timed.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=len(modes))
        for name in args.networks:
            progress.update(bar, description=f"building {name}", refresh=True)
            steppers.append(Stepper(build(name, args.body), setting, name=name))
        for mode, stepper, done in rounds(steppers, training=not args.inference_only):
            what = f"{mode} of {stepper.name}" if done else f"warming up {stepper.name} for {mode}"
            progress.update(bar, completed=modes.index(mode) + done, description=what, refresh=True)


def _show(steppers: Sequence[Stepper], setting: Setting, args: argparse.Namespace) -> None:
    costs = [(stepper.name, stepper.cost()) for stepper in steppers]
    rows = [{"network": name, **cost.as_dict()} for name, cost in costs]
    with to_stdout():
        if args.json:
            as_json(rows)
        elif args.csv:
            as_csv([_flat(row) for row in rows])
        else:
            notes = _footer([cost for _, cost in costs], setting)
            if not args.body and any(":" in name for name in args.networks):
                notes.append("torchvision's and timm's without their classifiers; --body measures all so")
            as_table(_table(costs, args.inference_only), notes)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """One line of CSV: `inference.steps` becomes `inference_steps`."""
    nothing = dict.fromkeys(field.name for field in fields(Timing))
    height, width = row["setting"]["input_size"]
    groups = {
        "inference_": row["inference"] or nothing,
        "training_": row["training"] or nothing,
        "": row["setting"] | {"input_size": f"{height}x{width}"},
    }
    uncounted = " ".join(f"{operator}={times}" for operator, times in row["uncounted"].items())
    line = {key: row[key] for key in ("network", "parameters", "macs")} | {"uncounted": uncounted}
    return line | {prefix + key: value for prefix, group in groups.items() for key, value in group.items()}


def _table(costs: Sequence[tuple[str, Cost]], inference_only: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("network\n")
    titles = ["params\nM", "GMACs\n"]
    for mode in ("inference",) if inference_only else ("inference", "training"):
        titles += [f"{mode}\nms (IQR)", "\nimages/s", "peak\nMB"]
    for title in titles:
        table.add_column(title, justify="right")
    for name, cost in costs:
        cells = [f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.3f}", *_cells(cost.inference)]
        table.add_row(Text(name), *cells, *([] if inference_only else _cells(cost.training)))
    return table


def _cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["–"] * 3
    digits = 1 if timing.latency_ms >= 100 else 2
    return [
        f"{timing.latency_ms:.{digits}f} ({timing.upper_ms - timing.lower_ms:.{digits}f})",
        f"{timing.images_per_s:.1f}",
        f"{timing.peak_bytes / 1e6:.1f}",
    ]


def _footer(costs: list[Cost], setting: Setting) -> list[str]:
    height, width = setting.input_size
    precision = setting.precision + (" (convolutions in TF32)" if setting.tf32 else "")
    steps = [timing.steps for cost in costs for timing in (cost.inference, cost.training) if timing]
    left_out = sorted({name.removeprefix("aten.") for cost in costs for name in cost.uncounted})
    return [
        f"{setting.device}: {setting.device_name}, threads: {setting.threads}, PyTorch {setting.torch}",
        f"batch: {setting.batch_size}, images: {height} × {width}, {precision}, "
        f"{setting.memory_format.replace('_', ' ')}, steps: {_span(steps)}, in turns",
        "ms: median and interquartile range of a step; training: forward, backward, SGD with momentum",
        f"GMACs: of one image, without {', '.join(left_out) or 'nothing'}",
    ]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} … {high}"


def _top1(name: str) -> float | None:
    """Published for ImageNet-1K, in per cent; CIFAR's are of another kind."""
    variant = VARIANTS.get(name)
    return variant.top1 if variant is not None and variant.num_classes == 1000 else None


def _check_points(names: Sequence[str], y: str) -> None:
    """Says which networks will miss in the picture; `UsageError` if all of them."""
    missing = [name for name in names if y == "top1" and _top1(name) is None]
    if len(missing) == len(names):
        raise UsageError(f"of {', '.join(missing)} no ImageNet top-1 is known to plot; take --y gmacs")
    if missing:
        _end(f"no ImageNet top-1 is known of {', '.join(missing)}: not in the picture", 0)


def _draw(steppers: list[Stepper], setting: Setting, args: argparse.Namespace) -> None:
    points = []
    for stepper in steppers:
        cost = stepper.cost()
        y = cost.macs / 1e9 if args.y == "gmacs" else _top1(stepper.name)
        if y is not None and cost.inference is not None:
            points.append(Point(stepper.name, cost.inference, y))
    label = "GMACs of one image" if args.y == "gmacs" else "published top-1 on ImageNet-1K, one 224² crop (%)"
    plot(points, label, setting, args.plot)


def _end(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _pixels(word: str) -> int:
    try:
        return int(word)
    except ValueError:  # whatever follows --size is taken for one
        raise argparse.ArgumentTypeError(f"{word!r} is no number of pixels; name networks first") from None


def _setting(args: argparse.Namespace) -> Setting:
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads {args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
    if len(args.size) > 2:
        raise UsageError(f"--size {' '.join(map(str, args.size))}: give one side, or height and width")
    return Setting(
        input_size=(args.size[0], args.size[-1]),
        batch_size=args.batch,
        device=args.device,
        precision=args.precision,
        memory_format=args.memory_format,
        steps=args.steps,
        seconds=args.seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} NETWORK … [options]",
        description="What networks cost: parameters, multiply-adds, time and memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="see below")
    add("--body", action="store_true", help="our networks without their classifier")
    add(
        "--size",
        type=_pixels,
        nargs="+",
        default=[224],
        metavar="PIXELS",
        help="side, or height and width (224)",
    )
    add("--batch", type=int, default=1, help="images in a step (1)")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    add("--precision", choices=PRECISIONS, default="float32", help="bfloat16 is by autocast (float32)")
    add("--memory-format", choices=list(MEMORY_FORMATS), default="channels_last", help="(channels_last)")
    add("--steps", type=int, default=30, help="timed steps of each network and mode, at most (30)")
    add("--seconds", type=float, default=10.0, help="end timing after so many for each of them (10)")
    add("--threads", type=int, help="of PyTorch on the CPU (its own choice)")
    add("--inference-only", action="store_true", help="do not time training")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON in place of the table")
    output.add_argument("--csv", action="store_true", help="print CSV in place of the table")
    add("--plot", type=Path, metavar="FILE.png", help="draw latency of inference against --y")
    add("--y", choices=("top1", "gmacs"), default="top1", help="published ImageNet top-1, or GMACs (top1)")
    return parser
