"""Ours against a plain torchvision loop: the same network, image size and time of training, judged alike.

    uv run python -m benchmarks.plain_torchvision               all that is missing, then the table
    uv run python -m benchmarks.plain_torchvision bccd          the runs whose names contain a word
    uv run python -m benchmarks.plain_torchvision --list        what is done, and how long the rest will take
    uv run python -m benchmarks.plain_torchvision --seconds 20  a quick look, apart from the rest; prints only

That both networks are the same is checked first. Each contender trains until its time is up, and its learning
rate follows the share of the time that has passed, so that neither needs a guess of how many steps fill it.
A run that is complete in runs/plain-240s/ is not done again, unless its command, our configuration or what it
trains with (`sources`) has changed; one that was broken off begins anew. Nothing else should run meanwhile.
"""

import argparse
import functools
import hashlib
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

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.plain_data import DATA
from benchmarks.plain_equal import check_equal, our_words
from benchmarks.plain_report import report
from benchmarks.runs import REAL_DATA, ROOT, RUNS, TrainRun, listing, work
from tasks.checkpoint import replacing

SECONDS = 240
SEEDS = (0, 1, 2)
# Rates of SGD, and seeds. The reference script's 0.02 for 16 images is 0.005 for 4. On each dataset three are
# compared, the best one in their middle; the fourth shows what lies beyond.
RATES: dict[str, dict[float, tuple[int, ...]]] = {
    "bccd": {0.005: (0,), 0.01: SEEDS, 0.02: SEEDS, 0.04: SEEDS},
    "nuclei": {0.0025: SEEDS, 0.005: SEEDS, 0.01: SEEDS, 0.02: SEEDS},
}
THREADS = 2  # of each contender, beside the process that loads its images
OVERHEAD = 45.0  # seconds of start-up and evaluation, as long as no run is done


@dataclass(frozen=True)
class Race:
    """One contender on one dataset with one seed.

    Its `result.json` comes last: steps and seconds of training, in what it was computed, AP and AP50.
    """

    data: str
    contender: str
    seed: int
    budget: int = SECONDS

    @property
    def name(self) -> str:
        return f"{self.data}-{self.contender}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / f"plain-{self.budget}s"

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def words(self) -> list[str]:
        """The command's, behind Python's."""
        if self.contender == "ours":
            return ["train.py", *self._run.overrides]
        sgd = ["sgd", "--lr", self.contender.removeprefix("sgd")]
        recipe = ["ours"] if self.contender == "recipe" else sgd
        length = ["--seconds", str(self.budget), "--seed", str(self.seed)]
        out = ["--out", os.path.relpath(self.path, ROOT)]
        return ["-m", "benchmarks.plain_loop", self.data, *recipe, *length, *out]

    @property
    def _run(self) -> TrainRun:
        words = (*our_words(self.data), *limits(self.budget), f"seed={self.seed}")
        return TrainRun(self.name, words, self.folder)

    @property
    def made_by(self) -> str:
        """What a result depends on that can change between two sessions; of ours also the configuration."""
        recipe = settings(self.data) if self.contender == "ours" else ""
        return hashlib.sha256("\n".join([*self.words, recipe, sources()]).encode()).hexdigest()

    def result(self) -> dict[str, Any] | None:
        try:
            result = json.loads((self.path / "result.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return result if result.get("made_by") == self.made_by else None

    def seconds(self) -> float | None:
        """Of the whole job."""
        result = self.result()
        return None if result is None else result["job_seconds"]

    def do(self) -> None:
        began, made_by = time.monotonic(), self.made_by
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self._train()
        except subprocess.CalledProcessError:
            if self._trained()["diverged"] is None:  # otherwise it counts, as the plain loop's does
                raise
        result = self._trained()
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        result["AP"] = {t: self._judged(t, result) for t in DATA[self.data].iou_types}
        result |= {"job_seconds": round(time.monotonic() - began, 1), "made_by": made_by}
        with replacing(self.path / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode())

    def _trained(self) -> dict[str, Any]:
        """What the contender says of its training; where it came to no end, that it did not diverge."""
        file = self.path / "trained.json"
        return json.loads(file.read_bytes()) if file.exists() else {"diverged": None}

    def _train(self) -> None:
        if self.contender == "ours":
            self._run.do()
        else:
            print("   ", shlex.join(["python", *self.words]), flush=True)
            subprocess.run([sys.executable, *self.words], cwd=ROOT, check=True)

    def _judged(self, iou_type: str, result: dict[str, Any]) -> list[float]:
        """AP and AP50; what diverged has found nothing."""
        if result["diverged"] is not None:
            return [0.0, 0.0]
        found = self.path / f"predictions_test_{iou_type}.json"
        return judged(DATA[self.data].annotations("val"), found, iou_type)


def limits(budget: int) -> list[str]:
    """A run of so many seconds, without validation: the stage `test` judges the network of its end."""
    return [
        "trainer.max_epochs=10000",
        "trainer.limit_val_batches=0",
        "~callbacks.best",
        "scheduler._target_=benchmarks.clock.cosine_over_time",
        f"++scheduler.seconds={budget}",
        "++callbacks.clock._target_=benchmarks.clock.StopInTime",
    ]


@functools.cache
def settings(data: str) -> str:
    """Our whole configuration for a dataset."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_yaml(compose("train", overrides=our_words(data)))


@functools.cache
def sources() -> str:
    """A hash of what a race trains with: data, networks, the plain loop, the clock.

    Which races there are, how they are judged and what is written about them is not in it: after a change of
    `judged` or `TrainRun` delete runs/plain-240s/.
    """
    names = ("clock.py", "plain_data.py", "plain_equal.py", "plain_loop.py")
    content = [Path(__file__).with_name(name).read_bytes() for name in names]
    return hashlib.sha256(b"".join(content)).hexdigest()


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


def jobs_of(budget: int) -> list[Race]:
    """Seed by seed, so that an early end leaves whole comparisons."""
    return [
        Race(data, name, seed, budget)
        for seed in SEEDS
        for data in DATA
        for name, tried in contenders(data).items()
        if seed in tried
    ]


def contenders(data: str) -> dict[str, tuple[int, ...]]:
    """Who races, and with which seeds; "recipe" is the plain loop with our recipe."""
    rates = {f"sgd{rate:g}": tried for rate, tried in RATES[data].items()}
    return {"ours": SEEDS, "recipe": SEEDS, **rates}


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
    guess = args.seconds + OVERHEAD
    if args.list:
        print(listing(chosen, guess))
        return
    if not (ROOT / REAL_DATA).is_dir():
        sys.exit(f"{ROOT / REAL_DATA} does not exist: set REAL_DATA to the folder of the datasets")
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # both contenders inherit it
    for data, where in DATA.items():
        classes = len(json.loads(where.annotations("train").read_bytes())["categories"])
        print(f"{data}: {check_equal(data, classes)}", flush=True)
    work(chosen, guess, lambda: report(races, write=args.seconds == SECONDS))
    report(races, write=args.seconds == SECONDS)


if __name__ == "__main__":
    main()
