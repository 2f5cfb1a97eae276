"""A host's whole history as lines of JSON, and the way back: `firstboot replay` re-runs it.

The first line of a run holds what the core was made from, every further line one event and the
moment it came. Nothing in it is secret: no key and no token ever travels in an event.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from firstboot.protocol import events, messages
from firstboot.protocol.errors import RemoteError, UserError
from firstboot.protocol.model import USUAL, Channel, ClusterConfig, Issued, Self, Stored, Topology
from firstboot.protocol.record import dataclass

EVENTS: dict[str, type[Any]] = {kind.__name__: kind for kind in events.Event.__args__}
RUN = '{"run": '  # no text within a line can look like this: JSON escapes its quotes


@dataclass(frozen=True, slots=True)
class Opening:
    """What one run of the core was made from; `seed` is that of its random numbers.

    `options` are the payload's variables, as JSON; empty: its defaults.
    """

    config: ClusterConfig
    me: Self
    stored: Stored
    issued: tuple[Issued, ...]
    seed: int
    now: float
    wall_offset: float
    options: bytes = b""
    topology: Topology = USUAL


def opening_line(opening: Opening) -> str:
    """The first line of a run."""
    return f"{RUN}{json.dumps(messages.to_plain(opening))}}}"


def event_line(event: events.Event, now: float) -> str:
    """One event and its monotonic moment."""
    if isinstance(event, events.MessageReceived):
        plain = {"node_id": event.node_id, "channel": event.channel.value}
        plain["message"] = messages.encode(event.message).decode()
    else:
        plain = messages.to_plain(event)
    return json.dumps({"at": round(now, 6), "event": type(event).__name__, **plain})


def read(lines: Iterable[str]) -> Iterator[Opening | tuple[float, events.Event]]:
    """What was written, in order; UserError names the line that cannot be read.

    What a power failure cut short is left out: a last line, and the beginning of a line on which
    the next run then went on.
    """
    waiting = list(lines)
    for number, line in enumerate(waiting, start=1):
        item = _item(line) or _item(line[max(0, line.rfind(RUN)) :])
        if item is not None:
            yield item
        elif number < len(waiting):
            message = "this line is not part of a firstboot history"
            raise UserError(message, where=f"line {number}")


def _item(line: str) -> Opening | tuple[float, events.Event] | None:
    """What this line says, None if it is not one of ours."""
    try:
        return _from_plain(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None  # whatever json and this file's own reading of it may raise
    except RemoteError:
        return None  # no message of this version's


def _from_plain(plain: dict[str, Any]) -> Opening | tuple[float, events.Event]:
    if "run" in plain:
        opening: Opening = messages.from_plain(Opening, plain["run"])
        return opening
    now: float = messages.from_plain(float, plain.pop("at"))
    kind = EVENTS[plain.pop("event")]
    if kind is events.MessageReceived:
        message = messages.decode(plain["message"].encode())
        channel = Channel(plain["channel"])
        return now, events.MessageReceived(plain["node_id"], channel, message)
    event: events.Event = messages.from_plain(kind, plain)
    return now, event
