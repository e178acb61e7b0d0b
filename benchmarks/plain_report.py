"""The table of `benchmarks.plain_torchvision` in docs/results.md."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.plain_data import DATA
from benchmarks.runs import ROOT
from benchmarks.tables import gain, provenance, spread, table, write_section

if TYPE_CHECKING:
    from benchmarks.plain_torchvision import Race

RESULTS = ROOT / "docs/results.md"
HEADING = "## Against a plain torchvision loop, in equal time on two CPU cores"
SAYS = {"ours": "ours: `train.py`, bf16, channels last", "recipe": "plain loop, our recipe"}

Results = dict[int, dict[str, Any]]  # of one contender, by seed


def section(races: Sequence["Race"]) -> str:
    done = [(race, result) for race in races if race.seed is not None and (result := race.result())]
    by_case: dict[tuple[str, str], Results] = {}
    for race, result in done:
        by_case.setdefault((race.data, race.contender), {})[race.seed] = result  # type: ignore[index]
    rows = [row(data, name, by_case) for data in DATA for name in names(by_case, data)]
    columns = [
        "data",
        "contender",
        "runs",
        "steps",
        "ms a step",
        "seconds",
        "AP",
        "AP50",
        "mask AP",
        "ours − it",
    ]
    return f"""    uv run python -m benchmarks.plain_torchvision

{done[0][0].budget} s of training each (start-up and evaluation are not counted, in either), one run after
another. Mean ± standard deviation (least … most) over seeds; AP on `val` by pycocotools against the
original annotations, of the network at the end of its time. The last column is ours minus this contender,
seed by seed, in AP (of masks on nuclei). {provenance(result for _, result in done)}

Equal in all: ResNeXt-26 32×4d-FPN Faster R-CNN (BCCD) and Mask R-CNN (nuclei), checked before the runs to
give the same losses and detections from the same weights; every layer and norm trained, from random
weights; images of 320×240 and 256×256, batches of four, one process that loads images, two threads. How
many steps fill the time is measured for each contender beforehand, and its schedule ends with the last one.

Not equal. The plain loop is torchvision's classes in float32 and contiguous memory. With SGD it has the
reference script's recipe: momentum 0.9, weight decay 1e-4, an epoch of warm-up, a tenth of the rate at 2/3
and 8/9, mirrored left to right; each rate is a row, the best mean counts. "Our recipe" is AdamW at 6e-4,
cosine, clipping and mirroring both ways, so what is left between it and ours is number format, memory
layout, the reading of images and the loop. Of images, ours shrinks with a filter against aliasing,
torchvision without one. Each begins with its own random numbers: a seed is not the same network in both.
Ours also writes its log and a checkpoint an epoch within the time. The calibration is no part of it.

{table(columns, rows)}
{verdicts(by_case)}"""


def names(by_case: dict[tuple[str, str], Results], data: str) -> list[str]:
    return [contender for where, contender in by_case if where == data]


def row(data: str, name: str, by_case: dict[tuple[str, str], Results]) -> list[str]:
    results = by_case[data, name]

    def mean(key: str) -> float:
        return statistics.mean(r[key] for r in results.values() if r["diverged"] is None)

    def aps(iou_type: str, which: int) -> str:
        return spread([r["AP"][iou_type][which] for r in results.values()]) if iou_type in kinds else "–"

    kinds = DATA[data].iou_types
    diverged = sum(r["diverged"] is not None for r in results.values())
    says = SAYS.get(name) or f"plain loop, SGD {name.removeprefix('sgd')}"
    says += f" ({diverged} diverged, counted as 0)" * (diverged > 0)
    alive = diverged < len(results)
    difference = (
        "" if name == "ours" else gain(decisive(by_case, data, "ours"), decisive(by_case, data, name))
    )
    return [
        data,
        says,
        str(len(results)),
        f"{mean('steps'):.0f}" if alive else "–",
        f"{1000 * mean('seconds_per_step'):.0f}" if alive else "–",
        f"{mean('seconds'):.0f}" if alive else "–",
        aps("bbox", 0),
        aps("bbox", 1),
        aps("segm", 0),
        difference,
    ]


def decisive(by_case: dict[tuple[str, str], Results], data: str, name: str) -> dict[int, float]:
    """AP by seed: of masks where there are any."""
    kind = DATA[data].iou_types[-1]
    return {seed: result["AP"][kind][0] for seed, result in by_case.get((data, name), {}).items()}


def verdicts(by_case: dict[tuple[str, str], Results]) -> str:
    """What the issue asks, whatever the answer: above the best of the rates, not below our recipe."""
    lines = []
    for data in DATA:
        ours = decisive(by_case, data, "ours")
        rates = {n: decisive(by_case, data, n) for n in names(by_case, data) if n.startswith("sgd")}
        if ours and rates:
            best = max(rates, key=lambda name: statistics.mean(rates[name].values()))
            edge = (
                " (at the edge of those tried)"
                if best in (min(rates, key=rate), max(rates, key=rate))
                else ""
            )
            lines.append(
                f"- {data}: against SGD at its best rate, {best.removeprefix('sgd')}{edge}: "
                f"{gain(ours, rates[best])}."
            )
        if ours and (recipe := decisive(by_case, data, "recipe")):
            lines.append(f"- {data}: against the plain loop with our recipe: {gain(ours, recipe)}.")
    return "\n".join(lines)


def rate(name: str) -> float:
    return float(name.removeprefix("sgd"))


def report(races: Sequence["Race"], write: bool) -> None:
    if not any(race.result() for race in races if race.seed is not None):
        return
    if write:
        write_section(RESULTS, HEADING, section(races))
    else:
        print(section(races), flush=True)
