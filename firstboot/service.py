"""The loop: take an event, ask Assembly, carry out its actions.

One inbox, one place that calls the core, one place that calls the adapters. Whatever blocks (the
disk, systemd, container tools) runs in a worker thread and answers with an event.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from firstboot import host, named, pki, userdata, whereabouts
from firstboot.carrier import Carrier
from firstboot.discovery.interface import Context
from firstboot.discovery.search import Search
from firstboot.journal import WARNING, Journal
from firstboot.late import late_patterns
from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import events, history
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.errors import FirstbootError, UserError
from firstboot.protocol.model import Channel, Endpoint, Self, Stage, Stored
from firstboot.protocol.situation import Start
from firstboot.publisher import Publisher, Recorder
from firstboot.transport import Transport
from firstboot.userdata import Document

RANK_WITHOUT_PREFERENCE = 1000
PUBLISH_AFTER = 0.02  # seconds in which what changes within a stage is told at once


class Service:
    """One run of ``firstboot run``: from a document to a host that runs its role."""

    admits = ""  # what discovery says of this host, see `Context`

    def __init__(
        self, root: Path, document: Document, journal: Journal, publisher: Publisher
    ) -> None:
        self.root, self.document, self.journal = root, document, journal
        self.publisher = publisher
        self.directory = host.StateDirectory(root)
        self.inbox: deque[events.Event] = deque()
        self._wake = asyncio.Event()
        self.transport = Transport(self.put)
        self.search: Search | None = None
        self._disk = ThreadPoolExecutor(1, "disk")
        self._work = ThreadPoolExecutor(1, "work")
        self.options: dict[str, str] = {}
        self._signers = ThreadPoolExecutor(1, "signers")  # one: no serial number is given twice
        self._persisting = False
        self._persist_next: events.Persist | None = None
        self._history = Recorder(self.directory.path)
        self._bug: BaseException | None = None
        self._started = False
        self._leaving = False
        self._stopped = False
        self._publishing: asyncio.TimerHandle | None = None
        self.exposed: list[dict[str, str]] = []  # where the token is still to be read
        self._scrubbing: Future[None] | None = None
        self.moved = ""  # the address this host has now, should it not be the one it had
        self._watching: asyncio.Task[None] | None = None
        self.core: Assembly
        self.carrier: Carrier

    # ------------------------------------------------------------ life

    async def run(self) -> int:
        """Run until this host needs the process no more; the exit code."""
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.set_exception_handler(self._broken)
        try:
            await self._start()
            if not self._stopped:
                self.put(events.DeadlineReached())
            while not (self._leaving or self._stopped or self._bug or self.moved):
                await self._wait()
                self._turn()
        finally:
            await self._end()
        if self._bug is not None:
            raise self._bug
        return 0

    def _broken(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A bug must not become a silent wait: end with its traceback, and systemd starts anew."""
        error = context.get("exception")
        if error is None or isinstance(error, OSError):
            return  # a socket that broke at a bad moment; whoever used it hears of it as well
        self._bug = error
        self._wake.set()

    def _stop(self) -> None:
        self._stopped = True
        self._wake.set()

    async def _start(self) -> None:
        facts = await self._facts()
        if facts is None:
            return
        memory = self._loop.run_in_executor(self._disk, self._memory, facts)
        self.publisher.platform = facts.platform
        listed = [(spec.name, spec.options) for spec in self.document.discovery]
        self.search = Search(listed, facts.platform)
        self.search.load()  # meanwhile the disk works
        facts = await whereabouts.with_cloud(facts, self.document, self.journal)
        key, known, voter = await memory
        endpoint = facts.endpoint or Endpoint("127.0.0.1", facts.port)
        self.options = self.document.options_for(facts.matches)
        me = self._me(facts, pki.node_id(key), endpoint, voter=voter)
        if not known.closed:
            self.document.require_token()
        self._make_core(me, known)
        self.carrier = Carrier(self.root, self.directory, self.transport, self.core)
        self.carrier.deeds.gate_told = self._gate_told
        self.publisher.mark("network")
        if not gc.isenabled():
            gc.freeze()  # modules and the like stay; what comes now is looked through again
            gc.enable()
        self.transport.zone = facts.address.interface if facts.address else ""
        await self.transport.start("", endpoint.port)
        self._started = True
        if facts.address is not None:
            self._watching = asyncio.ensure_future(self._watch_address(facts.address.host))
        self.carrier.open_cluster_channel()
        if not known.closed:
            await self._open_formation(me, key, facts)

    def _memory(self, facts: host.Facts) -> tuple[bytes, Stored, bool]:
        """Its identity key, what it must not forget, and whether it still knows its votes."""
        note = self.directory.adopt(facts.machine)
        if note:
            self.journal.say(f"{note[:1].upper()}{note[1:]}.", priority=WARNING)
        stored = self.directory.load()
        key = self.directory.load_identity_key()
        if stored is None or key is None:
            key = pki.make_key()
            stored = self.directory.begin(key, facts.machine)
        known = stored.stored if isinstance(stored, host.LostState) else stored
        return key, known, known is stored

    async def _facts(self) -> host.Facts | None:
        """This host's facts, as soon as it has an address; None if asked to stop before."""
        return await whereabouts.found(self.root, self.document, self.publisher, self._wake)

    async def _watch_address(self, known: str) -> None:
        """End this run once the address is to be another one; `run` begins the next."""

        def settled() -> bool:
            return self.core.stage is not Stage.DISCOVERING

        self.moved = await whereabouts.moved(self.document, known, settled)
        self._wake.set()

    def _me(self, facts: host.Facts, node_id: str, endpoint: Endpoint, *, voter: bool) -> Self:
        ranks = [i for i, m in enumerate(self.document.prefer) if facts.matches(m)]
        late = self.document.late and not self.admits
        return Self(
            node_id=node_id,
            boot=os.urandom(8).hex(),
            name=host.node_name(facts.hostname, node_id),
            endpoint=endpoint,
            rank=ranks[0] if ranks else RANK_WITHOUT_PREFERENCE,
            eligible=not any(facts.matches(m) for m in self.document.never),
            voter=voter and not late,
            late=late,
        )

    def _make_core(self, me: Self, stored: Stored) -> None:
        now, seed = self._now(), int.from_bytes(os.urandom(6))
        issued = self.directory.issued()
        config = self.document.config
        offset = time.time() - time.monotonic()
        options = {**OPTIONS[config.payload], **self.options}
        opening = history.Opening(
            config, me, stored, issued, seed, now, offset, json.dumps(options).encode()
        )
        self._history.line(history.opening_line(opening))
        self.core = Assembly(
            Start(
                config=config,
                me=me,
                stored=stored,
                issued=issued,
                payload=PAYLOADS[config.payload],
                options=options,
                rng=random.Random(seed),  # noqa: S311  back-off only, and replay needs the seed
                now=now,
            )
        )

    async def _open_formation(self, me: Self, key: bytes, facts: host.Facts) -> None:
        """Everything that needs the token: the bootstrap channel and discovery."""
        document = self.document
        bootstrap = pki.derive(document.token.reveal(), document.formation_id)
        credentials = bootstrap.credentials(key)
        self.transport.set_channel(Channel.BOOTSTRAP, credentials, pki.node_id_of_certificate)
        self.publisher.mark("listening")
        seal = pki.Seal(document.token.reveal(), document.formation_id)
        context = Context(
            bootstrap.tag,
            document.formation_id,
            me.boot,
            self.admits,
            root=self.root,
            platform=facts.platform,
            subnet=facts.address.subnet if facts.address else "",
            expect=document.config.expect,
            lacks=self._lacks,
            alone=lambda: not len(self.core.company),
            seal=seal.seal,
            unseal=seal.unseal,
            reservation=facts.machine.reservation,
            settings=partial(userdata.settings, self.root),
        )

        def stranger(kind: str, source: str) -> None:
            self.put(events.StrangerSeen(kind, source))

        def found(at: Endpoint, provider: str) -> None:
            self.put(events.PeerFound(at, provider))

        assert self.search is not None
        await self.search.begin(context, me.endpoint, found, stranger)

    def _lacks(self) -> bool:
        """Whether hosts are missing, so that it is worth looking for them."""
        core = self.core
        if core.founder and len(core.roster.issued) >= core.config.expect:
            return False
        return core.counted_voters() < core.config.expect

    async def _end(self) -> None:
        if self._publishing is not None and self._bug is None:
            self._publish()
        if self._watching is not None:
            self._watching.cancel()
        if self.search is not None:
            await self.search.end()
        await self.transport.close()
        if self._started:
            self.carrier.cancel()  # else Python would wait for a unit's deadline at exit
        self._disk.shutdown(wait=True)
        self._signers.shutdown(wait=True, cancel_futures=True)
        self._work.shutdown(wait=not self._stopped, cancel_futures=True)
        self._history.close()

    # ------------------------------------------------------------ the loop

    def put(self, event: events.Event) -> None:
        """Add an event to the inbox; on the loop's thread only."""
        self.inbox.append(event)
        self._wake.set()

    @staticmethod
    def _now() -> float:
        return round(time.monotonic(), 6)  # as precise as the history can tell

    async def _wait(self) -> None:
        if not self.inbox:
            left = self.core.deadline - self._now()
            try:
                await asyncio.wait_for(self._wake.wait(), max(0.0, min(left, 3600.0)))
            except TimeoutError:
                self.put(events.DeadlineReached())
        self._wake.clear()

    def _turn(self) -> None:
        while self.inbox and not self._leaving:
            event, now = self.inbox.popleft(), self._now()
            self._history.line(history.event_line(event, now))
            for action in self.core.receive(event, now):
                self._carry_out(action)
        self._history.flush()
        if self.publisher.note(self.core):
            self._publish()
        else:
            self._publish_soon()

    def _publish_soon(self) -> None:
        if self._publishing is None and not self._leaving:
            self._publishing = self._loop.call_later(PUBLISH_AFTER, self._publish)

    def _gate_told(self) -> None:
        """A health gate stays shut for another reason, or opened; in a worker's thread."""
        with suppress(RuntimeError):  # the loop has ended: nobody is told any more
            self._loop.call_soon_threadsafe(self._publish_soon)

    def _publish(self) -> dict[str, Any]:
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        warnings = list(self.document.warnings)
        expiries = self.carrier.expiries
        return self.publisher.publish(
            self.core,
            self.search.reports() if self.search else (),
            self.carrier.deeds.gate,
            payload=self.document.config.payload,
            certificates=expiries,
            warnings=warnings,
            exposed=self.exposed,
        )

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.Send():
                self.transport.send(action.node_id, action.channel, action.message)
            case events.Connect():
                source = self.core.me.endpoint.host
                self.transport.connect(action.endpoint, action.channel, source)
            case events.Disconnect():
                self.transport.disconnect(action.node_id)
            case events.Announce():
                assert self.search is not None
                self.search.announce(self._publish_soon)
            case events.Close():
                self._close()
            case events.Finish():
                self._finish()
            case events.Persist():
                self._persist(action)
            case events.RunStep():
                self._in_thread(self._work, lambda: self.carrier.run_step(action))
            case events.SignRequests() | events.StoreSupplies():
                self._in_thread(self._signers, lambda: self.carrier.on_supply(action))
            case _:
                self._in_thread(self._disk, lambda: self.carrier.on_disk(action))

    def _persist(self, action: events.Persist) -> None:
        """Write the newest state; what comes while the disk is busy waits, and only the last."""
        if self._persisting:
            self._persist_next = action
            return
        self._persisting = True
        self._in_thread(self._disk, lambda: self.carrier.on_disk(action))

    def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], events.Event | None]) -> None:
        """Do `work` in that pool, and put the event it answers with into the inbox."""

        def done() -> None:
            event = work()
            if event is not None:
                self._loop.call_soon_threadsafe(self._answered, event)

        pool.submit(done).add_done_callback(self._check)

    def _answered(self, event: events.Event) -> None:
        self.carrier.after(event)
        self.put(event)
        if isinstance(event, events.PersistDone | events.PersistFailed) and event.sequence:
            waiting, self._persist_next, self._persisting = self._persist_next, None, False
            if waiting is not None:
                self._persist(waiting)

    def _check(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            context = {"message": str(error), "exception": error}
            self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    def _finish(self) -> None:
        """Leave for good. The stamp comes last, also after the token is off the disk."""
        self._leaving = True
        if self._scrubbing is not None:
            self._scrubbing.result()
        text = json.dumps(self._publish()).encode()
        host.write_durably(self.directory.path / "status.json", text, 0o644)
        self.directory.finish()

    def _close(self) -> None:
        """CLOSE: no bootstrap handshake succeeds any more, and nothing derived is kept."""
        self.transport.set_channel(Channel.BOOTSTRAP, None)
        if self.search is not None:
            self.search.close()
        try:  # it is worthless by now, but the next start would take it for this host's token
            host.remove_durably(self.root / userdata.JOIN)
        except FirstbootError as error:
            self.journal.say(f"{error}.", priority=WARNING)
        self.journal.say("Admission is closed: the token opens nothing on this host any more.")
        self._scrubbing = self._disk.submit(self._scrub)
        self._scrubbing.add_done_callback(self._check)

    def _scrub(self) -> None:
        from firstboot import scrub  # loaded when there is something to do

        self.exposed = scrub.scrub(self.root)


def run(root: Path) -> int:
    """``firstboot run``: the exit code. A host without configuration is a normal end: 0."""
    journal = Journal(under_systemd="NOTIFY_SOCKET" in os.environ, stream=sys.stderr)
    journal.ready()
    publisher = Publisher(root, journal)
    try:
        named.obtain(root, publisher)
        with late_patterns():  # this imports yaml
            document = userdata.find(root)
        if document is None:
            publisher.end_early("unconfigured", f"This host is {userdata.explain(root)}.")
            return 0
        for warning in document.warnings:
            journal.say(warning, priority=WARNING)
        while True:
            service = Service(root, document, journal, publisher)
            code = asyncio.run(service.run())
            if not service.moved:
                return code
            journal.say(f"This host's address is now {service.moved}: starting anew with it.")
    except UserError as error:
        named.forget(root)
        publisher.end_early("failed", str(error), code="CONFIGURATION")
        return error.code
    except FirstbootError as error:
        publisher.end_early("failed", str(error), code="FAILED")
        return 1
