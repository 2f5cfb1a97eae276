"""The main job on real machines: one image, one user-data, real systemd, containers and etcd."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest

from firstboot.userdata import make_token
from tests.machines.document import document, user_data
from tests.machines.rig import PROJECT, Machine, Rig

pytestmark = pytest.mark.machine

FORM = 120.0  # seconds a formation may take on a busy machine before the test gives up
Launch = Callable[..., Rig]


def state(machine: Machine) -> str:
    """`waiting`, `running`, …; empty while there is no status."""
    shown = machine.status() if machine.running else None
    return str(shown["state"]) if shown else ""


def problems(machine: Machine) -> dict[str, str]:
    """The problems a machine tells of, code to text."""
    shown = machine.status() or {}
    return {p["code"]: p["text"] for p in shown.get("problems", ())}


def wait_running(rig: Rig, *numbers: int) -> None:
    chosen = [rig[n] for n in numbers] if numbers else list(rig)
    rig.wait(lambda: all(state(m) == "running" for m in chosen), FORM, "every host runs its role")


def by_role(rig: Rig, *numbers: int) -> dict[str, list[Machine]]:
    roles: dict[str, list[Machine]] = {}
    for machine in [rig[n] for n in numbers] if numbers else list(rig):
        shown = machine.status() or {}
        roles.setdefault(shown["role"], []).append(machine)
    return roles


def container(machine: Machine) -> str:
    return "etcd" if (machine.status() or {})["role"] == "master" else "etcd-proxy"


def etcdctl(machine: Machine, *arguments: str) -> str:
    argv = ("runc", "exec", "-e", "ETCDCTL_API=3", container(machine), "etcdctl", *arguments)
    return machine.exec(*argv, timeout=30).stdout


def firstboot(machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return machine.exec("firstboot", *arguments, check=False, timeout=30)


# ---------------------------------------------------------------- one cluster, and its life


@pytest.fixture(scope="module")
def token() -> str:
    return make_token()


@pytest.fixture(scope="module")
def cluster(token: str) -> Iterator[Rig]:
    with Rig(3, user_data(document(3, token, election="{grace: 20s}"))) as rig:
        rig.start()
        wait_running(rig)
        yield rig


@pytest.mark.scenario("A01")
def test_exactly_one_master_and_every_host_runs(cluster: Rig) -> None:
    roles = by_role(cluster)
    assert {role: len(machines) for role, machines in roles.items()} == {"master": 1, "node": 2}
    shown = [m.status() or {} for m in cluster]
    assert len({s["cluster_id"] for s in shown}) == 1
    assert len({s["name"] for s in shown}) == 3
    for machine in cluster:
        page = firstboot(machine, "status")
        assert page.returncode == 0, page.stdout
        assert "Running as" in page.stdout
        told = json.loads(firstboot(machine, "status", "--format", "json").stdout)
        assert set(told["unit_states"].values()) == {"active"}
        assert machine.exec("systemctl", "is-active", "firstboot.target").stdout == "active\n"


def test_a_value_written_on_one_node_is_read_on_another(cluster: Rig) -> None:
    one, other = by_role(cluster)["node"]
    assert etcdctl(one, "put", "greeting", "hello") == "OK\n"
    assert etcdctl(other, "get", "greeting", "--print-value-only") == "hello\n"


ASK = """
import ssl, sys, urllib.request
context = ssl.create_default_context(cafile="/etc/etcd/ca.crt")
if sys.argv[2:]:
    context.load_cert_chain("/etc/etcd/client.crt", "/etc/etcd/client.key")
print(urllib.request.urlopen(sys.argv[1], context=context, timeout=5).status)
"""


def test_etcd_refuses_who_has_no_certificate(cluster: Rig) -> None:
    node, master = by_role(cluster)["node"][0], by_role(cluster)["master"][0]
    argv = ("python3", "-c", ASK, f"https://{master.address}:2379/health")
    assert node.exec(*argv, "with its certificate").stdout == "200\n"
    refused = node.exec(*argv, check=False)
    assert refused.returncode != 0
    assert (
        "certificate required" in refused.stderr.lower()
        or "bad certificate" in refused.stderr.lower()
    )


def test_nothing_resident_is_left(cluster: Rig) -> None:
    def left() -> bool:
        return all(
            m.exec("systemctl", "is-active", "firstboot.service", check=False).stdout
            == "inactive\n"
            for m in cluster
        )

    cluster.wait(left, 60, "firstboot.service has ended on every host")


# Reads the token from standard input: as an argument it would find itself.
SEARCH = """
import pathlib, subprocess, sys
token = sys.stdin.buffer.read().strip()
found = []
for top in ("/etc", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/var"):
    for path in pathlib.Path(top).rglob("*"):
        if path.is_file() and not path.is_symlink() and token in path.read_bytes():
            found.append(str(path))
for name in ("cmdline", "environ"):
    for path in pathlib.Path("/proc").glob(f"[0-9]*/{name}"):
        try:
            if token in path.read_bytes():
                found.append(str(path))
        except OSError:
            pass
journal = subprocess.run(["journalctl", "--no-pager", "-o", "export"], capture_output=True).stdout
assert len(journal) > 10000
if token in journal:
    found.append("journal")
print(found)
"""


SEED = "/var/lib/cloud/seed/nocloud-net/user-data"  # read-only, as a disk that holds it is


@pytest.mark.scenario("A31")
def test_the_token_is_on_no_disk_after_close(cluster: Rig, token: str) -> None:
    for machine in cluster:
        found = machine.exec("python3", "-c", SEARCH, input=token).stdout
        # That the search finds what cannot be written shows that it can find.
        assert found == f"['{SEED}']\n"
        assert "removed-when-admission-closed" in machine.read("/etc/firstboot/config.yaml")
        assert machine.exec("stat", "-c", "%a", "/etc/firstboot/config.yaml").stdout == "600\n"
        page = firstboot(machine, "status")
        assert page.returncode == 0
        assert f"token      still in {SEED}" in page.stdout
        assert firstboot(machine, "validate", "/etc/firstboot/config.yaml").returncode == 0


def test_the_timeline_names_every_phase(cluster: Rig) -> None:
    for machine in cluster:
        lines = firstboot(machine, "timeline").stdout
        for phase in ("network", "discovering", "starting", "running"):
            assert phase in lines


def test_the_history_replays(cluster: Rig) -> None:
    machine = by_role(cluster)["master"][0]
    once, again = (
        firstboot(machine, "replay", "/var/lib/firstboot/history.jsonl") for _ in range(2)
    )
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert "Running as master" in once.stdout


def test_roles_and_data_survive_a_power_cut_of_all_without_firstboot(
    cluster: Rig, token: str
) -> None:
    before = {m.number: (m.status() or {})["role"] for m in cluster}
    etcdctl(by_role(cluster)["node"][0], "put", "kept", "yes")
    cluster_id = (cluster[1].status() or {})["cluster_id"]
    for machine in cluster:
        machine.kill()
    order = [1, 2, 3]
    random.shuffle(order)
    for number in order:
        cluster.start(number)
    cluster.ready()

    def back() -> bool:
        return all(
            m.exec("systemctl", "is-active", "firstboot.target", check=False).stdout == "active\n"
            for m in cluster
        )

    cluster.wait(back, FORM, "systemd brought every role back")
    wait_running(cluster)
    assert {m.number: (m.status() or {})["role"] for m in cluster} == before
    assert {(m.status() or {})["cluster_id"] for m in cluster} == {cluster_id}
    node = by_role(cluster)["node"][1]
    cluster.wait(lambda: _reads(node, "kept", "yes"), 60, "the value is still there")
    for machine in cluster:
        ran = machine.exec("journalctl", "-b", "-u", "firstboot.service", "-o", "cat").stdout
        assert "Running as" not in ran
        assert "peers" not in ran
        # cloud-init has read its source again, and written copies; they are gone again, and it
        # can still read what it keeps.
        assert "status: done" in machine.exec("cloud-init", "status", "--wait", timeout=120).stdout
        assert machine.exec("python3", "-c", SEARCH, input=token).stdout == f"['{SEED}']\n"


def _reads(machine: Machine, key: str, wanted: str) -> bool:
    try:
        return etcdctl(machine, "get", key, "--print-value-only") == f"{wanted}\n"
    except subprocess.CalledProcessError:
        return False


def test_a_unit_that_dies_for_good_is_told(cluster: Rig) -> None:
    node = by_role(cluster)["node"][0]
    node.exec("systemctl", "stop", "etcd-proxy.service")
    page = firstboot(node, "status")
    assert page.returncode == 2
    assert "etcd-proxy.service is inactive" in page.stdout, page.stdout
    node.exec("systemctl", "start", "etcd-proxy.service")


# ---------------------------------------------------------------- hardening

SECURITY = PROJECT / "docs/security.md"


def score(machine: Machine, unit: str) -> str:
    """The exposure that systemd finds in a unit: 0.0 to 10.0."""
    argv = ("systemd-analyze", "security", "--no-pager", unit)
    said = machine.exec(*argv, check=False).stdout
    found = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert found is not None, said
    return found[1]


def test_the_service_is_as_confined_as_the_page_says(cluster: Rig) -> None:
    machine = cluster[1]
    text = machine.exec("systemctl", "cat", "firstboot.service").stdout
    head, _, rest = text.partition("# What it never does is forbidden to it")
    names = sorted(set(re.findall(r"(?m)^([A-Za-z]+)=", rest.partition("[Install]")[0])))
    page = SECURITY.read_text(encoding="utf-8")
    assert len(names) > 10
    assert [name for name in names if f"`{name}=" not in page] == []
    machine.write("/run/systemd/system/open.service", head)
    machine.exec("systemctl", "daemon-reload")
    told = re.findall(
        r"systemd 252\) says ([0-9]+\.[0-9]);\s+without\s+these\s+lines it says ([0-9]+\.[0-9])",
        page,
    )
    assert told == [(score(machine, "firstboot.service"), score(machine, "open.service"))]


# ---------------------------------------------------------------- three masters


@pytest.mark.scenario("A30")
def test_three_masters_are_one_etcd(launch: Launch) -> None:
    rig = launch(3, user_data(document(3, masters="3")))
    rig.start()
    wait_running(rig)
    assert len(by_role(rig)["master"]) == 3
    members = etcdctl(rig[1], "member", "list").splitlines()
    assert len(members) == 3
    assert all(" started," in m for m in members)
    etcdctl(rig[1], "put", "three", "masters")
    rig[1].kill()
    rig.wait(lambda: _reads(rig[2], "three", "masters"), 60, "two of three masters still serve")


# ---------------------------------------------------------------- who is missing, who is wrong


@pytest.mark.scenario("A33")
def test_two_of_three_wait_and_say_so_and_the_third_completes(launch: Launch) -> None:
    rig = launch(3, user_data(document(3)))
    rig.start(1, 2)

    def wait_for_one() -> bool:
        return all("2 of 3 hosts are present" in sentence(rig[n]) for n in (1, 2))

    rig.wait(wait_for_one, FORM, "two hosts wait for the third")
    for number in (1, 2):
        page = firstboot(rig[number], "status")
        assert page.returncode == 2
        assert "waiting for 1 more" in page.stdout
        assert "Boot the missing hosts" in page.stdout
        assert rig[number].exec("systemctl", "is-active", "multi-user.target").stdout == "active\n"
        assert not any(u in rig[number].exec("ls", "/etc/systemd/system").stdout for u in ("etcd",))
    rig.start(3)
    wait_running(rig)
    assert len(by_role(rig)["master"]) == 1


def sentence(machine: Machine) -> str:
    return str((machine.status() or {}).get("sentence", "")) if machine.running else ""


def test_a_wrong_token_is_told_and_the_others_form(launch: Launch) -> None:
    good = user_data(document(3))
    rig = launch(4, good, overrides={4: user_data(document(3))})
    rig.start()
    wait_running(rig, 1, 2, 3)
    rig.wait(lambda: "TOKEN_MISMATCH" in problems(rig[4]), 60, "host 4 says its token is wrong")
    assert problems(rig[4])["TOKEN_MISMATCH"].startswith("This host's token does not match")
    assert (rig[4].status() or {})["cluster_id"] is None
    assert len({(rig[n].status() or {})["cluster_id"] for n in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        ("cluster: demo\nexpcet: 3\n", "78", "config.yaml:2:1"),
        ("cluster: demo\nexpect: 3\ntoken: changeme\n", "78", "config.yaml:3:"),
        ("cluster: {{ v1.nothing }\n", "78", "config.yaml:2:"),
    ],
    ids=["unknown-key", "placeholder-token", "not-yaml"],
)
def test_a_mistake_in_the_document_starts_nothing_and_is_told(
    launch: Launch, content: str, code: str, told: str
) -> None:
    rig = launch(1, user_data(content))
    rig.start()
    rig.wait(lambda: state(rig[1]) == "failed", FORM, "the mistake is told")
    rig.ready()
    page = firstboot(rig[1], "status")
    assert page.returncode == 1
    assert told in page.stdout
    shown = (
        rig[1]
        .exec("systemctl", "show", "-P", "ExecMainStatus", "firstboot.service", check=False)
        .stdout.strip()
    )
    assert shown == code
    assert told in rig[1].hardware.console.read_text(errors="replace")
    assert "Traceback" not in rig[1].journal("firstboot.service")


def test_garbage_user_data_leaves_an_unconfigured_host_and_the_others_form(launch: Launch) -> None:
    rig = launch(3, user_data(document(2)), overrides={3: "\x01\x02 %PNG garbage \x7f\n"})
    rig.start()
    wait_running(rig, 1, 2)
    rig.wait(lambda: state(rig[3]) == "unconfigured", FORM, "host 3 says that it got nothing")
    rig.ready(3)
    page = firstboot(rig[3], "status")
    assert page.returncode == 0
    assert "not configured" in page.stdout


@pytest.mark.scenario("A20")
def test_two_formations_on_one_bridge_are_two_clusters(launch: Launch) -> None:
    one, other = user_data(document(2)), user_data(document(2, formation="second"))
    rig = launch(4, one, overrides={3: other, 4: other})
    rig.start()
    wait_running(rig)
    ids = [(m.status() or {})["cluster_id"] for m in rig]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert len(by_role(rig)["master"]) == 2


def test_a_broken_image_is_told_and_retried_until_it_is_there(launch: Launch) -> None:
    bad = document(1, etcd="{image: 'oci:/srv/etcd:latest'}")
    rig = launch(1, user_data(bad))
    rig.start()
    rig.wait(lambda: "STEP_FAILED" in problems(rig[1]), FORM, "the missing image is told")
    assert "/srv/etcd" in problems(rig[1])["STEP_FAILED"]
    assert firstboot(rig[1], "status").returncode == 2
    rig[1].exec("cp", "-a", "/usr/lib/firstboot/images/etcd", "/srv/etcd")
    wait_running(rig)


def test_the_top_level_key_of_a_cloud_config_works_too(launch: Launch) -> None:
    text = "".join(f"  {line}\n" for line in document(1, payload="none").splitlines())
    rig = launch(1, f"#cloud-config\nfirstboot:\n{text}")
    rig.start()
    wait_running(rig)
    assert not rig[1].exec("ls", "/etc/firstboot").stdout.count("config.yaml")
    modes = rig[1].exec("sh", "-c", "cd /etc/firstboot/pki && stat -c '%a %n' *").stdout
    assert modes.split("\n")[:4] == [
        "644 ca.crt",
        "644 client.crt",
        "600 host.key",
        "644 server.crt",
    ]


# Holds etcd's port before the role starts; bootcmd runs in cloud-init's network stage.
SQUATTER = """
bootcmd:
- - systemd-run
  - --no-block
  - --unit=squatter
  - python3
  - -c
  - import socket, time; s = socket.create_server(('', 2379)); time.sleep(3600)
"""


def test_a_unit_that_fails_is_told_with_its_last_lines_and_retried(launch: Launch) -> None:
    rig = launch(1, user_data(document(1)) + SQUATTER)
    rig.start()
    rig.wait(lambda: "STEP_FAILED" in problems(rig[1]), FORM, "the failed unit is told")
    text = problems(rig[1])["STEP_FAILED"]
    assert "Could not start etcd.service" in text
    page = firstboot(rig[1], "status")
    assert page.returncode == 2
    assert "address already in use" in page.stdout
    assert (
        rig[1].exec("systemctl", "is-active", "firstboot.target", check=False).stdout != "active\n"
    )
    rig[1].exec("systemctl", "stop", "squatter")
    wait_running(rig)
