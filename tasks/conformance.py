"""Whether a task keeps its promises: a kit for everyone who writes one, as `check_backbone` is for bodies.

    python -m tasks.conformance task=my_task data=my_data data.root=FOLDER data.batch_size=4

What it tries takes some minutes on a CPU; a small network, small images and small batches are enough.
"""

import argparse
import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose
from hydra.errors import HydraException
from hydra.initialize import initialize_config_dir
from omegaconf.errors import OmegaConfBaseException

from resnext_backbones.errors import UsageError
from tasks import plugins
from tasks.building import build, build_task
from tasks.cli import config_dir_of, explain, searched
from tasks.conforming.checks import CHECKS
from tasks.conforming.runs import quiet
from tasks.conforming.subject import Fault, Made, NotApplicable, Subject, said
from tasks.terminal import hush

PROGRAM = "python -m tasks.conformance"
CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
STEPS = 40  # on one batch, until its loss has fallen


@dataclass(frozen=True)
class Outcome:
    """Of one check. state: "passed", "failed", "not applicable" or "left out". text: what was found."""

    check: str
    state: str
    text: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.check:<14} {self.state}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True)
class Report:
    """What all checks found; as text, a line each. `assert report.ok, report` suits a test."""

    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [outcome.check for outcome in self.outcomes if outcome.state == "failed"]

    def __str__(self) -> str:
        return "\n".join(map(str, self.outcomes))


def check_task(
    task: Sequence[str] | Callable[[], Made], *, steps: int = STEPS, skip: Collection[str] = ()
) -> Report:
    """Tries what training, evaluation, resuming and prediction ask of a task, on the CPU and its own data.

    A check that fails does not keep the next ones from being tried:

        losses         `losses(batch)` gives named, finite scalars; their sum sends a finite gradient to every
                       trainable parameter (one without makes distributed training stop); the batch is left
                       as it is
        overfits       the loss of one batch falls clearly within `steps` steps of AdamW
        empty_targets  images without objects, or without a pixel that counts: finite losses, no crash, in
                       training and in evaluation; of tasks whose batches have `targets`
        evaluation     weights, statistics, random state and batch are as before; the same batch gives the
                       same bits again; the metric gives `monitor`, which the best checkpoint is chosen by
        prediction     `predict` gives one entry an image, in the image's pixels; `Predictor` takes them, and
                       prepares images as evaluation does; `picture` gives an image
        save_and_load  a checkpoint holds plain containers only; a new task filled from it, and `load_task`,
                       predict the same bits
        resume         broken off within an epoch and gone on with, a run ends in the same bits
        processes      two processes evaluate to the numbers of one, and hold the same weights after training

    What two processes learn is not compared with what one learns: regions and anchors are drawn at random by
    each process, and some losses are means over what a process sees. (Seeding by image is planned; a mean
    over images, as of classification, is the same already.)

    Args:
        task: the words of a command line (`["task=my_task", "data.root=…"]`), or what makes the task and its
            data anew at each call, the same but for torch's random numbers, with their `record` as
            `tasks.building.build_task` leaves it; for `processes`, a function at the top of a module.
        steps: of `overfits`.
        skip: names of checks to leave out, for a task that never promised them.

    Raises:
        UsageError: the task cannot be built at all, or `skip` names no check.
    """
    return Report(tuple(outcomes(task, steps=steps, skip=skip)))


def outcomes(
    task: Sequence[str] | Callable[[], Made], *, steps: int = STEPS, skip: Collection[str] = ()
) -> Iterator[Outcome]:
    """As `check_task`, one after the other."""
    unknown = sorted(set(skip) - {check.__name__ for check in CHECKS})
    if unknown:
        names = ", ".join(check.__name__ for check in CHECKS)
        raise UsageError(f"check_task: skip={unknown} names no check; there are {names}")
    hush()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        with quiet():
            subject = Subject(task if callable(task) else Composed(tuple(task)), steps, Path(folder))
        for check in CHECKS:
            began = time.monotonic()
            if check.__name__ in skip:
                state, text = "left out", ""
            else:
                with quiet():
                    state, text = tried(check, subject)
            yield Outcome(check.__name__, state, text, time.monotonic() - began)


def tried(check: Callable[["Subject"], str | None], subject: "Subject") -> tuple[str, str]:
    try:
        return "passed", check(subject) or ""
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except Fault as fault:
        return "failed", str(fault)
    except Exception as error:  # whatever somebody else's code raises
        return "failed", f"ends in {said(error)}"


@dataclass(frozen=True)
class Composed:
    """Makes what a command line names, as `train.py` does; goes to other processes as its words."""

    words: tuple[str, ...]

    def __call__(self) -> Made:
        plugins.register()
        try:
            with initialize_config_dir(CONFIGS, version_base="1.3"):
                cfg = compose("train", overrides=list(self.words))
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(" ".join(explain(error, list(self.words), CONFIGS, "train").split())) from error
        data = build(cfg, "data", seed=cfg.seed)
        data.prepare_data()
        task, _ = build_task(cfg, data)
        return task, data


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 all kept, 1 a promise is broken, 2 a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    words = [*args.words, *(searched(source) for source in config_dir_of(given))]
    ok = True
    try:
        for outcome in outcomes(words, steps=args.steps, skip=args.skip):
            print(f"{outcome}  ({outcome.seconds:.0f} s)", flush=True)
            ok = ok and outcome.state != "failed"
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    return 0 if ok else 1


def parser() -> argparse.ArgumentParser:
    about = inspect.cleandoc(check_task.__doc__ or "").partition("\nArgs:")[0]
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="KEY=VALUE", help="as for train.py: task=… data=… data.root=…")
    add("--config-dir", "-cd", metavar="DIR", help="a folder with configurations of your own")
    add("--steps", type=int, default=STEPS, help=f"of `overfits` ({STEPS})")
    add("--skip", action="append", default=[], metavar="CHECK", help="a check to leave out; may be repeated")
    return parser


if __name__ == "__main__":
    sys.exit(main())
