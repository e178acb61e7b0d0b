"""metrics.jsonl, summary.json and the W&B record, read back from the disk."""

import json
import math
import os
import platform
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from PIL import Image
from wandb_records import read_run

from resnext_backbones.errors import UsageError
from tasks.loggers import JsonlLogger, read_metrics
from tasks.provenance import git_state, versions, without_secrets, write_summary
from tasks.wandb_run import log_boxes, wandb_logger

ROOT = Path(__file__).parents[1]


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def other_rank(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)


# --- metrics.jsonl ---


def test_each_call_is_one_strict_line_on_the_disk_at_once(tmp_path):
    logger = JsonlLogger(tmp_path / "run")
    before = time.time()
    logger.log_metrics({"train/loss": 0.1, "epoch": 0}, 50)
    logger.log_metrics({"val/AP": torch.tensor(0.25), "val/n": np.int64(3), "epoch": 1}, 100)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": np.float32(-math.inf)}, None)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first, second, third = map(strict, lines)
    assert before - 1 < first.pop("time") < time.time() + 1
    assert first == {"step": 50, "epoch": 0, "train/loss": 0.1}
    assert (second["step"], second["epoch"], second["val/AP"], second["val/n"]) == (100, 1, 0.25, 3)
    assert (third["step"], third["a"], third["b"], third["c"]) == (None, "NaN", "Infinity", "-Infinity")
    read = read_metrics(tmp_path / "run")
    assert [r["step"] for r in read] == [50, 100, None]
    assert math.isnan(read[2]["a"])
    assert (read[2]["b"], read[2]["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    for start in (0, 2):
        logger = JsonlLogger(tmp_path)
        for step in range(start, start + 2):
            logger.log_metrics({"loss": 1 / (step + 1)}, step)
        logger.finalize("success")
        logger.log_metrics({"test/AP": 0.5}, start + 1)  # a stage after fit
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 1, 2, 3, 3]


WHOLE = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", [1]),
        (b'{"step": 2, "lo', [1]),
        (b'{"step": 2, "loss": 0.25}', [1, 2]),
        (b'{"step": 2, "loss": 0.25}\n', [1, 2]),
    ],
    ids=["whole", "half a line", "no line end", "two"],
)
def test_the_last_line_of_a_killed_run_is_mended(tmp_path, tail, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + tail)
    assert [r["step"] for r in read_metrics(path)] == kept
    JsonlLogger(tmp_path).log_metrics({"loss": 1.0}, 3)
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [*kept, 3]


def test_a_first_line_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE[:9])
    assert read_metrics(tmp_path) == []
    JsonlLogger(tmp_path).log_metrics({}, 3)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3]


def test_faults_of_the_file_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + b"oops\n" + WHOLE)
    with pytest.raises(UsageError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"metrics\.jsonl: cannot be written: No space left"):
        JsonlLogger(tmp_path).log_metrics({"loss": 1.0}, 1)


def test_a_kill_costs_no_step_that_was_logged(tmp_path):
    random.seed(0)
    for kill in range(3):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            logger = JsonlLogger(tmp_path / str(kill))
            for step in range(1_000_000):
                logger.log_metrics({"loss": 0.5, "filler": list(range(200))}, step)
                os.write(writing, b".")
            os._exit(0)
        os.close(writing)
        told = len(os.read(reading, 1))  # it has begun
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while chunk := os.read(reading, 65536):
            told += len(chunk)
        os.close(reading)
        steps = [r["step"] for r in read_metrics(tmp_path / str(kill))]
        assert steps == list(range(len(steps)))
        assert told <= len(steps) <= told + 1


class Logging(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test/AP", 0.5)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_writes_through_fit_and_test(tmp_path):
    trainer = lightning.Trainer(
        max_steps=4,
        logger=[JsonlLogger(tmp_path)],
        log_every_n_steps=2,
        limit_val_batches=0,
        limit_test_batches=2,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logging())
    trainer.test(Logging(), verbose=False)
    records = read_metrics(tmp_path)
    assert [(r["step"], r["epoch"], "train/loss" in r) for r in records[:2]] == [(1, 0, True), (3, 0, True)]
    assert records[-1]["test/AP"] == 0.5


def test_other_ranks_write_nothing(tmp_path, other_rank):
    JsonlLogger(tmp_path / "run").log_metrics({"loss": 1.0}, 1)
    write_summary(tmp_path / "run", {"AP": 1.0})
    assert not (tmp_path / "run").exists()


# --- summary.json and what stands in it ---


def test_summaries_are_merged(tmp_path):
    write_summary(tmp_path, {"metrics": {"val/AP": torch.tensor(0.5)}, "seed": 1, "folder": tmp_path})
    write_summary(tmp_path, {"metrics": {"test/AP": math.nan}, "seed": 2, "names": ("a", "é")})
    assert strict((tmp_path / "summary.json").read_text()) == {
        "metrics": {"val/AP": 0.5, "test/AP": "NaN"},
        "seed": 2,
        "folder": str(tmp_path),
        "names": ["a", "é"],
    }
    assert os.listdir(tmp_path) == ["summary.json"]
    (tmp_path / "summary.json").write_text("{")
    with pytest.warns(UserWarning, match="not JSON"):
        write_summary(tmp_path, {"seed": 3})
    assert strict((tmp_path / "summary.json").read_text()) == {"seed": 3}


def test_secrets_are_redacted_and_the_rest_is_kept():
    config = OmegaConf.create(
        {
            "lr": 0.1,
            "model": {
                "lr": "${lr}",
                "tokenizer": "bpe",
                "hf_token": "s3cret",
                "names": ["a", {"password": "s3cret"}],
            },
            "WANDB_API_KEY": "s3cret",
            "apiKey": "s3cret",
            "client_secret": {"value": "s3cret"},
            "auth_token": None,
            "proxy": "http://me:s3cret@proxy.example:80/x",
            "root": "../data",
            "command": "python train.py a.password=s3cret lr=1 +x.api_key='s3cret s3cret' seed=2",
        }
    )
    cleaned = without_secrets(config)
    assert "s3cret" not in json.dumps(cleaned)
    assert cleaned == {
        "lr": 0.1,
        "model": {
            "lr": 0.1, "tokenizer": "bpe", "hf_token": "<redacted>",
            "names": ["a", {"password": "<redacted>"}],
        },
        "WANDB_API_KEY": "<redacted>",
        "apiKey": "<redacted>",
        "client_secret": "<redacted>",
        "auth_token": None,
        "proxy": "http://<redacted>@proxy.example:80/x",
        "root": "../data",
        "command": "python train.py a.password=<redacted> lr=1 +x.api_key=<redacted> seed=2",
    }  # fmt: skip
    assert config.apiKey == "s3cret"


def test_git_state(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    none = {"commit": None, "dirty": None}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == none
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert git_state(tmp_path) == none  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new").write_text("")
    assert git_state(tmp_path)["dirty"] is True
    (tmp_path / "new").rename(tmp_path / "docs")
    assert git_state(tmp_path)["dirty"] is False  # where a benchmark has written its table
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == none


def test_versions():
    found = versions()
    assert (found["python"], found["lightning"]) == (platform.python_version(), lightning.__version__)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["hardware"]
    assert strict(json.dumps(found)) == found


# --- W&B ---


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine without W&B's key, settings or earlier sessions."""
    wandb = pytest.importorskip("wandb")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    wandb.teardown()
    yield wandb
    wandb.teardown()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The finished runs; W&B's own process may answer that all is done just before it has written the end."""
    for _ in range(100):
        runs = [read_run(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        if all(run["exit_code"] is not None for run in runs):
            break
        time.sleep(0.1)
    return runs


def test_without_a_key_it_is_offline_in_one_line(tmp_path, alone, capfd):
    start = time.monotonic()
    logger = wandb_logger("p", "det/1", folder=tmp_path / "run")
    assert logger is not None
    assert time.monotonic() - start < 20
    assert "WANDB_MODE" not in os.environ
    logger.close()
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith("W&B: offline (no API key")
    assert f"wandb sync {next((tmp_path / 'run/wandb').glob('offline-run-*'))}`" in out
    assert recorded(tmp_path / "run")[0]["id"] == "det-1"


def test_config_metrics_and_boxes_are_in_the_record(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "password=s3cret-argument"])
    config = {"lr": 0.1, "api_key": "s3cret-value", "data": {"root": "r", "sizes": (1, 2)}}
    logger = wandb_logger("p", "id1", "a name", tmp_path, "g", "detection", config, mode="offline")
    assert logger is not None
    logger.log_hyperparams({"steps": 9, "hf_token": "s3cret-value"})
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, 10)
    logger.finalize("success")
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    truth = {"boxes": torch.tensor([[1.0, 2.0, 5.0, 4.5]]), "labels": torch.tensor([2])}
    predictions = truth | {"scores": torch.tensor([0.75])}
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    log_boxes(
        logger, 10, "val/pictures", [(image, truth, predictions), (image, truth, empty)], {1: "cat", 2: "dog"}
    )
    logger.log_metrics({"train/loss": 0.25}, 4)  # a resumed run repeats steps
    logger.close()
    logger.log_metrics({"late": 1.0}, 11)

    (run,) = recorded(tmp_path)
    assert (run["id"], run["name"], run["group"], run["job_type"]) == ("id1", "a name", "g", "detection")
    assert run["exit_code"] == 0
    expected = {"lr": 0.1, "api_key": "<redacted>", "data": {"root": "r", "sizes": [1, 2]}}
    expected |= {"steps": 9, "hf_token": "<redacted>"}
    assert {k: v for k, v in run["config"].items() if k != "_wandb"} == expected
    assert [(h["trainer/global_step"], h.get("train/loss")) for h in run["history"]] == [
        (10, 0.5), (10, None), (4, 0.25)
    ]  # fmt: skip

    files = next(tmp_path.glob("wandb/offline-run-*")) / "files"
    panel = run["history"][1]["val/pictures"]
    assert panel["count"] == 2
    with Image.open(files / panel["filenames"][0]) as picture:
        assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())
    boxes = [
        {kind: json.loads((files / entry["path"]).read_text()) for kind, entry in picture.items()}
        for picture in panel["all_boxes"]
    ]
    box = {"position": {"minX": 1.0, "minY": 2.0, "maxX": 5.0, "maxY": 4.5}, "domain": "pixel", "class_id": 2}
    assert boxes[0]["ground_truth"]["box_data"] == [box | {"box_caption": "dog"}]
    assert boxes[0]["predictions"]["box_data"] == [
        box | {"box_caption": "dog 0.75", "scores": {"score": 0.75}}
    ]
    assert boxes[0]["predictions"]["class_labels"] == {"1": "cat", "2": "dog"}
    assert boxes[1]["predictions"]["box_data"] == []

    sent = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".log")
    for private in ("s3cret", str(ROOT), str(tmp_path), sys.executable):
        assert private.encode() not in sent
    if len(socket.gethostname()) > 4:  # a shorter one may be there by chance
        assert socket.gethostname().encode() not in sent


def test_two_jobs_of_one_process_are_two_runs(tmp_path, alone):
    first = wandb_logger("p", "one", folder=tmp_path / "1", mode="offline")
    assert first is not None
    first.log_metrics({"a": 1.0}, 1)
    second = wandb_logger("p", "two", folder=tmp_path / "2", mode="offline")  # the first was not closed
    assert second is not None
    assert (first.version, second.version) == ("one", "two")
    second.log_metrics({"b": 2.0}, 1)
    second.finalize("failed")
    second.close()
    (one,), (two,) = recorded(tmp_path / "1"), recorded(tmp_path / "2")
    assert (one["id"], len(one["history"]), one["exit_code"]) == ("one", 1, 0)
    assert (two["id"], len(two["history"]), two["exit_code"]) == ("two", 1, 1)
    assert "b" not in one["history"][0]


def test_a_resumed_job_keeps_its_id(tmp_path, alone):
    for _ in range(2):
        logger = wandb_logger("p", "same", folder=tmp_path, mode="offline")
        assert logger is not None
        logger.close()
        time.sleep(1.1)  # W&B names the record by the second
    assert [run["id"] for run in recorded(tmp_path)] == ["same", "same"]


@pytest.mark.parametrize(
    ("mode", "environment", "starts"),
    [
        ("disabled", None, []), ("auto", "disabled", []), ("disabled", "online", []),
        ("auto", "offline", ["offline"]), ("auto", "dryrun", ["offline"]), ("offline", "online", ["offline"]),
        ("auto", None, ["online", "offline"]), ("auto", "online", ["online", "offline"]),
        ("online", "disabled", ["online", "offline"]),
    ],
)  # fmt: skip
def test_modes(tmp_path, alone, monkeypatch, mode, environment, starts):
    """With a key and a server that does not answer; the argument goes before WANDB_MODE."""
    seen = []
    real = alone.init

    def init(**options: Any) -> Any:
        seen.append(options["mode"])
        if options["mode"] == "online":
            raise alone.errors.CommError("no answer")
        return real(**options)

    monkeypatch.setattr(alone, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    logger = wandb_logger("p", "x", folder=tmp_path, mode=mode)
    assert seen == starts
    assert (logger is None) == (starts == [])
    if logger:
        logger.close()


@pytest.mark.parametrize(
    ("netrc", "url", "asks"),
    [
        ("machine api.wandb.ai login user password KEY", None, True),
        ("machine wandb.example.org login user password KEY", "https://wandb.example.org", True),
        ("machine api.wandb.ai login user password KEY", "https://wandb.example.org", False),
        ("machine github.com login user password KEY", None, False),
        ("machine api.wandb.ai", None, False),
        ("", None, False),
    ],
)
def test_a_key_in_netrc_is_found(tmp_path, alone, monkeypatch, netrc, url, asks):
    def init(**options: Any) -> Any:
        raise alone.errors.CommError(options["mode"])

    (tmp_path / "netrc").write_text(netrc.replace("KEY", "k" * 40) + "\n")
    monkeypatch.setattr(alone, "init", init)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    with pytest.raises(UsageError, match="reached: online" if asks else "no API key"):
        wandb_logger("p", "x", folder=tmp_path, required=True)


def test_a_mode_that_does_not_exist():
    with pytest.raises(UsageError, match="'onlin': give auto, online, offline or disabled"):
        wandb_logger("p", "x", mode="onlin")  # type: ignore[arg-type]


def test_wandb_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_logger("p", "x", folder=tmp_path) is None
    assert capsys.readouterr().out == "W&B: not installed, metrics go to metrics.jsonl only\n"
    with pytest.raises(UsageError, match="not installed"):
        wandb_logger("p", "x", folder=tmp_path, required=True)


@pytest.mark.parametrize("host", ["same", "another"])
def test_other_processes_start_no_run(tmp_path, monkeypatch, host):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", int(host == "same"))
    monkeypatch.setenv("NODE_RANK", str(int(host == "another")))
    logger = wandb_logger("p", "x", folder=tmp_path)
    assert logger is not None
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_hyperparams({"a": 1})
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    log_boxes(logger, 1, "k", [(torch.zeros(3, 2, 2, dtype=torch.uint8), empty, empty)], {})
    logger.finalize("success")
    logger.close()
    assert os.listdir(tmp_path) == []


def test_boxes_go_to_wandb_only(tmp_path):
    for logger in (None, JsonlLogger(tmp_path)):
        log_boxes(logger, 1, "k", [], {})
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_refused_port_costs_less_than_20_seconds(tmp_path, alone, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    start = time.monotonic()
    logger = wandb_logger("p", "x", folder=tmp_path)
    assert time.monotonic() - start < 18  # the import comes on top
    assert logger is not None
    logger.log_metrics({"a": 1.0}, 1)
    logger.close()
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert "connection refused" in out
    (run,) = recorded(tmp_path)
    assert run["history"][0]["a"] == 1.0
    assert not list(tmp_path.glob("wandb/run-*"))  # nothing of the failed start is left to sync
    with pytest.raises(UsageError, match=r"required and cannot be reached: .*connection refused"):
        wandb_logger("p", "x", folder=tmp_path, required=True)


@pytest.mark.slow
def test_nobody_at_the_terminal_is_asked(tmp_path, alone):
    """The standard streams are a terminal, there is no key, and nobody types."""
    code = (
        "import sys, tasks.wandb_run; assert 'wandb' not in sys.modules\n"  # the import is late
        f"logger = tasks.wandb_run.wandb_logger('p', 'x', folder={str(tmp_path)!r})\n"
        "logger.close(); print('DONE')"
    )
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 120
    while b"DONE" not in seen and child.poll() is None and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 4096)
    child.kill()
    child.wait()
    os.close(master)
    lines = seen.decode().split()
    assert lines[-1] == "DONE"
    assert seen.decode().strip().count("\n") == 1
    assert b"W&B: offline (no API key" in seen
