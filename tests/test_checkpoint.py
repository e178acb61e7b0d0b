"""Checkpoints stay whole through kills, full disks and bad content."""

import collections
import enum
import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.checkpoint import AtomicCheckpointIO, find_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[1]
OLD = {"state_dict": {"w": torch.arange(3.0)}, "epoch": 1, "global_step": 10}
NEW = {"state_dict": {"w": torch.arange(5.0)}, "epoch": 2, "global_step": 20}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A run's last.ckpt that holds OLD."""
    path = tmp_path / "checkpoints/last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def content(path: Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


# --- what may be written ---


def test_everything_plain_comes_back_equal(tmp_path):
    checkpoint: dict[str, Any] = {
        "state_dict": collections.OrderedDict(w=torch.ones(2, dtype=torch.bfloat16), n=torch.tensor(3)),
        "plain": [
            1,
            2.5,
            True,
            None,
            "a",
            (1, 2),
            {3, 4},
            b"x",
            1j,
            {7: torch.float16, "d": torch.device("cpu")},
        ],
        "milestones": collections.Counter({3: 1}),
        "size": torch.Size([1, 2]),
        "infinite": float("inf"),
    }
    path = tmp_path / "new/folder/a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    loaded = read_checkpoint(path)
    assert torch.equal(loaded["state_dict"].pop("w"), checkpoint["state_dict"].pop("w"))
    assert loaded == checkpoint
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "entry",
    [
        pathlib.Path("x"), np.float64(1.0), np.arange(2), Colour.RED, collections.defaultdict(int), len,
        tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(2, 2)), torch.nn.Linear(1, 1),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_what_would_not_load_again_is_refused_by_name(last, entry):
    # The premise, from torch itself: each of these saves and then does not load.
    torch.save({"x": entry}, last.parent / "torch.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(last.parent / "torch.pt", weights_only=True)
    with pytest.raises(
        UsageError, match=r"last\.ckpt is not written: checkpoint\['callbacks'\]\['a'\]\[1\] is a"
    ):
        AtomicCheckpointIO().save_checkpoint(NEW | {"callbacks": {"a": [0, entry]}}, last)
    assert content(last) == 1


def test_a_bad_key_is_refused(last):
    with pytest.raises(UsageError, match=r"numpy\.float64"):
        AtomicCheckpointIO().save_checkpoint(NEW | {"x": {np.float64(1): 2}}, last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_is_never_written(last, bad):
    state = {"a": torch.ones(2), "body.conv1.weight": torch.tensor([1.0, bad]).bfloat16()}
    with pytest.raises(UsageError, match=r"last\.ckpt is not written: body\.conv1\.weight is not finite"):
        AtomicCheckpointIO().save_checkpoint(NEW | {"state_dict": state}, last)
    assert content(last) == 1


# --- what goes wrong while writing ---


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_keeps_the_previous_checkpoint(last, monkeypatch, fault):
    def save(checkpoint, file):
        file.write(b"half")
        raise fault

    monkeypatch.setattr(torch, "save", save)
    big = {"state_dict": {"w": torch.zeros(1_000_000)}, "optimizer_states": [{"m": (torch.zeros(500_000),)}]}
    with pytest.raises(UsageError) as caught:
        AtomicCheckpointIO().save_checkpoint(big, last)
    message = str(caught.value)
    assert message.startswith("no space left: need about 6.0 MB, have ")
    assert message.endswith(f"in {last.parent}; the previous checkpoint last.ckpt is intact")
    assert content(last) == 1
    assert os.listdir(last.parent) == ["last.ckpt"]


FULL = """
import sys, torch, pathlib
from resnext_backbones.errors import UsageError
from tasks.checkpoint import AtomicCheckpointIO
folder = pathlib.Path(sys.argv[1])
io = AtomicCheckpointIO()
io.save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, folder / "last.ckpt")
try:
    io.save_checkpoint({"state_dict": {"w": torch.zeros(2_000_000)}}, folder / "last.ckpt")
except UsageError as fault:
    (folder / "proof").write_bytes(bytes(1_000_000))  # the space is given back at once
    print(fault, [p.name for p in folder.glob("*.ckpt*")], io.load_checkpoint(folder / "last.ckpt").keys())
"""


@pytest.mark.slow
def test_a_truly_full_disk(tmp_path):
    mounts = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounts], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    command = f'{mounts} && exec "$0" -c "$1" {tmp_path}'
    out = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, FULL], cwd=ROOT, capture_output=True, text=True
    )
    assert "no space left: need about 8.0 MB, have 4." in out.stdout, out.stderr
    assert "['last.ckpt'] dict_keys(['state_dict'])" in out.stdout


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"last\.ckpt: cannot be written: "):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "file/last.ckpt")


def test_a_bug_of_torch_is_not_renamed(last, monkeypatch):
    def save(checkpoint, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="something else"):
        AtomicCheckpointIO().save_checkpoint(NEW, last)


def test_ctrl_c_while_writing_keeps_the_previous_checkpoint(last, monkeypatch):
    def save(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(NEW, last)
    assert content(last) == 1
    assert os.listdir(last.parent) == ["last.ckpt"]


def numbered(epoch: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((1_000_000,), float(epoch))}, "epoch": epoch}


def test_killed_while_writing_the_old_or_the_new_checkpoint_stands(last):
    AtomicCheckpointIO().save_checkpoint(numbered(0), last)
    random.seed(0)
    for _ in range(4):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a fork has no pool of threads
            for epoch in range(10_000):
                AtomicCheckpointIO().save_checkpoint(numbered(epoch), last)
            os._exit(0)
        time.sleep(random.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = read_checkpoint(last)
        assert (found["state_dict"]["w"] == found["epoch"]).all()


def test_parts_of_dead_writers_are_swept(last):
    dead = subprocess.Popen(["true"])
    dead.wait()
    parts = {pid: last.parent / f".last.ckpt.{pid}.part" for pid in (dead.pid, os.getppid())}
    mine = last.parent / ".notes.part"
    for path in (*parts.values(), mine):
        path.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(NEW, last)
    assert not parts[dead.pid].exists()
    assert parts[os.getppid()].exists()  # that process is alive: it may be writing
    assert mine.exists()


def test_a_link_is_replaced_and_its_target_kept(last):
    best = last.with_name("best.ckpt")
    last.rename(best)
    last.symlink_to("best.ckpt")
    AtomicCheckpointIO().save_checkpoint(NEW, last)
    assert (content(best), content(last)) == (1, 2)
    assert not last.is_symlink()


def test_remove(last):
    io = AtomicCheckpointIO()
    io.remove_checkpoint(last)
    io.remove_checkpoint(last)
    io.teardown()
    assert not last.exists()


# --- reading ---


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "no dict":
        torch.save([1, 2], path)
    elif how == "no state_dict":
        torch.save({"model": torch.ones(1)}, path)
    elif how == "needs unpickling":
        torch.save({"state_dict": {}, "path": pathlib.Path("x")}, path)
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello\n" * 99}[how])


DAMAGES = ["missing", "empty", "cut", "text", "no dict", "no state_dict", "needs unpickling"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_bad_file_is_named_in_one_line(last, how):
    damage(last, how)
    with pytest.raises(UsageError) as caught:
        AtomicCheckpointIO().load_checkpoint(last, weights_only=False)
    assert str(caught.value).startswith(f"{last}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_resume_falls_back_to_best_aloud(last, how):
    run = last.parents[1]
    AtomicCheckpointIO().save_checkpoint(NEW, last.with_name("best.ckpt"))
    assert find_checkpoint(run) == last
    assert read_checkpoint(run)["epoch"] == 1
    damage(last, how)
    with pytest.warns(
        UserWarning, match=r"last\.ckpt.*GOING ON FROM .*best\.ckpt INSTEAD \(epoch 2, step 20\)"
    ):
        assert read_checkpoint(run)["epoch"] == 2
    with pytest.warns(UserWarning, match="GOING ON FROM"):
        assert find_checkpoint(run).name == "best.ckpt"


def test_nothing_to_resume_from(tmp_path, last):
    with pytest.raises(UsageError, match=r"holds no checkpoints/last\.ckpt"):
        read_checkpoint(last.parent)
    with pytest.raises(UsageError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent")
    damage(last, "cut")
    with pytest.raises(UsageError, match=r"last\.ckpt: not a whole checkpoint"):
        read_checkpoint(tmp_path)


# --- under Lightning ---


class Scored(BoringModel):
    """Its best epoch is the second of four."""

    def validation_step(self, batch, batch_idx):
        self.log("val/AP", torch.tensor([0.1, 0.4, 0.2, 0.3])[self.current_epoch])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 4))

    val_dataloader = train_dataloader


def trainer(folder: Path, epochs: int) -> lightning.Trainer:
    where: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False}
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=[
            ModelCheckpoint(filename="best", monitor="val/AP", mode="max", **where),
            ModelCheckpoint(filename="last", **where),
        ],
        plugins=[AtomicCheckpointIO()],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
def test_best_and_last_of_a_run_and_of_its_resume(tmp_path):
    first = trainer(tmp_path / "checkpoints", 3)
    first.fit(Scored())
    second = trainer(tmp_path / "checkpoints", 4)
    second.fit(Scored(), ckpt_path=find_checkpoint(tmp_path))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    assert [content(tmp_path / "checkpoints" / name) for name in ("best.ckpt", "last.ckpt")] == [1, 3]
    best = second.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    assert best.best_model_score == pytest.approx(0.4)


KILLS = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from tests.test_checkpoint import Scored, trainer
torch.set_num_threads(1)
warnings.simplefilter("ignore")

class Heavy(Scored):  # most of its time goes into writing
    def __init__(self):
        super().__init__()
        self.ballast = torch.nn.Parameter(torch.zeros(4_000_000))
    def validation_step(self, batch, batch_idx):
        self.log("val/AP", float(self.current_epoch))

def whole(path):
    return torch.load(path, weights_only=True)["state_dict"]["ballast"].shape == (4_000_000,)

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
for kill in range(kills):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        trainer(folder, 10_000).fit(Heavy())
        os._exit(0)
    deadline = time.monotonic() + 60
    mine = f".*.{child}.part"
    while not any(folder.glob(mine)) and time.monotonic() < deadline:  # until it writes
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / name).exists():
            assert whole(folder / name), name
    print(kill, sorted(p.name.replace(str(child), "PID") for p in folder.iterdir()), flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_of_training_both_checkpoints_are_whole(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if Path("/dev/shm").is_dir():  # another file system than the run's: moving from there is copying
        environment["TMPDIR"] = "/dev/shm"
    out = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "checkpoints"), "25"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    lines = out.stdout.splitlines()
    assert len(lines) == 25
    assert "best.ckpt" in lines[-1]
    assert "last.ckpt" in lines[-1]
    assert lines[-1].count(".part") <= 1  # those of earlier kills were swept
    assert any(".part" in line for line in lines)  # some kills struck while writing
    read_checkpoint(tmp_path)
