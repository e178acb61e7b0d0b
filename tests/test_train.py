"""A run from its configuration to its folder, on a handful of images."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from omegaconf import OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from wandb_records import read_run

from resnext_backbones import Receipt, resnet18
from resnext_backbones.errors import UsageError
from resnext_backbones.weights import save_weights
from tasks.base import DivergedError
from tasks.checkpoint import read_checkpoint
from tasks.loggers import read_metrics
from tasks.pretrained import normalisation, take_normalisation
from tasks.progress import ProgressBar
from tasks.terminal import table


def losses(folder):
    return [(m["step"], m["train/loss"]) for m in read_metrics(folder) if "train/loss" in m]


def same_weights(a, b):
    a, b = read_checkpoint(a)["state_dict"], read_checkpoint(b)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_in_its_folder(start, capsys):
    folder = start("run_id=first")
    printed = capsys.readouterr()
    assert str(folder) in printed.out
    assert "learning rate" in printed.err  # with the progress, which is not part of the results
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "predictions_test_bbox.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "pictures/val_epoch001.png",
        "pictures/val_epoch002.png",
        "pictures/test.png",
        "pictures/confusion_test_bbox.png",
        "pictures/per_class_test_bbox.png",
        "pictures/pr_curve_test_bbox.png",
        "pictures/tide_test_bbox.png",
        "history.png",
    }
    assert found == expected

    metrics = read_metrics(folder)
    names = {name for line in metrics for name in line}
    assert {"train/loss", "train/loss_classifier", "train/loss_box_reg", "val/AP", "test/AP50"} <= names
    assert {"val/loss", "val/loss_objectness", "val/TIDE_Miss"} <= names
    for kind in ("AP", "AR"):  # of each class
        assert any(name.startswith(f"test/{kind}/") for name in names)
    assert [step for step, _ in losses(folder)] == list(range(8))
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["results"]["test/AP"] <= 1
    assert summary["recipe"]["global_batch"] == 4
    assert summary["seed"] == 0
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]

    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["record"]["categories"][0] == {"id": 1, "name": "circle"}
    assert checkpoint["record"]["config"]["backbone"]["_target_"] == "resnext_backbones.resnet18"


def test_a_run_keeps_the_receipt_of_its_weights(start, tmp_path, capsys):
    path = tmp_path / "body.safetensors"
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    save_weights(resnet18(), path, normalisation=statistics, licence="CC0-1.0")
    folder = start(
        f"backbone.weights={path}", "stages=fit", "trainer.max_epochs=1", "logger.wandb.mode=offline"
    )
    printed = " ".join(capsys.readouterr().out.split())
    theirs, ours = (
        "(0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)",
        "(0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)",
    )
    assert f"normalisation: mean {theirs} of RGB in 0…1, the source's, in place of mean {ours}" in printed
    assert "licence: CC0-1.0" in printed

    receipt = json.loads((folder / "weights.json").read_text())
    assert receipt["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert receipt["stages"]["stem"]["loaded"][0] == "conv1.weight"
    brief = json.loads((folder / "summary.json").read_text())["weights"]
    names = "source", "sha256", "prefix", "normalisation", "licence", "counts", "adapted"
    assert brief == {name: receipt[name] for name in names} | {"unexpected": 0}
    (record,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert read_run(record)["config"]["weights"] == brief

    # A run that goes on keeps it; one that begins with this one's body knows what its images were.
    start(f"resume={folder}", "trainer.max_epochs=2")
    assert json.loads((folder / "summary.json").read_text())["weights"] == brief
    capsys.readouterr()
    second = start(f"backbone.weights={folder}", "stages=fit", "trainer.max_epochs=1")
    assert f"normalisation: mean {theirs}" in " ".join(capsys.readouterr().out.split())
    assert json.loads((second / "weights.json").read_text())["normalisation"] == statistics


def test_a_body_may_convert_the_images_itself():
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    receipt = Receipt("x", "", "", statistics, None, {}, {}, (), (), ())
    model, body = nn.Module(), nn.Module()
    assert take_normalisation(receipt, model, body) is None  # which says nothing of its images
    model.mean, model.std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert normalisation(model) == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    body.normalisation = {"mean": [0.4] * 3, "std": [0.4] * 3}
    warning = take_normalisation(receipt, model, body)
    assert "with mean (0.5, 0.5, 0.5)" in warning
    assert "Module normalises with mean (0.4, 0.4, 0.4)" in warning
    body.normalisation = statistics
    assert take_normalisation(receipt, model, body) is None
    assert normalisation(model) == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_frozen_norms_without_statistics_are_refused(start, tmp_path):
    with pytest.raises(UsageError, match=r"bn1 .*backbone\.weights="):
        start("+backbone.norm=frozen", "stages=fit")
    save_weights(resnet18(), tmp_path / "a.safetensors")
    start(
        "+backbone.norm=frozen",
        f"backbone.weights={tmp_path / 'a.safetensors'}",
        "stages=fit",
        "trainer.max_epochs=1",
    )


@pytest.mark.parametrize("key", ["backbone.weights", "model.weights"])
def test_a_mistyped_source_costs_neither_a_reading_of_the_data_nor_a_name(start, runs, key):
    with pytest.raises(UsageError, match=r"no weights at nowhere\.pth"):
        start("run_id=a", f"{key}=nowhere.pth", "stages=fit", data=["data=coco", "data.root=nowhere"])
    assert not runs.exists()


def test_a_name_that_is_taken_says_how_to_go_on(start):
    folder = start("run_id=a", "stages=check", "backbone.weights=nowhere.pth")  # which a check does without
    with pytest.raises(UsageError, match=r"a exists: it has no checkpoint, so delete it, or give another"):
        start("run_id=a", "stages=check")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").touch()
    with pytest.raises(UsageError, match=rf"a exists: go on with that run by resume={folder}, or give"):
        start("run_id=a", "stages=check")


def test_saved_predictions_give_the_reported_numbers(start, tiny_shapes):
    folder = start("model.score_threshold=0.0")
    root = tiny_shapes[0].partition("=")[2]
    truth = COCO(f"{root}/annotations/instances_test.json")
    judge = COCOeval(truth, truth.loadRes(str(folder / "predictions_test_bbox.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    results = json.loads((folder / "summary.json").read_text())["results"]
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100")
    for name, value in zip(names, judge.stats, strict=False):
        assert results.get(f"test/{name}", -1) == pytest.approx(value, abs=1e-7)  # float32 in Lightning's log


def test_one_seed_gives_one_result_to_the_last_bit(start):
    first, second, other = start("stages=fit"), start("stages=fit"), start("stages=fit", "seed=1")
    assert losses(first) == losses(second) != losses(other)
    assert same_weights(first, second)


def test_learning_rate_is_scaled_to_the_batch(start, capsys):
    folder = start(
        "stages=fit", "trainer.accumulate_grad_batches=2", "optimizer.lr=0.01", "task.reference_batch_size=16"
    )
    recipe = json.loads((folder / "summary.json").read_text())["recipe"]
    assert recipe["global_batch"] == 8
    assert recipe["learning_rate"] == pytest.approx(0.01 * 8 / 16)
    assert recipe["total_steps"] == 4
    logged = [m["lr-AdamW/pg1"] for m in read_metrics(folder) if "lr-AdamW/pg1" in m]
    assert max(logged) <= 0.005


def test_weight_decay_spares_norms_and_biases():
    from resnext_backbones import resnet18
    from tasks.base import parameter_groups

    body = resnet18(num_classes=10)
    decayed, spared = parameter_groups(body, 0.1)
    convolutions = sum(
        p.numel()
        for n, p in body.named_parameters()
        if "conv" in n or n.endswith(("fc.weight", "downsample.0.weight"))
    )
    assert sum(p.numel() for p in decayed["params"]) == convolutions
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(body.parameters()))


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(start, runs, monkeypatch):
    from tasks.detection import DetectionTask

    honest = DetectionTask.losses

    def poisoned(self, batch):
        losses = honest(self, batch)
        if self.global_step == 6:  # in the second epoch, after the first one's checkpoint
            losses["loss_box_reg"] = losses["loss_box_reg"] * float("nan")
        return losses

    monkeypatch.setattr(DetectionTask, "losses", poisoned)
    images = r"\[\d+, \d+, \d+, \d+\]"
    with pytest.raises(DivergedError, match=f"loss_box_reg = nan at step 6 of epoch 1 on images {images}"):
        start("run_id=nan")
    last = read_checkpoint(runs / "nan")
    assert last["global_step"] == 4
    assert all(value.isfinite().all() for value in last["state_dict"].values())


@pytest.mark.parametrize("clip", ["trainer.gradient_clip_val=10.0", "trainer.gradient_clip_val=null"])
def test_a_gradient_that_is_not_finite_ends_the_run_too(start, runs, monkeypatch, clip):
    from tasks.detection import DetectionTask

    honest = DetectionTask.losses

    def poisoned(self, batch):  # the loss is as it was, its gradient is not
        losses = honest(self, batch)
        if self.global_step == 6:
            zero = self.model.backbone.body.conv1.weight.sum() * 0
            losses["loss_classifier"] = losses["loss_classifier"] + zero.sqrt()
        return losses

    monkeypatch.setattr(DetectionTask, "losses", poisoned)
    with pytest.raises(DivergedError, match=r"gradient is not finite at step 6 of epoch 1.*conv1\.weight"):
        start("run_id=nan", clip)
    last = read_checkpoint(runs / "nan")
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_split_without_objects_is_no_reason_to_lose_the_training(start, tiny_shapes, tmp_path):
    root = Path(tiny_shapes[0].removeprefix("data.root="))
    content = json.loads((root / "annotations/instances_val.json").read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    words = [
        "data=coco",
        f"data.root={root}",
        "data.train=train",
        f"data.val={{annotations: {tmp_path}/empty.json, images: val}}",
    ]
    with pytest.warns(UserWarning, match="val/AP cannot be computed"):
        folder = start("stages=fit", data=words)
    assert (folder / "checkpoints/best.ckpt").is_file()
    values = [line["val/AP"] for line in read_metrics(folder) if "val/AP" in line]
    assert len(values) == 2
    assert all(math.isnan(value) for value in values)


def test_many_classes_fill_neither_the_terminal_nor_the_charts():
    results = {"test/AP": 0.5} | {f"test/AP/c{k:03d}": k / 200 for k in range(200)}
    out = table(results)
    cells = [str(cell) for cell in out.columns[0].cells]
    assert cells[0] == "AP"
    assert cells[1:] == [f"AP of c{k:03d}" for k in (*range(20), *range(180, 200))]
    assert "160 classes" in out.caption


def test_progress_counts_steps_where_epochs_have_no_end():
    bar = ProgressBar()
    opened = []
    bar._open = lambda total, done: opened.append(total)
    trainer = SimpleNamespace(
        num_training_batches=50,
        max_epochs=-1,
        max_steps=500,
        accumulate_grad_batches=2,
        current_epoch=0,
        fit_loop=SimpleNamespace(total_batch_idx=-1),
    )
    bar.on_train_start(trainer, None)
    assert opened == [1000]
    assert bar._epoch(trainer) == "epoch 1"


def test_pictures_are_spread_over_the_split(start, monkeypatch):
    from tasks.detection import DetectionTask

    shown = []
    honest = DetectionTask.picture
    monkeypatch.setattr(
        DetectionTask,
        "picture",
        lambda self, batch, i, *a: shown.append(int(batch.image_ids[i])) or honest(self, batch, i, *a),
    )
    start("stages=fit", "trainer.max_epochs=1", "callbacks.pictures.images=3", "data.batch_size=2")
    assert shown == [1, 3, 5]  # of six


def test_overrides_go_on_top_of_what_a_checkpoint_knows(start, tiny_shapes):
    folder = start("stages=fit", "trainer.max_epochs=1", "data.image_size=[96,96]")
    quiet = ["logger.wandb.mode=disabled", "trainer.accelerator=cpu"]
    again = start(
        "stages=test", f"ckpt_path={folder}", "data.batch_size=3", "model.detections=7", data=[], small=quiet
    )
    kept = OmegaConf.load(again / "config.yaml")
    assert (kept.data.batch_size, kept.data.image_size, kept.model.detections) == (3, [96, 96], 7)
    assert kept.model.fpn_channels == 16
    root = tiny_shapes[0].removeprefix("data.root=")
    other = start(
        *("stages=test", f"ckpt_path={folder}", "data=coco", f"data.root={root}"),
        *("data.train=train", "data.val=val"),
        data=[],
        small=quiet,
    )
    assert OmegaConf.load(other / "config.yaml").data.image_size == [96, 96]  # as it was trained


def test_validate_and_test_judge_a_checkpoint(start, capsys):
    folder = start("run_id=trained")
    reported = json.loads((folder / "summary.json").read_text())["results"]
    again = start("stages=[validate,test]", f"ckpt_path={folder}")
    results = json.loads((again / "summary.json").read_text())["results"]
    assert results["test/AP"] == reported["test/AP"]
    assert results["val/AP"] == pytest.approx(reported["best val/AP"], rel=1e-6)  # Lightning's is float32
    assert (again / "predictions_val_bbox.json").exists()


def test_a_checkpoint_brings_its_network_and_data_along(start):
    folder = start("trainer.max_epochs=1")
    quiet = ["logger.wandb.mode=disabled", "trainer.accelerator=cpu"]
    again = start("stages=test", f"ckpt_path={folder}", data=[], small=quiet)
    results = [json.loads((f / "summary.json").read_text())["results"] for f in (folder, again)]
    assert results[0]["test/AP"] == results[1]["test/AP"]


def test_a_checkpoint_is_not_trained_on(start):
    with pytest.raises(UsageError, match="is for evaluation"):
        start("ckpt_path=runs/x")


def test_a_detector_is_not_judged_on_other_classes(start, tiny_shapes, tmp_path):
    folder = start("trainer.max_epochs=1")
    root = tmp_path / "other"
    shutil.copytree(tiny_shapes[0].partition("=")[2], root)
    for file in (root / "annotations").iterdir():
        file.write_text(file.read_text().replace('"ring"', '"doughnut"'))
    words = ["data=coco", f"data.root={root}", "data.train=train", "data.val=val"]
    with pytest.raises(UsageError, match="doughnut"):
        start("stages=validate", f"ckpt_path={folder}", data=words)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143(tiny_shapes, runs):
    code = WAITING.format(when="training").replace("SIGINT", "SIGTERM")
    words = [*SMALL, *tiny_shapes, f"runs_dir={runs}", "run_id=stopped", "stages=fit", "trainer.max_epochs=6"]
    child = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 143, child.stderr
    assert read_checkpoint(runs / "stopped")["global_step"] == 10


def test_without_a_test_split_val_is_judged_and_it_is_said(start, capsys):
    start("data.test=null", "trainer.max_epochs=1")
    assert "data.test is not given" in capsys.readouterr().out


@pytest.mark.slow  # the quick ones interrupt within a process: test_training_parts.py
@pytest.mark.parametrize("when", ["training", "validation"])
def test_ctrl_c_saves_and_resuming_gives_the_same_weights(start, tiny_shapes, runs, when):
    """Stopped within an epoch or a validation, and resumed: the uninterrupted weights, bit for bit."""
    whole = start("stages=fit", "run_id=whole", "trainer.max_epochs=6")
    program = [sys.executable, "-c", WAITING.format(when=when), *SMALL, *tiny_shapes, f"runs_dir={runs}"]
    child = subprocess.Popen(
        [*program, "run_id=stopped", "stages=fit", "trainer.max_epochs=6"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    stopped = runs / "stopped"
    assert f"resume={stopped}" in errors
    assert 0 < read_checkpoint(stopped)["global_step"] < 24
    resumed = start(f"resume={stopped}")
    assert resumed == stopped
    assert same_weights(whole, stopped)
    resumed_losses = dict(losses(stopped))  # that of the step it stopped in is not logged
    assert resumed_losses.items() <= dict(losses(whole)).items()
    assert len(resumed_losses) >= 23
    values = [[m["val/AP"] for m in read_metrics(folder) if "val/AP" in m] for folder in (whole, stopped)]
    assert values[0] == values[1]


# train.py, which gets a SIGINT in its third epoch.
WAITING = """
import os, runpy, signal, sys
import torch
from tasks.base import BaseTask
torch.set_num_threads(1)  # as in the tests: sums depend on the number of threads
sys.argv[0] = "train.py"

def interrupt(step):
    def wrapped(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)
    return wrapped

name = dict(training="training_step", validation="validation_step")["{when}"]
setattr(BaseTask, name, interrupt(getattr(BaseTask, name)))
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_finished_run_resumes_to_its_results_with_more_epochs(start):
    folder = start("stages=fit", "run_id=more")
    again = start(f"resume={folder}", "trainer.max_epochs=3")
    assert again == folder
    assert len(losses(folder)) == 12


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("backbone=resnet34", "backbone: network, data and seed cannot change"),
        ("model.fpn_channels=32", "model.fpn_channels: network"),
        ("data.train=val", "data.train: network"),
        ("seed=3", "seed: network"),
    ],
)
def test_resume_refuses_another_network_or_dataset(start, override, wanted):
    folder = start("stages=fit", "trainer.max_epochs=1")
    with pytest.raises(UsageError, match=wanted):
        start(f"resume={folder}", override)


def test_resume_refuses_annotations_that_changed(start, tiny_shapes, tmp_path):
    shutil.copytree(tiny_shapes[0].partition("=")[2], tmp_path / "data")
    folder = start("stages=fit", "trainer.max_epochs=1", f"data.root={tmp_path / 'data'}")
    file = tmp_path / "data/annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"instances_train\.json has changed"):
        start(f"resume={folder}")


def test_wandb_holds_configuration_recipe_metrics_and_boxes(start):
    folder = start(
        "logger.wandb.mode=offline", "model.score_threshold=0.0", "callbacks.pictures.min_score=0.0"
    )
    (record,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    run = read_run(record)
    assert run["id"] == folder.name
    assert run["exit_code"] == 0
    assert run["config"]["backbone"]["_target_"] == "resnext_backbones.resnet18"
    assert run["config"]["recipe"]["global_batch"] == 4
    assert {"versions", "git", "command"} <= run["config"].keys()
    names = {name for row in run["history"] for name in row}
    assert {"train/loss", "val/AP", "test/AP"} <= names
    shown = [row["val/pictures"] for row in run["history"] if "val/pictures" in row]
    assert any(picture.get("count") == 2 for picture in shown)
    boxes = [row["val/boxes"] for row in run["history"] if "val/boxes" in row]
    assert "predictions" in json.dumps(boxes)


def test_a_body_for_other_channels_is_refused(start):
    with pytest.raises(UsageError, match="reads images of 4 channels, those of a run have 3"):
        start("+backbone.in_channels=4")


@pytest.mark.slow
def test_a_body_that_converts_its_images_knows_its_own_weights(start, capsys):
    """test_resnet.r160_in1k was trained on RGB less 0.5 over 0.5, which `TimmBody` sees to."""
    small = [word for word in SMALL if not word.startswith("backbone=")]
    words = ["backbone=timm", "backbone.name=test_resnet.r160_in1k", "debug=fast"]
    first = start(*words, "run_id=one", small=small)
    capsys.readouterr()
    second = start(*words, "run_id=two", f"backbone.weights={first}", small=small)
    assert "warning: " not in capsys.readouterr().out
    receipt = json.loads((second / "weights.json").read_text())
    assert receipt["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
