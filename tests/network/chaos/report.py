"""What a campaign saw, for a person and for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.network.chaos.formation import Outcome
from tests.network.chaos.plan import Plan
from tests.network.chaos.verdict import Verdict


@dataclass
class Report:
    """`healed` holds seconds from the end of the last fault to all running, of each run."""

    runs: int = 0
    clean: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    timely: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    ordeals: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    healed: list[float] = field(default_factory=list)
    events: int = 0
    late: list[float] = field(default_factory=list)
    violations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, plan: Plan, outcome: Outcome, verdict: Verdict, kept: str = "") -> None:
        """Count one run; `kept` is where its files are, should it be a bad one."""
        found = verdict.findings
        self.runs += 1
        self.clean += not verdict.wrong
        self.events += verdict.events
        self.faults += outcome.faults
        self.timely += outcome.timely
        self.checks += found.checks
        self.excused += verdict.excused
        self.ordeals += verdict.ordeals
        self.shapes[f"{plan.hosts} hosts"] += 1
        self.shapes.update(_traits(plan))
        self.outcomes[_outcome(outcome, verdict)] += 1
        if outcome.running:
            self.healed.append(round(outcome.ended - outcome.peace, 2))
            if plan.late_multicast:
                self.late.append(self.healed[-1])
        if verdict.wrong:
            what = {"seed": plan.seed, "plan": str(plan), "wrong": verdict.wrong, "kept": kept}
            self.violations.append(what)

    def broken(self, plan: Plan, reason: str, kept: str) -> None:
        """Count a run that the campaign itself could not finish."""
        self.runs += 1
        what = {"seed": plan.seed, "plan": str(plan), "wrong": [reason], "kept": kept}
        self.violations.append(what)

    def text(self) -> str:
        """The report as a person reads it."""
        lines = [
            f"{self.runs} runs, {self.clean} as they must be, {len(self.violations)} violations",
            f"runs: {_counts(self.shapes)}",
            f"faults injected: {_counts(self.faults)}",
            f"of those before all ran: {_counts(self.timely)}",
            f"before ACTIVE: {_counts(self.ordeals)}",
            f"came to: {_counts(self.outcomes)}",
            f"invariant checks: {_counts(self.checks)}, over {self.events} recorded events",
            f"from the end of faults to all running, s: {_spread(self.healed)}",
            f"from when multicast works to all running, s: {_spread(self.late)}",
            f"hosts that rightly wait, saying so: {_counts(self.excused) or 'none'}",
        ]
        for found in self.violations:
            lines += ["", *found["wrong"], found["plan"], f"  kept in {found['kept']}"]
        return "\n".join(lines)

    def json(self) -> str:
        """The same for programs."""
        return json.dumps(vars(self), default=dict, indent=1)


def _traits(plan: Plan) -> list[str]:
    traits = {
        "three masters": plan.masters == 3,
        "strict": plan.strict,
        "short grace": plan.grace < 10,
        "one never launched": plan.hosts < plan.expect,
        "one surplus": plan.hosts > plan.expect,
        "one never comes back": plan.mortal,
        "a stranger": plan.stranger,
        f"discovery {plan.discovery}": True,
    }
    return [name for name, holds in traits.items() if holds]


def _outcome(outcome: Outcome, verdict: Verdict) -> str:
    if outcome.running:
        return "one cluster, all run"
    if verdict.findings.split:
        return "a split outside the promise, told"
    return "one cluster, some rightly wait" if verdict.findings.active else "no cluster"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items()))


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    half, most = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    return f"p50 {half:.1f}, p95 {most:.1f}, longest {ordered[-1]:.1f} (of {len(ordered)})"
