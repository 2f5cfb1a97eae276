"""A history tells everything, survives a power cut anywhere, and replays what really happened."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstboot import replay
from firstboot.payloads.rows import NONE, OPTIONS
from firstboot.protocol import events, history, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.errors import UserError
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Member,
    Self,
    Stored,
    Value,
)
from firstboot.protocol.situation import Start
from tests.recording import RecordingWorld, formed
from tests.sim.world import Faults

# ---------------------------------------------------------------- anything an event may hold

TEXTS = st.text(max_size=40) | st.sampled_from(
    ("", "x" * 1000, "one\ntwo\r\n\n", "\x1b[31m\0\x7f", '{"run": {', "ü€\U0001f600", "\ud800")
)
NODE_IDS = st.binary(min_size=16, max_size=16).map(bytes.hex)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
LABELS = st.sampled_from(("a", "host", "0-9", "h" * 63))
HOSTS = st.sampled_from(("10.0.0.5", "fd00::5", "fe80::1%eth0", "::ffff:10.0.0.5"))
PRINTABLE = TEXTS.filter(str.isprintable)
COUNTS = st.integers(0, 2**31 - 1)
BY_NAME: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("Endpoint", "port"): st.integers(1, 65535),
    ("Value", "epoch"): st.integers(1, 2**31 - 1),
    ("Value", "members"): st.integers(0, 20_000),
    ("ClusterConfig", "cluster"): LABELS,
    ("ClusterConfig", "expect"): st.integers(5, 10_000),
    ("ClusterConfig", "masters"): st.sampled_from((1, 3, 5)),
    ("Hello", "boot"): PRINTABLE,
    ("Hello", "agreed"): PRINTABLE,
    ("Denied", "reason"): PRINTABLE,
}
BY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "node_id": NODE_IDS,
    "name": LABELS,
    "host": HOSTS,
    "key": DIGESTS,
    "fingerprint": DIGESTS,
}
SCALARS: dict[type[Any], st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: COUNTS,
    float: st.integers(0, 10**12).map(lambda n: n / 1000),
    str: TEXTS,
    bytes: st.binary(max_size=64) | st.just(bytes(range(256)) * 8),
}


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """Every value of an annotated type, within what its checks allow."""
    if isinstance(kind, types.UnionType):
        return st.one_of(*(anything(k) for k in typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return st.lists(anything(typing.get_args(kind)[0]), max_size=3).map(tuple)
    if kind is types.NoneType:
        return st.none()
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return st.sampled_from(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        parts = {}
        for f in dataclasses.fields(kind):
            special = BY_NAME.get((kind.__name__, f.name), BY_FIELD.get(f.name))
            parts[f.name] = anything(hints[f.name]) if special is None else special
        if kind is Value:
            members = st.lists(anything(Member), min_size=5, max_size=5, unique_by=_id)
            parts["masters"] = members.flatmap(
                lambda m: st.sampled_from((1, 3, 5)).map(lambda n: tuple(m[:n]))
            )
        return st.builds(kind, **parts)
    return SCALARS[kind]


def _id(member: Member) -> str:
    return member.node_id


MOMENTS = st.integers(0, 10**13).map(lambda n: n / 10**6)
THOROUGH = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def back(*lines: str) -> list[Any]:
    return list(history.read(lines))


def test_every_event_there_is_can_be_read_back() -> None:
    assert set(history.EVENTS.values()) == set(typing.get_args(events.Event))


@pytest.mark.parametrize("kind", typing.get_args(events.Event), ids=lambda k: k.__name__)
def test_events_come_back_as_they_were(kind: type[Any]) -> None:
    @THOROUGH
    @given(anything(kind), MOMENTS)
    def check(event: events.Event, now: float) -> None:
        line = history.event_line(event, now)
        assert "\n" not in line and line.isascii()
        assert back(line) == [(now, event)]

    check()


@pytest.mark.parametrize("kind", typing.get_args(messages.Message), ids=lambda k: k.__name__)
def test_messages_come_back_as_they_were(kind: type[Any]) -> None:
    @THOROUGH
    @given(anything(kind), st.sampled_from(Channel))
    def check(message: messages.Message, channel: Channel) -> None:
        event = events.MessageReceived("a" * 32, channel, message)
        assert back(history.event_line(event, 1.0)) == [(1.0, event)]

    check()


@THOROUGH
@given(anything(history.Opening))
def test_openings_come_back_as_they_were(opening: history.Opening) -> None:
    line = history.opening_line(opening)
    assert "\n" not in line and line.isascii()
    assert back(line) == [opening]


def test_a_failed_step_keeps_its_last_lines() -> None:
    detail = "\n".join(f"line {n}: \x1b[31mno\x1b[0m" for n in range(40))[-1000:]
    event = events.StepFailed(3, "Could not start etcd.service: " + "x" * 900, detail)
    assert back(history.event_line(event, 5.25)) == [(5.25, event)]


def test_what_the_largest_formation_persists_can_be_read_back() -> None:
    voters = tuple(f"{n:032x}" for n in range(20_000))
    stored = Stored(voters=voters, confirmed=voters)
    opening = dataclasses.replace(_opening(), stored=stored)
    assert back(history.opening_line(opening)) == [opening]


# ---------------------------------------------------------------- files that are damaged


def _opening(payload: str = "none") -> history.Opening:
    config = ClusterConfig("demo", 3, payload=payload)
    me = Self("a" * 32, "boot", "host", Endpoint("10.0.0.1", 7443))
    return history.Opening(config, me, Stored(), (), 5, 1.0, 0.0)


EVENT = events.PeerFound(Endpoint("10.0.0.2", 7443), "mdns")
FIRST, SECOND = history.opening_line(_opening()), history.event_line(EVENT, 2.0)
WHOLE = [(2.0, EVENT)]


@pytest.mark.parametrize("length", range(0, len(SECOND), 7))
def test_a_last_line_cut_short_is_left_out(length: int) -> None:
    assert back(FIRST + "\n", SECOND + "\n", SECOND[:length]) == [_opening(), *WHOLE]


@pytest.mark.parametrize("cut", [SECOND[:length] for length in range(0, len(SECOND), 7)])
def test_the_run_after_a_power_cut_goes_on_behind_the_cut_line(cut: str) -> None:
    """The file is opened for appending, so the next run's first line has no line of its own."""
    lines = [f"{FIRST}\n", f"{SECOND}\n", f"{cut}{FIRST}\n", f"{SECOND}\n"]
    assert back(*lines) == [_opening(), *WHOLE, _opening(), *WHOLE]


def test_also_if_the_cut_line_is_that_of_a_run() -> None:
    for length in range(1, len(FIRST), 9):
        assert back(FIRST[:length] + FIRST + "\n", SECOND) == [_opening(), *WHOLE]


def test_also_if_the_file_system_filled_the_cut_line_with_zeros() -> None:
    assert back(f"{FIRST}\n", "\0" * 300 + f"{FIRST}\n") == [_opening(), _opening()]


def _foreign() -> Iterator[tuple[str, str]]:
    yield "text", "Nov 22 12:00:00 host systemd[1]: Started."
    yield "empty", ""
    yield "number", "5"
    yield "list", "[]"
    yield "null", "null"
    yield "string", '"run"'
    yield "object", "{}"
    yield "deep", "[" * 200_000
    yield "deep object", '{"a":' * 200_000
    yield "run", '{"run": {}}'
    yield "run of nothing", '{"run": null}'
    yield "event unknown", '{"at": 1.0, "event": "Nonsense"}'
    yield "event a list", '{"at": 1.0, "event": []}'
    yield "no moment", '{"event": "DeadlineReached"}'
    yield "moment too large", '{"at": 1%s, "event": "DeadlineReached"}' % ("0" * 400)
    yield "moment too long", '{"at": 1%s, "event": "DeadlineReached"}' % ("0" * 5000)
    yield "moment infinite", '{"at": Infinity, "event": "DeadlineReached"}'
    yield "moment no number", '{"at": NaN, "event": "DeadlineReached"}'
    yield "moment in words", '{"at": "soon", "event": "DeadlineReached"}'
    yield "more than an event", '{"at": 1.0, "event": "DeadlineReached", "x": 1}'
    yield "no message", '{"at": 1.0, "event": "MessageReceived", "node_id": "a"}'
    text = json.dumps('{"t": "noted", "epoch": "one"}')
    head = '{"at": 1.0, "event": "MessageReceived", "node_id": "a", "channel": "cluster"'
    yield "malformed message", f'{head}, "message": {text}}}'
    yield "message unknown", f'{head}, "message": "{{}}"}}'
    yield "message a number", f'{head}, "message": 5}}'


FOREIGN = dict(_foreign())


@pytest.mark.parametrize("name", FOREIGN)
def test_a_line_of_something_else_is_the_persons_mistake_and_is_named(name: str) -> None:
    with pytest.raises(UserError, match="line 2: this line is not part of a firstboot history"):
        back(FIRST, FOREIGN[name], SECOND)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_refused_also_with_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        list(replay.replay([FOREIGN[name]]))
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_no_history() -> None:
    with pytest.raises(UserError, match="does not begin with a run"):
        list(replay.replay([]))


def test_a_history_without_its_beginning_is_refused() -> None:
    with pytest.raises(UserError, match="does not begin with a run"):
        list(replay.replay([SECOND, SECOND]))


def test_a_run_of_a_payload_that_this_version_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="payload"):
        list(replay.replay([history.opening_line(_opening("kubernetes")), SECOND]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=60) | st.just(FIRST) | st.just(SECOND), max_size=5))
def test_nothing_but_a_users_error_is_ever_raised(lines: list[str]) -> None:
    try:
        list(replay.replay(lines))
    except UserError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------- what really happened

HOSTILE = Faults(
    loss=0.2, duplicate=0.2, multicast_loss=0.3, crash_boundary=0.02, crashes=4, disk_errors=0.1
)


@cache
def recorded(seed: int) -> RecordingWorld:
    """A quiet formation of three hosts (even seeds), or a hostile one of four."""
    if seed % 2 == 0:
        return formed(seed)
    return formed(seed, 4, dataclasses.replace(HOSTILE, until=30.0))


def _again(opening: history.Opening) -> Assembly:
    return Assembly(
        Start(
            config=opening.config,
            me=opening.me,
            stored=opening.stored,
            issued=opening.issued,
            payload=NONE,
            options=OPTIONS["none"],
            rng=random.Random(opening.seed),
            now=opening.now,
        )
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_recorded_formation_does_the_same_again(seed: int) -> None:
    """From the file alone, every event leads to the very actions it led to then."""
    world = recorded(seed)
    for host in range(len(world.hosts)):
        runs = [(opening, list(core.turns)) for opening, core in world.runs(host)]
        core: Assembly | None = None
        for item in history.read(world.history_of(host)):
            if isinstance(item, history.Opening):
                opening, turns = runs.pop(0)
                assert item == opening
                core = _again(item)
                continue
            assert core is not None
            now, event, actions = turns.pop(0)
            assert item == (now, event)
            assert core.receive(event, now) == actions
        assert not runs and not turns


@pytest.mark.parametrize("seed", range(2))
def test_replay_tells_a_line_for_each_event_and_how_it_ended(seed: int) -> None:
    world = recorded(seed)
    for host in range(len(world.hosts)):
        written = world.history_of(host)
        told = list(replay.replay(written))
        assert told == list(replay.replay(written))
        assert len(told) == len(written) + 1
        assert told[0] == f"run of host ({world.hosts[host].node_id[:8]}), cluster demo"
        assert all(
            re.match(r" *\d+\.\d{3} [a-z]+ +\S", t) or t.startswith("run") for t in told[:-1]
        )
        assert told[-1].startswith("Running as ")
        assert all("\n" not in line for line in told)


def test_a_history_holds_no_key() -> None:
    """What is said of keys are digests; a request and certificates are public."""
    text = "".join("".join(recorded(0).history_of(h)) for h in range(3))
    assert "PRIVATE" not in text and "token" not in text


def test_what_a_later_run_began_with_is_in_its_opening() -> None:
    worlds = [recorded(seed) for seed in range(6)]  # in some a host that had decided restarts
    later = [o for w in worlds for h in range(len(w.hosts)) for o, _ in w.runs(h)[1:]]
    assert any(o.stored.register.value for o in later)
    assert any(o.stored.decided for o in later)
