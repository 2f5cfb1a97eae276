"""N real machines booted from one image with one user-data, on a network of their own.

    with Rig(3, user_data) as rig:
        rig.start()
        rig.ready()
        rig[1].exec("systemctl", "is-system-running")
        rig.network.partition({1, 2}, {3})
        rig[2].kill()

Machines are numbered from 1 and are off until started. What they wrote survives power cuts and
reboots and goes with the rig. ``python -m tests.machines.rig cleanup`` removes what killed runs
left behind.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, ClassVar, Self

from tests.machines.nspawn import REBOOTED, Boot, Hardware
from tests.network.rig import Network, call
from tests.network.run import RUNS, Run, cgroups, live_runs, remove_dead_runs, wait_until

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = PROJECT / "build/image/layers"
NEWEST = PROJECT / "build/image/layers-newest"  # the same with the newest cloud-init
ARTEFACTS = PROJECT / "build/artefacts"
STATUS = "/run/firstboot/status.json"
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
_INOTIFY_BEFORE = RUNS / "max_user_instances"
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}


class MachineOff(RuntimeError):
    """The machine is off, or went off on its own."""


class Machine:
    """One machine. Its files and programs can be reached while it runs."""

    def __init__(self, number: int, hardware: Hardware, address: str) -> None:
        self.number = number
        self.address = address
        self.hardware = hardware
        self._boot: Boot | None = None

    def __repr__(self) -> str:
        return f"<Machine {self.name} {'on' if self.running else 'off'}>"

    @property
    def name(self) -> str:
        """Its hostname."""
        return self.hardware.hostname

    # -- power --

    @property
    def running(self) -> bool:
        """Whether the machine is on."""
        return self._boot is not None and not self._boot.off.is_set()

    @property
    def leader(self) -> int:
        """Its PID 1 as the real host counts. MachineOff if it is off or not that far yet."""
        if not (self._boot and self._boot.leader):
            raise self._is_off()
        return self._boot.leader

    def start(self) -> None:
        """Power on. Nothing if it is on."""
        if not self.running:
            self._boot = Boot(self.hardware)

    def ready(self, timeout: float = 60) -> None:
        """Wait until it has booted: every job of its start-up is done, cloud-init's too."""

        def booted() -> bool:
            if not self._boot or self._boot.off.is_set():
                raise self._is_off()
            return self._boot.ready.wait(0.02)

        wait_until(booted, timeout, f"{self.name} ready")

    def cut(self) -> None:
        """Cut the power and do not wait until it is gone."""
        if self._boot:
            self.thaw()
            self._boot.cut()

    def kill(self) -> None:
        """Cut the power. What it wrote to its disk is there at the next start.

        The real host's memory stands in for the disk's own cache, so writes that were not synced
        survive too: this shows torn sequences, not lost writes.
        """
        self.cut()
        if self._boot:
            self._boot.wait_off()

    def poweroff(self, timeout: float = 60) -> None:
        """Shut down in good order; TimeoutError (and it stays on) if that takes too long."""
        self._shut(signal.SIGRTMIN + 4, timeout)

    def reboot(self, timeout: float = 60) -> None:
        """Shut down in good order and start again; not waited for to be ready."""
        status = self._shut(signal.SIGRTMIN + 5, timeout)
        if status != REBOOTED:
            raise MachineOff(f"{self.name} went off with {status} instead of rebooting")
        self.start()

    def _shut(self, number: int, timeout: float) -> int | None:
        if not self._boot:
            return None
        self._boot.signal(number)
        if not self._boot.off.wait(timeout):
            raise TimeoutError(f"{self.name} off: not within {timeout:g} s")
        return self._boot.exit_status

    def freeze(self) -> None:
        """Stop every process of it. Its kernel still answers pings and accepts connections."""
        group = self.hardware.cgroups[0]
        (group / "cgroup.freeze").write_text("1")
        wait_until(
            lambda: "frozen 1" in (group / "cgroup.events").read_text(), 5, f"{self.name} frozen"
        )

    def thaw(self) -> None:
        """Let it go on."""
        freezer = self.hardware.cgroups[0] / "cgroup.freeze"
        if freezer.exists():
            freezer.write_text("0")

    def _is_off(self) -> MachineOff:
        status = self._boot.exit_status if self._boot else None
        console = self.hardware.console
        last = console.read_text(errors="replace").splitlines()[-5:] if console.exists() else []
        return MachineOff(f"{self.name} is off (status {status}); it last said: {last}")

    # -- inside --

    def command(self, *argv: str) -> list[str]:
        """`argv` as a command that runs inside the machine."""
        enter = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net"]
        return [*enter, "--pid", "--cgroup", "--", *argv]

    def exec(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end, as root; CalledProcessError if it fails."""
        options = {"check": True, "timeout": 60, "env": _ENVIRONMENT, **options}
        return call(self.command(*argv), **options)

    def read(self, path: str) -> str:
        """A file's text."""
        return self.exec("cat", path).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file durably: synced and renamed into place, its directory made if missing."""
        script = (
            'set -eu; umask 077; mkdir -p -m 0755 "$2"; cat >"$1.new"; chmod "$3" "$1.new"; '
            'sync "$1.new"; mv "$1.new" "$1"; sync "$2"'
        )
        parent = str(PurePosixPath(path).parent)
        self.exec("sh", "-c", script, "write", path, parent, f"{mode:o}", input=text)

    def install(self, path: str, text: str) -> None:
        """Put a file on its disk while it is off, as whoever makes an image would."""
        where = self.hardware.disk / path.lstrip("/")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)

    def status(self) -> dict[str, Any] | None:
        """What firstboot last wrote to its status file; None without one or with the machine off.

        Cheap enough to look at every few milliseconds.
        """
        try:
            text = Path(f"/proc/{self.leader}/root{STATUS}").read_text()
        except (MachineOff, OSError):
            return None
        found: dict[str, Any] = json.loads(text)
        return found

    def journal(self, unit: str = "", output: str = "short-precise") -> str:
        """The journal of all its boots, of one unit or all, also when the machine is off."""
        argv = ["journalctl", "--no-pager", f"--output={output}"]
        argv += [f"--unit={unit}"] if unit else []
        if self._boot and self._boot.leader:
            return self.exec(*argv, check=False).stdout
        where = f"--directory={self.hardware.disk / 'var/log/journal'}"
        return call([*argv, where], check=False).stdout

    def journal_entries(self, unit: str = "") -> list[dict[str, Any]]:
        """The journal as journald's fields, MESSAGE and so on."""
        return [json.loads(line) for line in self.journal(unit, output="json").splitlines()]

    def collect(self, directory: Path) -> None:
        """Write what explains a failure to `directory`: console, journal, status."""
        directory.mkdir(parents=True, exist_ok=True)
        self.thaw()
        if self.hardware.console.exists():
            shutil.copy(self.hardware.console, directory / "console.log")
        with contextlib.suppress(subprocess.SubprocessError, MachineOff):
            (directory / "journal.txt").write_text(self.journal())
        with contextlib.suppress(subprocess.SubprocessError, MachineOff):
            failed = self.exec("systemctl", "--no-pager", "--full", "status", "--failed")
            (directory / "failed-units.txt").write_text(failed.stdout)
        if status := self.status():
            (directory / "status.json").write_text(json.dumps(status, indent=1) + "\n")


class Rig:
    """`machines` machines on one network; nothing of it is left after the ``with`` block.

    An error that leaves the block takes consoles and journals along, to ARTEFACTS.

    `overrides` gives single machines another user-data. `image` is the file `layers` that
    tests/machines/image wrote. `binds` are nspawn's ``SOURCE:TARGET``, read-only; `environment` is
    nspawn's own. `words` are the kernel's arguments: systemd and cloud-init read them from
    /proc/1/cmdline in a container. `disk` is told a machine's directory, makes what it boots from
    there, and answers what of its `Hardware` is different for that. `legacy` machines have
    cgroup v1 inside. `ip` and `prefix` are the network's.
    """

    live: ClassVar[list[Rig]] = []

    def __init__(
        self,
        machines: int,
        user_data: str,
        *,
        overrides: Mapping[int, str] | None = None,
        image: Path = IMAGE,
        binds: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        words: tuple[str, ...] = (),
        disk: Callable[[Path], Mapping[str, Any]] | None = None,
        legacy: bool = False,
        ip: str = "4",
        prefix: int = 24,
    ) -> None:
        if not image.exists():
            raise FileNotFoundError(f"{image} is missing: run `make image` as root")
        self._layers = [Path(line) for line in image.read_text().splitlines()]
        self._binds, self._environment, self._words = binds, environment or {}, words
        self._disk = disk or (lambda _: {})
        self._legacy = legacy
        self.run = Run()
        try:
            _raise_inotify(self.run, 8192 if legacy else 1024)
            self.network = Network(machines, self.run, ip=ip, prefix=prefix)
            texts = dict.fromkeys(self.network.hosts, user_data) | dict(overrides or {})
            self.machines = [self._build(number, texts[number]) for number in texts]
            self.run.callback(self._cut_all)
        except BaseException:
            self.run.close()
            raise
        Rig.live.append(self)
        self.run.callback(Rig.live.remove, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            error.add_note(f"consoles and journals: {self.collect(ARTEFACTS / self.run.prefix)}")
        self.close()

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number - 1]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines)

    def __len__(self) -> int:
        return len(self.machines)

    def close(self) -> None:
        """Cut the power and remove everything."""
        self.run.close()

    def start(self, *numbers: int) -> None:
        """Power on these machines, or all."""
        for machine in self._chosen(numbers):
            machine.start()

    def ready(self, *numbers: int, timeout: float = 120) -> None:
        """Wait until these machines, or all, have booted."""
        for machine in self._chosen(numbers):
            machine.ready(timeout)

    def wait(self, met: Callable[[], object], timeout: float, what: str) -> None:
        """Look until `met` says yes; TimeoutError naming `what` after `timeout` seconds."""
        wait_until(met, timeout, what)

    def set_user_data(self, number: int, text: str) -> None:
        """Give a machine another user-data; cloud-init reads it at the next start."""
        _write_seed(self[number].hardware.seed, text)

    def set_seed(self, **files: bytes) -> None:
        """Give all machines exactly these files, `-` written as `_`; none at all: no seed."""
        for machine in self.machines:
            shutil.rmtree(machine.hardware.seed)
            machine.hardware.seed.mkdir()
            for name, data in files.items():
                (machine.hardware.seed / name.replace("_", "-")).write_bytes(data)

    def collect(self, directory: Path) -> Path:
        """Write what explains a failure to `directory`, a directory for each machine."""
        shutil.rmtree(directory, ignore_errors=True)
        for machine in self.machines:
            machine.collect(directory / machine.name)
        return directory

    def _chosen(self, numbers: tuple[int, ...]) -> list[Machine]:
        return [self[number] for number in numbers] if numbers else self.machines

    def _build(self, number: int, user_data: str) -> Machine:
        name = f"{self.run.prefix}-{number}"
        directory = self.run.directory / str(number)
        directory.mkdir()
        hardware = Hardware(
            name=name,
            hostname=f"host-{number}",
            uuid=uuid.uuid4().hex,
            layers=self._layers,
            directory=directory,
            seed=directory / "seed",
            namespace=self.network.namespace(number),
            cgroups=cgroups(f"{self.run.prefix}/{number}", legacy=self._legacy),
            binds=self._binds,
            environment=self._environment,
            words=self._words,
            legacy=self._legacy,
        )
        hardware = replace(hardware, **self._disk(directory))
        machine = Machine(number, hardware, self.network.chosen(number))
        _write_seed(hardware.seed, user_data)
        return machine

    def _cut_all(self) -> None:
        for machine in self.machines:
            machine.cut()
        for machine in self.machines:
            machine.kill()


def _write_seed(seed: Path, user_data: str) -> None:
    """What cloud-init's NoCloud datasource reads (cloud-init docs, reference/datasources)."""
    seed.mkdir(exist_ok=True)
    (seed / "user-data").write_text(user_data)
    # The same instance-id everywhere, and no hostname: machines must not rely on either.
    (seed / "meta-data").write_text("instance-id: iid-shared\n")


def _raise_inotify(run: Run, wanted: int) -> None:
    """Make room for the machines' file watches: nine or so each, where the kernel allows 128.

    Past that, machines fail in odd places with "Too many open files". A kubelet of cgroup v1's
    time watches every cgroup.
    """
    (run.directory / "inotify").touch()
    before = INOTIFY.read_text()
    if int(before) < wanted:
        if not _INOTIFY_BEFORE.exists():
            _INOTIFY_BEFORE.write_text(before)
        INOTIFY.write_text(str(wanted))
    run.callback(_restore_inotify, run.prefix)


def _restore_inotify(prefix: str = "") -> None:
    """Put the limit back, unless another run's machines still count on it."""
    others = [RUNS / name / "inotify" for name in live_runs() if name != prefix]
    if _INOTIFY_BEFORE.exists() and not any(mark.exists() for mark in others):
        INOTIFY.write_text(_INOTIFY_BEFORE.read_text())
        _INOTIFY_BEFORE.unlink()


def main(arguments: list[str]) -> int:
    """``cleanup``: remove what killed runs left behind; runs that go on are left alone."""
    if arguments != ["cleanup"]:
        print("usage: python -m tests.machines.rig cleanup", file=sys.stderr)
        return 64
    for prefix in remove_dead_runs():
        print(f"removed {prefix}")
    _restore_inotify()
    for prefix in live_runs():
        print(f"{prefix} is in use; left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
