"""Which of the host's addresses its peers shall use, and waiting until there is one."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from firstboot.host.netlink import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    attributes,
    drain,
    dump,
    open_events,
)
from firstboot.protocol.errors import UserError
from firstboot.protocol.record import dataclass

_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8  # netdevice(7)
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_OPERSTATE = 1, 3, 16  # linux/if_link.h
_OPERSTATES_DEAD = (1, 2, 3)  # not present, down, lower layer down (RFC 2863, ifOperStatus)
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8  # linux/if_addr.h
_IFA_F_TEMPORARY, _IFA_F_DADFAILED, _IFA_F_DEPRECATED, _IFA_F_TENTATIVE = 0x1, 0x8, 0x20, 0x40
_RTA_OIF, _RTA_PRIORITY, _RTA_MULTIPATH = 4, 6, 9  # linux/rtnetlink.h
_RT_TABLE_MAIN, _RTN_UNICAST = 254, 1
KINDS = {"0.0.0.0/0": "IPv4", "::/0": "IPv6"}
LINK_LOCAL_AFTER = 5.0  # seconds without a better address before a link-local one is used


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface; ``mac`` is ``52:54:00:…`` or empty, ``up`` includes its carrier."""

    name: str
    mac: str = ""
    up: bool = True
    loopback: bool = False


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address of this host; an IPv6 link-local one names its zone (``fe80::1%eth0``).

    ``fleeting`` addresses (temporary or deprecated, RFC 4862 and RFC 8981) are a last choice
    within their kind. ``prefix`` is the length of its subnet's prefix, None if unknown.
    """

    host: str
    interface: str
    fleeting: bool = False
    prefix: int | None = None

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address without its zone."""
        return ipaddress.ip_address(self.host.partition("%")[0])

    @property
    def subnet(self) -> str:
        """The network it is in, such as ``10.0.0.0/24``; empty if unknown."""
        if self.prefix is None:
            return ""
        return str(ipaddress.ip_network((self.ip, self.prefix), strict=False))


@dataclass(frozen=True, slots=True)
class Network:
    """What the kernel knows; ``default`` names the default routes' interfaces, best first."""

    interfaces: tuple[Interface, ...] = ()
    addresses: tuple[Address, ...] = ()
    default: tuple[str, ...] = ()


def survey() -> Network:
    """The interfaces, usable addresses and default routes of this network namespace."""
    links = dict(filter(None, map(_link, dump(RTM_GETLINK))))
    addresses = filter(None, (_address(row, links) for row in dump(RTM_GETADDR)))
    routes = (route for row in dump(RTM_GETROUTE) for route in _default_routes(row))
    ordered = [links[index].name for _, _, index in sorted(routes) if index in links]
    return Network(tuple(links.values()), tuple(addresses), tuple(dict.fromkeys(ordered)))


def choose(network: Network, interface: str = "", cidr: str = "") -> Address | None:
    """The address for peers to use, None if there is none yet.

    Those on `interface` and within `cidr` if given; of them one on the default route's
    interface, else on the only interface there is. IPv4 before IPv6; link-local (RFC 3927,
    RFC 4291) only if nothing else; loopback never. UserError if that leaves a choice of several
    interfaces: a wrong guess could split the cluster between two networks.
    """
    usable = [a for a in network.addresses if _usable(a, network, interface, cidr)]
    for local in (False, True):
        kind = [a for a in usable if a.ip.is_link_local is local]
        names = list(dict.fromkeys(a.interface for a in kind))
        routed = [name for name in network.default if name in names]
        if not routed and len(names) > 1:
            seen = ", ".join(f"{a.host} on {a.interface}" for a in kind[:8])
            raise UserError(
                f"this host has several addresses and no default route: {seen}",
                hint="set network.interface or network.cidr",
            )
        on_best = [a for a in kind if a.interface == (routed or names)[0]]
        if on_best:
            return min(on_best, key=lambda a: (a.fleeting, a.ip.version))
    return None


def _usable(address: Address, network: Network, interface: str, cidr: str) -> bool:
    link = next((i for i in network.interfaces if i.name == address.interface), None)
    if address.ip.is_loopback or address.ip.is_unspecified or link is None or not link.up:
        return False
    if link.loopback and not (interface or (cidr and cidr not in KINDS)):
        return False  # a routed service address may live on lo, but only if someone says so
    if interface and address.interface != interface:
        return False
    return not cidr or address.ip in ipaddress.ip_network(cidr, strict=False)


def lacking(network: Network, interface: str = "", cidr: str = "") -> tuple[str, str]:
    """What this host waits for while `choose` finds nothing: a sentence and a hint."""
    kind = f"an {KINDS[cidr]}" if cidr in KINDS else "a network"
    where = (f" on {interface}" if interface else "") + (
        f" within {cidr}" if cidr and cidr not in KINDS else ""
    )
    hint = "Check the cable, DHCP or network configuration of this host."
    try:
        choose(network, interface, cidr)
    except UserError as error:
        if not all(a.ip.is_link_local for a in network.addresses if not a.ip.is_loopback):
            text = f"{error.message[:1].upper()}{error.message[1:]}."
            return text, f"{error.hint[:1].upper()}{error.hint[1:]}, or wait for a default route."
    links = {i.name: i for i in network.interfaces}
    if interface and interface not in links:
        others = ", ".join(sorted(i.name for i in links.values() if not i.loopback)[:8])
        sentence = f"Waiting for the network interface {interface}: there is none of that name."
        hint = f"This host has {others or 'no interface'}. Check network.interface, or what makes "
        return sentence, f"{hint}it (a bond, a VLAN)."
    if interface and not links[interface].up:
        return f"Waiting for the network interface {interface}: it is down.", hint
    here = [a for a in network.addresses if _usable(a, network, interface, "")]
    if here:
        seen = ", ".join(f"{a.host} on {a.interface}" for a in here[:4])
        hint = f"This host has {seen}. " + (hint if cidr in ("", *KINDS) else "Check network.cidr.")
    return f"Waiting for {kind} address{where}.", hint


def is_stopgap(address: Address, cidr: str = "") -> bool:
    """Whether that address is link-local though nobody asked for such a one."""
    asked = bool(cidr) and ipaddress.ip_network(cidr, strict=False).is_link_local
    return address.ip.is_link_local and not asked


def _settled() -> bool:
    """Nothing but a lost address is a reason to move."""
    return True


def _silent(sentence: str, hint: str) -> None:
    """Nobody is told what is waited for."""


async def wait_for_address(
    interface: str = "",
    cidr: str = "",
    known: str = "",
    *,
    settled: Callable[[], bool] = _settled,
    say: Callable[[str, str], None] = _silent,
) -> Address:
    """Return the chosen address as soon as there is one; no polling.

    Meanwhile `say` is told what is waited for: a sentence and a hint. A link-local address is
    there before DHCP or a router has answered, so it is taken only `LINK_LOCAL_AFTER` it was seen.

    With `known`, the address in use: return once that one is gone and another is chosen. A
    link-local one is only chosen in place of another such, and left as soon as there is better.
    While not `settled`, reasons to return are also a better one, as the other hosts will choose
    it, and that its interface was made anew: multicast groups were joined on the old one.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    first, told, due = 0, ("", ""), 0.0
    with open_events() as events:  # before the first look, so that no change is missed

        def woken() -> None:
            drain(events)
            changed.set()

        loop.add_reader(events, woken)
        try:
            while True:
                changed.clear()
                network = survey()
                found = _choose_other(network, interface, cidr, known, settled=settled())
                here = _in_use(network, interface, cidr, known)
                first = first or _index(here)
                if found is None and _index(here) not in (0, first) and not settled():
                    found = here
                if found is not None and not known and is_stopgap(found, cidr):
                    due = due or loop.time() + LINK_LOCAL_AFTER
                    found = found if loop.time() >= due else None
                if found is not None:
                    return found
                if told != (told := lacking(network, interface, cidr)) and not known:
                    say(*told)
                with suppress(TimeoutError):
                    left = max(0.0, due - loop.time()) if due else None
                    await asyncio.wait_for(changed.wait(), left)
        finally:
            loop.remove_reader(events)


def _choose_other(
    network: Network, interface: str, cidr: str, known: str, *, settled: bool = True
) -> Address | None:
    """What `choose` says, if it is a reason to leave `known`: a link-local address rarely is."""
    try:
        found = choose(network, interface, cidr)
    except UserError:
        return None
    if not known or found is None:
        return found
    here = _in_use(network, interface, cidr, known)
    passing = Address(known, "").ip.is_link_local
    if found.ip.is_link_local and (here or not passing):
        return None  # all there is between two leases of DHCP
    if here is None or passing:
        return found
    # Hosts with the same networks must end on the same one, whichever came up first on each.
    better = not settled and _rank(found, network) < _rank(here, network)
    return found if better else None


def _in_use(network: Network, interface: str, cidr: str, known: str) -> Address | None:
    here = (a for a in network.addresses if a.host == known)
    return next((a for a in here if _usable(a, network, interface, cidr)), None)


def _rank(address: Address, network: Network) -> tuple[int, int]:
    """How well that address suits, the best first, in the order of `choose`."""
    routed = {name: i for i, name in enumerate(network.default)}
    return routed.get(address.interface, len(routed)), address.ip.version


def _index(address: Address | None) -> int:
    """The number of that address's interface; 0 if it has gone. One made anew has another."""
    try:
        return socket.if_nametoindex(address.interface) if address else 0
    except OSError:
        return 0


# ---------------------------------------------------------------- rows of the kernel's tables


def _link(row: tuple[int, bytes]) -> tuple[int, Interface] | None:
    kind, payload = row
    if kind != RTM_NEWLINK:
        return None
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", payload)  # struct ifinfomsg
    found = attributes(payload, 16)
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
    mac = found.get(_IFLA_ADDRESS, b"")
    dead = found.get(_IFLA_OPERSTATE, b"\0")[0] in _OPERSTATES_DEAD
    text = mac.hex(":") if len(mac) == 6 and any(mac) else ""
    return index, Interface(name, text, bool(flags & _IFF_UP) and not dead, _is_loopback(flags))


def _is_loopback(flags: int) -> bool:
    return bool(flags & _IFF_LOOPBACK)


def _address(row: tuple[int, bytes], links: dict[int, Interface]) -> Address | None:
    kind, payload = row
    if kind != RTM_NEWADDR:
        return None
    family, prefix, low_flags, _, index = struct.unpack_from("=BBBBI", payload)  # struct ifaddrmsg
    found = attributes(payload, 8)
    # On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is always ours.
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if index not in links or raw is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    flags = struct.unpack("=I", found[_IFA_FLAGS])[0] if _IFA_FLAGS in found else low_flags
    if flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED):
        return None  # not ours yet: binding to it would fail
    text, name = socket.inet_ntop(family, raw), links[index].name
    if family == socket.AF_INET6 and ipaddress.IPv6Address(raw).is_link_local:
        text = f"{text}%{name}"
    # IPv4 uses the bit of "temporary" for "secondary": just as good an address.
    temporary = family == socket.AF_INET6 and flags & _IFA_F_TEMPORARY
    return Address(text, name, bool(temporary or flags & _IFA_F_DEPRECATED), prefix)


def _default_routes(row: tuple[int, bytes]) -> list[tuple[int, int, int]]:
    """Default routes as (address family, metric, interface index); IPv4's number is lower."""
    kind, payload = row
    if kind != RTM_NEWROUTE:
        return []
    family, bits, _, _, table, _, _, type_ = struct.unpack_from("=8B", payload)  # struct rtmsg
    known = family in (socket.AF_INET, socket.AF_INET6)
    if not known or bits or table != _RT_TABLE_MAIN or type_ != _RTN_UNICAST:
        return []
    found = attributes(payload, 12)
    metric = struct.unpack("=I", found[_RTA_PRIORITY])[0] if _RTA_PRIORITY in found else 0
    if _RTA_OIF in found:
        indexes = [struct.unpack("=i", found[_RTA_OIF])[0]]
    else:
        indexes = _next_hops(found.get(_RTA_MULTIPATH, b""))
    return [(family, metric, index) for index in indexes]


def _next_hops(raw: bytes) -> list[int]:
    """The interface indexes in a multipath route's list of struct rtnexthop."""
    indexes, at = [], 0
    while at + 8 <= len(raw):
        length, _, _, index = struct.unpack_from("=HBBi", raw, at)
        indexes.append(index)
        at += max((length + 3) & ~3, 8)
    return indexes
