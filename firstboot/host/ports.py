"""Who listens on a TCP port of this host."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from firstboot.host.machine import read_fact

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp, see proc_net_tcp in the kernel's documentation
MAX_LINES = 65536


def taken(address: str, port: int) -> str:
    """Which program keeps others from listening there; empty if none does.

    Without the rights to look, or should it have gone since, it is called another program.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            return _owner(port) if error.errno == errno.EADDRINUSE else ""
    return ""


def _owner(port: int) -> str:
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and sockets & set(_held(process)):
            name = read_fact(process / "comm")
            return f"{name} (process {process.name})" if name else "another program"
    return "another program"


def _held(process: Path) -> Iterator[str]:
    """What the descriptors of a process refer to; those that are closed meanwhile are left out."""
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(descriptor.readlink())


def _inodes(port: int) -> set[str]:
    """The inodes of the sockets that listen on that port, whatever their address."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:MAX_LINES]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == _LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                found.add(words[9])
    return found
