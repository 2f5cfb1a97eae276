"""The status that anybody on the host may read; nothing secret ever goes there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firstboot.host.durable import make_directory, storage, write_atomically

STATUS = "run/firstboot/status.json"
MAX_STATUS = 1024 * 1024


def write_status(root: Path, status: dict[str, Any]) -> None:
    """Replace the status, atomically; /run is in memory, so nothing is synced to a disk."""
    path = root / STATUS
    if not path.parent.is_dir():
        with storage(f"make {path.parent}"):
            make_directory(path.parent, 0o755)
    # Not indented: that takes json ten times as long, and this is written some 20 times a start.
    text = json.dumps(status, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(), 0o644)


def read_status(root: Path) -> dict[str, Any] | None:
    """The last status written since power-on, None if there is none."""
    path = root / STATUS
    try:
        with path.open("rb") as file:
            status = json.loads(file.read(MAX_STATUS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        # Only root writes there, and never half a file: as good as no status.
        return None
    return status if isinstance(status, dict) else None
