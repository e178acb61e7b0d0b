"""What is asked of a task, a check each; `tasks.conformance.check_task` lists them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.checkpoint import read_checkpoint
from tasks.conforming.predicted import acceptable, alike_prepared, pixels
from tasks.conforming.runs import (
    SHORT,
    BrokenOff,
    RandomState,
    alone,
    evaluated_and_trained,
    in_two_processes,
    trainer_of,
)
from tasks.conforming.same import differing, state_of
from tasks.conforming.subject import Fault, NotApplicable, Subject, evaluated, named_losses, said
from tasks.data.images import IGNORED
from tasks.data.transforms import OF_OBJECTS
from tasks.load import load_task
from tasks.prediction.predictor import Predictor

FALLS_TO = 0.8  # of the loss of one batch
SAME = 1e-4  # between numbers of one process and of two
CPU = torch.device("cpu")


def losses(subject: Subject) -> None:
    task, _ = subject.fresh()
    batch = copy.deepcopy(subject.training)
    found = named_losses(task, batch)
    if changed := differing(batch, subject.training):
        raise Fault(f"`losses` changes the batch ({changed}); copy what is changed")
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise Fault(
                f"no gradient reaches model.{name}, which stops distributed training; use it in `losses`, or "
                "do not build it"
            )
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise Fault(f"the gradient of model.{name} is not finite")


def overfits(subject: Subject) -> str:
    subject.learned()
    assert subject.falls is not None
    before, after = subject.falls
    if not after < FALLS_TO * before:
        raise Fault(
            f"the loss of one batch went from {before:.3g} to {after:.3g} in {subject.steps} steps; at most "
            f"{FALLS_TO:g} of it should be left: are targets and outputs matched, are weights frozen? (More "
            "steps: steps=N)"
        )
    return f"from {before:.3g} to {after:.3g} in {subject.steps} steps"


def empty_targets(subject: Subject) -> None:
    if not isinstance(getattr(subject.training, "targets", None), list):
        raise NotApplicable("its batches have no `targets`: every image has one answer")
    for what, some in (("one image", 1), ("all images", None)):
        task, data = subject.fresh()
        batch = emptied(subject.training, some)
        try:
            total = torch.stack(list(named_losses(task, batch).values())).sum()
            total.backward()
            task.trainer = alone(data)
            task.eval()
            _, judged = task.update(task.metric("val"), emptied(subject.evaluation, some))
        except Fault as fault:
            raise Fault(f"with {what} of the batch empty, {fault}") from None
        except Exception as error:
            raise Fault(
                f"with {what} of the batch empty (no object, no pixel that counts) it ends in {said(error)}"
            ) from error
        if bad := [name for name, loss in judged.items() if not torch.as_tensor(loss).isfinite().all()]:
            raise Fault(f"with {what} of the batch empty, {bad[0]} is not finite in evaluation")


def evaluation(subject: Subject) -> str | None:
    task, data = subject.fresh()
    before = state_of(task)
    watch = RandomState()
    trainer = trainer_of(subject.folder, limit_val_batches=SHORT, callbacks=[watch])
    trainer.validate(task, datamodule=data, verbose=False)
    if changed := differing(state_of(task), before):
        raise Fault(
            f"evaluation changes {changed}; what is evaluated must be in evaluation mode, losses too (see "
            "tasks.models.evaluation.evaluating)"
        )
    if watch.moved:
        raise Fault(
            f"evaluation moves the random state of {watch.moved}, so how often one evaluates changes what is "
            "learned; draw within torch.random.fork_rng, or from a generator of its own"
        )
    batch = copy.deepcopy(subject.evaluation)
    with evaluated(task):
        first, second = task.predict(batch), task.predict(batch)
    if changed := differing(batch, subject.evaluation):
        raise Fault(f"`predict` changes the batch ({changed}); copy what is changed")
    if different := differing(first, second):
        raise Fault(f"two predictions of the same batch differ ({different}); what is random in evaluation?")
    if not task.numbers:
        raise Fault("the metric's `compute` gives no number of the split")
    monitor = task.record.get("config", {}).get("monitor", "")
    if str(monitor).startswith("val/") and monitor not in trainer.callback_metrics:
        there = ", ".join(sorted(map(str, trainer.callback_metrics)))
        raise Fault(f"monitor={monitor} is not among what evaluation gives: {there}")
    return None


def prediction(subject: Subject) -> str | None:
    task, data = subject.learned()
    batch = subject.evaluation
    with evaluated(task):
        found = task.predict(batch)
    number = len(batch.image_ids)
    if len(found) != number:
        raise Fault(f"`predict` gives {len(found)} entries for {number} images; give one an image, in order")
    doubt = pixels(task, batch, found)
    shown = task.picture(batch, 0, found[0], 0.5)
    if not isinstance(shown, Image.Image):
        raise Fault(f"`picture` gives a {type(shown).__name__}; give an image of Pillow")
    if "config" not in task.record:
        raise Fault("its `record` holds no configuration, so load_task could not build it; see build_task")
    dataset: Any = data.dataset("val")
    images = [dataset.load(i)[0].as_subclass(Tensor) for i in range(min(SHORT, len(dataset)))]
    predictor = Predictor(task, CPU, "32-true")
    for i, image in enumerate(images):
        alike_prepared(predictor.prepared([image])[0][0], data.prepared("val")[i][0])
    for image, given in zip(images, predictor.predict(images), strict=True):
        acceptable(given, (image.shape[-2], image.shape[-1]))
        if not isinstance(given.draw(image), Image.Image):
            raise Fault(f"{type(given).__name__}.draw gives no image of Pillow")
    return doubt


def save_and_load(subject: Subject) -> str | None:
    task, data = subject.fresh()
    trainer = trainer_of(subject.folder, max_steps=SHORT, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    file = subject.folder / "saved.ckpt"
    trainer.save_checkpoint(file)  # refuses, with its name, what is no plain container
    with evaluated(task):
        expected = task.predict(subject.evaluation)
    again, _ = subject.fresh(seed=1)
    checkpoint = read_checkpoint(file)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    with evaluated(again):
        found = again.predict(subject.evaluation)
    if different := differing(found, expected):
        raise Fault(
            f"a new task filled from the checkpoint predicts otherwise ({different}); keep what was learned "
            "in parameters and buffers, or in on_save_checkpoint and on_load_checkpoint"
        )
    note = None
    try:
        loaded = load_task(file, "cpu").task
    except UsageError as refusal:
        note = f"load_task needs trust=True, since the checkpoint {str(refusal).partition(': ')[2]}"
        loaded = load_task(file, "cpu", trust=True).task
    with evaluated(loaded):
        found = loaded.predict(subject.evaluation)
    if different := differing(found, expected):
        raise Fault(f"what load_task makes of the checkpoint predicts otherwise ({different})")
    return note


def resume(subject: Subject) -> None:
    limits = {"max_steps": 2 * SHORT, "limit_val_batches": 0}
    whole, data = subject.fresh()
    straight = trainer_of(subject.folder, **limits)
    straight.fit(whole, datamodule=data)
    file = subject.folder / "broken_off.ckpt"
    task, data = subject.fresh()
    trainer_of(subject.folder, callbacks=[BrokenOff(file)], **limits).fit(task, datamodule=data)
    again, data = subject.fresh(seed=1)
    resumed = trainer_of(subject.folder, **limits)
    resumed.fit(again, datamodule=data, ckpt_path=str(file), weights_only=True)
    for what, one, other in (
        ("the weights", state_of(again), state_of(whole)),
        ("the optimizer", *(t.optimizers[0].state_dict()["state"] for t in (resumed, straight))),
    ):
        if different := differing(one, other):
            raise Fault(
                f"broken off after {SHORT} steps and gone on with, the run ends with other numbers than one "
                f"of {2 * SHORT} steps: {what}, {different}; is something kept outside of parameters and "
                "buffers, or drawn from other random numbers than torch's?"
            )


def processes(subject: Subject) -> None:
    try:
        pickle.dumps(subject.make)
    except Exception as error:
        raise NotApplicable(
            "what makes it cannot be sent to another process; give words, or a function at the top of a "
            f"module ({said(error)})"
        ) from None
    subject.learned()
    torch.save(subject.weights, subject.folder / "learned.pt")
    numbers, _ = evaluated_and_trained(subject.make, subject.folder, 1)
    results = in_two_processes(subject.make, subject.folder)
    for name, value in numbers.items():
        for rank, (theirs, _) in enumerate(results):
            other = theirs.get(name, float("nan"))
            if not np.isclose(other, value, rtol=SAME, atol=1e-6, equal_nan=name in theirs):
                raise Fault(
                    f"{name} of the same images is {value:.6g} in one process and {other:.6g} on rank {rank} "
                    "of two; gather what was found once and judge it once (tasks.metrics.split.SplitMetric)"
                )
    if different := differing(results[0][1], results[1][1]):
        raise Fault(f"after {SHORT} steps of training two processes hold other weights ({different})")


def emptied(batch: Any, number: int | None) -> Any:
    """A batch whose first `number` images (None: all) hold no object, and no pixel that counts."""
    targets = [dict(target) for target in batch.targets]
    known = (*OF_OBJECTS, "semantic", "original_semantic")
    if not any(name in target for target in targets for name in known):
        raise NotApplicable("its targets have neither objects nor class maps, so what is empty is not known")
    for target in targets[:number]:
        for name, value in target.items():
            if name in OF_OBJECTS:
                target[name] = value[:0]
            elif name in known:
                target[name] = torch.full_like(value, IGNORED)
    return batch._replace(targets=targets)


CHECKS: tuple[Callable[[Subject], str | None], ...] = (
    *(losses, overfits, empty_targets, evaluation),
    *(prediction, save_and_load, resume, processes),
)
