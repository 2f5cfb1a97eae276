"""Power cuts and full disks at every change that an installation makes to the disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from firstboot import containers
from firstboot.containers import ContainerError, trial
from tests.adapters.oci_images import HOSTFS, PLAIN, build, need_tools, snapshot

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {f"os.{change}" for change in ("mkdir", "rename", "link", "symlink", "remove", "rmdir")}
CHANGES |= {"os.chmod", "subprocess.Popen"}
DONE, REFUSED = 0, 2
FIRST: dict[str, Any] = {
    **PLAIN,
    **HOSTFS,
    "exports/tmpfiles.template": "d /var/lib/$NAME 0700 - - - -\nd /var/lib/two\n",
    "exports/hostfs/etc/old.conf": "old",
}
NEXT: dict[str, Any] = {
    **PLAIN,
    **HOSTFS,
    "exports/tmpfiles.template": "d /var/lib/$NAME 0700 - - - -\n",
    "exports/hostfs/etc/new.conf": "new",
}
GIVEN = {"GREETING": "first", "UUID": "1", "ATOMIC": "a"}


def in_child(task: Callable[[], object], at: int, strike: Callable[[], None]) -> tuple[int, int]:
    """Run `task` in a process of its own, and `strike` just before its change number `at`.

    Returns how many changes it began and the process's wait status. No seam in the product is
    needed: the interpreter announces every change of the disk (PEP 578).
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader) as answer:
            begun = answer.read()
        return int(begun or 0), os.waitpid(pid, 0)[1]
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        flags = arguments[2] if event == "open" else 0
        if event in CHANGES or (isinstance(flags, int) and flags & WRITES):
            count += 1
            if count == at:
                strike()

    status = 1
    try:
        sys.addaudithook(watch)
        task()
        status = DONE
    except ContainerError:
        status = REFUSED
    finally:
        os.write(writer, str(count).encode())
        os._exit(status)


def power_cut() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")


class Change:
    """An installation on a host, and how that host looks before and after."""

    def __init__(self, where: Path, replaces: bool) -> None:
        self.where, self.runs = where, 0
        first = build(where / "first", FIRST)
        self.image = build(where / "next", NEXT) if replaces else first
        self.values = {**GIVEN, "GREETING": "next"} if replaces else GIVEN
        self.template = where / "template"
        for directory in ("etc/systemd/system", "etc/tmpfiles.d", "var/lib/containers/atomic"):
            (self.template / directory).mkdir(parents=True)
        if replaces:
            containers.install(self.template, "web", first, GIVEN)
        self.before = snapshot(self.template)
        self.done = self.host()
        self.make(self.done)
        self.after = snapshot(self.done)
        self.target = (
            "var/lib/containers/atomic/web.1" if replaces else "var/lib/containers/atomic/web.0"
        )
        self.count, status = in_child(partial(self.make, self.host()), 0, power_cut)
        assert status == 0
        assert self.count > 20, "too few changes seen: is the watch working?"

    def host(self, like: Path | None = None) -> Path:
        """Another host that looks like `before`, or `like` that one."""
        self.runs += 1
        root = self.where / f"host{self.runs}"
        shutil.copytree(like or self.template, root, symlinks=True)
        return root

    def make(self, root: Path) -> None:
        containers.install(root, "web", self.image, self.values)


@pytest.fixture(params=[False, True], ids=["first", "replacement"])
def change(request: pytest.FixtureRequest, memory: Path) -> Change:
    need_tools()
    return Change(memory, request.param)


def test_the_next_call_makes_good_a_power_cut_at_any_moment(change: Change) -> None:
    for at in range(1, change.count + 1):
        root = change.host()
        _, status = in_child(partial(change.make, root), at, power_cut)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert_old_or_new(change, root)
        change.make(root)
        assert snapshot(root) == change.after, f"after a power cut before change {at}"
        shutil.rmtree(root)


def test_what_a_power_cut_left_is_completed_at_boot_or_rolled_back(memory: Path) -> None:
    """Whatever deployment is in use then, the host matches it, and the one before is there."""
    need_tools()
    change = Change(memory, replaces=True)
    seen = set()
    for at in range(1, change.count + 1):
        root = change.host()
        _, status = in_child(partial(change.make, root), at, power_cut)
        assert os.WTERMSIG(status) == signal.SIGKILL
        done = containers.resume(root, "web")
        now = containers.info(root, "web")
        assert now is not None
        new = now.deployment.endswith("web.1")
        seen.add((new, done is not None and done.replaced))
        assert (new, new) in seen, "a new deployment is on trial"
        if new:
            assert files_of(snapshot(root)) == files_of(change.after)
            containers.rollback(root, "web")
        for name in trial.names(root):  # an unfinished mark
            assert containers.resume(root, name) is None
        assert trial.names(root) == []
        # The names under which files and links are prepared are used again by the next call.
        in_use = {p: what for p, what in files(change, root).items() if not p.endswith(".new")}
        assert in_use == files(change, change.before), f"after a power cut before change {at}"
        shutil.rmtree(root)
    assert seen == {(True, True), (False, False)}


def assert_old_or_new(change: Change, root: Path) -> None:
    """The deployment in use, if there is one, is complete: the old or the new one."""
    found = containers.info(root, "web")
    if found is None:
        assert containers.info(change.template, "web") is None, "the old deployment is lost"
        return
    here = snapshot(root / found.deployment.lstrip("/"))
    prefix = found.deployment.lstrip("/") + "/"
    whole = [
        {path.removeprefix(prefix): what for path, what in state.items() if path.startswith(prefix)}
        for state in (change.before, change.after)
    ]
    assert here in whole


def test_a_failure_at_any_moment_leaves_the_host_as_it_was(change: Change) -> None:
    refused = 0
    for at in range(1, change.count + 1):
        root = change.host()
        _, status = in_child(partial(change.make, root), at, disk_full)
        code = os.waitstatus_to_exitcode(status)
        assert code in (DONE, REFUSED), f"no sentence when change {at} failed"
        # Making a directory that is there already may fail without harm.
        expected = change.after if code == DONE else change.before
        assert files(change, root) == files(change, expected), f"when change {at} failed"
        refused += code == REFUSED
        shutil.rmtree(root)
    assert refused > change.count * 0.7


def files(change: Change, host: Path | dict[str, object]) -> dict[str, object]:
    """All but directories, and but the deployment that is not in use."""
    found = snapshot(host) if isinstance(host, Path) else host
    in_use = found.get("var/lib/containers/atomic/web")
    spare = (
        change.target if in_use is None or not str(in_use).endswith(f"{change.target}',)") else "-"
    )
    return {
        path: what
        for path, what in found.items()
        if what != ("directory",) and not path.startswith(spare)
    }


def test_an_interrupted_removal_can_be_repeated(memory: Path) -> None:
    need_tools()
    change = Change(memory, replaces=True)
    gone = change.host(change.done)
    count, _ = in_child(partial(containers.uninstall, gone, "web"), 0, power_cut)
    assert count > 20
    expected = snapshot(gone)
    for at in range(1, count + 1):
        root = change.host(change.done)
        _, status = in_child(partial(containers.uninstall, root, "web"), at, power_cut)
        assert os.WTERMSIG(status) == signal.SIGKILL
        containers.uninstall(root, "web")
        assert snapshot(root) == expected, f"after a power cut before change {at}"
        shutil.rmtree(root)


def test_an_interrupted_rollback_can_be_repeated(memory: Path) -> None:
    """Once more after a power cut is not once too often: it ends where the first was to end."""
    need_tools()
    change = Change(memory, replaces=True)
    back = change.host(change.done)
    count, _ = in_child(partial(containers.rollback, back, "web"), 0, power_cut)
    assert count > 10
    expected = snapshot(back)
    again, first = containers.info(back, "web"), containers.info(change.template, "web")
    assert again is not None and first is not None
    assert again.deployment == first.deployment
    for at in range(1, count + 1):
        root = change.host(change.done)
        _, status = in_child(partial(containers.rollback, root, "web"), at, power_cut)
        assert os.WTERMSIG(status) == signal.SIGKILL
        containers.rollback(root, "web")
        assert snapshot(root) == expected, f"after a power cut before change {at}"
        shutil.rmtree(root)


def test_a_rollback_that_fails_leaves_the_host_as_it_was(memory: Path) -> None:
    need_tools()
    change = Change(memory, replaces=True)
    back = change.host(change.done)
    count, _ = in_child(partial(containers.rollback, back, "web"), 0, power_cut)
    expected = {DONE: snapshot(back), REFUSED: change.after}
    refused = 0
    for at in range(1, count + 1):
        root = change.host(change.done)
        _, status = in_child(partial(containers.rollback, root, "web"), at, disk_full)
        code = os.waitstatus_to_exitcode(status)
        assert files_of(snapshot(root)) == files_of(expected[code]), f"when change {at} failed"
        refused += code == REFUSED
        shutil.rmtree(root)
    assert refused > count * 0.7


def files_of(found: dict[str, object]) -> dict[str, object]:
    return {path: what for path, what in found.items() if what != ("directory",)}
