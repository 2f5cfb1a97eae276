"""The acceptance scenarios A01-A33: which test shows each, and how it went, as a closing table."""

from __future__ import annotations

import signal
from collections import defaultdict

import pytest

COUNTED = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def pytest_configure() -> None:
    # A shell's background job ignores Ctrl-C, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("scenario"):
            item.user_properties += [("scenario", scenario) for scenario in mark.args]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for outcome in COUNTED:
        for report in terminalreporter.stats.get(outcome, []):
            for name, scenario in getattr(report, "user_properties", ()):
                if name == "scenario":
                    counts = rows[str(scenario)][report.nodeid.partition("::")[0]]
                    counts[outcome] = counts.get(outcome, 0) + 1
    if not rows:
        return
    terminalreporter.section("acceptance scenarios")
    for scenario, files in sorted(rows.items()):
        for file, counts in sorted(files.items()):
            told = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
            bad = counts.keys() - {"passed"}
            terminalreporter.line(f"{scenario}  {file:40}  {told}", red=bool(bad), green=not bad)
    terminalreporter.line(f"{len(rows)} scenarios")
