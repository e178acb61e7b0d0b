"""Every task on every body and every source of data that fits: two steps of training and validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import pytest
import torch
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from tasks.loggers import read_metrics

BODIES = {
    "resnext": [
        "backbone=custom",
        "backbone._target_=resnext_backbones.ResNeXt",
        "+backbone.depths=[1,1,1,1]",
        "+backbone.cardinality=8",
        "+backbone.base_width=4",
    ],
    "resnet": ["backbone=resnet18"],
    "timm": ["backbone=timm", "backbone.name=resnet10t"],
}
NARROW = ["model.fpn_channels=64"]
RCNN = ["model.proposals_train=20", "model.proposals_test=20", "model.roi_batch=8", "model.head_channels=32"]
C4 = ["model.candidates_train=50", "model.proposals_train=20", "model.roi_batch=8", "model.rpn_channels=32"]
LEARNERS = {  # a task with a model: what to say for it, what its best epoch is chosen by
    "classifier": (["task=classification"], "val/top1"),
    "faster_rcnn": (["task=detection", *NARROW, *RCNN], "val/AP"),
    "retinanet": (["task=detection", "model=retinanet", *NARROW], "val/AP"),
    "fcos": (["task=detection", "model=fcos", *NARROW], "val/AP"),
    "faster_rcnn_c4": (["task=detection", "model=faster_rcnn_c4", *C4], "val/AP"),
    "mask_rcnn": (["task=instance_segmentation", *NARROW, *RCNN], "val/mask_AP"),
    "keypoint_rcnn": (["task=keypoints", *NARROW, *RCNN], "val/keypoint_AP"),
    "semantic_fpn": (["task=semantic_segmentation", *NARROW], "val/mIoU"),
    "deeplabv3": (["task=semantic_segmentation", "model=deeplabv3"], "val/mIoU"),
}
DETECTORS = ["faster_rcnn", "retinanet", "fcos"]
SEMANTIC = ["semantic_fpn", "deeplabv3"]
SOURCES = {
    "shapes": list(LEARNERS),
    "coco": [*DETECTORS, "faster_rcnn_c4", "mask_rcnn", "keypoint_rcnn", *SEMANTIC],
    "class maps": SEMANTIC,
    "one file": [*DETECTORS, "mask_rcnn", "keypoint_rcnn", *SEMANTIC],
    "class_folders": ["classifier"],
    "one class folder": ["classifier"],
    "mask_folders": SEMANTIC,
    "voc": DETECTORS,
    "yolo": [*DETECTORS, "mask_rcnn", *SEMANTIC],
}
ALL = [
    (learner, body, source)
    for source, learners in SOURCES.items()
    for learner in learners
    for body in BODIES
    if not (learner == "deeplabv3" and body == "timm")  # refused: timm's bodies do not dilate
    if not (learner == "faster_rcnn_c4" and body == "timm")  # refused: their c5 does not run on regions alone
]
QUICK = [  # every learner, every body and every source at least once
    ("classifier", "timm", "shapes"),
    ("classifier", "resnext", "class_folders"),
    ("classifier", "resnet", "one class folder"),
    ("faster_rcnn", "resnext", "voc"),
    ("retinanet", "resnet", "yolo"),
    ("fcos", "timm", "coco"),
    ("faster_rcnn_c4", "resnext", "coco"),
    ("mask_rcnn", "resnext", "one file"),
    ("keypoint_rcnn", "resnet", "shapes"),
    ("semantic_fpn", "timm", "class maps"),
    ("deeplabv3", "resnext", "mask_folders"),
]
LITTLE = [word for word in SMALL if not word.startswith(("model.", "backbone=", "data."))]
LITTLE += ["data.num_workers=0", "data.batch_size=4", "data.image_size=[64,64]", "stages=fit"]
LITTLE += ["trainer.limit_train_batches=2", "trainer.limit_val_batches=2", "trainer.max_epochs=1"]


@pytest.fixture(scope="session")
def sources(tiny_shapes: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The tiny shapes in every form, as the words of a command line."""
    root = Path(tiny_shapes[0].removeprefix("data.root="))
    splits = {split: root / f"annotations/instances_{split}.json" for split in ("train", "val")}
    named = ["data.train=train", "data.val=val"]

    return {
        "shapes": tiny_shapes,
        "coco": ["data=coco", f"data.root={root}", *named],
        "class maps": [
            "data=coco",
            f"data.root={root}",
            *(
                f"data.{s}={{annotations: annotations/{file.name}, images: {s}, semantic: semantic/{s}}}"
                for s, file in splits.items()
            ),
        ],
        "one file": [
            "data=coco",
            f"data.root={root}",
            "data.train=train",
            "data.val=null",
            "data.val_fraction=0.3",
        ],
        "class_folders": ["data=class_folders", f"data.root={root}/classes"],
        "one class folder": [
            "data=class_folders",
            f"data.root={root}/classes",
            "data.val=null",
            "data.val_fraction=0.3",
        ],
        "mask_folders": [
            "data=mask_folders",
            f"data.root={root}",
            *(f"data.{s}={{images: {s}, masks: semantic/{s}}}" for s in splits),
        ],
        "voc": ["data=voc", f"data.root={as_voc(splits, tmp_path_factory.mktemp('voc'))}"],
        "yolo": ["data=yolo", f"data.root={as_yolo(splits, tmp_path_factory.mktemp('yolo'))}"],
    }


def as_voc(splits: dict[str, Path], root: Path) -> Path:
    """By hotcoco, with the development kit's folders around it."""
    for split, file in splits.items():
        hotcoco.COCO(file).to_voc(str(root / "part" / split))
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "JPEGImages").mkdir(exist_ok=True)
        names = []
        for xml in sorted((root / "part" / split).rglob("*.xml")):
            name = f"{split}_{xml.stem}"
            text = xml.read_text().replace(f"{xml.stem}.jpg", f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text(text)
            (root / "JPEGImages" / f"{name}.jpg").symlink_to(file.parents[1] / split / f"{xml.stem}.jpg")
            names.append(name)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
    return root


def as_yolo(splits: dict[str, Path], root: Path) -> Path:
    """Outlines in YOLO's form, written here: hotcoco writes boxes only."""
    for split, file in splits.items():
        content = json.loads(file.read_text())
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for image in content["images"]:
            name, side = image["file_name"], image["width"]
            (root / "images" / split / name).symlink_to(file.parents[1] / split / name)
            lines = [
                " ".join([str(a["category_id"] - 1), *(f"{v / side:.6f}" for v in a["segmentation"][0])])
                for a in content["annotations"]
                if a["image_id"] == image["id"] and not a["iscrowd"]
            ]
            (root / "labels" / split / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")
    names = [category["name"] for category in content["categories"]]
    (root / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(names)}\n"
    )
    return root


@pytest.mark.parametrize(
    ("learner", "body", "source"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_two_steps(
    learner: str,
    body: str,
    source: str,
    sources: dict[str, list[str]],
    start: Callable[..., Path],
) -> None:
    words, monitor = LEARNERS[learner]
    more = ["data.follow_symlinks=true"] if source in ("voc", "yolo") else []
    if source in ("class_folders", "one class folder"):
        more.append("data.image_size=64")
    folder = start(*words, *BODIES[body], *more, small=LITTLE, data=sources[source])
    records = read_metrics(folder)
    numbers = {name: value for record in records for name, value in record.items()}
    assert monitor in numbers
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == 2
    assert numbers["val/loss"] > 0
    assert (folder / "checkpoints/best.ckpt").is_file()
    assert (folder / "pictures/val_epoch001.png").is_file()


def test_the_quick_ones_cover_everything() -> None:
    assert {learner for learner, _, _ in QUICK} == set(LEARNERS)
    assert {body for _, body, _ in QUICK} == set(BODIES)
    assert {source for _, _, source in QUICK} == set(SOURCES)
    assert set(QUICK) <= set(ALL)


def outline_box(record: dict[str, Any]) -> list[float]:
    """Of the part that `as_yolo` writes."""
    x, y = record["segmentation"][0][::2], record["segmentation"][0][1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


@pytest.mark.parametrize(("source", "apart"), [("coco", 0.0), ("voc", 0.5), ("yolo", 0.5)])
def test_every_form_holds_the_same_objects(
    source: str, apart: float, sources: dict[str, list[str]], tiny_shapes: list[str]
) -> None:
    """Names and boxes against the file that all of them were made of, by plain JSON."""
    root = Path(tiny_shapes[0].removeprefix("data.root="))
    content = json.loads((root / "annotations/instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    more = [] if source == "coco" else ["data.follow_symlinks=true"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["task=detection", *sources[source], *more])
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    dataset = data.dataset("val")
    assert len(dataset) == len(content["images"])
    for index in range(len(dataset)):
        number = int(Path(dataset.annotations.file_name(index)).stem.rpartition("_")[2])
        wanted = sorted(
            (names[a["category_id"]], *(outline_box(a) if source == "yolo" else map(float, a["bbox"])))
            for a in content["annotations"]
            if a["image_id"] == number and not (source == "yolo" and a["iscrowd"])
        )
        _, target = dataset.load(index)
        corners, sizes = target["boxes"].as_subclass(Tensor).split(2, dim=1)
        boxes = torch.cat([corners, sizes - corners], dim=1).tolist()
        labels = [data.names[label - 1] for label in target["labels"].tolist()]
        found = sorted((label, *box) for label, box in zip(labels, boxes, strict=True))
        assert [name for name, *_ in found] == [name for name, *_ in wanted]
        for (_, *box), (_, *true) in zip(found, wanted, strict=True):
            assert box == pytest.approx(true, abs=apart + 1e-6)
