"""Passwords for registries: in a file that skopeo reads, containers-auth.json(5), never in argv."""

from __future__ import annotations

import json
import os
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firstboot.containers import disk
from firstboot.containers.tools import ContainerError

FILE = "/etc/firstboot/auth.json"
FILE_LIMIT = 1024 * 1024  # bytes


def choose(root: Path, given: Path | None) -> str:
    """The file to use: `given`, else $REGISTRY_AUTH_FILE, else this host's; empty for none.

    ContainerError if one that was asked for, or is there, cannot be used.
    """
    asked = given or os.environ.get("REGISTRY_AUTH_FILE")
    path = Path(asked) if asked else disk.inside(root, FILE)
    if not asked and not path.exists():
        return ""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(FILE_LIMIT))
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ContainerError(f"{path} is not JSON as skopeo login writes it")  # nor is it repeated
    return str(path.absolute())


@contextmanager
def written(registry: str, user: str, password: str) -> Iterator[Path]:
    """Such a file for one registry, gone afterwards."""
    secret = b64encode(f"{user}:{password}".encode()).decode()
    with tempfile.TemporaryDirectory(prefix="firstboot-") as directory:  # 0700
        path = Path(directory, "auth.json")
        disk.write_file(path, json.dumps({"auths": {registry: {"auth": secret}}}).encode(), 0o600)
        yield path
