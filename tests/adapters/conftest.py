"""What the tests of system containers share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory if there is one: hundreds of installations each sync their disk."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as path:
        yield Path(path)
