"""L1-L3: what must have become of every host when the faults have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstboot.protocol import status
from firstboot.protocol.enrolment import full
from firstboot.protocol.model import Stage, Value

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World


def runs(host: Host) -> bool:
    """Whether this host runs its role, or did and left."""
    return host.gone or (host.core is not None and host.core.stage is Stage.RUNNING)


def all_settled(world: World) -> bool:
    """Whether every host that will ever be on runs, or has been shut out for good."""
    return all(runs(h) or h.absent or (h.core is not None and _out(world, h)) for h in world.hosts)


def _out(world: World, host: Host) -> bool:
    """Whether nothing can be done for this host any more, by design."""
    core = host.core
    if core is None:
        return False
    if core.failure:
        return True  # a clone; only clones can get there, see `left_behind`
    if not world.witness.active or world.hostile:
        return False
    founders = [world.by_id[i] for i in world.witness.active.values()]
    alive = [f for f in founders if f.node_id in world.witness.active.values() and not f.gone]
    alive = [f for f in alive if not f.disk.lost]  # it forgot that it was the founder
    welcome = [f for f in alive if f.core is None or not (f.core.closed or f.core.failure)]
    if not welcome:
        return True  # CLOSE, or MASTER_LOST: it waits
    if "belongs to another member" in core.denied or "with another address" in core.denied:
        return True  # it was re-created or moved, and an address is a member's for good
    roster = [f.core.roster.issued for f in welcome if f.core is not None]
    return bool(roster) and all(
        full(world.config, len(r)) and host.node_id not in r for r in roster
    )


def _quorum_at_last(world: World) -> int:
    """What the host that knows of the most voters needs: it may be the master."""
    if world.config.strict:
        return world.config.expect
    seen = max(len(h.core.voters) for h in world.hosts if h.core is not None)
    return max(world.config.majority, seen // 2 + 1)


def left_behind(world: World) -> list[str]:
    """Why this run is not as it must be: one line for every host that should run and does not."""
    copied = world.copied
    on = [h for h in world.hosts if h.core is not None and h.node_id not in copied]
    voters = [h for h in on if h.core is not None and h.core.me.voter]
    wrong = []
    for host in world.hosts:
        if runs(host) or host.absent or host.node_id in copied:
            continue  # one identity used twice: neither copy has a claim to anything
        core = host.core
        if core is None:
            wrong.append(f"{host.index} is down")
        elif core.failure:
            wrong.append(f"{host.index} failed: {core.failure}")
        elif _out(world, host) or not world.witness.safe:
            continue
        elif not any(h.gone or h.disk.stored.activated for h in world.hosts) and (
            len(voters) < max(_quorum_at_last(world), world.config.masters) or core.overlaunched
        ):
            wrong += _must_say_what_is_missing(host, len(voters))
        else:
            wrong.append(f"{host.index} is stuck: {status.sentence(core)[0]}")
    return wrong


def _must_say_what_is_missing(host: Host, voters: int) -> list[str]:
    """L2: below the quorum the sentence has the numbers."""
    core = host.core
    assert core is not None
    text, _ = status.sentence(core)
    if core.decided is not None or core.overlaunched or not core.me.voter:
        return []
    if core.present_voters() != voters:
        return [f"{host.index} counts {core.present_voters()} voters of {voters}"]
    if core.quorum > voters and f"waiting for {core.quorum - voters} more" not in text:
        return [f"{host.index} does not say what is missing: {text}"]
    return []


def must_describe(host: Host) -> None:
    """The status never raises, and its sentence is never empty."""
    if host.core is not None:
        told = status.describe(host.core, 1_800_000_000.0)
        assert told["sentence"], "a status without a sentence"


def must_change_nothing(world: World, host: Host) -> None:
    """L3: a host that runs its role is started again; nothing that is decided changes."""
    host.crash()
    host.gone = False
    stored, authorities, issued = host.disk.stored, dict(host.disk.authorities), host.disk.issued
    held: Value | None = stored.decided
    host.boot()
    world.run(world.now + 90.0)
    after = host.disk
    assert (after.stored.register, after.stored.decided) == (stored.register, held)
    assert (after.stored.enrolled, after.authorities) == (stored.enrolled, authorities)
    assert after.issued.keys() == issued.keys()
    assert runs(host)
