"""The loop: take an event, ask Assembly, carry out its actions.

One inbox, one place that calls the core, one place that calls the adapters. Whatever blocks (the
disk, systemd, container tools) runs in a worker thread and answers with an event.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from firstboot import host, pki
from firstboot.carrier import Carrier
from firstboot.discovery.interface import Context, Provider
from firstboot.discovery.providers import PROVIDERS
from firstboot.journal import Journal
from firstboot.payloads.rows import PAYLOADS
from firstboot.protocol import events, history, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import Channel, Endpoint, Self, Stage, Stored
from firstboot.transport import Transport
from firstboot.userdata import Document

HISTORY = "history.jsonl"
MAX_HISTORY = 8 * 1024 * 1024  # bytes; a run that waits for days stops recording, not forming
RANK_WITHOUT_PREFERENCE = 1000


class Service:
    """One run of ``firstboot run``: from a document to a host that runs its role."""

    def __init__(self, root: Path, document: Document, journal: Journal) -> None:
        self.root, self.document, self.journal = root, document, journal
        self.directory = host.StateDirectory(root)
        self.inbox: deque[events.Event] = deque()
        self._wake = asyncio.Event()
        self.transport = Transport(self.put)
        self.providers: list[Provider] = []
        self._disk = ThreadPoolExecutor(1, "disk")
        self._work = ThreadPoolExecutor(1, "work")
        self._announcing: dict[str, asyncio.Task[None]] = {}
        self._history: IO[str] | None = None
        self._shown: dict[str, Any] = {}
        self._stage: Stage | None = None
        self._timeline: list[dict[str, Any]] = []
        self._since = time.time()
        self._leaving = False
        self._stopped = False
        self.core: Assembly
        self.carrier: Carrier

    # ------------------------------------------------------------ life

    async def run(self) -> int:
        """Run until this host needs the process no more; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self.journal.ready()
        try:
            await self._start()
            if not self._stopped:
                self.put(events.DeadlineReached())
            while not (self._leaving or self._stopped):
                await self._wait()
                self._turn()
        finally:
            await self._end()
        return 0

    def _stop(self) -> None:
        self._stopped = True
        self._wake.set()

    async def _start(self) -> None:
        machine = host.look(self.root)
        note = self.directory.adopt(machine)
        if note:
            self.journal.say(note, priority=4)
        stored = self.directory.load()
        key = self.directory.load_identity_key()
        if stored is None or key is None:
            key = pki.make_key()
            stored = self.directory.begin(key, machine)
        endpoint = await self._endpoint()
        if endpoint is None:
            return
        bootstrap = pki.derive(self.document.token.reveal(), self.document.formation_id)
        lost = isinstance(stored, host.LostState)
        known = stored.stored if isinstance(stored, host.LostState) else stored
        me = self._me(pki.node_id(key), endpoint, voter=not lost)
        self._make_core(me, known)
        self.carrier = Carrier(self.root, self.directory, self.transport, self.core)
        await self.transport.start("", endpoint.port)
        self.carrier.open_cluster_channel()
        if not known.closed:
            self.transport.set_channel(
                Channel.BOOTSTRAP, bootstrap.credentials(key), pki.node_id_of_certificate
            )
            await self._start_providers(me, bootstrap.tag, endpoint)
        self._mark("network")

    async def _endpoint(self) -> Endpoint | None:
        """This host's address, as soon as it has one; None if asked to stop before."""
        wanted, port = self.document, self.document.port
        if wanted.config.expect == 1 and not wanted.interface and not wanted.cidr:
            found = host.choose(host.survey(), "", "")
            return Endpoint(found.ip if found else "127.0.0.1", port)
        found = host.choose(host.survey(), wanted.interface, wanted.cidr)
        if found is None:
            self._publish_waiting_for_address()
            waiting = asyncio.ensure_future(host.wait_for_address(wanted.interface, wanted.cidr))
            stop = asyncio.ensure_future(self._wake.wait())
            done, rest = await asyncio.wait((waiting, stop), return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            if waiting not in done:
                return None
            found = waiting.result()
        return Endpoint(found.ip, port)

    def _me(self, node_id: str, endpoint: Endpoint, *, voter: bool) -> Self:
        facts = host.facts(self.root, endpoint.host)
        ranks = [i for i, m in enumerate(self.document.prefer) if host.matches(facts, m)]
        return Self(
            node_id=node_id,
            boot=secrets.token_hex(8),
            name=host.node_name(facts.hostname, node_id),
            endpoint=endpoint,
            rank=ranks[0] if ranks else RANK_WITHOUT_PREFERENCE,
            eligible=not any(host.matches(facts, m) for m in self.document.never),
            voter=voter,
        )

    def _make_core(self, me: Self, stored: Stored) -> None:
        now, seed = self._now(), secrets.randbits(48)
        issued = self.directory.issued()
        config = self.document.config
        opening = history.Opening(config, me, stored, issued, seed, now, self._wall_offset())
        self._open_history(history.opening_line(opening))
        self.core = Assembly(
            config=config,
            me=me,
            stored=stored,
            issued=issued,
            payload=PAYLOADS[config.payload],
            options=self.document.options,
            rng=random.Random(seed),  # noqa: S311  back-off only, and replay needs the seed
            now=now,
        )

    async def _start_providers(self, me: Self, tag: str, endpoint: Endpoint) -> None:
        context = Context(tag=tag, formation_id=self.document.formation_id, boot=me.boot)
        for spec in self.document.discovery:
            provider = PROVIDERS[spec.name](spec.options, context)
            self.providers.append(provider)
            name = spec.name

            def found(at: Endpoint, name: str = name) -> None:
                self.put(events.PeerFound(at, name))

            def stranger(kind: str, source: str) -> None:
                self.put(events.StrangerSeen(kind, source))

            await provider.start(endpoint, found, stranger)

    async def _end(self) -> None:
        for task in self._announcing.values():
            task.cancel()
        for provider in self.providers:
            await provider.stop()
        await self.transport.close()
        self._disk.shutdown(wait=True)
        self._work.shutdown(wait=not self._stopped, cancel_futures=True)
        if self._history is not None:
            self._history.close()

    # ------------------------------------------------------------ the loop

    def put(self, event: events.Event) -> None:
        """Add an event to the inbox; on the loop's thread only."""
        self.inbox.append(event)
        self._wake.set()

    @staticmethod
    def _now() -> float:
        return round(time.monotonic(), 6)  # as precise as the history can tell

    @staticmethod
    def _wall_offset() -> float:
        return time.time() - time.monotonic()

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
            self._record(history.event_line(event, now))
            for action in self.core.receive(event, now):
                self._carry_out(action)
        if self._history is not None:
            self._history.flush()
        self._publish()

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
                self._announce()
            case events.Close():
                self._close()
            case events.Finish():
                self.directory.finish()
                self._leaving = True
            case events.RunStep():
                self._in_thread(self._work, lambda: self.carrier.run_step(action))
            case _:
                self._in_thread(self._disk, lambda: self.carrier.on_disk(action))

    def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], events.Event | None]) -> None:
        """Do `work` in that pool, and put the event it answers with into the inbox."""
        loop = asyncio.get_running_loop()

        def done() -> None:
            event = work()
            if event is not None:
                loop.call_soon_threadsafe(self._answered, event)

        pool.submit(done).add_done_callback(
            lambda future: (
                loop.call_soon_threadsafe(self._check, future.exception())
                if not future.cancelled() and future.exception()
                else None
            )
        )

    def _answered(self, event: events.Event) -> None:
        self.carrier.after(event)
        self.put(event)

    def _check(self, error: BaseException | None) -> None:
        """A bug in an adapter must not become a silent wait: end, systemd starts anew."""
        if error is not None:
            raise SystemExit(f"internal error: {error!r}") from error

    def _announce(self) -> None:
        for provider in self.providers:
            running = self._announcing.get(provider.name)
            if running is None or running.done():
                task = asyncio.ensure_future(provider.announce())
                self._announcing[provider.name] = task

    def _close(self) -> None:
        """CLOSE: no bootstrap handshake succeeds any more, and nothing derived is kept."""
        self.transport.set_channel(Channel.BOOTSTRAP, None)
        for provider in self.providers:
            task = asyncio.ensure_future(provider.stop())
            self._announcing[f"stop {provider.name}"] = task
        self.journal.say("Admission is closed: the token opens nothing on this host any more.")

    # ------------------------------------------------------------ what is told

    def _open_history(self, first: str) -> None:
        path = self.directory.path / HISTORY
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._history = os.fdopen(number, "a")
        self._record(first)

    def _record(self, line: str) -> None:
        if self._history is None:
            return
        try:
            self._history.write(line + "\n")
            if self._history.tell() > MAX_HISTORY:
                self._history.close()
                self._history = None
        except OSError:
            self._history = None  # a full disk must not stop the formation

    def _mark(self, what: str) -> None:
        self._timeline.append({"what": what, "at": round(time.time(), 6)})

    def _publish(self) -> None:
        """Write the status if it changed, and say what a person would want to hear."""
        now = status.describe(self.core, self._wall_offset())
        if now["sentence"] != self._shown.get("sentence"):
            self._since = time.time()
        if self.core.stage is not self._stage:
            self._stage = self.core.stage
            self._mark(self._stage.value)
        now |= {
            "since": self._since,
            "timeline": self._timeline,
            "providers": [vars_of(p.report()) for p in self.providers],
            "certificates": self.carrier.expiries,
            "warnings": list(self.document.warnings),
        }
        before, self._shown = self._shown, now
        if comparable(now) == comparable(before):
            return
        host.write_status(self.root, now)
        self.journal.report(now, before)

    def _publish_waiting_for_address(self) -> None:
        sentence = "Waiting for a network address"
        where = self.document.interface or self.document.cidr
        now = {
            "schema": status.SCHEMA,
            "cluster": self.document.config.cluster,
            "stage": Stage.DISCOVERING.value,
            "state": "waiting",
            "sentence": sentence + (f" on {where}." if where else "."),
            "hint": "Check the cable, DHCP or network configuration of this host.",
            "since": time.time(),
            "problems": [],
        }
        host.write_status(self.root, now)
        self.journal.report(now, {})


def vars_of(report: object) -> dict[str, Any]:
    """A small dataclass as a mapping, slots or not."""
    return {name: getattr(report, name) for name in report.__dataclass_fields__}  # type: ignore[attr-defined]


def comparable(shown: dict[str, Any]) -> dict[str, Any]:
    """A status without what changes by itself."""
    return {key: item for key, item in shown.items() if key != "since"}


def serve(root: Path, document: Document) -> int:
    """Run the service; LocalError if this host cannot even start."""
    journal = Journal(under_systemd="NOTIFY_SOCKET" in os.environ, stream=sys.stderr)
    return asyncio.run(Service(root, document, journal).run())
