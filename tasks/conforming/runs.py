"""Short runs: evaluated, broken off, in two processes."""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from tasks.checkpoint import AtomicCheckpointIO
from tasks.conforming.same import random_state
from tasks.conforming.subject import Fault, Made, made
from tasks.data.module import ImageData
from tasks.terminal import hush

SHORT = 2  # steps before a run is broken off, and after it; batches that are evaluated
PATIENCE = 600  # seconds for two processes


def trainer_of(folder: Path, **settings: Any) -> Trainer:
    """As `tasks.building.build_trainer`, without a run's loggers and callbacks."""
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "gradient_clip_val": 10.0, **settings},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def alone(data: ImageData) -> Any:
    """What `metric` asks of a trainer, without one."""
    return SimpleNamespace(datamodule=data, world_size=1, global_rank=0, is_global_zero=True)


class RandomState(Callback):
    """Notes whose random state a step of evaluation moves."""

    def __init__(self) -> None:
        self.moved = ""

    def on_validation_batch_start(self, *_: Any) -> None:
        self._before = random_state()

    def on_validation_batch_end(self, *_: Any) -> None:
        after = random_state()
        self.moved = self.moved or ", ".join(name for name in after if after[name] != self._before[name])


class BrokenOff(Callback):
    """Saves after some steps and stops, in the middle of an epoch where it is long enough."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == SHORT:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def evaluated_and_trained(
    make: Callable[[], Made], folder: Path, devices: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The numbers of the same images for any number of processes, and the parameters after some steps."""
    task, data = made(make, 0)
    task.load_state_dict(torch.load(folder / "learned.pt", weights_only=True))
    strategy = "ddp" if devices > 1 else "auto"
    batches = 2 * SHORT // devices
    settings = {"devices": devices, "strategy": strategy}
    trainer_of(folder, limit_val_batches=batches, **settings).validate(task, datamodule=data, verbose=False)
    numbers = {name: float(value) for name, value in task.numbers.items()}
    if devices > 1:
        task, data = made(make, 0)
        trainer_of(folder, max_steps=SHORT, limit_val_batches=0, **settings).fit(task, datamodule=data)
    return numbers, {name: p.detach().clone() for name, p in task.model.named_parameters()}


def one_of_two(rank: int, make: Callable[[], Made], folder: Path) -> None:
    """What each of two processes does; both leave what they found in `folder`."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # Lightning then starts no process of its own
    torch.set_num_threads(1)
    hush()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with quiet():
        torch.save(evaluated_and_trained(make, folder, 2), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a run tells its user is not told."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_two_processes(
    make: Callable[[], Made], folder: Path
) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """What `evaluated_and_trained` gives in each of two processes on this machine, by rank."""
    context = torch.multiprocessing.start_processes(
        one_of_two, (make, folder), 2, join=False, start_method="spawn"
    )
    began = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - began > PATIENCE:
            for process in context.processes:
                process.kill()
            raise Fault(f"two processes did not end in {PATIENCE} s: does one wait for what the other skips?")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
