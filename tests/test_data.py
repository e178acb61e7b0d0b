"""The datamodules: which images a split has, what is refused, and what reaches sampler and loader."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco, image
from omegaconf import OmegaConf
from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.data import coco_data
from tasks.data.coco import read_coco
from tasks.data.coco_data import CocoData
from tasks.data.converted_data import VocData, YoloData
from tasks.data.folder_data import ClassFolderData, MaskFolderData
from tasks.data.module import ImageData
from tasks.data.shapes_data import shapes_data
from tasks.metrics.coco import CocoAP

NUMBER = 20


def coco_root(root: Path, **documents: Any) -> Path:
    """COCO's layout: `annotations/instances_{split}.json` and `{split}/`."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, document in documents.items():
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))
        (root / split).mkdir(exist_ok=True)
        for record in document["images"]:
            grey = Image.new("RGB", (record["width"], record["height"]), (90, 90, 90))
            grey.save(root / split / record["file_name"])
    return root


def many(number: int = NUMBER, first: int = 1, **more: Any) -> dict[str, Any]:
    """Images of one object each, every third upright; their ids count in sevens."""
    ids = range(7 * first, 7 * (first + number), 7)
    images = [image(k) | ({"height": 60, "width": 40} if k % 3 == 0 else {}) for k in ids]
    return coco([annotation(k, image_id=k) for k in ids], images) | more


def one_file(root: Path, **settings: Any) -> CocoData:
    coco_root(root, all=many())
    return CocoData(str(root), "all", None, num_workers=0, **{"val_fraction": 0.3, **settings})


def class_root(root: Path, **counts: Mapping[str, int]) -> Path:
    """`{split}/{class}/…` with so many images each."""
    for split, classes in counts.items():
        for name, number in classes.items():
            (root / split / name).mkdir(parents=True)
            for k in range(number):
                Image.new("RGB", (24, 16), (k, 0, 0)).save(root / split / name / f"{k}.png")
    return root


def mask_root(root: Path, **counts: int) -> Path:
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("ground\nthing\n")
    for split, number in counts.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
            for k in range(number):
                Image.new("RGB" if kind == "images" else "L", (24, 16)).save(root / kind / split / f"{k}.png")
    return root


def on_device(data: ImageData, rank: int = 0, world_size: int = 1) -> ImageData:
    """As if a trainer had taken it."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


# A share held out.


def coco_share(root: Path, **settings: Any) -> tuple[CocoData, Callable[[str], list[int]]]:
    data = one_file(root, **settings)
    return data, data.image_ids


def folder_share(root: Path, **settings: Any) -> tuple[ImageData, Callable[[str], list[str]]]:
    if not root.exists():
        class_root(root, train={"a": 12, "b": 8})
    data = ClassFolderData(str(root), val=None, num_workers=0, **{"val_fraction": 0.3, **settings})
    return data, lambda s: [data.annotations(s).file_name(k) for k in range(len(data.annotations(s)))]


def mask_share(root: Path, **settings: Any) -> tuple[ImageData, Callable[[str], list[str]]]:
    if not root.exists():
        mask_root(root, train=NUMBER)
    data = MaskFolderData(str(root), val=None, num_workers=0, **{"val_fraction": 0.3, **settings})
    return data, lambda s: [data.annotations(s).file_name(k) for k in range(len(data.annotations(s)))]


every_source = pytest.mark.parametrize("source", [coco_share, folder_share, mask_share])


@every_source
def test_a_share_is_held_out(tmp_path: Path, source: Any) -> None:
    data, images = source(tmp_path / "data")
    data.setup("fit")
    train, val = images("train"), images("val")
    assert len(train) == 14
    assert len(val) == 6
    assert len(set(train) | set(val)) == NUMBER
    assert images("test") == val
    assert data.test_is_val
    assert len(data.dataset("train")) == 14
    assert len(data.dataset("val")) == len(data.dataset("test")) == 6
    assert len(data.image_ids("val")) == 6


@every_source
def test_the_share_depends_on_the_seed_alone(tmp_path: Path, source: Any) -> None:
    root = tmp_path / "data"
    first, again, other = (source(root, split_seed=seed)[1]("val") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    smaller = source(root, fraction=0.5)  # of what is trained on
    assert smaller[1]("val") == first
    assert set(smaller[1]("train")) < set(source(root)[1]("train"))


@every_source
def test_fractions_of_the_training_images_are_nested(tmp_path: Path, source: Any) -> None:
    root = tmp_path / "data"
    parts = {f: source(root, fraction=f)[1]("train") for f in (0.2, 0.5, 1.0)}
    assert set(parts[0.2]) < set(parts[0.5]) < set(parts[1.0])
    assert [len(part) for part in parts.values()] == [3, 7, 14]


def test_each_class_gives_its_share(tmp_path: Path) -> None:
    data, _ = folder_share(tmp_path / "data", val_fraction=0.25)
    assert data.annotations("val").counts().tolist() == [3, 2]
    assert data.annotations("train").counts().tolist() == [9, 6]


@every_source
@pytest.mark.parametrize("share", [None, 0, 1, 1.5, -0.1])
def test_without_val_a_share_is_needed(tmp_path: Path, source: Any, share: Any) -> None:
    with pytest.raises(UsageError, match=r"data\.val is not given.*data\.val_fraction=0\.2"):
        source(tmp_path / "data", val_fraction=share)


def test_a_share_of_one_image_is_refused(tmp_path: Path) -> None:
    coco_root(tmp_path, all=many(1))
    data = CocoData(str(tmp_path), "all", None, val_fraction=0.5, num_workers=0)
    with pytest.raises(UsageError, match=r"data\.val_fraction=0\.5"):
        data.setup("fit")


@every_source
def test_a_share_beside_a_val_is_refused(tmp_path: Path, source: Any) -> None:
    """It would be ignored."""
    data, _ = source(tmp_path / "data")
    with pytest.raises(UsageError, match=r"data\.val=val.*data\.val_fraction=0\.2"):
        type(data)(str(tmp_path / "data"), val="val", val_fraction=0.2)


def test_a_named_test_split_stays_whole(tmp_path: Path) -> None:
    coco_root(tmp_path, rest=many(4, first=100))
    data = one_file(tmp_path, test="rest")
    assert data.image_ids("test") == [700, 707, 714, 721]
    assert not data.test_is_val


def test_the_metric_judges_exactly_what_is_held_out(tmp_path: Path) -> None:
    data = one_file(tmp_path)
    metric = CocoAP(data.annotation_file("val"), image_ids=data.image_ids("val"))
    found = {
        "boxes": torch.tensor([[10.0, 10, 30, 20]]),
        "scores": torch.ones(1),
        "labels": torch.ones(1).long(),
    }
    for image_id in data.image_ids("val"):
        metric.update([image_id], [found])
    assert metric.compute()["AP"] == pytest.approx(1)
    metric.update(data.image_ids("train")[:1], [found])
    with pytest.raises(RuntimeError, match="are not to be judged"):
        metric.compute()


# COCO files.


def test_one_file_of_two_splits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(coco_data, "read_coco", lambda *a, **k: read.append(a[0]) or read_coco(*a, **k))
    one_file(tmp_path / "one").setup("fit")
    assert len(read) == 1
    read.clear()
    coco_root(tmp_path / "two", train=many(), val=many(5))
    data = CocoData(str(tmp_path / "two"), "train", "val", num_workers=0)
    data.setup("fit")
    data.report()
    assert [path.name for path in read] == ["instances_train.json", "instances_val.json"]


def test_names_and_mappings_say_where_a_split_is(tmp_path: Path) -> None:
    root = coco_root(tmp_path / "data", train=many(), val=many(5))
    where = {"annotations": "annotations/instances_val.json", "images": str(root / "val")}
    by_name = CocoData(str(root), "train", "val", num_workers=0)
    by_path = CocoData(str(root), "train", OmegaConf.create(where), num_workers=0)
    assert by_name.paths("val") == by_path.paths("val")
    by_path.setup("fit")
    assert by_path.image_ids("val") == by_name.image_ids("val")
    for wrong in ({"annotations": "a.json"}, {**where, "masks": "b"}, {}):
        with pytest.raises(UsageError, match=r"data\.train=.*give a split's name, or both paths"):
            CocoData(str(root), wrong, "val", num_workers=0).setup("fit")


def test_people_s_keypoints_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    posed = [{"id": 1, "name": "person", "keypoints": ["left", "right"], "sigmas": [0.1, 0.1]}]
    root = coco_root(tmp_path, train=many(categories=posed), val=many(5, categories=posed))
    people = root / "annotations/person_keypoints_train.json"
    people.write_text(json.dumps(many(3, categories=posed)))
    shutil.copytree(root / "train", root / "val", dirs_exist_ok=True)
    data = {t: CocoData(str(root), "train", "val", target=t, num_workers=0) for t in ("keypoints", "boxes")}
    assert data["keypoints"].annotation_file("train") == people
    assert data["keypoints"].annotation_file("val") == root / "annotations/instances_val.json"
    assert data["boxes"].annotation_file("train") == root / "annotations/instances_train.json"
    data["keypoints"].setup("fit")
    assert len(data["keypoints"].dataset("train")) == 3
    assert data["keypoints"].model_arguments == {"num_classes": 1, "num_keypoints": 2}
    assert data["keypoints"].skeleton.mirror == (1, 0)
    assert data["boxes"].skeleton is None
    assert data["boxes"].model_arguments == {"num_classes": 1}


def test_the_configuration_describes_keypoints(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))
    said = OmegaConf.create(
        {"names": ["a", "b"], "skeleton": [[1, 2]], "flip_pairs": None, "sigmas": [0.1, 0.2]}
    )
    data = CocoData(str(root), "train", "val", target="keypoints", keypoints=said, num_workers=0)
    assert data.skeleton is not None
    assert data.skeleton.names == ("a", "b")
    assert data.skeleton.edges == ((0, 1),)
    assert data.skeleton.sigmas == (0.1, 0.2)
    wrong = OmegaConf.create({"names": ["a", "b"], "sigmas": [0.1], "skeleton": [[1, 3]]})
    with pytest.raises(UsageError, match=r"data\.keypoints\.sigmas=\[0\.1\]: 2 numbers"):
        CocoData(str(root), "train", "val", target="keypoints", keypoints=wrong, num_workers=0).setup("fit")


@pytest.mark.parametrize(
    ("categories", "named"),
    [
        ([{"id": 2, "name": "dog"}, {"id": 1, "name": "thing"}], "(2, 'dog')"),  # one more
        ([{"id": 1, "name": "cat"}], "(1, 'cat'), (1, 'thing')"),  # another name
        ([{"id": 5, "name": "thing"}], "(1, 'thing'), (5, 'thing')"),  # another id
    ],
)
def test_splits_of_other_classes_are_refused(tmp_path: Path, categories: Any, named: str) -> None:
    other = many(5) | {"categories": categories}
    for record in other["annotations"]:
        record["category_id"] = categories[0]["id"]
    root = coco_root(tmp_path, train=many(), val=many(5), odd=other)
    for splits in ({"val": "odd"}, {"val": "val", "test": "odd"}):
        with pytest.raises(UsageError) as caught:
            CocoData(str(root), "train", num_workers=0, **splits).setup("fit")
        message = str(caught.value)
        assert message.startswith(f"{root}/annotations/instances_odd.json: its categories differ")
        assert named in message
        assert "\n" not in message


def test_splits_of_other_keypoints_are_refused(tmp_path: Path) -> None:
    """As many, in another order: each would be judged by another one's place."""
    mine, theirs = (
        many(categories=[{"id": 1, "name": "x", "keypoints": names, "sigmas": [0.1, 0.1]}])
        for names in (["head", "tail"], ["tail", "head"])
    )
    root = coco_root(tmp_path, train=mine, val=theirs)
    CocoData(str(root), "train", "val", target="boxes", num_workers=0).setup("fit")
    with pytest.raises(UsageError, match=r"instances_val\.json: its categories differ.*tail.*head"):
        CocoData(str(root), "train", "val", target="keypoints", num_workers=0).setup("fit")


def test_what_cleaning_drops_is_named_of_a_part_too(tmp_path: Path) -> None:
    document = many()
    for record in document["annotations"]:
        record["bbox"] = [10, 10, 0, 10] if record["id"] % 5 == 0 else record["bbox"]  # 4 of 20
    root = coco_root(tmp_path, train=document, val=many(5))
    for fraction in (1.0, 0.9):
        data = CocoData(str(root), "train", "val", fraction=fraction, num_workers=0)
        dropped = [f for f in data.annotations("train").faults if f.action == "dropped"]
        left = len(data.annotations("train").ids)
        assert sum(f.count for f in dropped) == round(NUMBER * fraction) - left > 0
        assert "dropped" in data.report()


# Class folders and mask folders.


def test_labels_keep_the_order_of_the_training_classes(tmp_path: Path) -> None:
    """Also where val lacks a class, which is named; `ImageFolder` alone would count anew."""
    root = class_root(tmp_path, train={"cat": 3, "ant": 3, "bee": 3}, val={"cat": 2, "bee": 1})
    data = ClassFolderData(str(root), num_workers=0)
    data.setup("fit")
    assert data.names == ["ant", "bee", "cat"]
    assert data.categories == [{"id": k, "name": n} for k, n in enumerate(data.names)]
    assert data.annotations("val").labels.tolist() == [1, 2, 2]
    assert "without an image" in data.report()
    assert "ant" in data.report().partition("without an image")[2]


def test_the_order_of_classes_can_be_given(tmp_path: Path) -> None:
    root = class_root(tmp_path, train={"cat": 3, "ant": 2}, val={"cat": 1, "ant": 1})
    data = ClassFolderData(str(root), classes=["cat", "ant"], num_workers=0)
    assert data.names == ["cat", "ant"]
    assert data.annotations("train").counts().tolist() == [3, 2]
    assert data.annotations("val").labels.tolist() == [0, 1]


def test_classes_that_are_not_trained_on_are_refused(tmp_path: Path) -> None:
    root = class_root(tmp_path, train={"cat": 3, "ant": 2}, val={"cat": 1, "dog": 1})
    with pytest.raises(UsageError, match="dog"):
        ClassFolderData(str(root), num_workers=0).setup("fit")


def test_masks_of_val_have_the_names_of_train(tmp_path: Path) -> None:
    data = MaskFolderData(str(mask_root(tmp_path, train=3, val=2)), num_workers=0)
    data.setup("fit")
    assert data.names == ["ground", "thing"]
    assert data.annotations("val").names == ["ground", "thing"]
    assert list(data.image_ids("val")) == [0, 1]


@pytest.mark.parametrize("size", [32, [32, 32], [32]])
def test_a_classifier_sees_a_square(tmp_path: Path, size: Any) -> None:
    root = class_root(tmp_path, train={"a": 4, "b": 4}, val={"a": 1, "b": 1})
    data = on_device(ClassFolderData(str(root), image_size=size, batch_size=4, num_workers=0))
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 32, 32)
    with pytest.raises(UsageError, match="a square; give one number"):
        ClassFolderData(str(root), image_size=[32, 64])
    with pytest.raises(UsageError, match=r"data\.image_size=\[\[32, 40\], 64\]: .* give one number"):
        ClassFolderData(str(root), image_size=[[32, 40], 64])  # as experiments for detectors have it


# Fingerprints.


def test_another_annotation_file_is_noticed(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))

    def prints() -> list[str]:
        data = CocoData(str(root), "train", "val", num_workers=0)
        return list(data.state_dict().values())

    before = prints()
    assert before == prints()
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace("20", "21", 1))
    after = prints()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_file_that_changes_while_a_run_goes_on_is_not_taken_for_the_one_it_read(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))
    data = CocoData(str(root), "train", "val", num_workers=0)
    data.setup("fit")
    before = data.state_dict()
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace("20", "21", 1))
    assert data.state_dict() == before


def test_other_files_in_folders_are_noticed(tmp_path: Path) -> None:
    root = class_root(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1})
    folder = root / "train"
    seen = set()

    def fresh() -> bool:
        found = ClassFolderData(str(root), num_workers=0).fingerprint("train")
        new = found not in seen
        seen.add(found)
        return new

    assert fresh()
    assert not fresh()
    shutil.copy(folder / "a/0.png", folder / "a/new.png")
    assert fresh()
    (folder / "a/new.png").rename(folder / "a/renamed.png")
    assert fresh()
    (folder / "a/renamed.png").rename(folder / "b/renamed.png")
    assert fresh()
    (folder / "b/renamed.png").unlink()
    assert not fresh()  # as it was
    (folder / "b").rename(folder / "c")
    shutil.rmtree(root / "val/b")
    assert fresh()


def test_other_masks_are_noticed(tmp_path: Path) -> None:
    root = mask_root(tmp_path, train=3, val=2)
    before = MaskFolderData(str(root), num_workers=0).state_dict()
    assert before == MaskFolderData(str(root), num_workers=0).state_dict()
    (root / "classes.txt").write_text("ground\nother\n")
    assert MaskFolderData(str(root), num_workers=0).fingerprint("val") != before["val"]
    (root / "classes.txt").write_text("ground\nthing\n")
    for kind in ("images", "masks"):
        (root / kind / "train/0.png").rename(root / kind / "train/9.png")
    after = MaskFolderData(str(root), num_workers=0).state_dict()
    assert after["train"] != before["train"]
    assert after["val"] == before["val"]


def test_resuming_with_other_data_is_refused_and_judging_is_not(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))
    state = CocoData(str(root), "train", "val", num_workers=0).state_dict()
    file = root / "annotations/instances_val.json"
    file.write_text(file.read_text() + "\n")
    data = CocoData(str(root), "train", "val", num_workers=0)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    data.load_state_dict(state)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with pytest.raises(UsageError, match=r"instances_val\.json has changed since the run began"):
        data.load_state_dict(state)


# What is refused.


@pytest.mark.parametrize(
    ("source", "target", "tasks"),
    [
        (ClassFolderData, "boxes", "choose task=classification, or another data"),
        (MaskFolderData, "label", "choose task=semantic_segmentation, or another data"),
        (VocData, "masks", "choose task=detection, or another data"),
        (VocData, "keypoints", "choose task=detection, or another data"),
        (YoloData, "keypoints", "task=detection or task=instance_segmentation or task=semantic_segmentation"),
        (CocoData, "label", "task=keypoints or task=semantic_segmentation"),
        (CocoData, "panoptic", "CocoData is read for boxes, masks, keypoints, semantic"),
    ],
)
def test_a_target_that_a_source_has_not_names_the_tasks_it_is_for(
    source: Any, target: str, tasks: str
) -> None:
    with pytest.raises(UsageError) as caught:
        source("nowhere", target=target)
    assert str(caught.value).startswith(f"data.target={target}: ")
    assert tasks in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"batch_size": 2.5}, "data.batch_size=2.5"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"fraction": 0}, "data.fraction=0"),
        ({"fraction": 1.5}, "data.fraction=1.5"),
        ({"fraction": float("nan")}, "data.fraction=nan"),
        ({"image_size": [640]}, "data.image_size=[640]: two numbers"),
        ({"jitter": [1, 2, 3]}, "data.jitter=[1, 2, 3]: two numbers"),
        ({"crop": [64]}, "data.crop=[64]: two numbers"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        CocoData("nowhere", **settings)
    assert expected in str(caught.value)


# Sampler and loader.


def test_batches_are_upright_or_lying(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))
    data = on_device(CocoData(str(root), "train", "val", batch_size=3, image_size=[32, 64], num_workers=0))
    upright = {k for k in data.image_ids("train") if k % 3 == 0}
    assert len(upright) == 6
    kinds = []
    for batch in data.train_dataloader():
        assert len(batch.image_ids) == 3
        kinds.append({int(k) in upright for k in batch.image_ids})
    assert kinds.count({True}) == 2
    assert kinds.count({False}) == 5  # 14 images, filled up
    assert len(kinds) == data.train_batches(1) == 7
    mixed = on_device(CocoData(str(root), "train", "val", batch_size=3, group_by_aspect=False, num_workers=0))
    assert mixed.train_batches(1) == 7  # 20 images, filled up
    assert len(mixed.train_sampler(0, 1).kinds) == 1
    assert mixed.train_batches(2) == 4


def test_rare_classes_are_shown_more_often(tmp_path: Path) -> None:
    """LVIS: a class on a share f of the images has the factor sqrt(t / f); here sqrt(0.2 / 0.05) = 2."""
    document = many() | {"categories": [{"id": 1, "name": "often"}, {"id": 2, "name": "rare"}]}
    document["annotations"][4]["category_id"] = 2
    root = coco_root(tmp_path, train=document, val=document)
    settings = {"batch_size": 1, "group_by_aspect": False, "num_workers": 0}
    data = CocoData(str(root), "train", "val", repeat_threshold=0.2, **settings)
    shown = [index for _, _, index in data.train_sampler(0, 1)]
    assert np.bincount(shown).tolist() == [1] * 4 + [2] + [1] * 15
    assert data.train_batches(1) == 21
    assert CocoData(str(root), "train", "val", **settings).train_batches(1) == 20


def test_several_short_sides_are_drawn_in_training_and_the_longest_judged(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many(5))
    sizes = OmegaConf.create([[20, 30, 40], 90])
    data = on_device(CocoData(str(root), "train", "val", batch_size=1, image_size=sizes, num_workers=0))
    short = [int(batch.sizes.min()) for batch in data.train_dataloader()]
    assert set(short) == {20, 30, 40}
    assert {int(batch.sizes.min()) for batch in data.val_dataloader()} == {40}
    assert {int(batch.sizes.max()) for batch in data.val_dataloader()} == {60}


def test_evaluation_sees_each_image_once_on_all_processes(tmp_path: Path) -> None:
    data = one_file(tmp_path, batch_size=4, image_size=[32, 64])
    seen = []
    for rank in range(3):
        for batch in on_device(data, rank, 3).val_dataloader():
            assert len(batch.image_ids) <= 4
            assert "iscrowd" in batch.targets[0]
            seen += batch.image_ids.tolist()
    assert sorted(seen) == sorted(data.image_ids("val"))


def test_copies_of_an_image_share_a_batch(tmp_path: Path) -> None:
    root = class_root(tmp_path, train={"a": 8, "b": 8}, val={"a": 1, "b": 1})
    data = on_device(ClassFolderData(str(root), repeats=2, batch_size=4, image_size=16, num_workers=0))
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert sorted(np.unique(batch.image_ids, return_counts=True)[1].tolist()) == [2, 2]


def test_the_embedded_data_is_what_the_task_wants(tiny_shapes: list[str]) -> None:
    root = tiny_shapes[0].partition("=")[2]
    images = {"train": 16, "val": 6, "test": 5}
    for target, names in (("label", 6), ("boxes", 6), ("keypoints", 6), ("semantic", 7)):
        data = shapes_data(root, images, target, train="train", val="val", test="test", num_workers=0)
        data.prepare_data()
        data.setup("fit")
        assert data.target == target
        assert len(data.names) == names
        assert target == "label" or len(data.image_ids("test")) == 5


def listed_twice() -> dict[str, Any]:
    """Twenty pictures, each under two image ids."""
    images = [image(k, f"{k % 20}.png") for k in range(40)]
    return coco([annotation(k + 1, image_id=k) for k in range(40)], images)


def test_a_picture_that_is_listed_twice_is_on_one_side_only(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=listed_twice())
    data = CocoData(str(root), "train", None, val_fraction=0.25)
    sides = [
        {data.annotations(split).file_name(k) for k in range(len(data.annotations(split)))}
        for split in ("train", "val")
    ]
    assert [len(side) for side in sides] == [15, 5]
    assert not sides[0] & sides[1]


def test_the_run_s_seed_does_not_choose_the_images_that_are_judged(tmp_path: Path) -> None:
    seeds = ((0, 0), (1, 0), (0, 1))
    judged = [one_file(tmp_path, seed=s, split_seed=t).image_ids("val") for s, t in seeds]
    assert judged[0] == judged[1] != judged[2]


def test_negatives_may_be_left_out_of_training(tmp_path: Path) -> None:
    document = coco([annotation(1, image_id=1)], [image(1), image(2)])
    root = coco_root(tmp_path, train=document, val=document)
    assert len(CocoData(str(root), "train", "val").annotations("train")) == 2
    data = CocoData(str(root), "train", "val", keep_negatives=False)
    assert data.image_ids("train") == [1]
    assert data.image_ids("val") == [1, 2]
    assert "left out 1 image: image without what is learned (id 2)" in data.report()


def test_people_without_a_labelled_keypoint_are_no_examples_of_keypoints(tmp_path: Path) -> None:
    points = {"keypoints": ["nose"], "sigmas": [0.1]}
    document = coco(
        [annotation(1, image_id=1, keypoints=[5, 5, 2]), annotation(2, image_id=2, keypoints=[0, 0, 0])],
        [image(1), image(2)],
        [{"id": 1, "name": "person"} | points],
    )
    root = coco_root(tmp_path, train=document, val=document)
    data = CocoData(str(root), "train", "val", target="keypoints", keep_negatives=False)
    assert data.image_ids("train") == [1]


def test_faults_of_the_file_do_not_weigh_more_on_a_part_of_it(tmp_path: Path) -> None:
    """Eight of a thousand annotations name no image: less than a percent, whatever share is trained on."""
    document = many(1000)
    document["annotations"] += [annotation(10**6 + k, image_id=10**6) for k in range(8)]
    root = coco_root(tmp_path, train=document, val=many(2))
    assert len(CocoData(str(root), "train", "val", fraction=0.1).annotations("train")) == 100


def test_boxes_alone_make_no_class_maps(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(), val=many())
    with pytest.raises(UsageError, match=r"100\.0%.*without a segmentation.*data\.max_drop_fraction"):
        CocoData(str(root), "train", "val", target="semantic").setup("fit")


def test_class_maps_that_are_not_there_are_missed_at_the_start(tmp_path: Path) -> None:
    root = coco_root(tmp_path, train=many(3))
    where = {"annotations": "annotations/instances_train.json", "images": "train", "semantic": "maps"}
    data = CocoData(str(root), where, where, target="semantic")
    (root / "maps").mkdir()
    with pytest.raises(UsageError, match=r"maps.*\.png"):
        data.setup("fit")


def test_only_boxes_lost_at_every_scale_are_called_lost(tmp_path: Path) -> None:
    document = coco([annotation(1, bbox=(5, 5, 2, 2))])
    root = coco_root(tmp_path, train=document, val=document)
    settings = {"image_size": (HEIGHT, WIDTH), "jitter": (0.1, 2.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoData(str(root), "train", "val", **settings).prepared("train")
    with pytest.warns(UserWarning, match="1 boxes have a side of less than 1 pixel"):
        CocoData(str(root), "train", "val", image_size=(4, 6)).prepared("train")
