"""A trained network out of a run's folder or a checkpoint, ready for images.

A checkpoint may come from a stranger. It is read without unpickling, and its configuration may name only this
project's own networks, and builders that an installed plug-in declares (`tasks.plugins`); anything else would
be code of the file's choice.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import resnext_backbones
from resnext_backbones.errors import UsageError
from tasks.base import BaseTask
from tasks.building import HAND_OVER, build, build_body, build_model, precision
from tasks.checkpoint import read_checkpoint
from tasks.plugins import BUILDERS, builders
from tasks.prediction.predictor import Predictor
from tasks.pretrained import restore_normalisation

ALLOWED = {  # of ours, what a checkpoint's configuration may build
    "backbone": {
        f"resnext_backbones.{name}"
        for name in (*resnext_backbones.VARIANTS, "ResNeXt", "TorchvisionBody", "TimmBody")
    },
    "model": {
        *(f"tasks.models.rcnn.{name}" for name in ("faster_rcnn", "mask_rcnn", "keypoint_rcnn")),
        *(f"tasks.models.one_stage.{name}" for name in ("retinanet", "fcos")),
        *(f"tasks.models.semantic.{name}" for name in ("semantic_fpn", "deeplabv3")),
        "tasks.models.c4.faster_rcnn_c4",
        "tasks.models.classifier.Classifier",
    },
    "task": {
        "tasks.detection.DetectionTask",
        "tasks.segmentation.SemanticTask",
        "tasks.classification.ClassificationTask",
    },
}


def load_task(
    path: str | Path,
    device: str = "auto",
    trust: bool = False,
    views: Mapping[str, Any] | None = None,
) -> Predictor:
    """The network of a run, which predicts as it did in the run's test stage.

    from tasks.load import load_task

    for found in load_task("runs/X").predict(["a.jpg", "b.jpg"]):
        print(found.names, found.scores)

    Args:
        path: a run's folder, of which the best checkpoint is taken, else (with a warning where it is damaged)
            the last; or a checkpoint.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes an accelerator where there is one.
        trust: whether the checkpoint may name code of its own, and lift the limit on an image's pixels. As
            dangerous as running a program from where it came from.
        views: of each image, such as {"flip": True, "scales": [0.75, 1.0, 1.25]}, whose results are merged
            (test-time augmentation, `tasks.views`); {}: the image as it is; None: as the run had it.

    Raises:
        UsageError: there is no readable checkpoint, it is not one of a run, it names code that is neither
            this project's nor declared by an installed plug-in, or its weights do not fit the network it
            names.
    """
    file, checkpoint = _best_or_last(Path(path))
    record = _record(checkpoint, file)
    if not trust:
        declared = set(builders())  # by name; a plug-in is not imported before something of it is built
        for part, allowed in ALLOWED.items():
            refuse_code(record["config"][part], part, allowed | declared, file)
    if views is not None:
        record["config"]["task"]["views"] = views
    where = _device(device)
    task = _built(record, file)
    _fill(task, checkpoint["state_dict"], file)
    asked = record["config"]["trainer"].get("precision", "32-true")
    return Predictor(task, where, precision(asked, where.type), trust)


def _best_or_last(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that predicts, and its content."""
    best, last = path / "checkpoints/best.ckpt", path / "checkpoints/last.ckpt"
    if not best.is_file():
        return path, read_checkpoint(path)
    try:
        return best, read_checkpoint(best)
    except UsageError as fault:
        if not last.is_file():
            raise
        checkpoint = read_checkpoint(last)
        warnings.warn(f"{fault}. TAKING {last} INSTEAD", stacklevel=3)
        return last, checkpoint


def refuse_code(config: Any, part: str, allowed: set[str], file: Path) -> None:
    """Raises UsageError if a part of a checkpoint's configuration would run anything but what is `allowed`.

    Hydra's own keywords are refused below the part's own `_target_`, and OmegaConf's interpolations anywhere:
    a run writes neither for its own networks.
    """
    target = config.get("_target_") if isinstance(config, Mapping) else None
    if not isinstance(target, str) or target not in allowed:
        raise _refused(
            file,
            f"{part}._target_={target}",
            f"install the package that it comes from, if that is a plug-in (entry points {BUILDERS}); ",
        )
    for key, value in config.items():
        if key != "_target_":
            _refuse_code(key, value, f"{part}.{key}", file)


def _refuse_code(key: Any, value: Any, where: str, file: Path) -> None:
    if isinstance(key, str) and (key.startswith("_") or "${" in key):
        raise _refused(file, f"{where}={value}")
    if isinstance(value, str) and "${" in value:
        raise _refused(file, f"{where}={value}")
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            _refuse_code(inner, entry, f"{where}.{inner}", file)
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            _refuse_code(None, entry, f"{where}[{number}]", file)
    elif not (value is None or isinstance(value, str | int | float)):
        raise _refused(file, f"{where}: a {type(value).__name__}")


def _refused(file: Path, what: str, hint: str = "") -> UsageError:
    return UsageError(
        f"{file}: names code that is not this project's, {what[:200]!r}; it was not run. {hint}If you "
        "trust where the file comes from, give trust=True (--trust)"
    )


def _record(checkpoint: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a run writes into its checkpoints: configuration, classes, skeleton."""
    record = checkpoint.get("record")
    config = record.get("config") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(config, dict):
        raise UsageError(
            f"{file}: holds no record of a run of train.py, so it is not known what network its weights "
            "belong to; give a run's checkpoint (other weights are for training: backbone.weights=FILE)"
        )
    categories, skeleton = record.get("categories"), record.get("skeleton")
    lacking = [
        f"config.{key}" for key in (*ALLOWED, "data", "trainer") if not isinstance(config.get(key), dict)
    ]
    if not _are_categories(categories):
        lacking.append("categories")
    if not (skeleton is None or _is_skeleton(skeleton)):
        lacking.append("a skeleton")
    if not isinstance(checkpoint["state_dict"], dict):
        lacking.append("weights")
    if lacking:
        raise UsageError(f"{file}: lacks {', '.join(lacking)}; the file is damaged or was changed")
    return record


def _are_categories(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("id"), int)
            for c in value
        )
    )


def _is_skeleton(value: Any) -> bool:
    names, edges = (value.get(key) for key in ("names", "edges")) if isinstance(value, dict) else (None, None)
    if not (isinstance(names, list) and isinstance(edges, list)):
        return False
    pairs = all(isinstance(edge, list | tuple) and len(edge) == 2 for edge in edges)
    return pairs and all(k in range(len(names)) for edge in edges for k in edge)


def _built(record: Mapping[str, Any], file: Path) -> BaseTask:
    """The network in its task, as in training; without reading the weights that it once began with."""
    config, skeleton = record["config"], record.get("skeleton")
    backbone = dict.fromkeys(HAND_OVER) | config["backbone"]
    parts = {part: config[part] for part in ALLOWED} | {"backbone": backbone}
    cfg = OmegaConf.create(
        {**parts, "resume": None, "ckpt_path": str(file)}
    )  # whose weights are read instead
    arguments = {"num_classes": len(record["categories"])}
    if skeleton is not None:
        arguments["num_keypoints"] = len(skeleton["names"])
    body, _ = build_body(cfg)
    model = build_model(cfg, body, **arguments)
    restore_normalisation(model, body, record.get("normalisation"), file)
    task: BaseTask = build(cfg, "task", model=model, optimizer=None, scheduler=None)
    task.record = dict(record)
    return task


def _fill(task: BaseTask, state: Mapping[str, Any], file: Path) -> None:
    """Loads every weight; UsageError names what has no place or is of another shape."""
    try:
        task.load_state_dict(state)
        return
    except (RuntimeError, AttributeError, TypeError) as fault:
        cause = fault
    mine = {name: tuple(value.shape) for name, value in task.state_dict().items()}
    theirs = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    differ = {
        "missing": [name for name in mine if name not in theirs],
        "unknown": [name for name in theirs if name not in mine],
        "of another shape": [name for name in mine if name in theirs and mine[name] != theirs[name]],
    }
    said = "; ".join(f"{len(names)} {what} ({names[0]})" for what, names in differ.items() if names)
    raise UsageError(
        f"{file}: its weights do not fit the network its record names: "
        f"{said or str(cause).splitlines()[0]}; the file is damaged, or written by another version"
    ) from cause


def _device(asked: str) -> torch.device:
    if asked == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, there in backends.items() if there), "cpu"))
    try:
        device = torch.device(asked)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise UsageError(f"device {asked}: {reason}; give cpu, or leave it out") from fault
    return device
