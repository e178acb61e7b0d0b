"""Plug-ins: a package that is installed, here by its metadata on `sys.path`, adds options and builders."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from resnext_backbones import UsageError
from tasks import plugins
from tasks.conformance import main
from tasks.conforming.checks import CHECKS
from tasks.load import load_task

EXAMPLE = ROOT / "examples/resnext_backbones_example"
Install = Callable[..., Path]


def distribution(site: Path, name: str, entry_points: Mapping[str, str]) -> None:
    """The metadata that `pip install` leaves, for importlib.metadata to find."""
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\nany = {value}\n" for group, value in entry_points.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def package(site: Path, name: str, files: Mapping[str, str]) -> None:
    for file, text in files.items():
        (site / name / file).parent.mkdir(parents=True, exist_ok=True)
        (site / name / file).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def train(site: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "tasks.train", *words],
        cwd=cwd or site.parent,
        env={**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


OWN = {
    "configs/backbone/own_body.yaml": "_target_: own_plugin.Nothing\n",
    "configs/task/own_task.yaml": """# @package _global_
defaults:
  - override /model: classifier
task: {rate: 1}
""",
    "__init__.py": "raise ImportError('own_plugin was imported')\n",
}


@pytest.fixture
def own(site: Path) -> Path:
    """A plug-in whose import fails, which is in nobody's way until something of it is built."""
    package(site, "own_plugin", OWN)
    distribution(site, "own-plugin", {plugins.CONFIGS: "own_plugin.configs"})
    return site


def test_an_installed_package_is_listed_beside_our_own(own: Path) -> None:
    done = train(own, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    assert "custom, own_body, resnet101" in lines["backbone"]
    assert "keypoints, own_task" in lines["task"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["task=own_tsk"], "task=own_tsk: no such option; did you mean own_task"),
        (["task=own_task", "task.rte=2"], "task.rte: no such key; did you mean task.rate"),
        (["task=own_task", "task.rate=fast"], "task.rate=fast: a whole number is wanted, as in task.rate=1"),
    ],
)
def test_its_options_are_checked_as_our_own(own: Path, words: list[str], answer: str) -> None:
    done = train(own, *words)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.py: {answer}")


def test_an_import_that_fails_names_the_distribution(own: Path, start: Callable[..., Path]) -> None:
    plugins.register()
    with pytest.raises(UsageError) as refused:
        start("backbone=own_body")
    assert str(refused.value).startswith("backbone: own_plugin.Nothing (of plug-in own-plugin): ")
    assert "own_plugin was imported" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_of_ones_own_without_a_package(tmp_path: Path) -> None:
    package(tmp_path, "mine", {"task/own_task.yaml": OWN["configs/task/own_task.yaml"]})
    done = train(tmp_path, "--config-dir", "mine", "task=own_task", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rate: 1" in done.stdout
    for words, answer in (
        (["task=own_task", "task.rte=2"], "did you mean task.rate"),
        (["task=own_tsk"], "did you mean own_task"),
        (["task=own_task", "task.rate=fast"], "a whole number is wanted"),
    ):
        done = train(tmp_path, "--config-dir=mine", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert answer in done.stderr
    done = train(tmp_path, "--config-dir", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere' not found; give --config-dir a folder" in done.stderr


def test_a_plugin_whose_folder_is_not_there_is_named(site: Path) -> None:
    distribution(site, "lost-plugin", {plugins.CONFIGS: "lost_plugin.configs"})
    done = train(site, "--cfg", "job")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "train.py: warning: plug-in lost-plugin: its configurations are declared to be in "
        "lost_plugin.configs, and there is no such folder; install it anew, or uninstall it"
    ]


def test_one_name_of_two_origins(site: Path, tiny_shapes: list[str]) -> None:
    """Named in every run, refused in one that chooses it: nobody can say whose it is."""
    package(site, "greedy", {"configs/backbone/resnet18.yaml": "_target_: greedy.Net\n"})
    distribution(site, "greedy-plugin", {plugins.CONFIGS: "greedy.configs"})
    warning = "plug-in greedy-plugin: backbone/resnet18.yaml is the name of another's option, too"
    done = train(site, "task=detectoin")
    assert f"train.py: warning: {warning}" in done.stderr.splitlines()[0]
    done = train(site, "backbone=resnet18", *tiny_shapes)
    assert done.returncode == 2
    assert f"train.py: {warning}" in done.stderr.splitlines()[-1]


def test_of_two_plugins_with_one_name_both_are_known(site: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        package(site, name, {"data/same.yaml": "root: here\n"})
    sources = [plugins.Source(f"plug-in {name}", site / name) for name in ("one", "two")]
    found = plugins.clashes(sources, str(tmp_path / "none"))
    assert found == {("data", "same"): [sources[1]]}
    assert plugins.refused({"data": "same"}, "train", found)
    assert plugins.refused({"data@data.other": ["x", "same"]}, "train", found)
    assert plugins.refused({"data": "shapes", "task": "same"}, "train", found) is None


# Builders that a checkpoint may name.


@pytest.fixture
def named_by_a_checkpoint(tiny_shapes: list[str], start: Callable[..., Path], site: Path) -> Path:
    """A run whose body is a plug-in's."""
    package(site, "tiny_plugin", {"net.py": (ROOT / "tests/broken_tasks.py").read_text()})
    words = ["stages=fit", "task=classification", "backbone=custom", "backbone._target_=tiny_plugin.net.Tiny"]
    small = ["data.batch_size=4", "data.num_workers=0", "data.image_size=[32,32]", "trainer.max_epochs=1"]
    return start(*words, small=[*small, "trainer.accelerator=cpu", "logger.wandb.mode=disabled"])


def test_a_declared_builder_may_be_named_by_a_checkpoint(named_by_a_checkpoint: Path, site: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny_plugin\.net\.Tiny'; it was not run\. install the package"):
        load_task(named_by_a_checkpoint)
    distribution(site, "other-plugin", {plugins.BUILDERS: "tiny_plugin.net:Other"})
    with pytest.raises(UsageError, match="it was not run"):  # declared is another one of that module
        load_task(named_by_a_checkpoint)
    distribution(site, "tiny-plugin", {plugins.BUILDERS: "tiny_plugin.net:Tiny"})
    assert plugins.builders()["tiny_plugin.net.Tiny"] == "plug-in tiny-plugin"
    predictor = load_task(named_by_a_checkpoint, "cpu")
    assert type(predictor.task.model.body).__name__ == "Tiny"
    (found,) = predictor.predict(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert found.probabilities.sum() == pytest.approx(1)


def test_a_declared_builder_is_not_imported_before_it_is_named(site: Path) -> None:
    package(site, "late_plugin", {"__init__.py": "raise ImportError('too early')\n"})
    distribution(site, "late-plugin", {plugins.BUILDERS: "late_plugin:Net"})
    assert plugins.builders()["late_plugin.Net"] == "plug-in late-plugin"
    assert plugins.provider("late_plugin.other.Net") == "plug-in late-plugin"
    assert plugins.provider("resnext_backbones.resnet18") is None
    assert "late_plugin" not in sys.modules


@pytest.mark.parametrize("value", ["", "no such thing!", "json", "json:", ":json", "json.configs [extra]"])
def test_whatever_is_declared_is_in_nobodys_way(value: str, site: Path) -> None:
    distribution(site, "odd-plugin", {plugins.CONFIGS: value, plugins.BUILDERS: value})
    sources, faults = plugins.installed()
    assert all("plug-in odd-plugin: its configurations" in fault for fault in faults)
    assert len(sources) + len(faults) == 1
    assert "plug-in odd-plugin" in plugins.builders().values()
    assert plugins.provider("resnext_backbones.resnet18") is None


def test_a_folder_of_ones_own_is_checked(own: Path, tiny_shapes: list[str], tmp_path: Path) -> None:
    package(tmp_path, "mine", {"model/own_model.yaml": "_target_: tasks.models.classifier.Classifier\n"})
    words = [
        "task=classification",
        "model=own_model",
        "backbone=custom",
        "backbone._target_=broken_tasks.Tiny",
    ]
    words += ["backbone._target_=broken_tasks.Tiny", "data.image_size=[32,32]", *tiny_shapes]
    skip = [word for check in CHECKS if check.__name__ != "losses" for word in ("--skip", check.__name__)]
    assert main([*words, "--config-dir", str(tmp_path / "mine"), *skip]) == 0
