"""The compiled simulator is the same simulator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim.campaign import narrated
from tests.sim.compiled import COMPILED, ROOT, SIMULATED, compiled


@pytest.mark.timeout(900)
def test_compiled_and_not_every_event_and_action_is_the_same() -> None:
    directory = compiled()
    for name in COMPILED:
        assert list(directory.glob(f"firstboot/protocol/{name}.*.so")), f"{name} is not compiled"
    for name in SIMULATED:
        assert list(directory.glob(f"tests/sim/{name}.*.so")), f"{name} is not compiled"
    for seed in (3, 41, 42):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tests.sim", "--narrate", str(seed)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(directory)},
            check=True,
            capture_output=True,
            text=True,
        )
        told = done.stdout.rstrip("\n").split("\n")
        assert told == "\n".join(narrated(seed)).split("\n")
        assert len(told) > 100
