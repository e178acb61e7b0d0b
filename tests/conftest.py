"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT / "../shared/data")).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets and published vectors; the test is skipped where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data: {REAL_DATA} does not exist (set REAL_DATA)")
    return REAL_DATA


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line's words for a handful of the embedded dataset's images."""
    from tasks.data.shapes import write_shapes

    images = {"train": 16, "val": 6, "test": 5}
    root = write_shapes(tmp_path_factory.mktemp("data") / "shapes", **images)
    return [f"data.root={root}", "data.images={train: 16, val: 6, test: 5}"]
