"""Certificates a payload has of its own, as rows: its signers, and what each role gets from them.

They are made after the cluster is ACTIVE, by the founding master, for members only. Texts may
hold ``${variables}`` as those of a plan do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import replace

from firstboot.protocol.model import Profile
from firstboot.protocol.record import dataclass


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate authority with an RSA key of `bits`, valid for `days`.

    Its subject is `common_name`, ``@`` and the Unix time it was made. `own_serial` is the serial
    number of its own certificate, 0 for a random one; the certificates it signs follow it.
    `serial_file` keeps the number where other programs go on from it: the last one used, or with
    `openssl` the next one, as openssl-ca(1) keeps it; `index_file` is that program's database.
    With `openssl` certificates look as that program makes them, else as Origin makes them (see
    `Leaf.hosts`). `shared`: every master gets its key.
    """

    name: str
    common_name: str
    bits: int = 2048
    days: int = 1825
    path_length: int | None = None
    own_serial: int = 1
    serial_file: str = ""
    index_file: str = ""
    openssl: bool = False
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate from `signer` for a key of this host's own, or for one all masters share.

    The subject has `organizations` and `common_name`; without one, the least of `hosts` in the
    order of bytes, as Origin does. `hosts` are names and IP addresses; empty ones and doubles
    are left out. Origin lists them in order, and every IP address as a DNS name as well.
    ``NAME.crt`` holds with `chain` the signer's certificate too; ``NAME.key`` is the key. The row
    counts if `when` fills in to ``true``.
    """

    name: str
    signer: str
    use: Profile
    common_name: str = ""
    organizations: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    days: int = 730
    chain: bool = False
    shared: bool = False
    when: str = "true"

    @property
    def subject(self) -> str:
        """The common name."""
        return self.common_name or min(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts, each once, without empty ones."""
        return tuple(dict.fromkeys(host for host in self.hosts if host))

    def filled(self, text: Callable[[str], str]) -> Leaf:
        """This row with its texts filled in."""
        return replace(
            self,
            common_name=text(self.common_name),
            organizations=tuple(o for o in map(text, self.organizations) if o),
            hosts=tuple(map(text, self.hosts)),
            when=text(self.when),
        )


def is_address(host: str) -> bool:
    """Whether a host is given by its IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
