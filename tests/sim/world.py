"""A second `service.py`: the real core under a virtual clock, network and disk, from one seed.

The network is nastier than TCP on purpose: every message has its own delay, may be lost,
doubled or overtaken. The disk keeps only what was synced. Invariants are checked as things
happen (`tests/sim/invariants.py`), so that a violation stops at the event that made it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.events import Action, Event
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Profile,
    Self,
    Stage,
    Stored,
)
from firstboot.protocol.plan import Payload, RolePlan, StartUnit
from firstboot.protocol.situation import Start
from tests.sim.invariants import Witness

PAYLOAD = Payload(
    "sim",
    master=RolePlan((Profile.PEER,), (StartUnit("master.service"),)),
    node=RolePlan((Profile.CLIENT,), (StartUnit("node.service"),)),
)
DEAD_AFTER = 15.0  # TCP notices a silent peer (TCP_USER_TIMEOUT)


def digest(*parts: object) -> str:
    """A SHA-256 in hex: random-looking, and the same for the same parts."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


@dataclass
class Faults:
    """How hostile one run is; every number is drawn from the seed."""

    skew: float = 0.0  # seconds between the first and the last boot
    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.002  # mean one-way delay, seconds
    multicast_loss: float = 0.0
    multicast_dead_until: float = 0.0
    crash_boundary: float = 0.0  # probability of a crash just before or after an action
    crashes: int = 0  # at random moments
    partitions: int = 0
    disk_errors: float = 0.0
    wipes: int = 0
    pauses: int = 0
    until: float = 60.0  # when all of it ends

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        """Swarm style: each kind of fault is on in about half of the runs, at its own strength."""

        def some(top: float) -> float:
            return rng.random() * top if rng.random() < 0.5 else 0.0

        return cls(
            skew=some(20.0),
            loss=some(0.4),
            duplicate=some(0.3),
            delay=rng.choice((0.0005, 0.002, 0.02, 0.2)),
            multicast_loss=some(0.9),
            multicast_dead_until=some(25.0),
            crash_boundary=some(0.03),
            crashes=int(some(6)),
            partitions=int(some(5)),
            disk_errors=some(0.2),
            pauses=int(some(3)),
        )


@dataclass
class Disk:
    """What survives a crash."""

    stored: Stored = field(default_factory=Stored)
    issued: dict[tuple[int, str], tuple[Issued, bytes]] = field(default_factory=dict)
    authorities: dict[int, str] = field(default_factory=dict)
    certificates: str = ""  # the fingerprint of the CA they chain to
    key: str = ""


class Host:
    """One simulated machine: a disk, and a process while it is up."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.endpoint = Endpoint(f"10.0.{index // 200}.{index % 200 + 10}", 7443)
        self.identity = 0
        self.boots = 0
        self.disk = Disk()
        self.core: Assembly | None = None
        self.gone = False  # left after its work was done
        self.paused_until = 0.0
        self.identity_of: Host | None = None  # the host this disk was copied from
        self.disk_busy_until = 0.0
        self.channels: dict[tuple[str, Channel], tuple[int, Host]] = {}
        self.alarm = float("inf")

    @property
    def node_id(self) -> str:
        """Derived from the identity key; a wiped disk has another."""
        of = self.identity_of or self
        return digest("id", self.world.seed, of.index, of.identity)[:32]

    def boot(self) -> None:
        """Start the process from what is on disk."""
        if self.core is not None or self.gone:
            return
        self.boots += 1
        self.channels = {}
        me = Self(
            node_id=self.node_id,
            boot=f"{self.index}-{self.boots}",
            name="host",  # all alike, as images are
            endpoint=self.endpoint,
        )
        issued = [entry for entry, _ in self.disk.issued.values()]
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
        self.crash()
        self.disk = Disk()
        self.identity += 1
        self.world.by_id[self.node_id] = self
        self.world.witness.voters.add(self.node_id)

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
        core = self.core
        world.events += 1
        if world.trace is not None:
            world.trace(f"{world.now:10.4f} {self.index} {event}")
        for action in core.receive(event, world.now):
            if world.trace is not None:
                world.trace(f"{'':10} {self.index}   -> {action}")
            if world.crash_now():
                self.crash()
            if self.core is not core:
                return
            self.carry_out(action)
        world.witness.look(self)
        self.arm()

    def arm(self) -> None:
        """Set the alarm to the core's deadline."""
        if self.core is None or self.core.deadline == self.alarm:
            return
        self.alarm = self.core.deadline
        if self.alarm < float("inf"):
            boot, alarm = self.boots, self.alarm
            self.world.at(alarm, lambda: self.ring(boot, alarm))

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
                boot = self.boots
                world.after(world.fsync(), lambda: self._authority(boot, action.epoch))
            case events.DropAuthority():
                for epoch in [e for e in self.disk.authorities if e <= action.epoch]:
                    del self.disk.authorities[epoch]
                for where in [w for w in self.disk.issued if w[0] <= action.epoch]:
                    del self.disk.issued[where]
            case events.MakeRequest():
                self.disk.key = self.disk.key or digest("key", self.node_id)
                self.later(world.fsync(), events.RequestMade(b"csr", self.disk.key))
            case events.Sign():
                boot = self.boots
                world.after(world.fsync(), lambda: self._sign(boot, action))
            case events.StoreCertificates():
                boot = self.boots
                world.after(world.fsync(), lambda: self._store_certificates(boot, action))
            case events.RunStep():
                world.witness.unit_started(self)
                self.later(0.1, events.StepDone(action.index))
            case events.Finish():
                self.gone = True
                self.crash()
            case events.Close():
                for node_id, channel in list(self.channels):
                    if channel is Channel.BOOTSTRAP:
                        world.cut(self, node_id, channel, notice=0.01)

    def _persist(self, action: events.Persist) -> None:
        boot, world = self.boots, self.world

        def done() -> None:
            if self.boots != boot or self.core is None:
                return
            if world.hostile and world.rng.random() < world.faults.disk_errors:
                world.count("disk error")
                self.feed(events.PersistFailed(action.sequence, "no space left on device"))
                return
            world.witness.persisted(self, self.disk.stored, action.state)
            self.disk.stored = action.state
            self.feed(events.PersistDone(action.sequence))

        # One writer per host: what was asked first reaches the disk first.
        self.disk_busy_until = max(self.disk_busy_until, world.now) + world.fsync()
        world.at(self.disk_busy_until, done)

    def _authority(self, boot: int, epoch: int) -> None:
        if self.boots != boot or self.core is None:
            return
        if epoch not in self.disk.authorities:
            fingerprint = digest("ca", self.node_id, epoch, self.world.rng.random())
            self.disk.authorities[epoch] = fingerprint
        self.feed(events.AuthorityMade(epoch, self.disk.authorities[epoch]))

    def _sign(self, boot: int, action: events.Sign) -> None:
        if self.boots != boot or self.core is None:
            return
        fingerprint = self.disk.authorities.get(action.epoch)
        if fingerprint is None:
            reason = "no CA of that epoch"
            self.feed(events.SignFailed(action.member.node_id, action.epoch, reason))
            return
        where = (action.epoch, action.member.node_id)
        if where not in self.disk.issued:
            entry = Issued(action.member, action.epoch, action.key)
            self.disk.issued[where] = (entry, fingerprint.encode())
        entry, authority = self.disk.issued[where]
        self.world.witness.signed(self, entry)
        self.feed(events.Signed(entry.member, entry.epoch, entry.key, (), authority))

    def _store_certificates(self, boot: int, action: events.StoreCertificates) -> None:
        if self.boots != boot or self.core is None:
            return
        if action.authority.decode() != action.fingerprint:
            reason = "the CA is not the decided one"
            self.feed(events.CertificatesRejected(action.epoch, reason))
            return
        self.disk.certificates = action.fingerprint
        self.feed(events.CertificatesStored(action.epoch))


class World:
    """Everything outside the hosts."""

    def __init__(
        self,
        seed: int,
        hosts: int = 3,
        config: ClusterConfig | None = None,
        faults: Faults | None = None,
        core: type[Assembly] = Assembly,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.config = config or ClusterConfig("demo", hosts, grace=30.0, agreed="x")
        self.faults = faults or Faults.drawn(self.rng)
        self.core = core
        self.now = 0.0
        self.events = 0
        self.counts: dict[str, int] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.trace: Callable[[str], object] | None = None
        self.blocked: set[tuple[int, int]] = set()
        self.witness = Witness(self.config)
        self.hosts = [Host(self, i) for i in range(hosts)]
        self.by_id = {h.node_id: h for h in self.hosts}
        self.witness.voters |= set(self.by_id)
        self.by_endpoint = {h.endpoint: h for h in self.hosts}

    # ------------------------------------------------------------ clock

    @property
    def hostile(self) -> bool:
        """Whether faults still happen."""
        return self.now < self.faults.until

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call `what` at virtual time `when`."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), what))

    def after(self, delay: float, what: Callable[[], None]) -> None:
        """Call `what` after `delay` seconds."""
        self.at(self.now + delay, what)

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Run until `done` or until that virtual time; whether it was `done`."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
            if done is not None and done():
                return True
        self.now = max(self.now, until)
        return done is not None and done()

    def count(self, fault: str) -> None:
        """One more injected fault of that kind."""
        self.counts[fault] = self.counts.get(fault, 0) + 1

    def fsync(self) -> float:
        """How long a durable write takes."""
        return 0.002 + self.rng.random() * 0.02

    def make_core(self, me: Self, stored: Stored, issued: list[Issued]) -> Assembly:
        """The code under test."""
        rng = random.Random(self.rng.random())
        start = Start(self.config, me, stored, tuple(issued), PAYLOAD, {}, rng, self.now)
        return self.core(start)

    # ------------------------------------------------------------ network

    def delay(self) -> float:
        """One way, once."""
        return self.rng.expovariate(1 / self.faults.delay) + 1e-5

    def lost(self, source: Host, target: Host) -> bool:
        """Whether one message on this link is lost now."""
        if (source.index, target.index) in self.blocked:
            self.count("partitioned")
            return True
        if self.hostile and self.rng.random() < self.faults.loss:
            self.count("lost")
            return True
        return False

    def send(self, source: Host, action: events.Send) -> None:
        """Carry one message, or lose it, or carry it twice."""
        self.witness.sent(source, action)
        key = (action.node_id, action.channel)
        if key not in source.channels:
            return
        connection, target = source.channels[key]
        copies = 1 + (self.hostile and self.rng.random() < self.faults.duplicate)
        for _ in range(copies):
            if not self.lost(source, target):
                received = events.MessageReceived(source.node_id, action.channel, action.message)
                self._deliver(source.node_id, target, connection, received)

    def _deliver(
        self, sender: str, target: Host, connection: int, received: events.MessageReceived
    ) -> None:
        boot = target.boots

        def arrive() -> None:
            known = target.channels.get((sender, received.channel))
            if target.boots == boot and known is not None and known[0] == connection:
                target.feed(received)

        self.after(self.delay(), arrive)

    def connect(self, source: Host, action: events.Connect) -> None:
        """A dial: refused where nobody listens, timed out where packets vanish."""
        target = self.by_endpoint.get(action.endpoint)

        def fail(reason: str, delay: float) -> None:
            source.later(delay, events.ConnectFailed(action.endpoint, action.channel, reason))

        if target is None:
            return fail("timeout", 5.0)
        if self.lost(source, target) or self.lost(target, source):
            return fail("timeout", 5.0)
        boot, target_boot = source.boots, target.boots

        def establish() -> None:
            if source.boots != boot or source.core is None:
                return
            if (
                target.core is None
                or target.boots != target_boot
                or not self._opens(source, target, action.channel)
            ):
                fail("refused", 0.001)
                return
            self._establish(source, target, action)

        return self.after(3 * self.delay(), establish)

    def _opens(self, source: Host, target: Host, channel: Channel) -> bool:
        """Whether the target answers on that channel."""
        if target.core is None:
            return False
        if channel is Channel.CLUSTER:
            return bool(
                target.disk.certificates and target.disk.certificates == source.disk.certificates
            )
        return not target.core.stored.closed

    def _establish(self, source: Host, target: Host, action: events.Connect) -> None:
        connection = next(self._order)
        channel = action.channel
        source.channels[target.node_id, channel] = connection, target
        target.channels[source.node_id, channel] = connection, source
        there = events.Connected(target.node_id, channel, action.endpoint, target.endpoint.host)
        source.later(0.0, there)
        if target is not source:
            here = events.Connected(source.node_id, channel, None, source.endpoint.host)
            target.later(self.delay(), here)

    def cut(self, host: Host, node_id: str, channel: Channel, notice: float) -> None:
        """The connection is gone; the other side learns of it after `notice` seconds."""
        connection, other = host.channels.pop((node_id, channel), (0, host))
        if host.core is not None:
            host.later(0.0, events.Disconnected(node_id, channel))
        mine = host.node_id

        def noticed() -> None:
            if other.channels.get((mine, channel)) == (connection, host):
                del other.channels[mine, channel]
                other.later(0.0, events.Disconnected(mine, channel))

        self.after(notice, noticed)

    def announce(self, host: Host) -> None:
        """Multicast: everybody hears where `host` is, and answers its query."""
        if self.now < self.faults.multicast_dead_until:
            self.count("multicast dead")
            return
        for other in self.hosts:
            if other is host or other.core is None or not other.core.open:
                continue
            for hearer, told in ((other, host), (host, other)):
                unlucky = self.hostile and self.rng.random() < self.faults.multicast_loss
                if not unlucky and not self.lost(told, hearer):
                    hearer.later(self.delay(), events.PeerFound(told.endpoint, "mdns"))

    # ------------------------------------------------------------ faults

    def crash_now(self) -> bool:
        """Whether this very boundary between two actions is where the power fails."""
        return self.hostile and self.rng.random() < self.faults.crash_boundary

    def schedule(self) -> None:
        """Lay out boots, crashes, partitions, wipes and pauses over the hostile time."""
        faults, rng = self.faults, self.rng
        for host in self.hosts:
            self.at(rng.random() * faults.skew, host.boot)
        for _ in range(faults.crashes):
            self.at(rng.random() * faults.until, rng.choice(self.hosts).crash)
        for _ in range(faults.wipes):
            self.at(rng.random() * faults.until, rng.choice(self.hosts).wipe)
        for _ in range(faults.partitions):
            start = rng.random() * faults.until
            links = self._drawn_partition()
            self.at(start, lambda links=links: self._partition(links))  # type: ignore[misc]
            self.at(start + rng.random() * 40, lambda links=links: self._heal(links))  # type: ignore[misc]
        for _ in range(faults.pauses):
            host, length = rng.choice(self.hosts), rng.random() * 40
            self.at(rng.random() * faults.until, lambda h=host, n=length: self._pause(h, n))  # type: ignore[misc]
        for when in itertools.takewhile(lambda t: t < faults.until, itertools.count(1.0, 3.0)):
            for host in self.hosts:  # systemd restarts what died, after a while
                self.at(when + rng.random() * 3, host.boot)
        self.at(faults.until, self._peace)

    def _drawn_partition(self) -> set[tuple[int, int]]:
        """Halves, one host alone, one-way, or single links, as the seed has it."""
        every = [(a.index, b.index) for a in self.hosts for b in self.hosts if a is not b]
        kind = self.rng.randrange(3)
        if kind == 0:
            side = {h.index for h in self.hosts if self.rng.random() < 0.5}
            return {(a, b) for a, b in every if (a in side) != (b in side)}
        if kind == 1:
            side = {self.rng.randrange(len(self.hosts))}
            return {(a, b) for a, b in every if a in side}  # one way only
        return {link for link in every if self.rng.random() < 0.3}

    def _partition(self, links: set[tuple[int, int]]) -> None:
        self.count("partition")
        self.blocked |= links
        for a, b in sorted(links):
            host, other = self.hosts[a], self.hosts[b]
            for channel in Channel:
                if (other.node_id, channel) in host.channels:
                    self.after(
                        DEAD_AFTER,
                        lambda h=host, o=other, c=channel: (  # type: ignore[misc]
                            self.cut(h, o.node_id, c, notice=0.1)
                            if (h.index, o.index) in self.blocked
                            else None
                        ),
                    )

    def _heal(self, links: set[tuple[int, int]]) -> None:
        self.blocked -= links

    def _pause(self, host: Host, length: float) -> None:
        self.count("pause")
        host.paused_until = self.now + length

    def _peace(self) -> None:
        self.blocked.clear()
        self.faults.crash_boundary = self.faults.loss = self.faults.multicast_loss = 0.0
        self.faults.multicast_dead_until = 0.0
        for host in self.hosts:
            host.paused_until = self.now
            host.boot()

    # ------------------------------------------------------------ outcome

    def all_running(self) -> bool:
        """Whether every host runs its role (or did, and left)."""
        return all(
            h.gone or (h.core is not None and h.core.stage is Stage.RUNNING) for h in self.hosts
        )

    def picture(self) -> str:
        """Where every host stands, for a failing seed."""
        lines = []
        for host in self.hosts:
            core = host.core
            stage = "gone" if host.gone else core.stage if core else "down"
            value = host.disk.stored.decided
            decided = f"{'ACTIVE' if value.active else 'CANDIDATE'}({value.epoch})" if value else ""
            register = host.disk.stored.register
            lines.append(
                f"{host.index} {host.node_id[:6]} {stage} {decided} promised"
                f" {register.promised.number} accepted {register.accepted.number}"
                f" {core.denied if core else ''} {core.round if core else ''}"
            )
        return "\n".join(lines)


def simulate(seed: int, core: type[Assembly] = Assembly, **options: object) -> World:
    """One whole run: hostile time, then peace until every host runs; raises on a violation."""
    world = World(seed, core=core, **options)  # type: ignore[arg-type]
    world.schedule()
    bound = world.faults.until + world.config.grace + 120.0
    ended = world.run(bound, world.all_running)
    world.witness.finish(world)
    assert ended, f"seed {seed}: not all running after {bound} s\n{world.picture()}"
    return world


__all__ = ["PAYLOAD", "Faults", "World", "messages", "simulate"]
