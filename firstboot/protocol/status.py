"""What a host tells about itself: one sentence, what is missing, since when, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from firstboot.protocol import plan
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.enrolment import full
from firstboot.protocol.model import NEVER, Channel, Member, Stage
from firstboot.protocol.peers import Peer
from firstboot.protocol.voter import MASTER_SILENT

SCHEMA = 1
MAX_LISTED = 50  # peers in a status; the rest are counted
MAX_DIALS = 1000  # addresses that are looked at to tell how dialling goes


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a person should know: a stable code, one sentence, the remedy.

    With `blocking` the host is degraded or cannot go on by itself.
    """

    code: str
    text: str
    hint: str = ""
    blocking: bool = True


def describe(core: Assembly, wall_offset: float, gate: str = "") -> dict[str, Any]:
    """The public status: no secret in it. `wall_offset` is Unix time minus monotonic time.

    `gate` is why the health gate that this host waits at is still shut.
    """
    text, hint = sentence(core)
    if gate and core.stage is Stage.STARTING:
        text = f"{text.rstrip('.')}: {gate.rstrip('.')}."
    found = problems(core)
    value = core.decided
    return {
        "schema": SCHEMA,
        "cluster": core.config.cluster,
        "formation": core.config.formation,
        "stage": core.stage.value,
        "state": _state(core, found),
        "sentence": text,
        "hint": hint,
        "role": core.role.value if core.role else None,
        "name": core.stored.enrolled.name if core.stored.enrolled else core.me.name,
        "node_id": core.me.node_id,
        "address": core.me.endpoint.host,
        "port": core.me.endpoint.port,
        "cluster_id": value.cluster_id if value else None,
        "active": bool(value and value.active),
        "epoch": value.epoch if value else 0,
        "master": _member(value.founder) if value else None,
        "masters": [m.name for m in value.masters] if value else [],
        "expect": core.config.expect,
        "quorum": core.quorum,
        "present": core.counted_voters(),
        "grace_ends": _grace_ends(core, wall_offset),
        "members": len(core.roster.issued) if core.founder else (value.members if value else 0),
        "peers": [_peer(core, p, wall_offset) for p in islice(core.peers.values(), MAX_LISTED)],
        "peers_total": len(core.peers),
        "addresses_dropped": core.book.dropped,
        "strangers": {"count": core.stranger_count, "sources": dict(core.strangers)},
        "problems": [
            {"code": p.code, "text": p.text, "hint": p.hint, "blocking": p.blocking} for p in found
        ],
        "steps": _steps(core),
        "units": [s.unit for s in core.plan or () if isinstance(s, plan.StartUnit) and s.lasting],
    }


def looks_again(core: Assembly, wall_offset: float) -> float | None:
    """When all providers are asked again, Unix seconds; None if never."""
    at = core._announce_at
    return at + wall_offset if core.open and at < NEVER else None


def unreached(core: Assembly, provider: str) -> dict[str, int]:
    """Why nobody was met at any address that provider named, each reason with its number of times.

    Empty if somebody was, or nothing is known yet.
    """
    reasons: dict[str, int] = {}
    for contact in islice(core.book.contacts.values(), MAX_DIALS):
        if provider in contact.via:
            if contact.node_id:
                return {}
            if contact.error:
                reasons[contact.error] = reasons.get(contact.error, 0) + 1
    return reasons


def _state(core: Assembly, found: list[Problem]) -> str:
    if core.stage is Stage.FAILED:
        return "failed"
    if any(p.blocking for p in found):
        return "degraded"
    return "running" if core.stage is Stage.RUNNING else "waiting"


def _grace_ends(core: Assembly, wall_offset: float) -> float | None:
    """When the present majority goes ahead without the missing hosts, Unix seconds."""
    since = core.majority_since
    waiting = core.stage is Stage.DISCOVERING and core.in_grace and not core.config.strict
    return since + core.config.grace + wall_offset if waiting and since is not None else None


def _member(member: Member) -> dict[str, str]:
    return {"name": member.name, "node_id": member.node_id, "address": member.host}


def _peer(core: Assembly, peer: Peer, wall_offset: float) -> dict[str, Any]:
    hello = peer.hello
    endpoint = hello.endpoint if hello else None
    via = core.book.contacts[endpoint].via if endpoint in core.book.contacts else set[str]()
    return {
        "name": hello.name if hello else "",
        "node_id": peer.node_id,
        "address": endpoint.host if endpoint else "",
        "state": _peer_state(core, peer),
        "stage": hello.stage.value if hello else "",
        "since": peer.since + wall_offset,
        "via": sorted(via) or ["dialled us"],
    }


def _peer_state(core: Assembly, peer: Peer) -> str:
    if peer.present(core.now):
        return "present"
    if peer.mismatch:
        return "mismatch"
    # Once they run their role, hosts end their process and hang up: nothing is wrong then.
    return "left" if core.stage is Stage.RUNNING else "away"


def label(peer: Peer) -> str:
    """How a peer is called in a sentence: name and address, and its id where names repeat."""
    if peer.hello is None:
        return peer.node_id[:8]
    return f"{peer.hello.name}[{peer.node_id[:8]}] at {peer.hello.endpoint.host}"


def _steps(core: Assembly) -> list[dict[str, str]]:
    rows = []
    for index, step in enumerate(core.plan or ()):
        state = "done" if index < core.steps_done else "waiting"
        if index == core.steps_done:
            state = f"failed {core.step_failures} times" if core.step_error else "running"
        rows.append({"what": say(step), "state": state})
    return rows


def say(step: plan.Step) -> str:
    """A step of the plan in words."""
    match step:
        case plan.GetCertificates():
            return "get this host's certificates from the master"
        case plan.MakeDirectory() | plan.MakeLink():
            return f"make {step.path}"
        case plan.WriteFile() | plan.WriteBlock():
            return f"write {step.path}"
        case plan.SetKernel():
            return f"set {step.key}"
        case plan.UseResolver():
            return f"let {step.address} resolve names"
        case plan.InstallContainer():
            return f"install system container {step.name}"
        case plan.StartUnit():
            return f"start {step.unit}"
        case plan.Probe():
            return f"wait for {step.url}"
        case plan.CreateObject():
            return f"create {step.name}"
        case plan.ReachTarget():
            return "reach firstboot.target"


def milestone(core: Assembly) -> str:
    """The unit this host starts, or the gate it waits at, right now; "" at any other step."""
    steps, at = core.plan or (), core.steps_done
    if core.stage is not Stage.STARTING or at >= len(steps):
        return ""
    known = isinstance(steps[at], plan.StartUnit | plan.Probe | plan.CreateObject)
    return say(steps[at]) if known else ""


# ---------------------------------------------------------------- one sentence


def sentence(core: Assembly) -> tuple[str, str]:
    """What this host does or waits for, and what a person can do about it."""
    match core.stage:
        case Stage.FAILED:
            return "This host stands still: its identity is used by another host too.", _CLONE
        case Stage.DISCOVERING:
            return _discovering(core)
        case Stage.DECIDING:
            if core.active_seen:
                return "The cluster is already active; looking for its master.", ""
            return _deciding(core)
        case Stage.ENROLLING:
            return _enrolling(core)
        case Stage.SIGNING:
            return _signing(core)
        case Stage.STARTING:
            return _starting(core)
        case Stage.RUNNING:
            return _running(core)


_ADMIT = (
    "`firstboot admit` must be running there; if it has ended, run it again, then `firstboot join`"
    " here."
)
_CLONE = "If its disk was copied from another host, remove /var/lib/firstboot and reboot."


def _present(core: Assembly) -> str:
    return f"{core.counted_voters()} of {core.config.expect} hosts are present"


def _discovering(core: Assembly) -> tuple[str, str]:
    if core.me.late:
        text = "This host holds a one-time token; looking for the master that lets it in."
        return text, f"`firstboot admit` must be running on it; {_ports(core)}"
    missing = core.quorum - core.counted_voters()
    text = f"{_present(core)}; waiting for {missing} more"
    if core.quorum > core.config.expect:
        text += f", since {len(core.voters)} identities were seen and {core.quorum} must agree"
    listed = islice(core.peers.values(), MAX_LISTED)
    known = [p for p in listed if p.hello is not None and not p.mismatch]
    away = [label(p) for p in known if not p.present(core.now)]
    if away:
        text += f" (seen before, now away: {', '.join(away[:3])})"
    since = core.majority_since
    if since is not None and core.in_grace and not core.config.strict:
        grace = f"{core.config.grace:.0f} s after a majority was first together"
        text += f"; {grace}, it forms the cluster without them"
    hint = (
        f"Boot the missing hosts with this same document; {_ports(core)} If the cluster exists"
        " already: `firstboot admit` on its master, then `firstboot join` here."
    )
    return text + ".", hint


def _ports(core: Assembly) -> str:
    port = core.me.endpoint.port
    return f"between hosts UDP 5353 (mDNS) and TCP {port} must be open."


def _deciding(core: Assembly) -> tuple[str, str]:
    hellos = [p.hello for p in core.company if p.hello is not None]
    able = sum(h.eligible for h in hellos) + core.me.eligible
    missing = core.config.masters - able
    if missing > 0:
        text = f"{_present(core)}, but {able} of {core.config.masters} masters can be named"
        hint = "Boot the missing hosts, or launch all anew with fewer masters or election.never."
        return f"{text}; waiting for {missing} more.", hint
    return f"{_present(core)}; electing a master.", ""


def _enrolling(core: Assembly) -> tuple[str, str]:
    value = core.decided
    master = f"{value.founder.name} at {value.founder.host}" if value else "the master"
    if core.enrolled:
        text = f"Enrolled; waiting for {master} to report that the cluster is active."
        return text, _ADMIT if core.me.late else ""
    text = f"The master is {master}; waiting for it to sign this host's certificates."
    return text, _ADMIT if core.me.late else ""


def _signing(core: Assembly) -> tuple[str, str]:
    issued = core.roster.issued
    text = f"This host is the master; {len(issued)} of {core.config.expect} hosts are enrolled"
    listed = islice(core.peers.values(), MAX_LISTED)
    waiting = [label(p) for p in listed if p.node_id not in issued]
    if waiting:
        text += f"; waiting for {', '.join(waiting[:3])}"
    if core.present_voters() < core.quorum:
        text += f"; {core.present_voters()} voters of the {core.quorum} it needs are present"
    return text + ".", ""


def _starting(core: Assembly) -> tuple[str, str]:
    if core.plan is None or core.steps_done >= len(core.plan):
        return "The cluster is active; preparing this host's role.", ""
    what, total = say(core.plan[core.steps_done]), len(core.plan)
    text = f"The cluster is active; step {core.steps_done + 1} of {total}: {what}"
    return text + (", which failed and is tried again." if core.step_error else "."), ""


def _running(core: Assembly) -> tuple[str, str]:
    value = core.decided
    text = f"Running as {core.role} of cluster {core.config.cluster}"
    text += f" ({value.cluster_id[:8]})" if value else ""
    if core.founder and core.open:
        enrolled, expect = len(core.roster.issued), core.config.expect
        unconfirmed = enrolled - 1 - len(core.confirmed & core.roster.issued.keys())
        if full(core.config, enrolled) and not unconfirmed:
            stays = f"for {core.config.grace:.0f} s it tells hosts launched beyond them so"
            return f"{text}; all {enrolled} hosts are in, and {stays}.", ""
        if enrolled < expect or not unconfirmed:
            return f"{text}; {enrolled} of {expect} hosts enrolled, admission is open.", ""
        return f"{text}; {unconfirmed} members have not reported back yet.", ""
    return f"{text}.", ""


# ---------------------------------------------------------------- problems


def problems(core: Assembly) -> list[Problem]:
    """Everything a person should know at this moment, gravest first."""
    return [*_fatal(core), *_local(core), *_about_peers(core)]


def _fatal(core: Assembly) -> list[Problem]:
    found = []
    if core.failure == "DUPLICATE_IDENTITY":
        text = "Another live host has the same identity key; both stand still."
        found.append(Problem(core.failure, text, _CLONE))
    if core.conflict is not None and core.decided is not None:
        text = (
            f"Two active clusters exist in this formation: {core.decided.cluster_id} (this"
            f" host's) and {core.conflict.cluster_id} of {core.conflict.founder.host}."
        )
        hint = "Nothing was merged or deleted; start the hosts of one of them over (README)."
        found.append(Problem("CONFLICT", text, hint))
    if core.overlaunched:
        text = (
            f"{len(core.voters)} hosts hold this document but expect is {core.config.expect}:"
            " too many to be sure of one cluster, so none is formed."
        )
        hint = "Launch all hosts anew, with the right expect."
        found.append(Problem("OVERLAUNCHED", text, hint))
    if not core.me.voter and not core.me.late:
        text = "This host lost its state, so it votes no more and only joins."
        hint = "Nothing to do while the others are a majority."
        found.append(Problem("LOST_STATE", text, hint, blocking=False))
    return found


def _local(core: Assembly) -> list[Problem]:
    found = []
    if core.disk_error:
        text = (
            f"State cannot be written, so this host answers nobody: {core.disk_error.rstrip('.')}."
        )
        found.append(Problem("DISK", text, "Free space under /var/lib/firstboot."))
    if core.denied:
        hint = "The master is asked again until it agrees."
        found.append(Problem("DENIED", f"Enrolment was refused: {core.denied.rstrip('.')}.", hint))
    if core.step_error is not None:
        error = core.step_error
        text = f"{error.reason.rstrip('.')} (it is tried again)."
        found.append(Problem("STEP_FAILED", text, error.detail))
    return found


def _about_peers(core: Assembly) -> list[Problem]:
    found = []
    tokens = sorted(s for s, kind in core.strangers.items() if kind in ("token", "admits"))
    admits = sorted(s for s, kind in core.strangers.items() if kind == "admits")
    if admits and _may_be_late(core):
        found.append(_join_problem(core, admits))
    elif tokens:
        found.append(_token_problem(core, tokens))
    for peer in core.mismatched.values():
        if Channel.BOOTSTRAP in peer.channels:
            text = f"{label(peer)} {peer.mismatch}; the two cannot form one cluster."
            found.append(Problem("CONFIG_MISMATCH", text, "Give all hosts the same document."))
    value = core.decided
    if value is None or core.stage is Stage.FAILED:
        return found
    silent = core.now - core.master_heard
    if value.active and not core.founder and not core.noted and silent > MASTER_SILENT:
        text = f"The master {value.founder.name} at {value.founder.host} has fallen silent."
        found.append(Problem("MASTER_LOST", text, "No other is elected; bring it back."))
    if core.founder and value.active and len(core.roster.issued) < core.config.expect:
        missing = core.config.expect - len(core.roster.issued)
        text = f"The cluster is active without {missing} of {core.config.expect} expected hosts."
        hint = "They can still join: boot them with this document."
        if core.admission_over:
            hint = "Admission has ended; to let them in: `firstboot admit` here."
        found.append(Problem("INCOMPLETE", text, hint, blocking=not core.admission_over))
    return found


def _may_be_late(core: Assembly) -> bool:
    """Whether this host is in no cluster, and meets nobody who is."""
    met = (p.hello.decided for p in core.company if p.hello is not None)
    return not core.enrolled and not any(value is not None and value.active for value in met)


def _join_problem(core: Assembly, masters: list[str]) -> Problem:
    """What a stranger says can be a lie: this is a hint for people and changes nothing else."""
    where = ", ".join(masters[:3])
    cluster = core.config.cluster
    text = f"Cluster {cluster} is active already; {where} lets hosts in by a one-time token."
    if core.me.late:
        text = f"This host's one-time token is not the one that {where} lets hosts in with."
    hint = (
        "Run `firstboot join` here, with the token that `firstboot admit` shows on that master."
        " If it has ended there, run it again."
    )
    return Problem("JOIN_NEEDS_TOKEN", text, hint, blocking=not len(core.company))


def _token_problem(core: Assembly, sources: list[str]) -> Problem:
    where = ", ".join(sources[:3]) + (", …" if len(sources) > 3 else "")
    hint = "Give all hosts the same token; firstboot never shows it."
    if core.decided is None:
        hint += " A cluster that is active already: `firstboot admit` there, `firstboot join` here."
    alone = core.decided is None and core.present_voters() <= 1
    if alone:
        text = f"This host's token does not match that of {where}, of the same formation."
    else:
        text = f"A host of the same formation holds another token: {where}."
    return Problem("TOKEN_MISMATCH", text, hint, blocking=alone)
