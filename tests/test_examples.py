"""The example package works after `pip install`, unchanged: its body, task, dataset and checkpoints."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from resnext_backbones import UsageError, check_backbone
from tasks import plugins, predict
from tasks.conformance import check_task
from tasks.conforming.checks import CHECKS
from tasks.load import load_task

EXAMPLE = ROOT / "examples/resnext_backbones_example"
WORDS = ["task=regression", "data=csv_regression", "data.column=dots", "backbone=depthwise_net"]
SMALL = [
    "backbone.widths=[8,8,8,16]",
    "data.image_size=32",
    "data.batch_size=4",
    "data.num_workers=0",
    "task.scale=5",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger.wandb.mode=disabled",
]


def installed(site: Path) -> None:
    """The package's own files, and the metadata that an installer makes of its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    shutil.copytree(EXAMPLE / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    about = site / f"{name}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    with (about / "entry_points.txt").open("w") as file:
        for group, entries in project["entry-points"].items():
            file.write(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()))


def table(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the dataset `dots`; the example is importable and its entry points are found."""
    (tmp_path / "site").mkdir()
    installed(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.startswith("resnext_backbones_example")]:
        monkeypatch.delitem(sys.modules, name)
    plugins.register()
    from resnext_backbones_example.dots import write_dots

    write_dots(tmp_path / "dots", {"train": 12, "val": 5})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_trains_and_predicts(example: Path, start: Callable[..., Path]) -> None:
    folder = start(*WORDS, "data.root=dots", "run_id=dots", data=(), small=SMALL)
    results = json.loads((folder / "summary.json").read_text())["results"]
    truths = {row["file"]: float(row["dots"]) for row in table("dots/val.csv")}
    rows = table(folder / "predictions_test.csv")
    errors = [abs(float(row["prediction"]) - truths[row["file"]]) for row in rows]
    assert len(errors) == 5
    assert results["test/MAE"] == pytest.approx(sum(errors) / 5)
    assert results["best val/MAE"] == pytest.approx(results["test/MAE"], rel=1e-5)  # test is val here

    assert predict.main([str(folder), "dots/val", "--output", "found", "--no-pictures"]) == 0
    found = {row["file"]: float(row["dots"]) for row in table("found/predictions.csv")}
    judged = {Path(row["file"]).name: float(row["prediction"]) for row in rows}
    assert found == pytest.approx(judged, rel=1e-4)  # prepared and computed as in the test stage

    number = load_task(folder, "cpu").predict("dots/val/0000.png")[0]
    assert number.value == pytest.approx(found["0000.png"], rel=1e-4)
    assert number.draw("dots/val/0000.png").width > 32


def test_its_body_keeps_the_contract(example: Path) -> None:
    from resnext_backbones_example.body import DepthwiseNet

    check_backbone(DepthwiseNet(widths=(8, 16, 16, 32), depths=(1, 1, 1, 1)), sizes=((33, 65),))


def test_its_task_keeps_its_promises(example: Path) -> None:
    report = check_task([*WORDS, *SMALL, "data.root=dots"], skip=("processes",))
    assert report.ok, report
    states = {outcome.check: outcome.state for outcome in report.outcomes}
    assert states.pop("empty_targets") == "not applicable"
    assert states.pop("processes") == "left out"
    assert set(states.values()) == {"passed"}
    assert "trust" not in str(report)  # its builders are declared


@pytest.mark.slow
def test_its_task_in_two_processes(example: Path) -> None:
    skip = ["losses", "overfits", "empty_targets", "evaluation", "prediction", "save_and_load", "resume"]
    report = check_task([*WORDS, *SMALL, "data.root=dots"], skip=skip)
    assert report.ok, report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"train\.csv: cannot be read"),
        ("", r"train\.csv: lists no image"),
        ("file,age\na.png,3\n", r"train\.csv: has no column 'dots', but file, age"),
        ("file,dots\na.png,3\nb.png,many\n", r"train\.csv, line 3: 'many' is no number"),
        ("file,dots\na.png,inf\n", r"train\.csv, line 2: 'inf' is no number"),
        ("file,dots\na.png\n", r"train\.csv, line 2: None is no number"),
    ],
)
def test_its_reader_names_what_is_wrong(example: Path, text: str | None, message: str) -> None:
    from resnext_backbones_example.csv_data import read_csv_numbers

    path = example / "dots/train.csv"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_csv_numbers(path, "dots")


def test_another_task_on_its_data_is_told_what_it_is_for(example: Path, start: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"a task that learns from data\.target=number"):
        start("data=csv_regression", "data.column=dots", "data.root=dots", data=())


# Installed for good.


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with both wheels. What they depend on is the present one's, which has no finder for
    the clone there: only what was installed can be imported."""
    if not shutil.which("uv"):
        pytest.skip("uv builds and installs the wheels; it is not here")
    folder = tmp_path_factory.mktemp("clean")
    for source in (ROOT, EXAMPLE):
        built = uv("build", "--wheel", "--out-dir", str(folder / "wheels"), str(source))
        if built.returncode and "hatchling" in built.stderr:
            pytest.skip(f"the wheels cannot be built: {built.stderr.strip().splitlines()[-1]}")
        assert built.returncode == 0, built.stderr
    made = uv("venv", "--python", sys.executable, str(folder / "env"))
    assert made.returncode == 0, made.stderr
    python = folder / "env/bin/python"
    wheels = map(str, (folder / "wheels").glob("*.whl"))
    done = uv("pip", "install", "--offline", "--no-deps", "--python", str(python), *wheels)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    present = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(present))
    return python


def uv(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    return subprocess.run(["uv", *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_works_in_a_clean_environment(environment: Path, tmp_path: Path) -> None:
    def python(*words: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(environment), *words],
            cwd=tmp_path,
            env=clean | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    imported = "tasks.__file__, resnext_backbones_example.__file__"
    where = python("-c", f"import tasks, resnext_backbones_example; print({imported})").split()
    assert all(path.startswith(str(environment.parents[1])) for path in where)
    python("-m", "resnext_backbones_example.dots", "dots")
    assert "regression" in python("-m", "tasks.train", "--help")
    words = [*WORDS, "data.root=dots", *SMALL, "debug=fast", "run_id=installed"]
    assert "everything is in runs/installed" in python("-m", "tasks.train", *words)
    python(str(ROOT / "train.py"), *words, "run_id=clone")  # a clone's train.py finds the plug-in, too
    python("-m", "tasks.predict", "runs/installed", "dots/val", "--output", "found")
    assert len((tmp_path / "found/predictions.csv").read_text().splitlines()) == 101
    assert len(list((tmp_path / "found/pictures").iterdir())) == 100
    python(
        "-c",
        "from resnext_backbones import check_backbone\n"
        "from resnext_backbones_example.body import DepthwiseNet\n"
        "check_backbone(DepthwiseNet())",
    )
    report = python("-m", "tasks.conformance", *WORDS, "data.root=dots", *SMALL)
    assert "processes      passed" in report
    assert "trust" not in report


# The page about it.

PAGE = (ROOT / "docs/extending.md").read_text()
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
INDENTED = re.findall(r"^ {4}(\S.*)$", FENCED.sub("", PAGE), flags=re.MULTILINE)
COMMANDS = [shlex.split(line) for line in INDENTED if line.startswith("python -m ")]
QUICKLY = [
    "debug=fast",
    "trainer.accelerator=cpu",
    "data.num_workers=0",
    "data.batch_size=2",
    "data.image_size={size}",
    "logger.wandb.mode=disabled",
]


def blocks(kind: str) -> list[str]:
    return [text for language, text in FENCED.findall(PAGE) if language == kind]


def test_the_page_and_the_package_declare_the_same() -> None:
    (declared,) = blocks("toml")
    entry_points = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert tomllib.loads(declared)["project"]["entry-points"] == entry_points


def test_the_page_lists_every_check() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|", PAGE.partition("| check |")[2].partition("\n\n")[0], flags=re.MULTILINE
    )
    assert rows == [check.__name__ for check in CHECKS]


def test_the_links_of_the_page_lead_somewhere() -> None:
    titles = [title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)]
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, heading = link.partition("#")
        assert (ROOT / "docs" / file).exists(), link
        assert file or heading in titles, link


def test_every_command_of_the_page_is_one_that_is_run() -> None:
    assert len(INDENTED) == len(COMMANDS) == 6


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_page_run_in_order(
    example: Path, tiny_shapes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands as they stand, but for settings that make them quick; the Python after them."""
    for text in (*blocks("python"), *blocks("yaml")):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if name:
            (tmp_path / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1]).write_text(text.removeprefix(name[0]))
    shapes = Path(tiny_shapes[0].removeprefix("data.root="))
    shutil.rmtree(tmp_path / "dots")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    for words in COMMANDS:
        quickly = []
        if words[2] == "tasks.train":
            square = "task=regression" in words
            quickly = [word.format(size="64" if square else "[64,64]") for word in QUICKLY]
            quickly += [] if square else [*tiny_shapes, "backbone=resnet18"]
        given = [str(shapes / "test") if word == "data/shapes/test" else word for word in words[1:]]
        done = subprocess.run(
            [sys.executable, *given, *quickly],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "predictions/coarse/classes").is_dir()
    assert (tmp_path / "predictions/dots/predictions.csv").is_file()
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in blocks("python"):
        exec(compile(text, "docs/extending.md", "exec"), {})
