"""Golden images on real machines: sealed ones assemble, copies of others are told; and logins."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.machines.document import document, user_data
from tests.machines.rig import Machine, Rig
from tests.machines.test_cluster import (
    FORM,
    by_role,
    etcdctl,
    firstboot,
    problems,
    sentence,
    state,
    wait_running,
)

pytestmark = pytest.mark.machine

GOLDEN, COPIES = 1, (2, 3, 4)


def copy_disk(source: Machine, target: Machine) -> None:
    """What duplicating a disk does; both machines are off."""
    shutil.rmtree(target.hardware.disk, ignore_errors=True)
    subprocess.run(["cp", "-a", source.hardware.disk, target.hardware.disk], check=True)


def machine_id(machine: Machine) -> str:
    return machine.read("/etc/machine-id").strip()


def ended(machine: Machine) -> bool:
    argv = ("systemctl", "is-active", "firstboot.service")
    return machine.exec(*argv, check=False).stdout == "inactive\n"


def on_terminal(machine: Machine, command: str, *lines: str) -> str:
    """What a person sees of this command, who then types these lines."""
    argv = ("script", "--quiet", "--command", command, "/dev/null")
    return machine.exec(*argv, input="".join(f"{line}\n" for line in lines)).stdout


def issue(machine: Machine) -> str:
    """What agetty shows above its prompt."""
    return on_terminal(machine, "agetty --show-issue")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Machine 1 is a cluster of its own; 2 to 4 are to become one of three."""
    golden = user_data(document(1, formation="golden", election="{grace: 1s}"))
    three = user_data(document(3, election="{grace: 1s}"))
    with Rig(4, three, overrides={GOLDEN: golden}) as made:
        made.start(GOLDEN)
        wait_running(made, GOLDEN)
        made.wait(lambda: ended(made[GOLDEN]), FORM, "the golden machine's firstboot has ended")
        yield made


def test_a_copy_that_was_not_sealed_is_told_and_blocks_nobody(rig: Rig) -> None:
    golden, copy = rig[GOLDEN], rig[2]
    before = machine_id(golden)
    golden.poweroff()
    copy_disk(golden, copy)
    # As image builders do that know of systemd only: each copy gets a machine-id of its own.
    (copy.hardware.disk / "etc/machine-id").write_text("")
    golden.start()
    copy.start()
    rig.ready(GOLDEN, 2)
    rig.wait(lambda: "CLONE" in problems(copy), FORM, "the copy is told")
    assert machine_id(copy) != before
    page = firstboot(copy, "status")
    assert page.returncode == 2
    assert f"its machine-id was {before} and is {machine_id(copy)}" in page.stdout
    assert "firstboot seal --force" in page.stdout
    assert "copied from another machine" in issue(copy)
    assert "copied from another machine" in copy.hardware.console.read_text(errors="replace")
    assert copy.exec("systemctl", "is-active", "multi-user.target").stdout == "active\n"
    # The one it was copied from is still itself.
    rig.wait(lambda: ended(golden), FORM, "the golden machine has looked")
    assert problems(golden) == {}
    assert firstboot(golden, "status").returncode == 0
    copy.kill()


def test_a_sealed_machine_s_copies_are_one_cluster(rig: Rig) -> None:
    golden = rig[GOLDEN]
    etcdctl(golden, "put", "golden", "secret")
    refused = firstboot(golden, "seal")
    assert refused.returncode == 64
    assert "this host is a cluster's member" in refused.stderr
    assert golden.exec("systemctl", "is-active", "etcd.service").stdout == "active\n"
    done = firstboot(golden, "seal", "--force")
    assert done.returncode == 0, done.stderr
    assert "etcd: system container removed" in done.stdout
    assert firstboot(golden, "seal").returncode == 0  # there is nothing left to refuse
    left = golden.exec(
        *("sh", "-c", "ls -A /var/lib/firstboot /etc/firstboot /var/lib/containers/atomic"),
        check=False,
    ).stdout
    assert "etcd" not in left and "identity" not in left and "config" not in left
    for path in ("/etc/etcd", "/var/lib/etcd", "/etc/systemd/system/etcd.service"):
        assert golden.exec("test", "-e", path, check=False).returncode == 1, path
    assert golden.read("/etc/machine-id") == "uninitialized\n"
    enabled = golden.exec("systemctl", "is-enabled", "firstboot.service", "firstboot.target")
    assert enabled.stdout.splitlines() == ["enabled", "disabled"]
    assert "sealed" in firstboot(golden, "status").stdout
    golden.exec("cloud-init", "clean", "--logs")
    golden.poweroff()
    for number in COPIES:
        copy_disk(golden, rig[number])
    rig.start(*COPIES)
    wait_running(rig, *COPIES)
    copies = [rig[n] for n in COPIES]
    assert len(by_role(rig, *COPIES)["master"]) == 1
    assert len({machine_id(m) for m in copies}) == 3
    assert len({(m.status() or {})["cluster_id"] for m in copies}) == 1
    assert {(m.status() or {})["formation"] for m in copies} == {""}
    node, other = by_role(rig, *COPIES)["node"]
    assert etcdctl(node, "get", "golden") == ""
    etcdctl(node, "put", "three", "copies")
    assert etcdctl(other, "get", "three", "--print-value-only") == "copies\n"
    rig.ready(*COPIES)


# ---------------------------------------------------------------- console and login


def test_a_machine_without_peers_can_be_logged_in_to_and_says_what_it_waits_for(rig: Rig) -> None:
    """It boots to the end, as 2 to 4 do; here with two of three that never come."""
    lone = rig[GOLDEN]
    shutil.rmtree(lone.hardware.disk)
    rig.set_user_data(GOLDEN, user_data(document(3, formation="lone")))
    lone.start()
    lone.ready()
    rig.wait(lambda: "1 of 3 hosts are present" in sentence(lone), FORM, "it waits")
    assert state(lone) == "waiting"
    for unit in ("multi-user.target", "console-getty.service", "firstboot.service"):
        assert lone.exec("systemctl", "is-active", unit).stdout == "active\n", unit
    above = issue(lone)
    assert "firstboot: 1 of 3 hosts are present; waiting for 2 more" in above
    assert "Boot the missing hosts with this same document" in above
    console = lone.hardware.console.read_text(errors="replace")
    assert "firstboot: 1 of 3 hosts are present" in console
    seen = on_terminal(lone, "login -f root", "exit")
    assert "firstboot: 1 of 3 hosts are present" in seen, seen
    lone.exec("journalctl", "--update-catalog")
    explained = lone.exec("journalctl", "-x", "-u", "firstboot.service", "--no-pager").stdout
    assert "This host is now discovering" in explained
    assert "The stages are discovering" in explained
    # Those that run say nothing any more.
    for number in COPIES:
        assert "firstboot" not in issue(rig[number])
        assert rig[number].exec("ls", "/run/issue.d", "/run/motd.d").stdout.count("firstboot") == 0
