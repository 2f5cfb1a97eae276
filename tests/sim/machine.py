"""One simulated host: a disk, and a process while it is up.

The disk does one thing after another, as `service` has it: of the states that wait for it only
the newest is written, and what was not written when the power fails is gone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from firstboot.protocol import events
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.events import Action, Event
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Self,
    Stored,
    Value,
)
from tests.sim.invariants import UNAUTHENTICATED

if TYPE_CHECKING:
    from tests.sim.world import World

NO_SPACE = "no space left on device"
INFINITY = float("inf")
DEADLINE = events.DeadlineReached()


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

    def copy(self) -> Disk:
        """Another disk with the same on it."""
        return replace(self, issued=dict(self.issued), authorities=dict(self.authorities))


class Host:
    """One simulated machine."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.endpoint = Endpoint(f"10.0.{index // 200}.{index % 200 + 10}", 7443)
        self.config: ClusterConfig | None = None  # its own document, if that differs
        self.boots = 0
        self.born = 0.0  # when it is first switched on
        self.absent = False  # never switched on
        self.disk = Disk()
        self.core: Assembly | None = None
        self.started = 0.0  # when the process that runs now was
        self.gone = False  # left after its work was done
        self.shut = False  # carried out Close since it started
        self.paused_until = 0.0
        self.refuses_until = 0.0
        self.loops_until = 0.0  # a reboot loop
        self.disk_fails_until = 0.0
        self.channels: dict[tuple[str, Channel], tuple[int, Host]] = {}
        self.known: Value | None = None  # what `decided` was when the witness last looked
        self.alarm = INFINITY
        self._found: events.PeerFound | None = None
        self._held: list[Event] = []  # what came during a pause
        self._deeds: deque[Callable[[], None]] = deque()
        self._persisting = False
        self._persist_next: events.Persist | None = None
        self.take_identity(index, 0)

    def take_identity(self, index: int, number: int) -> None:
        """The identity key: a re-created disk has another, a copied disk its original's."""
        self.identity = index, number
        self.node_id = digest("id", self.world.seed, index, number)[:32]

    @property
    def document(self) -> ClusterConfig:
        """The configuration it boots with."""
        return self.config or self.world.config

    def found(self) -> events.PeerFound:
        """What multicast tells of it."""
        if self._found is None or self._found.endpoint is not self.endpoint:
            self._found = events.PeerFound(self.endpoint, "mdns")
        return self._found

    def boot(self) -> None:
        """Start the process from what is on disk."""
        world = self.world
        if self.core is not None or self.gone or self.absent or world.now < self.born:
            return
        self.boots += 1
        self.started = world.now
        self.channels, self.alarm = {}, -INFINITY  # its first look is due
        self._deeds.clear()
        self._held.clear()
        self._persisting, self._persist_next = False, None
        self.shut, self.known = self.disk.stored.closed, None
        if self.boots > 1:
            world.perhaps_move(self)
        me = Self(
            node_id=self.node_id,
            boot=f"{self.index}-{self.boots}",
            name="host",  # all alike, as images are
            endpoint=self.endpoint,
            voter=not self.disk.lost,
        )
        issued = [entry for entry, _ in self.disk.issued.values()]
        world.witness.booted(self)
        self.core = world.make_core(me, self.disk.stored, issued, self.document)
        self.feed(DEADLINE)
        if world.now < self.loops_until and self.up():
            boots = self.boots
            world.after(
                world.rng.random() * 2.0, lambda: self.crash() if boots == self.boots else None
            )

    @property
    def busy(self) -> bool:
        """Whether its disk still has something to do."""
        return bool(self._deeds)

    def up(self) -> bool:
        """Whether its process runs."""
        return self.core is not None

    def crash(self) -> None:
        """Power cut: the process and everything not synced are gone."""
        if self.core is not None:
            self.world.count("crash")
            self._stop()
            self.restart()

    def _stop(self) -> None:
        self.core = None
        world = self.world
        for node_id, channel in list(self.channels):
            world.cut(self, node_id, channel, notice=world.rng.choice((0.01, 15.0)))
        self.channels = {}

    def restart(self) -> None:
        """systemd, or the power, brings back what died, after a while."""
        if self.world.restarts:
            self.world.after(0.5 + self.world.rng.random() * 2.5, self.boot)

    def wipe(self) -> None:
        """The disk is re-created: a new identity without memory."""
        if not self.boots:
            return
        self.world.count("wipe")
        self.crash()
        self.disk, self.gone = Disk(), False
        self.take_identity(self.index, self.boots)  # never used before
        self.world.by_id[self.node_id] = self
        self.restart()

    def lose_state(self) -> None:
        """The state file is torn: the identity and the CA files are still there."""
        if not self.boots or self.gone:
            return
        self.world.count("lost state")
        self.crash()
        self.disk.stored, self.disk.lost = Stored(), True

    def roll_back(self, older: Disk) -> None:
        """The disk is set back to a snapshot: everything written since is gone."""
        if not self.boots or self.gone or older.lost != self.disk.lost:
            return
        self.world.count("rollback")
        self.crash()
        self.world.witness.rolled_back(self, older)
        self.disk = older.copy()

    def copy_disk_of(self, other: Host) -> None:
        """Start from a copy of that host's disk: with its identity, if it has one already."""
        self.disk = other.disk.copy()
        if other.boots:
            self.world.count("clone")
            self.take_identity(*other.identity)
            self.world.copied.add(self.node_id)
        else:
            self.world.count("clone without identity")
        self.born, self.absent = self.world.now, False
        self.boot()

    def later(self, delay: float, event: Event) -> None:
        """Deliver an event to this incarnation only: a crash loses what was under way."""
        self.world.at(self.world.now + delay, self.feed_if, self.boots, event)

    def feed_if(self, boot: int, event: Event) -> None:
        """Feed the event unless the host was switched off since."""
        if self.boots == boot:
            self.feed(event)

    def feed(self, event: Event) -> None:
        """Give the core an event, carry out its actions, arm its alarm."""
        world, core = self.world, self.core
        if core is None:
            return
        now = world.now
        if now < self.paused_until or self._held:
            self._held.append(event)
            if len(self._held) == 1:
                world.at(self.paused_until, self.wake, self.boots)
            return
        world.events += 1
        if world.trace is not None:
            world.trace(f"{now:10.4f} {self.index} {event}")
        this, before = core.round, None
        if type(event) in UNAUTHENTICATED and self.alarm > now:
            before = core.stored, this, len(core.voters)
        actions = core.receive(event, now)
        if before is not None:
            world.witness.stood(core, before, actions)
        world.witness.look(self, core, event, this)
        for gap, action in enumerate(actions):
            if world.trace is not None:
                world.trace(f"{'':10} {self.index}   -> {action}")
            if world.crash_now(self, actions, gap):
                self.crash()
            if self.core is not core:
                return
            self.carry_out(action)
        if actions and world.crash_now(self, actions, len(actions)):
            self.crash()
        if self.core is not core:
            return
        deadline = core.deadline
        if deadline != self.alarm:
            self.alarm = deadline
            if deadline < INFINITY:
                world.at(deadline, self.ring, self.boots, deadline)

    def wake(self, boot: int) -> None:
        """After a pause: everything that came meanwhile, in order."""
        if self.boots != boot:
            return
        if self.world.now < self.paused_until:
            self.world.at(self.paused_until, self.wake, boot)
            return
        held, self._held = self._held, []
        for event in held:
            self.feed_if(boot, event)

    def ring(self, boot: int, alarm: float) -> None:
        """The alarm rings, unless it was set anew since."""
        if self.boots == boot and self.alarm == alarm:
            self.alarm = -INFINITY  # it is due, even should it have to wait for a pause
            self.feed(DEADLINE)

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
                self._on_disk(lambda: self._drop_authority(action))
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
                self._stop()
            case events.Close():
                self.shut = True
                for node_id, channel in list(self.channels):
                    if channel is Channel.BOOTSTRAP:
                        world.cut(self, node_id, channel, notice=0.01)

    def _run_step(self, action: events.RunStep) -> None:
        self.world.witness.unit_started(self, action.step)
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
        if self.world.now < self.disk_fails_until:
            self.world.count("write refused")
            return True
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
        old, self.disk.stored = self.disk.stored, action.state
        self.world.witness.persisted(self, old, action.state)
        if self.world.crash_now(self, [action], 1):
            self.crash()
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

    def _drop_authority(self, action: events.DropAuthority) -> None:
        if self._fails():
            self.feed(events.PersistFailed(0, NO_SPACE))
            return
        for old in [e for e in self.disk.authorities if e <= action.epoch and e != action.kept]:
            self.world.witness.dropped(self, old)
            del self.disk.authorities[old]
        for where in [w for w in self.disk.issued if w[0] <= action.epoch and w[0] != action.kept]:
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
