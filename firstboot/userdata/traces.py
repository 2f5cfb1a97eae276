"""Copies of the token among what user-data leaves on a host, and how to take it out of them.

Whatever form a copy has, taking the token out keeps its length: cloud-init's own files, a pickle
among them, stay what they were to their readers.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from firstboot.userdata.places import DEFAULTS, written
from firstboot.userdata.token import TOKEN, removed

MAX_FILE = 8 * 1024 * 1024  # bytes; user-data has 16 kB on EC2 and 64 kB on OpenStack
MAX_PLAIN = 4 * 1024 * 1024  # of what is decompressed
MAX_FILES = 4096
MAX_GZIP = 16  # compressed parts of one file
DEPTH = 3  # a file in base64, in a multi-part message in base64, compressed
CLOUD_INIT = ("var/lib/cloud", "run/cloud-init")
IGNITION = ("run/ignition.json", "etc/.ignition-result.json", "boot/ignition")
IMAGE = (DEFAULTS, "usr/lib/ignition")  # one and the same for all hosts: never changed
_WANTED = re.compile(f"{TOKEN.pattern}|{removed('')}".encode())
_TOKEN = re.compile(TOKEN.pattern.encode())
_GZIP = re.compile(rb"\x1f\x8b\x08")  # RFC 1952, with the only method there is
# Lines of base64, and such lines inside a JSON string.
_BREAK = rb"(?:(?:\\r)?\\n|\r?\n)[ \t]*+"
_RUN = re.compile(rb"(?:[A-Za-z0-9+/]++(?:" + _BREAK + rb")?+)++")
_PIECES = re.compile(_BREAK + rb"|[A-Za-z0-9+/]+")
_SHORTEST = 60  # characters of base64 that hold a token


def documents(root: Path) -> Iterator[Path]:
    """The files that make this host's document, links followed."""
    yield from (path.resolve() for path in written(root))


def copies(root: Path, tops: tuple[str, ...]) -> Iterator[Path]:
    """Regular files below these places, `MAX_FILES` of each at most; links are not followed."""
    for top in tops:
        yield from islice(_files(root / top), MAX_FILES)


def _files(top: Path) -> Iterator[Path]:
    try:
        mode = top.lstat().st_mode
        below = sorted(top.iterdir()) if stat.S_ISDIR(mode) else []
    except OSError:
        return
    if stat.S_ISREG(mode):
        yield top
    for path in below:
        yield from _files(path)


def without_token(data: bytes) -> tuple[bytes, bool]:
    """The same data without any token; whether there was one, or one was taken out before.

    It is found as it stands, in base64 and in gzip, and in one within the other.
    """
    return _cleaned(data, DEPTH)


def _cleaned(data: bytes, depth: int) -> tuple[bytes, bool]:
    found = bool(_WANTED.search(data))
    data = _TOKEN.sub(lambda m: removed(m[0].decode()).encode(), data) if found else data
    if depth:
        for open_up in (_gzip, _base64):
            data, there = open_up(data, depth - 1)
            found = found or there
    return data, found


def _gzip(data: bytes, depth: int) -> tuple[bytes, bool]:
    """Compressed parts that hold a token are written over: nothing else has their length."""
    import zlib

    found = False
    for start in [m.start() for m in _GZIP.finditer(data)][:MAX_GZIP]:
        stream = zlib.decompressobj(wbits=31)
        try:
            plain = stream.decompress(data[start:], MAX_PLAIN)
        except zlib.error:
            continue
        if not _cleaned(plain, depth)[1]:
            continue
        end = len(data) - len(stream.unused_data) if stream.eof else len(data)
        filler = removed("").encode().ljust(end - start)[: end - start]
        data, found = data[:start] + filler + data[end:], True
    return data, found


def _base64(data: bytes, depth: int) -> tuple[bytes, bool]:
    found = False
    for run in list(_RUN.finditer(data)):
        if run.end() - run.start() < _SHORTEST:
            continue
        text = b"".join(piece[0] for piece in _pieces(data, run))
        # A pickle's length byte before it may look like one more character.
        for first in range(4):
            cleaned, there = _reencoded(text[first:], depth)
            if there:
                found, data = True, _put_back(data, run, text[:first] + cleaned)
                break
    return data, found


def _pieces(data: bytes, run: re.Match[bytes]) -> Iterator[re.Match[bytes]]:
    pieces = _PIECES.finditer(data, run.start(), run.end())
    yield from (piece for piece in pieces if piece[0][:1] not in b"\\\r\n")


def _put_back(data: bytes, run: re.Match[bytes], text: bytes) -> bytes:
    """The same lines with this text in them, which may be shorter by what did not decode."""
    changed, at = bytearray(data), 0
    for piece in _pieces(data, run):
        part = text[at : at + len(piece[0])]
        changed[piece.start() : piece.start() + len(part)] = part
        at += len(part)
    return bytes(changed)


def _reencoded(text: bytes, depth: int) -> tuple[bytes, bool]:
    """This base64, without padding, of the same data without a token."""
    import binascii

    text = text[: len(text) - (len(text) % 4 == 1)]
    plain, found = _cleaned(binascii.a2b_base64(text + b"=" * (-len(text) % 4)), depth)
    return binascii.b2a_base64(plain, newline=False)[: len(text)] if found else text, found
