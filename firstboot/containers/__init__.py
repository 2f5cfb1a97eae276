"""Atomic system containers: install, replace in place, remove, list. Nothing here talks to systemd.

An image with ``/exports`` becomes a root file system, an OCI ``config.json`` and a systemd unit
that runs runc or crun in that directory; no container daemon is involved.
"""

from firstboot.containers.install import Installed, Removed, info, install, installed, uninstall
from firstboot.containers.store import Container
from firstboot.containers.tools import ContainerError

__all__ = [
    "Container",
    "ContainerError",
    "Installed",
    "Removed",
    "info",
    "install",
    "installed",
    "uninstall",
]
