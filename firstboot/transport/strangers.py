"""What an address may do before it is a peer, and how much is told about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from firstboot.protocol import events, record
from firstboot.transport.tunnel import Tunnel

_MAX_SOURCES = 1024  # addresses remembered


@record.dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the channel. Times are seconds, sizes bytes, rates per second."""

    handshake: float = 5.0  # a dial, or a stranger's selector and handshake
    pending: int = 256  # handshakes of strangers at a time; beyond, the oldest gives way
    pending_per_source: int = 8  # the same for one address
    accepts: float = 50.0  # connections per source,
    accepts_burst: int = 200  # after that many at once
    dials: int = 256
    connections: int = 3  # per peer and channel; beyond, the oldest is closed
    unsent: int = 1024 * 1024  # a peer that reads slower than that is cut off
    messages: float = 200.0  # per connection,
    messages_burst: int = 1000  # after that many at once
    reports: float = 4.0  # StrangerSeen events of one kind; of one source it is one a second
    silence: float = 15.0  # a peer whose kernel does not acknowledge for so long is gone


class Bucket:
    """A token bucket: `burst` at once, then `rate` per second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._at = burst, 0.0

    def take(self, now: float) -> bool:
        """Whether there is one left at that time (seconds, never going back)."""
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


@dataclass(eq=False, slots=True)
class _Source:
    """What one address is up to."""

    bucket: Bucket
    pending: list[Tunnel] = field(default_factory=list)


class Strangers:
    """Bounds what addresses can do before they are peers, and how much is told about them."""

    def __init__(self, limits: Limits, tell: Callable[[events.Event], None]) -> None:
        self._limits, self._tell = limits, tell
        self._sources: dict[str, _Source] = {}  # the least recently seen first
        self._pending: dict[Tunnel, _Source] = {}  # the oldest first
        self._told: dict[tuple[str, str], float] = {}
        self._reports: dict[str, Bucket] = {}

    def admit(self, tunnel: Tunnel, now: float) -> bool:
        """Whether this connection may try its handshake.

        When there is no room the oldest gives way, not the newest: an honest handshake takes
        milliseconds, so whoever holds a place for long is the one to lose it.
        """
        source = self._source(tunnel.remote)
        if not source.bucket.take(now):
            self.report("flood", tunnel.remote, now)
            return False
        source.pending.append(tunnel)
        self._pending[tunnel] = source
        victim: Tunnel | None = None
        if len(source.pending) > self._limits.pending_per_source:
            victim = source.pending[0]
        elif len(self._pending) > self._limits.pending:
            victim = next(iter(self._pending))
        if victim is not None:
            self.leave(victim)
            victim.abort()
            self.report("flood", victim.remote, now)
        return True

    def leave(self, tunnel: Tunnel) -> None:
        """That connection is no stranger's any more, or gone. Harmless when repeated."""
        source = self._pending.pop(tunnel, None)
        if source is not None:
            source.pending.remove(tunnel)

    def report(self, kind: str, remote: str, now: float) -> None:
        """Tell of a stranger, unless the same was told just now or too much is told already."""
        if now < self._told.get((kind, remote), -1.0) + 1:
            return
        if len(self._told) >= _MAX_SOURCES:
            self._told.clear()
        rate = self._limits.reports
        if self._reports.setdefault(kind, Bucket(rate, rate)).take(now):
            self._told[kind, remote] = now
            self._tell(events.StrangerSeen(kind, remote))

    async def expel(self) -> None:
        """Close whatever is still pending."""
        for tunnel in list(self._pending):
            tunnel.abort()
            await tunnel.close()

    def _source(self, remote: str) -> _Source:
        source = self._sources.pop(remote, None)
        if source is None:
            source = _Source(Bucket(self._limits.accepts, self._limits.accepts_burst))
        if len(self._sources) >= _MAX_SOURCES:
            idle = (name for name, known in self._sources.items() if not known.pending)
            self._sources.pop(next(idle, ""), None)
        self._sources[remote] = source
        return source
