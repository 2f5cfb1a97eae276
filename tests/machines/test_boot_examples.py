"""Every file of cloud-config/ as it lies there, its placeholders filled in, on real machines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from firstboot.userdata import make_token
from tests.machines import acceptance, test_networks
from tests.machines.disks import ignite, remove_cloud_init
from tests.machines.rig import NEWEST, PROJECT, Machine, Rig
from tests.machines.test_cluster import by_role, etcdctl, firstboot, wait_running
from tests.origin import images

pytestmark = pytest.mark.machine

EXAMPLES = PROJECT / "cloud-config"
PLACEHOLDER = "fb1-REPLACE-ME"
MAC = '"52:54:00:12:34:56"'  # stands in the examples for some host's
Launch = Callable[..., Rig]


def example(name: str, changes: Mapping[str, str] | None = None) -> str:
    """The file with a token, and with what else its head says to change."""
    text = (EXAMPLES / name).read_text()
    for old, new in {PLACEHOLDER: make_token(), **(changes or {})}.items():
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old}"
        text = text.replace(old, new)
    return text


def mac(rig: Rig, number: int) -> str:
    """Of a machine's eth0, in quotes."""
    shown = rig.network.run(number, "ip", "-json", "link", "show", "dev", "eth0").stdout
    return f'"{json.loads(shown)[0]["address"]}"'


def one_cluster(rig: Rig, masters: int = 1) -> dict[str, list[Machine]]:
    """Wait until all run; they must be one cluster with one store. Its machines by role."""
    wait_running(rig)
    roles = by_role(rig)
    counts = {role: len(machines) for role, machines in roles.items()}
    assert counts == {"master": masters, "node": len(rig) - masters}
    assert len({(m.status() or {})["cluster_id"] for m in rig}) == 1
    one, other = roles["node"]
    assert etcdctl(one, "put", "greeting", "hello") == "OK\n"
    assert etcdctl(other, "get", "greeting", "--print-value-only") == "hello\n"
    return roles


def boot_three_hosts(launch: Launch) -> None:
    rig = launch(3, example("three-hosts.yaml"))
    rig.start()
    one_cluster(rig)


def boot_three_masters(launch: Launch) -> None:
    rig = launch(5, "")
    text = example("three-masters.yaml", {MAC: mac(rig, 2)})
    for machine in rig:
        rig.set_user_data(machine.number, text)
    rig.start()
    roles = one_cluster(rig, masters=3)
    assert rig[2] in roles["node"]
    assert len(etcdctl(roles["master"][0], "member", "list").splitlines()) == 3


def boot_static_addresses(launch: Launch) -> None:
    here = {"10.0.0.5, 10.0.0.6, 10.0.0.7": "10.77.0.11, 10.77.0.12, 10.77.0.13"}
    text = example("static-addresses.yaml", {**here, "10.0.0.0/24": "10.77.0.0/24"})
    rig = launch(3, text)
    rig.network.no_multicast()
    rig.start()
    one_cluster(rig)


def boot_top_level_key(launch: Launch) -> None:
    rig = launch(3, "", image=NEWEST)
    text = example("top-level-key.yaml", {MAC: mac(rig, 3)})
    for machine in rig:
        rig.set_user_data(machine.number, text)
    rig.start()
    one_cluster(rig)
    rig.ready()
    said = rig[1].exec("cloud-init", "status", check=False)
    assert said.returncode == 2  # degraded, as the example says


def boot_origin(launch: Launch) -> None:
    directory = acceptance.BUILD / "images"
    images.build(directory)
    # What the example leaves to docker.io is in the machine's image, and this kernel's limits are.
    options = {"images": acceptance.references(directory), **acceptance.limits()}
    text = example("origin.yaml")
    with acceptance.machines(directory, acceptance.IMAGE, {}) as rig:
        for machine in rig:
            path = machine.hardware.disk / "usr/lib/firstboot/config.d/50-images.yaml"
            path.parent.mkdir(parents=True)
            path.write_text(yaml.safe_dump({"origin": options}))
            rig.set_user_data(machine.number, text)
        rig.start()
        acceptance.judge(rig, 500)


def as_ignition(butane: dict[str, Any]) -> dict[str, Any]:
    """What butane(1) makes of a configuration that has nothing but inline files."""
    assert butane.keys() == {"variant", "version", "storage"}
    assert (butane["variant"], butane["version"]) == ("fcos", "1.4.0")  # of Ignition 3.3.0
    files = []
    for file in butane["storage"]["files"]:
        assert file.keys() == {"path", "mode", "contents"}
        source = f"data:,{quote(file['contents']['inline'], safe='')}"
        files.append({"path": file["path"], "contents": {"source": source}, "mode": file["mode"]})
    return {"ignition": {"version": "3.3.0"}, "storage": {"files": files}}


def boot_ignition(launch: Launch) -> None:
    source = yaml.safe_load((EXAMPLES / "ignition.bu").read_text())
    assert as_ignition(source) == json.loads((EXAMPLES / "ignition.json").read_text())
    text = example("ignition.json")
    rig = launch(3, "")
    for machine in rig:
        remove_cloud_init(machine)
        log = ignite(machine, text)
        assert re.search(r"files: .*\[finished\] writing file .*/etc/firstboot/config.yaml", log)
        assert "fb1-" not in log
    rig.start()
    one_cluster(rig)
    for machine in rig:
        assert machine.exec("stat", "-c", "%a", "/etc/firstboot/config.yaml").stdout == "600\n"
        units = machine.exec("systemctl", "list-unit-files", "cloud-*", check=False).stdout
        assert "0 unit files listed" in units
        assert firstboot(machine, "status").returncode == 0


BOOT: dict[str, Callable[[Launch], None]] = {
    "ignition.bu": boot_ignition,
    "ignition.json": boot_ignition,
    "origin.yaml": boot_origin,
    "static-addresses.yaml": boot_static_addresses,
    "three-hosts.yaml": boot_three_hosts,
    "three-masters.yaml": boot_three_masters,
    "top-level-key.yaml": boot_top_level_key,
}
ELSEWHERE = {"anywhere.yaml": test_networks.test_one_file_assembles_a_cluster_anywhere}


def test_every_example_boots_here_or_elsewhere() -> None:
    assert BOOT.keys() | ELSEWHERE.keys() == {path.name for path in EXAMPLES.iterdir()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("boot", dict.fromkeys(BOOT.values()), ids=lambda boot: boot.__name__)
def test_it_boots(launch: Launch, boot: Callable[[Launch], None]) -> None:
    boot(launch)


def test_ignition_finds_nothing_wrong_with_the_example(tmp_path: Path) -> None:
    path = tmp_path / "config.ign"
    path.write_text(example("ignition.json"))
    argv = ["ignition-validate", str(path)]
    good = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout + good.stderr) == (0, "")
    path.write_text(path.read_text().replace('"mode"', '"modus"'))
    bad = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "modus" in bad.stdout + bad.stderr
