"""What a run says in the terminal, and the table at its end."""

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

MOST_ROWS = 40  # of classes in the table at the end
console = Console(highlight=False, soft_wrap=True)


@rank_zero_only
def say(text: Any) -> None:
    console.print(text)


def hush() -> None:
    """Lightning's remarks on settings that are as they should be drown what a user has to read."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*is deprecated"
    )  # inside Lightning, with torch 2.15
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty")  # resume
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")  # evaluation
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # on two cores one is right
    warnings.filterwarnings(
        "ignore", message=".*smaller than the logging interval"
    )  # it counts on over epochs


def table(results: Mapping[str, float]) -> Table:
    """The final numbers, splits side by side; those of the classes, such as "AP/circle", at the end."""
    splits = [s for s in ("val", "test") if any(k.startswith(f"{s}/") for k in results)]
    out = Table("metric", *splits)
    names = dict.fromkeys(k.partition("/")[2] for k in results if k.partition("/")[0] in splits)
    of_classes = [name for name in names if "/" in name]
    if len(of_classes) > MOST_ROWS:  # the worst and the best of the last split
        of_classes.sort(key=lambda name: results.get(f"{splits[-1]}/{name}", math.nan))
        left_out = len(of_classes) - MOST_ROWS
        of_classes = [*of_classes[: MOST_ROWS // 2], *of_classes[-MOST_ROWS // 2 :]]
        out.caption = f"{left_out} classes between the worst and the best are in summary.json"
    for name in [*(name for name in names if "/" not in name), *of_classes]:
        kind, _, of = name.partition("/")
        text = Text(f"{kind} of {of}" if of else kind)
        out.add_row(text, *(_cell(results.get(f"{split}/{name}")) for split in splits))
    return out


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
