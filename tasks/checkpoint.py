"""Checkpoints: written whole or not at all, holding nothing but plain containers and tensors."""

import contextlib
import errno
import os
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from resnext_backbones.errors import UsageError

# What torch.load(weights_only=True) reads back without being told of further classes. Compared by identity:
# numpy.float64 is a float and torchvision's boxes are tensors, but both save and then cannot be loaded.
LEAVES = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)
TENSORS = (torch.Tensor, torch.nn.Parameter)
MAPPINGS = (dict, OrderedDict, Counter)
SEQUENCES = (list, tuple, set)

LEARNED = {"state_dict", "current_model_state"}  # the second beside an average (tasks/ema.py)

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
PART = re.compile(r"\..+\.(?P<pid>\d+)\.part")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reader and writer of checkpoints, for `Trainer(plugins=[AtomicCheckpointIO()])`.

    The file is written beside its final name, flushed to the disk and renamed, so that under that name there
    is at every moment either the old checkpoint or the new one. (Lightning's own writer goes through
    $TMPDIR: on another file system its last step is a copy, and a kill leaves half a file.)
    """

    def __init__(self) -> None:
        self._swept: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, whole or not at all.

        Raises:
            UsageError: an entry would not load again without unpickling, a weight, averaged or learning, is
                not finite, or the folder is full or cannot be written to. What stood at `path` is intact.
        """
        if storage_options is not None:
            raise TypeError("storage_options: local files have none")
        path = Path(path)
        refuse_unloadable(checkpoint, path.name)
        for weights in LEARNED & checkpoint.keys():
            refuse_non_finite(checkpoint[weights], path.name)
        if path.parent not in self._swept:
            self._swept.add(path.parent)
            sweep(path.parent)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as fault:
            if is_disk_full(fault):
                kept = f"; the previous checkpoint {path.name} is intact" if path.exists() else ""
                raise UsageError(
                    f"no space left: need about {megabytes(size_of(checkpoint))}, "
                    f"have {megabytes(shutil.disk_usage(path.parent).free)} in {path.parent}{kept}"
                ) from fault
            if isinstance(fault, OSError):
                raise UsageError(f"{path}: cannot be written: {fault.strerror or fault}") from fault
            raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint; never unpickles, whatever `weights_only` says.

        Raises:
            UsageError: the file is missing, cut short, or not a checkpoint.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"{path}: no such checkpoint file; give a .ckpt file or the folder of a run")
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except torch.OutOfMemoryError:
            raise
        except PermissionError as fault:
            raise UsageError(f"{path}: cannot be read: {fault.strerror}") from fault
        except Exception as fault:  # torch raises half a dozen kinds and promises none
            reason = str(fault).strip().split("\n")[0][:120] or type(fault).__name__
            raise UsageError(
                f"{path}: not a whole checkpoint of plain containers and tensors ({reason}); "
                "give another file, or the run's other checkpoint"
            ) from fault
        if not (isinstance(checkpoint, dict) and "state_dict" in checkpoint):
            raise UsageError(
                f"{path}: no training checkpoint, `state_dict` is missing; give a run's .ckpt file"
            )
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file at `path`, if there is one."""
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Nothing is held between two calls."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's callback, which also finds its best checkpoint again where a run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(self.dirpath or "", os.path.basename(path)) if path else path

        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        moved = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file to go on from: see `read_checkpoint`, which also gives its content."""
    return _find_and_read(Path(path))[0]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: a checkpoint file, or a run's folder: then `checkpoints/last.ckpt`, or, with a warning,
            `checkpoints/best.ckpt` where `last.ckpt` is missing or damaged.

    Raises:
        UsageError: there is no readable checkpoint.
    """
    return _find_and_read(Path(path))[1]


def _find_and_read(path: Path) -> tuple[Path, dict[str, Any]]:
    io = AtomicCheckpointIO()
    if not path.is_dir():
        return path, io.load_checkpoint(path)
    last, best = path / "checkpoints/last.ckpt", path / "checkpoints/best.ckpt"
    if not last.exists() and not best.exists():
        raise UsageError(f"{path}: holds no checkpoints/last.ckpt to go on from; give the folder of a run")
    try:
        return last, io.load_checkpoint(last)
    except UsageError as fault:
        if not best.exists():
            raise
        checkpoint = io.load_checkpoint(best)
        rank_zero_warn(
            f"{fault}. GOING ON FROM {best} INSTEAD (epoch {checkpoint.get('epoch')}, "
            f"step {checkpoint.get('global_step')})"
        )
        return best, checkpoint


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to; when the block ends well it takes the place of `path` at once.

    A fault, a Ctrl-C and a kill leave what stood at `path` before; only a kill leaves the part behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some network and FUSE folders refuse to be opened or synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path) -> None:
    """Remove the parts that killed processes left in `folder`."""
    for part in folder.glob(".*.part"):
        name = PART.fullmatch(part.name)
        # Our own number is a dead writer's too: in containers every restart gets the same one.
        if name and (int(name["pid"]) == os.getpid() or not is_alive(int(name["pid"]))):
            part.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def is_disk_full(fault: BaseException | None) -> bool:
    """Whether a write failed for want of space; torch's writer hides that behind a mismatch of positions."""
    while fault is not None:
        if (isinstance(fault, OSError) and fault.errno in NO_SPACE) or "unexpected pos" in str(fault):
            return True
        fault = fault.__context__
    return False


def refuse_unloadable(value: Any, name: str, where: str = "") -> None:
    """Raise UsageError, naming the entry, if `value` holds what torch.load(weights_only=True) refuses."""
    kind = type(value)
    if kind in LEAVES or kind in TENSORS:
        return
    if kind in MAPPINGS:
        for key, entry in value.items():
            refuse_unloadable(key, name, f"{where}[key {key!r}]")
            refuse_unloadable(entry, name, f"{where}[{key!r}]")
    elif kind in SEQUENCES:
        for index, entry in enumerate(value):
            refuse_unloadable(entry, name, f"{where}[{index}]")
    else:
        raise UsageError(
            f"{name} is not written: checkpoint{where} is a {kind.__module__}.{kind.__qualname__}, which "
            "would not load again; save plain numbers, strings, lists, dicts and tensors only"
        )


def refuse_non_finite(state: dict[str, Any], name: str) -> None:
    """Raise UsageError if a tensor of `state` holds NaN or an infinity."""
    for key, value in state.items():
        if (
            isinstance(value, torch.Tensor)
            and (value.is_floating_point() or value.is_complex())
            and not value.isfinite().all()
        ):
            raise UsageError(
                f"{name} is not written: {key} is not finite, the training has diverged; what stood there is "
                "intact. Lower the learning rate or lengthen the warm-up"
            )


def size_of(value: Any) -> int:
    """Bytes of the tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, SEQUENCES):
        return 0
    return sum(map(size_of, value))


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
