"""Every command and every piece of Python in the pages of docs/ runs."""

import json
import pickle
import re
import runpy
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from hydra import compose, initialize_config_dir
from PIL import Image, ImageChops, ImageStat
from test_matrix import BODIES, LEARNERS, as_voc, as_yolo
from torch import nn

from resnext_backbones import __main__ as listing
from resnext_backbones import cost_cli, load_weights, resnext50_32x4d, save_weights
from tasks import building, predict
from tasks.cli import check_types
from tasks.handover import load_network

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The pages whose every command and piece of Python is run here.
RUN = ("backbones", "data", "tasks", "fine-tuning")
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in RUN}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = {
    name: [code for kind, code in FENCED.findall(page) if kind == "python"] for name, page in PAGES.items()
}
Words = list[str]


def commands_of(page: str) -> list[Words]:
    """The words after `uv run` of each command, a line each."""
    lines = re.findall(r"^ {4}uv run (.+)$", FENCED.sub("", page), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [words for page in PAGES.values() for words in commands_of(page)]


def commands(*beginning: str) -> list[Words]:
    """The words after `beginning` of each command that begins so, of all pages, each once."""
    n = len(beginning)
    found = {tuple(words[n:]) for words in COMMANDS if tuple(words[:n]) == beginning}
    return [list(words) for words in sorted(found)]


LISTING = commands("python", "-m", "resnext_backbones")
COST = commands("python", "-m", "resnext_backbones.cost")
TRAIN = commands("train.py")
DRAW = commands("python", "docs/draw_forms.py")
PREDICT = commands("python", "-m", "tasks.predict")


@pytest.mark.parametrize("name", RUN)
def test_what_is_indented_is_a_command(name: str) -> None:
    indented = re.findall(r"^ {4}(\S.*)$", FENCED.sub("", PAGES[name]), flags=re.MULTILINE)
    assert len(indented) == len(commands_of(PAGES[name])) > 0


def test_every_command_is_of_a_kind_that_is_run_here() -> None:
    kinds = (LISTING, COST, TRAIN, DRAW, PREDICT)
    assert len({tuple(words) for words in COMMANDS}) == sum(map(len, kinds))
    assert min(map(len, kinds)) > 0


def options(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}


def test_the_table_of_tasks_is_that_of_the_configurations() -> None:
    row = r"^\| `(\w+)`(?: \(default\))? \|[^|]+\| (`[^|]+`) \|[^|]+\| `([^|`]+)` \|$"
    rows = re.findall(row, PAGES["tasks"], flags=re.MULTILINE)
    assert {task for task, _, _ in rows} == options("task")
    assert {name for _, names, _ in rows for name in re.findall(r"`(\w+)`", names)} == options("model")
    for task, models, monitor in rows:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=[f"task={task}"], return_hydra_config=True)
        assert cfg.monitor == monitor
        assert models.startswith(f"`{cfg.hydra.runtime.choices.model}`")


def test_every_form_of_data_and_every_recipe_is_named() -> None:
    assert {name for name in options("data") if f"data={name}" not in PAGES["data"]} == set()
    assert {name for name in options("augment") if f"`{name}`" not in PAGES["data"]} == set()


@pytest.mark.parametrize("words", LISTING, ids=shlex.join)
def test_listing(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("words", COST, ids=shlex.join)
def test_cost(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cost_cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words if word.startswith("resne"))
    for picture in [word for word in words if word.endswith(".png")]:
        assert Image.open(picture).width > 300


# The folders that the pages tell of, made of the embedded shapes.


@pytest.fixture(scope="session")
def folders(tiny_shapes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = Path(tiny_shapes[0].removeprefix("data.root="))
    splits = {split: shapes / f"annotations/instances_{split}.json" for split in ("train", "val")}
    own, linked = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("linked")
    for name in ("cells", "rooms"):
        shutil.copytree(shapes, own / name)
    shutil.copytree(shapes / "classes", own / "clothes")
    shutil.copytree(shapes / "test", own / "photos")
    shutil.copytree(as_voc(splits, linked / "voc"), own / "BCCD")
    shutil.copytree(as_yolo(splits, linked / "yolo"), own / "nuts")
    for split, file in splits.items():
        images, masks = shapes / split, shapes / "semantic" / split
        content = json.loads(file.read_text())
        unposed = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        copied(images, own / "coco" / f"{split}2017")
        written(own / f"coco/annotations/instances_{split}2017.json", content)
        copied(images, own / "hands" / split)
        written(own / f"hands/annotations/instances_{split}.json", content | {"categories": unposed})
        copied(images, own / "nuclei/images" / split)
        copied(masks, own / "nuclei/masks" / split)
        copied(images, own / "VOC2012/JPEGImages", f"{split}_")
        copied(masks, own / "VOC2012/SegmentationClass", f"{split}_")
        names = own / f"VOC2012/ImageSets/Segmentation/{split}.txt"
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text("".join(f"{split}_{image.stem}\n" for image in images.iterdir()))
        copied(images, own / "cityscapes/leftImg8bit" / split / "ulm", ending="_leftImg8bit")
        copied(masks, own / "cityscapes/gtFine" / split / "ulm", ending="_gtFine_labelTrainIds")
        copied(masks, own / "cityscapes/gtFine" / split / "ulm", ending="_gtFine_color")
    copied(shapes / "train", own / "fruits/images")
    shutil.copy(splits["train"], own / "fruits/trainval.json")
    return own


def copied(source: Path, folder: Path, beginning: str = "", ending: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, folder / f"{beginning}{file.stem}{ending}{file.suffix}")


def written(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def desk(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader, with those folders in it."""
    for folder in folders.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(folders: Path, desk: Path, start: Callable[..., Path]) -> Path:
    """The run that the pages go on with, `runs/cells`; trained once, and copied for each test."""
    kept = folders.with_name("trained")
    if not kept.exists():
        data = ["data=coco", f"data.root={folders}/cells", "data.train=train", "data.val=val"]
        shutil.move(start("run_id=cells", data=data, small=small(data)), kept)
    shutil.copytree(kept, desk / "runs/cells")
    return desk / "runs/cells"


# Training. What a command does not choose itself is as small as it may be.

SHORT = [word for word in SMALL if word.startswith(("trainer.", "callbacks.", "logger."))]
SHORT += ["stages=[fit]", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
SHORT += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
MODELS = {
    "detection": "faster_rcnn",
    "instance_segmentation": "mask_rcnn",
    "keypoints": "keypoint_rcnn",
    "semantic_segmentation": "semantic_fpn",
    "classification": "classifier",
}
QUICK = [  # each stage and each form of data; `test_matrix.py` has the tasks, models and bodies
    shlex.split(command)
    for command in (
        "'stages=[check]' data=coco data.root=cells data.train=train data.val=val",
        "'stages=[check]' task=semantic_segmentation data=mask_folders data.root=nuclei",
        "'stages=[check]' task=classification data=class_folders data.root=clothes",
        "'stages=[test]' ckpt_path=runs/cells",
        "resume=runs/cells",
        "data=voc data.root=BCCD",
        "data=yolo data.root=nuts",
        "task=semantic_segmentation data=mask_folders data.root=nuclei",
        "task=classification data=class_folders data.root=clothes",
        "backbone=custom backbone._target_=own_body.Tiny +backbone.width=8",
        "data=voc data.root=BCCD model.weights=runs/cells",
    )
]


def chosen(words: Words, group: str, default: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{group}=")), default)


def small(words: Words) -> Words:
    """Settings in front of a command's own."""
    if any(word.startswith(("ckpt_path=", "resume=")) for word in words):
        return SHORT  # network and data are the checkpoint's
    task = chosen(words, "task", "detection")
    learner = LEARNERS[chosen(words, "model", MODELS[task])][0]
    settings = [*SHORT, *(word for word in learner if word.startswith("model.")), "data.num_workers=0"]
    settings.append("data.batch_size=2")
    if not any(word.startswith("backbone=") for word in words):
        settings += BODIES["resnext"]
    if not any("augment=" in word for word in words):  # recipes have sizes of their own
        settings.append("data.image_size=64" if task == "classification" else "data.image_size=[64,64]")
    return settings


def own_body() -> str:
    (code,) = [block for block in BLOCKS["backbones"] if "class Tiny" in block]
    return code[: code.index("check_backbone(Tiny())")]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=() if words in QUICK else pytest.mark.slow) for words in TRAIN],
    ids=shlex.join,
)
def test_training(
    words: Words,
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_shapes: list[str],
    start: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    (desk / "own_body.py").write_text(own_body())
    monkeypatch.syspath_prepend(str(desk))
    monkeypatch.setattr("tasks.run.find_weights", lambda cfg: None)  # which would download them
    monkeypatch.setattr(building, "load_weights", published(desk, load_weights))
    monkeypatch.setattr(building, "load_network", published(desk, load_network))
    if any("runs/" in word for word in words):
        kept = request.getfixturevalue("trained")
        if "backbone.weights=runs/clothes" in words:
            kept.with_name("clothes").symlink_to(kept)
    longer = any(word.startswith(("resume=", "backbone.unfreeze=")) for word in words)
    more = ["trainer.max_epochs=2"] if longer else []
    embedded = not any("data.root=" in word or "runs/" in word for word in words)
    folder = start(*words, *more, data=tiny_shapes if embedded else (), small=small(words))
    stages = chosen(words, "stages", "[fit]")
    if "check" in stages:
        assert Image.open(folder / "check_train.png").width > 64
    if "fit" in stages:
        assert (folder / "checkpoints/last.ckpt").is_file()
    if "test" in stages or "validate" in stages:
        numbers = json.loads((folder / "summary.json").read_text())["results"]
        assert [name for name in numbers if name.startswith(("test/", "val/"))]


def published(folder: Path, load: Callable[..., object]) -> Callable[..., object]:
    """Loads as ever, but in place of torchvision's weights random ones: tests stay off the network."""

    def load_saved(network: nn.Module, *arguments: object) -> object:
        *others, source = arguments[:2] if load is load_network else arguments
        if "_Weights." in str(source):
            save_weights(network, folder / "published.safetensors")
            source = str(folder / "published.safetensors")
        return load(network, *others, source, *arguments[2:])

    return load_saved


@pytest.mark.parametrize("words", [words for words in TRAIN if words not in QUICK], ids=shlex.join)
def test_settings_exist_and_are_of_their_kind(words: Words) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=words, return_hydra_config=True)
        check_types(cfg, words, dict(cfg.hydra.runtime.choices), "train")


@pytest.mark.parametrize(
    "path", [path for path in DOCS.glob("*.md") if path.stem not in RUN], ids=lambda path: path.stem
)
def test_settings_of_the_other_pages_exist(path: Path) -> None:
    for words in commands_of(path.read_text().replace("\\\n", "")):
        if words[0] == "train.py":
            test_settings_exist_and_are_of_their_kind(words[1:])


def test_the_quick_commands_stand_in_the_pages() -> None:
    assert [words for words in QUICK if words not in TRAIN] == []


@pytest.mark.parametrize("words", PREDICT, ids=shlex.join)
def test_prediction(words: Words, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(words) == 0
    folder = Path(words[words.index("--output") + 1] if "--output" in words else "predictions/cells")
    assert str(folder) in capsys.readouterr().out
    assert len(json.loads((folder / "images.json").read_text())["images"]) > 0
    assert isinstance(json.loads((folder / "predictions.json").read_text()), list)


@pytest.mark.parametrize("words", DRAW, ids=shlex.join)
def test_the_figure_is_drawn(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forms.png"
    monkeypatch.setattr(sys, "argv", ["docs/draw_forms.py", *words, str(path)])
    runpy.run_path(str(DOCS / "draw_forms.py"), run_name="__main__")
    drawn, shown = (Image.open(file).convert("L") for file in (path, DOCS / "images/forms.png"))
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


@pytest.mark.parametrize("name", [name for name in RUN if BLOCKS[name]])
def test_the_python_of_a_page_runs_in_order(
    name: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = resnext50_32x4d().state_dict()
    model = {detectron2_name(k): v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    Path("model_final.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "test"}))
    page = types.ModuleType("page")  # a real one, since pickling looks a class up in its module
    monkeypatch.setitem(sys.modules, "page", page)
    for block in BLOCKS[name]:
        exec(compile(block, f"docs/{name}.md", "exec"), vars(page))


def test_there_is_python_to_run() -> None:
    assert len(BLOCKS["backbones"]) >= 8
    assert len(BLOCKS["tasks"]) >= 1


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", RUN)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        path = DOCS / (file or f"{name}.md")
        assert path.exists(), link
        assert not heading or heading in anchors(path.read_text()), link
