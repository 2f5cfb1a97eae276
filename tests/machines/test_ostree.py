"""The image's life under ostree: commit, deploy, boot, become a cluster, update, roll back.

`pytest -s tests/machines/test_ostree.py` shows every command and what it said.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machines.deployments import BRANCH, STATEROOT, Builder, told
from tests.machines.document import document, user_data
from tests.machines.rig import IMAGE, PROJECT, Machine, Rig
from tests.network.run import Run

pytestmark = [pytest.mark.machine, pytest.mark.timeout(900)]

FORM = 180.0  # seconds
READONLY = 3  # the machine whose /sysroot is read-only too
PACKAGE = "/usr/share/firstboot/firstboot"
CLEAN = "/etc/cloud/clean.d/50-firstboot"


def inside(machine: Machine, *command: str, check: bool = True) -> str:
    """Run a command on a machine and print it."""
    done = machine.exec(*command, check=check, timeout=120)
    told([f"[{machine.name}]", *command], done.stdout + done.stderr)
    return done.stdout


def overlay(target: Path) -> Path:
    """The layers as `make overlay` writes them."""
    make = ["make", "-s", "overlay", f"OVERLAY={target}"]
    subprocess.run(make, cwd=PROJECT, check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    with Run() as run:
        builder = Builder(run.directory)
        layers = IMAGE.read_text().splitlines()
        builder.start([Path(layer) for layer in layers if "/firstboot-" not in layer])
        builder.compose(overlay(run.directory / "overlay-1"), "1")
        yield builder


@pytest.fixture(scope="module")
def cluster(builder: Builder) -> Iterator[Rig]:
    """Three machines with the image on their disks; not yet switched on."""
    text = user_data(document(3, election="{grace: 20s}"))

    def disk(directory: Path) -> dict[str, object]:
        return dict(builder.install(directory, readonly=directory.name == str(READONLY)))

    with Rig(3, text, disk=disk) as rig:
        yield rig


@pytest.fixture(scope="module")
def formed(cluster: Rig) -> Rig:
    cluster.start()
    cluster.ready(timeout=FORM)
    running(cluster)

    def done() -> bool:  # the master closes admission last, and notes it in its state
        stamps = [m.exec("test", "-e", "/var/lib/firstboot/complete", check=False) for m in cluster]
        return all(stamp.returncode == 0 for stamp in stamps)

    cluster.wait(done, FORM, "every host is done")
    return cluster


def running(rig: Rig) -> None:
    def met() -> bool:
        shown = [machine.status() or {} for machine in rig]
        return all(status.get("state") == "running" for status in shown)

    rig.wait(met, FORM, "every host runs its role")


def roles(rig: Rig) -> dict[str, str]:
    return {machine.name: str((machine.status() or {})["role"]) for machine in rig}


def etcdctl(machine: Machine, *arguments: str) -> str:
    name = "etcd" if (machine.status() or {})["role"] == "master" else "etcd-proxy"
    argv = ("runc", "exec", "-e", "ETCDCTL_API=3", name, "etcdctl", *arguments)
    return machine.exec(*argv, timeout=60).stdout


def served(rig: Rig, key: str, value: str) -> None:
    """Wait until every machine reads `value`."""

    def met() -> bool:
        try:
            read = [etcdctl(machine, "get", key, "--print-value-only") for machine in rig]
        except subprocess.CalledProcessError:
            return False
        return read == [f"{value}\n"] * len(rig)

    rig.wait(met, FORM, f"{key} is {value} everywhere")


def booted(machine: Machine) -> str:
    """The commit of the running deployment; `ostree admin status` marks it."""
    lines = inside(machine, "ostree", "admin", "status").splitlines()
    (mine,) = [line for line in lines if line.startswith(f"* {STATEROOT} ")]
    return mine.split()[2].partition(".")[0]


def kept(machine: Machine) -> str:
    """What an update must not change: identity, state, keys and document, as digests."""
    paths = "/etc/machine-id /etc/etcd /etc/firstboot /var/lib/firstboot/identity.key"
    paths += " /var/lib/firstboot/state.json /etc/systemd/system"
    return machine.exec("sh", "-c", f"find {paths} -type f | sort | xargs sha256sum").stdout


# ---------------------------------------------------------------- the image, before it boots


def test_the_commit_has_nothing_that_belongs_to_a_host(builder: Builder) -> None:
    def ls(*arguments: str) -> list[str]:
        command = ["ostree", f"--repo={builder.repository}", "ls", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        told(command, done.stdout + done.stderr)
        return done.stdout.splitlines()

    assert ls("-R", BRANCH, "/var") == ["d00755 0 0      0 /var"]
    assert not ls(BRANCH, "/etc")
    assert not ls(BRANCH, "/usr/etc/machine-id")
    assert not ls(BRANCH, "/usr/etc/firstboot")
    assert not ls(BRANCH, "/usr/etc/systemd/system")
    (program,) = ls(BRANCH, "/usr/bin/firstboot")
    assert program.startswith("-00755 0 0 ")
    (entry,) = ls(BRANCH, f"/usr{CLEAN}")
    assert entry.startswith("-00755 0 0 ")


def test_a_new_disk_has_an_empty_var_and_no_identity(cluster: Rig) -> None:
    for machine in cluster:
        deployed = machine.hardware.disk / f"ostree/deploy/{STATEROOT}"
        assert not [p for p in (deployed / "var").rglob("*") if p.is_file() and p.name[0] != "."]
        assert not list(deployed.glob("deploy/*.0/etc/machine-id"))
        assert not list(deployed.glob("deploy/*.0/etc/systemd/system"))


# ---------------------------------------------------------------- its first boot


def test_it_boots_from_a_read_only_usr_and_is_complete(formed: Rig) -> None:
    for machine in formed:
        booted(machine)
        for path, options in {"/usr": "ro", "/var": "rw"}.items():
            mounted = inside(machine, "findmnt", "--noheadings", "--output=OPTIONS", path)
            assert options in mounted.strip().split(","), path
        for path in ("/usr/x", "/x"):
            assert machine.exec("touch", path, check=False).returncode == 1
        assert inside(machine, "systemctl", "--failed", "--no-legend") == ""
        assert machine.exec("stat", "-c", "%a", "/etc/firstboot").stdout == "700\n"
        assert machine.exec("stat", "-c", "%a", "/var/lib/firstboot").stdout == "700\n"
    ids = {machine.read("/etc/machine-id") for machine in formed}
    assert len(ids) == 3
    assert all(len(found) == 33 for found in ids)


def test_presets_of_the_first_boot_enabled_it(formed: Rig) -> None:
    for machine in formed:
        assert inside(machine, "systemctl", "is-enabled", "firstboot.service") == "enabled\n"
        link = machine.exec(
            "readlink", "-f", "/etc/systemd/system/multi-user.target.wants/firstboot.service"
        )
        assert link.stdout == "/usr/lib/systemd/system/firstboot.service\n"


def test_three_of_them_are_a_cluster(formed: Rig) -> None:
    assert sorted(roles(formed).values()) == ["master", "node", "node"]
    assert len({(machine.status() or {})["cluster_id"] for machine in formed}) == 1
    for machine in formed:
        page = inside(machine, "firstboot", "status")
        assert "Running as" in page
    etcdctl(formed[1], "put", "life", "first")
    served(formed, "life", "first")


def test_containers_share_the_repository_where_it_can_be_written(formed: Rig) -> None:
    for machine in formed:
        refs = machine.exec("sh", "-c", "ls /ostree/repo/refs/heads/ociimage", check=False).stdout
        name = "etcd" if roles(formed)[machine.name] == "master" else "etcd-proxy"
        info = json.loads(machine.read(f"/var/lib/containers/atomic/{name}/info"))
        assert bool(refs) == bool(info["ostree-commit"]) == (machine.number != READONLY)


def test_cloud_init_clean_refuses_a_member(formed: Rig) -> None:
    before = kept(formed[1])
    done = formed[1].exec("cloud-init", "clean", check=False, timeout=120)
    told(["[host-1]", "cloud-init", "clean"], done.stdout + done.stderr)
    assert done.returncode != 0
    assert "member" in done.stdout + done.stderr
    assert kept(formed[1]) == before


# ---------------------------------------------------------------- an update, and back


@pytest.fixture(scope="module")
def updated(formed: Rig, builder: Builder) -> tuple[str, str]:
    """The machines after an image update and a reboot; the commits before and now.

    The new image changes the program, a unit and two files in /etc, of which host-1 has edited one.
    """
    before = builder.latest()
    layers = overlay(builder.directory / "overlay-2")
    for path, old, new in (
        (layers / f"10program{PACKAGE}/__init__.py", "firstboot: ", "firstboot, second image: "),
        (layers / "20units/usr/lib/systemd/system/firstboot.target", "=This", "=(2) This"),
        (layers / f"50cloud-init{CLEAN}", "#!/bin/sh", "#!/bin/sh\n# of the second image"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    (layers / "60hosts/etc").mkdir(parents=True)
    (layers / "60hosts/etc/hosts").write_text("127.0.0.1 localhost second\n::1 localhost\n")
    now = builder.compose(layers, "2")
    states = {machine.name: kept(machine) for machine in formed}
    was = roles(formed)
    for machine in formed:
        inside(machine, "ostree", "admin", "upgrade", "--stage")
        assert "(staged)" in inside(machine, "ostree", "admin", "status")
    # Staged, /etc is merged when the machine goes down, so this is not too late.
    formed[1].exec("sh", "-c", "echo 192.0.2.1 mine >>/etc/hosts")
    for machine in formed:
        machine.reboot()
    formed.ready(timeout=FORM)
    running(formed)
    assert roles(formed) == was
    assert {machine.name: kept(machine) for machine in formed} == states
    return before, now


def test_an_update_changes_the_image(formed: Rig, updated: tuple[str, str]) -> None:
    for machine in formed:
        assert booted(machine) == updated[1]
        assert "firstboot, second image: " in machine.read(f"{PACKAGE}/__init__.py")
        said = inside(machine, "systemctl", "show", "-P", "Description", "firstboot.target")
        assert said == "(2) This host runs its role in the cluster\n"
        assert "# of the second image" in machine.read(CLEAN)


def test_an_update_keeps_role_state_and_what_was_edited(
    formed: Rig, updated: tuple[str, str]
) -> None:
    assert "192.0.2.1 mine" in formed[1].read("/etc/hosts")
    assert "second" not in formed[1].read("/etc/hosts")
    assert "second" in formed[2].read("/etc/hosts")
    served(formed, "life", "first")
    etcdctl(formed[2], "put", "life", "second")
    served(formed, "life", "second")
    for machine in formed:
        assert inside(machine, "systemctl", "is-active", "firstboot.target") == "active\n"
        assert inside(machine, "systemctl", "--failed", "--no-legend") == ""
        ran = machine.exec("journalctl", "-b", "-u", "firstboot.service", "-o", "cat").stdout
        assert "electing" not in ran


def test_a_rollback_keeps_role_and_state(formed: Rig, updated: tuple[str, str]) -> None:
    machine = formed[2]
    before, was = kept(machine), roles(formed)
    (machine.hardware.directory / "menu").write_text("2\n")  # the boot menu's second line
    machine.reboot()
    machine.ready(FORM)
    running(formed)
    assert booted(machine) == updated[0]
    assert "second image" not in machine.read(f"{PACKAGE}/__init__.py")
    assert "# of the second image" not in machine.read(CLEAN)
    assert roles(formed) == was
    assert kept(machine) == before
    served(formed, "life", "second")
    inside(machine, "ostree", "admin", "undeploy", "0")  # for good
    assert inside(machine, "ostree", "admin", "status").count(f" {STATEROOT} ") == 1
