"""Runs a recorded history through the core again and tells what it did, event by event."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator

from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import events, history, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.errors import UserError
from firstboot.protocol.situation import Start

_NO_RUN, _HINT = "this file does not begin with a run", "give a history.jsonl"


def replay(lines: Iterable[str]) -> Iterator[str]:
    """One line per event: seconds since the start, the stage, the event, the actions it caused.

    Deterministic: the same history gives the same lines. Raises UserError for a file that is no
    history.
    """
    core: Assembly | None = None
    start = 0.0
    for item in history.read(lines):
        if isinstance(item, history.Opening):
            core, start = _core(item), item.now
            yield f"run of {core.me.name} ({core.me.node_id[:8]}), cluster {core.config.cluster}"
            continue
        if core is None:
            raise UserError(_NO_RUN, hint=_HINT)
        now, event = item
        actions = core.receive(event, now)
        done = ", ".join(_short(a) for a in actions) or "-"
        yield f"{now - start:10.3f} {core.stage.value:11} {_short(event)} -> {done}"
    if core is None:
        raise UserError(_NO_RUN, hint=_HINT)
    yield status.sentence(core)[0]


def _core(opening: history.Opening) -> Assembly:
    config = opening.config
    if config.payload not in PAYLOADS:
        raise UserError(f"this version knows no payload {config.payload!r}")
    return Assembly(
        Start(
            config=config,
            me=opening.me,
            stored=opening.stored,
            issued=opening.issued,
            payload=PAYLOADS[config.payload],
            options=json.loads(opening.options) if opening.options else OPTIONS[config.payload],
            rng=random.Random(opening.seed),  # noqa: S311  the recorded run's own numbers
            now=opening.now,
            topology=opening.topology,
        )
    )


def _short(item: events.Event | events.Action) -> str:
    name = type(item).__name__
    match item:
        case events.MessageReceived():
            return f"{type(item.message).__name__} from {item.node_id[:8]}"
        case events.Send():
            return f"send {type(item.message).__name__} to {item.node_id[:8]}"
        case events.PeerFound() | events.Connect():
            return f"{name} {item.endpoint}"
        case events.Connected() | events.Disconnected():
            return f"{name} {item.node_id[:8]} ({item.channel})"
        case events.RunStep():
            return status.say(item.step)
        case events.StepFailed():
            return f"{name} {item.reason}"
    return name
