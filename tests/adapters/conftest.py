"""What the tests of system containers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.oci_images import PLAIN, build


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty host."""
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A sound image that says as little as possible."""
    return build(tmp_path / "plain", PLAIN)
