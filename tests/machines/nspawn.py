"""One power-on of a machine, until it is off again: a systemd-nspawn process and what it reports.

systemd-nspawn(1) runs in a mount namespace of its own, in which the machine's disk (an overlayfs
of the image's layers and the machine's own directory) is mounted, so that no mount can be left
behind; and in a cgroup of its own, because with --keep-unit all machines would otherwise share
one ``payload`` cgroup.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.network.run import make_cgroup

REBOOTED = 133  # nspawn's exit status when the machine asks for a reboot and there is no unit

# $1 image layers, $2 the machine's directory, $3 number of cgroups, then these, then the command.
_ENTER = """
layers=$1 directory=$2 groups=$3; shift 3
while [ "$groups" -gt 0 ]; do echo $$ >"$1/cgroup.procs"; shift; groups=$((groups - 1)); done
"""
# What a boot loader and an initramfs do: have the root file system at $directory/root.
OVERLAY = """
mount -t overlay overlay "$directory/root" \
    -o "lowerdir=$layers,upperdir=$directory/disk,workdir=$directory/work"
"""
SEED = "/var/lib/cloud/seed/nocloud-net"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a machine is made of. `layers` topmost first; `name` is unique on the real host."""

    name: str
    hostname: str
    uuid: str
    layers: Sequence[Path]
    directory: Path
    seed: Path
    namespace: Path
    cgroups: Sequence[Path]
    binds: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()  # the kernel's command line, as far as a container has one
    loader: str = OVERLAY
    seed_at: str = SEED
    legacy: bool = False  # cgroup v1 inside, and all capabilities, as an old kubelet wants them

    @property
    def console(self) -> Path:
        """Everything the machine printed, over all its boots."""
        return self.directory / "console.log"

    @property
    def disk(self) -> Path:
        """What the machine has written, as overlayfs keeps it."""
        return self.directory / "disk"


class Boot:
    """From power-on to off. Threads may wait for `ready` and `off`; they are set, never cleared."""

    def __init__(self, hardware: Hardware) -> None:
        self.ready = threading.Event()
        self.off = threading.Event()
        self.leader = 0
        """The machine's PID 1 as the real host counts; 0 before there is one and after."""
        self._changed = threading.Condition()
        self._socket, address = _notify_socket(hardware.directory)
        for group in hardware.cgroups:
            make_cgroup(group)
        with hardware.console.open("ab") as console:
            self._process = subprocess.Popen(
                _command(hardware),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ^C ends the test first; the test ends the machine
                env={
                    "PATH": os.environ["PATH"],
                    "NOTIFY_SOCKET": address,
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "0" if hardware.legacy else "1",
                    **hardware.environment,
                },
            )
        self._thread = threading.Thread(target=self._listen, name=hardware.name, daemon=True)
        self._thread.start()

    @property
    def exit_status(self) -> int | None:
        """nspawn's, once the machine is off: 0, or REBOOTED."""
        return self._process.returncode

    def signal(self, number: int) -> None:
        """Signal the machine's PID 1; see systemd(1), "Signals". Nothing if there is none."""
        with self._changed, contextlib.suppress(ProcessLookupError):
            if self.leader:
                os.kill(self.leader, number)

    def cut(self) -> None:
        """End it at once, as a power cut does, without waiting until it is off."""
        with self._changed, contextlib.suppress(ProcessLookupError):
            # Without its PID 1 the kernel ends all the rest, and nspawn tidies up after itself.
            # Before there is one, nspawn's own death does the same.
            if not self.off.is_set():
                os.kill(self.leader or self._process.pid, signal.SIGKILL)

    def wait_off(self) -> None:
        """Wait until a cut took effect."""
        if not self.off.wait(10):
            self._process.kill()
            self.off.wait()

    def _listen(self) -> None:
        """Read what nspawn reports for as long as it lives.

        This must not stop before: when the socket's queue is full, nspawn blocks, then the
        machine's PID 1 does, and with it everything.
        """
        ended = os.pidfd_open(self._process.pid)
        with selectors.DefaultSelector() as both, self._socket:
            both.register(self._socket, selectors.EVENT_READ)
            both.register(ended, selectors.EVENT_READ)
            while ended not in [key.fd for key, _ in both.select()]:
                self._heard(self._socket.recv(65536).decode(errors="replace"))
        os.close(ended)
        with self._changed:
            self.leader = 0
            self._process.wait()
            self.off.set()

    def _heard(self, message: str) -> None:
        for line in message.splitlines():
            name, _, value = line.partition("=")
            if name == "X_NSPAWN_LEADER_PID":
                with self._changed:
                    self.leader = int(value)
            elif line == "READY=1" and self.leader:
                self.ready.set()


def _notify_socket(directory: Path) -> tuple[socket.socket, str]:
    address = directory / "notify"
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(address))
    return listener, str(address)


def _command(hardware: Hardware) -> list[str]:
    for name in ("root", "disk", "work"):
        (hardware.directory / name).mkdir(exist_ok=True)
    layers = ":".join(map(str, hardware.layers))
    groups = [str(group) for group in hardware.cgroups]
    launch = ["unshare", "--mount", "--propagation", "private", "sh", "-euc"]
    launch += [f'{_ENTER}{hardware.loader}exec "$@"', "launch"]
    nspawn = [
        "systemd-nspawn",
        "--quiet",
        "--boot",
        f"--directory={hardware.directory / 'root'}",
        f"--machine={hardware.name}",
        f"--hostname={hardware.hostname}",
        f"--uuid={hardware.uuid}",
        f"--network-namespace-path={hardware.namespace}",
        f"--bind-ro={hardware.seed}:{hardware.seed_at}",
        *(f"--bind-ro={bind}" for bind in hardware.binds),
        "--notify-ready=yes",
        "--console=read-only",
        "--register=no",
        "--keep-unit",
        "--settings=no",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        f"--capability={'all' if hardware.legacy else 'CAP_NET_ADMIN'}",
        # What OCI runtimes need inside: session keyrings, and device rules as BPF programs.
        "--system-call-filter=@keyring bpf",
    ]
    return [
        *launch,
        layers,
        str(hardware.directory),
        str(len(groups)),
        *groups,
        *nspawn,
        *hardware.words,
    ]
