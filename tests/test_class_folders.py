"""Folders of classes: which files are found, which label each gets, and what is refused."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from resnext_backbones.errors import UsageError
from tasks.data import images
from tasks.data.check import check_dataset, start_report
from tasks.data.class_folders import ClassFolders, read_class_folders
from tasks.data.class_transforms import PreparedClasses
from tasks.data.folder_data import ClassFolderData
from tasks.data.folder_images import ClassImages

HEIGHT, WIDTH = 24, 40


def put(root: Path, *files: str) -> Path:
    """Writes small images, or anything where the name is not that of one."""
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(path)
        else:
            path.write_bytes(b"")
    return root


def found(folders: ClassFolders) -> dict[str, str]:
    """The class of each file."""
    return {folders.file_name(i): folders.classes[k] for i, k in enumerate(folders.labels.tolist())}


# Class folders.


def test_files_and_labels_are_those_of_torchvision(real_data: Path) -> None:
    for split in ("train", "val"):
        peer = ImageFolder(str(real_data / "clothing" / split))
        folders = read_class_folders(real_data / "clothing", split)
        assert folders.classes == folders.names == peer.classes
        mine = {str(folders.image_path(i)): int(folders.labels[i]) for i in range(len(folders))}
        assert mine == dict(peer.samples)
        assert folders.labels.dtype == torch.int64
        assert not folders.faults


def test_folders_within_a_class_count_and_all_endings_do(tmp_path: Path) -> None:
    put(tmp_path, "train/b/x/y/1.JPEG", "train/b/2.Jpg", "train/a/x/1.png")
    folders = read_class_folders(tmp_path, "train")
    assert found(folders) == {"a/x/1.png": "a", "b/2.Jpg": "b", "b/x/y/1.JPEG": "b"}
    assert folders.counts().tolist() == [1, 2]
    assert start_report({"train": folders}) == "train: 3 images of 2 of 2 classes"


def test_what_is_no_image_is_counted_and_named_and_hidden_files_are_not_there(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/a/notes.txt", "train/README", "train/b/1.png")
    put(tmp_path, "train/stray.png", "train/a/._1.png", "train/.DS_Store", "train/.ipynb_checkpoints/1.png")
    (tmp_path / "train/b/gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "train/b/pipe.png")  # opening it would wait for ever
    folders = read_class_folders(tmp_path, "train")
    assert found(folders) == {"a/1.png": "a", "b/1.png": "b"}
    assert [(f.kind, f.ids) for f in folders.faults] == [
        ("outside the class folders", ("stray.png",)),
        ("not an image, by its ending", ("README", "a/notes.txt")),
        ("a link that leads nowhere or in a circle, or no regular file", ("b/gone.png", "b/pipe.png")),
    ]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    os.rename(tmp_path / "train/a/1.png", os.fsencode(tmp_path / "train/a") + b"/\xff\xe4.png")
    dataset = ClassImages(read_class_folders(tmp_path, "train"), "train")
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)


def test_another_split_is_read_with_the_classes_that_were_trained_on(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png")
    classes = read_class_folders(tmp_path, "train").classes
    val = read_class_folders(tmp_path, "val", classes)
    assert val.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [0, 2]
    assert [str(f) for f in val.faults] == ["kept 1 class name: without an image (id b)"]
    assert read_class_folders(tmp_path, "val", ["c", "a"]).labels.tolist() == [0, 1]


def test_a_class_that_is_not_trained_on_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "val/a/1.png", "val/tabby cat/1.png")
    with pytest.raises(UsageError, match=r"val: 1 class folder .*not trained on: tabby cat; .* are a; b"):
        read_class_folders(tmp_path, "val", ["a", "b"])


def test_classes_without_an_image_are_refused_where_they_define_the_labels(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/notes.txt", "train/__MACOSX/x/.y")
    with pytest.raises(UsageError, match="2 class folders without an image: __MACOSX; b; add images or"):
        read_class_folders(tmp_path, "train")


def test_classes_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/Cat/1.png", "train/cat/1.png", "train/dog/1.png")
    with pytest.raises(UsageError, match="upper and lower case: Cat; cat; merge"):
        read_class_folders(tmp_path, "train")


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        ([], "train", r"no such folder of images, nor is there a folder"),
        (["test/a/1.png"], "train", r"no such folder of images; .* holds the folders test"),
        (["train"], "train", "not a folder"),
        (["train/a/notes.txt"], "train", "there is no image in it"),
        (["train/1.png"], "train", r"no class folders in it, and no list LOC_train_solution\.csv"),
    ],
)
def test_folders_that_are_no_dataset_are_refused(
    tmp_path: Path, files: list[str], split: str, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        read_class_folders(put(tmp_path / "root", *files), split)


# Links.


def test_links_may_not_lead_out_unless_allowed(tmp_path: Path) -> None:
    put(tmp_path / "root", "train/a/1.png", "train/b/1.png")
    put(tmp_path, "other/2.png", "other/more/3.png")
    (tmp_path / "root/train/a/2.png").symlink_to(tmp_path / "other/2.png")
    with pytest.raises(UsageError, match=r"1 link out of .*'2\.png'; .*data\.follow_symlinks=true"):
        read_class_folders(tmp_path / "root", "train")
    (tmp_path / "root/train/a/2.png").unlink()
    (tmp_path / "root/train/c").symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match=r"train/c: 1 link out of"):
        read_class_folders(tmp_path / "root", "train")
    folders = read_class_folders(tmp_path / "root", "train", follow_symlinks=True)
    assert found(folders)["c/more/3.png"] == "c"


def test_a_split_may_be_a_link_and_links_within_the_root_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/a/1.png", "elsewhere/b/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/b/2.png").symlink_to("../a/1.png")
    assert len(read_class_folders(tmp_path / "root", "train")) == 3


def test_links_in_circles_end(tmp_path: Path) -> None:
    put(tmp_path, "train/a/x/1.png", "train/b/1.png")
    (tmp_path / "train/a/x/up").symlink_to("..")
    (tmp_path / "train/a/there").symlink_to("../b")
    (tmp_path / "train/b/back").symlink_to("../a")
    folders = read_class_folders(tmp_path, "train")
    assert set(found(folders)) == {"a/x/1.png", "a/there/1.png", "b/1.png", "b/back/x/1.png"}
    assert folders.faults[0].count == 4


# ImageNet.


def test_kaggles_tree_with_its_flat_validation_folder(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(f"ILSVRC/Data/CLS-LOC/train/{w}/{w}_1.JPEG" for w in ("n02012849", "n03126707", "n01440764")),
        *(f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2)),
    )
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n01440764 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n03126707 131 0 499 254 n03126707 1 2 3 4 \n"
    )
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\nn99999999 unused\n"
    )
    train = read_class_folders(tmp_path, "train")
    assert train.classes == ["n01440764", "n02012849", "n03126707"]
    assert train.names == ["tench", "crane (n02012849)", "crane (n03126707)"]
    val = read_class_folders(tmp_path, "val", train.classes)
    assert found(val) == {
        "ILSVRC2012_val_00000001.JPEG": "n03126707",
        "ILSVRC2012_val_00000002.JPEG": "n01440764",
    }
    assert [f.ids for f in val.faults] == [("n02012849",)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "1.JPEG 1\n2.JPEG 0\n3.JPEG 1\n"),
        ("val.txt", "1.JPEG n2\n2.JPEG n1\n\nval/3.JPEG n2\n"),
        (
            "val/val_annotations.txt",
            "1.JPEG\tn2\t0\t32\t44\t62\n2.JPEG\tn1\t1\t2\t3\t4\n3.JPEG\tn2\t1\t2\t3\t4",
        ),
    ],
)
def test_lists_of_caffe_and_of_tiny_imagenet(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, *(f"val/images/{k}.JPEG" for k in (1, 2, 3)))
    (tmp_path / name).write_text(text)
    val = read_class_folders(tmp_path, "val", ["n1", "n2"])
    assert found(val) == {"images/1.JPEG": "n2", "images/2.JPEG": "n1", "images/3.JPEG": "n2"}
    assert not val.faults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.png a\n", r"1 image not listed: 2\.png"),
        ("1.png a\n2.png b\n3.png a\n", r"1 image listed but missing: 3\.png"),
        ("1.png a\n2.png c\n", r"1 image of a class that is not trained on: 2\.png 'c'; .* a; b"),
        ("1.png 0\n2.png 2\n", r"not trained on: 2\.png '2'"),
        ("1.png a\n2.png\n", r"val\.txt: line 2: a line holds the name of an image and its class"),
        ("", "the list is empty"),
        ("1.png a\n2.png b\n1.png b\n", r"1 image listed more than once: 1\.png"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    put(tmp_path, "val/1.png", "val/2.png")
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(UsageError, match=expected):
        read_class_folders(tmp_path, "val", ["a", "b"])


def test_numbers_alone_do_not_name_classes(tmp_path: Path) -> None:
    put(tmp_path, "val/1.png", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(UsageError, match=r"ground_truth\.txt alone does not name the classes; .*Kaggle's"):
        read_class_folders(tmp_path, "val", ["a"])
    (tmp_path / "val.txt").write_text("1.png 7\n")
    with pytest.raises(UsageError, match=r"its classes are numbers; give data\.classes"):
        read_class_folders(tmp_path, "val")


# Images.


def test_samples_are_what_pillow_shows(tmp_path: Path) -> None:
    """Turned by its EXIF orientation, as nobody annotated another size."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    picture = Image.fromarray(np.stack([x * 6, y * 10, x + y], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    picture.save(tmp_path / "train/b/1.png", exif=exif)
    dataset = ClassImages(read_class_folders(tmp_path, "train"), "train")
    image, target = dataset[1]
    with Image.open(tmp_path / "train/b/1.png") as stored:
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.array(ImageOps.exif_transpose(stored)))
    assert target == {"label": 1, "image_id": 1, "original_size": (WIDTH, HEIGHT)}
    assert dataset.image_size(1) == (WIDTH, HEIGHT)
    assert dataset.image_size(0) == (HEIGHT, WIDTH)


def test_real_jpegs_are_reduced_but_keep_their_size_on_record(real_data: Path) -> None:
    dataset = ClassImages(read_class_folders(real_data / "clothing", "val"), "val")
    image, target = dataset.load(5, at_least=(50, 50))
    whole = dataset.load(5)[0]
    assert target["original_size"] == dataset.image_size(5) == tuple(whole.shape[-2:])
    assert min(image.shape[-2:]) >= 100
    assert image.shape[-1] < whole.shape[-1]


@pytest.mark.parametrize("training", [False, True])
def test_a_sample_opens_its_file_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Once for the header, by which the crop is chosen, and once to decode as much as the crop needs."""
    put(tmp_path, "train/a/1.jpg")
    folders, opened = read_class_folders(tmp_path, "train"), []

    def counting(path: Path, *args: Any) -> Any:
        opened.append(path)
        return original(path, *args)

    original = images._open
    monkeypatch.setattr(images, "_open", counting)
    _, target = PreparedClasses(ClassImages(folders, "train"), 8, training=training)[0]
    assert opened == [tmp_path / "train/a/1.jpg"] * 2
    assert target["original_size"] == (HEIGHT, WIDTH)


def test_an_image_that_cannot_be_read_is_named_with_its_split(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "train/a/1.png").write_bytes(b"<html>")
    dataset = ClassImages(read_class_folders(tmp_path, "train"), "train")
    for access in (dataset.image_size, dataset.load):
        with pytest.raises(UsageError, match=r"^train: image 0 'a/1\.png': .*/train/a/1\.png: a web page"):
            access(0)
    with pytest.raises(UsageError, match="more than 100 pixels"):
        ClassImages(dataset.annotations, "train", max_pixels=100).load(1)


# The check.


def test_the_check_decodes_all_and_counts_the_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/[a]/1.png", "train/[a]/2.png", "train/b/1.png", "train/b/2.png")
    folders = read_class_folders(tmp_path, "train")
    (tmp_path / "train/b/1.png").write_bytes(b"")
    report = check_dataset({"train": ClassImages(folders, "train")}, tmp_path / "out", workers=2)
    assert not report.ok
    assert [(f.kind, f.count, f.ids) for f in report.faults["train"]] == [
        ("image that cannot be used", 1, (2,))
    ]
    assert "train: image 2 'b/1.png'" in report.text
    rows = [line.strip("│ ").split("│") for line in report.text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["[a]", "2"], ["b", "2"], ["all", "4"]]
    with Image.open(report.pictures["train"]) as sheet:
        assert sheet.width > 2 * WIDTH


def test_a_real_dataset_passes(real_data: Path, tmp_path: Path) -> None:
    folders = read_class_folders(real_data / "clothing", "val")
    assert check_dataset({"val": ClassImages(folders, "val")}, tmp_path, workers=2).ok


# The datamodule.


def test_rare_classes_are_shown_more_often(tmp_path: Path) -> None:
    """arXiv 1908.03195, section 3.1: sqrt(t / f) of a class on the share f < t of the images, else 1."""
    put(tmp_path, *(f"{split}/a/{k}.png" for split in ("train", "val") for k in range(9)))
    put(tmp_path, "train/b/1.png", "val/b/1.png")
    assert ClassFolderData(str(tmp_path), batch_size=1, num_workers=0).train_batches(1) == 10
    data = ClassFolderData(str(tmp_path), repeat_threshold=0.4, batch_size=1, num_workers=0)
    assert data.train_batches(1) == 11  # 9 of class a, and 2 = sqrt(0.4 / 0.1) of class b
    assert sorted(index for _, _, index in data.train_sampler(0, 1)) == [*range(9), 9, 9]
    both = ClassFolderData(str(tmp_path), repeat_threshold=0.4, repeats=2, batch_size=2, num_workers=0)
    assert both.train_batches(1) == 6
    with pytest.raises(UsageError, match=r"data\.repeat_threshold=2"):
        ClassFolderData(str(tmp_path), repeat_threshold=2, num_workers=0).train_batches(1)


def test_datamodules_do_not_outlive_their_run(tmp_path: Path) -> None:
    """A sweep has hundreds of them."""
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    data = ClassFolderData(str(tmp_path), num_workers=0)
    data.setup("fit")
    assert data.state_dict() == data.state_dict()
    assert data.annotations("train") is data.annotations("train")
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None
