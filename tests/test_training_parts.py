"""Averaged weights, unfreezing, rates by stage, early stopping, accumulation, on a network of few weights."""

import json
import math
import re
import signal
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from omegaconf import open_dict
from torch import nn

from resnext_backbones import ResNeXt, freeze, load_weights, resnet18, save_weights
from resnext_backbones.errors import UsageError
from tasks import plugins
from tasks.base import BaseTask
from tasks.building import build_trainer
from tasks.callbacks import Pictures
from tasks.checkpoint import AtomicCheckpointIO, RunCheckpoint, read_checkpoint
from tasks.cli import with_kept_choices
from tasks.data.module import ImageData
from tasks.early_stopping import StopEarly
from tasks.ema import EMA
from tasks.folder import open_folder, resumed
from tasks.load import load_task
from tasks.loggers import JsonlLogger, read_metrics
from tasks.models.classifier import Classifier
from tasks.models.one_stage import fcos, retinanet
from tasks.models.rcnn import faster_rcnn
from tasks.models.semantic import deeplabv3, semantic_fpn
from tasks.run import settle_batch_size
from tasks.schedule import warmup_cosine, warmup_multistep
from tasks.stages import parameters_by_stage
from tasks.stopping import Interrupted, StopOnSignal
from tasks.unfreezing import Unfreezing

IMAGES = 16


class Batch(NamedTuple):
    images: torch.Tensor
    targets: torch.Tensor
    image_ids: torch.Tensor


class Points:
    """Sixteen random images with a number each to learn."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, item):
        index = item[-1] if isinstance(item, tuple) else item  # training asks by (epoch, copy, index)
        draw = torch.Generator().manual_seed(index)
        return torch.randn(3, 6, 6, generator=draw), torch.randn(1, generator=draw), torch.tensor(index)


def collate(items):
    return Batch(*map(torch.stack, zip(*items, strict=True)))


class PointData(ImageData):
    TARGETS = ("number",)
    collate = staticmethod(collate)

    def __init__(self, batch_size=4):
        super().__init__(".", "number", "train", "val", None, batch_size=batch_size, num_workers=0)

    def annotations(self, split):
        return range(IMAGES)

    def prepared(self, split):
        return Points()

    def fingerprint(self, split):
        return split


class Judge:
    """Minus the mean squared error over a split; or a script of scores, one a validation."""

    class_numbers: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, script=None):
        self.script = script

    def reset(self):
        self.errors = []

    @property
    def reported(self):
        return None

    def compute(self, ids):
        return {"score": next(self.script) if self.script else -torch.cat(self.errors).mean().item()}


class Numbers(BaseTask):
    script: Any = None

    def losses(self, batch):
        return {"loss_square": (self.model(batch.images) - batch.targets).square().mean()}

    def metric(self, split):
        return Judge(self.script)

    def update(self, metric, batch):
        errors = (self.model(batch.images) - batch.targets).square()
        metric.errors.append(errors.flatten())
        return errors, {"loss_square": errors.mean()}


class Tied(nn.Module):
    """One weight and one batch norm under two names each, as shared heads and tied embeddings have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3 * 6 * 6, 3 * 6 * 6, bias=False), nn.BatchNorm1d(3 * 6 * 6)
        self.second, self.again = nn.Linear(3 * 6 * 6, 3 * 6 * 6), self.norm
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(self.again(x.flatten(1))))).mean(dim=1, keepdim=True)


class Body(nn.Module):
    """A stem and two stages, with batch norms or without."""

    def __init__(self, norms=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norms else nn.Identity()
        for i in (1, 2):
            norm = nn.BatchNorm2d(4) if norms else nn.Identity()
            self.add_module(f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.Tanh()))
        self.stages = {"stem": ("conv1", "bn1"), "layer1": ("layer1",), "layer2": ("layer2",)}

    def forward(self, x):
        return self.layer2(self.layer1(self.bn1(self.conv1(x))))


def network(norms=True, freeze_at=0):
    torch.manual_seed(0)
    body = Body(norms)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 1))
    if freeze_at:
        with torch.no_grad():  # statistics that are none of an identity
            body.train()(torch.randn(8, 3, 6, 6))
        freeze(body, freeze_at)
    return nn.Sequential(body, head)


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
FLAT = partial(warmup_multistep, milestones=[])


def fit(
    folder,
    *callbacks,
    model=None,
    optimizer=SGD,
    scheduler=warmup_cosine,
    batch_size=4,
    resume=None,
    script=None,
    kind=Numbers,
    max_epochs=3,
    monitor="val/score",
    **settings,
):
    """Trains as `tasks.run` does; returns trainer and task."""
    saving = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    task_settings = {k: settings.pop(k) for k in ("body_lr_decay", "reference_batch_size") if k in settings}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[
            *callbacks,
            RunCheckpoint(filename="best", monitor=monitor, mode="max", **saving),
            RunCheckpoint(filename="last", save_on_train_epoch_end=True, **saving),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=JsonlLogger(folder),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )
    task = kind(network() if model is None else model, optimizer, scheduler, **task_settings)
    task.script = script and iter(script)
    trainer.fit(task, datamodule=PointData(batch_size), ckpt_path=resume, weights_only=True)
    return trainer, task


class Recorder(Callback):
    """What learns and its buffers after each step of the optimizer."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.states):
            self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def last(folder):
    return read_checkpoint(folder / "checkpoints/last.ckpt")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def interrupted(tmp_path):
    """Trains, and is stopped by a SIGINT at (training or validation, epoch, batch)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(folder, *callbacks, at, **settings):
        when, epoch, batch = at

        class Stopped(Numbers):
            def _signal(self, stage, batch_idx):
                if (stage, self.current_epoch, batch_idx) == (when, epoch, batch):
                    signal.raise_signal(signal.SIGINT)

            def training_step(self, batch, batch_idx):
                self._signal("training", batch_idx)
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch, batch_idx):
                self._signal("validation", batch_idx)
                return super().validation_step(batch, batch_idx)

        path = folder / "checkpoints/last.ckpt"
        with pytest.raises(Interrupted):
            fit(folder, *callbacks, StopOnSignal(path), kind=Stopped, **settings)
        return path

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# The average.


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (2, 1), (1, 2)])
def test_the_average_is_the_one_of_the_formula(tmp_path, every, accumulate):
    recorder = Recorder()
    fit(tmp_path, recorder, EMA(decay=0.5, every_n_steps=every), accumulate_grad_batches=accumulate)
    seen = recorder.states[every - 1 :: every]
    assert len(seen) == 12 // (every * accumulate)
    average = {name: value.double() for name, value in seen[0].items()}
    for n, state in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {k: decay * v + (1 - decay) * state[k].double() for k, v in average.items()}
    kept = last(tmp_path)["state_dict"]
    floats = [name for name in kept if kept[name].is_floating_point()]
    assert any(name.endswith("running_var") for name in floats)
    for name in floats:
        torch.testing.assert_close(kept[name].double(), average[name], rtol=1e-5, atol=1e-7)
    counts = [name for name in kept if name.endswith("num_batches_tracked")]
    assert [kept[name].item() for name in counts] == [12] * 3


def test_the_average_is_judged_kept_and_left_in_the_network_and_the_weights_learn_as_without(tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    fit(plain)
    _, task = fit(averaged, EMA(decay=0.9))
    best, end = read_checkpoint(averaged / "checkpoints/best.ckpt"), last(averaged)
    assert same(end["current_model_state"], last(plain)["state_dict"])
    assert not same(end["state_dict"], end["current_model_state"])
    assert same(dict(task.state_dict()), end["state_dict"])

    judged = network().eval()
    judged.load_state_dict({k.removeprefix("model."): v for k, v in best["state_dict"].items()})
    batch = collate([Points()[i] for i in range(IMAGES)])
    with torch.no_grad():
        score = -(judged(batch.images) - batch.targets).square().mean().item()
    scores = [line["val/score"] for line in read_metrics(averaged) if "val/score" in line]
    assert max(scores) == pytest.approx(score, rel=1e-5)
    others = [line["val/score"] for line in read_metrics(plain) if "val/score" in line]
    assert all(a != b for a, b in zip(scores, others, strict=True))


def test_before_its_first_update_there_is_no_average(tmp_path):
    """Lightning 2.6's own swaps the initial weights in and judges them (Lightning #21724)."""
    fit(tmp_path / "plain", max_epochs=2)
    fit(tmp_path / "averaged", EMA(every_n_steps=6), max_epochs=2)  # in the second epoch of four steps
    first, second = (
        [line["val/score"] for line in read_metrics(tmp_path / name) if "val/score" in line]
        for name in ("plain", "averaged")
    )
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("at", [("training", 1, 1), ("training", 1, 3), ("validation", 1, 0)])
def test_an_interrupted_run_goes_on_with_its_average_bit_for_bit(tmp_path, interrupted, at):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole, EMA(decay=0.9), model=network(freeze_at=1))
    path = interrupted(stopped, EMA(decay=0.9), at=at, model=network(freeze_at=1))
    middle = read_checkpoint(path)
    assert not same(middle["state_dict"], middle["current_model_state"])
    fit(stopped, EMA(decay=0.9), model=network(freeze_at=1), resume=path)
    for key in ("state_dict", "current_model_state"):
        assert same(last(stopped)[key], last(whole)[key])
    assert last(stopped)["averaging_state"] == last(whole)["averaging_state"]
    scores = [
        [line["val/score"] for line in read_metrics(folder) if "val/score" in line]
        for folder in (whole, stopped)
    ]
    assert scores[0] == scores[1]


def test_what_is_frozen_is_not_kept_twice(tmp_path):
    fit(tmp_path, EMA(), model=network(freeze_at=1), max_epochs=1)
    kept = last(tmp_path)
    frozen, learned = "model.0.conv1.weight", "model.1.1.weight"
    places = {
        name: [kept[key][name].data_ptr() for key in ("state_dict", "current_model_state")]
        for name in (frozen, learned)
    }
    assert len(set(places[frozen])) == 1
    assert len(set(places[learned])) == 2


def test_a_run_without_an_average_may_begin_one_when_it_goes_on(tmp_path):
    fit(tmp_path, max_epochs=1)
    fit(tmp_path, EMA(), max_epochs=2, resume=tmp_path / "checkpoints/last.ckpt")
    assert last(tmp_path)["averaging_state"]["updates"] == 4


def test_a_tensor_of_two_names_is_averaged_once_and_the_weights_learn_as_without(tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    fit(plain, model=Tied())
    fit(averaged, EMA(decay=0.9), model=Tied())
    end = last(averaged)
    assert same(end["current_model_state"], last(plain)["state_dict"])
    assert not same(end["state_dict"], end["current_model_state"])
    for one, other in (("first.weight", "second.weight"), ("norm.running_var", "again.running_var")):
        for key in ("state_dict", "current_model_state"):
            assert torch.equal(end[key][f"model.{one}"], end[key][f"model.{other}"])


def test_an_average_is_of_one_fit(tmp_path):
    """The object may be used again: the next fit begins its own."""
    average = EMA(decay=0.9)
    for name in ("one", "two"):
        fit(tmp_path / name, average)
    assert same(last(tmp_path / "one")["state_dict"], last(tmp_path / "two")["state_dict"])
    assert last(tmp_path / "two")["averaging_state"]["updates"] == 12


def test_the_recipe_names_the_average_and_one_that_never_begins(tmp_path, capsys):
    _, task = fit(tmp_path / "one", EMA(decay=0.99, every_n_steps=2), max_epochs=1)
    assert str(task.recipe).endswith("; average of decay 0.99 every 2 steps")
    assert "warning: " not in capsys.readouterr().out
    fit(tmp_path / "two", EMA(every_n_steps=5), max_epochs=1)
    said = "warning: callbacks.ema.every_n_steps=5 is more than the run has, 4 steps: there is no average"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("key", ["state_dict", "current_model_state"])
def test_weights_that_are_not_finite_are_not_written_averaged_or_not(tmp_path, key):
    weights = {"state_dict": {"a": torch.ones(2)}, "current_model_state": {"a": torch.ones(2)}}
    AtomicCheckpointIO().save_checkpoint(weights, tmp_path / "last.ckpt")
    diverged = {**weights, key: {"a": torch.tensor([1.0, math.nan])}}
    with pytest.raises(UsageError, match="a is not finite"):
        AtomicCheckpointIO().save_checkpoint(diverged, tmp_path / "last.ckpt")


WRONG = [{"decay": 1.0}, {"decay": -0.1}, {"decay": None}, {"every_n_steps": 0}, {"every_n_steps": None}]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_average_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=r"callbacks\.ema\."):
        EMA(**wrong)


# Unfreezing.


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_frozen_stages_move_by_no_bit_before_their_epoch(tmp_path, optimizer):
    model, recorder = network(freeze_at=3), Recorder()
    before = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    learns = {"0.conv1": 4, "0.layer1.0": 4, "0.layer2.0": 2, "1.1": 1}  # from which epoch on
    fit(tmp_path, recorder, Unfreezing({2: 2, 4: 0}), model=model, optimizer=optimizer, max_epochs=4)
    assert {name for name, _ in model.named_parameters()} == {
        f"{part}.{kind}" for part in learns for kind in ("weight", "bias")
    }
    assert len(recorder.states) == 16
    for name, value in before.items():
        begin = next((e for part, e in learns.items() if name.startswith(f"model.{part}.")), math.inf)
        steps = [value, *(state[name] for state in recorder.states)]
        moved = [not torch.equal(a, b) for a, b in pairwise(steps)]
        assert moved == [step // 4 + 1 >= begin for step in range(16)], name  # constant norms never


def test_unfreezing_changes_no_output():
    """What is frozen in the beginning has the norms of evaluation, and keeps them."""
    frozen, free = network(freeze_at=3), network(freeze_at=3)
    free.requires_grad_(True)
    images = torch.randn(4, 3, 6, 6)
    assert torch.equal(frozen.train()(images), free.train()(images))


def test_unfreezing_goes_on_within_an_epoch(tmp_path, interrupted):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    parts = {"optimizer": ADAMW, "max_epochs": 3}
    fit(whole, Unfreezing({2: 1, 3: 0}), EMA(), model=network(freeze_at=3), **parts)
    at = ("training", 1, 1)
    path = interrupted(stopped, Unfreezing({2: 1, 3: 0}), EMA(), at=at, model=network(freeze_at=3), **parts)
    fit(stopped, Unfreezing({2: 1, 3: 0}), EMA(), model=network(freeze_at=3), resume=path, **parts)
    assert same(last(whole)["state_dict"], last(stopped)["state_dict"])
    assert same(last(whole)["current_model_state"], last(stopped)["current_model_state"])


def test_the_recipe_says_what_learns_when(tmp_path):
    _, task = fit(tmp_path, Unfreezing({2: 2, 3: 1}), model=network(freeze_at=3), max_epochs=3)
    head, convolution, stem = 64 + 1, 4 * 4 * 9 + 4, 4 * 3 * 9 + 4
    two = head + 2 * convolution
    assert task.recipe.learning_parameters == {"1": head, "2": head + convolution, "3": two}
    assert task.recipe.frozen_parameters == stem
    said = f"({stem} frozen; {head} from epoch 1 on, {head + convolution} from epoch 2 on, "
    assert f"{said}{two} from epoch 3 on learn)" in str(task.recipe)


@pytest.mark.parametrize(
    ("schedule", "freeze_at", "message"),
    [
        ({2: 3}, 3, "must fall"),
        ({2: 1, 3: 1}, 3, "must fall"),
        ({3: 1, 2: 0}, 3, "must fall"),
        ({2: -1}, 3, "must fall"),
        ({2: 0}, 0, "must fall"),  # nothing is frozen
        ({4: 0}, 3, "ends with epoch 3"),
        ({1: 0}, 3, "epochs count from 1"),
        ({}, 3, "is wanted"),
        ({2: 0.5}, 3, "is wanted"),
        ({2: True}, 3, "is wanted"),
        (2, 3, "is wanted"),
    ],
)
def test_a_schedule_of_unfreezing_that_cannot_be_is_refused(tmp_path, schedule, freeze_at, message):
    with pytest.raises(UsageError, match=rf"backbone\.unfreeze=.*{message}") as refused:
        fit(tmp_path, Unfreezing(schedule), model=network(freeze_at=freeze_at))
    assert "\n" not in str(refused.value)


def test_unfreezing_on_several_devices_is_refused():
    """DDP waits for a gradient of all that is to learn at some time."""
    with pytest.raises(UsageError, match=r"backbone\.unfreeze=\{2: 0\}: on 2 devices .*trainer\.devices=1"):
        Unfreezing({2: 0}).setup(SimpleNamespace(world_size=2), nn.Identity(), "fit")


@pytest.mark.parametrize("schedule", ["soon", {2: "a"}, {}])
def test_an_unfreezing_that_cannot_be_is_refused_before_a_batch_size_is_looked_for(schedule):
    cfg, _ = composed("trainer=cpu")
    cfg.backbone.unfreeze = schedule
    with pytest.raises(UsageError, match=r"backbone\.unfreeze="):
        settle_batch_size(cfg, None, None, None)


def test_unfreezing_needs_a_body_with_stages(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 1))
    with pytest.raises(UsageError, match=r"backbone\.unfreeze=\{2: 0\}: .*`stages`"):
        fit(tmp_path, Unfreezing({2: 0}), model=model)


# Rates by stage.


def test_stages_of_the_body_learn_more_slowly_the_lower_they_are(tmp_path):
    scheduler = partial(warmup_multistep, warmup=2, milestones=[0.5], gamma=0.1)
    trainer, task = fit(
        tmp_path, LearningRateMonitor("step"), scheduler=scheduler, body_lr_decay=0.5, reference_batch_size=8,
        max_epochs=2,
    )  # fmt: skip
    rate = 0.05 * 4 / 8
    rates = {"heads": rate, "layer2": rate / 2, "layer1": rate / 4, "stem": rate / 8}
    assert task.recipe.learning_rates == pytest.approx(rates)
    assert "heads 0.025, layer2 0.0125, layer1 0.00625, stem 0.00313" in str(task.recipe)

    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    for stage, wanted in rates.items():
        for name, decay in ((stage, 0.01), (f"{stage}_undecayed", 0.0)):
            assert groups[name]["initial_lr"] == pytest.approx(wanted)
            assert groups[name]["weight_decay"] == decay
    assert {id(p) for p in groups["layer1"]["params"]} == {id(task.model[0].layer1[0].weight)}
    learned = [p for group in groups.values() for p in group["params"]]
    assert len(learned) == len({id(p) for p in learned}) == len(list(task.model.parameters()))

    factors = [1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.1, 0.1]
    for stage, wanted in rates.items():
        for name in (stage, f"{stage}_undecayed"):
            key = f"lr-SGD/{name}"
            logged = [line[key] for line in read_metrics(tmp_path) if key in line]
            assert logged == pytest.approx([wanted * factor for factor in factors])


def test_a_decay_of_one_is_none(tmp_path):
    fit(tmp_path / "one", body_lr_decay=1.0, max_epochs=1)
    fit(tmp_path / "none", max_epochs=1)
    assert same(last(tmp_path / "one")["state_dict"], last(tmp_path / "none")["state_dict"])


@pytest.mark.parametrize("wrong", [0.0, 1.5, -1.0, "abc", True])
def test_a_decay_out_of_range_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"task\.body_lr_decay="):
        fit(tmp_path, body_lr_decay=wrong)


@pytest.mark.parametrize("build", [faster_rcnn, retinanet, fcos, semantic_fpn, deeplabv3, Classifier])
def test_the_body_is_found_in_every_network(build):
    with torch.device("meta"):
        body = ResNeXt([1, 1, 1, 1], output_stride=8 if build is deeplabv3 else None)
        found = parameters_by_stage(build(body, num_classes=2), "")
    assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert found["stem"] == [body.conv1.weight, body.bn1.weight, body.bn1.bias]
    assert [p for parameters in found.values() for p in parameters] == list(body.parameters())


# Early stopping.


@pytest.mark.parametrize(
    ("scores", "every", "epochs"),
    [
        ([1, 2, 2, 1.5, 3], 1, 4),  # two validations in a row bring nothing better
        ([1, 2, 2, 1.5, 3], 2, 8),  # validations are counted, not epochs
        ([1, 1.05, 1.1, 3], 1, 3),  # by less than min_delta
        ([1, math.nan, math.nan, 0.5, math.nan, 2, 1, 1, 1], 1, 8),  # NaN says nothing
        ([math.nan] * 9, 1, 9),
    ],
)
def test_a_run_that_gets_no_better_ends(tmp_path, capsys, scores, every, epochs):
    stop = StopEarly("val/score", "max", patience=2, min_delta=0.2)
    most = epochs if math.isnan(scores[-1]) else epochs + every
    fit(tmp_path, stop, script=scores, max_epochs=most, check_val_every_n_epoch=every)
    assert last(tmp_path)["epoch"] + 1 == epochs
    printed = capsys.readouterr().out
    reason = "val/score has not risen by more than 0.2 in 2 validations; the best was"
    assert (f"stopped after epoch {epochs}: {reason}" in printed) == (not math.isnan(scores[0]))


def test_a_stopped_run_trains_on_with_more_patience_only(tmp_path, capsys):
    fit(tmp_path, StopEarly("val/score", "min", patience=1), script=[1, 2], max_epochs=6)
    path = tmp_path / "checkpoints/last.ckpt"
    assert last(tmp_path)["epoch"] == 1
    capsys.readouterr()
    fit(tmp_path, StopEarly("val/score", "min", patience=1), script=[2], max_epochs=6, resume=path)
    assert last(tmp_path)["epoch"] == 1
    stopped = "stopped after epoch 2: val/score has not fallen in 1 validation; the best was 1; to train on, "
    assert f"{stopped}resume with callbacks.early_stopping.patience=2" in capsys.readouterr().out
    fit(tmp_path, StopEarly("val/score", "min", patience=3), script=[2, 2, 2], max_epochs=6, resume=path)
    assert last(tmp_path)["epoch"] == 3  # one validation was counted before


def test_a_stop_is_said_once_when_it_comes(tmp_path, capsys):
    """And not where `trainer.min_epochs` has the run go on, or where it is at its end anyhow."""
    stop = StopEarly("val/score", "max", patience=1)
    fit(tmp_path / "least", stop, script=[1, 0, 0, 0, 0, 0], max_epochs=6, min_epochs=4)
    assert last(tmp_path / "least")["epoch"] == 3
    assert re.findall("stopped after epoch .", capsys.readouterr().out) == ["stopped after epoch 4"]
    stop = StopEarly("val/score", "max", patience=1)
    fit(tmp_path / "better", stop, script=[1, 0, 2, 0], max_epochs=4, min_epochs=4)
    assert "stopped after" not in capsys.readouterr().out
    stop = StopEarly("val/score", "max", patience=1)
    fit(tmp_path / "again", stop, script=[1, 0, 2, 3, 0], max_epochs=6, min_epochs=3)
    assert last(tmp_path / "again")["epoch"] == 4  # the third is better again
    assert re.findall("stopped after epoch .", capsys.readouterr().out) == ["stopped after epoch 5"]


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"patience": None}, {"min_delta": -1}, {"min_delta": None}]
)
def test_early_stopping_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=r"callbacks\.early_stopping: "):
        StopEarly("val/score", "max", **wrong)


def test_early_stopping_refuses_what_is_not_measured(tmp_path):
    with pytest.raises(UsageError, match=r"monitor=val/nothing: .*val/score"):
        fit(tmp_path, StopEarly("val/nothing", "max"))


# Accumulation and clipping.


def test_two_batches_of_two_are_one_of_four(tmp_path):
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        folder = tmp_path / str(batch_size)
        _, task = fit(
            folder, model=network(norms=False), batch_size=batch_size, accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5, reference_batch_size=16,
        )  # fmt: skip
        assert task.recipe.learning_rate == pytest.approx(0.05 * 4 / 16)
        assert task.recipe.total_steps == last(folder)["global_step"] == 12
        ends.append(last(folder)["state_dict"])
    assert not torch.equal(ends[0]["model.1.1.weight"], network(norms=False)[1][1].weight)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)


def test_the_last_batches_of_an_epoch_step_too(tmp_path):
    recorder = Recorder()
    _, task = fit(tmp_path, recorder, accumulate_grad_batches=3, max_epochs=2)  # of four batches an epoch
    assert task.recipe.total_steps == last(tmp_path)["global_step"] == len(recorder.states) == 4
    weights = [state["model.1.1.weight"] for state in recorder.states]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))


@pytest.mark.parametrize(
    ("at", "steps"),
    [(("training", 1, 0), 3), (("training", 1, 1), 3), (("training", 1, 3), 4), (("validation", 1, 0), 4)],
)
def test_a_stop_waits_for_the_gradients_that_are_accumulated(tmp_path, interrupted, at, steps):
    """Stopped after any of the batches of which three make a step: nothing of their sum is lost."""
    settings = {"accumulate_grad_batches": 3, "optimizer": ADAMW}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole, EMA(), **settings)
    path = interrupted(stopped, EMA(), at=at, **settings)
    assert read_checkpoint(path)["global_step"] == steps
    fit(stopped, EMA(), resume=path, **settings)
    for key in ("state_dict", "current_model_state"):
        assert same(last(stopped)[key], last(whole)[key])


BY_TWO = {"val_check_interval": 2}  # of four batches an epoch
BY_SIX = {"val_check_interval": 6, "check_val_every_n_epoch": None}  # wherever epochs end


@pytest.mark.parametrize(
    ("at", "validations", "settings"),
    [
        (("training", 1, 1), 6, BY_TWO),
        (("validation", 1, 0), 6, BY_TWO),
        (("training", 1, 1), 6, {**BY_TWO, "accumulate_grad_batches": 3}),
        (("validation", 1, 0), 6, {**BY_TWO, "accumulate_grad_batches": 3}),  # one batch of three is missing
        (("training", 1, 1), 2, BY_SIX),
        (("training", 0, 3), 2, BY_SIX),
        (("training", 1, 1), 2, {**BY_TWO, "check_val_every_n_epoch": 3}),  # both of epoch 3
    ],
)
def test_a_stop_loses_no_validation(tmp_path, interrupted, at, validations, settings):
    """Also of those within an epoch, and of those whose interval is longer than an epoch."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole, **settings)
    path = interrupted(stopped, at=at, **settings)
    fit(stopped, resume=path, **settings)
    scores = [
        [(line["step"], line["val/score"]) for line in read_metrics(folder) if "val/score" in line]
        for folder in (whole, stopped)
    ]
    assert len(scores[0]) == validations
    assert scores[0] == scores[1]
    assert same(last(stopped)["state_dict"], last(whole)["state_dict"])


def test_the_accumulated_gradient_is_clipped_as_a_whole(tmp_path):
    recorder = Recorder()
    plain = partial(torch.optim.SGD, lr=1.0)
    start = {f"model.{name}": p.detach().clone() for name, p in network(norms=False).named_parameters()}
    fit(
        tmp_path, recorder, model=network(norms=False), optimizer=plain, scheduler=FLAT, max_epochs=1,
        accumulate_grad_batches=2, gradient_clip_val=1e-3,
    )  # fmt: skip
    steps = [start, *recorder.states]
    assert len(steps) == 3
    for a, b in pairwise(steps):
        length = math.sqrt(sum((b[name] - a[name]).square().sum().item() for name in a))
        assert length == pytest.approx(1e-3, rel=1e-3)


# Warm-up.


@pytest.mark.parametrize("schedule", [warmup_cosine, FLAT])
@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 2), (3, 3), (3.0, 3), (1000, 1000), (0, 0)])
def test_a_warm_up_is_a_share_or_a_number_of_steps(schedule, warmup, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, total_steps=8, warmup=warmup)
    for step in range(min(steps, 8)):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * (step + 1) / (steps + 1))
        optimizer.step()
        scheduler.step()
    if steps < 8:
        assert optimizer.param_groups[0]["lr"] == 2.0


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 2), (3, 3), (0, 0)])
def test_the_recipe_names_the_warm_up(tmp_path, capsys, warmup, steps):
    _, task = fit(tmp_path, scheduler=partial(warmup_cosine, warmup=warmup), max_epochs=2)
    assert task.recipe.warmup_steps == steps
    assert (f"8 steps in 2 epochs, warm-up {steps} steps" in str(task.recipe)) == bool(steps)
    assert "warning: " not in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path, capsys):
    fit(tmp_path, LearningRateMonitor("step"), scheduler=partial(FLAT, warmup=99), max_epochs=1)
    said = "the warm-up of 99 steps is not shorter than the run of 4 steps: the rate rises to 4.0% of 0.05"
    assert said in capsys.readouterr().out
    rates = [rate for line in read_metrics(tmp_path) for name, rate in line.items() if name.startswith("lr-")]
    assert max(rates) == pytest.approx(0.04 * 0.05)


@pytest.mark.parametrize("warmup", [-0.1, 1.5, math.nan, math.inf, None])
def test_a_warm_up_that_is_neither_is_refused(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(UsageError, match=r"scheduler\.warmup="):
        warmup_cosine(optimizer, 8, warmup=warmup)


# A run that goes on.


def composed(*words):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[*words, "run_id=x"], return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg.hydra
    return cfg, choices


def go_on(folder, *words):
    known = set(plugins.options(ROOT / "configs"))
    words = with_kept_choices([f"resume={folder}", *words], known)  # as the command line does
    cfg, choices = composed(*words)
    return resumed(cfg, words, choices, str)


@pytest.mark.parametrize(("group", "kind"), [("ema", EMA), ("early_stopping", StopEarly)])
def test_a_run_may_choose_a_callback_when_it_goes_on(tmp_path, group, kind):
    folder = open_folder(*composed("task=classification", f"runs_dir={tmp_path}"))
    built = instantiate(go_on(folder, f"{group}=default").callbacks[group])
    assert isinstance(built, kind)
    assert getattr(built, "monitor", "val/top1") == "val/top1"  # the run's, not the command line's task's


def test_a_callback_may_be_left_out_when_a_run_goes_on_but_not_its_average(tmp_path):
    folder = open_folder(*composed("ema=default", f"runs_dir={tmp_path}"))
    trainer = build_trainer(go_on(folder, "~callbacks.pictures"), folder, NAMES)
    assert not any(isinstance(callback, Pictures) for callback in trainer.callbacks)
    with pytest.raises(UsageError, match="averages its weights"):
        go_on(folder, "ema=default", "~callbacks.ema")


def test_what_is_asked_of_one_call_is_not_kept(tmp_path):
    folder = open_folder(*composed(f"runs_dir={tmp_path}"))
    before = (folder / "config.yaml").read_text()
    tested = go_on(folder, "stages=[test]", "tta=flip", "trainer.limit_test_batches=1")
    assert (tested.stages, tested.task.views, tested.trainer.limit_test_batches) == (
        ["test"],
        {"flip": True},
        1,
    )
    assert (folder / "config.yaml").read_text() == before
    trained = go_on(folder, "stages=[fit]", "tta=flip", "trainer.max_epochs=6")
    assert (trained.stages, trained.task.views, trained.trainer.max_epochs) == (["fit"], {"flip": True}, 6)
    again = go_on(folder)
    assert (again.stages, again.task.views, again.trainer.max_epochs) == (["fit", "test"], None, 6)


def test_each_call_chooses_its_views_anew(tmp_path):
    folder = open_folder(*composed("tta=flip", f"runs_dir={tmp_path}"))
    for group, views in (("none", None), ("flip", {"flip": True}), ("none", None)):
        assert go_on(folder, f"tta={group}").task.views == views
    assert go_on(folder).task.views == {"flip": True}


def test_what_a_callback_was_set_to_lasts_when_it_is_chosen_again(tmp_path):
    folder = open_folder(*composed(f"runs_dir={tmp_path}"))
    words = ["monitor=val/loss", "mode=min", "patience=1"]
    go_on(folder, "early_stopping=default", *(f"callbacks.early_stopping.{word}" for word in words))
    go_on(folder, "ema=default", "callbacks.ema.decay=0.9")
    cfg = go_on(folder, "callbacks.early_stopping.patience=2", "early_stopping=default", "ema=default")
    assert (cfg.callbacks.early_stopping.monitor, cfg.callbacks.early_stopping.patience) == ("val/loss", 2)
    assert cfg.callbacks.ema.decay == 0.9


def test_a_callback_of_the_run_is_tuned_and_dropped_when_it_goes_on(tmp_path):
    folder = open_folder(*composed("ema=default", "early_stopping=default", f"runs_dir={tmp_path}"))
    tuned = go_on(folder, "callbacks.early_stopping.patience=3", "callbacks.ema.decay=0.9").callbacks
    assert (tuned.early_stopping.patience, tuned.ema.decay) == (3, 0.9)
    for words in (["~callbacks.early_stopping"], ["early_stopping=none"], ["~early_stopping"]):
        assert go_on(folder, *words).callbacks.early_stopping is None
        assert go_on(folder, "early_stopping=default").callbacks.early_stopping.patience == 10  # afresh
    for word in ("ema=none", "~ema"):
        with pytest.raises(UsageError, match="averages its weights"):
            go_on(folder, word)


def test_an_optimizer_chosen_when_a_run_goes_on_lasts_with_its_keys(tmp_path):
    folder = open_folder(*composed("optimizer=sgd", f"runs_dir={tmp_path}"))
    assert go_on(folder, "optimizer.momentum=0.8").optimizer.momentum == 0.8  # the data's default is AdamW
    changed = go_on(folder, "optimizer.weight_decay=0.5", "optimizer=adamw").optimizer
    assert (changed["_target_"], changed.weight_decay) == ("torch.optim.AdamW", 0.5)
    assert go_on(folder, "optimizer=adamw").optimizer.weight_decay == 0.5
    assert go_on(folder, "optimizer=sgd").optimizer.momentum == 0.9


def test_a_group_that_sets_many_keys_is_not_passed_over(tmp_path):
    folder = open_folder(*composed(f"runs_dir={tmp_path}"))
    with pytest.raises(UsageError, match="augment=colour: cannot be chosen"):
        go_on(folder, "augment=colour")


NAMES = {"model": "", "backbone": "", "task": ""}


def test_a_step_is_counted_before_it_is_saved(tmp_path):
    """Ctrl-C saves after a batch what the average has made of it."""
    cfg, choices = composed("ema=default", "backbone.unfreeze={2: 0}", "trainer=cpu", f"runs_dir={tmp_path}")
    folder = open_folder(cfg, choices)
    order = [type(callback) for callback in build_trainer(cfg, folder, NAMES).callbacks]
    assert max(order.index(EMA), order.index(Unfreezing)) < order.index(StopOnSignal)


# All of them together.


@pytest.mark.parametrize(
    "words",
    [
        ["ema=default", "callbacks.ema.decay=2"],
        ["early_stopping=default", "callbacks.early_stopping.patience=0"],
        ["backbone.unfreeze=soon"],
        ["optimizer._target_=torch.optim.Nothing"],
    ],
)
def test_a_wrong_part_is_refused_before_a_folder_is_made(start, runs, words):
    with pytest.raises(UsageError, match=words[-1].split(".")[0]) as refused:
        start(*words)
    assert "\n" not in str(refused.value)
    assert not runs.exists()


@pytest.mark.slow
def test_a_run_with_all_of_them_is_judged_by_its_average(start, tmp_path, capsys):
    save_weights(resnet18(), tmp_path / "body.safetensors")
    words = [f"backbone.weights={tmp_path / 'body.safetensors'}", "backbone.freeze_at=3"]
    words += ["backbone.unfreeze={2: 1}", "task.body_lr_decay=0.8", "ema=default", "early_stopping=default"]
    folder = start(*words, "scheduler.warmup=2", "model.score_threshold=0.0")
    printed = " ".join(capsys.readouterr().err.split())  # with the progress
    assert re.search(r"recipe: .*\(heads .*, layer4 .*, layer3 .*frozen; .* from epoch 2 on learn\)", printed)
    results, recipe = (json.loads((folder / "summary.json").read_text())[k] for k in ("results", "recipe"))
    assert recipe["body_lr_decay"] == 0.8

    best = read_checkpoint(folder / "checkpoints/best.ckpt")
    learned = "model.roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(best["state_dict"][learned], best["current_model_state"][learned])
    loaded = load_task(folder, device="cpu").task.state_dict()
    assert torch.equal(loaded[learned], best["state_dict"][learned])
    body = resnet18()
    load_weights(body, folder)
    convolution = "layer4.0.conv1.weight"
    averaged = best["state_dict"][f"model.backbone.body.{convolution}"]
    assert torch.equal(body.get_parameter(convolution), averaged)
    assert not torch.equal(best["current_model_state"][f"model.backbone.body.{convolution}"], averaged)
    quiet = ["logger.wandb.mode=disabled", "trainer.accelerator=cpu"]
    again = start("stages=test", f"ckpt_path={folder}", data=[], small=quiet)
    repeated = json.loads((again / "summary.json").read_text())["results"]
    assert repeated["test/AP"] == results["test/AP"]
