"""What SELinux calls files, as the host's policy says; nothing where SELinux is not enabled."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from firstboot.containers.tools import run

ENABLED = Path("/sys/fs/selinux/enforce")
ATTRIBUTE = "security.selinux"
HOSTFS = "exports/hostfs/"  # below it a file gets the label of the place it is meant for
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "lnk_file"}
AT_ONCE = 500
SECONDS = 60.0


def enabled() -> bool:
    """Whether this host's kernel enforces a policy, or would."""
    return ENABLED.exists()


def of_policy(files: Iterable[tuple[str, int]]) -> dict[str, str]:
    """The labels of `files`, each a path in an image and its type as in stat(2), by that path."""
    found: dict[str, str] = {}
    for kind, name in KINDS.items():
        of_kind = (path for path, its in files if its == kind)
        while batch := list(islice(of_kind, AT_ONCE)):
            places = [f"/{path.removeprefix(HOSTFS)}" for path in batch]
            lines = run(["matchpathcon", "-m", name, *places], timeout=SECONDS).splitlines()
            told = dict(_pairs(lines))
            found |= {p: told[at] for p, at in zip(batch, places, strict=True) if at in told}
    return found


def fits(source: Path, place: str) -> bool:
    """Whether the file `source` has the label that a file at `place` on the host needs."""
    if ATTRIBUTE not in os.listxattr(source):
        return not enabled()
    path = place.lstrip("/")
    wanted = of_policy([(path, stat.S_IFREG)]).get(path) if enabled() else None
    return os.getxattr(source, ATTRIBUTE).rstrip(b"\0").decode(errors="replace") == wanted


def _pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        path, _, label = line.partition("\t")
        if label and label != "<<none>>":
            yield path, label
