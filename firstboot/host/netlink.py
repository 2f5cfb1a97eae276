"""The kernel's tables of interfaces, addresses and routes, read over rtnetlink(7).

Unlike /sys this shows the network namespace the process is in, and unlike the ioctls of
netdevice(7) it knows IPv6 and tells when something changes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from firstboot.host.durable import StorageFailed

RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
# RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE (linux/rtnetlink.h)
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_TYPE_MASK = 0x3FFF  # the two high bits of an attribute's type are flags (linux/netlink.h)
_BUFFER = 256 * 1024
_SECONDS = 5.0  # the kernel answers at once; a limit all the same
_TRIES = 5


class NetlinkFailed(StorageFailed):
    """The kernel did not show its network tables."""


def dump(kind: int) -> list[tuple[int, bytes]]:
    """All rows of the table that `kind` (RTM_GET…) names, as (message type, payload)."""
    try:
        for _ in range(_TRIES):
            rows, interrupted = _dump_once(kind)
            if not interrupted:
                break
        return rows  # after so many changes in a row, whatever there is: an event will follow
    except OSError as error:
        raise NetlinkFailed(f"cannot read the network's state: {error.strerror}") from None


def _dump_once(kind: int) -> tuple[list[tuple[int, bytes]], bool]:
    rows: list[tuple[int, bytes]] = []
    interrupted = False
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(_SECONDS)
        body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)  # struct ifinfomsg: the longest
        length = _HEADER.size + len(body)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        sock.send(_HEADER.pack(length, kind, flags, 1, 0) + body)
        while True:
            for type_, seen_flags, payload in _messages(sock.recv(_BUFFER)):
                interrupted |= bool(seen_flags & _NLM_F_DUMP_INTR)
                if type_ == _NLMSG_DONE:
                    return rows, interrupted
                if type_ == _NLMSG_ERROR:
                    code = -int(struct.unpack_from("=i", payload)[0])
                    raise OSError(code, "the kernel refused")
                rows.append((type_, payload))


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, type_, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield type_, flags, data[at + _HEADER.size : at + length]
        at += _aligned(length)


def attributes(payload: bytes, offset: int) -> dict[int, bytes]:
    """The attributes that follow the fixed part, `offset` bytes long, of a row's payload."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(payload):
        length, type_ = _ATTRIBUTE.unpack_from(payload, offset)
        if length < _ATTRIBUTE.size:
            break
        found[type_ & _TYPE_MASK] = payload[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def open_events() -> socket.socket:
    """A non-blocking socket that becomes readable when a link, address or route changes."""
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
    except OSError as error:
        raise NetlinkFailed(f"cannot watch the network's state: {error.strerror}") from None
    try:
        sock.bind((0, _GROUPS))
    except OSError as error:
        sock.close()
        raise NetlinkFailed(f"cannot watch the network's state: {error.strerror}") from None
    return sock


def drain(sock: socket.socket) -> None:
    """Take what has come; only that something came matters, so an overflow is no loss."""
    while True:
        try:
            sock.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: events were dropped, yet the socket was woken
            continue
