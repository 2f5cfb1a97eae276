"""Where system containers live on a host, and the record each deployment keeps of itself.

``/var/lib/containers/atomic/NAME`` is a symbolic link to the deployment in use, ``NAME.0`` or
``NAME.1``; the other one is the previous deployment, or empty.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstboot.containers import disk, settings
from firstboot.containers.tools import ContainerError

PREINSTALLED = "/usr/lib/containers/atomic"
UNITS = "/etc/systemd/system"
TMPFILES = "/etc/tmpfiles.d"
NUMBERS = frozenset(("HOST_UID", "HOST_GID"))  # the values that are not text in the info file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}\Z")


@dataclass(frozen=True, slots=True)
class Record:
    """The ``info`` file of a deployment; `created` is Unix time in seconds."""

    image: str = ""
    revision: str = ""
    created: int = 0
    values: Mapping[str, str] = field(default_factory=dict)
    has_service: bool = True
    files: Mapping[str, str] = field(default_factory=dict)
    files_template: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    use_links: bool = False
    runtime: str = ""
    commit: str | None = None
    remote: str | None = None
    package: str = "no"  # whether the host's package database is to know the files
    rpm: str | None = None  # the package, beside the info file, without .rpm

    def encode(self) -> bytes:
        """The record as Atomic's own tools read it."""
        document = {
            "image": self.image,
            "revision": self.revision,
            "ostree-commit": self.commit,
            "created": self.created,
            "values": {k: int(v) if k in NUMBERS else v for k, v in self.values.items()},
            "has-container-service": self.has_service,
            "installed-files": list(self.files),
            "installed-files-checksum": dict(self.files),
            "installed-files-template": list(self.files_template),
            "rename-installed-files": dict(self.renames),
            "rpm-installed": self.rpm,
            "system-package": self.package,
            "remote": self.remote,
            "use-links": self.use_links,
            "runtime": self.runtime,
        }
        return (json.dumps(document, indent=4) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Record:
        """Read a record; what older tools left out gets its default. ValueError if unusable."""
        found: Any = json.loads(raw)
        if not isinstance(found, dict):
            raise TypeError("not a mapping")
        return cls(
            image=str(found.get("image") or ""),
            revision=str(found.get("revision") or ""),
            created=int(found.get("created") or 0),
            values={k: str(v) for k, v in dict(found.get("values") or {}).items()},
            has_service=bool(found.get("has-container-service", True)),
            files={k: str(v) for k, v in dict(found.get("installed-files-checksum") or {}).items()},
            files_template=tuple(found.get("installed-files-template") or ()),
            renames=dict(found.get("rename-installed-files") or {}),
            use_links=bool(found.get("use-links", False)),
            runtime=str(found.get("runtime") or ""),
            commit=found.get("ostree-commit") or None,
            remote=found.get("remote") or None,
            package="yes" if found.get("system-package") == "yes" else "no",
            rpm=str(found.get("rpm-installed") or "") or None,
        )


@dataclass(frozen=True, slots=True)
class Deployment:
    """A complete deployment on disk."""

    name: str
    directory: Path
    record: Record

    @property
    def rootfs(self) -> Path:
        """The container's root file system."""
        return self.directory / "rootfs"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The program the container runs, with its arguments; empty if there is none to see."""
        try:
            found = json.loads(disk.read_if_there(self.directory / "config.json") or b"{}")
            return tuple(map(str, found["process"]["args"]))
        except (ValueError, LookupError, TypeError):
            return ()

    @property
    def package(self) -> Path | None:
        """The package of its host files if this project made one; Atomic keeps none."""
        path = self.directory / f"{self.record.rpm}.rpm"
        return path if self.record.rpm and path.is_file() else None

    @property
    def unit(self) -> bytes | None:
        """The unit this deployment wants installed."""
        return disk.read_if_there(unit_copy(self.directory, self.name))

    @property
    def tmpfiles(self) -> bytes | None:
        """The tmpfiles.d(5) lines this deployment wants installed."""
        return disk.read_if_there(tmpfiles_copy(self.directory, self.name))


@dataclass(frozen=True, slots=True)
class Container:
    """An installed system container. Paths are those the host itself uses.

    `unit` is empty for an image that only brings files, `tmpfiles` if nothing needs creating,
    `previous` if there is no deployment to roll back to. `files` are the host's that it brought.
    """

    name: str
    image: str
    image_id: str
    runtime: str
    deployment: str
    unit: str
    tmpfiles: str
    created: int
    values: Mapping[str, str]
    preinstalled: bool = False
    previous: str = ""
    command: str = ""
    files: tuple[str, ...] = ()


def unit_copy(directory: Path, name: str) -> Path:
    """Where a deployment keeps its unit."""
    return directory / f"{name}.service"


def tmpfiles_copy(directory: Path, name: str) -> Path:
    """Where a deployment keeps its tmpfiles.d(5) lines."""
    return directory / f"tmpfiles-{name}.conf"


class Store:
    """The containers of the host whose root directory is `root`; `authfile` is for pulls."""

    def __init__(self, root: Path, authfile: Path | None = None) -> None:
        self.root, self.authfile = root.absolute(), authfile
        self.settings = settings.read(self.root)
        self.checkouts = disk.inside(self.root, self.settings.checkouts)
        self.storage = self.checkouts / ".storage"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for other installations on this host to end, then keep them out."""
        self.checkouts.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.checkouts, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def link(self, name: str) -> Path:
        """The link that says which deployment is in use."""
        if not NAME.match(name):
            raise ContainerError(f"{name!r} cannot be the name of a system container")
        return self.checkouts / name

    def slots(self, name: str) -> tuple[Path, Path]:
        """The two places for deployments."""
        return self.link(f"{name}.0"), self.link(f"{name}.1")

    def unit_file(self, name: str) -> Path:
        """Where systemd looks for the unit."""
        return disk.inside(self.root, f"{UNITS}/{name}.service")

    def tmpfiles_file(self, name: str) -> Path:
        """Where systemd-tmpfiles looks for the lines."""
        return disk.inside(self.root, f"{TMPFILES}/{name}.conf")

    def current(self, name: str) -> Deployment | None:
        """The deployment in use, None if there is none or it is unusable."""
        link = self.link(name)
        if link.is_symlink():
            slot = self.checkouts / link.readlink().name
            return _load(name, slot) if slot in self.slots(name) else None
        if link.exists():
            raise ContainerError(f"{link} is in the way: it is not a link to a deployment")
        return None

    def spare(self, name: str, current: Deployment | None) -> Path:
        """The place for the next deployment."""
        first, second = self.slots(name)
        return second if current and current.directory == first else first

    def previous(self, name: str, current: Deployment | None) -> Deployment | None:
        """The complete deployment that is not in use, if there is one."""
        return _load(name, self.spare(name, current))

    def preinstalled(self, name: str) -> Deployment | None:
        """The deployment that came with the host's own image."""
        self.link(name)
        return _load(name, disk.inside(self.root, PREINSTALLED) / name)

    def names(self) -> list[str]:
        """The names of all containers here, sorted."""
        there = self.checkouts
        linked = {p.name for p in there.iterdir() if p.is_symlink()} if there.is_dir() else set()
        baked = disk.inside(self.root, PREINSTALLED)
        given = {p.name for p in baked.iterdir()} if baked.is_dir() else set()
        return sorted(name for name in linked | given if NAME.match(name))

    def container(self, deployment: Deployment) -> Container:
        """What the outside sees of a deployment."""
        record, name = deployment.record, deployment.name
        preinstalled = deployment.directory.parent != self.checkouts
        other = None if preinstalled else self.previous(name, deployment)
        return Container(
            name=name,
            image=record.image,
            image_id=record.revision,
            runtime=record.runtime,
            deployment=self.seen(deployment.directory),
            unit=f"{name}.service" if record.has_service else "",
            tmpfiles=f"{TMPFILES}/{name}.conf" if deployment.tmpfiles else "",
            created=record.created,
            values=record.values,
            preinstalled=preinstalled,
            previous=self.seen(other.directory) if other else "",
            command=" ".join(deployment.arguments),
            files=tuple(record.files),
        )

    def seen(self, directory: Path) -> str:
        """The path by which the host itself knows a deployment."""
        here = directory.parent == self.checkouts
        home = self.settings.checkouts if here else PREINSTALLED
        return f"{home}/{directory.name}"


def _load(name: str, directory: Path) -> Deployment | None:
    if directory.is_symlink():
        return None
    try:
        record = Record.decode((directory / "info").read_bytes())
    except PermissionError:
        raise  # or a stranger's list would be empty, and look true
    except (OSError, ValueError, TypeError):
        return None
    return Deployment(name, directory, record)
