"""One simulated host: a disk, and a process while it is up.

The disk does one thing after another, as `service` has it: of the states that wait for it only
the newest is written, and what was not written when the power fails is gone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from firstboot.protocol import events
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.events import Action, Event
from firstboot.protocol.model import Channel, Endpoint, Issued, Self, Stored

if TYPE_CHECKING:
    from tests.sim.world import World

NO_SPACE = "no space left on device"


def digest(*parts: object) -> str:
    """A SHA-256 in hex: random-looking, and the same for the same parts."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


@dataclass
class Disk:
    """What survives a crash."""

    stored: Stored = field(default_factory=Stored)
    issued: dict[tuple[int, str], tuple[Issued, bytes]] = field(default_factory=dict)
    authorities: dict[int, str] = field(default_factory=dict)
    certificates: str = ""  # the fingerprint of the CA they chain to
    key: str = ""
    lost: bool = False  # the state file was torn: this host votes no more


class Host:
    """One simulated machine."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.endpoint = Endpoint(f"10.0.{index // 200}.{index % 200 + 10}", 7443)
        self.identity = 0
        self.boots = 0
        self.born = 0.0  # when it is first switched on
        self.absent = False  # never switched on
        self.disk = Disk()
        self.core: Assembly | None = None
        self.started = 0.0  # when the process that runs now was
        self.shut = False  # the bootstrap channel answers no more
        self.gone = False  # left after its work was done
        self.paused_until = 0.0
        self.refuses_until = 0.0
        self.identity_of: Host | None = None  # the host this disk was copied from
        self.channels: dict[tuple[str, Channel], tuple[int, Host]] = {}
        self.alarm = float("inf")
        self._deeds: deque[Callable[[], None]] = deque()
        self._persisting = False
        self._persist_next: events.Persist | None = None

    @property
    def node_id(self) -> str:
        """Derived from the identity key; a wiped disk has another."""
        index = self.identity_of.index if self.identity_of is not None else self.index
        return digest("id", self.world.seed, index, self.identity)[:32]

    def boot(self) -> None:
        """Start the process from what is on disk."""
        if self.core is not None or self.gone or self.absent or self.world.now < self.born:
            return
        self.boots += 1
        self.started, self.shut = self.world.now, self.disk.stored.closed
        self.channels, self.alarm = {}, float("inf")
        self._deeds.clear()
        self._persisting, self._persist_next = False, None
        if self.boots > 1:
            self.world.perhaps_move(self)
        me = Self(
            node_id=self.node_id,
            boot=f"{self.index}-{self.boots}",
            name="host",  # all alike, as images are
            endpoint=self.endpoint,
            voter=not self.disk.lost,
        )
        issued = [entry for entry, _ in self.disk.issued.values()]
        self.world.witness.booted(self)
        self.core = self.world.make_core(me, self.disk.stored, issued)
        self.feed(events.DeadlineReached())

    def crash(self) -> None:
        """Power cut: the process and everything not synced are gone."""
        if self.core is None:
            return
        self.core = None
        self.world.count("crash")
        for node_id, channel in list(self.channels):
            self.world.cut(self, node_id, channel, notice=self.world.rng.choice((0.01, 15.0)))
        self.channels = {}

    def wipe(self) -> None:
        """The disk is re-created: a new identity without memory."""
        if not self.boots:
            return
        self.world.count("wipe")
        self.crash()
        self.disk, self.gone, self.identity_of = Disk(), False, None
        self.identity = self.boots  # never used before
        self.world.by_id[self.node_id] = self

    def lose_state(self) -> None:
        """The state file is torn: the identity and the CA files are still there."""
        if not self.boots or self.gone:
            return
        self.world.count("lost state")
        self.crash()
        self.disk.stored, self.disk.lost = Stored(), True

    def copy_disk_of(self, other: Host) -> None:
        """Start from a copy of that host's disk, identity and all."""
        self.world.count("clone")
        self.disk, self.identity_of, self.identity = deepcopy(other.disk), other, other.identity
        self.world.copied.add(self.node_id)
        self.born, self.absent = self.world.now, False
        self.boot()

    def later(self, delay: float, event: Event) -> None:
        """Deliver an event to this incarnation only: a crash loses what was under way."""
        boot = self.boots
        self.world.after(delay, lambda: self.feed(event) if self.boots == boot else None)

    def feed(self, event: Event) -> None:
        """Give the core an event, carry out its actions, arm its alarm."""
        world = self.world
        if self.core is None:
            return
        if world.now < self.paused_until:
            self.later(self.paused_until - world.now + 1e-6, event)
            return
        core, this = self.core, self.core.round
        world.events += 1
        if world.trace is not None:
            world.trace(f"{world.now:10.4f} {self.index} {event}")
        actions = core.receive(event, world.now)
        world.witness.look(self, event, this)
        for action in actions:
            if world.trace is not None:
                world.trace(f"{'':10} {self.index}   -> {action}")
            if world.crash_now():
                self.crash()
            if self.core is not core:
                return
            self.carry_out(action)
        self.arm()

    def arm(self) -> None:
        """Set the alarm to the core's deadline."""
        if self.core is None:
            return
        deadline = self.core.deadline
        if deadline == self.alarm:
            return
        self.alarm = deadline
        if deadline < float("inf"):
            boot = self.boots
            self.world.at(deadline, lambda: self.ring(boot, deadline))

    def ring(self, boot: int, alarm: float) -> None:
        """The alarm rings, unless it was set anew since."""
        if self.boots == boot and self.alarm == alarm:
            self.alarm = float("inf")
            self.feed(events.DeadlineReached())

    # ------------------------------------------------------------ actions

    def carry_out(self, action: Action) -> None:
        """What the adapters do on a real host."""
        world = self.world
        match action:
            case events.Send():
                world.send(self, action)
            case events.Persist():
                self._persist(action)
            case events.Connect():
                world.connect(self, action)
            case events.Announce():
                world.announce(self)
            case events.Disconnect():
                for channel in Channel:
                    if (action.node_id, channel) in self.channels:
                        world.cut(self, action.node_id, channel, notice=0.01)
            case events.MakeAuthority():
                self._on_disk(lambda: self._authority(action.epoch))
            case events.DropAuthority():
                self._on_disk(lambda: self._drop_authority(action.epoch))
            case events.MakeRequest():
                self._on_disk(self._request)
            case events.Sign():
                self._on_disk(lambda: self._sign(action))
            case events.StoreCertificates():
                self._on_disk(lambda: self._store_certificates(action))
            case events.RunStep():
                self._run_step(action)
            case events.Finish():
                world.witness.left(self)
                self.gone = True
                self.crash()
            case events.Close():
                self.shut = True
                for node_id, channel in list(self.channels):
                    if channel is Channel.BOOTSTRAP:
                        world.cut(self, node_id, channel, notice=0.01)

    def _run_step(self, action: events.RunStep) -> None:
        self.world.witness.unit_started(self)
        if self.world.chance("step failed", self.world.faults.step_failures):
            self.later(0.1, events.StepFailed(action.index, "Could not start it: it failed"))
        else:
            self.later(0.1, events.StepDone(action.index))

    # ------------------------------------------------------------ the disk

    def _on_disk(self, deed: Callable[[], None]) -> None:
        """One after another, each as long as an fsync takes."""
        self._deeds.append(deed)
        if len(self._deeds) == 1:
            self._next_deed()

    def _next_deed(self) -> None:
        boot = self.boots

        def done() -> None:
            if self.boots != boot or self.core is None:
                return
            deed = self._deeds[0]
            deed()
            if self.boots == boot and self._deeds:
                self._deeds.popleft()
                if self._deeds:
                    self._next_deed()

        self.world.after(self.world.fsync(), done)

    def _fails(self) -> bool:
        return self.world.chance("disk error", self.world.faults.disk_errors)

    def _persist(self, action: events.Persist) -> None:
        if self._persisting:
            self._persist_next = action
            return
        self._persisting = True
        self._on_disk(lambda: self._write(action))

    def _write(self, action: events.Persist) -> None:
        waiting, self._persist_next, self._persisting = self._persist_next, None, False
        if waiting is not None:
            self._persist(waiting)
        if self._fails():
            self.feed(events.PersistFailed(action.sequence, NO_SPACE))
            return
        self.world.witness.persisted(self, self.disk.stored, action.state)
        self.disk.stored = action.state
        self.feed(events.PersistDone(action.sequence))

    def _request(self) -> None:
        if self._fails():
            self.feed(events.PersistFailed(0, NO_SPACE))
            return
        self.disk.key = self.disk.key or digest("key", self.node_id, self.world.rng.random())
        self.feed(events.RequestMade(b"csr", self.disk.key))

    def _authority(self, epoch: int) -> None:
        if self._fails():
            self.feed(events.PersistFailed(0, NO_SPACE))
            return
        if epoch not in self.disk.authorities:
            fingerprint = digest("ca", self.node_id, epoch, self.world.rng.random())
            self.disk.authorities[epoch] = fingerprint
            self.world.witness.authority_made(self, epoch)
        self.feed(events.AuthorityMade(epoch, self.disk.authorities[epoch]))

    def _drop_authority(self, epoch: int) -> None:
        if self._fails():
            self.feed(events.PersistFailed(0, NO_SPACE))
            return
        for old in [e for e in self.disk.authorities if e <= epoch]:
            del self.disk.authorities[old]
        for where in [w for w in self.disk.issued if w[0] <= epoch]:
            del self.disk.issued[where]

    def _sign(self, action: events.Sign) -> None:
        node_id, epoch = action.member.node_id, action.epoch
        fingerprint = self.disk.authorities.get(epoch)
        if fingerprint is None or self._fails():
            self.feed(events.SignFailed(node_id, epoch, "no CA of that epoch, or no space"))
            return
        if self.world.chance("sign failed", self.world.faults.sign_failures):
            self.feed(events.SignFailed(node_id, epoch, "the request is for another key"))
            return
        known = self.disk.issued.get((epoch, node_id))
        if known is None or known[0].key != action.key:
            entry = Issued(action.member, epoch, action.key)
            self.disk.issued[epoch, node_id] = (entry, fingerprint.encode())
        entry, authority = self.disk.issued[epoch, node_id]
        self.world.witness.signed(self, entry)
        self.feed(events.Signed(entry.member, entry.epoch, entry.key, (), authority))

    def _store_certificates(self, action: events.StoreCertificates) -> None:
        if action.authority.decode() != action.fingerprint:
            reason = "the CA is not the decided one"
            self.feed(events.CertificatesRejected(action.epoch, reason))
            return
        if self._fails() or self.world.chance("rejected", self.world.faults.rejections):
            self.feed(events.CertificatesRejected(action.epoch, NO_SPACE))
            return
        self.disk.certificates = action.fingerprint
        self.feed(events.CertificatesStored(action.epoch))
