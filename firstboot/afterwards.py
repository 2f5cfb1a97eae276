"""What ``firstboot run`` does on a host that is done: it looks whether all is still as it was.

At every boot after the first, beside the role's units and without holding them up. It is loaded
instead of the formation's code, so it costs a boot little.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from firstboot import host
from firstboot.greeting import greet
from firstboot.journal import WARNING, Journal
from firstboot.protocol.errors import FirstbootError

CLONE_HINT = (
    "To make this copy a new host: `firstboot seal --force`, `cloud-init clean`, reboot. If the"
    " machine was only moved or restored, and is not there twice: rm"
    " /var/lib/firstboot/machine.json, reboot."
)


def run(root: Path) -> bool:
    """Look, and tell; whether that was all, so that nothing is to be formed here."""
    journal = Journal(under_systemd="NOTIFY_SOCKET" in os.environ, stream=sys.stderr)
    journal.ready()
    mark = host.StateDirectory(root, working=False).sealing
    if mark is not None:
        from firstboot import seal

        seal.finish(root, mark, journal.say)
        if seal.same_machine_id(mark, host.look(root).machine_id):
            text = "The seal was cut short before the machine-id was reset: run it again."
            journal.say(text, priority=WARNING)
        return False
    try:
        _look(root, journal)
    except FirstbootError as error:
        journal.say(f"{error}.", priority=WARNING)
    return True


def _look(root: Path, journal: Journal) -> None:
    from firstboot import scrub

    exposed = scrub.scrub(root)
    directory = host.StateDirectory(root, working=False)
    changed = directory.moved_from(host.look(root))
    before = host.read_status(root) or {}
    found = [p for p in before.get("problems", ()) if p.get("code") != "CLONE"]
    if changed:
        text = f"This disk was copied from another machine: {changed}."
        problem = {"code": "CLONE", "text": text, "hint": CLONE_HINT, "blocking": True}
        found.insert(0, problem)
    state = "degraded" if any(p["blocking"] for p in found) else "running"
    now: dict[str, Any] = {**before, "problems": found, "exposed": exposed}
    if found != before.get("problems"):
        now["state"] = state
    if before:
        greet(root, now)
    if before and now != before:
        _tell(root, directory, now, before, journal)


def _tell(
    root: Path,
    directory: host.StateDirectory,
    now: dict[str, Any],
    before: dict[str, Any],
    journal: Journal,
) -> None:
    host.write_status(root, now)
    host.write_durably(directory.path / "status.json", json.dumps(now).encode(), 0o644)
    journal.report(now, before)
