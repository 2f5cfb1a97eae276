"""The providers of one run, side by side."""

from __future__ import annotations

import asyncio
import threading

import pytest

from firstboot.discovery import providers
from firstboot.discovery.aside import Question, aside
from firstboot.discovery.interface import Context, Found, Provider, ProviderReport, Stranger
from firstboot.discovery.search import MAX_TEXT, Search
from firstboot.protocol.model import Endpoint

OWN = Endpoint("10.0.0.1", 7443)
CONTEXT = Context(tag="a" * 16, formation_id="demo", boot="b" * 16)


class Puppet:
    """A provider that does what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.announced, self.stopped = 0, 0
        self.found: Found = lambda _: None
        self.go_on = asyncio.Event()
        self.text = ""

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        self.found = found

    async def announce(self) -> None:
        self.announced += 1
        await self.go_on.wait()

    async def stop(self) -> None:
        self.stopped += 1

    def report(self) -> ProviderReport:
        return ProviderReport(self.name, 0, self.text, self.text, self.text)


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> dict[str, Puppet]:
    made: dict[str, Puppet] = {}

    def make(name: str, options: providers.Options, context: Context) -> Provider:
        made[name] = Puppet(name)
        return made[name]

    monkeypatch.setattr(providers, "make", make)
    return made


async def begun(found: list[tuple[Endpoint, str]]) -> Search:
    search = Search([("mdns", {}), ("dns", {})], "")
    await search.begin(CONTEXT, OWN, lambda at, by: found.append((at, by)), lambda *_: None)
    return search


def test_what_each_finds_carries_its_name(puppets: dict[str, Puppet]) -> None:
    found: list[tuple[Endpoint, str]] = []

    async def run() -> None:
        await begun(found)
        for puppet in puppets.values():
            puppet.found(OWN)

    asyncio.run(run())
    assert found == [(OWN, "mdns"), (OWN, "dns")]


def test_a_slow_one_keeps_no_other_waiting_and_is_not_asked_twice(
    puppets: dict[str, Puppet],
) -> None:
    async def run() -> None:
        search, done = await begun([]), []
        puppets["mdns"].go_on.set()
        for _ in range(3):
            search.announce(lambda: done.append(1))
            await asyncio.sleep(0.01)
        assert (puppets["mdns"].announced, puppets["dns"].announced) == (3, 1)
        assert len(done) == 3
        puppets["dns"].go_on.set()
        await asyncio.sleep(0.01)
        search.announce(lambda: None)
        await asyncio.sleep(0.01)
        assert puppets["dns"].announced == 2
        search.close()
        await asyncio.sleep(0.01)
        await search.end()
        assert [p.stopped for p in puppets.values()] == [2, 2]

    asyncio.run(run())


def test_the_end_does_not_wait_for_an_announcement(puppets: dict[str, Puppet]) -> None:
    async def run() -> None:
        search = await begun([])
        search.announce(lambda: None)
        await asyncio.sleep(0.01)
        await search.end()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_texts_from_the_network_are_made_fit_to_be_shown(puppets: dict[str, Puppet]) -> None:
    async def run() -> Search:
        return await begun([])

    search = asyncio.run(run())
    puppets["mdns"].text = "a\x1b[31m\r\nb" + "x" * 1000
    report = search.reports()[0]
    for text in (report.error, report.detail, report.remedy):
        assert text.startswith("a?[31m??bxx")
        assert len(text) == MAX_TEXT + 1


# ---------------------------------------------------------------- blocking calls


def test_a_blocking_call_gives_its_result_or_its_exception() -> None:
    def fails() -> int:
        raise OSError(5, "broken")

    async def run() -> None:
        assert await aside(lambda: 7) == 7
        with pytest.raises(OSError, match="broken"):
            await aside(fails)

    asyncio.run(run())


def test_a_question_is_asked_once_at_a_time() -> None:
    asked, answer = [], threading.Event()

    def call() -> int:
        asked.append(1)
        answer.wait(30)
        return len(asked)

    async def run() -> None:
        question = Question(call)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await question.ask(0.01)
        answer.set()
        assert await question.ask(30) == 1
        assert await question.ask(30) == 2

    asyncio.run(run())


def test_a_loop_that_ended_meanwhile_harms_nobody() -> None:
    answer, ended = threading.Event(), threading.Event()

    def call() -> None:
        answer.wait(30)
        ended.set()

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await Question(call).ask(0.01)

    asyncio.run(run())
    answer.set()
    assert ended.wait(30)
