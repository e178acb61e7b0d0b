"""What a recipe's header says and what the code derives from it agree."""

import re
import shlex
from functools import cache, reduce
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_cifar import write_cifar

from resnext_backbones import ResNeXt, variants
from tasks.building import HAND_OVER, build, build_body, build_model
from tasks.cli import check_types
from tasks.data.samplers import TrainSampler
from tasks.loggers import read_metrics

FOLDER = ROOT / "configs/experiment"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "small_data_cpu")
PUBLISHED = {"imagenet": 1_281_167, "cifar10": 50_000}  # images that are trained on
COCO = {True: 118_287, False: 117_266}  # with those without objects, and without
RECIPE = re.compile(
    r"lr (?P<lr>[\d.]+), batch (?P<batch>\d+), weight decay (?P<decay>[\d.]+), (?P<epochs>\d+) epochs, "
    r"(?P<steps>\d+) steps, (?:milestones (?P<milestones>[\d ]+)|(?P<cosine>cosine to 0)), "
    r"warm-up (?P<warmup>\d+), (?P<images>\d+) images, (?P<devices>\d+) devices"
)
SOURCES = (
    "arXiv",
    "MODEL_ZOO.md",
    "README.md",
    "pull request",
    "MMDetection",
    "torchvision",
    "docs/results.md",
)


@cache
def header(name):
    """The lines of a header by the word they begin with."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    said = {}
    for line in lines:
        if found := re.match(r"# (Command|Recipe|Hardware|Hours|Expected|Differs): (.+)", line):
            assert found[1] not in said, f"{found[1]} twice"
            said[found[1]] = found[2]
    return said


def words(name):
    command = shlex.split(header(name)["Command"])
    assert command[:3] == ["uv", "run", "train.py"]
    return command[3:]


@cache
def composed(name):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=words(name), return_hydra_config=True)


def derived(name, monkeypatch):
    """The task with one block a stage, its optimizer and its schedule, as on the header's machine."""
    cfg = composed(name).copy()
    cfg.optimizer.fused = False  # which wants memory behind the weights
    numbers = RECIPE.fullmatch(header(name)["Recipe"])
    images, devices = int(numbers["images"]), int(numbers["devices"])
    sampler = TrainSampler(images, cfg.data.batch_size, 0, 0, devices, repeats=cfg.data.get("repeats", 1))
    with torch.device("meta"), monkeypatch.context() as patch:
        patch.setattr(variants, "ResNeXt", lambda depths, *a, **k: ResNeXt([1] * len(depths), *a, **k))
        body = instantiate({k: v for k, v in cfg.backbone.items() if k not in HAND_OVER})
        model = build_model(cfg, body, num_classes=3)
    task = build(
        cfg, "task", model=model, optimizer=build(cfg, "optimizer"), scheduler=build(cfg, "scheduler")
    )
    task.trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batch_size=cfg.data.batch_size, train_batches=lambda n: sampler.batches),
        world_size=devices,
        max_steps=cfg.trainer.get("max_steps", -1),
        callbacks=[],
        **{key: cfg.trainer[key] for key in ("accumulate_grad_batches", "max_epochs", "limit_train_batches")},
    )
    built = task.configure_optimizers()
    return task.recipe, built["optimizer"], built["lr_scheduler"]["scheduler"]


@pytest.mark.parametrize("name", RECIPES)
def test_header_and_derivation_agree(name, monkeypatch):
    said = RECIPE.fullmatch(header(name)["Recipe"])
    recipe, optimizer, scheduler = derived(name, monkeypatch)
    assert recipe.learning_rate == pytest.approx(float(said["lr"]))
    assert recipe.global_batch == int(said["batch"])
    assert recipe.devices == int(said["devices"])
    assert recipe.weight_decay == pytest.approx(float(said["decay"]))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {recipe.weight_decay, 0.0}
    assert recipe.epochs == int(said["epochs"])
    assert recipe.total_steps == int(said["steps"])

    (factor, *_), steps, warmup = scheduler.lr_lambdas, int(said["steps"]), int(said["warmup"])
    assert factor(warmup) == pytest.approx(1.0)
    if warmup:
        assert factor(0) < 0.02
        assert factor(warmup - 1) < 1.0
    if said["cosine"]:
        assert factor(warmup + (steps - warmup) // 2) == pytest.approx(0.5, abs=1e-3)
        assert factor(steps) == pytest.approx(0.0, abs=1e-9)
    else:
        milestones = [int(step) for step in said["milestones"].split()]
        for passed, step in enumerate(milestones):
            assert factor(step - 1) == pytest.approx(0.1**passed)
            assert factor(step) == pytest.approx(0.1 ** (passed + 1))
        assert factor(steps - 1) == pytest.approx(0.1 ** len(milestones))  # no other in between


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_says_what_it_takes_and_what_to_expect(name):
    said = header(name)
    assert {"Command", "Recipe", "Hardware", "Hours", "Expected"} <= set(said)
    assert "estimate" in said["Hours"] or any(source in said["Hours"] for source in SOURCES)
    assert "Not run here." in said["Hours"] or "docs/results.md" in said["Hours"]
    assert any(source in said["Expected"] for source in SOURCES) or said["Expected"].startswith("not known")
    assert f"experiment={name}" in words(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_is_one_that_train_takes(name):
    choices = dict(composed(name).hydra.runtime.choices)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        check_types(composed(name), words(name), choices, "train")
    said = RECIPE.fullmatch(header(name)["Recipe"])
    assert composed(name).trainer.devices == int(said["devices"])


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("small_data")])
def test_it_is_the_published_datasets_size(name):
    source = name.partition("_")[0]
    images = COCO[composed(name).data.keep_negatives] if source == "coco" else PUBLISHED[source]
    assert int(RECIPE.fullmatch(header(name)["Recipe"])["images"]) == images


# What the sources say in numbers of their own; all else above is only one file against another.


@pytest.mark.parametrize(
    ("name", "steps", "milestones"),
    [
        ("coco_faster_rcnn_1x", 90_000, (60_000, 80_000)),  # Detectron2, configs/Base-RCNN-FPN.yaml
        ("coco_mask_rcnn_1x", 90_000, (60_000, 80_000)),
        ("coco_faster_rcnn_3x", 270_000, (210_000, 250_000)),  # faster_rcnn_X_101_32x8d_FPN_3x.yaml
        ("coco_mask_rcnn_3x", 270_000, (210_000, 250_000)),
        ("coco_faster_rcnn_paper", 180_000, (120_000,)),  # arXiv 1611.05431, appendix B
        ("coco_scratch_lsj", 184_375, (163_889, 177_546)),  # mask_rcnn_R_50_FPN_100ep_LSJ.py
        ("imagenet_paper", 500_500, (150_150, 300_300, 450_450)),  # 30, 60 and 90 of 100 epochs
        ("cifar10_resnext29", 117_300, (58_650, 87_975)),  # 150 and 225 of 300 epochs
    ],
)
def test_a_schedule_is_its_sources_in_whole_epochs(name, steps, milestones):
    said = RECIPE.fullmatch(header(name)["Recipe"])
    ours = int(said["steps"])
    assert abs(ours / steps - 1) < 0.025
    shares = [int(step) / ours for step in said["milestones"].split()]
    assert shares == pytest.approx([step / steps for step in milestones], abs=1e-5)


SGD = {"optimizer._target_": "torch.optim.SGD", "optimizer.momentum": 0.9}
LUA = {  # facebookresearch/ResNeXt, train.lua and models/resnext.lua
    **SGD,
    "optimizer.nesterov": True,
    "trainer.gradient_clip_val": None,
    "backbone.weights": None,
    "task.mixup": 0.0,
    "task.cutmix": 0.0,
    "task.label_smoothing": 0.0,
}
MULTISCALE = {"data.image_size": [[640, 672, 704, 736, 768, 800], 1333], "data.crop": None, "data.flip": 0.5}
FPN = {  # Detectron2, configs/Base-RCNN-FPN.yaml and detectron2/config/defaults.py
    **SGD,
    "data.keep_negatives": False,
    "model.fpn_channels": 256,
    "model.anchor_scales": [8],  # 32 pixels at stride 4
    "model.aspect_ratios": [0.5, 1.0, 2.0],
    "model.rpn_batch": 256,
    "model.candidates_train": 2000,
    "model.candidates_test": None,  # as many as proposals
    "model.proposals_train": 1000,
    "model.proposals_test": 1000,
    "model.roi_batch": 512,
    "model.head_channels": 1024,
    "model.score_threshold": 0.05,
    "model.nms_threshold": 0.5,
    "model.detections": 100,
}
SHORT = FPN | MULTISCALE | {"backbone.weights": "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"}
LONG = FPN | MULTISCALE | {"backbone.weights": "ResNeXt101_32X8D_Weights.IMAGENET1K_V2"}
MASKS = {"model.mask_channels": 256}
SETTINGS = {
    "imagenet_paper": {  # datasets/imagenet.lua, datasets/transforms.lua
        **LUA,
        "data.image_size": 224,
        "data.train_image_size": None,
        "data.crop_ratio": 224 / 256,
        "data.crop_scale": [0.08, 1.0],
        "data.interpolation": "bicubic",
        "data.flip": 0.5,
        "data.repeats": 1,
        "data.augment": {
            "colour": {
                "_target_": "torchvision.transforms.v2.ColorJitter",
                "brightness": 0.4,
                "contrast": 0.4,
                "saturation": 0.4,
            }
        },
    },
    "cifar10_resnext29": {  # datasets/cifar10.lua
        **LUA,
        "backbone._target_": "resnext_backbones.resnext29_8x64d",
        "data.padding": 4,
        "data.flip": 0.5,
        "data.augment": {},
    },
    "coco_faster_rcnn_1x": SHORT,
    "coco_mask_rcnn_1x": SHORT | MASKS,
    "coco_faster_rcnn_3x": LONG,
    "coco_mask_rcnn_3x": LONG | MASKS,
    "coco_semantic_fpn": {  # arXiv 1901.02446, §3.1; Detectron2, configs/Misc/semantic_R_50_FPN_1x.yaml
        **SGD,
        **MULTISCALE,
        "data.keep_negatives": True,
        "backbone.weights": "ResNeXt50_32X4D_Weights.IMAGENET1K_V2",
        "model.fpn_channels": 256,
        "model.head_channels": 128,
    },
    "coco_faster_rcnn_paper": {  # arXiv 1611.05431, appendix B; py-faster-rcnn, lib/fast_rcnn/config.py
        **SGD,
        "data.keep_negatives": False,
        "data.image_size": [600, 1000],
        "data.flip": 0.5,
        "backbone.weights": "ResNeXt50_32X4D_Weights.IMAGENET1K_V1",
        "model.anchor_scales": [4, 8, 16, 32],
        "model.aspect_ratios": [0.5, 1.0, 2.0],
        "model.rpn_batch": 256,
        "model.candidates_train": 12000,
        "model.candidates_test": 6000,
        "model.proposals_train": 2000,
        "model.proposals_test": 300,
        "model.roi_batch": 64,
    },
    "coco_scratch_lsj": {  # Detectron2, configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py
        **FPN,
        **MASKS,
        "data.image_size": [1024, 1024],
        "data.jitter": [0.1, 2.0],
        "data.crop": [1024, 1024],
        "data.flip": 0.5,
        "backbone.weights": None,
        "backbone.norm": "group",  # for their SyncBN, as the header says
    },
}
OF_THE_HEADER = {  # which what is derived is compared with, above
    "optimizer.lr",
    "optimizer.weight_decay",
    "task.reference_batch_size",
    "scheduler.warmup",
    "scheduler.milestones",
    "data.batch_size",
    "trainer.max_epochs",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_its_sources(name):
    settings = OmegaConf.to_container(composed(name))
    missing = object()
    for key, published in SETTINGS[name].items():
        assert reduce(lambda at, part: at.get(part, missing), key.split("."), settings) == published, key


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_that_a_recipe_sets_is_left_out_above(name):
    own = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    keys = {f"{group}.{key}" for group, values in own.items() if group != "defaults" for key in values}
    assert keys <= SETTINGS[name].keys() | OF_THE_HEADER


def test_the_modern_recipe_is_torchvisions():
    """The arguments of `references/classification/train.py` in pytorch/vision's pull request 5935."""
    cfg = composed("imagenet_modern")
    assert (cfg.data.batch_size * cfg.trainer.devices, cfg.optimizer.lr) == (8 * 128, 0.5)
    assert (cfg.trainer.max_epochs, cfg.scheduler._target_) == (600, "tasks.schedule.warmup_cosine")
    assert cfg.scheduler.warmup * 600 == pytest.approx(5, abs=1e-4)
    assert (cfg.optimizer.weight_decay, cfg.optimizer.momentum) == (0.00002, 0.9)
    assert (cfg.data.interpolation, cfg.trainer.gradient_clip_val) == ("bilinear", None)
    assert (cfg.task.label_smoothing, cfg.task.mixup, cfg.task.cutmix) == (0.1, 0.2, 1.0)
    assert (cfg.data.train_image_size, cfg.data.image_size, cfg.data.repeats) == (176, 224, 4)
    assert round(cfg.data.image_size / cfg.data.crop_ratio) == 232
    transforms = [instantiate(transform) for transform in cfg.data.augment.values()]
    assert [type(transform).__name__ for transform in transforms] == ["TrivialAugmentWide", "RandomErasing"]
    assert transforms[1].p == 0.1
    every = 32  # --model-ema-steps; its decay is taken to the share of an epoch that these are
    assert cfg.callbacks.ema.every_n_steps == every
    assert cfg.callbacks.ema.decay == pytest.approx(1 - (1 - 0.99998) * 1024 * every / 600, abs=1e-5)


def test_training_of_classifiers_may_see_smaller_images(tmp_path):
    from PIL import Image

    from tasks.data.folder_data import ClassFolderData

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (50, 40)).save(tmp_path / split / name / "1.png")
    data = ClassFolderData(str(tmp_path), image_size=32, train_image_size=24, num_workers=0)
    data.setup("fit")
    sides = [data.prepared(split)[0][0].shape[-1] for split in ("train", "val")]
    assert sides == [24, 32]


TINY = [  # what makes any recipe a matter of seconds; all else is the recipe's
    "backbone=custom",
    "backbone._target_=resnext_backbones.ResNeXt",
    "+backbone.depths=[1,1,1,1]",
    "+backbone.cardinality=32",
    "+backbone.base_width=1",
    "backbone.weights=null",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.pictures.images=1",
    "logger.wandb.mode=disabled",
    "stages=fit",
]
SQUARE = ["data.image_size=[64,64]", "data.batch_size=2"]
SMALLER = {
    "imagenet_paper": ["data.image_size=48", "data.batch_size=8"],
    "imagenet_modern": ["data.image_size=48", "data.train_image_size=32", "data.batch_size=8"],
    "cifar10_resnext29": ["backbone.depths=[1,1,1]", "+backbone.stem=cifar", "data.batch_size=8"],
    "coco_scratch_lsj": [*SQUARE, "data.crop=[64,64]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_it_run(name, start, tiny_shapes, tmp_path):
    """With all of its settings but size, batch, devices and weights, from a handful of images."""
    root = tiny_shapes[0].removeprefix("data.root=")
    kept = [w for w in words(name) if w.startswith(("task=", "experiment=", "data="))]
    if name.startswith("imagenet"):
        data = [f"data.root={root}/classes"]
    elif name.startswith("cifar"):
        write_cifar(tmp_path)
        data = [f"data.root={tmp_path}"]
    else:
        data = [f"data.root={root}", "data.train=train", "data.val=val"]
    folder = start(*kept, *TINY, *SMALLER.get(name, SQUARE), small=[], data=data)
    assert [record["train/loss"] for record in read_metrics(folder) if "train/loss" in record]
    assert (folder / "checkpoints/best.ckpt").is_file()


def test_group_norms_as_the_page_advises_begin_from_random_weights():
    """Where a recipe begins with weights of batch norms."""
    (advised,) = re.findall(r"`(\+backbone\.norm=group.*?)`", (ROOT / "docs/recipes.md").read_text())
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        given = [*words("coco_faster_rcnn_1x"), "backbone=resnet18", *advised.split()]
        cfg = compose("train", overrides=given)
    assert cfg.backbone.weights is None
    body, receipt = build_body(cfg)
    assert receipt is None
    assert not any("BatchNorm" in type(module).__name__ for module in body.modules())
    assert all(parameter.requires_grad for parameter in body.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_recipes_says_what_the_header_says(name):
    page = (ROOT / "docs/recipes.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, _, expected, *_ = (cell.strip() for cell in row.split("|"))
    numbers = re.findall(r"\d+\.\d+", expected)
    assert numbers or "not known" in expected
    assert set(numbers) <= set(re.findall(r"\d+\.\d+", header(name)["Expected"]))
