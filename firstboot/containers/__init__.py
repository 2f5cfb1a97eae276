"""Atomic system containers: install, update, roll back, remove, list; not their units' life.

An image with ``/exports`` becomes a root file system, an OCI ``config.json`` and a systemd unit
that runs runc or crun in that directory; no container daemon is involved.
"""

from firstboot.containers.image import default_name
from firstboot.containers.install import (
    Installed,
    Removed,
    build,
    info,
    install,
    installed,
    pull,
    resume,
    rollback,
    uninstall,
    update,
)
from firstboot.containers.store import Container
from firstboot.containers.tools import ContainerError

__all__ = [
    "Container",
    "ContainerError",
    "Installed",
    "Removed",
    "build",
    "default_name",
    "info",
    "install",
    "installed",
    "pull",
    "resume",
    "rollback",
    "uninstall",
    "update",
]
