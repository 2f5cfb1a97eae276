"""A26 on real machines: a late host joins by a one-time token, and nothing that runs is touched."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machines.document import document, user_data
from tests.machines.rig import Machine, Rig
from tests.machines.test_cluster import (
    Launch,
    by_role,
    etcdctl,
    firstboot,
    problems,
    state,
    wait_running,
)
from tests.network.run import wait_until

pytestmark = [pytest.mark.machine, pytest.mark.scenario("A26")]


@pytest.fixture
def rig(launch: Launch) -> Iterator[Rig]:
    made = launch(3, user_data(document(2, election="{grace: 2s}")))
    made.start(1, 2)
    wait_running(made, 1, 2)
    yield made


def since(machine: Machine, unit: str) -> str:
    """When this unit was last started."""
    argv = ("systemctl", "show", "--value", "--property=ActiveEnterTimestampMonotonic", unit)
    return machine.exec(*argv).stdout


def test_a26_a_late_machine_joins_by_a_one_time_token(rig: Rig, tmp_path: Path) -> None:
    master, node, late = by_role(rig, 1, 2)["master"][0], by_role(rig, 1, 2)["node"][0], rig[3]
    etcd = since(master, "etcd.service")
    rig.wait(
        lambda: (
            master.exec("systemctl", "is-active", "firstboot.service", check=False).stdout
            == "inactive\n"
        ),
        30,
        "the master's firstboot.service has ended",
    )
    late.start()
    rig.wait(lambda: state(late) == "waiting", 60, "the late host waits")
    assert firstboot(node, "admit").returncode == 64
    log = tmp_path / "admit"
    with log.open("w") as out:
        admit = subprocess.Popen(master.command("firstboot", "admit"), stdout=out, stderr=out)
    try:
        wait_until(lambda: "fb1j-" in log.read_text(), 30, "the token is shown")
        rig.wait(lambda: "JOIN_NEEDS_TOKEN" in problems(late), 60, "the late host says so")
        token = re.findall(r"fb1j-[0-9a-z-]+", log.read_text())[0]
        done = late.exec("firstboot", "join", input=f"{token}\n")
        assert "firstboot.service was restarted" in done.stdout
        wait_running(rig)
        assert admit.wait(30) == 0, log.read_text()
    finally:
        admit.kill()
        admit.wait()
    assert len({(m.status() or {})["cluster_id"] for m in rig}) == 1
    assert (late.status() or {})["role"] == "node"
    assert since(master, "etcd.service") == etcd
    etcdctl(master, "put", "late", "welcome")
    assert etcdctl(late, "get", "late", "--print-value-only") == "welcome\n"
    # The token is gone, and systemd alone brings the role up from now on.
    assert late.exec("ls", "/etc/firstboot/config.d").stdout == ""
    for machine in (master, late):
        assert token not in machine.journal()
    late.reboot()
    rig.wait(lambda: late.running and state(late) == "running", 60, "it comes back by itself")
    late.ready()
    assert late.exec("systemctl", "is-active", "etcd-proxy.service").stdout == "active\n"
    assert firstboot(master, "status").returncode == 0
