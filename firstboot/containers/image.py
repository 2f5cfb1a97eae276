"""Image sources: where an image's reference leads, and the copy of it that this host keeps.

Copies are kept in the ostree repository if the host has one that can be used, else as OCI layouts
in ``.storage/oci``. skopeo fetches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firstboot.containers import credentials, disk, repository
from firstboot.containers.layout import read_layout, verified
from firstboot.containers.store import NAME, Store
from firstboot.containers.tools import ContainerError, run

PULL_SECONDS = 1800.0
NAMES_LIMIT = 1024 * 1024  # bytes of an archive's list of names
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,400}\Z")
DEFAULT_REGISTRY = "docker.io"  # skopeo's
REMEDY = "use oci:/LAYOUT:TAG, a registry's name, docker:NAME:TAG or dockertar:/FILE"


class Found(Protocol):
    """An image that is on this host, complete."""

    @property
    def id(self) -> str:
        """The manifest's digest without its algorithm."""

    @property
    def commit(self) -> str | None:
        """The commit in the ostree repository, None if it is not from one."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The image's labels."""

    def unpack(self, rootfs: Path) -> None:
        """Extract the layers into the new directory `rootfs`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image comes from; `origin` is skopeo's name for it.

    `name` is the image's own name with its tag, by which copies are known. A `layout` is read where
    it is. `always`: a copy that is there says nothing about what the origin holds now.
    """

    name: str
    origin: str = ""
    flags: tuple[str, ...] = ()
    layout: Path | None = None
    tag: str = ""
    always: bool = False


def locate(reference: str, store: Store) -> Found:
    """The image that `reference` names; a copy that is there and complete is used as it is.

    ``oci:/layout[:tag]`` is a layout, ``dockertar:/file`` what ``docker save`` wrote,
    ``docker:NAME:TAG`` an image of the Docker daemon. Anything else is a registry's
    (``docker://…``, ``oci:NAME``, ``http:NAME`` without TLS, ``https:NAME``, ``NAME``).
    """
    source = _source(reference)
    repo = repository.choose(store)
    if source.layout:
        image = read_layout(reference, source.layout, source.tag)
        return repo.holding(source.name, image) if repo else verified(image)
    if not source.always and (found := _kept(reference, source, store, repo)):
        return found
    return _pull(reference, source, store, repo)


def pull(reference: str, store: Store) -> Found:
    """Fetch the image anew and keep the copy for later."""
    source = _source(reference)
    if source.layout:
        return locate(reference, store)
    return _pull(reference, source, store, repository.choose(store))


def default_name(reference: str) -> str:
    """The name of a container for which none was given: the image's, with a tag like ``-1.2``."""
    name, tag = _split_tag(_source(reference).name.partition("@")[0])
    base = name.rpartition("/")[2]
    found = base if tag in ("", "latest") else f"{base}-{tag}"
    if not NAME.match(found):
        raise ContainerError(f"{reference!r} gives the container no name: choose one with --name")
    return found


def doubt(reference: str) -> str:
    """What to tell of a name that leaves its registry to skopeo; empty if it does not."""
    if registry(reference) != "":
        return ""
    return f"{reference} names no registry: {DEFAULT_REGISTRY} is asked"


def registry(reference: str) -> str | None:
    """The registry that `reference` names, empty if it leaves that open; None if it needs none."""
    source = _source(reference) if not reference.startswith("dockertar:") else None
    if source is None or not source.origin.startswith("docker://"):
        return None
    first, slash, _ = source.name.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return first if named else ""


def _source(reference: str) -> Source:
    if reference.startswith("oci:/"):
        path, tag = _split_tag(reference.removeprefix("oci:"))
        return Source(_tagged(reference.removeprefix("oci:")), layout=Path(path), tag=tag)
    if reference.startswith("dockertar:/"):
        path = reference.removeprefix("dockertar:")
        return Source(_tagged(_archived(Path(path))), f"docker-archive:{path}", always=True)
    flags: list[str] = []
    name, transport = reference, "docker://"
    if reference.startswith("docker:") and not reference.startswith("docker://"):
        name, transport = reference.removeprefix("docker:"), "docker-daemon:"
        if ":" not in name.rpartition("/")[2]:
            raise ContainerError(f"{reference!r} names no tag: {REMEDY}")
    for prefix in ("docker://", "oci:", "https:", "http:"):
        if reference.startswith(prefix):
            name = reference.removeprefix(prefix).removeprefix("//")
            flags = ["--src-tls-verify=false"] if prefix == "http:" else []
            break
    if not REFERENCE.match(name) or name.startswith("dockertar:"):
        raise ContainerError(f"{reference!r} is not an image: {REMEDY}")
    return Source(_tagged(name), f"{transport}{name}", tuple(flags))


def _archived(path: Path) -> str:
    """The name of the image in what ``docker save`` wrote; the file's own if it says none."""
    import tarfile

    try:
        with tarfile.open(path) as archive:
            member = archive.extractfile("manifest.json")
            raw = member.read(NAMES_LIMIT) if member else b""
        names = json.loads(raw)[0].get("RepoTags") or []
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from None
    except (tarfile.TarError, EOFError, KeyError, IndexError, ValueError, AttributeError):
        raise ContainerError(f"{path} is not what docker save writes") from None
    name = str(names[0]) if names else path.name.partition(".")[0]
    if not REFERENCE.match(name):
        raise ContainerError(f"{path} holds an image without a usable name: {name!r}")
    return name


def _split_tag(text: str) -> tuple[str, str]:
    head, slash, last = text.rpartition("/")
    last, _, tag = last.partition(":")
    return f"{head}{slash}{last}", tag


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _layout_of(source: Source, store: Store) -> Path:
    return store.storage / "oci" / repository.encode(source.name)


def _kept(
    reference: str, source: Source, store: Store, repo: repository.Repository | None
) -> Found | None:
    """The copy from an earlier pull, None if there is none or it is damaged."""
    if repo:
        return repo.image(source.name)
    layout = _layout_of(source, store)
    aside = layout.with_name(f".{layout.name}.old")
    if aside.exists() and not layout.exists():
        aside.rename(layout)  # a crash came while the next one was put in its place
    try:
        return verified(read_layout(reference, layout, "")) if layout.exists() else None
    except ContainerError:
        return None  # the origin has it whole


def _pull(
    reference: str, source: Source, store: Store, repo: repository.Repository | None
) -> Found:
    layout = _layout_of(source, store)
    partial = layout.with_name(f".{layout.name}.new")
    disk.wipe(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    argv = ["skopeo"]
    if store.settings.registries:
        argv.append(f"--registries.d={store.settings.registries}")
    argv += ["copy", "--quiet", *source.flags]
    if source.origin.startswith("docker://"):
        argv += ["--retry-times", "3"]
        if authfile := credentials.choose(store.root, store.authfile):
            argv += ["--src-authfile", authfile]
    argv += [source.origin, f"oci:{partial}:image"]
    try:
        run(argv, timeout=PULL_SECONDS, environment=store.settings.proxies)
        image = verified(read_layout(reference, partial, ""))
        if repo:
            return repo.holding(source.name, image)
        disk.sync_tree(partial)
        _replace(partial, layout)
    finally:
        disk.wipe(partial)
    return read_layout(reference, layout, "")


def _replace(partial: Path, layout: Path) -> None:
    aside = layout.with_name(f".{layout.name}.old")
    disk.wipe(aside)
    if layout.exists():
        layout.rename(aside)
    partial.rename(layout)
    disk.sync_directory(layout.parent)
    disk.wipe(aside)
