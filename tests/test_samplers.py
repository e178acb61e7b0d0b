"""Order and shares of samples over epochs, processes and resumptions."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from resnext_backbones.errors import UsageError
from tasks.data.samplers import (
    EvalSampler,
    TrainSampler,
    holdout,
    mix,
    occurrence,
    permutation,
    repeat_factors,
    rounded,
    subset,
)


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(17, 4, 1), (17, 2, 2), (5, 4, 3), (1, 8, 2), (24, 4, 2)]
)
def test_every_image_every_epoch_and_equal_lengths(length, batch, world):
    samplers = [TrainSampler(length, batch, seed=3, rank=rank, world_size=world) for rank in range(world)]
    items = [list(sampler) for sampler in samplers]
    assert len({len(i) for i in items}) == 1
    assert all(len(i) == len(s) == s.batches * batch for i, s in zip(items, samplers, strict=True))
    assert {index for share in items for _, _, index in share} == set(range(length))


def dealt(length, batch, world, epoch=0, seed=0, **options):
    """The items of each global batch, put together from all processes' batches of `batch` items."""
    shares = []
    for rank in range(world):
        sampler = TrainSampler(length, batch, seed, rank, world, **options)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == sampler.batches * batch
    return [
        sorted(item for share in shares for item in share[start : start + batch])
        for start in range(0, len(shares[0]), batch)
    ]


ASPECT = torch.tensor([1.5, 0.7, 1.0, 2.0, 0.5] * 7)[:32]
OPTIONS = {
    "plain": {},
    "aspect": {"aspect": ASPECT},
    "factors": {"repeat_factors": torch.linspace(1, 2.5, 32)},
    "repeats": {"repeats": 3},
    "all": {"aspect": ASPECT, "repeat_factors": torch.linspace(1, 2.5, 32), "repeats": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_global_batches_do_not_depend_on_the_number_of_processes(options, epoch):
    alone = dealt(32, 6, 1, epoch, **options)
    assert dealt(32, 3, 2, epoch, **options) == alone
    assert dealt(32, 2, 3, epoch, **options) == alone
    assert dealt(32, 1, 6, epoch, **options) == alone
    assert dealt(32, 6, 1, epoch + 6, **options) != alone
    assert len({len(dealt(32, 6, 1, e, **options)) for e in range(8)}) == 1
    items = [item for batch in alone for item in batch]
    assert len(set(items)) == len(items)  # repetitions are told apart
    for index, number in Counter(index for _, _, index in items).items():
        assert [copy for _, copy, i in sorted(items) if i == index] == list(range(number))


def test_permutations_change_with_epoch_and_seed_only():
    assert torch.equal(permutation(50, 1, 2), permutation(50, 1, 2))
    orders = [tuple(permutation(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_batches_are_wide_or_not_but_for_what_is_left_of_both():
    wide = int((ASPECT > 1).sum())
    places, orders = set(), set()
    for epoch in range(12):
        batches = dealt(32, 4, 1, epoch, aspect=ASPECT)
        kinds = [[bool(ASPECT[index] > 1) for _, _, index in batch] for batch in batches]
        whole = [all(kind) for kind in kinds if len(set(kind)) == 1]
        assert (whole.count(True), whole.count(False)) == (wide // 4, (32 - wide) // 4)
        places.add(tuple(len(set(kind)) for kind in kinds).index(2))
        orders.add(tuple(whole))
    assert (wide % 4, (32 - wide) % 4) == (1, 3)  # which make one batch
    assert len(places) > 3
    assert len(orders) > 3


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("wide", "high"), [(500, 1), (1, 500), (31, 1), (40, 40), (26, 26), (17, 17), (9, 2), (16, 16), (12, 0)]
)
def test_a_rare_kind_is_not_seen_more_often(wide, high, world):
    aspect = torch.tensor([1.5] * wide + [0.7] * high)
    for epoch in range(5):
        batches = dealt(wide + high, 16 // world, world, epoch, aspect=aspect)
        assert len(batches) == math.ceil((wide + high) / 16)  # an epoch is as long as without
        seen = Counter(index for batch in batches for _, _, index in batch)
        assert set(seen) == set(range(wide + high))
        assert max(seen.values()) <= 2
        mixed = [b for b in batches if len({bool(aspect[index] > 1) for _, _, index in b}) == 2]
        assert len(mixed) <= math.ceil((wide % 16 + high % 16) / 16)


def test_images_of_one_kind_are_batched_as_if_not_grouped():
    assert dealt(10, 4, 1, aspect=torch.full((10,), 1.3)) == dealt(10, 4, 1)
    assert dealt(10, 4, 1, aspect=torch.full((10,), 0.3)) == dealt(10, 4, 1)


def test_repeats_stand_in_one_batch_and_all_images_come_in_as_many_epochs():
    seen = Counter()
    for epoch in range(6, 9):
        batches = dealt(32, 6, 1, epoch, repeats=3)
        assert len(batches) == 6  # as long as without: 32 images in batches of 6
        for batch in batches:
            images = Counter(index for _, _, index in batch)
            assert all(number % 3 == 0 for number in images.values())
            seen.update(images)
    assert set(seen) == set(range(32))
    assert sum(seen.values()) == 3 * 36
    with pytest.raises(UsageError, match=r"data\.repeats=3 does not divide the 8 images"):
        TrainSampler(32, 4, 0, 0, 2, repeats=3)
    with pytest.raises(UsageError, match=r"data\.repeats=0"):
        TrainSampler(32, 4, 0, repeats=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
@pytest.mark.parametrize(("length", "batch"), [(100, 12), (100, 18), (7, 24), (40, 40)])
def test_copies_are_no_neighbours_on_any_process(length, batch, repeats, world):
    """The first and the last of a batch are neighbours too; `Mix` pairs them."""
    batch = batch // repeats * repeats
    for rank in range(world):
        images = [i for _, _, i in TrainSampler(length, batch, 0, rank, world, repeats=repeats)]
        for start in range(0, len(images), batch):
            mine = images[start : start + batch]
            assert [i for k, i in enumerate(mine) if i == mine[k - 1]] == []


def test_occurrences_are_counted():
    assert occurrence(torch.tensor([5, 3, 5, 5, 0, 3])).tolist() == [0, 0, 1, 2, 0, 1]


def test_factors_are_those_of_the_paper():
    # class 0 in all four images, class 1 (three times) in one, class 2 in two; image 3 has class 0 only
    image_of = torch.tensor([0, 1, 2, 3, 1, 1, 1, 0, 2])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    expected = [math.sqrt(0.8 / 0.5), math.sqrt(0.8 / 0.25), math.sqrt(0.8 / 0.5), 1, 1]
    # a fifth image without objects changes the shares
    assert repeat_factors(image_of, labels, 4, 0.8).tolist() == pytest.approx(expected[:4])
    expected = [math.sqrt(0.9 / 0.4), math.sqrt(0.9 / 0.2), math.sqrt(0.9 / 0.4), math.sqrt(0.9 / 0.8), 1]
    assert repeat_factors(image_of, labels, 5, 0.9).tolist() == pytest.approx(expected)
    assert repeat_factors(image_of, labels, 4, 0.2).tolist() == [1, 1, 1, 1]
    assert repeat_factors(torch.tensor([]).long(), torch.tensor([]).long(), 2, 0.2).tolist() == [1, 1]
    for wrong in (0, -1, 1.5, math.nan):
        with pytest.raises(UsageError, match="repeat_threshold"):
            repeat_factors(image_of, labels, 4, wrong)


def test_repetitions_are_spread_over_the_epoch():
    batches = dealt(100, 5, 1, repeat_factors=torch.full((100,), 2.0))
    twice = sum(len({index for _, _, index in batch}) < 5 for batch in batches)
    # a partner falls into the same batch with chance 4 / 199: 2 of 40 batches on average hold such a pair
    assert twice < 10


def test_rounding_keeps_the_sum_and_the_mean():
    factors = torch.tensor([1.0, 1.25, 1.5, 2.9, 3.1, 1.05, 1.7, 1.1], dtype=torch.float64)  # sum 13.6
    offsets = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    counts = torch.stack([rounded(factors, float(offset)) for offset in offsets])
    assert (counts.sum(dim=1) == 14).all()
    assert (counts >= factors.floor()).all()
    assert (counts <= factors.ceil()).all()
    off = counts.double().mean(dim=0) - factors
    assert off[0] == 0
    assert (off >= -0.002).all()
    assert off.sum() == pytest.approx(0.4)

    def mean(factors):
        return torch.stack([rounded(factors, float(o)) for o in offsets]).double().mean(dim=0).tolist()

    # 2.75: each fraction takes a fifth of what it lacks to one, so that they sum to one
    assert mean(factors[[1, 2]]) == pytest.approx([1.4, 1.6], abs=0.002)
    # 4.45: the fractions are shrunk to a sum of one
    assert mean(factors[[1, 2, 6]]) == pytest.approx([1 + f / 1.45 for f in (0.25, 0.5, 0.7)], abs=0.002)


@pytest.mark.parametrize("factors", [[1.0, 1.0], [2.0, 3.0, 1.0], [1.2, 1.0, 1.2], [1.5], [1.25] * 6])
def test_rounding_of_few(factors):
    for offset in (0.0, 0.3, 0.999999):
        assert rounded(torch.tensor(factors), offset).sum() == round(sum(factors))


def test_images_come_as_often_as_their_factors_say():
    images, epochs = 300, 400
    factors = torch.rand(images, generator=torch.Generator().manual_seed(0)).double() * 3 + 1
    sampler = TrainSampler(images, 1, 0, repeat_factors=factors)
    total = torch.zeros(images)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts = torch.bincount(sampler.global_batches().flatten(), minlength=images)
        assert counts.sum() == sampler.batches == round(float(factors.sum()))
        assert ((counts - factors).abs() < 1.01).all()  # never further than to the next whole number
        total += counts
    # the standard error of a mean of rounded numbers is at most 1/2 / sqrt(epochs)
    assert ((total / epochs - factors).abs() < 5 * 0.5 / math.sqrt(epochs)).all()
    with pytest.raises(ValueError, match="below 1"):
        TrainSampler(2, 1, 0, repeat_factors=torch.tensor([1.0, 0.9]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rank", [0, 1])
def test_resumes_within_an_epoch_and_only_in_it(options, rank):
    def sampler(epoch):
        made = TrainSampler(32, 3, 0, rank, 2, **options)
        made.set_epoch(epoch)
        return made

    whole = list(sampler(3))
    resumed = sampler(3)
    for batch in (1, 2, resumed.batches):
        resumed.resume_at(3, batch)
        assert list(resumed) == whole[3 * batch :]
    resumed.set_epoch(4)
    assert list(resumed) == list(sampler(4))


@pytest.mark.parametrize(("length", "world"), [(20, 1), (21, 2), (3, 2), (61, 7)])
def test_evaluation_shares_partition_the_split(length, world):
    shares = [list(EvalSampler(length, rank, world)) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(length))


def test_a_process_without_images_gets_one_to_keep_it_in_step():
    assert list(EvalSampler(1, rank=1, world_size=2)) == [0]


def test_mix_separates_neighbours():
    seeds = [mix(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = [bin(mix(0, 0, n) ^ mix(0, 0, n + 1)).count("1") for n in range(100)]
    assert 24 < sum(bits) / len(bits) < 40  # about half of 63 bits change


def test_subsets_are_nested():
    parts = [set(subset(1000, fraction, seed=0).tolist()) for fraction in (0.001, 0.01, 0.1, 0.5, 1)]
    assert [len(part) for part in parts] == [1, 10, 100, 500, 1000]
    assert all(small < large for small, large in pairwise(parts))
    assert subset(7, 0.001, seed=0).shape == (1,)
    assert subset(1000, 0.1, seed=0).diff().min() > 0
    assert set(subset(1000, 0.1, seed=1).tolist()) != parts[2]
    for wrong in (0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="fraction"):
            subset(10, wrong, seed=0)


def test_subsets_hold_the_same_share_of_each_class():
    labels = torch.tensor([0] * 600 + [1] * 60 + [3] * 6 + [4])[torch.randperm(667)]
    parts = [subset(667, fraction, 0, labels) for fraction in (0.05, 0.5)]
    counts = [torch.bincount(labels[part], minlength=5).tolist() for part in parts]
    assert counts == [[30, 3, 0, 1, 1], [300, 30, 0, 3, 1]]
    assert set(parts[0].tolist()) < set(parts[1].tolist())


def test_holdout_splits_in_two():
    train, val = holdout(101, 0.2, seed=0)
    assert len(val) == 20
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(101))
    assert holdout(2, 0.01, seed=0)[1].shape == (1,)
    assert holdout(2, 0.99, seed=0)[0].shape == (1,)
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    train, val = holdout(54, 0.1, 0, labels)
    assert torch.bincount(labels[val], minlength=3).tolist() == [5, 1, 0]
    assert torch.bincount(labels[train], minlength=3).tolist() == [45, 2, 1]
    for wrong in (0, 1, 1.5, math.nan):
        with pytest.raises(UsageError, match="val_fraction"):
            holdout(10, wrong, seed=0)
    with pytest.raises(UsageError, match="1 images cannot be split"):
        holdout(1, 0.5, seed=0)


def test_a_large_dataset_is_dealt_out_whole():
    generator = torch.Generator().manual_seed(0)
    aspect, factors = torch.rand(2, 120_000, generator=generator)
    options = {"aspect": aspect + 0.5, "repeat_factors": factors + 1, "repeats": 2}
    sampler = TrainSampler(120_000, 8, 0, **options)
    seen = torch.zeros(120_000, dtype=torch.int64)
    for epoch in range(2):  # with two copies of each image, two epochs see all
        sampler.set_epoch(epoch)
        batches = sampler.global_batches()
        assert batches.shape == (sampler.batches, 8)
        seen += torch.bincount(batches.flatten(), minlength=120_000)
    assert seen.min() >= 2
    assert seen.max() <= 2 * 2 * 2  # a factor below 2 is rounded up, in two copies, and fills a batch up
