"""Hosts on a switch of their own: network namespaces, each with a static address on eth0.

The switch is a bridge in a namespace of its own; the real host's network is never touched, and
two runs never meet. Hosts are numbered from 1. Faults happen at the switch: a host notices
nothing but silence. The same layer carries plain processes (``network`` tests) and whole machines.

The switch is the hosts' router as well, with the address 1 in every subnet: what a network offers
(names, leases, metadata) runs there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.network.run import Run

_SUBNET, _BEHIND = "10.77.0", "10.77.1"
_SUBNET6 = "fd77:"
METADATA = "169.254.169.254"  # where clouds have their metadata service


class Network:
    """`hosts` namespaces on one bridge; leaving the context closes the `run` they belong to.

    `ip` is ``4``, ``6``, ``46`` for both, or ``local`` for nothing but IPv6 link-local addresses,
    which the kernel makes. `prefix` is the length of IPv4's.
    """

    def __init__(
        self, hosts: int, run: Run | None = None, *, ip: str = "4", prefix: int = 24
    ) -> None:
        self.hosts = range(1, hosts + 1)
        self.ip, self.prefix = ip, prefix
        self.owner = run or Run()
        self.switch = f"{self.owner.prefix}-switch"
        self._unplugged: set[int] = set()
        self._slowed: set[int] = set()
        try:
            self._create()
        except BaseException:
            self.owner.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.owner.close()

    def namespace(self, host: int) -> Path:
        """The file that stands for a host's network namespace, as setns(2) takes it."""
        return Path("/run/netns") / f"{self.owner.prefix}-{host}"

    @property
    def gateway(self) -> str:
        """The switch's address, every host's default route."""
        return f"{_SUBNET}.1" if "4" in self.ip else f"{_SUBNET6}:1"

    @staticmethod
    def address(host: int) -> str:
        """A host's IPv4 address."""
        return f"{_SUBNET}.{10 + host}"

    @staticmethod
    def address6(host: int) -> str:
        """A host's IPv6 address."""
        return f"{_SUBNET6}:{10 + host:x}"

    def chosen(self, host: int) -> str:
        """The address firstboot should choose there."""
        if self.ip == "local":
            return f"fe80::ff:fe00:{10 + host:x}"  # of its MAC address: RFC 4291, appendix A
        return self.address6(host) if self.ip == "6" else self.address(host)

    # -- processes on a host --

    def command(self, host: int, *argv: str | Path) -> list[str]:
        """`argv` as a command that runs in a host's network (ip-netns would remount /sys)."""
        return ["nsenter", f"--net={self.namespace(host)}", "--", *map(str, argv)]

    def run(self, host: int, *argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; CalledProcessError if it fails."""
        options = {"check": True, "timeout": 60, **options}
        return call(self.command(host, *argv), **options)

    def popen(self, host: int, *argv: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host; it is killed with the network if it still runs then."""
        process = subprocess.Popen(self.command(host, *argv), text=True, **options)
        self.owner.callback(_end, process)
        return process

    def serve(self, *argv: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a server at the switch, where every host reaches it at `gateway`."""
        command = ["nsenter", f"--net=/run/netns/{self.switch}", "--", *map(str, argv)]
        process = subprocess.Popen(command, text=True, **options)
        self.owner.callback(_end, process)
        return process

    def behind_a_router(self, host: int) -> str:
        """Move a host to a subnet of its own, which the switch routes to; its address there."""
        self._switch(f"link set port{host} nomaster", f"addr add {_BEHIND}.1/24 dev port{host}")
        address = f"{_BEHIND}.{10 + host}"
        namespace = self.namespace(host).name
        _ip(["addr flush dev eth0", f"addr add {address}/24 dev eth0"], namespace)
        _ip([f"route replace default via {_BEHIND}.1"], namespace)
        enter = ["nsenter", f"--net=/run/netns/{self.switch}", "--"]
        call([*enter, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"], check=True)
        return address

    def reaches(self, one: int, other: int) -> bool:
        """Whether a ping of one host by the other comes back within a second."""
        ping = self.run(one, "ping", "-c1", "-W1", self.address(other), check=False)
        return ping.returncode == 0

    def at_switch(self, *argv: str | Path) -> list[str]:
        """`argv` as a command that runs in the switch's network: the router, the cloud itself."""
        return ["nsenter", f"--net=/run/netns/{self.switch}", "--", *map(str, argv)]

    def serve_metadata(self) -> None:
        """Give the switch, every host's default route, the address of a metadata service."""
        self._switch(f"addr replace {METADATA}/32 dev bridge")

    # -- faults --

    def unplug(self, host: int) -> None:
        """Take a host's cable out at the switch's end."""
        self._switch(f"link set port{host} nomaster")
        self._unplugged.add(host)

    def plug(self, host: int) -> None:
        """Put the cable back."""
        self._switch(f"link set port{host} master bridge")
        self._unplugged.discard(host)

    def partition(self, *groups: Collection[int]) -> None:
        """Let only hosts of the same group talk. Hosts in no group are one more group."""
        rest = set(self.hosts).difference(*groups)
        sides = [set(group) for group in groups if group] + ([rest] if rest else [])
        self._rules(
            "partition",
            [
                f"iifname {_ports(one)} oifname {_ports(other)} drop"
                for one in sides
                for other in sides
                if one is not other
            ],
        )

    def loss(self, percent: int) -> None:
        """Lose 0 to 99 percent of all frames, at random."""
        self._rules("loss", [f"numgen random mod 100 < {percent} drop"] if percent else [])

    def no_multicast(self) -> None:
        """Carry no multicast, as clouds do; ARP and IPv6 neighbour discovery still work."""
        discovery = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }"
        self._rules(
            "multicast",
            ["ip daddr 224.0.0.0/4 drop", f"{discovery} accept", "ip6 daddr ff00::/8 drop"],
        )

    def cut(self, *pairs: tuple[int, int]) -> None:
        """Carry nothing from the first host of each pair to its second; the way back works."""
        rules = [f"iifname {_ports([a])} oifname {_ports([b])} drop" for a, b in pairs]
        self._rules("cut", rules)

    def end(self, kind: str) -> None:
        """End one kind of fault: ``partition``, ``loss``, ``multicast`` or ``cut``."""
        self._rules(kind, [])

    def slow(self, host: int, kbit: int) -> None:
        """Let a host receive no more than that per second: frames wait up to 0.4 s, or are lost.

        The queue is what delays, as on a busy link (tc-tbf(8)). 0 ends it.
        """
        device = ["tc", "-n", self.switch, "qdisc"]
        limits = ["tbf", "rate", f"{kbit}kbit", "burst", "1600", "latency", "400ms"]
        if kbit:
            call([*device, "replace", "dev", f"port{host}", "root", *limits], check=True)
            self._slowed.add(host)
        elif host in self._slowed:
            call([*device, "del", "dev", f"port{host}", "root"], check=True)
            self._slowed.discard(host)

    def take_address(self, host: int, address: str) -> None:
        """Take an address from a host, and its default route with it."""
        lines = [f"addr del {self._prefixed(address)} dev eth0"]
        if ":" in address:  # of IPv6 the kernel would keep it
            lines.append(f"route del default via {_SUBNET6}:1")
        _ip(lines, self.namespace(host).name)

    def give_address(self, host: int, address: str) -> None:
        """Give a host an address and a default route."""
        router = f"{_SUBNET6}:1" if ":" in address else self.gateway
        at = self._prefixed(address)
        lines = [f"addr add {at} dev eth0", f"route replace default via {router}"]
        _ip(lines, self.namespace(host).name)

    def heal(self) -> None:
        """End every fault of the switch."""
        self._nft("flush ruleset\n")
        for host in sorted(self._unplugged):
            self.plug(host)
        for host in sorted(self._slowed):
            self.slow(host, 0)

    # -- the switch --

    def _create(self) -> None:
        names = [self.switch, *(self.namespace(host).name for host in self.hosts)]
        _ip([f"netns add {name}" for name in names])
        self._switch(
            "link set lo up",
            # No spanning tree and no forward delay: a port carries frames at once.
            "link add bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            *([f"addr add {self._prefixed(self.gateway)} dev bridge"] if "4" in self.ip else []),
            *([f"addr add {_SUBNET6}:1/64 dev bridge nodad"] if "6" in self.ip else []),
            "link set bridge up",
        )
        for host in self.hosts:
            self._attach(host)

    def _attach(self, host: int) -> None:
        namespace = self.namespace(host).name
        self._switch(
            f"link add port{host} type veth peer name eth0 address 02:00:00:00:00:{10 + host:02x}"
            f" netns {namespace}",
            f"link set port{host} master bridge up",
        )
        addresses = [self.address(host)] if "4" in self.ip else []
        addresses += [self.address6(host)] if "6" in self.ip else []
        _ip(["link set lo up", "link set eth0 up"], namespace)
        for address in addresses:
            self.give_address(host, address)

    def _prefixed(self, address: str) -> str:
        return f"{address}/{64 if ':' in address else self.prefix}"

    def _switch(self, *lines: str) -> None:
        _ip(lines, self.switch)

    def _rules(self, table: str, rules: Sequence[str]) -> None:
        """Replace one table of drop rules in the bridge's forward path, as one transaction."""
        chain = "\n".join(["type filter hook forward priority 0; policy accept;", *rules])
        self._nft(
            f"table bridge {table}\ndelete table bridge {table}\n"
            f"table bridge {table} {{\nchain forward {{\n{chain}\n}}\n}}\n"
        )

    def _nft(self, text: str) -> None:
        call(["ip", "netns", "exec", self.switch, "nft", "-f", "-"], check=True, input=text)


def _ports(hosts: Collection[int]) -> str:
    return "{ " + ", ".join(f'"port{host}"' for host in sorted(hosts)) + " }"


def _ip(lines: Sequence[str], namespace: str = "") -> None:
    where = ["-n", namespace] if namespace else []
    call(["ip", *where, "-batch", "-"], check=True, input="\n".join(lines) + "\n")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def call(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with text captured; a failure's note tells what the program said."""
    try:
        return subprocess.run(argv, text=True, capture_output=True, **options)
    except subprocess.CalledProcessError as error:
        error.add_note(f"{error.stdout}{error.stderr}".strip())
        raise
