"""The runs of `benchmarks.pretraining`: pretrained bodies, and detectors that begin with them or without."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import REAL_DATA, ROOT, RUNS, Job, TrainRun

SEEDS = (0, 1, 2)
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
TRAINING_IMAGES = 205
STEPS = 312  # six epochs of all images: three minutes
VALIDATIONS = 4  # of a run
METRIC = "test/AP"

# How a body is pretrained, from random weights, within four minutes.
SOURCES = {
    "shapes": (
        "data=shapes",
        "data.root=data/shapes-pretraining",
        "data.images={train: 4000, val: 200, test: 200}",
        "data.image_size=96",
        "trainer.max_epochs=3",
        "trainer.check_val_every_n_epoch=1",
    ),
    "clothing": (
        "data=class_folders",
        f"data.root={REAL_DATA}/clothing",
        "data.image_size=96",
        "data.crop_scale=[0.35,1.0]",
        "task.label_smoothing=0.1",
        "trainer.max_epochs=48",
        "trainer.check_val_every_n_epoch=24",
    ),
}
TRAINABLE = ("backbone.freeze_at=0", "backbone.freeze_norms=false")


@dataclass(frozen=True)
class Arm:
    """Where the body's first weights come from, what becomes of them, and on which shares of the data.

    `longer`: times as many steps as the others.
    """

    says: str
    source: str | None = None
    words: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    longer: float = 1.0


ARMS = {
    "scratch": Arm("random weights", fractions=FRACTIONS),
    # Pretraining is time on top: this is what random weights make of all of it (the report has the seconds).
    "scratch_longer": Arm("random weights, 2.5 times as many steps", longer=2.5),
    "shapes": Arm("shapes' classes, all trained", "shapes", TRAINABLE, FRACTIONS),
    "shapes_frozen": Arm("shapes' classes, stem, c2 and norms frozen (the default)", "shapes"),
    "clothing": Arm("clothing's classes, all trained", "clothing", TRAINABLE),
}


@dataclass(frozen=True)
class Study:
    """All runs; a smoke test's are apart from the real ones."""

    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    fractions: tuple[float, ...] = FRACTIONS
    smoke: bool = False

    @property
    def folder(self) -> Path:
        return RUNS / ("pretraining-smoke" if self.smoke else "pretraining")

    def body(self, source: str) -> TrainRun:
        words = ("task=classification", "experiment=small_data_cpu", *SOURCES[source])
        if self.smoke:
            short = ("data.images={train: 60, val: 12, test: 12}", "data.root=data/shapes-smoke")
            words += (*(short if source == "shapes" else ()), "++trainer.limit_train_batches=4")
            words += ("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1")
        return TrainRun(f"body-{source}", words, self.folder, keep_checkpoints=True)

    def run(self, arm: str, fraction: float, seed: int) -> TrainRun:
        """An arm's optimizer steps are as many whatever the share of the data, so that less data are not less
        training; each seed also draws its own images of that share, the same ones in every arm."""
        steps = round(self.steps * ARMS[arm].longer)
        words = [
            "task=detection",
            "experiment=small_data_cpu",
            "augment=flip_vertically",
            "data=coco",
            f"data.root={REAL_DATA}/bccd",
            "data.train=train",
            "data.val=val",
            "data.test=test",
            f"data.fraction={fraction}",
            f"data.split_seed={seed}",
            f"seed={seed}",
            "trainer.max_epochs=-1",
            f"++trainer.max_steps={steps}",
            "trainer.check_val_every_n_epoch=null",
            f"++trainer.val_check_interval={steps // VALIDATIONS}",
            "~callbacks.last",  # a checkpoint an epoch: of a tenth of the images there are fifty epochs
        ]
        body = self.body(source) if (source := ARMS[arm].source) else None
        if body is not None:
            words += [f"backbone.weights={body.path.relative_to(ROOT)}", *ARMS[arm].words]
        return TrainRun(f"{arm}-{fraction:g}-seed{seed}", tuple(words), self.folder, body=body)

    def jobs(self, arms: Iterable[str]) -> list[Job]:
        """The whole data first, seed by seed, so that an early end leaves whole comparisons."""
        arms = list(arms)
        bodies = dict.fromkeys(source for arm in arms if (source := ARMS[arm].source))
        cases = [
            (arm, fraction, seed)
            for fraction in sorted(self.fractions, reverse=True)
            for seed in self.seeds
            for arm in arms
            if fraction in ARMS[arm].fractions
        ]
        return [*map(self.body, bodies), *(self.run(*case) for case in cases)]

    def results(self, arm: str, fraction: float, metric: str = METRIC) -> dict[int, float]:
        """The metric by seed, of the runs that are complete."""
        return {seed: s["results"][metric] for seed, s in self._summaries(arm, fraction).items()}

    def seconds(self, arm: str, fraction: float) -> list[float]:
        """Of the runs that are complete, start-up, validations and test included."""
        return [summary["seconds"] for summary in self._summaries(arm, fraction).values()]

    def _summaries(self, arm: str, fraction: float) -> dict[int, dict[str, Any]]:
        found = {seed: self.run(arm, fraction, seed).summary() for seed in self.seeds}
        return {seed: summary for seed, summary in found.items() if summary}
