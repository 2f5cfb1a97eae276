"""What the operator set for all system containers: ``/etc/atomic.conf`` and Atomic's variables.

The file is YAML; of it are read the lines ``key: value`` at the first level, which is how it is
written everywhere. A host without the file has the defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from firstboot.containers import disk
from firstboot.containers.tools import ContainerError

FILE = "/etc/atomic.conf"
CHECKOUTS = "/var/lib/containers/atomic"
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
FILE_LIMIT = 1024 * 1024  # bytes
_LINE = re.compile(r"""([a-z_]+):[ \t]+(?:"([^"]*)"|'([^']*)'|([^#"'\s]\S*))[ \t]*(?:#.*)?\Z""")


@dataclass(frozen=True, slots=True)
class Settings:
    """Empty means: not set."""

    checkouts: str = CHECKOUTS
    repository: str = ""
    runtime: str = ""
    registries: str = ""
    proxies: Mapping[str, str] = field(default_factory=dict)


def read(root: Path) -> Settings:
    """The settings of the host at `root`; the environment is stronger than the file."""
    raw = disk.read_if_there(disk.inside(root, FILE)) or b""
    if len(raw) > FILE_LIMIT:
        raise ContainerError(f"{FILE} is larger than {FILE_LIMIT} bytes")
    found = {}
    for line in raw.decode(errors="replace").splitlines():
        if match := _LINE.match(line):
            found[match[1]] = next(group for group in match.groups()[1:] if group is not None)
    checkouts = os.environ.get("ATOMIC_OSTREE_CHECKOUT_PATH") or found.get("checkout_path")
    repository = os.environ.get("ATOMIC_OSTREE_REPO") or found.get("ostree_repository", "")
    for key, path in (("checkout_path", checkouts), ("ostree_repository", repository)):
        if path and not path.startswith("/"):
            raise ContainerError(f"{key} in {FILE} must be an absolute path, not {path!r}")
    return Settings(
        checkouts=os.path.normpath(checkouts) if checkouts else CHECKOUTS,
        repository=repository,
        runtime=found.get("runtime", ""),
        registries=found.get("registry_confdir", ""),
        proxies={name: found[name] for name in PROXIES if found.get(name)},
    )
