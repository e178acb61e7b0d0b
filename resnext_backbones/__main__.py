"""`python -m resnext_backbones`: the networks in a table; with `--equal`, the rule behind their widths."""

import argparse
import difflib
import fnmatch
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from .counting import count
from .errors import UsageError
from .printing import as_csv, as_json, as_table, to_stdout
from .resnext import ResNeXt
from .variants import VARIANTS, base_width_for

PROGRAM = "python -m resnext_backbones"
EPILOG = f"""
examples:
  {PROGRAM}                       all networks
  {PROGRAM} 'resnext101*' resnet101
  {PROGRAM} --equal               widths for cardinalities 1 to 64, and what they make of ResNeXt-50
  {PROGRAM} --equal 16 24 --json

Parameters are those with the classifier, GMACs are 10⁹ multiply-adds of one image (what papers call FLOPs),
counted on the networks as they are built. Time and memory: {PROGRAM}.cost --help
"""
Row = dict[str, Any]
Column = tuple[str, str, Callable[[Any], str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, or 2 for a mistake."""
    args = _parser().parse_args(arguments)
    try:
        if args.names and args.equal is not None:
            raise UsageError(f"--equal is about ResNeXt-50, not {args.names[0]}; leave one of them out")
        rows = networks(args.names) if args.equal is None else equal_complexity(args.equal or CARDINALITIES)
        with to_stdout():
            if args.json:
                as_json(rows)
            elif args.csv:
                as_csv(rows)
            else:
                columns, notes = NETWORKS if args.equal is None else EQUAL
                as_table(table(rows, columns), notes)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    return 0


def networks(patterns: Sequence[str] = ()) -> list[Row]:
    """The published networks whose names match one of the patterns ("resnext101*"); all without any."""
    for pattern in patterns:
        if not fnmatch.filter(VARIANTS, pattern):
            near = difflib.get_close_matches(pattern, VARIANTS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(VARIANTS)}"
            raise UsageError(f"no network is called {pattern}; {hint}")
    rows = []
    for name, variant in VARIANTS.items():
        if patterns and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        with torch.device("meta"):
            net = variant.build(num_classes=variant.num_classes)
        counts = count(net, (variant.image_size, variant.image_size))
        rows.append(
            {
                "network": name,
                "cardinality": net.cardinality,
                "base_width": net.base_width,
                "image_size": variant.image_size,
                "num_classes": variant.num_classes,
                "parameters": counts.parameters,
                "macs": counts.macs,
                "top1": variant.top1,
                "source": variant.source,
            }
        )
    return rows


CARDINALITIES = (1, 2, 4, 8, 16, 32, 64)


def equal_complexity(cardinalities: Sequence[int]) -> list[Row]:
    """Table 2 of arXiv 1611.05431, `base_width_for` each cardinality, and what became of the whole network.

    `weights` are those of the template block, 69,632 at cardinality 1; parameters and multiply-adds are those
    of ResNeXt-50 with 1000 classes at 224², beside their ratios to ResNet-50's.
    """
    rows: list[Row] = []
    for cardinality in (1, *cardinalities):
        width = base_width_for(cardinality)
        with torch.device("meta"):
            counts = count(ResNeXt((3, 4, 6, 3), cardinality, width, num_classes=1000))
        rows.append(
            {
                "cardinality": cardinality,
                "base_width": width,
                "group_width": cardinality * width,
                "weights": cardinality * (2 * 256 * width + 9 * width**2),
                "parameters": counts.parameters,
                "macs": counts.macs,
            }
        )
    reference, *rows = rows
    for row in rows:
        for key in ("weights", "parameters", "macs"):
            row[f"{key}_ratio"] = row[key] / reference[key]
    return rows


def _thousands(value: int) -> str:
    return f"{value:,}"


def _giga(value: int) -> str:
    return f"{value / 1e9:.3f}"


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


# Columns, as title, key of the row, and how its value is written; and what is said below them.
NETWORKS: tuple[list[Column], list[str]] = (
    [
        ("network", "network", str),
        ("cardinality", "cardinality", str),
        ("base width", "base_width", str),
        ("parameters", "parameters", _thousands),
        ("GMACs", "macs", _giga),
        ("at", "image_size", lambda side: f"{side}²"),
        ("top-1 (%)", "top1", lambda top1: f"{top1:.4g}"),
        ("published in", "source", str),
    ],
    [
        "Top-1: ImageNet-1K, 1000 classes, one centre crop; at 32² CIFAR-10, 10 classes. –: none published.",
        'Pre-activation: accuracy with block="preact", which has at most 0.02 % fewer parameters.',
    ],
)
EQUAL: tuple[list[Column], list[str]] = (
    [
        ("cardinality", "cardinality", str),
        ("base width", "base_width", str),
        ("width of\ngrouped conv", "group_width", str),
        ("weights of\nthe block", "weights", _thousands),
        ("", "weights_ratio", _change),
        ("parameters of\nResNeXt-50", "parameters", _thousands),
        ("", "parameters_ratio", _change),
        ("GMACs", "macs", _giga),
        ("", "macs_ratio", _change),
    ],
    ["Each beside its difference from cardinality 1, that is ResNet-50 (1000 classes, 224²)."],
)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title, key, _ in columns:
        shown.add_column(title, justify="left" if key in ("network", "source") else "right")
    for row in rows:
        cells = ["–" if row[key] in (None, "") else write(row[key]) for _, key, write in columns]
        shown.add_row(*map(Text, cells))
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [NAME …] [--equal [C …]] [--json | --csv]",
        description="The networks, with cardinality, base width, parameters, GMACs and published accuracy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; * stands for anything")
    parser.add_argument(
        "--equal",
        type=int,
        nargs="*",
        metavar="C",
        help="instead: base widths that keep the complexity at these cardinalities (table 2 of the paper)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON in place of the table")
    output.add_argument("--csv", action="store_true", help="print CSV in place of the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
