"""What configurations say for small data: the experiment of that name, and the demonstrations."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from resnext_backbones import resnet18
from tasks.models.rcnn import faster_rcnn, keypoint_rcnn, mask_rcnn

CONFIGS = Path(__file__).parents[1] / "configs"
TASK = {
    "faster_rcnn": "detection",
    "retinanet": "detection",
    "fcos": "detection",
    "faster_rcnn_c4": "detection",
    "mask_rcnn": "instance_segmentation",
    "keypoint_rcnn": "keypoints",
    "semantic_fpn": "semantic_segmentation",
    "deeplabv3": "semantic_segmentation",
    "classifier": "classification",
}


def composed(model, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=[f"task={TASK[model]}", f"model={model}", *overrides])


def test_every_model_is_known_here():
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == set(TASK)


@pytest.mark.parametrize("data", ["shapes", "the user's"])
@pytest.mark.parametrize("model", TASK)
def test_the_experiment_serves_every_model(model, data):
    source = "class_folders" if model == "classifier" else "coco"
    given = [] if data == "shapes" else [f"data={source}", "data.root=."]
    cfg = composed(model, *given, "experiment=small_data_cpu", "backbone=resnet18")
    points = {"num_keypoints": 5} if model == "keypoint_rcnn" else {}
    dilated = {"output_stride": cfg.backbone.output_stride} if model == "deeplabv3" else {}
    with torch.device("meta"):
        instantiate(
            {k: v for k, v in cfg.model.items() if k != "weights"},
            body=resnet18(**dilated),
            num_classes=3,
            **points,
        )
    instantiate(cfg.data)  # refuses a size that does not suit the task
    assert cfg.optimizer._target_ == "torch.optim.AdamW"
    assert cfg.trainer.max_epochs == 28
    assert cfg.task.reference_batch_size == cfg.data.batch_size  # the rate is given for this batch


def test_the_experiment_is_what_was_measured():
    """docs/results.md, blood cells."""
    cfg = composed("faster_rcnn", "data=coco", "data.root=.", "experiment=small_data_cpu")
    changed = {
        "fpn_channels": 128,
        "anchor_scales": [4, 8],
        "rpn_batch": 128,
        "proposals_train": 300,
        "proposals_test": 300,
        "roi_batch": 64,
        "roi_canonical_size": 112,
        "head_channels": 512,
    }
    assert cfg.model == dict(composed("faster_rcnn", "data=coco", "data.root=.").model) | changed
    assert (cfg.data.image_size, cfg.data.batch_size, cfg.optimizer.lr) == ([240, 320], 4, 6e-4)


@pytest.mark.parametrize(
    ("builder", "own"),
    [(faster_rcnn, None), (mask_rcnn, "mask_channels"), (keypoint_rcnn, "keypoint_channels")],
)
def test_the_rcnns_have_the_settings_of_their_builders(builder, own):
    parameters = inspect.signature(faster_rcnn).parameters | inspect.signature(builder).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    settings = dict(composed(builder.__name__, "data=coco", "data.root=.").model)
    assert settings.pop("_target_") == f"tasks.models.rcnn.{builder.__name__}"
    assert settings.pop("weights") is None  # which is train.yaml's
    assert settings.keys() == defaults.keys()
    assert own is None or own in settings
    for name, value in defaults.items():
        assert settings[name] == (list(value) if isinstance(value, tuple) else value), name


@pytest.mark.parametrize("model", TASK)
def test_the_rate_of_a_demonstration_is_given_for_its_batch(model):
    cfg = composed(model)
    assert cfg.task.reference_batch_size == cfg.data.batch_size


def test_the_demonstration_of_a_classifier_sees_small_cutouts():
    assert composed("classifier").data.image_size == [64, 64]
