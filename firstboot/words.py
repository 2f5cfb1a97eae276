"""Status and timeline as a person reads them, at any phase and after a power cycle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from firstboot import host, units, userdata
from firstboot.protocol.errors import FirstbootError

ENDED = ("failed", "unconfigured")
NEEDED = {"stage", "state", "sentence", "problems"}  # what every status has, of any version


def current(root: Path) -> dict[str, Any]:
    """The newest status this host has, with the state its units have right now."""
    shown = host.read_status(root)
    if shown is None or not shown.keys() >= NEEDED:
        return _never_ran(root)
    if root == Path("/") and shown.get("units"):
        shown["unit_states"] = _unit_states(shown["units"])
        broken = [n for n, s in shown["unit_states"].items() if s != "active"]
        if shown["state"] == "running" and broken:
            shown["state"] = "degraded"
            shown["sentence"] = f"{shown['sentence'].rstrip('.')}, but not all of it is up."
            for name in broken:
                text = f"{name} is {shown['unit_states'][name]}."
                hint = f"Look at: journalctl -u {name}"
                problem = {"code": "UNIT", "text": text, "hint": hint, "blocking": True}
                shown["problems"].append(problem)
    return shown


def _never_ran(root: Path) -> dict[str, Any]:
    try:
        configured = userdata.find(root) is not None
        text = "firstboot has not run on this host yet." if configured else userdata.explain(root)
    except FirstbootError as error:
        configured, text = True, str(error)
    state = "waiting" if configured else "unconfigured"
    if text.startswith("not configured"):
        text = f"This host is {text}"
    hint = "Look at: systemctl status firstboot.service" if configured else ""
    return {
        "stage": state,
        "state": state,
        "sentence": text if text.endswith(".") else f"{text}.",
        "hint": hint,
        "problems": [],
    }


def _unit_states(names: list[str]) -> dict[str, str]:
    systemd = units.Systemd()
    states = {}
    for name in names:
        try:
            states[name] = systemd.state(name).active
        except FirstbootError as error:
            states[name] = str(error)
    return states


def exit_code(shown: dict[str, Any]) -> int:
    """0 running or not configured, 1 failed, 2 degraded or still waiting."""
    return {"running": 0, "unconfigured": 0, "failed": 1}.get(shown["state"], 2)


def may_change(shown: dict[str, Any]) -> bool:
    """Whether waiting longer makes sense: a finished host's units are systemd's matter."""
    return shown["stage"] not in (*ENDED, "running")


def page(shown: dict[str, Any]) -> str:
    """The status on one page, the sentence first."""
    lines = [shown["sentence"]]
    if shown.get("since") and shown["stage"] not in ENDED:
        lines[0] += f"  (for {_duration(time.time() - shown['since'])})"
    if shown.get("hint"):
        lines.append(f"  {shown['hint']}")
    lines += _facts(shown)
    for peer in shown.get("peers", ())[:10]:
        where = f"{peer['address']:15}  {peer['state']:8}  {peer['stage']:11}"
        lines.append(f"  peer       {peer['name']:20} {where} via {', '.join(peer['via'])}")
    lines += _discovery(shown)
    for step in shown.get("steps", ()):
        if step["state"] != "done":
            lines.append(f"  step       {step['what']}: {step['state']}")
    for name, state in shown.get("unit_states", {}).items():
        lines.append(f"  unit       {name}: {state}")
    for place in shown.get("exposed", ()):
        lines += [f"  token      still in {place['where']}", f"             {place['remedy']}"]
    lines += [f"  warning    {text}" for text in shown.get("warnings", ())]
    for problem in shown["problems"]:
        if problem["text"] == shown["sentence"]:
            continue
        lines.append(f"  problem    {problem['code']}: {problem['text']}")
        lines += [f"             {line}" for line in problem["hint"].splitlines()]
    return "\n".join(lines)


def _facts(shown: dict[str, Any]) -> list[str]:
    rows = []
    if shown.get("cluster"):
        rows.append(("cluster", f"{shown['cluster']}  {shown.get('cluster_id') or ''}".rstrip()))
    if shown.get("node_id"):
        role = shown.get("role") or "no role yet"
        rows.append(("this host", f"{shown['name']}  {shown['address']}  {role}"))
    if shown.get("grace_ends"):
        rows.append(("grace", f"ends in {_duration(shown['grace_ends'] - time.time())}"))
    master = shown.get("master")
    if master:
        rows.append(("master", f"{master['name']}  {master['address']}"))
    for certificate in shown.get("certificates", ()):
        day = time.strftime("%Y-%m-%d", time.gmtime(certificate["not_after"]))
        rows.append(("valid to", f"{day}  {certificate['profile']} certificate"))
    return [f"  {name:10} {text}" for name, text in rows]


def _discovery(shown: dict[str, Any]) -> list[str]:
    """A line for each provider, and one more for what to open or grant, should it need that.

    Once this host runs its role, only those that found somebody: the others were not needed.
    """
    running, lines = shown["stage"] == "running", []
    for provider in shown.get("providers", ()):
        parts = [f"{provider['name']}: {provider['found']} found"]
        if running:
            lines += [f"  discovery  {parts[0]}"] if provider["found"] else []
            continue
        if provider.get("error"):
            parts += [text for text in (provider.get("detail"), provider["error"]) if text]
        if provider.get("next_try"):
            left = provider["next_try"] - time.time()
            parts.append(f"next try in {_duration(left)}" if left > 0.5 else "tries now")
        lines.append(f"  discovery  {'; '.join(parts)}")
        if provider.get("error") and provider.get("remedy"):
            lines.append(f"             {provider['remedy']}")
    return lines


def timeline(shown: dict[str, Any]) -> str:
    """Each phase, how long after the start it began, and how long it took.

    Below a phase, indented, the units and gates that were its parts.
    """
    marks = shown.get("timeline") or []
    if not marks:
        return f"{shown['sentence']}  No phase was recorded."
    start = marks[0]["at"]
    lines = ["   at (s)  took (s)  phase"]
    for index, mark in enumerate(marks, 1):
        part = "part_of" in mark
        following = next((m for m in marks[index:] if part or "part_of" not in m), None)
        took = f"{following['at'] - mark['at']:8.3f}" if following else "        "
        lines.append(f"{mark['at'] - start:9.3f}  {took}  {'  ' * part}{mark['what']}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
