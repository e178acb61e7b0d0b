"""Every task on real data, from scratch on two CPU cores, each within four minutes.

    uv run python -m benchmarks.real_data            all that docs/results.md does not have yet
    uv run python -m benchmarks.real_data bccd       those whose names contain a word, anew

Each finished run is appended to docs/results.md at once, so an interrupted session goes on where it ended.
The data are read from REAL_DATA (default ../shared/data). Nothing else should run meanwhile.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT / "../shared/data"))
RESULTS = ROOT / "docs/results.md"
HEADING = "## Every task on real data, from scratch, within four minutes on two CPU cores"
COLUMNS = "| run | network | result | seconds | versions | hardware |\n|---|---|---|---|---|---|\n"
HEAD = f"""
By `uv run python -m benchmarks.real_data`, one run after another with nothing beside them; seed 0, one run
each, so that a difference of a point or two between rows is no finding. Seconds are those of the whole run:
start-up, training, validations, test, pictures. "Overfit" rows are judged on the images they were trained on:
they show that a network can learn, nothing else.

{COLUMNS}"""
QUICK = ["experiment=small_data_cpu", "logger.wandb.mode=disabled"]
BCCD = ["data=coco", "data.root=REAL_DATA/bccd", "data.train=train", "data.val=val", "data.test=test"]
NUCLEI = ["data=coco", "data.root=REAL_DATA/nuclei", "data.train=train", "data.val=val"]
NUCLEI += ["data.image_size=[256,256]", "augment=flip_vertically"]
FRUITS = ["data=coco", "data.root=REAL_DATA/fruits_nuts", "data.batch_size=2"]
FRUITS += [f"data.{s}={{annotations: trainval.json, images: images}}" for s in ("train", "val")]
PEOPLE = ["data=coco", "data.root=REAL_DATA/coco33", "data.train=train2017", "data.val=train2017"]
PEOPLE += ["data.batch_size=2", "data.flip=0"]


@dataclass(frozen=True)
class Run:
    """What is run, and which of its numbers are reported."""

    name: str
    words: list[str]
    metrics: list[str]


def epochs(number: int, validations: int = 2) -> list[str]:
    return [f"trainer.max_epochs={number}", f"trainer.check_val_every_n_epoch={number // validations}"]


RUNS = [
    Run(
        "clothing, classifier",
        [
            "task=classification",
            "data=class_folders",
            "data.root=REAL_DATA/clothing",
            "data.image_size=96",
            "data.crop_scale=[0.35,1.0]",
            "task.label_smoothing=0.1",
            *epochs(48),
        ],
        ["top1", "top5"],
    ),
    *(
        Run(
            f"bccd, {model}",
            ["task=detection", f"model={model}", *BCCD, "augment=flip_vertically", *epochs(6)],
            ["AP", "AP50"],
        )
        for model in ("faster_rcnn", "retinanet", "fcos")
    ),
    Run(
        "nuclei, mask_rcnn",
        ["task=instance_segmentation", *NUCLEI, *epochs(3, validations=1)],
        ["AP", "AP50", "mask_AP", "mask_AP50"],
    ),
    Run(
        "fruits_nuts, mask_rcnn (overfit)",
        ["task=instance_segmentation", *FRUITS, *epochs(24)],
        ["AP", "mask_AP"],
    ),
    Run(
        "coco33, keypoint_rcnn (overfit)",
        ["task=keypoints", *PEOPLE, *epochs(70, validations=1)],
        ["AP", "keypoint_AP"],
    ),
    Run(
        "nuclei, semantic_fpn",
        ["task=semantic_segmentation", *NUCLEI, *epochs(6)],
        ["mIoU", "pixel_accuracy"],
    ),
]


def main(wanted: list[str]) -> None:
    chosen = [run for run in RUNS if any(word in run.name for word in wanted)] if wanted else missing()
    if wanted and not chosen:
        sys.exit(f"no run is called like {' or '.join(wanted)}; there are: {'; '.join(r.name for r in RUNS)}")
    if not REAL_DATA.is_dir():
        sys.exit(f"{REAL_DATA} does not exist: set REAL_DATA to the folder of the datasets")
    for number, run in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {run.name}", flush=True)
        append(row(run))


def missing() -> list[Run]:
    done = RESULTS.read_text()
    return [run for run in RUNS if f"\n| {run.name} |" not in done]


def row(run: Run) -> str:
    """Runs it and returns its line of the table."""
    folder = f"real-{re.sub('[^a-z0-9]+', '-', run.name).strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    words = [word.replace("REAL_DATA", str(REAL_DATA)) for word in run.words]
    command = [sys.executable, "train.py", *QUICK, *words, f"run_id={folder}", "runs_dir=runs"]
    print("   ", shlex.join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    summary = json.loads((ROOT / "runs" / folder / "summary.json").read_text())
    numbers = ", ".join(f"{name} {summary['results'][f'test/{name}']:.3f}" for name in run.metrics)
    versions = ", ".join(f"{name} {summary['versions'][name]}" for name in ("torch", "torchvision"))
    cells = (
        run.name,
        f"{summary['model']} on {summary['backbone']}",
        numbers,
        f"{summary['seconds']:.0f}",
        versions,
        f"{os.cpu_count()} cores, {processor()}",
    )
    return "| " + " | ".join(cells) + " |\n"


def processor() -> str:
    try:
        return re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return "unknown processor"


def append(line: str) -> None:
    """Puts a line at the end of the table, begun if need be; an older one of the same run gives way."""
    text = RESULTS.read_text()
    if HEADING not in text:
        text = f"{text.rstrip()}\n\n{HEADING}\n{HEAD}"
    name = line.split("|")[1]
    before, table, after = split(text)
    kept = [row for row in table if row.split("|")[1] != name]
    part = RESULTS.with_suffix(".part")
    part.write_text("".join([before, *kept, line, after]))
    part.replace(RESULTS)
    print("   ", line, flush=True)


def split(text: str) -> tuple[str, list[str], str]:
    """The page before the table's rows, the rows, and what follows."""
    start = text.index("|---|---|---|---|---|---|\n", text.index(HEADING)) + len(
        "|---|---|---|---|---|---|\n"
    )
    rows = re.match(r"(?:\|.*\n)*", text[start:])
    assert rows is not None
    return text[:start], rows[0].splitlines(keepends=True), text[start + rows.end() :]


if __name__ == "__main__":
    main(sys.argv[1:])
