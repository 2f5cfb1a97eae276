"""Origin on three real machines, with the doubles that check what they are given.

Docker, dnsmasq, etcd and the containers' runtime are real. One cluster is broken in three ways, one
after the other, before it is let come up; what the faults show is what an operator would see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machines import acceptance
from tests.machines.acceptance import FAULT, FAULTS
from tests.machines.demo import Failed
from tests.machines.rig import Machine, Rig
from tests.origin import images

pytestmark = [pytest.mark.machine, pytest.mark.timeout(1200)]

FORM, SHOWN = 500.0, 300.0  # seconds, on a busy machine
API, READY = "origin-master-api.service", "8443/healthz/ready"
REASONS = {
    "san": r"servingInfo.certFile: not valid for 10\.77\.0\.1\d",
    "signer": r"controllerConfig.serviceServingCert.signer: could not read .*service-signer.crt",
    "cidr": r"networkConfig.clusterNetworks: the first is not what the older keys say",
}
ORDER = ("etcd", "origin-master-api", "origin-master-controllers", "openvswitch", "origin-node")
PODS = {
    "router": "docker.io/openshift/origin-haproxy-router:v3.9.0",
    "registry": "docker.io/openshift/origin-docker-registry:v3.9.0",
}


@pytest.fixture(scope="module")
def layouts() -> Path:
    """The doubles' images; etcd's is made once."""
    directory = acceptance.BUILD / "images"
    images.build(directory)
    return directory


@pytest.fixture(scope="module")
def cluster(layouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Three machines whose master has a fault; each test decides when that ends."""
    labels = [{"match": {"hostname": "host-1"}, "labels": {"region": "infra"}}]
    options = {"images": PODS, "node_labels": labels, "infra_selector": {"region": "infra"}}
    document = acceptance.document(layouts, origin=options, election={"grace": "20s"})
    image = acceptance.fault_layer(tmp_path_factory.mktemp("fault"), next(iter(FAULTS)))
    with acceptance.machines(layouts, image, document) as rig:
        rig.start()
        yield rig


def status(machine: Machine, *words: str) -> str:
    return machine.exec("firstboot", "status", *words, check=False).stdout


def master_of(rig: Rig) -> Machine:
    def known() -> bool:
        return all((m.status() or {}).get("role") for m in rig)

    rig.wait(known, FORM, "every host has its role")
    (found,) = (m for m in rig if (m.status() or {})["role"] == "master")
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_keeps_the_api_down_and_is_told(
    cluster: Rig, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of everybody: by the master's status while it waits, by the nodes', by acceptance."""
    master = master_of(cluster)
    master.write(FAULT, f"{fault}\n")
    reason = re.compile(REASONS[fault])

    def shown() -> bool:
        return bool(reason.search(json.dumps((master.status() or {}).get("sentence", ""))))

    def failed() -> bool:
        return any(
            problem["code"] == "STEP_FAILED" and reason.search(problem["hint"])
            for problem in (master.status() or {}).get("problems", ())
        )

    cluster.wait(shown, FORM, f"the master says why it waits: {fault}")
    page = status(master).splitlines()
    assert READY in page[0] and API in page[0], page[0]
    if fault == next(iter(FAULTS)):
        cluster.wait(failed, SHOWN, "the master gives the gate up")
    assert f"{API} failed: it exited with status 1" in status(master)
    for node in (m for m in cluster if m is not master):
        page = status(node).splitlines()
        assert f"wait for https://{master.address}:{READY}: connection refused" in page[0]
        assert node.exec("systemctl", "is-active", "origin-node", check=False).stdout != "active\n"
    with pytest.raises(Failed, match=r"are not running|failed \d+ times"):
        acceptance.judge(cluster, 0.5)
    told = capsys.readouterr().out
    assert reason.search(told)
    # Between two failures it is active for a moment.
    assert re.search(rf"{API} +loaded +(activating|active)", told)
    assert "-- origin-master-api.service" in told and "---- host-3" in told


def test_it_comes_up_when_the_last_fault_is_gone(
    cluster: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    master_of(cluster).write(FAULT, "none\n")
    proof = dict(acceptance.judge(cluster, FORM))
    assert proof["oc whoami"] == "system:admin"
    assert proof["nodes Ready"] == "host-1, host-2, host-3"
    assert proof["service account token"] == "system:serviceaccount:default:default"
    assert proof["the same token, spoilt"] == "refused"


def entered(machine: Machine, *names: str) -> list[float]:
    """When these units became active, in the machine's monotonic time."""
    found = []
    for name in names:
        words = ("systemctl", "show", "-p", "ActiveEnterTimestampMonotonic", "--value", name)
        found.append(float(machine.exec(*words).stdout))
    return found


def test_the_order_and_the_gates_are_in_journal_and_timeline(cluster: Rig) -> None:
    master = master_of(cluster)
    at = master.address
    times = entered(master, *(f"{name}.service" for name in ORDER))
    # The API server was started again and again: the last time counts.
    assert times == sorted(times) and times[0] > 0
    lines = [line.split(maxsplit=2)[-1] for line in _rows(master)]
    expected = [
        "start docker.service",
        "start etcd.service",
        f"wait for https://{at}:2379/health",
        "start origin-master-api.service",
        f"wait for https://{at}:8443/healthz/ready",
        "start origin-master-controllers.service",
        f"wait for https://{at}:8444/healthz",
        "start openvswitch.service",
        "start origin-node.service",
        f"wait for https://{at}:8443/api/v1/nodes/{master.name}",
        "create DeploymentConfig router",
    ]
    assert [line for line in lines if line in expected] == expected
    began = entered(master, API)[0]
    for node in (m for m in cluster if m is not master):
        switch, kubelet = entered(node, "openvswitch.service", "origin-node.service")
        assert began < switch < kubelet  # machines share the real host's monotonic clock
        lines = [line.split(maxsplit=2)[-1] for line in _rows(node)]
        gate = lines.index(f"wait for https://{at}:8443/healthz/ready")
        assert (
            gate
            < lines.index("start openvswitch.service")
            < lines.index("start origin-node.service")
        )


def _rows(machine: Machine) -> list[str]:
    rows = machine.exec("firstboot", "timeline").stdout.splitlines()
    return [row for row in rows if re.match(r" *\d+\.\d+ +\d+\.\d+ +", row)]


def test_the_master_made_router_and_registry_once(cluster: Rig) -> None:
    journal = master_of(cluster).journal("origin-master-api.service", output="cat")
    made = re.findall(r"^system:admin POST (\S+) (\d+)$", journal, re.MULTILINE)
    codes: dict[str, list[str]] = {}
    for path, code in made:
        codes.setdefault(path.rpartition("/")[2], []).append(code)
    assert codes == {
        "serviceaccounts": ["201", "201"],
        "deploymentconfigs": ["201", "201"],
        "services": ["201", "201"],
        "routes": ["201"],
        "securitycontextconstraints": ["201"],
        "clusterrolebindings": ["201", "201"],
        "secrets": ["201"],
    }


def test_the_hosts_are_as_openshift_ansible_leaves_them(cluster: Rig) -> None:
    master = master_of(cluster)
    inventory = master.read("/etc/origin/inventory")
    for machine in cluster:
        assert f"{machine.name} ansible_host={machine.address}\n" in inventory
        # dnsmasq answers for everybody's name, at the address that resolv.conf now names.
        assert f"nameserver {machine.address}\n" in machine.read("/etc/resolv.conf")
        looked = machine.exec("python3", "-c", LOOK_UP, machine.address, master.name).stdout
        assert looked == f"{master.address}\n"
        rules = machine.exec("iptables", "-S", "OS_FIREWALL_ALLOW").stdout
        assert "-p tcp -m tcp --dport 10250 -j ACCEPT" in rules
        assert ("--dport 8443" in rules) is (machine is master)
        assert "-j OS_FIREWALL_ALLOW" in machine.exec("iptables", "-S", "INPUT").stdout
        assert machine.read("/proc/sys/net/ipv4/ip_forward") == "1\n"
        failed = machine.exec("systemctl", "list-units", "--failed", "--no-legend").stdout
        assert failed == ""
        assert "ignoring" not in "".join(
            line for line in machine.journal().splitlines() if "openvswitch.service:" in line
        )
    assert master.read("/root/.kube/config") == master.read(acceptance.ADMIN)


# Asks one name server for one name's address, with a query made by hand (RFC 1035).
LOOK_UP = """
import socket, sys
server, name = sys.argv[1:]
question = bytes([len(name)]) + name.encode() + bytes([0, 0, 1, 0, 1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
    channel.settimeout(10)
    channel.sendto(bytes([7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + question, (server, 53))
    answer = channel.recv(512)
print(".".join(map(str, answer[-4:])))
"""


def test_after_a_power_cut_systemd_alone_brings_origin_up(cluster: Rig) -> None:
    def finished() -> bool:
        return all(
            m.exec("systemctl", "is-active", "firstboot.service", check=False).stdout
            == "inactive\n"
            for m in cluster
        )

    cluster.wait(finished, FORM, "firstboot has ended on every host")
    for machine in cluster:
        machine.cut()
    for machine in cluster:
        machine.kill()
    cluster.start()
    cluster.ready(timeout=FORM)
    names = sorted(m.name for m in cluster)
    master = master_of(cluster)

    def ready() -> bool:
        try:
            return acceptance.ready_nodes(master) == names
        except Failed:  # the API server is not there yet
            return False

    cluster.wait(ready, FORM, "all nodes are Ready again")


# ---------------------------------------------------------------- three masters


@pytest.fixture(scope="module")
def masters(layouts: Path) -> Iterator[Rig]:
    document = acceptance.document(layouts, masters=3, election={"grace": "20s"})
    with acceptance.machines(layouts, acceptance.IMAGE, document) as rig:
        rig.start()
        rig.wait(
            lambda: all((m.status() or {}).get("state") == "running" for m in rig),
            FORM,
            "every master runs its role",
        )
        yield rig


def test_three_masters_are_three_members_and_three_servers(masters: Rig) -> None:
    assert {(m.status() or {})["role"] for m in masters} == {"master"}
    for machine in masters:
        words = ("runc", "exec", "-e", "ETCDCTL_API=3", "etcd", "etcdctl", "member", "list")
        members = machine.exec(*words).stdout
        assert members.count("started") == 3, members
        asked = machine.exec("python3", "-c", HEALTHY, *(m.address for m in masters))
        assert asked.stdout == "ok ok ok\n"
        assert acceptance.oc(machine, "whoami") == "system:admin"


HEALTHY = """
import ssl, sys, urllib.request
context = ssl.create_default_context(cafile="/etc/origin/master/ca.crt")
urls = [f"https://{at}:8443/healthz/ready" for at in sys.argv[1:]]
print(*(urllib.request.urlopen(u, context=context, timeout=20).read().decode() for u in urls))
"""


def test_masters_share_signers_and_account_keys_and_no_more(masters: Rig) -> None:
    def digests(name: str) -> set[str]:
        path = f"/etc/origin/master/{name}"
        return {m.exec("sha256sum", path).stdout.split()[0] for m in masters}

    for name in ("ca.key", "service-signer.key", "front-proxy-ca.key", "admin.key"):
        assert len(digests(name)) == 1, name
    assert len(digests("serviceaccounts.private.key")) == 1
    for name in ("master.server.key", "openshift-master.key", "master.etcd-client.key"):
        assert len(digests(name)) == 3, name
    founders = [m for m in masters if m.exec("ls", "/etc/etcd").stdout.split().count("ca")]
    assert len(founders) == 1  # etcd's signer stays with the master that made it
    # What went over the wire is in the history, and sealed there.
    body = masters[1].read("/etc/origin/master/ca.key").splitlines()[1]
    assert len(body) == 64
    for machine in masters:
        history = machine.read("/var/lib/firstboot/history.jsonl")
        assert "sealed" in history
        for text in (history, machine.journal(), machine.read("/run/firstboot/status.json")):
            assert "PRIVATE KEY" not in text and body not in text


def test_a_token_of_one_master_is_taken_by_all(masters: Rig) -> None:
    token = acceptance.service_account_token(masters[1])
    for machine in masters:
        acceptance.service_account_token(machine)  # its own controllers have run
        assert acceptance.bearer(machine, token) == "system:serviceaccount:default:default"
