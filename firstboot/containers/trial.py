"""Replacements on trial: a mark on disk from before the link changes until the unit stays up.

The mark names the deployment to go back to. It outlives a power cut, and
``firstboot-containers.service`` looks for marks at boot.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firstboot.containers import disk

# Not beside the checkouts: /etc/atomic.conf moves those, and the unit has to know where to look.
DIRECTORY = "/var/lib/firstboot-containers"


def begin(root: Path, name: str, before: str) -> None:
    """`name` changes from the deployment directory called `before`."""
    directory = _directory(root)
    if not directory.is_dir():
        directory.mkdir(0o700, parents=True)
        disk.sync_directory(directory.parent)
    disk.write_file(directory / name, before.encode(), 0o600)


def before(root: Path, name: str) -> str | None:
    """The deployment to go back to, None if `name` is not on trial."""
    raw = disk.read_if_there(_directory(root) / name)
    return None if raw is None else raw.decode(errors="replace")


def end(root: Path, name: str) -> None:
    """The new deployment is here to stay, or it is gone."""
    for mark in (name, f".{name}.new"):  # the latter is a mark that a power cut left unfinished
        (_directory(root) / mark).unlink(missing_ok=True)


def names(root: Path) -> list[str]:
    """What is on trial, sorted; with what only left an unfinished mark, so that it goes."""
    directory = _directory(root)
    there = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted({n[1:].removesuffix(".new") if n.startswith(".") else n for n in there})


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Wait for other trials on this host to end, then keep them out: two would both roll back."""
    directory = _directory(root)
    directory.mkdir(0o700, parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _directory(root: Path) -> Path:
    return disk.inside(root.absolute(), DIRECTORY)
