"""The oldest packages that `pyproject.toml` admits still work."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ["test_resnext", "test_fpn", "test_norm", "test_weights", "test_rcnn", "test_transforms", "test_coco"]
TESTS += ["test_metrics", "test_configs", "test_train"]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("uv"), reason="uv resolves and installs the oldest versions; it is not here"
)
def test_the_oldest_versions(tmp_path):
    """In an environment of its own, resolved with `--resolution lowest-direct`."""
    project = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    environment["REAL_DATA"] = str(tmp_path / "none")
    command = ["uv", "run", "--resolution", "lowest-direct", "pytest", "-q", "-x"]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in TESTS)],
        cwd=project, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
