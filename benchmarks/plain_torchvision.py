"""Ours against a plain torchvision loop: the same network, image size and time of training, judged alike.

    uv run python -m benchmarks.plain_torchvision               all that is missing, then the table
    uv run python -m benchmarks.plain_torchvision bccd          the runs whose names contain a word
    uv run python -m benchmarks.plain_torchvision --list        what is done, and how long the rest will take
    uv run python -m benchmarks.plain_torchvision --seconds 20  a quick look, apart from the rest; prints only

That both networks are the same is checked first. How many steps fit into the time is measured for each
contender, so that its schedule ends when the time does. A run that is complete in runs/plain-240s/ is not
done again, one that was broken off begins anew. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.plain_data import DATA
from benchmarks.plain_equal import check_equal, our_words
from benchmarks.plain_loop import WARM
from benchmarks.plain_report import report
from benchmarks.runs import REAL_DATA, ROOT, RUNS, TrainRun, listing, work
from tasks.checkpoint import replacing
from tasks.loggers import read_metrics

SECONDS = 240
SEEDS = (0, 1, 2)
RATES = (
    0.005,
    0.01,
    0.02,
)  # the reference script's 0.02 for 16 images is 0.005 for 4; from random weights more
CALIBRATION = 60  # steps
OVERHEAD = 45.0  # seconds of start-up and evaluation, as long as no run is done
CONTENDERS = ("ours", "recipe", *(f"sgd{rate:g}" for rate in RATES))  # "recipe": the plain loop with ours


@dataclass(frozen=True)
class Race:
    """One contender on one dataset with one seed; without a seed, the calibration of its steps.

    Its `result.json` comes last: steps, seconds of training and of a step, and of a race AP and AP50.
    """

    data: str
    contender: str
    seed: int | None
    budget: int = SECONDS

    @property
    def name(self) -> str:
        return f"{self.data}-{self.contender}-{'steps' if self.seed is None else f'seed{self.seed}'}"

    @property
    def folder(self) -> Path:
        return RUNS / f"plain-{self.budget}s"

    def result(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / self.name / "result.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def seconds(self) -> float | None:
        """Of the whole job."""
        result = self.result()
        return None if result is None else result["job_seconds"]

    @property
    def calibration(self) -> "Race":
        """A step costs the same at every learning rate."""
        contender = f"sgd{RATES[0]:g}" if self.contender.startswith("sgd") else self.contender
        return Race(self.data, contender, None, self.budget)

    def steps(self) -> int:
        """Those that fit into the time, in tens: ours logs every tenth."""
        if self.seed is None:
            return CALIBRATION if self.budget >= SECONDS else 2 * WARM
        known = self.calibration.result()
        if known is None:
            raise RuntimeError(f"{self.calibration.name} is not done")
        return max(2 * WARM, int(self.budget / known["seconds_per_step"]) // 10 * 10)

    def do(self) -> None:
        path, began = self.folder / self.name, time.monotonic()
        shutil.rmtree(path, ignore_errors=True)
        result = self._ours() if self.contender == "ours" else self._plain(path)
        if self.seed is not None:
            result |= {"AP": {t: self._judged(path, t, result) for t in DATA[self.data].iou_types}}
            if result["diverged"] is None and abs(result["seconds"] / self.budget - 1) > 0.05:
                print(f"    warning: it trained for {result['seconds']:.0f} s, not {self.budget}", flush=True)
        result["job_seconds"] = round(time.monotonic() - began, 1)
        with replacing(path / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode())

    def _ours(self) -> dict[str, Any]:
        """train.py; the time of training is that between its logged steps."""
        steps = self.steps()
        run = TrainRun(self.name, (*our_words(self.data), *limits(steps, self.seed)), self.folder)
        run.do()
        summary = run.summary()
        assert summary is not None, f"{run.path} is not complete"
        clock = {line["step"] + 1: line["time"] for line in read_metrics(run.path) if "train/loss" in line}
        per_step = (clock[steps] - clock[WARM]) / (steps - WARM)
        about = {key: summary[key] for key in ("versions", "git")}
        return {
            "diverged": None,
            "steps": steps,
            "seconds": per_step * steps,
            "seconds_per_step": per_step,
            **about,
        }

    def _plain(self, path: Path) -> dict[str, Any]:
        recipe = (
            ["ours"] if self.contender == "recipe" else ["sgd", "--lr", self.contender.removeprefix("sgd")]
        )
        words = ["-m", "benchmarks.plain_loop", self.data, *recipe, "--steps", str(self.steps())]
        words += ["--seed", str(self.seed or 0), "--out", os.path.relpath(path, ROOT)]
        words += ["--train-only"] * (self.seed is None)
        print("   ", shlex.join(["python", *words]), flush=True)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        result = json.loads((path / "trained.json").read_bytes())
        (path / "trained.json").unlink()
        return result

    def _judged(self, path: Path, iou_type: str, result: dict[str, Any]) -> list[float]:
        """AP and AP50; what diverged has found nothing."""
        if result["diverged"] is not None:
            return [0.0, 0.0]
        return judged(
            DATA[self.data].annotations("val"), path / f"predictions_test_{iou_type}.json", iou_type
        )


def judged(annotations: Path, predictions: Path, iou_type: str) -> list[float]:
    """AP and AP50 by pycocotools, of results in COCO's format against the annotation file as it stands."""
    if not json.loads(predictions.read_bytes()):
        return [0.0, 0.0]  # pycocotools refuses a list without results
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(predictions)), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:2]]


def limits(steps: int, seed: int | None) -> list[str]:
    """A run of so many steps, judged once at its end; of a calibration, only its training."""
    words = ["trainer.max_epochs=-1", f"++trainer.max_steps={steps}", "trainer.check_val_every_n_epoch=null"]
    if seed is None:
        return [*words, "++trainer.val_check_interval=1000000", "~callbacks.best", "stages=[fit]"]
    return [*words, f"++trainer.val_check_interval={steps}", f"seed={seed}"]


def jobs_of(budget: int, seeds: Sequence[int] = SEEDS) -> list[Race]:
    """Calibrations first, then seed by seed, so that an early end leaves whole comparisons."""
    races = [Race(data, name, seed, budget) for seed in seeds for data in DATA for name in CONTENDERS]
    return [*dict.fromkeys(race.calibration for race in races), *races]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only runs whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of training, of each run")
    args = parser.parse_args(words)
    races = jobs_of(args.seconds)
    chosen = [r for r in races if not args.words or any(word in r.name for word in args.words)]
    if not chosen:
        parser.error(f"no run is called like {' or '.join(args.words)}; --list names them")
    jobs = list(dict.fromkeys([r.calibration for r in chosen] + chosen))
    guess = args.seconds + OVERHEAD
    if args.list:
        print(listing(jobs, guess))
        return
    if not (ROOT / REAL_DATA).is_dir():
        sys.exit(f"{ROOT / REAL_DATA} does not exist: set REAL_DATA to the folder of the datasets")
    for data, where in DATA.items():
        classes = len(json.loads(where.annotations("train").read_bytes())["categories"])
        print(f"{data}: {check_equal(data, classes)}", flush=True)
    work(jobs, guess, lambda: report(races, write=args.seconds == SECONDS))
    report(races, write=args.seconds == SECONDS)


if __name__ == "__main__":
    main()
