"""Order and shares of samples over epochs, processes and resumptions."""

import pytest

from tasks.data.samplers import EvalSampler, TrainSampler, epoch_order, mix


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(17, 4, 1), (17, 2, 2), (5, 4, 3), (1, 8, 2), (24, 4, 2)]
)
def test_every_image_every_epoch_and_equal_lengths(length, batch, world):
    samplers = [TrainSampler(length, batch, seed=3, rank=rank, world_size=world) for rank in range(world)]
    items = [list(sampler) for sampler in samplers]
    assert len({len(i) for i in items}) == 1
    assert all(len(i) == len(s) == s.batches * batch for i, s in zip(items, samplers, strict=True))
    assert {index for share in items for _, index in share} == set(range(length))


def test_global_batches_do_not_depend_on_the_number_of_processes():
    alone = [index for _, index in TrainSampler(16, 4, seed=0)]
    pair = [[index for _, index in TrainSampler(16, 2, seed=0, rank=rank, world_size=2)] for rank in (0, 1)]
    for step in range(4):
        together = {i for share in pair for i in share[2 * step : 2 * step + 2]}
        assert together == set(alone[4 * step : 4 * step + 4])


def test_order_changes_with_epoch_and_seed_only():
    assert epoch_order(50, seed=1, epoch=2) == epoch_order(50, seed=1, epoch=2)
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_resumes_within_an_epoch_and_only_in_it():
    sampler = TrainSampler(20, 4, seed=0)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.resume_at(3, batch=2)
    assert list(sampler) == whole[8:]
    sampler.resume_at(3, batch=5)
    assert list(sampler) == []
    sampler.set_epoch(4)
    assert len(list(sampler)) == 20


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
