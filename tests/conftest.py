"""Fixtures every test may use."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

from resnext_backbones import ResNeXt, variants

torch.set_num_threads(1)  # small tensors: threads would only get into each other's way

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT / "../shared/data")).resolve()


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases of a parametrised test, all but the `quick` ones marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets and published vectors; the test is skipped where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data: {REAL_DATA} does not exist (set REAL_DATA)")
    return REAL_DATA


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line's words for a handful of the embedded dataset's images."""
    from tasks.data.shapes import write_shapes

    images = {"train": 16, "val": 6, "test": 5}
    root = write_shapes(tmp_path_factory.mktemp("data") / "shapes", **images)
    return [f"data.root={root}", "data.images={train: 16, val: 6, test: 5}"]


SMALL = [  # a detector that trains a step in a fraction of a second
    "backbone=resnet18",
    "model.fpn_channels=16",
    "model.head_channels=32",
    "model.roi_batch=16",
    "model.proposals_train=50",
    "model.proposals_test=50",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.image_size=[64,64]",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures.images=2",
    "logger.wandb.mode=disabled",
]


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ResNeXt]:
    """Builds a published network with one block a stage: its widths and options in a fraction of the time."""

    def build(name: str, **kwargs: Any) -> ResNeXt:
        with monkeypatch.context() as patch:
            patch.setattr(variants, "ResNeXt", lambda depths, *a, **k: ResNeXt([1] * len(depths), *a, **k))
            return variants.VARIANTS[name].build(**kwargs)

    return build


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def start(tiny_shapes: list[str], runs: Path) -> Callable[..., Path]:
    """Runs `train.py` in this process on the tiny shapes with a small detector; returns the run's folder."""
    from hydra import compose, initialize_config_dir

    from tasks.run import run

    def start(*overrides: str, data: Sequence[str] = tiny_shapes, small: Sequence[str] = SMALL) -> Path:
        words = [*small, *data, f"runs_dir={runs}", *overrides]
        if any(word.startswith("resume=") for word in overrides):
            words = list(overrides)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=words, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg.hydra
        return run(cfg, words, choices)

    return start
