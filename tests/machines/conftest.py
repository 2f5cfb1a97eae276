"""What tests on machines share: rigs that explain a failure, and no silent way around them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.machines.rig import ARTEFACTS, Rig


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Machines need root and nspawn: without them skip, and say so; in CI that is a failure."""
    if item.get_closest_marker("machine") is None:
        return
    lack = "root" if os.geteuid() else "" if shutil.which("systemd-nspawn") else "systemd-nspawn"
    if lack and os.environ.get("CI"):
        pytest.fail(f"needs {lack}: run `make test`", pytrace=False)
    if lack:
        pytest.skip(f"needs {lack}: run `make test`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """When a test fails, keep the consoles, journals and statuses of the machines it used."""
    report = yield
    if report.failed and call.when != "teardown":
        name = re.sub(r"[^\w.-]+", "_", item.name)
        for rig in list(Rig.live):
            kept = rig.collect(ARTEFACTS / name / rig.run.prefix)
            report.sections.append(("machines", f"consoles and journals: {kept}"))
    return report


@pytest.fixture
def launch() -> Iterator[Callable[..., Rig]]:
    """`Rig`, closed after the test: ``rig = launch(3, user_data)``."""
    with ExitStack() as rigs:
        yield lambda *arguments, **options: rigs.enter_context(Rig(*arguments, **options))
