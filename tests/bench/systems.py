"""What is measured: firstboot, and what people would use instead. One formation each.

serf     Debian's, finding its peers by mDNS: membership, with no master, no certificate
etcd     three members that are told one another's names and addresses: a leader
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from firstboot.protocol import history
from firstboot.userdata import make_token
from tests.machines.document import document
from tests.network.hosts import PROJECT
from tests.network.rig import Network, call

LIMIT = 20.0  # seconds; what has not formed by then counts as that long, and is named
FETCHED = PROJECT / "build/bench/usr/bin"
# What `make install` puts into /usr/bin/firstboot, with this tree as the installed one.
LAUNCHER = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from firstboot.cli import program;"
LAUNCHER += " program()"
_CLONE_NEWNET = 0x40000000  # linux/sched.h


class NotFormedError(Exception):
    """A formation that failed; the text says what the programs printed."""


@dataclass
class Formation:
    """One formation: seconds from the start to each mark, and what it cost all hosts together."""

    marks: dict[str, float]
    cpu: list[float] = field(default_factory=list)  # seconds, a host
    peak: list[int] = field(default_factory=list)  # bytes, a host
    sent: int = 0  # bytes, all hosts


class System(Protocol):
    """A system that hosts can form with."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What happens on the way, in order; the last one is the end."""

    def missing(self) -> str:
        """Why it cannot be measured here, or nothing."""

    def form(self, network: Network, directory: Path) -> Formation:
        """Let all hosts of that network form once; their files go to that empty directory."""


class Programs:
    """One program on each host, started at one moment; leaving the context kills them."""

    def __init__(self, network: Network, argvs: list[list[str]]) -> None:
        self._selector = selectors.DefaultSelector()
        self.output = [""] * len(argvs)
        self.ended: dict[int, dict[str, Any]] = {}
        wanted, ends = [], []
        for i, argv in enumerate(argvs):
            mine, theirs = os.pipe()
            self._selector.register(mine, selectors.EVENT_READ, i)
            ends.append(theirs)
            wanted.append({"argv": network.command(i + 1, *argv), "out": theirs})
        starter = Path(__file__).with_name("starter.py")
        self._starter = subprocess.Popen(
            [sys.executable, "-I", "-S", str(starter)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=ends,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends its programs
        )
        for end in ends:
            os.close(end)
        assert self._starter.stdin is not None and self._starter.stdout is not None
        self._starter.stdin.write(json.dumps(wanted) + "\n")
        self._starter.stdin.flush()
        self.started: float = json.loads(self._starter.stdout.readline())["started"]

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def lines(self) -> Iterator[tuple[int, str, float]]:
        """Each whole line any of them prints: host index, text, seconds since the start.

        Ends when all have closed their output; NotFormedError after `LIMIT` seconds.
        """
        while self._selector.get_map():
            left = self.started + LIMIT - time.monotonic()
            ready = self._selector.select(left) if left > 0 else []
            if not ready:
                raise NotFormedError(f"not within {LIMIT:g} s\n{self.said()}")
            for key, _ in ready:
                data, at = os.read(key.fd, 65536).decode(errors="replace"), time.monotonic()
                if not data:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                whole = self.output[key.data] + data
                done = self.output[key.data].rfind("\n") + 1
                self.output[key.data] = whole
                for line in whole[done : whole.rfind("\n") + 1].splitlines():
                    yield key.data, line, at - self.started

    def said(self) -> str:
        """The end of what each of them printed."""
        return "\n".join(f"-- host {i + 1}\n{text[-1500:]}" for i, text in enumerate(self.output))

    def finish(self) -> list[dict[str, Any]]:
        """Kill what runs; what each program used up, in the order of the hosts."""
        assert self._starter.stdin is not None and self._starter.stdout is not None
        if not self._starter.stdin.closed:
            self._starter.stdin.close()
            for line in self._starter.stdout:
                used = json.loads(line)
                self.ended[used["index"]] = used
            self._starter.stdout.close()
            self._starter.wait()
            for key in list(self._selector.get_map().values()):
                os.close(key.fd)
            self._selector.close()
        return [self.ended[i] for i in sorted(self.ended)]


def _measured(
    network: Network, programs: Programs, marks: dict[str, float], before: int
) -> Formation:
    used = programs.finish()
    return Formation(
        marks,
        cpu=[u["cpu"] for u in used],
        peak=[u["peak"] for u in used],
        sent=sent_bytes(network) - before,
    )


def sent_bytes(network: Network) -> int:
    """Bytes that all hosts ever put on the wire, as the switch's ports have counted them."""
    shown = call(["ip", "-n", network.switch, "-s", "-j", "link"], check=True).stdout
    ports = (link for link in json.loads(shown) if link["ifname"].startswith("port"))
    return sum(int(port["stats64"]["rx"]["bytes"]) for port in ports)


class Firstboot:
    """`firstboot run` with payload ``none``, until every process has ended by itself."""

    name = "firstboot"
    marks = ("listening", "decided", "certificates")

    def missing(self) -> str:
        """It is here."""
        return ""

    def form(self, network: Network, directory: Path) -> Formation:
        """One formation over mDNS. As on a host, /run is in memory."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            return self._form(network, directory, Path(memory))

    def _form(self, network: Network, directory: Path, memory: Path) -> Formation:
        # All must agree in the grace period in any case; the master stays for only that long.
        election = "{strict: true, grace: 100ms}"
        text = document(len(network.hosts), make_token(), payload="none", election=election)
        roots = [directory / f"h{n}" for n in network.hosts]
        for number, root in zip(network.hosts, roots, strict=True):
            (root / "etc/firstboot").mkdir(parents=True)
            (root / "run").symlink_to(memory / f"h{number}")
            (memory / f"h{number}").mkdir()
            (root / "etc/machine-id").write_text(f"{number:032x}\n")
            config = root / "etc/firstboot/config.yaml"
            config.write_text(text)
            config.chmod(0o600)
        before = sent_bytes(network)
        launch = [sys.executable, "-I", "-c", LAUNCHER, "run", "--root"]
        with Programs(network, [[*launch, str(root)] for root in roots]) as programs:
            for _ in programs.lines():
                pass
            used = programs.finish()
            if any(u["status"] for u in used):
                raise NotFormedError(f"a process failed\n{programs.said()}")
            marks = merged([_marks(root) for root in roots], programs.started)
            _one_cluster(roots)
            return _measured(network, programs, marks, before)


def _marks(root: Path) -> dict[str, float]:
    """When what began on one host, on the monotonic clock that all namespaces share."""
    opening = next(history.read([_first_line(root / "var/lib/firstboot/history.jsonl")]))
    assert isinstance(opening, history.Opening)
    timeline = {
        mark["what"]: mark["at"] - opening.wall_offset for mark in _status(root)["timeline"]
    }
    # A host that learns of the decision and of ACTIVE at once shows the later stage only.
    stages = ("signing", "enrolling", "starting", "running")
    return {
        "listening": timeline["listening"],
        "decided": min(timeline[stage] for stage in stages if stage in timeline),
        "certificates": timeline["certificates"],
        "running": timeline["running"],
    }


def _first_line(path: Path) -> str:
    with path.open() as file:
        return file.readline()


def _status(root: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads((root / "run/firstboot/status.json").read_text())
    return shown


def _one_cluster(roots: list[Path]) -> None:
    shown = [_status(root) for root in roots]
    clusters = {s["cluster_id"] for s in shown}
    if len(clusters) != 1 or None in clusters or sum(s["role"] == "master" for s in shown) != 1:
        raise NotFormedError(f"not one cluster with one master: {clusters}")


def merged(hosts: list[dict[str, float]], started: float) -> dict[str, float]:
    """The latest host's moment of each mark, in seconds since the start."""
    return {mark: max(host[mark] for host in hosts) - started for mark in hosts[0]}


class Serf:
    """`serf agent -discover`, until every agent has told of every member."""

    name = "serf"
    marks = ("listening", "members")

    def missing(self) -> str:
        """Whether there is a serf."""
        return "" if program("serf") else "no serf program on PATH, nor under build/bench"

    def form(self, network: Network, directory: Path) -> Formation:
        """One membership over mDNS."""
        del directory  # it keeps nothing
        before = sent_bytes(network)
        argvs = [
            [
                program("serf"),
                "agent",
                f"-node=h{n}",
                f"-bind={network.address(n)}",
                "-iface=eth0",
                "-discover=bench",
            ]
            for n in network.hosts
        ]
        with Programs(network, argvs) as programs:
            seen = SerfLog(len(argvs))
            for host, line, at in programs.lines():
                if seen.take(host, line, at):
                    break
            return _measured(network, programs, seen.marks, before)


class SerfLog:
    """Reads agents' logs until each has told of `count` members."""

    def __init__(self, count: int) -> None:
        self._members: list[set[str]] = [set() for _ in range(count)]
        self.marks: dict[str, float] = {}

    def take(self, host: int, line: str, at: float) -> bool:
        """Whether all members are known to all with this line."""
        if "agent: Serf agent starting" in line:
            self.marks["listening"] = at  # the last one counts
        if "serf: EventMemberJoin: " in line:
            self._members[host].add(line.split("EventMemberJoin: ")[1].split()[0])
            self.marks["members"] = at
        return all(len(members) == len(self._members) for members in self._members)


class Etcd:
    """Three members of a static list, without TLS, until each calls itself healthy."""

    name = "etcd"
    marks = ("log made", "leader known", "healthy")

    def missing(self) -> str:
        """Whether there is an etcd."""
        return "" if program("etcd") else "no etcd program on PATH, nor under build/bench"

    def form(self, network: Network, directory: Path) -> Formation:
        """One cluster of all hosts of the network."""
        before = sent_bytes(network)
        argvs = [_etcd(network, n, directory) for n in network.hosts]
        with Programs(network, argvs) as programs:
            seen = EtcdLog(len(argvs))
            for host, line, at in programs.lines():
                if seen.take(host, line, at):
                    break
            healthy = [_healthy(network, n, programs.started) for n in network.hosts]
            seen.marks["healthy"] = max(healthy)
            return _measured(network, programs, seen.marks, before)


def _etcd(network: Network, number: int, directory: Path) -> list[str]:
    client, peer = (f"http://{network.address(number)}:{port}" for port in (2379, 2380))
    everyone = ",".join(f"h{n}=http://{network.address(n)}:2380" for n in network.hosts)
    return [
        program("etcd"),
        f"--name=h{number}",
        f"--data-dir={directory}/h{number}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={everyone}",
        "--initial-cluster-state=new",
        "--logger=zap",
        "--log-outputs=stderr",
    ]


class EtcdLog:
    """Reads members' logs until each of `count` serves clients; it does so once it has a leader."""

    def __init__(self, count: int) -> None:
        self._serving = [False] * count
        self.marks: dict[str, float] = {}

    def take(self, host: int, line: str, at: float) -> bool:
        """Whether all serve with this line."""
        if '"starting local member"' in line:
            self.marks["log made"] = at
        if "elected leader" in line:
            self.marks["leader known"] = at
        if '"published local member to cluster through raft"' in line:
            self._serving[host] = True
        return all(self._serving)


def _healthy(network: Network, number: int, started: float) -> float:
    """Seconds since the start at which that member answers that it is healthy; it nearly is."""
    found: list[float] = []
    thread = threading.Thread(target=partial(_ask, network, number, started, found))
    thread.start()
    thread.join()
    if not found:
        raise NotFormedError(f"member {number} is not healthy within {LIMIT:g} s")
    return found[0]


def _ask(network: Network, number: int, started: float, found: list[float]) -> None:
    with _inside(network.namespace(number)):
        while time.monotonic() < started + LIMIT:
            try:
                with closing(http.client.HTTPConnection(network.address(number), 2379, 1)) as web:
                    web.request("GET", "/health")
                    answer = web.getresponse().read()
            except OSError:
                answer = b""
            if b'"true"' in answer:
                found.append(time.monotonic() - started)
                return
            time.sleep(0.002)


@contextmanager
def _inside(namespace: Path) -> Iterator[None]:
    """In that network namespace, for the calling thread only, which must end after it."""
    library = ctypes.CDLL(None, use_errno=True)
    with namespace.open("rb") as file:
        if library.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    yield


def program(name: str) -> str:
    """The path of a program, on PATH or where `tests/bench/peers` put it; "" if there is none."""
    return shutil.which(name) or shutil.which(name, path=str(FETCHED)) or ""
