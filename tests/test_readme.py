"""What the README tells people to type is something the program understands."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tasks import predict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^ {4}(?:pip install uv && )?uv run train\.py (.*?)(?: +#.*)?$", README, flags=re.MULTILINE
)


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c])
def test_commands_compose(command):
    words = [word for word in shlex.split(command) if word != "-m"]
    words = [word.split(",")[0] if word.startswith("backbone=") else word for word in words]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=words)
    for word in words:
        key, _, value = word.partition("=")
        if key in ("data.root", "data.train", "data.val", "ckpt_path", "resume", "backbone.weights"):
            assert str(value) in str(cfg)


def options(group):
    return {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}


def test_the_table_of_tasks_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| (`.*`) \|", README, flags=re.MULTILINE)
    assert {task for task, _ in rows} == options("task")
    assert {name for _, names in rows for name in re.findall(r"`(\w+)`", names)} == options("model")


def test_every_form_of_data_is_named():
    assert set(re.findall(r"data=(\w+)", README)) == options("data") - {"shapes"}


def test_the_command_of_prediction_is_understood(tmp_path, monkeypatch, capsys):
    (command,) = re.findall(r"^ {4}uv run python -m tasks\.predict (.*)$", README, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert predict.main(shlex.split(command)) == 2
    assert "photos: there is no such file" in capsys.readouterr().err


def test_the_files_it_links_to_exist():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_python_example_runs(monkeypatch):
    import resnext_backbones

    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.setattr(resnext_backbones, "load_weights", lambda body, source: f"a receipt of {source}")
    space: dict = {}
    exec(code, space)
    assert space["maps"]["p2"].shape == (1, 256, 56, 56)
