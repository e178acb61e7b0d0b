"""Configurations are code: each composes, builds, and says what it is for."""

from pathlib import Path

import pytest
import torch
from conftest import mostly_slow
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tasks.building import HAND_OVER

CONFIGS = Path(__file__).parents[1] / "configs"


def options(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=False)


def built(*overrides):
    cfg = composed(*overrides)
    OmegaConf.to_container(cfg, resolve=True)
    points = {"num_keypoints": 5} if cfg.data.target == "keypoints" else {}
    with torch.device("meta"):
        body = instantiate({k: v for k, v in cfg.backbone.items() if k not in HAND_OVER})
        model = instantiate(
            {k: v for k, v in cfg.model.items() if k != "weights"}, body=body, num_classes=3, **points
        )
        return instantiate(
            cfg.task, model=model, optimizer=instantiate(cfg.optimizer), scheduler=instantiate(cfg.scheduler)
        )


@pytest.mark.parametrize(
    "backbone",
    mostly_slow([b for b in options("backbone") if b != "custom"], "resnext26_32x4d", "resnext29_8x64d"),
)
def test_every_backbone_builds(backbone):
    built("task=classification", f"backbone={backbone}")
    if not backbone.startswith("resnext29"):  # CIFAR's have three levels, for small images
        built("task=detection", f"backbone={backbone}")


@pytest.mark.parametrize(
    "backbone", mostly_slow(["resnext50_32x4d", "resnet18", "torchvision", "timm"], "resnet18")
)
@pytest.mark.parametrize("task", options("task"))
def test_every_task_builds(task, backbone):
    assert built(f"task={task}", f"backbone={backbone}").model is not None


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (g, o)
        for g in (
            "data",
            "model",
            "trainer",
            "logger",
            "callbacks",
            "debug",
            "optimizer",
            "scheduler",
            "experiment",
        )
        for o in options(g)
    ],
)
def test_every_option_composes(group, option):
    extra = [] if group == "data" and option == "shapes" else ["data.root=."]
    cfg = composed(f"{group}={option}", *extra, "run_id=x")
    assert OmegaConf.to_container(cfg, resolve=True)["monitor"].startswith("val/")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_file_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    header = [line for line in lines[:3] if line.startswith("# ") and "@package" not in line]
    assert header, f"{path} has no header"


def test_precedence_is_command_line_over_experiment_over_defaults(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndata: {batch_size: 5}\noptimizer: {lr: 0.5}\n"
    )
    search = f"hydra.searchpath=[file://{tmp_path}]"
    defaults = composed()
    assert (defaults.data.batch_size, defaults.trainer.max_epochs) == (4, 3)
    cfg = composed(search, "experiment=mine", "optimizer.lr=0.25", "+data.extra=1")
    assert (cfg.data.batch_size, cfg.optimizer.lr, cfg.data.extra) == (5, 0.25, 1)


def test_the_demo_is_for_the_embedded_data_only():
    assert composed().model.fpn_channels == 64
    cfg = composed("data=coco", "data.root=.")
    assert cfg.model.fpn_channels == 256
    assert cfg.trainer.max_epochs == 12
