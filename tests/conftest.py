from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and tokenizers; its files are listed in its MANIFEST.md."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RETOOL_TEST_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("real data is not here: set RETOOL_TEST_DATA to its folder")
    return folder
