"""The table of `benchmarks.plain_torchvision` in docs/results.md."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.plain_data import DATA
from benchmarks.runs import ROOT
from benchmarks.tables import difference, provenance, spread, table, write_section

if TYPE_CHECKING:
    from benchmarks.plain_torchvision import Race

RESULTS = ROOT / "docs/results.md"
HEADING = "## Against a plain torchvision loop, in equal time on two CPU cores"
SAYS = {"ours": "ours: `train.py`", "recipe": "plain loop, our recipe"}

Results = dict[int, dict[str, Any]]  # of one contender, by seed


def section(races: Sequence["Race"]) -> str:
    done = [(race, result) for race in races if (result := race.result())]
    by_case: dict[tuple[str, str], Results] = {}
    for race, result in done:
        by_case.setdefault((race.data, race.contender), {})[race.seed] = result
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

{done[0][0].budget} s of training each, from the first batch on (start-up and evaluation are not counted, in
either), one run after another. The time ends each run and leads its learning rate, which is a function of
the share of it that has passed; whoever is faster does more steps. Mean ± standard deviation (least … most)
over seeds; AP on `val` by pycocotools against the original annotations, of the network at the end of its
time. The last column is ours minus this contender in AP (of masks on nuclei): the difference of the means ±
its standard error (Welch). Seeds are no pairs, since each contender draws its own random numbers.
{provenance(result for _, result in done)} As measured: {"; ".join(computed_in(done))}.

Equal in all: ResNeXt-26 32×4d-FPN Faster R-CNN (BCCD) and Mask R-CNN (nuclei), checked before the runs to
give the same losses and detections from the same weights; every layer and norm trained, from random
weights, on the CPU; images of 320×240 and 256×256, in batches of four; images without objects and boxes
without area are left out of training.

Not equal. The plain loop is torchvision's classes in float32 and contiguous memory. With SGD it has the
reference script's recipe: momentum 0.9, weight decay 1e-4, an epoch of warm-up, a tenth of the rate at 2/3
and 8/9, mirrored left to right; each rate is a row, the best mean counts. "Our recipe" is AdamW at 6e-4,
cosine, clipping and mirroring both ways, so what is left between it and ours is number format, memory
layout (ours is channels last), the reading of images and the loop. Of images, ours shrinks with a filter
against aliasing, torchvision without one. Ours trains on an epoch's last, smaller batch, which the plain loop
leaves out as the reference script does. Ours also writes its log and a checkpoint an epoch within the time.
A run that diverges counts as AP 0, whosever it is.

{table(columns, rows)}
{verdicts(by_case)}"""


def computed_in(done: Sequence[tuple["Race", dict[str, Any]]]) -> list[str]:
    """Number format, threads and loading processes of the contenders, as each run has found them."""
    lines = []
    for race, result in done:
        who = "ours" if race.contender == "ours" else "the plain loop"
        where = f"{result['threads']} threads, processes that load images: {result['workers']}"
        lines.append(f"{who} in {result['precision']}, {where}")
    return list(dict.fromkeys(lines))


def names(by_case: dict[tuple[str, str], Results], data: str) -> list[str]:
    return [contender for where, contender in by_case if where == data]


def row(data: str, name: str, by_case: dict[tuple[str, str], Results]) -> list[str]:
    results = by_case[data, name]

    def aps(iou_type: str, which: int) -> str:
        return spread([r["AP"][iou_type][which] for r in results.values()]) if iou_type in kinds else "–"

    kinds = DATA[data].iou_types
    diverged = sum(r["diverged"] is not None for r in results.values())
    says = SAYS.get(name) or f"plain loop, SGD {name.removeprefix('sgd')}"
    says += f" ({diverged} diverged, counted as 0)" * (diverged > 0)
    alive = [r for r in results.values() if r["diverged"] is None]
    lead = "" if name == "ours" else difference(aps_of(by_case, data, "ours"), aps_of(by_case, data, name))
    return [
        data,
        says,
        str(len(results)),
        between([r["steps"] for r in alive]),
        between([1000 * r["seconds"] / r["steps"] for r in alive]),
        between([r["seconds"] for r in alive]),
        aps("bbox", 0),
        aps("bbox", 1),
        aps("segm", 0),
        lead,
    ]


def between(values: Sequence[float]) -> str:
    """The least and the most, so that a disturbed run is seen."""
    least, most = (f"{f(values):.0f}" if values else "–" for f in (min, max))
    return least if least == most else f"{least} … {most}"


def aps_of(by_case: dict[tuple[str, str], Results], data: str, name: str) -> list[float]:
    """AP of each seed: of masks where there are any."""
    kind = DATA[data].iou_types[-1]
    return [result["AP"][kind][0] for result in by_case.get((data, name), {}).values()]


def verdicts(by_case: dict[tuple[str, str], Results]) -> str:
    """Whether ours is above the best of the rates and not below our recipe, whatever the answer."""
    lines = []
    for data in DATA:
        ours = aps_of(by_case, data, "ours")
        rates = {n: aps_of(by_case, data, n) for n in names(by_case, data) if n.startswith("sgd")}
        if ours and rates:
            best = max(rates, key=lambda name: statistics.mean(rates[name]))
            edge = (
                " (at the edge of those tried)"
                if best in (min(rates, key=rate), max(rates, key=rate))
                else ""
            )
            lines.append(
                f"- {data}: against SGD at its best rate, {best.removeprefix('sgd')}{edge}: "
                f"{difference(ours, rates[best])}."
            )
        if ours and (recipe := aps_of(by_case, data, "recipe")):
            lines.append(f"- {data}: against the plain loop with our recipe: {difference(ours, recipe)}.")
    return "\n".join(lines)


def rate(name: str) -> float:
    return float(name.removeprefix("sgd"))


def report(races: Sequence["Race"], write: bool) -> None:
    if not any(race.result() for race in races):
        return
    if write:
        write_section(RESULTS, HEADING, section(races))
    else:
        print(section(races), flush=True)
