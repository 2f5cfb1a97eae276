"""The token: one secret all hosts share. Strong, checksummed, never shown.

A one-time token looks different, so that a host knows by it that its cluster exists already: such
a host joins and never votes (ADR 9).
"""

from __future__ import annotations

import hashlib
import re

from firstboot.protocol.errors import UserError

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
BODY, CHECK, GROUP = 32, 4, 6  # characters of 5 bits: 160 random bits, 20 bits of checksum
FORMATION, ONE_TIME = "fb1", "fb1j"  # the prefixes
TOKEN = re.compile(rf"fb1j?(-[{ALPHABET}]{{6}}){{6}}")
# Words with a letter or sign outside the alphabet, so no real token can contain one by chance.
PLACEHOLDER = re.compile(r"…|\.\.\.|<|changeme|change-me|replace|example|placeholder|token", re.I)
# Stands where a token stood on a host whose admission has closed, and is as long as that was.
REMOVED = "fb1-removed-when-admission-closed"
HIDDEN = "***"
REMEDY = "make one with: firstboot token"


class Secret:
    """A text that is never shown by accident; `reveal` is the only way to it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return format(HIDDEN, spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def make_token(prefix: str = FORMATION) -> str:
    """A new token: prefix, 160 bits from the system's CSPRNG, checksum; in groups of six."""
    import secrets

    body = "".join(secrets.choice(ALPHABET) for _ in range(BODY))
    return assemble(body, prefix)


def assemble(body: str, prefix: str = FORMATION) -> str:
    """The token with these 32 characters: prefix and checksum added, grouped."""
    text = body + _checksum(prefix, body)
    return "-".join([prefix, *(text[i : i + GROUP] for i in range(0, len(text), GROUP))])


def is_one_time(text: str) -> bool:
    """Whether this token, which was checked, is one that ``firstboot admit`` made."""
    return text.startswith(f"{ONE_TIME}-")


def removed(text: str) -> str:
    """What is put in the place of this token."""
    return REMOVED.ljust(len(text), "-")


def is_removed(text: str) -> bool:
    """Whether this stands where a token was removed."""
    return text.rstrip("-") == REMOVED


def check_token(text: str, where: str = "") -> None:
    """Raise UserError unless `text` is a token as `make_token` makes them; it is not quoted."""
    complaint = _complaint(text)
    if complaint:
        raise UserError(f"the token {complaint}", where=where, hint=REMEDY)


def _complaint(text: str) -> str:
    prefix, _, rest = text.partition("-")
    body = rest.replace("-", "")
    if not text or PLACEHOLDER.search(text):
        return "is a placeholder"
    if prefix not in (FORMATION, ONE_TIME) or not rest:
        return "does not start with fb1-"
    if len(body) < BODY + CHECK:
        return "is too short: it is weak or was cut off"
    body, check = body[:BODY], body[BODY:]
    # 32 random characters hold about 20 different ones; fewer than 8 never happens by chance.
    if len(set(body)) < 8 or any(body[p:] == body[:-p] for p in range(1, BODY // 2 + 1)):
        return "is a repeated pattern"
    if not TOKEN.fullmatch(text) or check != _checksum(prefix, body):
        return "was mistyped: its checksum does not fit"
    return ""


def _checksum(prefix: str, body: str) -> str:
    said = f"firstboot token {prefix.removeprefix('fb')} {body}"
    digest = hashlib.sha256(said.encode(errors="replace")).digest()
    number = int.from_bytes(digest[:4], "big")
    return "".join(ALPHABET[number >> 5 * i & 31] for i in range(CHECK))
