"""Which of the host's addresses its peers shall use, and waiting until there is one."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct

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
    if link.loopback and not (interface or cidr):
        return False  # a routed service address may live on lo, but only if someone says so
    if interface and address.interface != interface:
        return False
    return not cidr or address.ip in ipaddress.ip_network(cidr, strict=False)


async def wait_for_address(interface: str = "", cidr: str = "", known: str = "") -> Address:
    """Return the chosen address as soon as there is one; no polling.

    With `known`, the address in use: return once that one is gone and another is chosen. A
    link-local one is only chosen in place of another such, and left as soon as there is better.
    Raises UserError as `choose` does, unless an address is known already.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    with open_events() as events:  # before the first look, so that no change is missed

        def woken() -> None:
            drain(events)
            changed.set()

        loop.add_reader(events, woken)
        try:
            while True:
                changed.clear()
                found = _choose_other(survey(), interface, cidr, known)
                if found is not None:
                    return found
                await changed.wait()
        finally:
            loop.remove_reader(events)


def _choose_other(network: Network, interface: str, cidr: str, known: str) -> Address | None:
    """What `choose` says, if it is a reason to leave `known`: a link-local address rarely is."""
    passing = bool(known) and Address(known, "").ip.is_link_local
    here = [a for a in network.addresses if a.host == known]
    still = any(_usable(a, network, interface, cidr) for a in here)
    if still and not passing:
        return None  # a better one is no reason to move
    try:
        found = choose(network, interface, cidr)
    except UserError:
        if known:
            return None
        raise
    if known and found is not None and found.ip.is_link_local and (still or not passing):
        return None  # all there is between two leases of DHCP
    return found


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
