"""A second `service.py`: the real core under a virtual clock, network and disk, from one seed.

The network is nastier than TCP on purpose: every message has its own delay, may be lost,
doubled or overtaken. The disk keeps only what was synced. Invariants are checked as things
happen (`tests/sim/invariants.py`), so that a violation stops at the event that made it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import log
from typing import Any

from mypy_extensions import mypyc_attr

from firstboot.protocol import events
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import (
    USUAL,
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Profile,
    Self,
    Stored,
    Topology,
)
from firstboot.protocol.plan import Payload, RolePlan, StartUnit
from firstboot.protocol.situation import Start
from tests.sim.befall import befall
from tests.sim.faults import (
    DAYS,
    Faults,
    Occurrence,
    drawn_config,
    drawn_occurrences,
    other_expect,
)
from tests.sim.invariants import Witness
from tests.sim.machine import Disk, Host, digest
from tests.sim.outcome import left_behind, must_change_nothing, runs, settled

PAYLOAD = Payload(
    "sim",
    master=RolePlan((Profile.PEER,), (StartUnit("master.service"),)),
    node=RolePlan((Profile.CLIENT,), (StartUnit("node.service"),)),
)
ONCE_MORE = 0.05  # share of the runs after which a host is started again (L3)
PATIENCE = 110.0  # of the bound, how much is for those only that might still form, seconds
DEAD_AFTER = 15.0  # TCP notices a silent peer (TCP_USER_TIMEOUT)


@mypyc_attr(allow_interpreted_subclasses=True)  # for `tests.sim.compiled`
class World:
    """Everything outside the hosts."""

    def __init__(
        self,
        seed: int,
        hosts: int = 3,
        config: ClusterConfig | None = None,
        faults: Faults | None = None,
        core: type[Assembly] = Assembly,
        topology: Topology = USUAL,
    ) -> None:
        self.seed, self.topology = seed, topology
        self.rng = random.Random(seed)
        self._luck = random.Random(seed + 0.5)  # of its own: a fault left out moves no delay
        # Drawn even if not used: what is chosen instead of drawn moves nothing else.
        drawn, strengths = drawn_config(self.rng, hosts), Faults.drawn(self.rng)
        plain = ClusterConfig("demo", hosts, grace=30.0, agreed="x")
        self.config = config or (plain if faults is not None else drawn)
        self.faults = faults or strengths
        self.core = core
        self.now = 0.0
        self.ended = False  # all that can run did, before the bound
        self.formed: float | None = None  # when that was, for the first time
        self.restarts = False  # what died is switched on again by itself
        self.events = 0
        self.counts: dict[str, int] = {}
        self.occurrences: list[Occurrence] | None = None  # None: drawn from the seed
        self.hits: dict[str, list[int]] = {}  # of each chance, which of its tries came true
        self.only: dict[str, set[int]] | None = None  # the same, chosen instead of drawn
        self._tries: dict[str, int] = {}
        self._queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.trace: Callable[[str], object] | None = None
        self.blocked: set[tuple[int, int]] = set()
        self.copied: set[str] = set()  # identities that were ever on two disks
        self.witness = Witness(self.config)
        launched, clones = hosts + self.faults.surplus, self.faults.clones
        self.hosts = [Host(self, i) for i in range(launched + clones + self.faults.joiners)]
        self.launched = self.hosts[:launched]
        self.clones = self.hosts[launched : launched + clones]
        self.joiners = self.hosts[launched + clones :]
        for host in self.joiners:
            host.absent = True
        for host in self.launched[1 : 1 + self.faults.mixed]:
            host.config = other_expect(self.rng, self.config)
        self.by_id = {h.node_id: h for h in self.hosts}
        self.by_endpoint = {h.endpoint: h for h in self.hosts}
        self.foreign = [Endpoint(f"10.9.0.{i + 1}", 7443) for i in range(self.faults.foreign)]
        self.past: deque[tuple[Host, str, events.MessageReceived]] = deque(maxlen=200)
        self.snapshots: list[tuple[Host, Disk]] = []
        self._unsettled = self.hosts[0]

    # ------------------------------------------------------------ clock

    @property
    def hostile(self) -> bool:
        """Whether faults still happen."""
        return self.now < self.faults.until

    def at(self, when: float, what: Callable[..., object], *args: Any) -> None:
        """Call `what` with these arguments at virtual time `when`."""
        now = self.now
        heappush(self._queue, (when if when > now else now, next(self._order), what, args))

    def after(self, delay: float, what: Callable[..., object], *args: Any) -> None:
        """Call `what` after `delay` seconds."""
        heappush(self._queue, (self.now + delay, next(self._order), what, args))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Run until `done` or until that virtual time; whether it was `done`."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, what, args = heappop(queue)
            what(*args)
            if done is not None and done():
                return True
        self.now = max(self.now, until)
        return done is not None and done()

    def chance(self, fault: str, probability: float) -> bool:
        """Whether this fault happens now, with that probability while faults happen at all."""
        if not probability or self.now >= self.faults.until:
            return False
        number = self._tries[fault] = self._tries.get(fault, 0) + 1
        if self.only is None:
            hit = self._luck.random() < probability
        else:
            hit = number in self.only.get(fault, ())
        if hit:
            self.hits.setdefault(fault, []).append(number)
            self.count(fault)
        return hit

    def count(self, fault: str) -> None:
        """One more injected fault of that kind."""
        self.counts[fault] = self.counts.get(fault, 0) + 1

    def fsync(self) -> float:
        """How long a durable write takes."""
        return 0.002 + self.rng.random() * 0.02

    def make_core(
        self, me: Self, stored: Stored, issued: list[Issued], config: ClusterConfig
    ) -> Assembly:
        """The code under test."""
        rng = random.Random(self.rng.getrandbits(48))
        start = Start(config, me, stored, tuple(issued), PAYLOAD, {}, rng, self.now, self.topology)
        return self.core(start)

    # ------------------------------------------------------------ network

    def delay(self) -> float:
        """One way, once."""
        return self.faults.delay * -log(1.0 - self.rng.random()) + 1e-5

    def lost(self, source: Host, target: Host) -> bool:
        """Whether one message on this link is lost now."""
        if self.blocked and (source.index, target.index) in self.blocked:
            self.count("partitioned")
            return True
        return bool(self.faults.loss) and self.chance("lost", self.faults.loss)

    def send(self, source: Host, action: events.Send) -> None:
        """Carry one message, or lose it, or carry it twice; perhaps an old one again."""
        self.witness.sent(source, action)
        channel = action.channel
        there = source.channels.get((action.node_id, channel))
        if there is None:
            return
        connection, target = there
        sender = source.node_id
        received = events.MessageReceived(sender, channel, action.message)
        twice = self.faults.duplicate and self.chance("duplicated", self.faults.duplicate)
        for _ in range(2 if twice else 1):
            if not self.lost(source, target):
                self.after(self.delay(), self._arrive, target, target.boots, connection, received)
        if self.faults.replays:
            self.past.append((target, sender, received))
            if self.chance("replayed", self.faults.replays):
                self._replay()

    def _arrive(
        self, target: Host, boot: int, connection: int, received: events.MessageReceived
    ) -> None:
        if target.boots == boot:
            known = target.channels.get((received.node_id, received.channel))
            if known is not None and known[0] == connection:
                target.feed(received)

    def _replay(self) -> None:
        """An old message once more, of this or of a former connection or boot.

        Only where its sender is connected now: TLS lets nobody else say anything.
        """
        target, sender, received = self.rng.choice(self.past)
        if (sender, received.channel) in target.channels:
            target.later(self.delay(), received)

    def connect(self, source: Host, action: events.Connect) -> None:
        """A dial: refused where nobody listens, timed out where packets vanish."""
        self.witness.dialled(source, action)
        target = self.by_endpoint.get(action.endpoint)

        def fail(reason: str, delay: float) -> None:
            source.later(delay, events.ConnectFailed(action.endpoint, action.channel, reason))

        if self.foreign and action.endpoint in self.foreign:
            return fail("token", 0.01)
        if target is None:
            return fail("timeout", 5.0)
        if self.lost(source, target) or self.lost(target, source):
            return fail("timeout", 5.0)
        if self.chance("dial hung", self.faults.half_open / 2):
            return fail("timeout", 5.0)
        return self.after(3 * self.delay(), self._answer, source, source.boots, target, action)

    def _answer(self, source: Host, boot: int, target: Host, action: events.Connect) -> None:
        if source.boots != boot or source.core is None:
            return
        if self.now < target.paused_until:
            late = events.ConnectFailed(action.endpoint, action.channel, "timeout")
            source.later(5.0, late)
            return
        closed = source.shut and action.channel is Channel.BOOTSTRAP
        if closed or target.core is None or not self._opens(source, target, action.channel):
            refused = events.ConnectFailed(action.endpoint, action.channel, "refused")
            source.later(0.001, refused)
            return
        self._establish(source, target, action)

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
        old = source.channels.get((target.node_id, channel))
        source.channels[target.node_id, channel] = connection, target
        there = events.Connected(target.node_id, channel, action.endpoint, target.endpoint.host)
        source.later(0.0, there)
        if target is source:
            return
        if self.chance("half open", self.faults.half_open):
            self.after(DEAD_AFTER, self._notice, source, target, channel, connection)
            if old is not None:  # it hangs up on the one that this replaces
                self.after(self.delay(), self._notice, target, source, channel, old[0])
            return
        target.channels[source.node_id, channel] = connection, source
        here = events.Connected(source.node_id, channel, None, source.endpoint.host)
        target.later(0.0, here)  # TLS: nothing that was said on it comes before

    def _notice(self, host: Host, other: Host, channel: Channel, connection: int) -> None:
        """The host learns that nobody is at the other end of that connection."""
        for key, (number, end) in list(host.channels.items()):
            if number == connection and end is other and key[1] is channel:
                del host.channels[key]
                host.later(0.0, events.Disconnected(*key))

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
            if self.chance("wrong token", 0.3):
                host.later(self.delay(), events.StrangerSeen("token", endpoint.host))
        if self.faults.static:
            for other in self.hosts:
                host.later(0.0, events.PeerFound(other.endpoint, "static"))
            return
        if self.now < self.faults.multicast_dead_until:
            self.count("multicast dead")
            return
        here = host.found()
        for other in self.hosts:
            if other is host or other.core is None or not other.core.open:
                continue
            self._hear(host, other, here)
            self._hear(other, host, other.found())

    def _hear(self, told: Host, hearer: Host, found: events.PeerFound) -> None:
        loss = self.faults.multicast_loss
        unlucky = loss and self.chance("multicast lost", loss)
        if not unlucky and not self.lost(told, hearer):
            hearer.later(self.delay(), found)

    # ------------------------------------------------------------ faults

    def crash_now(self, host: Host, actions: list[events.Action], gap: int) -> bool:
        """Whether the power fails in this very gap: before `actions[gap]`, or behind the last."""
        return self.chance("crash at a boundary", self.faults.crash_boundary)

    def perhaps_move(self, host: Host) -> None:
        """DHCP gives another address, or a dead host's, to who has not been named anywhere yet."""
        if not self.faults.moves or not self.hostile:
            return
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
        """Lay out boots and everything that shall befall over the hostile time."""
        faults, rng = self.faults, self.rng
        for host in self.launched:
            host.born = rng.random() * faults.skew
            self.at(host.born, host.boot)
        for host in rng.sample(self.launched, min(faults.absent, len(self.launched) - 1)):
            self.count("absent")
            host.absent = True
        for clone in self.clones:
            clone.absent = True
            when = rng.random() * min(30.0, faults.until) if rng.random() < 0.7 else 0.0
            self.at(when, self._copy, clone, rng.choice(self.launched))
        for _ in range(faults.mixed):
            self.count("mixed expect")
        if faults.refused_until:
            rng.choice(self.hosts).refuses_until = faults.refused_until
        drawn = drawn_occurrences(rng, faults, len(self.hosts))
        if self.occurrences is None:
            self.occurrences = drawn
        for occurrence in self.occurrences:
            self.at(occurrence.at, befall, self, occurrence)
        self.restarts = True
        self.at(faults.until, self.peace)

    def _copy(self, clone: Host, original: Host) -> None:
        if self.hostile:
            clone.copy_disk_of(original)

    def partition(self, links: Iterable[tuple[int, int]]) -> None:
        """From now on these links (source, target) carry nothing."""
        self.count("partition")
        self.blocked |= set(links)
        for a, b in sorted(links):
            host, other = self.hosts[a], self.hosts[b]
            for channel in Channel:
                if (other.node_id, channel) in host.channels:
                    self.after(DEAD_AFTER, self._dead, host, other, channel)

    def _dead(self, host: Host, other: Host, channel: Channel) -> None:
        if (host.index, other.index) in self.blocked:
            self.cut(host, other.node_id, channel, notice=0.1)

    def heal(self, links: Iterable[tuple[int, int]]) -> None:
        """They carry again."""
        self.blocked -= set(links)

    def peace(self) -> None:
        """All faults end, and every host is switched on."""
        self.faults.until = min(self.faults.until, self.now)
        self.blocked.clear()
        self.faults.multicast_dead_until = 0.0
        for host in self.hosts:
            host.paused_until = host.refuses_until = host.disk_fails_until = self.now
            host.loops_until = 0.0
            host.wake(host.boots)
            host.boot()

    # ------------------------------------------------------------ outcome

    @property
    def peaceful(self) -> float:
        """When the faults are over and the last host was switched on, virtual seconds."""
        return max(self.faults.until, *(h.born for h in self.hosts))

    @property
    def bound(self) -> float:
        """When all that can form must have formed, virtual seconds."""
        return self.peaceful + self.config.grace + 150.0

    def all_running(self) -> bool:
        """Whether every host runs its role (or did, and left), or is out for good."""
        waiting = self._unsettled  # most often the one it was before
        if waiting.core is not None and waiting.core.plan is None and self.events & 15:
            return False  # whether it is shut out is asked now and then only
        if not settled(self, waiting):
            return False
        for host in self.hosts:
            if not settled(self, host):
                self._unsettled = host
                return False
        return True

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


def simulate(seed: int, core: type[Assembly] = Assembly, **options: Any) -> World:
    """One whole run: hostile time, then peace until every host runs; raises on a violation."""
    world = World(seed, core=core, **options)
    play(world)
    return world


def play(world: World) -> None:
    """Carry out the run that was drawn for this world; raises on a violation."""
    world.schedule()
    settle(world)
    for host in world.joiners:
        _join_late(world, host)
    if world.rng.random() < ONCE_MORE and world.ended and world.witness.safe:
        world.peace()
        calm = [h for h in world.hosts if runs(h) and h.node_id not in world.copied]
        if calm:
            must_change_nothing(world, world.rng.choice(calm))


def settle(world: World) -> None:
    """Run until all that can run does, and check the outcome."""
    world.ended = world.run(world.bound - PATIENCE, world.all_running)
    if not world.ended and left_behind(world):  # else they cannot form, and say so
        world.ended = world.run(world.bound, world.all_running)
    if world.formed is None:
        world.formed = world.now
    if world.ended:
        world.witness.must_close(world)
    if len(world.witness.active) > 1:
        world.run(max(world.now, world.faults.until) + 30.0)  # time to meet, and to say so
    world.witness.finish(world)
    stuck = [] if world.ended else left_behind(world)
    world.witness.must(
        not stuck, "L1: stuck", f" after {world.now:.0f} s: {stuck}\n{world.picture()}"
    )


def _join_late(world: World, host: Host) -> None:
    """A host first booted when all is done: soon, or days later where nobody waits for it."""
    world.count("joiner")
    waits = any(h.core is not None for h in world.hosts)
    world.run(world.now + world.rng.random() * (120.0 if waits else DAYS))
    world.peace()
    host.absent, host.born = False, world.now
    host.boot()
    settle(world)


__all__ = ["PAYLOAD", "Disk", "Faults", "Host", "World", "digest", "play", "settle", "simulate"]
