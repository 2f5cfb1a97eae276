"""The document that the kernel's command line names: where it lies, and its digest.

    firstboot.config=https://boot.example.org/demo.yaml
    firstboot.config=http://10.0.0.1/demo.yaml firstboot.config.digest=sha256:6b86b273…
    firstboot.config=LABEL=SEED:/demo.yaml
    firstboot.config=/dev/disk/by-label/SEED

The digest is that of the document's bytes; over plain http it is required (ADR 18).
"""

from __future__ import annotations

import re
from pathlib import Path

from firstboot.protocol.errors import UserError
from firstboot.protocol.record import dataclass

WHERE = "the kernel's command line"
CONFIG, DIGEST = "firstboot.config", "firstboot.config.digest"
FETCHED = "run/firstboot/config.d/50-kernel-argument.yaml"  # for this boot only
MAX_LINE = 65536  # bytes; kernels take 2 to 4 KiB
MAX_TEXT = 2048  # of one argument
FILE = "/firstboot.yaml"  # on a device, unless the argument names another


@dataclass(frozen=True, slots=True)
class Source:
    """Where the document lies. `place` is a URL or a device, `path` a file on that device.

    `digest` is SHA-256 in lower-case hexadecimal digits, empty if none was given.
    """

    place: str
    path: str
    digest: str

    def __str__(self) -> str:
        """For people, without what may be a secret in a URL."""
        return f"{self.place}:{self.path}" if self.path else re.split("[?#]", self.place)[0]


def named(root: Path) -> Source | None:
    """What the kernel's command line says, None if nothing. UserError for a mistake in it."""
    said = {}
    for word in _words(root):
        key, equals, value = word.partition("=")
        if key in (CONFIG, DIGEST) and equals:
            said[key] = value  # as everywhere on this line, the last one wins
        elif key.startswith("firstboot."):
            hint = f"write {CONFIG}=URL or {CONFIG}=DEVICE"
            raise UserError(f"unknown argument {key[:64]!r}", where=WHERE, hint=hint)
    if CONFIG not in said:
        if DIGEST in said:
            raise UserError(f"{DIGEST} without {CONFIG}", where=WHERE)
        return None
    digest, place = _digest(said.get(DIGEST, "")), said[CONFIG]
    if not re.fullmatch(f"[!-~]{{1,{MAX_TEXT}}}", place):
        raise UserError(f"{CONFIG} is empty, too long or not plain ASCII", where=WHERE)
    if place.startswith(("LABEL=", "/dev/")):
        device, _, path = place.partition(":")
        if path and not path.startswith("/"):
            raise UserError(f"{CONFIG} must name a file from / on the device", where=WHERE)
        return Source(device, path or FILE, digest)
    _check_url(place, digest)
    return Source(place, "", digest)


def _words(root: Path) -> list[str]:
    """The command line's words; in a container those its manager gave, as for systemd itself."""
    container = (root / "run/systemd/container").exists()
    try:
        with (root / ("proc/1/cmdline" if container else "proc/cmdline")).open("rb") as file:
            text = file.read(MAX_LINE).decode("utf-8", "replace")
    except OSError:
        return []  # no such file: this is not a host that booted
    if "firstboot." not in text:
        return []  # as nearly always
    if container:
        return text.split("\0")
    import shlex

    try:
        return shlex.split(text)
    except ValueError:  # a quote that does not end: nobody's word for where it was meant to
        return text.split()


def _digest(text: str) -> str:
    kind, _, digits = text.lower().partition(":")
    if text and not (kind == "sha256" and re.fullmatch("[0-9a-f]{64}", digits)):
        hint = "write sha256: and the 64 digits that sha256sum prints"
        raise UserError(f"{DIGEST} is not a SHA-256 digest", where=WHERE, hint=hint)
    return digits


def _check_url(place: str, digest: str) -> None:
    from urllib.parse import urlsplit

    try:
        url = urlsplit(place)
        good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        hint = "write http://…, https://…, LABEL=NAME or /dev/…"
        raise UserError(f"{CONFIG} is neither a URL nor a device", where=WHERE, hint=hint)
    if url.username is not None:
        raise UserError(f"{CONFIG} has a password in it, which everybody can read", where=WHERE)
    if url.scheme == "http" and not digest:
        hint = f"use https, or add {DIGEST}=sha256:… (what sha256sum prints)"
        raise UserError("what comes over http may be anybody's", where=WHERE, hint=hint)
