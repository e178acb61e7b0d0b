"""Every command and every piece of Python in docs/backbones.md runs."""

import pickle
import re
import runpy
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from PIL import Image, ImageChops, ImageStat

from resnext_backbones import __main__ as listing
from resnext_backbones import cost_cli, resnext50_32x4d

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/backbones.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    shlex.split(line, comments=True) for line in re.findall(r"^ {4}uv run (.+)$", PAGE, flags=re.MULTILINE)
]


def commands(*beginning: str) -> list[list[str]]:
    """The words after `beginning` of each command that begins so."""
    n = len(beginning)
    return [words[n:] for words in COMMANDS if tuple(words[:n]) == beginning]


LISTING = commands("python", "-m", "resnext_backbones")
COST = commands("python", "-m", "resnext_backbones.cost")
TRAIN = commands("train.py")
DRAW = commands("python", "docs/draw_forms.py")


def test_every_command_is_of_a_kind_that_is_run_here() -> None:
    indented = re.findall(
        r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    assert [line for line in indented if not line.startswith("uv run ")] == []
    assert len(COMMANDS) == len(LISTING) + len(COST) + len(TRAIN) + len(DRAW)
    assert min(map(len, (LISTING, COST, TRAIN, DRAW))) > 0


@pytest.mark.parametrize("words", LISTING, ids=shlex.join)
def test_listing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("words", COST, ids=shlex.join)
def test_cost(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cost_cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words if word.startswith("resne"))
    for picture in [word for word in words if word.endswith(".png")]:
        assert Image.open(picture).width > 300


def own_body() -> str:
    (code,) = [block for block in BLOCKS if "class Tiny" in block]
    return code[: code.index("check_backbone(Tiny())")]


@pytest.mark.parametrize("words", TRAIN, ids=shlex.join)
def test_training(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Path]
) -> None:
    (tmp_path / "own_body.py").write_text(own_body())
    monkeypatch.syspath_prepend(str(tmp_path))
    small = [word for word in SMALL if not word.startswith("backbone=")]
    folder = start("trainer.max_epochs=1", "trainer.limit_train_batches=1", *words, small=small)
    assert (folder / "checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("words", DRAW, ids=shlex.join)
def test_the_figure_is_drawn(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forms.png"
    monkeypatch.setattr(sys, "argv", ["docs/draw_forms.py", *words, str(path)])
    runpy.run_path(str(ROOT / "docs/draw_forms.py"), run_name="__main__")
    drawn, shown = (Image.open(file).convert("L") for file in (path, ROOT / "docs/images/forms.png"))
    assert drawn.size == shown.size
    # Other releases of matplotlib and its fonts move pixels; a missing box or line is more.
    assert ImageStat.Stat(ImageChops.difference(drawn, shown)).mean[0] < 1.0
    assert ImageStat.Stat(shown).mean[0] < 253


def detectron2_name(name: str) -> str:
    """As in detectron2/modeling/backbone/resnet.py, where every convolution holds its norm."""
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"bn(\d)\.", r"conv\1.norm.", name)
    name = re.sub(r"layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
    return f"backbone.bottom_up.{name}" if name.startswith("res") else f"backbone.bottom_up.stem.{name}"


def test_the_python_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnext50_32x4d().state_dict()
    model = {detectron2_name(k): v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "test"}))
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 8
    page = types.ModuleType("page")  # a real one, since pickling looks a class up in its module
    monkeypatch.setitem(sys.modules, "page", page)
    for block in BLOCKS:
        exec(compile(block, "docs/backbones.md", "exec"), vars(page))


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)
    headings = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, heading = link.partition("#")
        assert heading in headings if not file else (ROOT / "docs" / file).exists(), link
