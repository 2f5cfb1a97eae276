"""Gets the document that the kernel's command line names, and tells for how long it could not."""

from __future__ import annotations

import time
from pathlib import Path

from firstboot import host, userdata
from firstboot.protocol.errors import LocalError
from firstboot.publisher import Publisher

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0  # seconds between two attempts


def obtain(root: Path, publisher: Publisher) -> None:
    """Have the document where `userdata.find` looks; nothing if the command line names none.

    Tries until it is there: what the machine was told to be, it must not guess. Boot and login do
    not wait for this. Once fetched it stays for this boot, see `forget`. Raises UserError for a
    mistake in the command line, LocalError where /run cannot be written.
    """
    source, path = userdata.named(root), root / userdata.FETCHED
    if source is None or path.exists():
        return
    host.make_directory(path.parent, 0o700)
    data = _fetch(source, path.parent.parent, publisher)
    host.write_atomically(path, data, 0o600)


def forget(root: Path) -> None:
    """Drop the document: it has a mistake, and the next start shall see whether it still has."""
    (root / userdata.FETCHED).unlink(missing_ok=True)


def _fetch(source: userdata.Source, directory: Path, publisher: Publisher) -> bytes:
    from firstboot.userdata.fetch import fetch  # 60 ms that few hosts need

    pause = FIRST_PAUSE
    while True:
        try:
            return fetch(source, directory)
        except LocalError as error:
            publisher.waiting_for_document(str(source), str(error))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
