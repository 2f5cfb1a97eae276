"""What each occurrence does to a world at its moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from firstboot.protocol import events
from firstboot.protocol.model import Channel, Endpoint
from tests.sim.faults import Occurrence

if TYPE_CHECKING:
    from tests.sim.machine import Disk, Host
    from tests.sim.world import World


def befall(world: World, what: Occurrence) -> None:
    """Let it happen, while faults happen at all."""
    if world.hostile:
        _KINDS[what.kind](world, what)


def _crash(world: World, what: Occurrence) -> None:
    world.hosts[what.host].crash()


def _master_crash(world: World, what: Occurrence) -> None:
    """The candidate, or else who is about to propose itself."""
    cores = [h for h in world.hosts if h.core is not None]
    for host in sorted(cores, key=lambda h: (not h.core.founder, h.core.round is None)):  # type: ignore[union-attr]
        world.count("master crash")
        host.crash()
        return


def _reboot_loop(world: World, what: Occurrence) -> None:
    world.count("reboot loop")
    host = world.hosts[what.host]
    host.loops_until = world.now + what.length
    host.crash()


def _pause(world: World, what: Occurrence) -> None:
    world.count("pause")
    world.hosts[what.host].paused_until = world.now + what.length


def _wipe(world: World, what: Occurrence) -> None:
    world.hosts[what.host].wipe()


def _lose_state(world: World, what: Occurrence) -> None:
    world.hosts[what.host].lose_state()


def _rollback(world: World, what: Occurrence) -> None:
    """A snapshot now, to which the disk is set back `length` seconds later."""
    host = world.hosts[what.host]
    world.after(what.length, _set_back, world, host, host.disk.copy(), host.identity)


def _set_back(world: World, host: Host, older: Disk, identity: tuple[int, int]) -> None:
    if world.hostile and host.identity == identity:
        host.roll_back(older)


def _disk_full(world: World, what: Occurrence) -> None:
    world.count("disk full")
    world.hosts[what.host].disk_fails_until = world.now + what.length


def _read_only(world: World, what: Occurrence) -> None:
    world.count("read-only disk")
    world.hosts[what.host].disk_fails_until = world.faults.until


def _flood(world: World, what: Occurrence) -> None:
    """Dead addresses, failed dials of nobody, garbage."""
    world.count("flood")
    host = world.hosts[what.host]
    for n in range(int(what.length)):
        stranger = Endpoint(f"10.66.{what.host}.{n + 1}", 7443)
        moment = world.rng.random() * 2.0
        host.later(moment, events.PeerFound(stranger, "mdns"))
        host.later(moment, events.StrangerSeen(("garbage", "flood")[n % 2], stranger.host))
        unknown = Endpoint(f"10.67.{what.host}.{n + 1}", 7443)
        host.later(moment, events.ConnectFailed(unknown, Channel.BOOTSTRAP, "timeout"))


def _misbehaviour(world: World, what: Occurrence) -> None:
    """As the transport does on a malformed frame: it hangs up, and tells."""
    host, other = world.hosts[what.host], world.hosts[what.other]
    if (other.node_id, Channel.BOOTSTRAP) in host.channels and other is not host:
        world.count("misbehaviour")
        host.later(0.0, events.PeerMisbehaved(other.node_id, "a message that is not JSON"))
        world.cut(host, other.node_id, Channel.BOOTSTRAP, notice=0.01)


def _partition(world: World, what: Occurrence) -> None:
    if what.kind != "partition":
        world.count(what.kind)
    world.partition(what.links)
    world.after(what.length, world.heal, what.links)


_KINDS: dict[str, Callable[[World, Occurrence], None]] = {
    "crash": _crash,
    "master crash": _master_crash,
    "reboot loop": _reboot_loop,
    "pause": _pause,
    "wipe": _wipe,
    "lost state": _lose_state,
    "rollback": _rollback,
    "disk full": _disk_full,
    "read-only": _read_only,
    "flood": _flood,
    "misbehaviour": _misbehaviour,
    "partition": _partition,
    "partition flaps": _partition,
    "partition moves": _partition,
}
