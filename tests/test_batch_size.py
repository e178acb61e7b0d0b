"""`data.batch_size=auto`: the search, the trial's batches and steps, and a run that takes what was found."""

import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from small_checkpoints import made

from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.batch_size import (
    Demanding,
    Trial,
    found_batch_size,
    is_too_large,
    largest_batch,
    most_of_the_memory,
    number_of_gpus,
    refuse_auto,
)
from tasks.cli import check_types
from tasks.data.coco_data import CocoData
from tasks.detection import DetectionTask

# The search.


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 129])
@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_the_largest_that_fits_is_found(limit: int, most: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert largest_batch(fits, most) == min(limit, most)
    assert max(tried) <= most
    assert len(tried) == len(set(tried)) <= 14
    assert 1 not in tried or most == 1 or limit < 2  # batch norm may not take a single image


def test_copies_of_an_image_stay_in_one_batch() -> None:
    tried: list[int] = []
    assert largest_batch(lambda n: not tried.append(n) and n <= 17, 100, multiple=3) == 15
    assert all(n % 3 == 0 for n in tried)
    assert largest_batch(lambda n: True, 100, multiple=3) == 99
    assert largest_batch(lambda n: True, 2, multiple=3) == 3  # the sampler fills it up


@pytest.mark.parametrize(
    ("fault", "too_large"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("upsample_bilinear2d_nhwc only supports output tensors with less than INT_MAX"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_only_a_want_of_memory_counts(fault: RuntimeError, too_large: bool) -> None:
    assert is_too_large(fault) is too_large


# The trial.


@pytest.fixture
def subject(tiny_shapes: list[str]) -> Callable[[str], tuple[BaseTask, Any]]:
    """A small network of each kind and the data it is for."""

    def subject(kind: str) -> tuple[BaseTask, Any]:
        _, task, data = made(kind, tiny_shapes)
        return task, data

    return subject


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the CPU a device that steps of more than so many images do not fit; lists those of each step.

    cheap: steps without a pass through the network.
    """

    def limit(images: int, kind: type[BaseTask] = DetectionTask, cheap: bool = False) -> list[int]:
        tried: list[int] = []
        losses = kind.losses

        def step(self: Any, batch: Any) -> Any:
            tried.append(len(batch.images))
            if len(batch.images) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 EiB")
            return {"loss": next(self.parameters()).sum()} if cheap else losses(self, batch)

        monkeypatch.setattr(kind, "losses", step)
        return tried

    return limit


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


def states_of(task: BaseTask) -> Iterator[Any]:
    yield from (value.clone() for value in task.state_dict().values())
    yield from (torch.tensor(m.training) for m in task.modules())
    yield from (torch.tensor([p.requires_grad, p.grad is None]) for p in task.parameters())
    yield torch.get_rng_state()
    yield torch.tensor(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    yield torch.tensor(random.getstate()[1])


@pytest.mark.parametrize("kind", ["boxes", "semantic", "classes"])
def test_the_search_leaves_everything_as_it_was(
    subject: Any, limit: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, running statistics, modes, gradients and all random numbers, to the last bit."""
    task, data = subject(kind)
    tried = limit(5, type(task))
    before, size = list(states_of(task)), data.batch_size
    assert found_batch_size(task, data, adamw, trainer(), print) == 5
    assert tried == [2, 2, 4, 4, 8, 6, 5, 5]  # what fits takes two steps
    assert all(torch.equal(one, other) for one, other in zip(before, states_of(task), strict=True))
    assert data.batch_size == size
    said = capsys.readouterr().out
    assert "data.batch_size=auto: 5 images of up to 64×64 fit cpu" in said
    assert "10%" in said


def test_where_not_one_image_fits_it_is_said(subject: Any, limit: Any) -> None:
    task, data = subject("boxes")
    limit(0)
    with pytest.raises(UsageError, match=r"does not fit cpu; take a smaller data\.image_size"):
        found_batch_size(task, data, adamw, trainer(), print)


def test_another_fault_is_not_taken_for_a_want_of_memory(
    subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, batch: Any) -> Any:
        raise RuntimeError("sizes do not match")

    task, data = subject("boxes")
    monkeypatch.setattr(DetectionTask, "losses", step)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        found_batch_size(task, data, adamw, trainer(), print)


def test_evaluation_has_to_fit_too(
    subject: Any, limit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`val` has six images, so no batch of it is larger; `train` has sixteen."""
    task, data = subject("boxes")
    tried, seen = limit(10**6, cheap=True), []

    def tight(self: Any, batch: Any) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        seen.append(len(batch.images))
        if len(batch.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DetectionTask, "predict", tight)
    most = 3
    assert found_batch_size(task, data, adamw, trainer(), print) == 3
    seen.clear()
    most = 6
    assert found_batch_size(task, data, adamw, trainer(), print) == max(tried) == 16
    assert seen == [2, 4, 6, 6]
    assert "16 images of up to 64×64 fit cpu, all there are" in capsys.readouterr().out


def test_what_did_not_fit_is_free_before_the_next_try(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a graph or the fault's own traceback refers to."""
    held: list[weakref.ref[torch.Tensor]] = []

    def step(self: Any, batch: Any) -> Any:
        assert [ref() for ref in held] == [None] * len(held)
        activations = next(self.parameters()) * 2.0
        held.append(weakref.ref(activations))
        cycle = [activations]
        cycle.append(cycle)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("CUDA out of memory")

    task, data = subject("boxes")
    monkeypatch.setattr(DetectionTask, "losses", step)
    trial = Trial(task, adamw, trainer(), Demanding(data, "train"), Demanding(data, "val"), None)
    assert not trial.fits(2)
    assert not trial.fits(1)
    assert len(held) == 2


def test_a_tenth_of_the_free_memory_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 of 80 GB; afterwards the limit is what it was, also after a fault."""
    said: list[float] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 80))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.95)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: said.append(share)
    )

    def failing_trial() -> None:
        with most_of_the_memory(torch.device("cuda")):
            assert said == [pytest.approx(0.45)]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_trial()
    assert said[1:] == [0.95]


def test_a_step_has_the_optimizers_state_and_frozen_stages_that_will_learn(subject: Any) -> None:
    task, data = subject("boxes")
    body = task.model.backbone.body
    stage = next(iter(body.stages.values()))
    parameters = [p for name in stage for p in body.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    counts = {}
    try:
        for least_frozen in (None, 0):
            states: list[int] = []

            class Watched(torch.optim.AdamW):
                def step(self, *args: Any, **kwargs: Any) -> Any:
                    result = super().step(*args, **kwargs)
                    states.append(len(self.state))  # noqa: B023
                    return result

            demanding = Demanding(data, "train"), Demanding(data, "val")
            trial = Trial(task, Watched, trainer(), *demanding, least_frozen)
            assert trial.fits(2)
            assert len(states) == 2
            counts[least_frozen] = states[-1]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    assert counts[0] == counts[None] + len(parameters) == len(list(task.parameters()))


def test_the_most_demanding_images_are_tried(tiny_shapes: list[str]) -> None:
    """The largest of several sides, times the largest factor; most objects; both aspects' padding."""
    root = tiny_shapes[0].partition("=")[2]
    settings: dict[str, Any] = {"image_size": [[64, 96], 400], "jitter": [0.5, 1.5], "num_workers": 0}
    data = CocoData(root, "train", "val", **settings)
    annotations = data.annotations("train")
    numbers = sorted((annotations.rows(i).stop - annotations.rows(i).start for i in range(16)), reverse=True)
    sizes = annotations.sizes.double()
    scaled = (sizes * (96 * 1.5 / sizes.amin(dim=1))[:, None]).round()  # 400 × 1.5 is never reached
    demanding = Demanding(data, "train")
    padded = [-(-int(side) // 32) * 32 for side in scaled.amax(dim=0)]
    for number in (2, 5):
        batch = demanding.batch(number)
        assert list(batch.images.shape) == [number, 3, *padded]
        assert [len(target["boxes"]) for target in batch.targets] == numbers[:number]
    assert len(demanding.batch(12).targets) == 12
    largest = scaled[scaled.prod(dim=1).argmax()].tolist()
    assert list(demanding.batch(1).images.shape[-2:]) == [-(-int(side) // 32) * 32 for side in largest]
    cropped = Demanding(CocoData(root, "train", "val", **settings, crop=[64, 50]), "train")
    assert list(cropped.batch(3).images.shape) == [3, 3, 64, 64]
    evaluation = Demanding(data, "val")
    assert len(evaluation.batch(100).images) == 6
    sizes = data.annotations("val").sizes.double()
    largest = (sizes * (96 / sizes.amin(dim=1))[:, None]).round().prod(dim=1).max()
    assert evaluation.batch(1).sizes.prod() == largest


def test_on_the_command_line_no_other_word_stands_for_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for word in ("data.batch_size=auto", "data.num_workers=null"):
            check_types(compose("train", overrides=[word]), [word], {"data", "task"}, "train")
        word = "data.batch_size=automatic"
        with pytest.raises(SystemExit):
            check_types(compose("train", overrides=[word]), [word], {"data", "task"}, "train")
    assert "data.batch_size=automatic: a whole number is wanted" in capsys.readouterr().err


# Where it is refused.


def asked(stages: list[str], **given: Any) -> None:
    cfg = OmegaConf.create({"data": {"batch_size": "auto"}, "trainer": {"accelerator": "auto", **given}})
    refuse_auto(cfg, stages)


def test_it_is_for_one_gpu_and_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for devices in (1, "1", [3], "3,", [0]):
        asked(["fit", "test"], devices=devices)
    for devices in (2, "2", [0, 1], "0,1", "auto", -1, "-1"):
        with pytest.raises(UsageError, match=r"one GPU, trainer\.devices=.* are more"):
            asked(["fit"], devices=devices)
    with pytest.raises(UsageError, match="one GPU"):
        asked(["fit"], devices=1, num_nodes=2)
    with pytest.raises(UsageError, match="on a CPU give a number"):
        asked(["fit"], devices=1, accelerator="cpu")
    with pytest.raises(UsageError, match="has no fit"):
        asked(["test"], devices=1)
    asked(["check"], devices=1, accelerator="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"on a CPU give a number, e\.g\. data\.batch_size=4"):
        asked(["fit"], devices=1)
    refuse_auto(OmegaConf.create({"data": {"batch_size": 4}, "trainer": {}}), ["fit"])


def test_devices_are_counted_as_lightning_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [number_of_gpus(d) for d in ("auto", -1, "-1", 2, "2", [1, 2], "1,2", "1,")] == [
        4,
        4,
        4,
        2,
        2,
        2,
        2,
        1,
    ]


def test_no_other_word_is_a_batch_size() -> None:
    for wrong in ("automatic", 0, -1, 2.5, None):
        with pytest.raises(UsageError, match=r"data\.batch_size"):
            CocoData("x", "train", "val", batch_size=wrong)
    assert CocoData("x", "train", "val", batch_size="auto").batch_size == 1


# In a run.


def test_a_run_on_a_cpu_is_refused_before_anything_is_written(start: Any, runs: Path) -> None:
    with pytest.raises(UsageError, match="on a CPU give a number"):
        start("data.batch_size=auto")
    assert not runs.exists()


def test_a_run_takes_what_was_found(start: Any, limit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fit, its recipe, configuration and checkpoint; a resumed run takes the same number."""
    limit(5, cheap=True)
    monkeypatch.setattr("tasks.run.refuse_auto", lambda cfg, stages: None)
    small = [word for word in SMALL if not word.startswith("data.batch_size")]
    few = ["trainer.max_epochs=1", "stages=[fit]", "trainer.limit_val_batches=1"]
    run = start(
        "data.batch_size=auto", "task.reference_batch_size=2", "optimizer.lr=0.001", *few, small=small
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 5
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["record"]["config"]["data"]["batch_size"] == 5
    recipe = yaml.safe_load((run / "summary.json").read_text())["recipe"]
    assert recipe["batch_size"] == 5
    assert recipe["learning_rate"] == pytest.approx(0.001 * 5 / 2)
    assert recipe["total_steps"] == 4  # 16 images
    start(f"resume={run}", "trainer.max_epochs=2")
    again = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert again["global_step"] == 8
