"""The shipped JSON Schema, and its violations as sentences with a position and a remedy."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from firstboot.protocol.errors import UserError
from firstboot.userdata.reading import MAX_SHOWN, Place, Said, show
from firstboot.userdata.token import REMEDY

ANNOTATIONS = ("title", "description", "examples", "default", "definitions", "x-must")
NAMED = ("auto", "mdns", "sweep", "ec2", "openstack")  # providers that need no options


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft-07), with its references written out."""
    text = (Path(__file__).parents[1] / "schema.json").read_text(encoding="utf-8")
    shared = json.loads(text)["definitions"]

    # fastjsonschema 2.16 loses list indexes in the path of an error below a reference.
    def inline(found: dict[str, Any]) -> Any:
        ref = str(found.get("$ref", ""))
        return shared[ref.rpartition("/")[2]] if ref else found

    rules: dict[str, Any] = json.loads(text, object_hook=inline)
    return rules


def validator(data: Any) -> Callable[[Any], Any]:
    """The part of the schema that speaks of `data`, compiled: all of it would take 12 ms.

    Unknown keys are not its concern. It raises fastjsonschema.JsonSchemaValueException.
    """
    import fastjsonschema

    validate: Callable[[Any], Any] = fastjsonschema.compile(_part(_without_words(), data))
    return validate


@cache
def _without_words() -> dict[str, Any]:
    """The schema as the compiler gets it, which copies a rule into every error it can raise."""

    def bare(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key not in ANNOTATIONS}

    rules: dict[str, Any] = json.loads(json.dumps(schema()), object_hook=bare)
    return rules


def _part(rule: dict[str, Any], value: Any) -> dict[str, Any]:
    """The rule without what it says of keys that `value` has not."""
    if isinstance(value, list) and "properties" in rule.get("items", {}):
        named = {key for item in value if isinstance(item, dict) for key in item}
        named |= set(rule["items"].get("required", ()))  # to be missed, it must be known
        known = {key: p for key, p in rule["items"]["properties"].items() if key in named}
        return {**rule, "items": {**rule["items"], "properties": known}}
    if "properties" not in rule or not isinstance(value, dict):
        return rule
    said = {key: _part(p, value[key]) for key, p in rule["properties"].items() if key in value}
    return {**rule, "properties": said}


def check(said: Said) -> None:
    """Raise UserError for the first thing the schema does not allow.

    Unknown keys come first: a mistyped key is also a missing one, and that would say less.
    """
    import fastjsonschema

    _check_providers(said)
    for place, near in _unknown_keys(schema(), said.data, ()):
        inside = f" in {dotted(place[:-1])}" if place[:-1] else ""
        known = ", ".join(rule_for(place[:-1])["properties"])
        hint = f"did you mean {near}?" if near else f"known here: {known}"
        message = _named("unknown key", place[-1]) + inside
        raise UserError(message, where=said.where(place, key=True), hint=hint)
    for key in schema()["required"]:
        if key not in said.data:
            hint = f"add: {example((key,))} ({rule_for((key,))['x-must']})"
            raise said.error((), f"{key} is missing", REMEDY if key == "token" else hint)
    try:
        validator(said.data)(said.data)
    except fastjsonschema.JsonSchemaValueException as error:
        place = tuple(error.path[1:])
    else:
        return
    raise wrong(said, place)


def wrong(said: Said, place: Place, must: str = "", hint: str = "") -> UserError:
    """The value at `place` is not what the schema, or `must`, asks for."""
    rule, value = rule_for(place), said.data
    for step in place:
        value = value[int(step)] if isinstance(value, list) else value[step]
    if isinstance(value, int) and re.search(rule.get("pattern", r"\A\Z"), str(value)):
        hint = "put it in quotes"
    named = place[: 1 + max(i for i, step in enumerate(place) if not step.isdigit())]
    hint = hint or f"for example: {example(named)}"
    message = f"{dotted(place)} must be {must or rule['x-must']}, not {show(value)}"
    return said.error(place, message, hint)


def check_network(said: Said, place: Place, text: str, *, prefix: bool) -> None:
    """Raise UserError unless `text` is a network or, without `prefix`, perhaps an address."""
    try:
        inside = ipaddress.ip_interface(text)
    except ValueError:
        raise wrong(said, place) from None
    if "%" in text or (prefix and "/" not in text):  # a scope (RFC 4007) means one host's link
        raise wrong(said, place)
    if "/" in text and inside.ip != inside.network.network_address:
        message = f"{dotted(place)} names a host, not a network"
        raise said.error(place, message, f"write {inside.network}")


def rule_for(place: Place) -> dict[str, Any]:
    """The part of the schema for a place, or for the nearest one above that it describes."""
    rule = schema()
    for step in place:
        below = rule.get("items") if step.isdigit() else rule.get("properties", {}).get(step)
        if below is None:
            break
        rule = below
    return rule


def filled(given: Mapping[str, Any], rule: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`given`, which was checked, with the schema's defaults for what it does not say."""
    full: dict[str, Any] = {}
    for key, part in (rule or schema())["properties"].items():
        if "properties" in part:
            full[key] = filled(given.get(key, {}), part)
        elif key in given or "default" in part:
            full[key] = given.get(key, part.get("default"))
    return full


def example(place: Place) -> str:
    """How a key may be written, from the schema's examples: ``grace: 120s``."""
    first = rule_for(place)["examples"][0]
    return f"{place[-1]}: {show(first) if isinstance(first, bool) else first}"


def dotted(place: Place) -> str:
    """A place as people write it: ``election.prefer[0].mac``."""
    return "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in place).lstrip(".")


def _named(what: str, name: str) -> str:
    shown = show(name)
    return f"{what} {shown}" if shown.startswith(("'", '"')) else what


def _unknown_keys(rule: Mapping[str, Any], value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Each key the schema does not know, with the nearest one that it does ("" if none is)."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _unknown_keys(rule.get("items", {}), item, (*place, str(i)))
    if isinstance(value, dict) and "properties" in rule:
        for key, item in value.items():
            if key in rule["properties"]:
                yield from _unknown_keys(rule["properties"][key], item, (*place, key))
            else:
                import difflib

                near = difflib.get_close_matches(key[:MAX_SHOWN], rule["properties"], n=1)
                yield (*place, key), "".join(near)


def _check_providers(said: Said) -> None:
    """Name the provider that is wrong; the schema alone could only show a pattern."""
    listed = said.data.get("discovery")
    known = (*NAMED, *(k for k in rule_for(("discovery", "0"))["properties"] if k not in NAMED))
    for i, item in enumerate(listed if isinstance(listed, list) else []):
        place = ("discovery", str(i))
        if isinstance(item, dict) and len(item) != 1:
            raise wrong(said, place)
        name = next(iter(item)) if isinstance(item, dict) else item
        if isinstance(name, str) and name not in known:
            message = _named("unknown discovery provider", name)
            raise said.error(place, message, f"known: {', '.join(known)}")
        if isinstance(item, str) and name not in NAMED:
            hint = f"for example: {example(('discovery', str(i), name))}"
            raise said.error(place, f"the discovery provider {name} needs options", hint)
