"""The command line as a person meets it: help, mistakes, their exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnext_backbones.errors import UsageError

ROOT = Path(__file__).parents[1]


def train(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_the_choices_and_imports_nothing_heavy():
    code = """
import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print([name for name in ("torch", "lightning", "wandb") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("task=detection", "resnext50_32x4d", "data.root", "resume=", "ckpt_path="):
        assert word in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("task=detectoin", "did you mean detection?"),
        ("backbone=resnext50_32x4", "resnext50_32x4d"),
        ("tsk=detection", "did you mean task"),
        ("trainer.devcies=2", "trainer.devices"),
        ("trainer.max_epoch=2", "trainer.max_epochs"),
        ("lr=0.1", "optimizer.lr"),
        ("data.batchsize=2", "data.batch_size"),
        ("trainer.max_epochs=ten", "a whole number is wanted"),
        ("optimizer.lr=fast", "a number is wanted"),
        ("data.augment=3", "a mapping is wanted"),
        ("trainer.deterministic=2", "true or false is wanted"),
        ("optimizer.lr=", "is wanted"),
        ("optimizer.lr==3", "write key=value"),
        ("detection", "write key=value"),
        ("ema=null", "ema=null: the name of an option is wanted: default, none"),
        ("augment=true", "augment=true: the name of an option is wanted: autoaugment, "),
        ("callbacks.ema.decay=0.9", "callbacks.ema.decay: add ema=default"),
        ("early_stopping.patience=3", "early_stopping.patience: add early_stopping=default"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_the_nearest_word(argument, wanted):
    done = train(argument)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.py: ")
    assert wanted in line


def test_overrides_of_a_run_that_goes_on_are_composed_on_top_of_what_it_chose(tmp_path):
    """SGD's momentum and the callbacks are none of the defaults; a choice that is gone is in nobody's way."""
    choices = {"optimizer": "sgd", "early_stopping": "default", "backbone": "gone", "hydra/help": "default"}
    (tmp_path / "config.yaml").write_text(json.dumps({"choices": choices}))
    words = [f"resume='{tmp_path}'", "optimizer.momentum=0.8", "callbacks.early_stopping.patience=3"]
    done = train("--cfg", "job", *words)
    assert done.returncode == 0, done.stderr
    assert "momentum: 0.8" in done.stdout
    assert "patience: 3" in done.stdout
    done = train(*words[:1], "optimizer.momentum=fast")
    assert done.returncode == 2
    assert "optimizer.momentum=fast: a number is wanted, as in optimizer.momentum=0.9" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["data=coco", "data.root=nowhere"], "nowhere"),
        (["data=coco"], "data.root is not given"),
        (["stages=[fi]"], "is not of check, fit, validate, test"),
        (["resume=nowhere"], "nowhere/config.yaml"),
        (["ckpt_path=nowhere.ckpt", "stages=validate"], "nowhere.ckpt"),
        (["backbone.freeze_at=2"], "backbone.weights"),
        (["backbone.weights=resnet5.pth"], "resnet5.pth"),
        (["+model.colour=red"], "colour"),
        (["backbone=custom"], "backbone._target_ is not given"),
        (["backbone=custom", "backbone._target_=no.such.Net"], "no.such"),
        (["run_id=../x"], "run_id=../x"),
        (["trainer.precision=bf16-true"], "bf16-mixed"),
        (["optimizer._target_=torch.optim.Nothing"], "torch.optim.Nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(arguments, wanted, tiny_shapes, start):
    with pytest.raises(UsageError) as refused:
        start(*arguments, data=[] if "data=coco" in arguments else tiny_shapes)
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_ends_the_program_with_code_2_and_that_line(tmp_path):
    done = train("data=coco", "data.root=nowhere", f"runs_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "nowhere" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
