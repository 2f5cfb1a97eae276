"""One use of the rig: its name, its directory, and the promise that nothing of it stays behind.

Everything a run makes outside its directory carries its prefix: namespaces ``PREFIX-1``, cgroups
``PREFIX``, machines ``PREFIX-1``. The directory is locked while the run lives, so what a
``kill -9`` left can be told from a run that is going on beside this one.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

RUNS = Path(os.environ.get("FIRSTBOOT_RUNS", "/var/tmp/firstboot-rig"))
_NAMESPACES = Path("/run/netns")
_NSPAWN_TRACES = (Path("/run/systemd/nspawn/propagate"), Path("/run/systemd/nspawn/unix-export"))


class Run(contextlib.ExitStack):
    """A prefix nobody else uses and a directory that goes with it; close() undoes everything.

    Push what must be undone on it (it is an `contextlib.ExitStack`). It is closed on leaving the
    ``with`` block, on SIGTERM (which becomes SystemExit) and at the interpreter's exit.
    """

    def __init__(self) -> None:
        super().__init__()
        remove_dead_runs()
        with _registry():
            self.prefix, self.directory = _claim()
            self._lock = _lock(self.directory)
        self.callback(self._forget)
        self.callback(remove, self.prefix)
        atexit.register(self.close)
        self.callback(atexit.unregister, self.close)
        self._terminate_politely()

    def _forget(self) -> None:
        os.close(self._lock)

    def _terminate_politely(self) -> None:
        """Let SIGTERM unwind ``with`` blocks as SIGINT does, instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)
            self.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)


def remove_dead_runs() -> list[str]:
    """Remove what runs whose process is gone left behind; their prefixes."""
    removed = []
    with _registry():
        for directory in sorted(RUNS.glob("fb*")):
            try:
                lock = _lock(directory)
            except (BlockingIOError, FileNotFoundError):
                continue
            remove(directory.name)
            os.close(lock)
            removed.append(directory.name)
    return removed


def live_runs() -> list[str]:
    """Prefixes of the runs going on now, this process's own among them."""
    alive = []
    with _registry():
        for directory in sorted(RUNS.glob("fb*")):
            try:
                os.close(_lock(directory))
            except BlockingIOError:
                alive.append(directory.name)
            except FileNotFoundError:
                continue
    return alive


def remove(prefix: str) -> None:
    """Remove every process, cgroup, namespace and file of one run."""
    for group in cgroups(prefix, legacy=True):
        _empty(group)
    for namespace in sorted(_NAMESPACES.glob(f"{prefix}-*")):
        _kill(_pids_in(namespace.name))
        subprocess.run(["ip", "netns", "del", namespace.name], check=False, capture_output=True)
    for traces in _NSPAWN_TRACES:
        for trace in traces.glob(f"{prefix}-*"):
            shutil.rmtree(trace, ignore_errors=True)
    shutil.rmtree(RUNS / prefix, ignore_errors=True)
    if (RUNS / prefix).exists():  # ostree makes deployments immutable
        subprocess.run(["chattr", "-R", "-f", "-i", RUNS / prefix], check=False)
        shutil.rmtree(RUNS / prefix, ignore_errors=True)


def cgroups(name: str, *, legacy: bool = False) -> list[Path]:
    """The cgroup called `name` at the top of each hierarchy a machine needs one in.

    That is the one hierarchy of a cgroup v2 host, or systemd's own and the unified one of a
    hybrid host (cgroups(7)); for a `legacy` machine every controller's as well. They need not
    exist.
    """
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.procs").exists():
        return [top / name]
    first = [top / kind / name for kind in ("unified", "systemd") if (top / kind).is_dir()]
    tops = {path.parent.resolve() for path in first}
    others = sorted({path.resolve() for path in top.iterdir()} - tops) if legacy else []
    return first + [path / name for path in others if (path / "cgroup.procs").exists()]


def make_cgroup(group: Path) -> None:
    """Make a cgroup with its parents; one of the CPUs' controller needs some to hold a process."""
    for path in (group.parent, group):
        path.mkdir(parents=True, exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (path / name).exists() and not (path / name).read_text().strip():
                (path / name).write_text((path.parent / name).read_text())


def legacy_cgroups() -> bool:
    """Whether this host still has the controllers of cgroup v1."""
    return Path("/sys/fs/cgroup/memory/cgroup.procs").exists()


def wait_until(met: Callable[[], object], timeout: float, what: str) -> None:
    """Look every 20 ms until `met` says yes; TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(0.02)


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    """Only one process at a time claims a directory, so that none is seen before it is locked."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "registry").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _claim() -> tuple[str, Path]:
    while True:
        prefix = "fb" + "".join(random.choices(string.ascii_lowercase + string.digits, k=4))
        with contextlib.suppress(FileExistsError):
            (RUNS / prefix).mkdir(mode=0o700)
            return prefix, RUNS / prefix


def _lock(directory: Path) -> int:
    """A descriptor that holds the directory's lock; BlockingIOError if another one does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _pids_in(namespace: str) -> list[int]:
    found = subprocess.run(
        ["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def _kill(pids: list[int]) -> None:
    for pid in pids:
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _empty(group: Path) -> None:
    """Kill everything in a cgroup and below, then remove it."""
    if not group.is_dir():
        return
    with contextlib.suppress(OSError):
        (group / "cgroup.freeze").write_text("0")

    def gone() -> bool:
        directories = [Path(name) for name, _, _ in os.walk(group, topdown=False)]
        for directory in directories:
            try:
                _kill([int(pid) for pid in (directory / "cgroup.procs").read_text().split()])
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EOPNOTSUPP, errno.ENODEV):
                    raise
        return not group.exists()

    wait_until(gone, 10, f"cgroup {group} empty")
