"""Checkpoints of small networks of every task, made by the code that training uses, and that task itself."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from resnext_backbones import ResNeXt, save_weights
from tasks.base import BaseTask
from tasks.building import build, build_task
from tasks.checkpoint import AtomicCheckpointIO

BODY = [
    "backbone=custom",
    "backbone._target_=resnext_backbones.ResNeXt",
    "+backbone.depths=[1,1,1,1]",
    "+backbone.base_width=16",
]
FEW = ["data.num_workers=0", "data.image_size=[64,64]", "run_id=x"]
EVERY = ["model.fpn_channels=16", "model.score_threshold=0"]
RCNN = [*EVERY, "model.head_channels=32", "model.proposals_test=50"]
KINDS = {
    "boxes": ["task=detection", *RCNN, "model.detections=20"],
    "masks": ["task=instance_segmentation", *RCNN, "model.detections=5", "model.mask_channels=16"],
    "keypoints": ["task=keypoints", *RCNN, "model.detections=5", "model.keypoint_channels=16"],
    "one_stage": ["task=detection", "model=retinanet", "model.fpn_channels=64", "model.score_threshold=0"],
    "semantic": ["task=semantic_segmentation", "model.fpn_channels=32", "model.head_channels=64"],
    "classes": ["task=classification", "+data.crop_ratio=1.0", "+data.interpolation=bicubic"],
    "frozen": ["task=detection", *RCNN, "model.detections=20"],
}


class Made(NamedTuple):
    """folder: like a run's, with a checkpoint. task: what stands in it. data: which it was made for."""

    folder: Path
    task: BaseTask
    data: object


_made: dict[str, Made] = {}
_home = TemporaryDirectory(prefix="small-checkpoints-")  # of no single test, which would take it along


def made(kind: str, shapes: list[str]) -> Made:
    """One for each kind and session; `frozen` began with weights that are no longer there."""
    if kind not in _made:
        parent = Path(_home.name)
        folder = parent / kind
        words = [*BODY, *KINDS[kind], *shapes, "trainer.accelerator=cpu", "trainer.precision=32-true"]
        weights = parent / "weights.safetensors"
        torch.manual_seed(0)
        if kind == "frozen":
            save_weights(ResNeXt([1, 1, 1, 1], base_width=16), weights)
            words.append(f"backbone.weights={weights}")
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=[*words, *FEW])
        OmegaConf.set_struct(cfg, False)
        data = build(cfg, "data", seed=0)
        data.prepare_data()
        data.setup("fit")
        task, _ = build_task(cfg, data)
        weights.unlink(missing_ok=True)
        checkpoint = {"state_dict": task.state_dict(), "record": task.record}
        (folder / "checkpoints").mkdir(parents=True)
        AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints/last.ckpt")
        _made[kind] = Made(folder, task.eval(), data)
    return _made[kind]


def changed(kind: Path, folder: Path, **record: object) -> Path:
    """A copy of a run's checkpoint with other entries in its record."""
    checkpoint = torch.load(kind / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["record"] |= record
    path = folder / "changed.ckpt"
    torch.save(checkpoint, path)
    return path
