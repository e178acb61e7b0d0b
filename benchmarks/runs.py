"""What benchmarks made of many runs share: each run is done once, and what is left can be estimated."""

import functools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resnext_backbones.weight_files import sha256

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs"
REAL_DATA = os.environ.get("REAL_DATA", "../shared/data")  # as commands say it, from the project's folder


class Job(Protocol):
    """Something that takes minutes and leaves a result on the disk."""

    @property
    def name(self) -> str: ...

    def seconds(self) -> float | None:
        """How long it took; None: it is not done."""

    def do(self) -> None:
        """Does it from its beginning; what an interrupted attempt has left is removed."""


@dataclass(frozen=True)
class TrainRun:
    """One run of train.py, complete when its summary.json tells the seconds.

    Args:
        name: of the run's folder, below `folder`.
        words: the command line without the folder and without W&B.
        folder: of this benchmark's runs.
        keep_checkpoints: whether another run begins with this one's weights.
        body: the run that this one takes its first weights from; whatever began with others than those that
            are there now is not complete.
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    keep_checkpoints: bool = False
    body: "TrainRun | None" = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def overrides(self) -> list[str]:
        place = [f"run_id={self.name}", f"runs_dir={os.path.relpath(self.folder, ROOT)}"]
        return [*self.words, "logger.wandb.mode=disabled", *place]

    def summary(self) -> dict[str, Any] | None:
        """What a complete run of this very command, from these very weights, has left."""
        try:
            summary = json.loads((self.path / "summary.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        same = summary.get("command") == " ".join(["python train.py", *self.overrides])
        if self.keep_checkpoints:
            same = same and self.weights() is not None
        if self.body is not None:
            same = same and (summary.get("weights") or {}).get("sha256") == self.body.weights()
        return summary if same and "seconds" in summary else None

    def weights(self) -> str | None:
        """SHA-256 of the checkpoint that another run begins with; None: it is not there."""
        path = self.path / "checkpoints/best.ckpt"
        return _sha256(path, path.stat().st_mtime_ns) if path.is_file() else None

    def seconds(self) -> float | None:
        summary = self.summary()
        return None if summary is None else summary["seconds"]

    def do(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        print("   ", shlex.join(["train.py", *self.overrides]), flush=True)
        subprocess.run([sys.executable, "train.py", *self.overrides], cwd=ROOT, check=True)
        if not self.keep_checkpoints:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


@functools.cache
def _sha256(path: Path, written: int) -> str:
    """Read once, as long as it is not written anew."""
    return sha256(path)


def work(jobs: Sequence[Job], guess: float, after_each: Callable[[], object]) -> None:
    """Does what is not done yet, in the given order.

    Args:
        guess: seconds of a job, as long as none is done.
        after_each: called after each job, so that an interrupted session leaves all it knows.
    """
    for number, job in enumerate(jobs, start=1):
        if job.seconds() is not None:
            continue
        print(f"[{number}/{len(jobs)}] {job.name}; {left(jobs, guess)}", flush=True)
        began = time.monotonic()
        job.do()
        print(f"[{number}/{len(jobs)}] {job.name}: {time.monotonic() - began:.0f} s", flush=True)
        after_each()


def left(jobs: Sequence[Job], guess: float) -> str:
    """How many jobs are left and how long they will take, by the mean of those that are done."""
    done = [seconds for job in jobs if (seconds := job.seconds()) is not None]
    missing = len(jobs) - len(done)
    minutes = missing * (statistics.mean(done) if done else guess) / 60
    return f"{missing} of {len(jobs)} left, about {minutes:.0f} min"


def listing(jobs: Sequence[Job], guess: float) -> str:
    """A line for each job, and how long the missing ones will take."""
    lines = [f"{'missing' if (s := job.seconds()) is None else f'{s:6.0f}s'}  {job.name}" for job in jobs]
    return "\n".join([*lines, left(jobs, guess)])
