"""How benchmarks write what they measured: numbers with their spread, tables, a section of a page."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.checkpoint import replacing


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, and the extremes."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f} (one run)"
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} ({low:.3f} … {high:.3f})"


def gain(ours: Mapping[int, float], others: Mapping[int, float]) -> str:
    """The difference of two arms seed by seed, where a seed is the same start and the same data in both.

    Its mean ± sample deviation, then each of them.
    """
    each = [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]
    if not each:
        return "–"
    deviation = f" ± {statistics.stdev(each):.3f}" if len(each) > 1 else ""
    return f"{statistics.mean(each):+.3f}{deviation} ({', '.join(f'{value:+.3f}' for value in each)})"


def difference(ours: Sequence[float], others: Sequence[float]) -> str:
    """The difference of two contenders' means ± its standard error, by the spread of both (Welch 1947).

    For runs that have nothing but their number in common, so that pairs would say nothing.
    """
    if not ours or not others:
        return "–"
    mean = f"{statistics.mean(ours) - statistics.mean(others):+.3f}"
    if len(ours) == 1 or len(others) == 1:
        return f"{mean} (no spread: one run)"
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, others)))
    return f"{mean} ± {error:.3f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def provenance(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Hardware, versions and commits of runs, by their `versions` and `git`."""
    summaries = list(summaries)
    packages = ("torch", "torchvision", "lightning", "pycocotools")

    def all_of(key: str) -> str:
        return " and ".join(dict.fromkeys(str(s["versions"].get(key)) for s in summaries))

    commits = (f"{str(s['git']['commit'])[:9]}{' (changed)' * bool(s['git']['dirty'])}" for s in summaries)
    return (
        f"{all_of('devices')} cores, {all_of('hardware')}; Python {all_of('python')}, "
        f"{', '.join(f'{name} {all_of(name)}' for name in packages)}; commit "
        f"{' and '.join(dict.fromkeys(commits))}."
    )


def write_section(page: Path, heading: str, text: str) -> None:
    """Puts `text` below `heading` ("## …"), in place of what stood there up to the next heading of its rank.

    A new section goes to the page's end. Raises FileNotFoundError where there is no page.
    """
    old = page.read_text()
    section = f"{heading}\n\n{text.strip()}\n"
    found = re.search(rf"^{re.escape(heading)}\n(?:(?!## ).*\n?)*", old, flags=re.MULTILINE)
    if found is None:
        new = f"{old.rstrip()}\n\n{section}"
    else:
        rest = old[found.end() :]
        new = old[: found.start()] + section + (f"\n{rest}" if rest else "")
    with replacing(page) as file:
        file.write(new.encode())
