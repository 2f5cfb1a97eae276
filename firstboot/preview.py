"""`firstboot plan`: what a host of either role would get, without touching it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from firstboot import userdata
from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import status
from firstboot.protocol.errors import LocalError, UserError
from firstboot.protocol.model import Member, Role, Value
from firstboot.protocol.plan import make_leaves, make_plan
from firstboot.userdata import Document

FINGERPRINT = "0" * 64


def preview(document: Document, role: Role, name: str, address: str) -> dict[str, Any]:
    """The steps and certificates of a host as plain data; UserError if name or address is none.

    Nothing is decided yet, so the others have names and addresses that are for documentation
    (RFC 5737). Secrets stay as ``@{NAME}``: they are put in when a file is written.
    """
    config = document.config
    try:
        me = Member("f" * 32, name, address)
    except ValueError as error:
        raise UserError(str(error), hint="see firstboot plan --help", code=64) from None
    others = [Member(f"{n:032x}", f"master-{n}", f"192.0.2.{n}") for n in range(1, 6)]
    masters = [me, *others] if role is Role.MASTER else others
    value = Value(1, FINGERPRINT, tuple(masters[: config.masters]), True, config.expect)
    payload = PAYLOADS[config.payload]
    options = {**OPTIONS[config.payload], **document.options_for(lambda _match: False)}
    try:
        steps = make_plan(payload, value, me, config.cluster, options)
        leaves = make_leaves(payload, value, me, config.cluster, options)
    except LocalError as error:
        raise UserError(str(error)) from None
    return {
        "role": role.value,
        "name": name,
        "address": address,
        "certificates": [_plain(leaf) for leaf in leaves],
        "steps": [{"what": status.say(s), "kind": type(s).__name__, **_plain(s)} for s in steps],
    }


def text(shown: Mapping[str, Any], form: str) -> str:
    """The preview as ``yaml``, ``json`` or ``text``, the steps in words only."""
    if form == "yaml":
        return userdata.dump(shown).rstrip()
    if form == "json":
        return json.dumps(shown, indent=2)
    return "\n".join(f"{n:4}  {step['what']}" for n, step in enumerate(shown["steps"], 1))


def _plain(row: Any) -> dict[str, Any]:
    """A row's fields, without those that say nothing; modes as people write them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        item = getattr(row, field.name)
        if item in ("", (), False) or field.name == "when":
            continue
        if field.name == "mode":
            item = f"{item:04o}"
        elif field.name == "values":
            item = dict(item)
        elif isinstance(item, tuple):
            item = list(item)
        elif isinstance(item, StrEnum):
            item = item.value
        found[field.name] = item
    return found
