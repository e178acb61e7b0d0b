"""`check_task` passes what keeps its promises, our own tasks first, and names each way of breaking one."""

import os
import subprocess
import sys

import pytest
from broken_tasks import Tiny
from conftest import ROOT, mostly_slow

from resnext_backbones import UsageError
from tasks.conformance import Composed, check_task, main
from tasks.conforming.checks import CHECKS
from tasks.conforming.subject import Made

TINY = ["backbone=custom", f"backbone._target_={Tiny.__module__}.Tiny", "data.batch_size=4"]
CLASSES = ["task=classification", *TINY, "data.image_size=[32,32]"]
BOXES = ["task=detection", "model=fcos", "model.fpn_channels=64", *TINY, "data.image_size=[64,64]"]
OWN = {
    "classifier": ["task=classification"],
    "faster_rcnn": ["task=detection", "model.head_channels=32", "model.roi_batch=16"],
    "faster_rcnn_c4": ["task=detection", "model=faster_rcnn_c4", "model.roi_batch=16"],
    "retinanet": ["task=detection", "model=retinanet"],
    "fcos": ["task=detection", "model=fcos"],
    "mask_rcnn": ["task=instance_segmentation", "model.mask_channels=8", "model.head_channels=32"],
    "keypoint_rcnn": ["task=keypoints", "model.keypoint_channels=8", "model.head_channels=32"],
    "semantic_fpn": ["task=semantic_segmentation", "model.head_channels=64"],
    "deeplabv3": ["task=semantic_segmentation", "model=deeplabv3"],
}
ALL = [check.__name__ for check in CHECKS]


def but(*checks: str) -> list[str]:
    """What to leave out so that these are tried."""
    return [name for name in ALL if name not in checks]


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_our_own_tasks_keep_every_promise(name: str, tiny_shapes: list[str]) -> None:
    pyramid = ["model.fpn_channels=64"] if name not in ("classifier", "deeplabv3", "faster_rcnn_c4") else []
    words = [*OWN[name], "backbone=resnet18", "data.batch_size=2", "data.image_size=[64,64]", *pyramid]
    report = check_task([*words, *tiny_shapes])
    assert report.ok, report
    untried = [outcome.check for outcome in report.outcomes if outcome.state != "passed"]
    assert untried == (["empty_targets"] if name == "classifier" else [])
    assert [outcome.text for outcome in report.outcomes if outcome.check == "prediction"] == [""]


def test_a_task_that_keeps_every_promise(tiny_shapes: list[str]) -> None:
    report = check_task([*CLASSES, *tiny_shapes], skip=("processes",))
    assert report.ok, report
    assert [outcome.check for outcome in report.outcomes] == ALL
    found = {outcome.check: outcome for outcome in report.outcomes if outcome.state != "passed"}
    assert {name: outcome.state for name, outcome in found.items()} == {
        "empty_targets": "not applicable",
        "processes": "left out",
    }
    assert "no `targets`" in str(report)


BROKEN = {
    "LeaksStatistics": ("evaluation", "changes model.body.stem.1.running_mean"),
    "DrawsInEvaluation": ("evaluation", "random state of torch"),
    "AnswersInTurn": ("evaluation", "two predictions of the same batch differ"),
    "KeepsElsewhere": ("save_and_load", "keep what was learned in parameters and buffers"),
    "KeepsAnObject": ("save_and_load", "checkpoint['names'] is a broken_tasks.KeepsAnObject.Names"),
    "DrawsFromPython": ("resume", "drawn from other random numbers than torch's"),
    "CallsItLoss": ("losses", "a name of its own"),
    "NoScalar": ("losses", "give a tensor of one float"),
    "NotANumber": ("losses", "the loss loss_log is nan"),
    "ChangesTheBatch": ("losses", "changes the batch (labels)"),
    "HasASpareLayer": ("losses", "no gradient reaches model.spare.weight"),
    "DoesNotLearn": ("overfits", "at most 0.8 of it should be left"),
    "ForgetsAnImage": ("prediction", "3 entries for 4 images"),
}
ALSO = {  # checks that cannot pass either, where training or writing a checkpoint is not possible
    "KeepsAnObject": ["resume"],
    "NotANumber": ["overfits", "prediction", "save_and_load", "resume"],
}
QUICK = ("LeaksStatistics", "AnswersInTurn", "KeepsElsewhere", "DrawsFromPython", "DoesNotLearn")


def broken(name: str, tiny_shapes: list[str]) -> list[str]:
    return [*CLASSES, f"task._target_=broken_tasks.{name}", *tiny_shapes]


@pytest.mark.parametrize("name", mostly_slow(BROKEN, *QUICK))
def test_what_breaks_a_promise_is_told(name: str, tiny_shapes: list[str]) -> None:
    check, text = BROKEN[name]
    report = check_task(broken(name, tiny_shapes), skip=but(check))
    (found,) = [outcome.text for outcome in report.outcomes if outcome.state == "failed"]
    assert text in found
    assert "\n" not in found


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_promise_fails_no_other_check(name: str, tiny_shapes: list[str]) -> None:
    report = check_task(broken(name, tiny_shapes), skip=("processes",))
    assert [check for check in report.failed if check not in ALSO.get(name, [])] == [BROKEN[name][0]], report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check", "text"),
    [
        (
            "NetworkPixels",
            "prediction",
            "not twice as large; give it in the pixels of the image",
        ),
        ("NeedsAnObject", "empty_targets", "with one image of the batch empty, the loss loss_size is nan"),
    ],
)
def test_a_detector_that_breaks_a_promise(name: str, check: str, text: str, tiny_shapes: list[str]) -> None:
    words = [*BOXES, f"task._target_=broken_tasks.{name}", *tiny_shapes]
    report = check_task(words, steps=60, skip=("processes",))
    assert report.failed[0] == check, report
    assert set(report.failed) <= {check, "resume"}  # which meets images without an object, too
    assert text in str(report)


@pytest.mark.slow
def test_a_metric_of_one_process_is_found_out(tiny_shapes: list[str]) -> None:
    words = [*CLASSES, "data.batch_size=1", "task._target_=broken_tasks.OfOneProcess", *tiny_shapes]
    report = check_task(words, skip=but("processes"))
    assert report.failed == ["processes"], report
    assert "of two; gather what was found once" in str(report)


def test_what_the_best_checkpoint_is_chosen_by_must_be_there(tiny_shapes: list[str]) -> None:
    report = check_task([*CLASSES, "monitor=val/top9", *tiny_shapes], skip=but("evaluation"))
    assert "monitor=val/top9 is not among what evaluation gives: " in str(report)
    assert "val/loss, val/loss_cross_entropy" in str(report)


def test_an_unlearned_detector_says_that_nothing_was_found(tiny_shapes: list[str]) -> None:
    report = check_task([*BOXES, *tiny_shapes], steps=0, skip=but("prediction"))
    assert "nothing was found, so whether it is in the image's pixels was not seen" in str(report)


def test_what_makes_a_task_may_be_given(tiny_shapes: list[str]) -> None:
    def make() -> Made:
        return Composed((*CLASSES, *tiny_shapes))()

    report = check_task(make, skip=but("losses", "processes"))
    assert [outcome.state for outcome in report.outcomes if outcome.state != "left out"] == [
        "passed",
        "not applicable",  # two processes cannot be sent a function within a function
    ]
    assert "a function at the top of a module" in str(report)


def test_what_is_not_a_check_is_refused() -> None:
    with pytest.raises(UsageError, match=r"skip=\['speed'\] names no check; there are losses, overfits"):
        check_task(CLASSES, skip=("speed",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=clasification"], "did you mean classification"),
        (["task=classification", "data=class_folders"], "data.root is not given"),
        (["task=classification", "--skip", "speed"], "names no check"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_help_lists_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("ClassificationTask", 0), ("ForgetsAnImage", 1)])
def test_the_command_line(name: str, code: int, tiny_shapes: list[str]) -> None:
    module = "broken_tasks" if code else "tasks.classification"
    done = subprocess.run(
        [sys.executable, "-m", "tasks.conformance", *CLASSES, f"task._target_={module}.{name}", *tiny_shapes],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ALL
    assert ("prediction     failed: `predict` gives 3 entries" in done.stdout) == bool(code)
