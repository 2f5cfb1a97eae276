"""More hosts than connect to everybody, as processes; ``python -m tests.network.many``: fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.network.many import form

pytestmark = pytest.mark.network


def test_twenty_processes_form(tmp_path: Path) -> None:
    figures = form(20, tmp_path, timeout=120)
    assert (figures.clusters, figures.masters) == (1, 1)
    assert len(figures.at["running"]) == len(figures.cpu) == len(figures.sent) == 20
