"""What people read where they log in: agetty's and pam_motd's directories in /run.

agetty(8) shows the one above its prompt, on serial consoles too; where there is an /etc/issue it
looks into /etc/issue.d instead, and a link there (tmpfiles.d/firstboot.conf) leads to that file.
pam_motd(8) shows the other after a login. Both only read: nobody who logs in waits for firstboot.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from firstboot.host.durable import make_directory, storage, write_atomically

ISSUE, MOTD = "run/issue.d/firstboot.issue", "run/motd.d/firstboot"
RELOAD = "run/agetty.reload"  # agetty makes and watches it; what `agetty --reload` touches


def tell_logins(root: Path, text: str) -> None:
    """Show `text`, lines of printable characters, where people log in; nothing if it is empty."""
    # A backslash begins one of agetty's own sequences.
    changed = _show(root / ISSUE, text.replace("\\", "\\\\"))
    _show(root / MOTD, text)
    if changed:
        with suppress(OSError):  # no agetty waits
            os.utime(root / RELOAD)


def _show(path: Path, text: str) -> bool:
    with storage(f"write {path}"):
        if not text:
            there = path.exists()
            path.unlink(missing_ok=True)
            return there
        if not path.parent.is_dir():
            make_directory(path.parent, 0o755)
    write_atomically(path, text.encode(), 0o644)
    return True
