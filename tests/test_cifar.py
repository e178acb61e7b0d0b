"""CIFAR-10's binary version, written here byte by byte as its page describes it."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.cifar import Cifar10Data, read_cifar10
from tasks.data.class_transforms import collate_classes
from tasks.data.samplers import mix

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILES = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
EACH = 20  # images a file


def pixel(number, channel, row, column):
    """What a pixel of an image is made to be; all of its arguments move it."""
    return (37 * number + 91 * channel + 5 * row + column) % 256


def record(number):
    planes = [pixel(number, c, y, x) for c in range(3) for y in range(32) for x in range(32)]
    return bytes([number % 10, *planes])


def write_cifar(root):
    """The binary version in the folder that its archive unpacks into, with few images."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(FILES):
        (folder / name).write_bytes(b"".join(record(EACH * k + i) for i in range(EACH)))
    (folder / "batches.meta.txt").write_text("\n".join([*NAMES, "", ""]))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def copy(whole, tmp_path):
    folder = tmp_path / whole.name
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def data(root, **settings):
    found = Cifar10Data(str(root), num_workers=0, **settings)
    found.setup("fit")
    return found


def test_pixels_and_labels_are_those_written(whole):
    train, test = (read_cifar10(whole.parent, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (5 * EACH, EACH)
    assert train.names == NAMES
    assert train.file_name(EACH + 3) == "data_batch_2.bin/3"
    assert test.overview() == "20 images of 10 of 10 classes"
    for found, first in ((train, 0), (test, 5 * EACH)):
        for i in (0, 7, len(found) - 1):
            assert found.labels[i] == (first + i) % 10
            for c, y, x in ((0, 0, 0), (0, 0, 31), (1, 31, 0), (2, 17, 5)):
                assert found.images[i, c, y, x] == pixel(first + i, c, y, x)


def test_the_root_may_be_the_folder_itself(whole):
    assert torch.equal(read_cifar10(whole, "test").images, read_cifar10(whole.parent, "test").images)


def test_evaluation_sees_whole_images(whole):
    found = data(whole)
    image, target = found.prepared("val")[4]
    assert image.dtype == torch.uint8
    assert torch.equal(image.as_subclass(torch.Tensor), read_cifar10(whole, "test").images[4])
    assert target["label"] == (5 * EACH + 4) % 10


def test_training_shifts_and_mirrors_as_torchvision_does(whole):
    found = data(whole, seed=3)
    original = read_cifar10(whole, "train").images[5]
    theirs = v2.Compose([v2.RandomCrop(32, padding=4, fill=(124, 116, 104)), v2.RandomHorizontalFlip()])
    seen = set()
    for epoch in range(6):
        with torch.random.fork_rng():
            torch.manual_seed(mix(3, epoch, 0, 5))
            wanted = theirs(original)
        image = found.prepared("train")[epoch, 0, 5][0].as_subclass(torch.Tensor)
        assert torch.equal(image, wanted)
        seen.add(image.numpy().tobytes())
    assert len(seen) > 3


def test_without_shift_and_flip_training_sees_the_images_too(whole):
    found = data(whole, padding=0, flip=0.0)
    assert torch.equal(found.prepared("train")[2][0], read_cifar10(whole, "train").images[2])


def test_a_batch_is_like_every_classifiers(whole):
    loader = DataLoader(data(whole).prepared("train"), batch_size=4, collate_fn=collate_classes)
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.labels.tolist() == [0, 1, 2, 3]
    assert batch.image_ids.tolist() == [0, 1, 2, 3]


def test_a_share_can_be_held_out(whole):
    found = data(whole, val=None, val_fraction=0.2, test="test")
    files = {s: {found.annotations(s).file_name(i) for i in range(len(found.annotations(s)))} for s in
             ("train", "val", "test")}  # fmt: skip
    assert [len(files[s]) for s in ("train", "val", "test")] == [80, 20, 20]
    assert not files["train"] & files["val"]
    assert found.annotations("val").counts().tolist() == [2] * 10  # of each class
    everything = read_cifar10(whole, "train")
    part = found.annotations("val")
    names = [everything.file_name(i) for i in range(len(everything))]
    for i in range(len(part)):
        assert torch.equal(part.images[i], everything.images[names.index(part.file_name(i))])
    assert len(data(whole, fraction=0.5).annotations("train")) == 50


def test_other_splits_have_other_fingerprints(whole):
    found, again = (
        data(whole, val=None, val_fraction=0.2),
        data(whole, val=None, val_fraction=0.2, split_seed=1),
    )
    prints = [found.fingerprint("train"), found.fingerprint("val"), again.fingerprint("train")]
    assert len(set(prints)) == 3
    assert data(whole, val=None, val_fraction=0.2).fingerprint("train") == prints[0]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), "data_batch_3.bin: cannot be read"),
        (lambda f: (f / "data_batch_3.bin").write_bytes(b""), "data_batch_3.bin: 0 bytes"),
        (lambda f: shorten(f / "data_batch_2.bin", 1), "data_batch_2.bin: 61,459 bytes, most files 61,460"),
        (lambda f: shorten(f / "data_batch_2.bin", 3073), "data_batch_2.bin: 58,387 bytes"),
        (lambda f: shorten(f / "test_batch.bin", 3073), "test_batch.bin: 58,387 bytes"),
        (lambda f: (f / "test_batch.bin").open("ab").write(b"x"), "test_batch.bin: 61,461 bytes"),
        (lambda f: label(f / "data_batch_5.bin", 6, 10), "data_batch_5.bin: image 6 has label 10"),
        (lambda f: (f / "batches.meta.txt").unlink(), "batches.meta.txt"),
        (lambda f: (f / "batches.meta.txt").write_text(""), "batches.meta.txt"),
        (lambda f: (f / "batches.meta.txt").write_bytes(b"\xff\xfe"), "batches.meta.txt"),
        (lambda f: (f / "batches.meta.txt").write_text("cat\ncat\n"), "different names"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(copy, damage, named):
    damage(copy)
    with pytest.raises(UsageError, match=re.escape(named)) as refusal:
        data(copy)
    assert "\n" not in str(refusal.value)


def shorten(path, number):
    path.write_bytes(path.read_bytes()[:-number])


def label(path, image, value):
    content = bytearray(path.read_bytes())
    content[3073 * image] = value
    path.write_bytes(content)


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "."])
def test_the_pickled_version_is_refused_unopened(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (opened.write_text, ("a pickle ran",))

    (folder / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match=r"Python version, pickled.*cifar-10-binary.tar.gz"):
        read_cifar10(tmp_path, "train")
    assert not opened.exists()


def test_a_wrong_folder_or_split_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match=r"no CIFAR-10 here.*cifar-10-binary.tar.gz"):
        read_cifar10(tmp_path, "train")
    with pytest.raises(UsageError, match="'val' is no split of CIFAR-10"):
        data(whole, val="val")
    with pytest.raises(UsageError, match=r"data\.padding=-1"):
        data(whole, padding=-1).prepared("train")


def test_a_classifier_trains_on_it(whole, start):
    small = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.limit_train_batches=2",
             "callbacks.pictures.images=2", "logger.wandb.mode=disabled"]  # fmt: skip
    folder = start(
        "task=classification",
        "backbone=custom",
        "backbone._target_=resnext_backbones.ResNeXt",
        "+backbone.depths=[1,1,1]",
        "+backbone.stem=cifar",
        small=small,
        data=["data=cifar10", f"data.root={whole}", "data.batch_size=10", "data.num_workers=0"],
    )
    assert (folder / "checkpoints/best.ckpt").is_file()
    assert json.loads((folder / "summary.json").read_text())["results"]["test/top1"] >= 0


def test_the_configuration_builds_it(whole):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["task=classification", "data=cifar10", f"data.root={whole}"])
    found = instantiate(cfg.data, _convert_="all")
    found.setup("fit")
    assert found.batch_size == 128
    assert found.names == NAMES
    images, labels = zip(*(found.prepared("train")[i] for i in range(3)), strict=True)
    assert np.array_equal([target["label"] for target in labels], [0, 1, 2])
    assert {tuple(image.shape) for image in images} == {(3, 32, 32)}
