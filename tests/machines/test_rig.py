"""The rig does what its tests rely on: real machines, real faults, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machines.rig import PROJECT, Rig
from tests.network.run import RUNS, cgroups, remove_dead_runs

pytestmark = pytest.mark.machine

USER_DATA = """#cloud-config
write_files:
- path: /etc/shared
  content: the same everywhere
runcmd:
- [sh, -c, 'echo once >>/var/lib/runs']
"""

# Joins the group, prints how many hosts it heard within the time, and goes on sending for the
# others' sake until its standard input ends.
LISTEN = """
import select, socket, sys, time
ours, wanted, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 5399))
group = socket.inet_aton("239.7.7.7") + socket.inet_aton(ours)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ours))
heard, deadline, told = set(), time.monotonic() + seconds, False
while True:
    sock.sendto(b"here", ("239.7.7.7", 5399))
    readable = select.select([sock, sys.stdin], [], [], 0.05)[0]
    if sys.stdin in readable:
        break
    if sock in readable:
        heard.add(sock.recvfrom(64)[1][0])
    if not told and (len(heard) >= wanted or time.monotonic() > deadline):
        told = True
        print(len(heard), flush=True)
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(3, USER_DATA, overrides={3: USER_DATA.replace("the same", "not the same")}) as rig:
        rig.start()
        rig.ready()
        yield rig


def heard(rig: Rig, wanted: int, seconds: float) -> list[int]:
    """How many hosts' multicast each machine hears, its own included."""
    with ExitStack() as listeners:
        outputs = []
        for machine in rig:
            arguments = (machine.address, str(wanted), str(seconds))
            listener = subprocess.Popen(
                machine.command("python3", "-c", LISTEN, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            outputs.append(listeners.enter_context(listener).stdout)
        return [int(output.readline()) for output in outputs if output]


def test_machines_differ_only_in_identity(rig: Rig) -> None:
    assert len({machine.read("/etc/machine-id") for machine in rig}) == 3
    assert [machine.exec("hostname").stdout for machine in rig] == [
        "host-1\n",
        "host-2\n",
        "host-3\n",
    ]
    assert [machine.read("/etc/shared") for machine in rig][:2] == ["the same everywhere"] * 2
    assert rig[3].read("/etc/shared") == "not the same everywhere"
    for machine in rig:
        assert "status: done" in machine.exec("cloud-init", "status").stdout
        assert machine.exec("systemctl", "is-system-running").stdout == "running\n"


def test_network_faults(rig: Rig) -> None:
    network = rig.network
    assert heard(rig, 3, 30) == [3, 3, 3]
    network.no_multicast()
    assert heard(rig, 3, 1) == [1, 1, 1]
    assert network.reaches(1, 2)
    network.heal()
    network.partition({1, 2})
    assert network.reaches(1, 2)
    assert not network.reaches(1, 3)
    network.heal()
    network.unplug(2)
    assert not network.reaches(1, 2)
    network.heal()
    assert network.reaches(1, 2)
    assert network.reaches(1, 3)


def test_frozen_machine_is_silent_but_its_kernel_answers(rig: Rig) -> None:
    process = rig[2].command("true")
    rig[2].freeze()
    assert rig.network.reaches(1, 2)
    with pytest.raises(subprocess.TimeoutExpired):
        rig[2].exec("systemctl", "is-system-running", timeout=1)
    rig[2].thaw()
    assert subprocess.run(process, check=False).returncode == 0
    assert rig[2].exec("systemctl", "is-system-running").stdout == "running\n"


def test_power_cut_and_reboot_keep_the_disk(rig: Rig, tmp_path: Path) -> None:
    identity = rig[1].read("/etc/machine-id")
    rig[1].write("/var/lib/test/kept", "kept\n", mode=0o600)
    rig[2].write("/run/gone", "in memory")
    rig[1].kill()
    rig[2].reboot()
    assert not rig[1].running
    assert rig[1].status() is None
    assert "cloud-init" in rig[1].journal()  # also of a dead machine, which is when it is wanted
    rig[1].start()
    rig.ready()
    assert rig[1].read("/etc/machine-id") == identity
    assert rig[1].read("/var/lib/test/kept") == "kept\n"
    assert rig[1].exec("stat", "-c", "%a", "/var/lib/test/kept").stdout == "600\n"
    assert rig[1].read("/var/lib/runs") == "once\n"
    assert rig[2].exec("test", "-e", "/run/gone", check=False).returncode == 1
    rig[1].write("/run/firstboot/status.json", '{"state": "RUNNING"}')
    assert rig[1].status() == {"state": "RUNNING"}
    assert any(entry["MESSAGE"] for entry in rig[2].journal_entries("cloud-final.service"))
    rig[3].poweroff()
    kept = rig.collect(tmp_path / "artefacts")
    assert {path.name for path in (kept / "host-1").iterdir()} >= {
        "console.log",
        "journal.txt",
        "status.json",
    }


# A run in a process of its own: it says its prefix once its machine is up, then waits.
ANOTHER = """
import sys, time
from tests.machines.rig import Rig
with Rig(1, "#cloud-config\\n") as rig:
    rig.start()
    rig.wait(lambda: rig[1].running and rig[1]._boot.leader, 30, "machine started")
    print(rig.run.prefix, flush=True)
    time.sleep(60)
"""


def leftovers(prefix: str) -> list[Path]:
    """Everything on the real host that bears a run's name."""
    places = [Path("/run/netns"), RUNS, Path("/run/systemd/nspawn/propagate")]
    found = [path for place in places for path in place.glob(f"{prefix}*")]
    processes = [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if prefix.encode() in _bytes(path)
    ]
    return found + processes + [group for group in cgroups(prefix) if group.exists()]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ANOTHER],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        prefix = process.stdout.readline().strip()
        assert prefix
        assert leftovers(prefix), "the check itself must see a run"
        os.kill(process.pid, number)
        process.wait(30)
    if number == signal.SIGKILL:
        assert leftovers(prefix)
        remove_dead_runs()
    assert leftovers(prefix) == []
