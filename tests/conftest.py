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
