"""L1-L3: what must have become of every host when the faults have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstboot.protocol import status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.enrolment import full
from firstboot.protocol.model import ClusterConfig, Stage

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World


def runs(host: Host) -> bool:
    """Whether this host runs its role, or did and left."""
    core = host.core
    return host.gone or (core is not None and core.plan is not None and core.stage is Stage.RUNNING)


def settled(world: World, host: Host) -> bool:
    """Whether this host runs, will never be on, or has been shut out for good."""
    return runs(host) or host.absent or (host.core is not None and _out(world, host))


def _out(world: World, host: Host) -> bool:
    """Whether nothing can be done for this host any more, by design."""
    core = host.core
    if core is None:
        return False
    if core.failure:
        return True  # a clone; only clones can get there, see `left_behind`
    if not world.witness.active or world.hostile or world.now < world.peaceful:
        return False
    founders = [world.by_id[i] for i in world.witness.active.values()]
    alive = [f for f in founders if f.node_id in world.witness.active.values() and not f.gone]
    alive = [f for f in alive if not f.disk.lost]  # it forgot that it was the founder
    alive = [f for f in alive if f.config == host.config]  # else it does not even listen
    welcome = [f for f in alive if f.core is None or not (f.core.closed or f.core.failure)]
    if not welcome:
        return True  # CLOSE, or MASTER_LOST: it waits
    if "belongs to another member" in core.denied or "with another address" in core.denied:
        return True  # it was re-created or moved, and an address is a member's for good
    if host.node_id in world.witness.forgot and "with another key" in core.denied:
        return True  # its disk was set back to before its key was made
    if any(_set_back(world, founder) for founder in founders):
        return True
    roster = [f.core.roster.issued for f in welcome if f.core is not None]
    return bool(roster) and all(
        full(host.document, len(r)) and host.node_id not in r for r in roster
    )


def _set_back(world: World, founder: Host) -> bool:
    """Whether its disk is a copy from before ACTIVE, which only those know that left since."""
    core = founder.core
    return founder.node_id in world.witness.forgot and core is not None and not core.active_seen


def _quorum_at_last(group: list[Host], config: ClusterConfig) -> int:
    """What the host that knows of the most voters needs: it may be the master."""
    if config.strict:
        return config.expect
    seen = max((len(h.core.voters) for h in group if h.core is not None), default=0)
    return max(config.majority, seen // 2 + 1)


def left_behind(world: World) -> list[str]:
    """Why this run is not as it must be: one line for every host that should run and does not."""
    wrong = []
    for host in world.hosts:
        if runs(host) or host.absent or host.node_id in world.copied:
            continue  # one identity used twice: neither copy has a claim to anything
        core = host.core
        if core is None:
            wrong.append(f"{host.index} is down")
        elif core.failure:
            wrong.append(f"{host.index} failed: {core.failure}")
        elif not _out(world, host) and world.witness.safe:
            wrong += _complaint(world, host)
    return wrong


def _complaint(world: World, host: Host) -> list[str]:
    """Why it does not run, unless it cannot, and says so. Hosts count those of one document."""
    core = host.core
    assert core is not None
    group = [h for h in world.hosts if h.core is not None and h.config == host.config]
    group = [h for h in group if h.node_id not in world.copied]
    voters = sum(h.core.me.voter for h in group if h.core is not None)
    config = host.document
    if not any(h.gone or h.disk.stored.activated for h in world.hosts) and (
        voters < max(_quorum_at_last(group, config), config.masters) or core.overlaunched
    ):
        return _must_say_what_is_missing(host, voters)
    votes = [h.disk.stored.register.value for h in group]
    if core.decided is not None and not core.decided.active and not any(votes):
        return []  # whoever voted for that candidate was re-created or lost its votes
    if any(h.config is not None for h in world.hosts) and _says_mismatch(core):
        return []
    return [f"{host.index} is stuck: {status.sentence(core)[0]}"]


def _says_mismatch(core: Assembly) -> bool:
    """Hosts of another expect vote among themselves; this one names them and waits."""
    return any(p.mismatch for p in core.peers.values())


def _must_say_what_is_missing(host: Host, voters: int) -> list[str]:
    """L2: below the quorum the sentence has the numbers."""
    core = host.core
    assert core is not None
    text, _ = status.sentence(core)
    if core.decided is not None or core.overlaunched or not core.me.voter:
        return []
    host.world.witness.checks["L2: says what is missing"] += 1
    if core.counted_voters() != voters:
        return [f"{host.index} counts {core.counted_voters()} voters of {voters}"]
    if core.quorum > voters and f"waiting for {core.quorum - voters} more" not in text:
        return [f"{host.index} does not say what is missing: {text}"]
    known = [p for p in core.peers.values() if p.hello is not None and not p.mismatch]
    away = [p for p in known if not p.present(core.now)]
    if core.quorum > voters and not all(status.label(p) in text for p in away[:3]):
        return [f"{host.index} does not name who is away: {text}"]
    return []


def must_describe(host: Host) -> None:
    """The status never raises, and its sentence is never empty."""
    if host.core is not None:
        told = status.describe(host.core, 1_800_000_000.0)
        assert told["sentence"], "a status without a sentence"
        assert not host.core.disk_error or any(p["code"] == "DISK" for p in told["problems"])


def must_change_nothing(world: World, host: Host) -> None:
    """L3: a host that runs its role is started again; nothing that is decided changes."""
    must = world.witness.must
    host.crash()
    host.gone = False
    stored, authorities, issued = host.disk.stored, dict(host.disk.authorities), host.disk.issued
    before = dict(issued)
    world.count("started again")
    host.boot()
    world.run(world.now + 90.0)
    if host.node_id in world.copied:
        return  # the copy of its disk was started meanwhile
    after = host.disk
    same = (after.stored.register, after.stored.decided) == (stored.register, stored.decided)
    must(same, "L3: started again after ACTIVE, a host decided something else")
    must(after.stored.enrolled == stored.enrolled, "L3: started again, it enrolled anew")
    # A CA that is void may go only now: its disk was full before.
    valid = {e: f for e, f in authorities.items() if f == stored.enrolled_fingerprint}
    same = valid.items() <= after.authorities.items() <= authorities.items()
    must(same, "L3: started again, it made or lost a cluster CA")
    # Others may have enrolled meanwhile, while admission is open.
    kept = {where: after.issued.get(where) for where in before} == before
    must(kept, "L3: started again, it answered otherwise than before")
    must(runs(host), "L3: started again, it does not run any more")
