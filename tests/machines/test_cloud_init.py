"""Debian 12's cloud-init and the newest one: every way it hands a document over, and how it fails.

All machines of a generation boot at once, each with another user-data; tests look at one each.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

import pytest

from tests.machines.disks import put, remove_cloud_init
from tests.machines.document import document, user_data
from tests.machines.rig import IMAGE, NEWEST, PROJECT, Machine, Rig
from tests.machines.test_cluster import FORM, firstboot, problems, sentence, state
from tests.machines.web import URL, web

pytestmark = pytest.mark.machine

CLOUD_CONFIG = sorted((PROJECT / "cloud-config").glob("*.yaml"))
WARNED = "top-level-key.yaml"  # what it says itself: newer ones do not know its key


def alone(name: str, **more: str) -> str:
    """A document for one host; each has a formation of its own, so they do not meet."""
    return document(1, payload="none", formation=name, **more)


def key(text: str) -> str:
    """A cloud-config with this document under the key `firstboot`."""
    return "#cloud-config\nfirstboot:\n" + "".join(f"  {line}\n" for line in text.splitlines())


def mime(*parts: tuple[str, str]) -> bytes:
    whole = MIMEMultipart()
    for kind, text in parts:
        whole.attach(MIMEText(text, kind, "utf-8"))
    return whole.as_bytes()


SCRIPT = ("x-shellscript", "#!/bin/sh\ntouch /run/the-other-part-ran\n")
DEMO, JINJA = "cluster: demo", "## template: jinja\n"
# The first file cannot be written, and with it the module ends.
NOWHERE = "write_files:\n- {path: /proc/nowhere/file, content: x}\n"


def file(name: str) -> str:
    return user_data(alone(name))


# What each machine's seed holds, beside meta-data.
SEEDS: dict[str, dict[str, bytes | str]] = {
    "file": {"user-data": file("file")},
    "key": {"user-data": key(alone("key"))},
    "mime": {"user-data": mime(SCRIPT, ("cloud-config", file("mime")))},
    "mime-key": {"user-data": mime(("cloud-config", key(alone("mime-key"))), SCRIPT)},
    "jinja": {"user-data": JINJA + file("jinja").replace(DEMO, "cluster: {{ v1.distro }}")},
    "jinja-unknown": {"user-data": JINJA + file("x").replace(DEMO, "cluster: {{ v1.nothing }}")},
    "vendor": {
        "vendor-data": key(alone("vendor", join="{extra: 1, window: 2h}")),
        "user-data": "#cloud-config\nfirstboot: {cluster: mine, join: {extra: 3}}\n",
    },
    "vendor-file": {"vendor-data": file("vendor-file"), "user-data": "#cloud-config\n{}\n"},
    "include": {"user-data": f"#include\n{URL}/user-data.yaml\n"},
    "seed-url": {},
    "gzip": {"user-data": gzip.compress(file("gzip").encode())},
    "broken": {"user-data": "#cloud-config\nwrite_files: [\n"},
    "failing": {"user-data": file("failing").replace("write_files:\n", NOWHERE)},
    "disabled": {"user-data": file("disabled")},
    "argument": {"user-data": file("argument")},
    "crashing": {"user-data": file("crashing")},
    "absent": {"user-data": file("absent")},
}
UNCONFIGURED = {"broken", "failing", "disabled", "argument", "crashing", "absent"}


class Machines:
    """A machine for each seed, all of them booted."""

    def __init__(self, rig: Rig, image: Path, directory: Path) -> None:
        self.rig, self.numbers = rig, {name: n for n, name in enumerate(SEEDS, start=1)}
        for name, files in SEEDS.items():
            seed = self[name].hardware.seed
            for part, data in files.items():
                (seed / part).write_bytes(data if isinstance(data, bytes) else data.encode())
        give(self["argument"], "cloud-init=disabled")
        source = "nocloud" if image == NEWEST else "nocloud-net"
        give(self["seed-url"], f"ds={source};s={URL}/seed/")
        shutil.rmtree(self["seed-url"].hardware.seed)
        self["seed-url"].hardware.seed.mkdir()
        put(self["disabled"], "etc/cloud/cloud-init.disabled", "")
        put(self["crashing"], "usr/bin/cloud-init", "#!/bin/sh\nexit 1\n", 0o755)
        remove_cloud_init(self["absent"])
        (directory / "user-data.yaml").write_text(file("include"))
        (directory / "seed").mkdir()
        for part, text in {
            "user-data": file("seed-url"),
            "meta-data": "",
            "vendor-data": "",
        }.items():
            (directory / "seed" / part).write_text(text)
        with web(rig, directory):
            rig.start()
            rig.ready(timeout=240)

    def __getitem__(self, name: str) -> Machine:
        return self.rig[self.numbers[name]]

    def wait(self, name: str, wanted: str) -> Machine:
        """The machine, once its state is this one."""
        machine = self[name]
        self.rig.wait(lambda: state(machine) == wanted, FORM, f"{name} is {wanted}")
        return machine


def give(machine: Machine, *words: str) -> None:
    """Arguments of its kernel."""
    machine.hardware = dataclasses.replace(machine.hardware, words=words)


@pytest.fixture(scope="module", params=[IMAGE, NEWEST], ids=["debian-12", "newest"])
def machines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machines]:
    with Rig(len(SEEDS), "", image=request.param) as rig:
        yield Machines(rig, request.param, tmp_path_factory.mktemp("web"))


def generation(machine: Machine) -> tuple[int, ...]:
    said = machine.exec("cloud-init", "--version")
    numbers = re.search(r"(\d+)\.(\d+)", said.stdout + said.stderr)
    assert numbers
    return tuple(map(int, numbers.groups()))


# ---------------------------------------------------------------- it arrives


@pytest.mark.parametrize("name", [name for name in SEEDS if name not in UNCONFIGURED])
def test_the_document_arrives(machines: Machines, name: str) -> None:
    if name == "jinja-unknown":
        machine = machines.wait(name, "failed")
        told = "/etc/firstboot/config.yaml:1:10: cloud-init did not know a jinja variable"
        assert problems(machine)["CONFIGURATION"].startswith(told)
        return
    machine = machines.wait(name, "running")
    cluster = {"jinja": "debian", "vendor": "mine"}.get(name, "demo")
    assert (machine.status() or {})["cluster"] == cluster
    assert firstboot(machine, "status").returncode == 0
    if name.startswith("mime"):
        assert machine.exec("ls", "/run/the-other-part-ran").returncode == 0
    if name == "vendor":  # merged key by key, and the operator's word counts
        history = machine.read("/var/lib/firstboot/history.jsonl").splitlines()[0]
        config = json.loads(history)["run"]["config"]
        assert (config["join_extra"], config["join_window"]) == (3, 7200.0)


# ---------------------------------------------------------------- it does not


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "cloud-init ran but found no cloud-config in the user-data"),
        ("failing", "there is no /etc/firstboot/config.yaml; in cloud-init write"),
        ("disabled", "cloud-init is disabled and there is no /etc/firstboot/config.yaml"),
        ("argument", "cloud-init is disabled and there is no /etc/firstboot/config.yaml"),
        ("crashing", "cloud-init is enabled but has not stored any user-data; see"),
        ("absent", "cloud-init is absent and there is no /etc/firstboot/config.yaml"),
    ],
)
def test_the_status_says_why_there_is_no_document(machines: Machines, name: str, told: str) -> None:
    page = firstboot(machines[name], "status")
    assert page.stdout.startswith("This host is not configured: ")
    assert told in page.stdout
    assert page.returncode == 0
    assert machines[name].exec("systemctl", "is-active", "multi-user.target").stdout == "active\n"


# ---------------------------------------------------------------- the units


def test_the_generation_is_the_one_that_is_meant(
    machines: Machines, request: pytest.FixtureRequest
) -> None:
    """24.3 renamed the network stage and made one process of all stages."""
    newest = "newest" in request.node.name
    assert (generation(machines["file"]) >= (24, 3)) is newest
    units = machines["file"].exec("systemctl", "list-unit-files", "cloud-*").stdout
    assert ("cloud-init-network.service" in units) is newest
    assert ("cloud-init-main.service" in units) is newest


def test_no_boot_had_an_ordering_cycle(machines: Machines) -> None:
    for machine in machines.rig:
        journal = machine.journal()
        assert "Startup finished" in journal  # there is something to look in
        assert "ordering cycle" not in journal.lower()


CYCLE = "[Unit]\nAfter=cloud-init.target\n"


def test_systemd_finds_nothing_wrong_with_the_real_units(machines: Machines) -> None:
    machine = machines["file"]
    shown = machine.exec("sh", "-c", "cd /usr/lib/systemd/system && ls firstboot* cloud-*")
    units = [n for n in shown.stdout.split() if not n.endswith(".d:") and "." in n]
    assert {"firstboot.service", "firstboot.target", "cloud-config.target"} <= set(units)
    argv = ("systemd-analyze", "verify", "--man=no", "multi-user.target", *units)
    good = machine.exec(*argv, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    # That it can fail: the ordering that cloud-init's own target would make.
    machine.write("/run/systemd/system/firstboot.service.d/90-bad.conf", CYCLE)
    bad = machine.exec(*argv, check=False)
    machine.exec("rm", "-r", "/run/systemd/system/firstboot.service.d")
    assert "ordering cycle" in bad.stderr


@pytest.mark.parametrize("path", CLOUD_CONFIG, ids=lambda path: path.name)
def test_cloud_init_finds_nothing_wrong_with_an_example(machines: Machines, path: Path) -> None:
    machine = machines["file"]
    machine.write(f"/run/{path.name}", path.read_text(), 0o600)
    argv = ("cloud-init", "schema", "--config-file", f"/run/{path.name}")
    done = machine.exec(*argv, check=False)
    said = done.stdout + done.stderr
    if path.name == WARNED and generation(machine) >= (23, 4):
        assert done.returncode == 1
        assert "'firstboot' was unexpected" in said
        assert said.count("unexpected") == 1
        return
    assert done.returncode == 0, said
    assert "alid" in said


# ---------------------------------------------------------------- another life


def test_another_instance_id_on_the_same_disk_changes_nothing(machines: Machines) -> None:
    """cloud-init runs everything again; a host that is in a cluster stays in it."""
    machine = machines.wait("file", "running")
    before = machine.status() or {}
    machine.exec("rm", "/etc/firstboot/config.yaml")
    (machine.hardware.seed / "meta-data").write_text("instance-id: iid-another\n")
    machine.reboot()
    machine.ready(120)
    assert machine.read("/var/lib/cloud/data/instance-id") == "iid-another\n"
    assert machine.exec("ls", "/etc/firstboot/config.yaml").returncode == 0  # written once more
    after = machines.wait("file", "running").status() or {}
    for item in ("cluster_id", "node_id", "role", "name"):
        assert before[item] == after[item]
    assert sentence(machine).startswith("Running as master")
