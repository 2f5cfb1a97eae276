"""Hosts of an Origin cluster whose cores talk and whose carriers write, each below its own root.

Everything is real but the network between them and what a step does outside its root: units,
containers, gates and the kernel's parameters are noted only.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from firstboot import host, pki
from firstboot.carrier import Carrier
from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.pki import signers
from firstboot.protocol import events, plan
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.messages import decode, encode
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Role,
    Self,
    Stored,
    Value,
)
from firstboot.protocol.situation import Start
from firstboot.supply import Keys

OUTSIDE = plan.StartUnit | plan.InstallContainer | plan.Probe | plan.CreateObject
OUTSIDE |= plan.ReachTarget | plan.SetKernel


class Recycled(Keys):
    """Keys of one cluster, which the next cluster of this process gets again: they take seconds."""

    made: ClassVar[dict[int, list[Future[bytes]]]] = {}
    makers: ClassVar[ThreadPoolExecutor] = ThreadPoolExecutor(4, "recycled")

    def __init__(self) -> None:
        super().__init__()
        self._given: Counter[int] = Counter()

    def _begin(self, size: int) -> Future[bytes]:
        stock, number = self.made.setdefault(size, []), self._given[size]
        self._given[size] += 1
        if number == len(stock):
            stock.append(self.makers.submit(signers.make_rsa, size))
        return stock[number]


class Transport:
    """No channel of its own: `Cluster` delivers."""

    def set_channel(self, *_: object) -> None:
        pass


@dataclass
class Host:
    """One host: its core, its carrier, and what its plan did outside its root."""

    root: Path
    member: Member
    core: Assembly
    carrier: Carrier
    did: list[plan.Step] = field(default_factory=list)
    failures: list[events.StepFailed] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()


class Cluster:
    """An ACTIVE cluster whose hosts were enrolled and have done nothing else yet."""

    def __init__(
        self,
        top: Path,
        masters: int = 1,
        nodes: int = 1,
        options: Mapping[str, str] | None = None,
        network: str = "10.77.0",
    ) -> None:
        self.now = 100.0
        self.options = {**OPTIONS["origin"], **(options or {})}
        self.keys = Recycled()
        self.wire: deque[tuple[str, str, Any]] = deque()
        count = masters + nodes
        roots = [top / f"host-{n}" for n in range(1, count + 1)]
        directories = [host.StateDirectory(root) for root in roots]
        keys = [pki.make_key() for _ in roots]
        members = [
            Member(pki.node_id(key), f"host-{n}", f"{network}.{10 + n}")
            for n, key in enumerate(keys, 1)
        ]
        self.config = ClusterConfig("demo", count, masters=masters, payload="origin")
        founder = self._carrier(roots[0], directories[0], members[0], Stored())
        made = founder.on_disk(events.MakeAuthority(1))
        assert isinstance(made, events.AuthorityMade)
        self.value = Value(1, made.fingerprint, tuple(members[:masters]), True, count)
        self.hosts = [
            self._enrolled(founder, *found, made.fingerprint)
            for found in zip(roots, directories, members, keys, strict=True)
        ]
        issued = directories[0].issued(1)
        self.hosts[0].core = self._core(members[0], self._stored(members[0]), issued)
        self.hosts[0].carrier.core = self.hosts[0].core
        self.by_id = {h.member.node_id: h for h in self.hosts}

    def _stored(self, member: Member) -> Stored:
        return Stored(
            decided=self.value,
            activated=True,
            enrolled=member,
            enrolled_fingerprint=self.value.fingerprint,
        )

    def _core(self, member: Member, stored: Stored, issued: tuple[Issued, ...] = ()) -> Assembly:
        return Assembly(
            Start(
                config=self.config,
                me=Self(member.node_id, "boot", member.name, Endpoint(member.host, 7443)),
                stored=stored,
                issued=issued,
                payload=PAYLOADS["origin"],
                options=self.options,
                rng=random.Random(1),
                now=self.now,
            )
        )

    def _carrier(
        self, root: Path, directory: host.StateDirectory, member: Member, stored: Stored
    ) -> Carrier:
        core = self._core(member, stored)
        carrier = Carrier(root, directory, Transport(), core)  # type: ignore[arg-type]
        carrier.supply._keys = self.keys
        return carrier

    def _enrolled(
        self,
        founder: Carrier,
        root: Path,
        directory: host.StateDirectory,
        member: Member,
        key: bytes,
        fingerprint: str,
    ) -> Host:
        """What enrolment leaves on a host's disk, made by the real deeds of both sides."""
        directory.put("host.key", key)
        carrier = self._carrier(root, directory, member, self._stored(member))
        request = carrier.on_disk(events.MakeRequest())
        assert isinstance(request, events.RequestMade)
        role = self.value.role_of(member.node_id)
        profiles = PAYLOADS["origin"].for_role(role).profiles
        sign = events.Sign(member, 1, request.csr, request.key, profiles)
        signed = founder.on_disk(sign)
        assert isinstance(signed, events.Signed), signed
        stored = events.StoreCertificates(
            1, fingerprint, member, signed.certificates, signed.authority
        )
        assert isinstance(carrier.on_disk(stored), events.CertificatesStored)
        return Host(root, member, carrier.core, carrier)

    # ------------------------------------------------------------ running

    def connect(self) -> None:
        """Everybody has the cluster channel to the founding master."""
        first = self.hosts[0].member
        for other in self.hosts[1:]:
            cluster = Channel.CLUSTER
            self.tell(other, events.Connected(first.node_id, cluster, None, first.host))
            there = events.Connected(other.member.node_id, cluster, None, other.member.host)
            self.tell(self.hosts[0], there)

    def tell(self, one: Host, event: events.Event) -> None:
        for action in one.core.receive(event, self.now):
            self.wire.append((one.member.node_id, "act", action))

    def run(self, seconds: float = 60.0) -> None:
        """Until nothing happens any more, or that much time has passed."""
        end = self.now + seconds
        for one in self.hosts:
            self.tell(one, events.DeadlineReached())
        while self.now < end:
            while self.wire:
                node_id, _, action = self.wire.popleft()
                self._carry_out(self.by_id[node_id], action)
            if all(h.core.running for h in self.hosts):
                return
            self.now += 0.5
            for one in self.hosts:
                self.tell(one, events.DeadlineReached())

    def _carry_out(self, one: Host, action: events.Action) -> None:
        match action:
            case events.Send():
                self._deliver(one, action)
            case events.Persist():
                self.tell(one, events.PersistDone(action.sequence))
            case events.RunStep():
                self._step(one, action)
            case events.SignRequests() | events.StoreSupplies():
                self._answer(one, one.carrier.on_supply(action))

    def _deliver(self, one: Host, action: events.Send) -> None:
        other = self.by_id[action.node_id]
        one.sent.append(type(action.message).__name__)
        message = decode(encode(action.message))
        if action.channel is Channel.CLUSTER:
            got = events.MessageReceived(one.member.node_id, action.channel, message)
            self.tell(other, got)

    def _step(self, one: Host, action: events.RunStep) -> None:
        if isinstance(action.step, OUTSIDE):
            one.did.append(action.step)
            self.tell(one, events.StepDone(action.index))
        else:
            self._answer(one, one.carrier.run_step(action))

    def _answer(self, one: Host, event: events.Event) -> None:
        if isinstance(event, events.StepFailed):
            one.failures.append(event)
        self.tell(one, event)


def role(one: Host) -> Role:
    found = one.core.role
    assert found is not None
    return found
