"""The etcd payload: its rows, its image, and members and proxies of real etcd under real runtimes.

Hosts are network namespaces; each has a directory for its root file system. The containers are
started by the command that their unit holds.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firstboot.containers import install
from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol.model import Member, Profile, Role, Value
from firstboot.protocol.plan import (
    InstallContainer,
    Probe,
    StartUnit,
    Step,
    WriteFile,
    make_plan,
)

ETCD = PAYLOADS["etcd"]
SOURCES = Path(__file__).parents[2] / "firstboot" / "payloads" / "etcd"
READY_SECONDS = 60.0
PROBE = """
import ssl, sys, urllib.request
url, *files = sys.argv[1:]
context = None
if files:
    context = ssl.create_default_context(cafile=files[0])
    if files[1:]:
        context.load_cert_chain(*files[1:])
opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
)
print(opener.open(url, timeout=10).read().decode())
"""


def need(*tools: str) -> None:
    """Fail, with the remedy, if a program this test is about is not there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} missing: run 'make setup'")


def run(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(a) for a in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    if check and done.returncode:
        raise AssertionError(f"{argv}: {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def member(number: int, host: str | None = None) -> Member:
    return Member(f"{number:032x}", f"host{number}", host or f"10.99.0.{number}")


def decided(*masters: Member) -> Value:
    return Value(epoch=1, fingerprint="5e" * 32, masters=masters, active=True, members=3)


def plan(value: Value, me: Member, image: str = "oci:/image") -> tuple[Step, ...]:
    options = {**OPTIONS["etcd"], "etcd_image": image}
    return make_plan(ETCD, value, me, "demo", options)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("role", list(Role))
def test_rows_ask_for_the_certificates_they_use(role: Role) -> None:
    rows = ETCD.for_role(role)
    used = {step.credential for step in rows.steps if isinstance(step, WriteFile)}
    assert used == {"ca.crt", "host.key", *(f"{profile}.crt" for profile in rows.profiles)}


@pytest.mark.parametrize("role", list(Role))
def test_private_keys_are_for_root_only(role: Role) -> None:
    files = [step for step in ETCD.for_role(role).steps if isinstance(step, WriteFile)]
    assert {f.mode for f in files if f.credential == "host.key"} == {0o600}
    assert {f.mode for f in files if f.credential != "host.key"} == {0o644}


def test_all_masters_start_from_the_same_list() -> None:
    masters = (member(1), member(2), member(3))
    lists: set[str] = set()
    for me in masters:
        (container,) = containers(plan(decided(*masters), me))
        arguments = json.loads(f"[0{dict(container.values)['ETCD_ARGS']}]")[1:]
        lists.update(a for a in arguments if a.startswith("--initial-cluster"))
        assert f"--name={me.name}" in arguments
    peers = ",".join(f"host{n}=https://10.99.0.{n}:2380" for n in (1, 2, 3))
    assert lists == {
        f"--initial-cluster={peers}",
        "--initial-cluster-state=new",
        f"--initial-cluster-token={'5e' * 16}",
    }


def test_an_ipv6_address_is_bracketed_in_urls() -> None:
    me = member(1, "fd00::1")
    (container,) = containers(plan(decided(me), me))
    assert "--listen-peer-urls=https://[fd00::1]:2380" in dict(container.values)["ETCD_ARGS"]


def test_every_known_payload_has_defaults_for_its_options() -> None:
    assert set(PAYLOADS) == set(OPTIONS)
    for name, payload in PAYLOADS.items():
        for me in (member(1), member(2)):
            make_plan(payload, decided(member(1)), me, "demo", OPTIONS[name])


def containers(steps: tuple[Step, ...]) -> list[InstallContainer]:
    return [step for step in steps if isinstance(step, InstallContainer)]


# ---------------------------------------------------------------- image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("apt-get", "dpkg-deb", "umoci")
    out = tmp_path_factory.mktemp("etcd") / "image"
    run(SOURCES / "build-image", out)
    return out


def test_the_image_is_the_same_every_time(image: Path, tmp_path: Path) -> None:
    run(SOURCES / "build-image", tmp_path / "again")
    assert (tmp_path / "again" / "index.json").read_bytes() == (image / "index.json").read_bytes()


def test_the_image_says_that_it_is_a_system_container(image: Path) -> None:
    need("skopeo")
    labels = json.loads(run("skopeo", "inspect", f"oci:{image}:latest"))["Labels"]
    assert labels["atomic.type"] == "system"


@pytest.mark.parametrize("me", [member(1), member(2)], ids=["master", "node"])
def test_systemd_understands_the_unit(image: Path, tmp_path: Path, me: Member) -> None:
    need("systemd-analyze", "runc")
    (row,) = containers(plan(decided(member(1)), me, f"oci:{image}"))
    result = install(tmp_path, row.name, row.image, dict(row.values))
    unit = tmp_path / "etc/systemd/system" / result.container.unit
    assert "--systemd-cgroup" not in unit.read_text(), "the payload stays in the unit's own cgroup"
    run("systemd-analyze", "verify", "--man=no", unit)


# ---------------------------------------------------------------- real etcd


class Authority:
    """A throw-away cluster CA."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.certificate = self._sign(self.name, self.key, x509.BasicConstraints(True, 0), [])

    def credentials(self, me: Member) -> dict[str, bytes]:
        """The files that a plan's rows may name."""
        key = ec.generate_private_key(ec.SECP256R1())
        uses = {
            Profile.CLIENT: [ExtendedKeyUsageOID.CLIENT_AUTH],
            Profile.PEER: [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
        }
        found = {"ca.crt": self.certificate, "host.key": pem(key)}
        for profile, usages in uses.items():
            named = [x509.NameAttribute(NameOID.COMMON_NAME, me.name)]
            subject = x509.Name([] if profile is Profile.CLIENT else named)
            address = x509.IPAddress(ipaddress.ip_address(me.host))
            extensions: list[x509.ExtensionType] = [
                x509.ExtendedKeyUsage(usages),
                x509.SubjectAlternativeName([x509.DNSName(me.name), address]),
            ]
            leaf = x509.BasicConstraints(False, None)
            found[f"{profile}.crt"] = self._sign(subject, key, leaf, extensions)
        return found

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        constraints: x509.BasicConstraints,
        extensions: list[x509.ExtensionType],
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(constraints, critical=True)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class Network:
    """One bridge, in a namespace of its own, and a namespace per host."""

    def __init__(self) -> None:
        self.switch = f"fbet{os.getpid()}"
        self.names = [self.switch]

    def __enter__(self) -> Self:
        run("ip", "netns", "add", self.switch)
        run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "br0", "up")
        return self

    def attach(self, host: Member) -> str:
        number = len(self.names)
        name = f"{self.switch}-{number}"
        self.names.append(name)
        run("ip", "netns", "add", name)
        port = f"p{number}"
        peer = ["peer", "name", port, "netns", self.switch]
        run("ip", "-n", name, "link", "add", "eth0", "type", "veth", *peer)
        run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", name, "address", "add", f"{host.host}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")
        return name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in reversed(self.names):
            run("ip", "netns", "delete", name, check=False)


class Host:
    """One host: its root directory, its namespaces, and the container it runs."""

    def __init__(self, network: Network, me: Member, directory: Path, runtime: str) -> None:
        self.me, self.root, self.runtime = me, directory / me.name, runtime
        self.namespace = network.attach(me)
        self.state = Path(tempfile.mkdtemp(prefix="fbet", dir="/tmp"))  # short: it holds a socket
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notifications.bind(str(self.state / "notify"))
        self.told_ready = threading.Event()
        self.listener = threading.Thread(target=self.listen)
        self.listener.start()
        self.process: subprocess.Popen[bytes] | None = None
        self.name = self.deployment = ""
        self.command: list[str] = []
        self.probe = Probe("")

    def prepare(self, steps: tuple[Step, ...], credentials: dict[str, bytes]) -> None:
        """Everything but starting the unit."""
        for step in steps:
            if isinstance(step, WriteFile):
                path = self.root / step.path.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(credentials[step.credential])
                path.chmod(step.mode)
            elif isinstance(step, InstallContainer):
                done = install(self.root, step.name, step.image, dict(step.values), self.runtime)
                self.name, self.deployment = step.name, done.container.deployment
                self.move_cgroup()
            elif isinstance(step, StartUnit):
                unit = (self.root / "etc/systemd/system" / step.unit).read_text()
                assert "\nUnsetEnvironment=NOTIFY_SOCKET\n" in unit
                (start,) = (x for x in unit.splitlines() if x.startswith("ExecStart="))
                self.command = shlex.split(start.removeprefix("ExecStart="))
            elif isinstance(step, Probe):
                self.probe = step

    def move_cgroup(self) -> None:
        """These hosts share one kernel's cgroups: give each a tree. Nothing else is changed."""
        path = self.root / self.deployment.lstrip("/") / "config.json"
        config = json.loads(path.read_text())
        assert config["linux"]["cgroupsPath"] == f"/system.slice/{self.name}.service/payload"
        config["linux"]["cgroupsPath"] = f"/{self.namespace}{config['linux']['cgroupsPath']}"
        path.write_text(json.dumps(config))

    def inside(self, *argv: str) -> list[str]:
        """`argv` on this host: its network, its /etc and /var/lib, and state of its own."""
        script = (
            f"mount --bind {self.root}/var/lib /var/lib; mount --bind {self.root}/etc /etc;"
            # crun 1.8 refuses to run where both hierarchies are mounted.
            "umount /sys/fs/cgroup/unified 2>/dev/null;"
            # systemd's socket is this host's.
            "mount -t tmpfs tmpfs /run; mkdir /run/systemd; : >/run/systemd/notify;"
            f"mount --bind {self.state}/notify /run/systemd/notify;"
            f"cd {self.deployment} || exit 1;"
            'exec "$@"'
        )
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount"]
        return [*enter, "--propagation", "private", "sh", "-c", script, "sh", *argv]

    def call(self, *argv: str, check: bool = True) -> str:
        """Run the container's runtime, as a person on the host would."""
        program = self.command[0]
        return run(*self.inside(program, "--root", str(self.state), *argv), check=check)

    def start(self) -> None:
        program, *arguments = self.command
        with (self.state / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.inside(program, "--root", str(self.state), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"},
            )

    def wait_ready(self) -> None:
        """Until the payload has told systemd that it is ready."""
        if not self.told_ready.wait(READY_SECONDS):
            raise AssertionError(f"{self.me.name} never became ready:\n{self.log()}")
        self.told_ready.clear()

    def listen(self) -> None:
        """Take every notification, as systemd does."""
        while message := self.notifications.recv(4096):
            if b"READY=1" in message:
                self.told_ready.set()

    def log(self) -> str:
        return (self.state / "log").read_text(errors="replace")[-3000:]

    def ask(self) -> tuple[int, str]:
        """The health gate, once: exit code and answer."""
        on_host = [str(self.root / f.lstrip("/")) for f in self.files() if f]
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}"]
        done = subprocess.run(
            [*enter, sys.executable, "-c", PROBE, self.probe.url, *on_host],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    def files(self) -> tuple[str, str, str]:
        return self.probe.authority, self.probe.certificate, self.probe.key

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while (answer := self.ask())[0] != 0:
            assert time.monotonic() < deadline, f"{self.me.name}: {answer[1]}\n{self.log()}"
        assert json.loads(answer[1]) == {"health": "true"}

    def etcdctl(self, *argv: str) -> str:
        return self.call("exec", self.name, "etcdctl", *argv).strip()

    def stop(self, signal: str) -> None:
        """Signal the payload, wait for the runtime to end, and clear up as the unit does."""
        if self.process is None:
            return
        self.call("kill", self.name, signal, check=False)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.call("delete", "-f", self.name, check=False)
        self.process = None

    def close(self) -> None:
        self.stop("KILL")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", str(self.state / "notify"))
        self.listener.join()
        self.notifications.close()
        shutil.rmtree(self.state)
        shutil.rmtree(self.root)  # 40 MB that nobody will look at


@pytest.fixture
def network() -> Iterator[Network]:
    need("ip", "nsenter", "unshare", "runc", "crun", "umoci", "systemd-tmpfiles")
    if os.geteuid() != 0:
        pytest.fail("real containers need root: run 'sudo make test'")
    with Network() as found:
        yield found
    mounts = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
    for top in (mount / name for mount in mounts for name in found.names):
        for directory, _, _ in os.walk(top, topdown=False):
            Path(directory).rmdir()


@pytest.fixture
def hosts(network: Network) -> Iterator[list[Host]]:
    found: list[Host] = []
    yield found
    for host in found:
        host.close()


def prepared(
    network: Network, hosts: list[Host], value: Value, count: int, where: Path, runtime: str
) -> list[Host]:
    """`count` hosts with everything installed and nothing started."""
    authority = Authority()
    image = where / "image"
    for number in range(1, count + 1):
        me = member(number)
        host = Host(network, me, where / runtime, runtime)
        hosts.append(host)
        host.prepare(plan(value, me, f"oci:{image}"), authority.credentials(me))
    return hosts


@pytest.mark.network
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_nodes_reach_the_master_and_survive_its_absence(
    network: Network, hosts: list[Host], image: Path, tmp_path: Path, runtime: str
) -> None:
    (tmp_path / "image").symlink_to(image)
    master, one, two = prepared(network, hosts, decided(member(1)), 3, tmp_path, runtime)
    for node in (one, two):  # a node that comes back before its master
        node.start()
        node.wait_ready()
    code, answer = one.ask()
    assert code != 0 and "503" in answer, "healthy without a master"
    master.start()
    master.wait_ready()
    for host in hosts:
        host.wait_healthy()

    assert one.etcdctl("put", "greeting", "hello") == "OK"
    assert two.etcdctl("get", "greeting", "--print-value-only") == "hello"
    assert master.etcdctl("get", "greeting", "--print-value-only") == "hello"
    for host in hosts:
        assert_confined(host)
    assert_strangers_are_refused(master)

    master.stop("KILL")
    assert one.ask()[0] != 0
    master.start()
    master.wait_ready()
    one.wait_healthy()
    assert one.etcdctl("get", "greeting", "--print-value-only") == "hello"


@pytest.mark.network
def test_three_masters_form_one_store_that_survives_one_loss(
    network: Network, hosts: list[Host], image: Path, tmp_path: Path
) -> None:
    (tmp_path / "image").symlink_to(image)
    value = decided(*(member(n) for n in (1, 2, 3)))
    *masters, node = prepared(network, hosts, value, 4, tmp_path, "runc")
    for host in hosts:
        host.start()
    for host in hosts:
        host.wait_ready()
        host.wait_healthy()
    assert len(masters[0].etcdctl("member", "list").splitlines()) == 3
    assert node.etcdctl("put", "k", "before") == "OK"
    masters[0].stop("KILL")
    node.wait_healthy()
    assert node.etcdctl("get", "k", "--print-value-only") == "before"
    assert masters[2].etcdctl("put", "k", "after") == "OK"
    assert node.etcdctl("get", "k", "--print-value-only") == "after"


def assert_confined(host: Host) -> None:
    """No capabilities, no new ones, and nothing writable but the store's own directory."""
    state = json.loads(host.call("state", host.name))
    process = Path("/proc", str(state["pid"]))
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"].strip() == "1"
    mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    options = {fields[4]: fields[5].split(",") for fields in mounts}
    assert "ro" in options["/"]
    assert "ro" in options["/etc/etcd"]
    assert "rw" in options["/var/lib/etcd"]


def assert_strangers_are_refused(master: Host) -> None:
    whole = master.probe
    master.probe = Probe(whole.url, authority=whole.authority)
    code, answer = master.ask()
    master.probe = whole
    assert code != 0
    assert "certificate required" in answer.lower() or "bad certificate" in answer.lower(), answer
