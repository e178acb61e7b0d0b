"""The benchmarks of many runs: what they compare, how they go on after an interruption, what they write."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, mostly_slow
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import TensorDataset
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import masks_to_boxes

from benchmarks import (
    clock,
    plain_equal,
    plain_torchvision,
    pretraining,
    pretraining_report,
    pretraining_runs,
    runs,
)
from benchmarks.plain_data import DATA, CocoImages, Data
from benchmarks.plain_loop import detections, network, ours, reference, train
from benchmarks.plain_report import section as plain_section
from benchmarks.plain_torchvision import Race, jobs_of, judged
from benchmarks.pretraining_runs import ARMS, Study
from benchmarks.runs import TrainRun, listing, work
from benchmarks.tables import difference, gain, spread, table, write_section
from tasks.base import DivergedError, parameter_groups

VERSIONS = {"devices": 2, "hardware": "CPU", "python": "3.11", "torch": "2", "torchvision": "0"}
GIT = {"commit": "0123456789abcdef", "dirty": False}
MEASURED = {"threads": 2, "workers": 1, "precision": "32-true", "versions": VERSIONS, "git": GIT}


# The plain network and its recipe are ours.


@pytest.mark.parametrize("name", mostly_slow(["bccd", "nuclei"], "bccd"))
def test_the_plain_network_computes_what_ours_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATA[name]
    monkeypatch.setitem(DATA, name, Data(data.folder, (64, 96), data.masks))
    assert "equal" in plain_equal.check_equal(name, classes=3)


def test_another_network_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_anchors(data: Data, classes: int) -> nn.Module:
        model = network(data, classes)
        sizes = tuple((5 * stride, 8 * stride) for stride in (4, 8, 16, 32, 64))
        model.rpn.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        return model

    monkeypatch.setitem(DATA, "bccd", Data("bccd", (64, 96), False))
    monkeypatch.setattr(plain_equal, "network", other_anchors)
    with pytest.raises(SystemExit, match="loss_"):
        plain_equal.check_equal("bccd", classes=3)


def test_our_recipe_in_the_plain_loop_is_that_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still(monkeypatch, 0.0)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=plain_equal.our_words("bccd"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    recipe = ours()
    optimizer, schedule = recipe.build(model, 1000.0, 50)
    assert type(optimizer).__name__ == cfg.optimizer._target_.rpartition(".")[2]
    ours_groups = parameter_groups(model, cfg.optimizer.weight_decay)
    assert {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]} == {
        p: g["weight_decay"] for g in ours_groups for p in g["params"]
    }
    assert cfg.data.batch_size == cfg.task.reference_batch_size == 4  # so that the rate is not scaled
    assert {group["initial_lr"] for group in optimizer.param_groups} == {cfg.optimizer.lr}
    assert recipe.clip == cfg.trainer.gradient_clip_val
    assert recipe.flip_vertically
    assert "flip_vertically" in cfg.data.augment
    assert cfg.scheduler._target_ == "tasks.schedule.warmup_cosine"
    stepping = AdamW([torch.zeros(1)], lr=6e-4)
    known = instantiate(cfg.scheduler)(stepping, total_steps=1000)
    rates, expected = [], []
    for step in range(1000):
        stand_still(monkeypatch, step)
        if step == 0:
            schedule.begin()
        else:
            optimizer.step()
            schedule.step()
        rates.append(schedule.get_last_lr()[0])
        expected.append(known.get_last_lr()[0])
        stepping.step()
        known.step()
    # a warm-up of n steps rises by 1/(n + 1) each, the first of them included; n is of thousands or of parts
    assert rates == pytest.approx(expected, abs=6e-4 / 50)


def test_the_reference_recipe_warms_up_for_an_epoch_and_falls_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still(monkeypatch, 5.0)
    optimizer, schedule = reference(0.02).build(nn.Linear(2, 2), 180.0, 51)
    schedule.begin()
    rates = []
    for step in range(180):  # a second each
        rates.append(schedule.get_last_lr()[0])
        stand_still(monkeypatch, 5.0 + step + 1)
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.02 / 1000)
    assert rates[49] < rates[50] == pytest.approx(0.02)
    assert rates[119:121] == pytest.approx([0.02, 0.002])
    assert rates[159:161] == pytest.approx([0.002, 0.0002])


def stand_still(monkeypatch: pytest.MonkeyPatch, second: float) -> None:
    monkeypatch.setattr(clock.time, "perf_counter", lambda: second)


def test_the_schedule_follows_the_clock_not_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine and a fast one see the same rate at the same time; none runs before the first batch."""
    finals = []
    for seconds_a_step in (1, 7):
        stand_still(monkeypatch, 0.0)
        optimizer = SGD([torch.zeros(1)], lr=1.0)
        schedule = clock.cosine_over_time(optimizer, 10**9, seconds=84, warmup=0.0)
        stand_still(monkeypatch, 1000.0)
        assert schedule.share == 0
        schedule.begin()
        for step in range(42 // seconds_a_step):
            stand_still(monkeypatch, 1000.0 + (step + 1) * seconds_a_step)
            schedule.begin()  # only the first call counts
            optimizer.step()
            schedule.step()
        finals.append(schedule.get_last_lr()[0])
        assert schedule.share == 0.5
    assert finals == pytest.approx([0.5, 0.5])  # half a cosine, half way
    stand_still(monkeypatch, 2000.0)
    optimizer.step()
    schedule.step()
    assert schedule.share == 1
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


# What the plain loop reads and does.


@pytest.fixture
def coco(tmp_path: Path) -> Data:
    """Five images of 20×30; the first has a box without area, the last nothing."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    boxes = [[2, 3, 10, 5], [20, 10, 8, 8], [4, 4, 0, 6]]
    annotations = [
        {
            "id": 1 + 10 * i + k,  # pycocotools never matches an annotation of id 0
            "image_id": i,
            "category_id": 7,
            "iscrowd": 0,
            "bbox": box,
            "area": box[2] * box[3],
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i in range(4)
        for k, box in enumerate(boxes if i == 0 else boxes[:2])
        for x, y, w, h in [box]
    ]
    for i in range(5):
        Image.new("RGBA", (30, 20)).save(tmp_path / "train" / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in range(5)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cell"}]}
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    return Data(str(tmp_path), (20, 30), masks=True)


def test_boxes_without_area_are_dropped_and_images_without_objects_left_out(coco: Data) -> None:
    images = CocoImages(coco, "train", training=True)
    assert len(images) == 4
    _, target = images[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 2
    assert target["labels"].tolist() == [1, 1]
    assert len(CocoImages(coco, "train", training=False)) == 5


def test_a_mirrored_box_stays_around_its_mask(coco: Data) -> None:
    images = CocoImages(coco, "train", training=True, vertically=True)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = images[1]
        assert image.shape == (3, 20, 30)
        around = masks_to_boxes(target["masks"])
        around[:, 2:] += 1
        assert torch.equal(around, target["boxes"])
        seen.add(tuple(target["boxes"][0].tolist()))
    assert seen == {(2, 3, 12, 8), (18, 3, 28, 8), (2, 12, 12, 17), (18, 12, 28, 17)}


class Falling(nn.Module):
    """A weight that is driven to 1; its loss is not finite from step `bad` on."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.bad, self.calls = bad, 0

    def forward(self, images: Sequence[torch.Tensor], targets: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        bad = self.bad is not None and self.calls > self.bad
        return {"loss": ((self.weight - 1) ** 2).sum() * (float("nan") if bad else 1.0)}


def test_the_plain_loop_learns_until_its_time_is_up_and_stops_where_it_diverges(
    coco: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = CocoImages(coco, "train", training=True)
    model = Falling()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: model.calls / 10)  # a tenth of a second each
    result = train(model, images, reference(0.1), seconds=2.95, seed=0)
    assert result == {"diverged": None, "steps": 30, "seconds": 3.0}
    assert model.calls == 30
    assert abs(model.weight.item() - 1) < 0.5
    model = Falling(bad=3)
    assert train(model, images, reference(0.1), seconds=2.95, seed=0)["diverged"] == 3


class Knowing(nn.Module):
    """Finds in each of the first four images its two objects, and nothing in the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.calls += 1
        boxes = torch.tensor([[2, 3, 12, 8], [20, 10, 28, 18]])[: 2 if self.calls < 5 else 0]
        masks = torch.zeros(len(boxes), 1, 20, 30)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
            mask[0, y1:y2, x1:x2] = 0.9
        labels, scores = torch.ones(len(boxes), dtype=torch.int64), torch.full((len(boxes),), 0.9)
        return [{"boxes": boxes.float(), "labels": labels, "scores": scores, "masks": masks}]


def test_what_is_found_is_written_as_coco_has_it(coco: Data, tmp_path: Path) -> None:
    found = detections(Knowing(), CocoImages(coco, "train", training=False))
    for iou_type in ("bbox", "segm"):
        (tmp_path / "found.json").write_text(json.dumps(found[iou_type]))
        ap, ap50 = judged(coco.annotations("train"), tmp_path / "found.json", iou_type)
        # eight of nine, one having no area: precision 1 at the recalls 0, 0.01 … 0.88
        assert ap == ap50 == pytest.approx(89 / 101)


def test_both_are_judged_by_pycocotools(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "coco_eval_vectors/cocoapi"
    predictions = folder / "instances_val2014_fakebbox100_results.json"
    ap, ap50 = judged(folder / "instances_val2014_100.json", predictions, "bbox")
    assert ap == pytest.approx(0.5045806987249628)  # published (the data's README)
    assert ap < ap50 < 1
    (tmp_path / "none.json").write_text("[]")
    assert judged(folder / "instances_val2014_100.json", tmp_path / "none.json", "bbox") == [0.0, 0.0]


# Runs are done once.


def leave_summary(run: TrainRun, **more: Any) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python train.py", *run.overrides])
    (run.path / "summary.json").write_text(json.dumps({"command": command, "seconds": 60.0, **more}))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """train.py as it leaves a folder, without its training; the names of the runs that were started."""
    started = []

    def fake(command: Sequence[str], cwd: Path, check: bool) -> None:
        words = dict(word.split("=", 1) for word in command[2:] if "=" in word)
        folder = ROOT / words["runs_dir"] / words["run_id"]
        folder.mkdir(parents=True)  # as train.py, which refuses a folder that is there
        (folder / "checkpoints").mkdir()
        summary = {"command": " ".join(["python train.py", *command[2:]]), "seconds": 30.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        started.append(words["run_id"])

    monkeypatch.setattr(subprocess, "run", fake)
    return started


def test_only_what_is_not_complete_is_run(tmp_path: Path, trained: list[str], capsys: Any) -> None:
    done, broken, _, fresh = jobs = [
        TrainRun(name, ("task=detection",), tmp_path) for name in ("done", "broken", "other", "fresh")
    ]
    leave_summary(done)
    broken.path.mkdir()  # interrupted: the summary does not tell the seconds
    (broken.path / "summary.json").write_text(json.dumps({"command": "python train.py"}))
    leave_summary(TrainRun("other", ("task=keypoints",), tmp_path))  # complete, but by another command
    assert [job.seconds() for job in jobs] == [60.0, None, None, None]
    assert "3 of 4 left, about 3 min" in listing(jobs, guess=600)
    after: list[int] = []
    work(jobs, 600, lambda: after.append(1))
    assert trained == ["broken", "other", "fresh"]
    assert len(after) == 3
    assert "0 of 4 left" in listing(jobs, guess=600)
    assert not (fresh.path / "checkpoints").exists()
    work(jobs, 600, lambda: after.append(1))
    assert len(trained) == len(after) == 3


def test_a_run_that_fails_ends_the_work_and_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainRun("x", (), tmp_path)

    def killed(*_: Any, **__: Any) -> None:
        run.path.mkdir()
        raise subprocess.CalledProcessError(137, "train.py")

    monkeypatch.setattr(subprocess, "run", killed)
    for _ in range(2):  # the second time finds the first one's folder
        with pytest.raises(subprocess.CalledProcessError):
            work([run], 60, lambda: None)
    assert run.seconds() is None


def test_a_detector_whose_body_was_trained_anew_is_not_complete(tmp_path: Path) -> None:
    body = TrainRun("body", ("task=classification",), tmp_path, keep_checkpoints=True)
    run = TrainRun("run", ("task=detection",), tmp_path, body=body)
    leave_summary(body)
    assert body.seconds() is None  # its weights are not there
    leave_body(body, b"first")
    leave_summary(run, weights={"sha256": hashlib.sha256(b"first").hexdigest()})
    assert body.seconds() == run.seconds() == 60.0
    leave_body(body, b"second one")
    assert body.seconds() == 60.0
    assert run.seconds() is None


def leave_body(body: TrainRun, weights: bytes) -> None:
    """Another content has another time of writing, however coarse the file system's clock is."""
    (body.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (body.path / "checkpoints/best.ckpt").write_bytes(weights)
    os.utime(body.path / "checkpoints/best.ckpt", (len(weights), len(weights)))


@pytest.fixture
def races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plain_torchvision, "RUNS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("contender", ["ours", "recipe"])
def test_a_race_is_done_anew_when_what_it_depends_on_has_changed(
    races: Path, monkeypatch: pytest.MonkeyPatch, contender: str
) -> None:
    race = Race("bccd", contender, 1)
    assert race.result() is None
    leave_result(race)
    assert race.seconds() == 270.0
    with monkeypatch.context() as other:
        other.setattr(plain_torchvision, "sources", lambda: "edited")
        assert race.result() is None
    with monkeypatch.context() as other:
        other.setattr(plain_torchvision, "REAL_DATA", "elsewhere")
        other.setattr(plain_equal, "REAL_DATA", "elsewhere")
        assert (race.result() is None) == (contender == "ours")
    monkeypatch.setattr(plain_torchvision, "settings", lambda data: "lr: 1")
    assert (race.result() is None) == (contender == "ours")
    assert len({job.name for job in jobs_of(240)}) == len(jobs_of(240)) == 2 * (5 * 3) + 1 + 3


@pytest.mark.parametrize("contender", ["ours", "recipe"])
def test_whoever_diverges_counts_as_nothing_and_whatever_else_fails_ends_the_work(
    races: Path, monkeypatch: pytest.MonkeyPatch, contender: str
) -> None:
    race = Race("nuclei", contender, 0)
    # before it has trained; in the evaluation; because it has diverged
    outcomes: Iterator[tuple[int | None, ...]] = iter([(), (None,), (7,)])

    def ends(command: Sequence[str], cwd: Path, check: bool) -> None:
        for diverged in next(outcomes):
            clock.leave_trained(race.path, diverged, 7, 3.0, workers=1, precision="32-true")
        raise subprocess.CalledProcessError(1, command[1])

    monkeypatch.setattr(subprocess, "run", ends)
    monkeypatch.setattr(clock, "git_state", lambda: GIT)
    monkeypatch.setattr(clock, "versions", lambda: VERSIONS)  # which asks the system by a process of its own
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            race.do()
        assert race.result() is None
    race.do()
    result = race.result()
    assert result is not None
    assert result["AP"] == {"bbox": [0.0, 0.0], "segm": [0.0, 0.0]}
    assert result["diverged"] == 7


class Standing(LightningModule):
    """One weight that learns over time; its loss is not finite from step `bad` on."""

    def __init__(self, seconds: float, bad: int | None = None) -> None:
        super().__init__()
        self.weight, self.seconds, self.bad = nn.Parameter(torch.zeros(1)), seconds, bad

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.bad is not None and self.global_step >= self.bad:
            raise DivergedError("loss = nan")
        return (self.weight - 1).square().sum()

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        schedule = clock.cosine_over_time(optimizer, -1, seconds=self.seconds, warmup=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(("bad", "steps"), [(None, 30), (4, 4)])
def test_ours_stops_with_its_time_and_says_what_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int | None, steps: int
) -> None:
    model = Standing(2.95, bad)
    trainer = Trainer(
        accelerator="cpu", max_epochs=10_000, callbacks=[clock.StopInTime()], default_root_dir=tmp_path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = LightningDataModule.from_datasets(TensorDataset(torch.zeros(7, 1)), batch_size=1)
    data.num_workers = 5  # type: ignore[attr-defined]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 20 + trainer.global_step / 10)
    with pytest.raises(DivergedError) if bad else nullcontext():
        trainer.fit(model, datamodule=data)
    found = json.loads((tmp_path / "trained.json").read_bytes())
    assert trainer.global_step == found["steps"] == steps
    assert (found["diverged"], found["seconds"]) == (bad, pytest.approx(steps / 10))
    assert (found["threads"], found["workers"], found["precision"]) == (1, 5, "32-true")


def leave_result(race: Race, **more: Any) -> None:
    race.path.mkdir(parents=True)
    content = {"diverged": None, "steps": 450, "seconds": 240.0, "job_seconds": 270.0, **MEASURED, **more}
    (race.path / "result.json").write_text(json.dumps({**content, "made_by": race.made_by}))


# What is written.


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n## A\n\nalpha\n")
    write_section(page, "## B", "one\n\n### Part\n\n| a |\n")
    write_section(page, "## C", "sea")
    write_section(page, "## B", "two \\1\n")
    expected = "# Results\n\n## A\n\nalpha\n\n## B\n\ntwo \\1\n\n## C\n\nsea\n"
    assert page.read_text() == expected
    write_section(page, "## C", "sea")
    assert page.read_text() == expected


def test_numbers_and_tables() -> None:
    assert spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100 (0.100 … 0.300)"
    assert spread([0.25]) == "0.250 (one run)"
    assert gain({0: 0.5, 1: 0.4, 2: 0.9}, {0: 0.4, 1: 0.5}) == "+0.000 ± 0.141 (+0.100, -0.100)"
    # variances 1 and 5/3, of three and four: sqrt(1/3 + 5/12)
    assert difference([1.0, 2.0, 3.0], [3.0, 4.0, 5.0, 6.0]) == "-2.500 ± 0.866"
    assert difference([0.5], [0.4, 0.3]) == "+0.150 (no spread: one run)"
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Complete runs of two arms on all images: pretraining costs 0.01 with every seed."""
    for module in (runs, pretraining_runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(pretraining_runs, "RUNS", tmp_path / "runs")
    study = Study()
    about = {"versions": VERSIONS, "git": GIT}
    recipe = {"total_steps": 900, "batch_size": 32}
    leave_summary(study.body("shapes"), results={"best val/top1": 0.9}, recipe=recipe, **about)
    leave_body(study.body("shapes"), b"weights")
    weights = {"sha256": hashlib.sha256(b"weights").hexdigest()}
    for seed in study.seeds:
        for arm, cost in (("scratch", 0.0), ("shapes", 0.01), ("scratch_longer", -0.02)):
            run = study.run(arm, 1.0, seed)
            results = {"test/AP": 0.5 + 0.02 * seed - cost, "test/AP50": 0.8}
            leave_summary(run, results=results, weights=weights if run.body else None, **about)
            Image.new("RGB", (200, 100)).save(run.path / "history.png")
    return study


def test_the_gain_of_pretraining_is_told_whatever_its_sign(study: Study, tmp_path: Path) -> None:
    text = pretraining_report.section(study)
    assert "| 205 | random weights | 3 | 60 | 0.520 ± 0.020 (0.500 … 0.540) |" in text
    assert "-0.010 ± 0.000 (-0.010, -0.010, -0.010) |" in text
    assert "205 images: harmed with every seed (3 seeds)." in text
    assert "random weights, 2.5 times as many steps: -0.030 ± 0.000 (-0.030, -0.030, -0.030)." in text
    assert "commit 012345678." in text
    pretraining_report.draw_curve(study, tmp_path / "curve.png")
    pretraining_report.draw_histories(study, tmp_path / "histories.png")
    with Image.open(tmp_path / "curve.png") as curve, Image.open(tmp_path / "histories.png") as histories:
        assert curve.width > 500
        assert histories.width >= 2 * 200


def test_arms_are_chosen_by_name_and_listed(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining.main(["--list", "scratch", "shapes"])
    printed = capsys.readouterr().out
    assert "missing  shapes-0.1-seed2" in printed
    assert "clothing" not in printed
    assert "18 of 25 left" in printed  # one body, two arms, four shares, three seeds
    with pytest.raises(SystemExit):
        pretraining.main(["nonsense"])
    assert "no arm is called nonsense" in capsys.readouterr().err


def test_the_table_against_the_plain_loop(races: Path) -> None:
    aps = {"ours": (0.50, 0.51), "recipe": (0.50, 0.49), "sgd0.01": (0.30, 0.40), "sgd0.02": (0.36, 0.36)}
    for name, values in aps.items():
        for seed, ap in enumerate(values):
            about = {"precision": "bf16-mixed" if name == "ours" else "32-true", "steps": 480 + 20 * seed}
            leave_result(Race("bccd", name, seed), AP={"bbox": [ap, ap + 0.2]}, **about)
    gone = {"diverged": 7, "steps": 7, "seconds": 3.0, "AP": {"bbox": [0.0, 0.0]}}
    leave_result(Race("bccd", "sgd0.005", 0), **gone)
    text = plain_section(jobs_of(240))
    assert "- bccd: against SGD at its best rate, 0.02 (at the edge of those tried): +0.145 ± 0.005." in text
    assert "- bccd: against the plain loop with our recipe: +0.010 ± 0.007." in text
    assert (
        "| bccd | plain loop, SGD 0.005 (1 diverged, counted as 0) | 1 | – | – | – | 0.000 (one run)" in text
    )
    assert "| bccd | ours: `train.py` | 2 | 480 … 500 | 480 … 500 | 240 | 0.505" in text
    assert "ours in bf16-mixed, 2 threads, processes that load images: 1; the plain loop in 32-true" in text
    assert "nuclei: against" not in text


@pytest.mark.parametrize(
    "words",
    [
        *(Study().run(arm, 0.25, 1).overrides for arm in ARMS),
        *(Study().body(source).overrides for source in pretraining_runs.SOURCES),
        *([*plain_equal.our_words(d), *plain_torchvision.limits(240)] for d in DATA),
    ],
    ids=lambda words: next((w for w in words if w.startswith("run_id")), words[0] + words[-1]),
)
def test_every_command_composes(words: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=words)
    assert cfg.optimizer._target_ == "torch.optim.AdamW"
