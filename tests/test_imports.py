"""Who only wants the backbones pays for nothing else."""

import subprocess
import sys
from pathlib import Path

import resnext_backbones

ABOVE = ("tasks", "lightning", "torchmetrics", "hydra", "omegaconf", "wandb", "hotcoco", "pycocotools")
LATE = ("timm", "matplotlib", "rich", "huggingface_hub")  # loaded by what needs them, when it needs them


def test_importing_the_backbones_loads_nothing_of_the_training() -> None:
    code = f"import sys, resnext_backbones; print(*(set({ABOVE + LATE}) & set(sys.modules)))"
    root = Path(resnext_backbones.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_public_names_exist_and_are_all_there_are() -> None:
    modules = {p.stem for p in Path(resnext_backbones.__file__).parent.glob("*.py")}
    names = {name for name in vars(resnext_backbones) if not name.startswith("_")}
    assert set(resnext_backbones.__all__) == names - modules
