"""Whether what a run came to is what is promised: who must run, and who may wait, saying so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from firstboot.protocol import events
from firstboot.protocol.model import Value
from tests.network.chaos.check import Findings, check
from tests.network.chaos.evidence import Life, Trail, lives, trail
from tests.network.chaos.formation import Outcome

# What a host is told that is refused for good: it was re-created, it moved, or it is one too many.
REFUSALS = (
    "belongs to another member",
    "with another address",
    "all expected hosts are enrolled",
    "admission is closed",
    "with another key",
)


@dataclass
class Verdict:
    """`excused` are the hosts that rightly do not run, and why; by reason."""

    findings: Findings
    wrong: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    ordeals: Counter[str] = field(default_factory=Counter)
    events: int = 0


def judge(outcome: Outcome) -> Verdict:
    """Look at everything the run left behind."""
    disks = list(lives(outcome.directory))
    everything = trail(disks)
    findings = check(everything, disks, outcome.told)
    verdict = Verdict(
        findings, ordeals=_ordeals(everything, findings), events=len(everything.moments)
    )
    verdict.wrong += findings.wrong
    verdict.wrong += outcome.exits + outcome.leaks
    stranger = outcome.statuses.pop("stranger", {})
    if stranger.get("cluster_id") or stranger.get("present", 1) > 1:
        verdict.wrong.append(f"I10: a holder of another token got in: {stranger['sentence']}")
    if outcome.plan.late_multicast and not outcome.running:
        took = outcome.ended - outcome.peace
        verdict.wrong.append(f"L1: not running {took:.1f} s after multicast worked")
    for name in outcome.up:
        _host(outcome, name, everything, disks, verdict)
    return verdict


def _ordeals(everything: Trail, findings: Findings) -> Counter[str]:
    """How hard it was: what happened before the first host knew of ACTIVE, in counts."""
    known = [m.at for m in everything.moments if _is_active(m.decided)]
    active = min(known, default=float("inf"))
    before = [m for m in everything.moments if m.at < active]
    kinds = Counter(type(m.event).__name__ for m in before)
    said = Counter(
        type(m.event.message).__name__
        for m in before
        if isinstance(m.event, events.MessageReceived)
    )
    decided = [m.chosen for m in everything.moments if m.chosen is not None]
    waking = {
        w.node_id: min(v.at for v in everything.wakings if v.node_id == w.node_id)
        for w in everything.wakings
    }
    return Counter(
        {
            "restarts": sum(waking[w.node_id] < w.at < active for w in everything.wakings),
            "connections lost": kinds["Disconnected"],
            "ballots refused": said["Refused"],
            "masters replaced": max((v.epoch for _, v in decided), default=1) - 1,
            "runs outside the promise, 2q <= V": 2 * findings.quorum <= findings.voters,
            "runs decided by fewer than expect": any(
                q < everything.config.expect for q, _ in decided
            ),
        }
    )


def _host(
    outcome: Outcome, name: str, everything: Trail, disks: list[Life], verdict: Verdict
) -> None:
    status = outcome.statuses[name]
    if status.get("stage") == "running":
        return
    sentence = status.get("sentence") or ""
    if not sentence or status.get("state") not in ("waiting", "degraded"):
        verdict.wrong.append(f"L1: {name} is {status.get('state')} and says {sentence!r}")
        return
    reason = _excuse(outcome, status, everything, disks, verdict.findings)
    if reason:
        verdict.excused[reason] += 1
    else:
        verdict.wrong.append(f"L1: {name} is stuck: {status.get('stage')}: {sentence}")


def _excuse(
    outcome: Outcome,
    status: dict[str, Any],
    everything: Trail,
    disks: list[Life],
    findings: Findings,
) -> str:
    codes = {p["code"] for p in status.get("problems", ())}
    if not findings.active:
        return _no_quorum(outcome, status, codes, findings)
    if findings.split:
        return "a split outside the promise"
    denied = [p["text"] for p in status.get("problems", ()) if p["code"] == "DENIED"]
    if any(text in d for text in REFUSALS for d in denied):
        return "refused: re-created, moved or surplus"
    active = next(m.decided for m in reversed(everything.moments) if _is_active(m.decided))
    assert active is not None
    return _without_master(outcome, status, active, everything, disks)


def _is_active(value: Value | None) -> bool:
    return value is not None and value.active


def _no_quorum(
    outcome: Outcome, status: dict[str, Any], codes: set[str], findings: Findings
) -> str:
    """Fewer than must agree are up: they must wait, and say for how many (L2)."""
    plan, voters = outcome.plan, findings.voters
    majority = max(plan.expect // 2 + 1, voters // 2 + 1)
    needed = plan.expect if plan.strict else majority
    if voters > 2 * needed - 1 and "OVERLAUNCHED" in codes:
        return "overlaunched"
    short = len(outcome.up) < max(needed, plan.masters)
    return "no quorum" if short and "waiting for" in status["sentence"] else ""


def _without_master(
    outcome: Outcome,
    status: dict[str, Any],
    active: Value,
    everything: Trail,
    disks: list[Life],
) -> str:
    """The cluster is active, but its master can do nothing for this host any more."""
    founder = active.founder
    last = {w.life: w for w in everything.wakings}
    alive = [n for n in outcome.up if n in last and last[n].node_id == founder.node_id]
    if not alive:
        return "the master is gone after ACTIVE"
    home = outcome.statuses[alive[0]]
    if home.get("address") != founder.host:
        return "the master moved after ACTIVE"
    state = next((d.state for d in disks if d.name == alive[0]), None)
    if state is not None and state.closed and status.get("node_id") not in state.confirmed:
        return "admission closed"
    return ""
