"""Against a real systemd: the user instance, alone in namespaces of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firstboot.units import Systemd, SystemdFailed, UnitFailed

# /run/systemd/system must be there, else systemd refuses; --kill-child takes everything down.
BOOT = """
set -eu
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user
mount --bind "$1/user" /run/user
mkdir -p -m 700 /run/user/0
export HOME=/root XDG_RUNTIME_DIR=/run/user/0 XDG_CONFIG_HOME="$1/config"
export DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/0/bus SYSTEMD_LOG_TARGET=console
/lib/systemd/systemd --user --unit=basic.target
"""
GENEROUS = 60.0  # a limit for things that take milliseconds, on a slow and busy machine
UNITS = {
    "sound.service": "ExecStart=/bin/sleep infinity",
    "ready.service": """Type=notify
NotifyAccess=all
ExecStart=/bin/sh -c 'systemd-notify --ready; exec sleep infinity'""",
    "broken.service": "Type=oneshot\nExecStart=/bin/sh -c 'exit 3'",
    "prepared.service": "ExecStartPre=/bin/false\nExecStart=/bin/sleep infinity",
    "killed.service": "Type=oneshot\nExecStart=/bin/sh -c 'kill -SEGV $$$$'",
    "mute.service": "Type=notify\nTimeoutStartSec=300ms\nExecStart=/bin/sleep infinity",
    "slow.service": "Type=notify\nTimeoutStartSec=infinity\nExecStart=/bin/sleep infinity",
    # Ready only once the trap is set: a signal that comes before it would end it.
    "stubborn.service": """Type=notify
NotifyAccess=all
TimeoutStopSec=1500ms
ExecStart=/bin/sh -c 'trap "" TERM; systemd-notify --ready; sleep infinity & wait; wait'""",
    "quits.service": "Type=notify\nExecStart=/bin/true",
    "done.service": "Type=oneshot\nExecStart=/bin/true",
    # Started only when the main process has gone: it is never seen active, however slow we are.
    "gone.service": """Type=exec
ExecStart=/bin/true
ExecStartPost=/bin/sh -c 'while kill -0 $$MAINPID; do sleep 0.01; done'""",
    "retried.service": """Type=notify
NotifyAccess=all
Restart=on-failure
RestartSec=50ms
ExecStart=/bin/sh -c 'test -e %t/second && { systemd-notify --ready; exec sleep infinity; }; \\
touch %t/second; exit 9'""",
    "shortlived.service": """Type=simple
Restart=always
RestartSec=2s
ExecStart=/bin/sh -c 'exit 7'""",
    "hopeless.service": """Type=notify
Restart=on-failure
RestartSec=50ms
ExecStart=/bin/sh -c 'exit 7'""",
}
SECTIONS = {
    "wary.service": "[Unit]\nConditionPathExists=/nonexistent\n[Service]\nExecStart=/bin/true",
    "needy.service": """[Unit]
Requires=broken.service
After=broken.service
[Service]
ExecStart=/bin/sleep infinity""",
    "nonsense.service": "[Service]\nType=oneshot\n",
    "wanted.service": "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=basic.target",
    "group.target": "[Unit]\nRequires=sound.service\nAfter=sound.service",
}


class Manager:
    """A systemd of our own, with its message bus."""

    def __init__(self, directory: Path) -> None:
        self.units = directory / "config/systemd/user"
        self.units.mkdir(parents=True)
        (directory / "user").mkdir()
        self.bus = directory / "user/0/bus"
        self._log = directory / "log"
        top = Path("/sys/fs/cgroup")
        top = top / "unified" if (top / "unified").is_dir() else top
        self._cgroup = top / f"firstboot-test-{os.getpid()}"
        for name, text in UNITS.items():
            self.write(name, f"[Service]\n{text}")
        for name, text in SECTIONS.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.units / name).write_text(text + "\n")

    def start(self, directory: Path) -> None:
        self._cgroup.mkdir()
        enter = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        namespaces = ["unshare", "-m", "-p", "-C", "-f", "--mount-proc", "--kill-child=SIGKILL"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", enter, "sh", *namespaces, "sh", "-c", BOOT, "sh", str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + GENEROUS
        while not self.bus.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"systemd --user does not start:\n{self._log.read_text()}")
            threading.Event().wait(0.01)  # nothing tells when a file appears in a namespace

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)  # it ignores SIGTERM
        self._process.wait(GENEROUS)
        until = time.monotonic() + GENEROUS
        while self._cgroup.exists() and time.monotonic() < until:
            for path in sorted(self._cgroup.rglob("*/"), reverse=True):
                _remove(path)
            _remove(self._cgroup)
        assert not self._cgroup.exists()


def _remove(cgroup: Path) -> None:
    try:
        cgroup.rmdir()
    except OSError:  # its last process is not quite gone
        threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    directory = tmp_path_factory.mktemp("systemd")
    manager = Manager(directory)
    manager.start(directory)
    try:
        yield manager
    finally:
        manager.stop()


@pytest.fixture
def systemd(manager: Manager) -> Iterator[Systemd]:
    systemd = Systemd(f"unix:path={manager.bus}", journalctl=())
    try:
        yield systemd
    finally:
        systemd.close()


def failure(systemd: Systemd, unit: str, deadline: float = GENEROUS) -> UnitFailed:
    with pytest.raises(UnitFailed) as caught:
        systemd.start(unit, deadline)
    assert caught.value.unit == unit
    return caught.value


@pytest.mark.parametrize("unit", ["sound.service", "ready.service", "group.target"])
def test_a_unit_becomes_active(systemd: Systemd, unit: str) -> None:
    systemd.start(unit, GENEROUS)
    first = systemd.state(unit)
    assert (first.load, first.active) == ("loaded", "active")
    assert abs(first.since_wall - time.time()) < 3600
    systemd.start(unit, GENEROUS)  # again, which changes nothing
    assert systemd.state(unit) == first


def test_a_oneshot_is_done_when_it_has_ended(systemd: Systemd) -> None:
    systemd.start("done.service", GENEROUS)
    assert systemd.state("done.service").active == "inactive"


@pytest.mark.parametrize(
    ("unit", "result", "status", "words"),
    [
        ("broken.service", "exit-code", 3, "it exited with status 3"),
        ("prepared.service", "exit-code", 0, "one of its commands failed"),
        ("killed.service", "core-dump|signal", signal.SIGSEGV, "killed by SIGSEGV"),
        ("mute.service", "timeout", 15, "did not become ready in time"),
        ("quits.service", "protocol", 0, "without telling that it is ready"),
        ("gone.service", "ended", 0, "it ended at once"),
        ("hopeless.service", "exit-code", 7, "it exited with status 7"),
        ("wary.service", "condition", 0, "conditions is not met"),
        ("needy.service", "dependency", 0, "it needs broken.service, which failed"),
        ("nonsense.service", "bad-setting", 0, "bad setting"),
        ("missing.service", "not-found", 0, "there is no such unit"),
        ("not a unit", "", 0, ""),
    ],
)
def test_how_a_unit_fails(
    systemd: Systemd, unit: str, result: str, status: int, words: str
) -> None:
    if unit == "not a unit":
        with pytest.raises(SystemdFailed, match="not valid"):
            systemd.start(unit, GENEROUS)
        return
    failed = failure(systemd, unit)
    assert failed.result in result.split("|")
    assert failed.status == status
    assert words in str(failed)
    assert failed.log == ()


def test_failing_again_and_again_is_told_each_time(systemd: Systemd) -> None:
    # systemd's own limit is 5 starts in 10 s; then it refuses, and its reason hides the real one
    assert {failure(systemd, "broken.service").result for _ in range(8)} == {"exit-code"}


def test_a_unit_that_systemd_restarts_gets_a_second_chance(systemd: Systemd) -> None:
    systemd.start("retried.service", GENEROUS)
    assert systemd.state("retried.service").sub == "running"


def test_a_unit_that_starts_and_does_not_stay(systemd: Systemd) -> None:
    """Active as soon as it runs, so only looking again shows that it ends."""
    assert systemd.ailing("sound.service", 0) == (0, None)
    with suppress(UnitFailed):  # if its end is seen before its start is
        systemd.start("shortlived.service", GENEROUS)
    until = time.monotonic() + GENEROUS
    # Where it had ended before the start was seen, that waited for its second, and it runs again.
    while (found := systemd.ailing("shortlived.service", 0)[1]) is None or found.result == "again":
        assert time.monotonic() < until
        threading.Event().wait(0.05)
    assert (found.result, found.status) == ("exit-code", 7)
    assert systemd.ailing("shortlived.service", 9)[1] is None
    systemd.stop("shortlived.service", GENEROUS)


def test_a_unit_is_stopped(systemd: Systemd) -> None:
    systemd.start("sound.service", GENEROUS)
    systemd.stop("sound.service", GENEROUS)
    assert systemd.state("sound.service").active == "inactive"
    for unit in ("sound.service", "missing.service"):
        systemd.stop(unit, GENEROUS)  # nothing to do


def test_a_unit_that_does_not_stop(systemd: Systemd) -> None:
    systemd.start("stubborn.service", GENEROUS)
    with pytest.raises(SystemdFailed, match=r"^stubborn\.service did not stop within 0 s$"):
        systemd.stop("stubborn.service", 0.2)
    systemd.stop("stubborn.service", GENEROUS)


def test_when_a_unit_became_active(systemd: Systemd) -> None:
    systemd.start("sound.service", GENEROUS, restart=True)
    first = systemd.state("sound.service").active_wall
    assert abs(first - time.time()) < 3600
    systemd.start("sound.service", GENEROUS, restart=True)
    assert systemd.state("sound.service").active_wall > first


def test_the_deadline(systemd: Systemd) -> None:
    failed = failure(systemd, "slow.service", 0.2)
    assert failed.result == "deadline"
    assert systemd.state("slow.service").active == "activating"


def test_waiting_can_be_cancelled(manager: Manager) -> None:
    systemd = Systemd(f"unix:path={manager.bus}", journalctl=())
    manager.write("endless.service", f"[Service]\n{UNITS['slow.service']}")
    systemd.reload()
    caught: list[BaseException] = []

    def start() -> None:
        try:
            systemd.start("endless.service", 10 * GENEROUS)
        except SystemdFailed as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while systemd.state("endless.service").active != "activating":
        threading.Event().wait(0.01)
    systemd.cancel()
    thread.join(GENEROUS)
    assert [str(error) for error in caught] == ["waiting for a unit was cancelled"]
    systemd.close()


def test_many_threads_may_follow_units(systemd: Systemd, manager: Manager) -> None:
    names = [f"parallel{n}.service" for n in range(8)]
    for name in names:
        manager.write(name, f"[Service]\n{UNITS['ready.service']}")
    systemd.reload()
    threads = [threading.Thread(target=systemd.start, args=(n, GENEROUS)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS)
    assert {systemd.state(name).active for name in names} == {"active"}


def test_reload_picks_up_a_new_and_a_changed_file(systemd: Systemd, manager: Manager) -> None:
    assert systemd.state("late.service").load == "not-found"
    manager.write("late.service", "[Service]\nType=oneshot\nExecStart=/bin/false")
    systemd.reload()
    assert failure(systemd, "late.service").result == "exit-code"
    manager.write("late.service", "[Service]\nExecStart=/bin/sleep infinity")
    systemd.reload()
    systemd.start("late.service", GENEROUS)
    assert systemd.state("late.service").active == "active"


def test_enable(systemd: Systemd, manager: Manager) -> None:
    link = manager.units / "basic.target.wants/wanted.service"
    assert systemd.enable("wanted.service")
    assert link.is_symlink()
    assert systemd.enable("wanted.service")  # again, which changes nothing
    assert not systemd.enable("sound.service")  # nothing says when it shall be started
    with pytest.raises(UnitFailed, match="no such unit") as caught:
        systemd.enable("missing.service")
    assert caught.value.result == "not-found"
    systemd.disable("wanted.service")
    assert not link.is_symlink()
    systemd.disable("wanted.service")
    systemd.disable("missing.service")


def test_masked(systemd: Systemd, manager: Manager) -> None:
    (manager.units / "hidden.service").symlink_to("/dev/null")
    systemd.reload()
    assert failure(systemd, "hidden.service").result == "masked"


def test_the_last_lines_of_the_journal(manager: Manager, tmp_path: Path) -> None:
    journal = tmp_path / "journalctl"
    journal.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        "[ $1 = --sync ] && exit\n"
        "for n in $(seq 20); do echo line $n; done\n"
        "printf 'red \\033[31mtext\\n'; head -c 9999 /dev/zero | tr '\\0' x\n"
    )
    journal.chmod(0o755)
    systemd = Systemd(f"unix:path={manager.bus}", journalctl=[str(journal)])
    failed = failure(systemd, "broken.service")
    assert len(failed.log) == 10
    assert failed.log[0] == "line 13"
    assert failed.log[8] == "red  [31mtext"
    assert failed.log[9] == "x" * 300
    assert failed.detail.startswith("line 13\nline 14\n")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--sync", "_SYSTEMD_UNIT=broken.service -n 10 -o cat --no-pager -q"]
    systemd.close()


def test_without_a_journal_the_failure_is_told_all_the_same(manager: Manager) -> None:
    systemd = Systemd(f"unix:path={manager.bus}", journalctl=["/nonexistent/journalctl"])
    assert failure(systemd, "broken.service").log == ()
    systemd.close()


def test_no_bus(tmp_path: Path) -> None:
    systemd = Systemd(f"unix:path={tmp_path}/none")
    with pytest.raises(SystemdFailed, match="no message bus"):
        systemd.reload()
    systemd.close()
