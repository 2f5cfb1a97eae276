"""A second `service.py`: the real core under a virtual clock, network and disk, from one seed.

The network is nastier than TCP on purpose: every message has its own delay, may be lost,
doubled or overtaken. The disk keeps only what was synced. Invariants are checked as things
happen (`tests/sim/invariants.py`), so that a violation stops at the event that made it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Profile,
    Self,
    Stored,
)
from firstboot.protocol.plan import Payload, RolePlan, StartUnit
from firstboot.protocol.situation import Start
from tests.sim.faults import Faults, drawn_config
from tests.sim.invariants import Witness
from tests.sim.machine import Disk, Host, digest
from tests.sim.outcome import all_settled, left_behind

PAYLOAD = Payload(
    "sim",
    master=RolePlan((Profile.PEER,), (StartUnit("master.service"),)),
    node=RolePlan((Profile.CLIENT,), (StartUnit("node.service"),)),
)
DEAD_AFTER = 15.0  # TCP notices a silent peer (TCP_USER_TIMEOUT)


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
        if config is None:
            plain = ClusterConfig("demo", hosts, grace=30.0, agreed="x")
            config = drawn_config(self.rng, hosts) if faults is None else plain
        self.config = config
        self.faults = faults or Faults.drawn(self.rng)
        self.core = core
        self.now = 0.0
        self.ended = False  # all that can run did, before the bound
        self.events = 0
        self.counts: dict[str, int] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.trace: Callable[[str], object] | None = None
        self.blocked: set[tuple[int, int]] = set()
        self.copied: set[str] = set()  # identities that were ever on two disks
        self.witness = Witness(self.config)
        extra = self.faults.surplus + self.faults.clones
        self.hosts = [Host(self, i) for i in range(hosts + extra)]
        self.by_id = {h.node_id: h for h in self.hosts}
        self.by_endpoint = {h.endpoint: h for h in self.hosts}
        self.foreign = [Endpoint(f"10.9.0.{i + 1}", 7443) for i in range(self.faults.foreign)]

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

    def chance(self, fault: str, probability: float) -> bool:
        """Whether this fault happens now, with that probability while faults happen at all."""
        if probability and self.hostile and self.rng.random() < probability:
            self.count(fault)
            return True
        return False

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

        if action.endpoint in self.foreign:
            return fail("token", 0.01)
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
        if self.now < target.refuses_until:
            self.count("refused")
            return False
        return not target.shut

    def _establish(self, source: Host, target: Host, action: events.Connect) -> None:
        connection = next(self._order)
        channel = action.channel
        self.witness.opened(target, channel)
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
        """Multicast: everybody hears where `host` is, and answers its query; or a static list."""
        for endpoint in self.foreign:
            host.later(self.delay(), events.PeerFound(endpoint, "static"))
        if self.faults.static:
            for other in self.hosts:
                host.later(0.0, events.PeerFound(other.endpoint, "static"))
            return
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

    def perhaps_move(self, host: Host) -> None:
        """DHCP gives another address, or a dead host's, to who has not been named anywhere yet."""
        values = [h.disk.stored.decided or h.disk.stored.register.value for h in self.hosts]
        named = {m.node_id for v in values if v is not None for m in v.masters}
        if host.disk.stored.decided or host.disk.lost or host.node_id in named:
            return
        if not self.chance("moved", self.faults.moves):
            return
        free = [h for h in self.hosts if h.core is None and h is not host and not h.gone]
        free = [h for h in free if h.disk.stored.decided is None and h.node_id not in named]
        if free and self.rng.random() < 0.5:
            other = self.rng.choice(free)
            host.endpoint, other.endpoint = other.endpoint, host.endpoint
            self.by_endpoint[other.endpoint] = other
        else:
            del self.by_endpoint[host.endpoint]
            host.endpoint = Endpoint(f"10.1.{host.index}.{host.boots % 250 + 1}", 7443)
        self.by_endpoint[host.endpoint] = host

    def schedule(self) -> None:
        """Lay out boots, crashes, partitions, wipes and pauses over the hostile time."""
        faults, rng = self.faults, self.rng
        originals = self.hosts[: len(self.hosts) - faults.clones]
        for host in originals:
            host.born = rng.random() * faults.skew
            self.at(host.born, host.boot)
        for host in rng.sample(originals, min(faults.absent, len(originals) - 1)):
            self.count("absent")
            host.absent = True
        for clone in self.hosts[len(originals) :]:
            clone.absent = True
            original = rng.choice(originals)
            self.at(rng.random() * 30, lambda c=clone, o=original: c.copy_disk_of(o))  # type: ignore[misc]
        if faults.refused_until:
            rng.choice(self.hosts).refuses_until = faults.refused_until
        self._schedule_deaths()
        for _ in range(faults.partitions):
            start = rng.random() * faults.until
            links = self._drawn_partition()
            self.at(start, lambda links=links: self.partition(links))  # type: ignore[misc]
            self.at(start + rng.random() * 40, lambda links=links: self.heal(links))  # type: ignore[misc]
        for _ in range(faults.pauses):
            host, length = rng.choice(self.hosts), rng.random() * 40
            self.at(rng.random() * faults.until, lambda h=host, n=length: self._pause(h, n))  # type: ignore[misc]
        self.at(faults.until, self._peace)

    def _schedule_deaths(self) -> None:
        faults, rng = self.faults, self.rng
        for _ in range(faults.crashes):
            self.at(rng.random() * faults.until, rng.choice(self.hosts).crash)
        for _ in range(faults.wipes):
            self.at(rng.random() * faults.until, rng.choice(self.hosts).wipe)
        for _ in range(faults.lost_states):
            self.at(rng.random() * faults.until, rng.choice(self.hosts).lose_state)
        for when in itertools.takewhile(lambda t: t < faults.until, itertools.count(1.0, 3.0)):
            for host in self.hosts:  # systemd restarts what died, after a while
                self.at(when + rng.random() * 3, host.boot)

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

    def partition(self, links: set[tuple[int, int]]) -> None:
        """From now on these links (source, target) carry nothing."""
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

    def heal(self, links: set[tuple[int, int]]) -> None:
        """They carry again."""
        self.blocked -= links

    def _pause(self, host: Host, length: float) -> None:
        self.count("pause")
        host.paused_until = self.now + length

    def _peace(self) -> None:
        self.blocked.clear()
        self.faults.crash_boundary = self.faults.loss = self.faults.multicast_loss = 0.0
        self.faults.multicast_dead_until = 0.0
        for host in self.hosts:
            host.paused_until = host.refuses_until = self.now
            host.boot()

    # ------------------------------------------------------------ outcome

    @property
    def peaceful(self) -> float:
        """When the faults are over and the last host was switched on, virtual seconds."""
        return max(self.faults.until, self.faults.skew)

    @property
    def bound(self) -> float:
        """When all that can form must have formed, virtual seconds."""
        return self.peaceful + self.config.grace + 150.0

    def all_running(self) -> bool:
        """Whether every host runs its role (or did, and left)."""
        return all_settled(self)

    def picture(self) -> str:
        """Where every host stands, for a failing seed."""
        lines = [f"{self.config}", f"{self.faults}"]
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
    ended = world.ended = world.run(world.bound, world.all_running)
    if ended:
        world.witness.must_close(world)
    if len(world.witness.active) > 1:
        world.run(max(world.now, world.faults.until) + 30.0)  # time to meet, and to say so
    world.witness.finish(world)
    stuck = [] if ended else left_behind(world)
    assert not stuck, f"seed {seed}, after {world.now} s: {stuck}\n{world.picture()}"
    return world


__all__ = ["PAYLOAD", "Disk", "Faults", "Host", "World", "digest", "messages", "simulate"]
