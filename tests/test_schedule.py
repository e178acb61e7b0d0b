"""Learning rates over a run, by their formulas."""

import math

import pytest
import torch

from tasks.schedule import warmup_cosine, warmup_multistep


def rates(schedule, steps, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, total_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine():
    found = rates(warmup_cosine, 100, warmup=0.1, final=0.1)
    assert found[:10] == pytest.approx([2 * (k + 1) / 11 for k in range(10)])
    assert found[10] == pytest.approx(2.0)
    assert found[55] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert min(found[10:]) == found[-1] >= 0.2


def test_cosine_without_warmup_starts_at_the_full_rate():
    assert rates(warmup_cosine, 10)[0] == 2.0


def test_multistep_is_detectrons_1x():
    found = rates(warmup_multistep, 90, warmup=1 / 9)
    assert found[0] == pytest.approx(2 / 11)
    assert found[10:60] == pytest.approx([2.0] * 50)  # 60,000 and 80,000 of 90,000 steps
    assert found[60:80] == pytest.approx([0.2] * 20)
    assert found[80:] == pytest.approx([0.02] * 10)
