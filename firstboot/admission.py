"""A host that comes after admission has closed: `admit` on the master, `join` on that host.

`admit` is one more run of `Service` on the founding master, with a fresh token in the place of the
document's. Only this process's memory knows that admission is open: whatever it writes says closed,
so a crash at any moment leaves a cluster that is closed (ADR 9).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from firstboot import host, pki, units, userdata
from firstboot.journal import Journal
from firstboot.protocol import events, messages, status
from firstboot.protocol.errors import FirstbootError, LocalError, UserError
from firstboot.protocol.model import Channel, Stored, Value
from firstboot.publisher import Publisher
from firstboot.service import Service
from firstboot.userdata import Document

ADMITTED, NOT_ALL = 0, 2  # exit codes
USAGE = 64
UNIT = "firstboot.service"
MAX_SAID = 100  # lines, and some for each host that joins
TOLD_OTHERWISE = ("INCOMPLETE", "TOKEN_MISMATCH", "JOIN_NEEDS_TOKEN")
_NOTE = "# Written by `firstboot join`; removed once this host has joined.\n"


# ---------------------------------------------------------------- on the master


def admit(root: Path, hosts: int, window: float, say: Callable[[str], None]) -> int:
    """``firstboot admit``: let `hosts` more in, for `window` seconds at most; the exit code.

    `say` shows a person each line of progress; the first ones hold the token.
    """
    _closed_cluster(root)  # says best why not, also where there is nothing to lock
    directory = host.StateDirectory(root, working=False)
    with _alone(directory.path):
        document, stored, value = _closed_cluster(root)
        members = len(directory.issued(value.epoch))
        config = replace(
            document.config,  # `agreed` stays the document's: peers compare it
            join_extra=members + hosts - document.config.expect,
            join_window=window,
        )
        token = userdata.Secret(userdata.make_token(userdata.ONE_TIME))
        opened = replace(document, config=config, token=token)
        return asyncio.run(Admission(root, opened, stored, value, hosts, say).run())


def _closed_cluster(root: Path) -> tuple[Document, Stored, Value]:
    """This host's document, state and ACTIVE value, if it is a master that may admit."""
    if os.geteuid() != 0:
        raise UserError("only root can admit hosts", code=USAGE)
    document = userdata.find(root)
    if document is None:
        raise UserError(f"this host is {userdata.explain(root)}")
    directory = host.StateDirectory(root, working=False)
    key, loaded = directory.load_identity_key(), directory.load()
    stored = loaded.stored if isinstance(loaded, host.LostState) else loaded
    value = stored.decided if stored is not None else None
    if stored is None or key is None or value is None or not value.active:
        hint = "look at: firstboot status"
        raise UserError("this host is in no active cluster yet", hint=hint, code=USAGE)
    if value.founder.node_id != pki.node_id(key):
        where = f"{value.founder.name} at {value.founder.host}"
        message = f"only the master of cluster {document.config.cluster} admits hosts"
        raise UserError(message, hint=f"run this on {where}", code=USAGE)
    if not stored.closed:
        hint = (
            "a host with the same document joins without a one-time token; once all expected"
            " hosts are in, it closes when election.grace is over"
        )
        raise UserError("admission is still open", hint=hint, code=USAGE)
    if not directory.complete:
        hint = "wait for it: firstboot status --wait"
        raise UserError(f"{UNIT} is still at work on this host", hint=hint, code=USAGE)
    return document, stored, value


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep a second `admit` out; the lock ends with the process, however that ends."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError("firstboot admit is running on this host already") from None
        yield
    finally:
        os.close(handle)


class Admission(Service):
    """A run of the founding master that lets some more hosts in, and tells how far it is."""

    def __init__(
        self,
        root: Path,
        document: Document,
        stored: Stored,
        value: Value,
        hosts: int,
        say: Callable[[str], None],
    ) -> None:
        journal = Journal(under_systemd=False, stream=sys.stdout)
        super().__init__(root, document, journal, Publisher(root, journal))
        self.admits = value.founder.name
        self._before, self._value, self._wanted, self._say = stored, value, hosts, say
        self._members = {i.member.node_id for i in self.directory.issued(value.epoch)}
        self._admitted: set[str] = set()
        self._troubled: set[str] = set()  # providers whose error was told
        self._said: set[str] = set()

    async def run(self) -> int:
        """Until all are in, the window has ended, or somebody stops it; the exit code."""
        await super().run()
        count = len(self._admitted)
        if count:
            self._update_status()
        why = "" if self._done else "Stopped: " if self._stopped else "The time is over: "
        self._say(
            f"{why}{count} of {_hosts(self._wanted)} joined. Admission is closed again; the"
            " one-time token opens nothing any more."
        )
        return ADMITTED if self._done else NOT_ALL

    @property
    def _done(self) -> bool:
        """Whether enough are in, and nobody who was enrolled meanwhile is still on the way."""
        on_the_way = self._all_members() - self._members - self._admitted
        return len(self._admitted) >= self._wanted and not on_the_way

    def _all_members(self) -> set[str]:
        return set(self.core.roster.issued)

    # ------------------------------------------------------------ what differs from `run`

    async def _facts(self) -> host.Facts:
        wanted, master = self.document, self._value.founder
        # Only this address: a host with several may choose another one today.
        facts = host.facts(self.root, wanted.interface, master.host, wanted.port)
        if facts.endpoint is None:
            at = host.facts(self.root, wanted.interface, wanted.cidr, wanted.port).endpoint
            now = f"has the address {at.host}" if at else "has no address"
            raise LocalError(f"this host {now}, but the cluster knows its master at {master.host}")
        return facts

    def _memory(self, _facts: host.Facts) -> tuple[bytes, Stored, bool]:
        """The state as it is, re-opened; nothing is made anew or moved aside here."""
        key = self.directory.load_identity_key()
        if key is None:
            raise LocalError("the identity of this host is gone")
        return key, replace(self._before, closed=False, finished=False), True

    async def _start(self) -> None:
        await super()._start()
        ends = time.strftime("%H:%M:%S", time.localtime(time.time() + self._window))
        self._say(
            f"Cluster {self.document.config.cluster} has {_hosts(len(self._members))}."
            f" One-time token for {_hosts(self._wanted)} more, until {ends}:\n\n"
            f"    {self.document.token.reveal()}\n\n"
            "On each of them, with the same document: firstboot join"
        )

    @property
    def _window(self) -> float:
        return self.document.config.join_window

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.RunStep():
                self.put(events.StepDone(action.index))  # this host runs its role already
            case events.Persist():
                closed = replace(action.state, closed=True, finished=True)
                super()._carry_out(replace(action, state=closed))
            case events.Close():
                self.transport.set_channel(Channel.BOOTSTRAP, None)
            case events.Finish():
                self._leaving = True
            case events.Send():
                super()._carry_out(action)
                self._follow(action)
            case _:
                super()._carry_out(action)

    def _follow(self, sent: events.Send) -> None:
        """Tell what an answer means for the host that gets it; end when all are in."""
        issued = self.core.roster.issued.get(sent.node_id)
        match sent.message:
            case messages.Denied():
                peer = self.core.peers.get(sent.node_id)
                who = status.label(peer) if peer else sent.node_id[:8]
                self._once(f"{who} was refused: {sent.message.reason}.")
            case messages.Granted() if issued:
                self._once(f"{issued.member.name} at {issued.member.host} is enrolled.")
            case messages.Noted() if issued and sent.node_id not in self._before.confirmed:
                # Its Confirmed is on this disk, and it knows: nothing here waits for it any more.
                self._admitted.add(sent.node_id)
                self._once(f"{issued.member.name} at {issued.member.host} has joined.")
                if self._done:
                    self._leaving = True

    def _publish(self) -> dict[str, Any]:
        """What a person at this terminal should know; the host's status stays as it was."""
        for source, kind in self.core.strangers.items():
            if kind == "token":
                self._once(f"{source} holds another token; on that host: firstboot join")
        for problem in status.problems(self.core):
            if problem.code not in TOLD_OTHERWISE:
                self._once(" ".join(t for t in (problem.text, problem.hint) if t))
        for report in self.search.reports() if self.search else ():
            if report.error and report.name not in self._troubled:
                self._troubled.add(report.name)  # once: counts in such a text change all the time
                self._once(f"Discovery by {report.name}: {report.error}.")
        return {}

    def _update_status(self) -> None:
        """The master's last status, which outlives its processes, with the members it has now."""
        shown, members = host.read_status(self.root), len(self._all_members())
        if shown is None or not {"problems", "state", "members", "expect"} <= shown.keys():
            return
        shown["members"] = members
        if members >= shown["expect"]:
            shown["problems"] = [p for p in shown["problems"] if p["code"] != "INCOMPLETE"]
        if shown["state"] == "degraded" and not any(p["blocking"] for p in shown["problems"]):
            shown["state"] = "running"
        try:
            host.write_status(self.root, shown)
            kept = self.directory.path / "status.json"
            host.write_durably(kept, json.dumps(shown).encode(), 0o644)
        except FirstbootError as error:
            self._say(f"The status could not be brought up to date: {error}.")

    def _once(self, text: str) -> None:
        # Who holds the token, or forges multicast, must not fill this terminal.
        if text not in self._said and len(self._said) < MAX_SAID + 4 * self._wanted:
            self._said.add(text)
            self._say(text)


def _hosts(count: int) -> str:
    return "1 host" if count == 1 else f"{count} hosts"


# ---------------------------------------------------------------- on the late host


def join(root: Path, text: str) -> str:
    """``firstboot join``: keep that one-time token and start anew with it; what was done."""
    _check(text)
    document = userdata.find(root)
    if document is None:
        hint = "give it the document of the cluster it shall join"
        raise UserError(f"this host is {userdata.explain(root)}", hint=hint)
    loaded = host.StateDirectory(root, working=False).load()
    stored = loaded.stored if isinstance(loaded, host.LostState) else loaded
    if stored is not None and stored.activated:
        raise UserError(f"this host is in cluster {document.config.cluster} already", code=USAGE)
    path = root / userdata.JOIN
    if not path.parent.is_dir():
        host.make_directory(path.parent, 0o700)
    host.write_durably(path, f"{_NOTE}token: {text}\n".encode(), 0o600)
    found = userdata.find(root)
    if found is None or found.token.reveal() != text:
        host.remove_durably(path)
        raise UserError(
            f"a file that wins over /{userdata.JOIN} gives another token",
            hint=f"remove the token from {found.sources[-1] if found else 'it'}",
        )
    if root != Path("/") or not Path("/run/systemd/system").is_dir():
        return f"The one-time token is in /{userdata.JOIN}; it counts when firstboot starts anew."
    units.Systemd().start(UNIT, deadline=60.0, restart=True)
    return f"{UNIT} was restarted with the one-time token; follow it: firstboot status --wait"


def _check(text: str) -> None:
    hint = "take the one that `firstboot admit` shows on the master"
    try:
        userdata.check_token(text)
    except UserError as error:
        raise UserError(error.message, hint=hint, code=USAGE) from None
    if not userdata.is_one_time(text):
        raise UserError("this is a document's token, not a one-time token", hint=hint, code=USAGE)
