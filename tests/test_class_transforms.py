"""From decoded images to a classifier's batches, held against torchvision's own transforms."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnext_backbones.errors import UsageError
from tasks.data.class_transforms import ClassBatch, Mix, PreparedClasses, collate_classes, scaled
from tasks.data.images import decode
from tasks.data.samplers import TrainSampler, mix

SIZES = [(60, 80), (91, 57), (40, 40), (30, 200), (224, 300)]


class Pictures:
    """Stands in for a dataset of images in memory."""

    def __init__(self, sizes=SIZES):
        generator = torch.Generator().manual_seed(0)
        self.images = [
            torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes
        ]

    def __len__(self):
        return len(self.images)

    def image_size(self, index):
        return tuple(self.images[index].shape[-2:])

    def load(self, index, at_least=None):
        target = {"label": index % 3, "image_id": 10 + index, "original_size": self.image_size(index)}
        return tv_tensors.Image(self.images[index]), target


class Files(Pictures):
    """The same from one JPEG file, decoded at a fraction of its size where that is enough."""

    def __init__(self, path):
        self.path, self.decoded = path, []
        with Image.open(path) as image:
            self.size = image.size[::-1]

    def __len__(self):
        return 1

    def image_size(self, index):
        return self.size

    def load(self, index, at_least=None):
        image = decode(self.path, at_least=at_least)
        self.decoded.append((tuple(image.shape[-2:]), at_least))
        return tv_tensors.Image(image), {"label": 0, "image_id": 0, "original_size": self.size}


class WholeFiles(Files):
    def load(self, index, at_least=None):
        return super().load(index)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_training_is_torchvisions_crop_and_flip_with_the_same_random_numbers(index, interpolation):
    pictures = Pictures()
    settings = {"scale": (0.1, 0.9), "ratio": (0.5, 2.0)}
    prepared = PreparedClasses(
        pictures,
        32,
        training=True,
        **settings,
        interpolation=interpolation,
        augment=[v2.TrivialAugmentWide()],
        seed=7,
    )
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(
                32, **settings, interpolation=v2.InterpolationMode(interpolation), antialias=True
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.TrivialAugmentWide(),
        ]
    )
    for epoch, copy in ((0, 0), (0, 1), (3, 0)):
        image, target = prepared[(epoch, copy, index)]
        torch.manual_seed(mix(7, epoch, copy, index))
        assert torch.equal(image, reference(pictures.load(index)[0]))
        assert image.dtype == torch.uint8
        assert (target["label"], target["image_id"]) == (index % 3, 10 + index)


@pytest.mark.parametrize(("size", "crop_ratio", "short"), [(224, 0.875, 256), (32, 0.95, 34), (32, 1.0, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions_resize_and_centre_crop(size, crop_ratio, short, interpolation):
    pictures = Pictures()
    prepared = PreparedClasses(pictures, size, crop_ratio=crop_ratio, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    reference = v2.Compose([v2.Resize(short, interpolation=mode, antialias=True), v2.CenterCrop(size)])
    for index in range(len(SIZES)):
        assert torch.equal(prepared[index][0], reference(pictures.load(index)[0]))


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A smooth JPEG of 600 × 840 pixels, so that a fraction of its size shows the same."""
    y, x = np.mgrid[:600, :840] / 100
    colours = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(y * 1.5) * np.cos(x)], axis=2)
    Image.fromarray((colours * 120 + 128).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    return tmp_path / "a.jpg"


def test_a_large_photograph_is_decoded_small_where_the_crop_can_spare_it(photograph):
    small, whole = Files(photograph), WholeFiles(photograph)
    settings = {"training": True, "scale": (0.02, 1.0)}
    for epoch in range(25):
        image, _ = PreparedClasses(small, 32, **settings)[(epoch, 0, 0)]
        expected, _ = PreparedClasses(whole, 32, **settings)[(epoch, 0, 0)]
        # an edge moves by at most half a pixel of the smaller image, which may be 4 of the larger; the
        # photograph's steepest slope is 2.4 grey levels a pixel
        assert (image.int() - expected.int()).abs().float().mean() < 4 * 2.4 / 2
        height, width = small.decoded[-1][0]
        crop = v2.RandomResizedCrop(32, (0.02, 1.0))
        torch.manual_seed(mix(0, epoch, 0, 0))
        wanted = crop.make_params([torch.empty(3, 600, 840)])
        if (height, width) != (600, 840):
            assert wanted["height"] * height / 600 >= 64
            assert wanted["width"] * width / 840 >= 64
    assert len({size for size, _ in small.decoded}) > 2
    image, _ = PreparedClasses(small, 64)[0]
    expected, _ = PreparedClasses(whole, 64)[0]
    assert small.decoded[-1] == ((150, 210), (73, 102))
    assert (image.int() - expected.int()).abs().float().mean() < 1


def test_a_window_is_the_same_part_of_a_smaller_image():
    quarter = torch.empty(3, 150, 210)
    assert scaled((100, 200, 300, 400), (600, 840), quarter) == (25, 50, 75, 100)
    assert scaled((0, 0, 600, 840), (600, 840), quarter) == (0, 0, 150, 210)
    assert scaled((598, 839, 2, 1), (600, 840), quarter) == (149, 209, 1, 1)  # at least a pixel


CHOICES = sorted((Path(__file__).parents[1] / "configs/augment").glob("*.yaml"))
AUGMENT = {
    "randaugment": v2.RandAugment(),
    "trivial": v2.TrivialAugmentWide(),
    "autoaugment": v2.AutoAugment(),
    "augmix": v2.AugMix(),
    "colour": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "erasing": v2.RandomErasing(1.0, value=[124, 116, 104]),
}


@pytest.mark.parametrize("transform", AUGMENT.values(), ids=AUGMENT)
def test_augmentation_keeps_bytes(transform):
    prepared = PreparedClasses(Pictures(), 32, training=True, flip=0.0, augment=[transform])
    plain = PreparedClasses(Pictures(), 32, training=True, flip=0.0)
    changed = 0
    for epoch in range(8):
        image, _ = prepared[(epoch, 0, 0)]
        assert image.dtype == torch.uint8
        assert image.shape == (3, 32, 32)
        changed += not torch.equal(image, plain[(epoch, 0, 0)][0])
    assert changed > 3


@pytest.mark.parametrize("path", CHOICES, ids=[path.stem for path in CHOICES])
def test_the_choices_of_augmentation_fit_the_data(path):
    choice = OmegaConf.load(path)
    package = re.match(r"# @package (\S+)\n", path.read_text())[1]
    if package == "data":
        assert set(choice) <= set(OmegaConf.load(path.parents[1] / "data/coco.yaml"))
        assert set(choice) <= set(OmegaConf.load(path.parents[1] / "data/mask_folders.yaml"))
        return
    assert package == "data.augment"
    transforms = list(instantiate(choice).values())
    prepared = PreparedClasses(Pictures(), 32, training=True, augment=transforms)
    plain = PreparedClasses(Pictures(), 32, training=True)
    changed = 0
    for epoch in range(20):
        image, _ = prepared[(epoch, 0, 0)]
        assert image.dtype == torch.uint8
        changed += not torch.equal(image, plain[(epoch, 0, 0)][0])
    assert changed > 3


def test_erased_pixels_have_the_given_colour():
    white = Pictures([(40, 40)])
    white.images[0].fill_(255)
    prepared = PreparedClasses(
        white, 32, training=True, augment=[v2.RandomErasing(1.0, value=[124, 116, 104])]
    )
    image, _ = prepared[(0, 0, 0)]
    erased = image[:, (image != 255).any(dim=0)]
    assert erased.shape[1] > 10
    assert erased.unique(dim=1).flatten().tolist() == [124, 116, 104]


def test_erasing_with_normal_numbers_is_refused():
    with pytest.raises(UsageError, match=r"value=\[124,116,104\]"):
        PreparedClasses(Pictures(), 32, training=True, augment=[v2.RandomErasing(value="random")])


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("image_size", "size", 0),
        ("crop_scale", "scale", (0.0, 1.0)),
        ("crop_scale", "scale", (0.5, 0.2)),
        ("crop_scale", "scale", (0.5, 1.2)),
        ("crop_ratio", "crop_ratio", 1.1),
        ("crop_ratio", "crop_ratio", 0.0),
        ("interpolation", "interpolation", "cubic"),
        ("flip", "flip", 1.5),
    ],
)
def test_values_out_of_range_are_refused(name, argument, value):
    with pytest.raises(UsageError, match=rf"^data\.{name}="):
        PreparedClasses(Pictures(), **{"size": 32, "training": True, argument: value})


def test_batches_do_not_depend_on_workers():
    prepared = PreparedClasses(Pictures(), 24, training=True, augment=[v2.RandAugment()])

    def batches(workers):
        sampler = TrainSampler(5, 4, 0, repeats=2)
        return list(DataLoader(prepared, 4, sampler=sampler, num_workers=workers, collate_fn=collate_classes))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    here = batches(0)
    torch.random.set_rng_state(before)
    there = batches(2)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.images[0], a.images[2])  # two copies of one image
        assert a.image_ids[0] == a.image_ids[2]
        assert (a.labels == (a.image_ids - 10) % 3).all()
    assert isinstance(here[0], ClassBatch)
    assert here[0].images.shape == (4, 3, 24, 24)
    assert here[0].images.is_contiguous(memory_format=torch.channels_last)
    assert type(here[0].images) is torch.Tensor


# Mixing.


def constant_images(number=8, side=32):
    """Image i holds the number i everywhere."""
    return torch.arange(number).float()[:, None, None, None].expand(number, 3, side, side).contiguous()


def test_mixup_adds_images_and_labels_with_the_same_weights():
    labels = torch.arange(8)
    images, soft = Mix(0.4, 0.0, 10)(constant_images(), labels)
    weight = soft[labels, labels]  # of each image itself; the other is the one before it
    others = soft[labels, labels.roll(1)]
    assert (weight + others).tolist() == pytest.approx([1] * 8)
    assert len(weight.unique()) == 1
    assert 0 < float(weight[0]) < 1
    expected = weight * labels + others * labels.roll(1)
    assert torch.allclose(images.mean(dim=(1, 2, 3)), expected, atol=1e-4)
    assert torch.allclose(images.std(dim=(1, 2, 3)), torch.zeros(8), atol=1e-4)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_repeated_images_are_mixed_with_others(repeats, world):
    """A batch as the sampler deals it, each image its own class: mixed with itself it would have one only."""
    for rank in range(world):
        images = [i for _, _, i in TrainSampler(30, 12, 0, rank, world, repeats=repeats)][:12]
        labels = torch.tensor(images)
        for mixing in (Mix(1.0, 0.0, 30), Mix(0.0, 1.0, 30)):
            torch.manual_seed(1)
            mixed, soft = mixing(labels.float()[:, None, None, None].expand(12, 3, 32, 32).clone(), labels)
            assert ((soft > 0).sum(dim=1) == 2).all()
            assert not torch.equal(mixed.mean(dim=(1, 2, 3)), labels.float())


def test_cutmix_labels_are_the_shares_of_the_area():
    labels = torch.arange(8)
    cut = 0
    for seed in range(10):
        torch.manual_seed(seed)
        images, soft = Mix(0.0, 1.0, 8, label_smoothing=0.0)(constant_images(), labels)
        share = torch.stack([(images == k).float().mean(dim=(1, 2, 3)) for k in range(8)], dim=1)
        assert torch.allclose(soft, share, atol=1e-6)
        cut += bool((share.amax(dim=1) < 1).all())
    assert cut > 5


def test_mixing_strength_follows_the_beta_distribution():
    """Of Beta(α, α) the variance is 1 / (4 (2 α + 1))."""
    for alpha in (0.2, 1.0):
        torch.manual_seed(0)
        mixing = Mix(alpha, 0.0, 2)
        weights = torch.stack(
            [mixing(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]))[1][0, 0] for _ in range(2000)]
        )
        assert weights.mean() == pytest.approx(0.5, abs=0.05)
        assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_both_take_turns_and_depend_on_torchs_seed():
    mixing, images, labels = Mix(0.8, 1.0, 8), constant_images(), torch.arange(8)

    def kinds(seed):
        torch.manual_seed(seed)
        found = [mixing(images, labels) for _ in range(40)]
        return ["mixup" if (m % 1).any() else "cutmix" for m, _ in found], found[0]

    first, (images_a, soft_a) = kinds(0)
    assert 10 < first.count("mixup") < 30
    again, (images_b, soft_b) = kinds(0)
    assert again == first
    assert torch.equal(images_a, images_b)
    assert torch.equal(soft_a, soft_b)
    assert kinds(1)[0] != first


def test_smoothing_is_cross_entropys():
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    images, soft = Mix(0.0, 0.0, 5, label_smoothing=0.1)(torch.zeros(6, 3, 2, 2), labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.nn.functional.cross_entropy(logits, soft) == pytest.approx(expected)
    assert soft.dtype == torch.float32
    assert torch.equal(images, torch.zeros(6, 3, 2, 2))
    mixed = Mix(0.5, 0.5, 5, label_smoothing=0.1)(torch.zeros(6, 3, 4, 4), labels)[1]
    assert mixed.sum(dim=1).tolist() == pytest.approx([1] * 6)
    assert mixed.min() >= 0.1 / 5 - 1e-7
    assert Mix(0.5, 0.5, 5)(torch.zeros(1, 3, 4, 4), torch.tensor([2]))[1].tolist() == [[0, 0, 1, 0, 0]]
