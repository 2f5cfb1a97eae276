"""``firstboot seal``: makes a machine ready to become an image of which others are booted (ADR 20).

What made it a host of its own goes: identity, votes, keys and certificates, its role with all
data, its document, the machine-id. The note that this is being done is written first and goes
last, so what a power cut interrupts is finished by the next ``seal`` or at the next boot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from firstboot import host, scrub, units, userdata
from firstboot.greeting import greet
from firstboot.payloads.rows import PAYLOADS
from firstboot.protocol.errors import FirstbootError, LocalError, UserError
from firstboot.protocol.model import Register
from firstboot.protocol.plan import (
    InstallContainer,
    MakeLink,
    Step,
    UseResolver,
    WriteBlock,
    WriteFile,
)

USAGE = 64
UNIT, TARGET = "firstboot.service", "firstboot.target"
# Directories and files that a payload's role fills, beside what its rows name one by one.
TREES = {
    "none": ("etc/firstboot/pki",),
    "etcd": ("etc/etcd", "var/lib/etcd", "var/lib/etcd-proxy"),
    "origin": ("etc/origin", "etc/etcd", "var/lib/etcd", "var/lib/origin"),
}
NEXT = (
    "This machine is sealed. What is not firstboot's, such as SSH host keys and cloud-init's own"
    " state, goes with `cloud-init clean --logs`. Then power it off and make the image of its disk;"
    " booted again, it is a new host itself."
)
_SEALED: dict[str, Any] = {
    "stage": "unconfigured",
    "state": "unconfigured",
    "sentence": "This machine is sealed: power it off and make the image of its disk.",
    "hint": "",
    "problems": [],
}
Say = Callable[[str], None]


def seal(root: Path, *, force: bool, say: Say) -> None:
    """Seal the machine at `root`; `say` is told each thing that is done.

    UserError if it is, or may become, a cluster's member, unless `force`.
    """
    if os.geteuid() != 0:
        raise UserError("only root can seal a machine", code=USAGE)
    directory = host.StateDirectory(root, working=False)
    if directory.sealing is None:
        if not force:
            _refuse_members(directory)
        if _live(root):
            _stop(directory, force=force)
        _note(root, directory)
    mark = directory.sealing or b""
    host.forget_machine_id(root)
    say("/etc/machine-id: the next boot makes a new one")
    _forget_document(root, say)
    scrub.scrub(root)
    finish(root, mark, say)
    if _live(root):
        units.Systemd().enable(UNIT)
        host.write_status(root, _SEALED)
        greet(root, _SEALED)
    say(NEXT)


def finish(root: Path, mark: bytes, say: Say) -> None:
    """Remove the role and the state. Also what is left to do at the boot after a power cut.

    A cloud has given the machine its new machine-id and document by then.
    """
    payload = str(_read(mark).get("payload", ""))
    if payload:
        _leave_role(root, payload, say)
    host.StateDirectory(root, working=False).erase()
    say("/var/lib/firstboot: identity, votes, keys and certificates removed")


def same_machine_id(mark: bytes, now: str) -> bool:
    """Whether a seal was cut short before this machine lost its machine-id."""
    return bool(now) and _read(mark).get("machine_id") == now


# ---------------------------------------------------------------- whether, and what


def _refuse_members(directory: host.StateDirectory) -> None:
    hint = "firstboot seal --force takes it out for good; no other host takes its place"
    loaded = directory.load()
    if loaded is None:
        return
    if isinstance(loaded, host.LostState) or loaded.register != Register() or loaded.decided:
        what = "a cluster's member" if getattr(loaded, "activated", False) else "about to be one"
        raise UserError(f"this host is {what}", hint=hint, code=USAGE)


def _stop(directory: host.StateDirectory, *, force: bool) -> None:
    """Stop the process that forms; it goes on if this host has just become a member."""
    units.Systemd().stop(UNIT, 60.0)
    if not force:
        try:
            _refuse_members(directory)
        except UserError:
            units.Systemd().start(UNIT, 60.0)
            raise


def _note(root: Path, directory: host.StateDirectory) -> None:
    loaded = directory.load()
    stored = loaded.stored if isinstance(loaded, host.LostState) else loaded
    started = stored is not None and (stored.activated or isinstance(loaded, host.LostState))
    note = {
        "payload": _payload(root) if started else "",
        "machine_id": host.look(root).machine_id,
    }
    directory.note_sealing(json.dumps(note).encode())


def _payload(root: Path) -> str:
    """Whose role this host runs: its last status says, else its document."""
    shown = host.read_status(root) or {}
    found = shown.get("payload")
    if found in PAYLOADS:
        return str(found)
    try:
        document = userdata.find(root)
    except FirstbootError as error:
        document, reason = None, str(error)
    else:
        reason = f"it is {userdata.explain(root)}" if document is None else ""
    if document is None:
        raise LocalError(f"it is not known what this host's role put here: {reason}")
    return document.config.payload


def _read(mark: bytes) -> dict[str, Any]:
    try:
        found = json.loads(mark)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _live(root: Path) -> bool:
    return root == Path("/") and Path("/run/systemd/system").is_dir()


# ---------------------------------------------------------------- what goes


def _forget_document(root: Path, say: Say) -> None:
    """An image's own settings are those in /usr; what lies in /etc came with the user-data."""
    for path in userdata.written(root):
        host.remove_durably(path)
        say(f"/{path.relative_to(root)}: removed")


def _leave_role(root: Path, payload: str, say: Say) -> None:
    rows = PAYLOADS[payload]
    steps = list(dict.fromkeys((*rows.master.steps, *rows.node.steps)))
    names = [s.name for s in reversed(steps) if isinstance(s, InstallContainer)]
    _leave_target(root)
    for name in dict.fromkeys(names):
        _remove_container(root, name, say)
    for step in steps:
        _undo(root, step)
    for tree in TREES[payload]:
        if (root / tree).exists():
            host.remove_tree(root / tree)
            say(f"/{tree}: removed")


def _leave_target(root: Path) -> None:
    if _live(root):
        systemd = units.Systemd()
        systemd.stop(TARGET, 60.0)
        systemd.disable(TARGET)
    host.remove_durably(root / f"etc/systemd/system/{TARGET}.d/10-role.conf")


def _remove_container(root: Path, name: str, say: Say) -> None:
    from firstboot import containers
    from firstboot.container_units import Units

    found = containers.info(root, name)
    if found is None or found.preinstalled:
        return
    host_units = Units(root)
    if found.unit:
        host_units.remove(found.unit)
        for link in _wanted(root, found.unit):
            host.remove_durably(link)
    for message in containers.uninstall(root, name).messages:
        say(message)
    host_units.reload()
    say(f"{name}: system container removed")


def _wanted(root: Path, unit: str) -> Iterator[Path]:
    """The links that start a unit at boot, where no systemd runs that could remove them."""
    links = (root / "etc/systemd/system").glob(f"*.wants/{unit}")
    yield from (link for link in links if link.is_symlink())


def _undo(root: Path, step: Step) -> None:
    """Take back one step's file. Paths that are filled in for a host lie below `TREES`."""
    match step:
        case WriteFile() if not step.keep and "$" not in step.path:
            host.remove_durably(root / step.path[1:])
        case WriteBlock():
            host.remove_block(root / step.path[1:])
        case MakeLink():
            host.remove_link(root / step.path[1:], step.target)
        case UseResolver():
            host.give_back_resolver(root, root / step.saved[1:])
