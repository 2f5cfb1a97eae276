"""Install, replace and remove system containers, so that a crash at any point does no harm.

A deployment is prepared beside the one in use and made durable; flipping the link is the moment
it counts. What follows (host files, unit, tmpfiles) only makes the host match the link, and the
next call does it again if a crash came between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from firstboot.containers import bundle, disk, hostfs, variables
from firstboot.containers import runtime as oci
from firstboot.containers.activation import match, withdraw
from firstboot.containers.exports import Manifest, read_manifest
from firstboot.containers.image import Image, locate, unpack
from firstboot.containers.store import (
    Container,
    Deployment,
    Record,
    Store,
    tmpfiles_copy,
    unit_copy,
)
from firstboot.containers.tools import ContainerError


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation leads to.

    `changed`: something was written. `needs_reload`: systemd must read the unit again.
    `replaced`: an earlier deployment was in use; a running unit must be restarted to change over.
    `messages` are for the operator: host files left alone.
    """

    container: Container
    changed: bool = False
    needs_reload: bool = False
    replaced: bool = False
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal leads to; `needs_reload` as in `Installed`."""

    name: str
    needs_reload: bool
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    reference: str
    given: Mapping[str, str]
    runtime: str | None


def install(
    root: Path,
    name: str,
    image: str,
    values: Mapping[str, str],
    runtime: str | None = None,
) -> Installed:
    """Make `name` an installed container of `image` with `values` on the host at `root`.

    The same image and values again change nothing; others replace the deployment in use. `image`
    is ``oci:/layout[:tag]``, a path as this process sees it, or a registry reference. `runtime` is
    a program's name or path; by default the one used before, else runc, else crun. Enabling and
    starting the unit is the caller's part. ContainerError in one sentence; then the deployment
    that was in use still is.
    """
    store = Store(root)
    wanted = _Request(name, image, dict(values), runtime)
    with _sentences("install", name), store.locked():
        return _install(store, wanted)


def uninstall(root: Path, name: str) -> Removed:
    """Remove `name`, its host files if unchanged, its unit and its deployments.

    The caller has stopped and disabled the unit. Images and the container's own state stay.
    Nothing there is no error, so that an interrupted removal can be repeated.
    """
    store = Store(root)
    with _sentences("uninstall", name), store.locked():
        current = store.current(name)
        if current is None and store.preinstalled(name):
            raise ContainerError(f"Cannot uninstall {name}: it is part of the host's image")
        deployments = [d for d in (current, store.previous(name, current)) if d]
        messages, reload = withdraw(store, name, deployments)
        store.link(name).unlink(missing_ok=True)
        disk.sync_directory(store.checkouts)
        for slot in store.slots(name):
            if not slot.is_symlink():  # a container may itself be called NAME.0
                disk.wipe(slot)
        return Removed(name, reload, tuple(messages))


def info(root: Path, name: str) -> Container | None:
    """The installed container `name`, None if there is none."""
    store = Store(root)
    found = store.current(name) or store.preinstalled(name)
    return store.container(found) if found else None


def installed(root: Path) -> tuple[Container, ...]:
    """All installed containers, by name."""
    store = Store(root)
    found = (store.current(name) or store.preinstalled(name) for name in store.names())
    return tuple(store.container(deployment) for deployment in found if deployment)


def _install(store: Store, wanted: _Request) -> Installed:
    before = store.current(wanted.name)
    base = before or store.preinstalled(wanted.name)
    if base is None:
        _refuse_strangers(store, wanted.name)
    found = locate(wanted.reference, store.storage)
    if base and _unchanged(base, wanted, found):
        return _again(store, base)
    if base and not before:
        raise ContainerError("Cannot update a preinstalled container")
    after, messages = _prepare(store, wanted, found, before)
    reload, more = _switch(store, after, before)
    return Installed(
        container=store.container(after),
        changed=True,
        needs_reload=reload,
        replaced=before is not None,
        messages=(*messages, *more),
    )


def _refuse_strangers(store: Store, name: str) -> None:
    if store.link(name).is_symlink():
        return  # what is left of a damaged deployment is ours to replace
    for path in (store.unit_file(name), store.tmpfiles_file(name)):
        if path.exists():
            raise ContainerError(f"The file {path} already exists.")


def _unchanged(current: Deployment, wanted: _Request, found: Image) -> bool:
    record = current.record
    given = {k: v for k, v in wanted.given.items() if k not in variables.FORCED}
    return (
        record.revision == found.id
        and all(record.values.get(key) == value for key, value in given.items())
        and (not wanted.runtime or oci.choose(wanted.runtime, None) == record.runtime)
        and (not record.has_service or current.rootfs.is_dir())
    )


def _again(store: Store, current: Deployment) -> Installed:
    """The same once more: only what an interrupted installation left undone is done."""
    container = store.container(current)
    if container.preinstalled:
        return Installed(container)
    previous = store.previous(current.name, current)
    changed, reload, messages = match(store, current, previous, anew=False)
    return Installed(container, changed, reload, messages=tuple(messages))


def _prepare(
    store: Store, wanted: _Request, found: Image, before: Deployment | None
) -> tuple[Deployment, list[str]]:
    """Write the next deployment, complete and durable, where nothing uses it yet."""
    target = store.spare(wanted.name, before)
    disk.wipe(target)
    try:
        target.mkdir()
        prepared = _fill(store, target, wanted, found, before)
        disk.sync_tree(target)
    except BaseException:
        disk.wipe(target)
        raise
    return prepared


def _fill(
    store: Store,
    target: Path,
    wanted: _Request,
    found: Image,
    before: Deployment | None,
) -> tuple[Deployment, list[str]]:
    old = before.record if before else Record()
    tool = oci.probe(oci.choose(wanted.runtime, old.runtime or None))
    unpack(found, target / "rootfs")
    exports = target / "rootfs" / "exports"
    manifest = read_manifest(exports, wanted.reference)
    resolved = variables.resolve(
        {**_inherited(old), **wanted.given},
        manifest.default_values,
        _identity(store, target, wanted, found),
        tool.path,
    )
    # config.json may use the EXEC_* variables, and says which cgroup driver they must name.
    resolved |= bundle.exec_values(exports, resolved, tool, cgroupfs=False)
    config = bundle.write_config(target, tool.path, resolved)
    resolved |= bundle.exec_values(exports, resolved, tool, bundle.wants_cgroupfs(config))
    renames = hostfs.rename_map(exports, manifest, resolved)
    files = hostfs.files(exports / "hostfs", renames, manifest.files_template, resolved)
    claimed, messages = hostfs.claim(store.root, files, old.files)
    record = _record(wanted, found, tool.path, manifest, resolved)
    record = replace(record, files=claimed, renames=renames)
    prepared = Deployment(wanted.name, target, record)
    if manifest.has_service:
        _write_copies(store, prepared, config, before)
    disk.write_file(target / "info", record.encode(), 0o600)  # last: it makes this a deployment
    return prepared, messages


def _record(
    wanted: _Request, found: Image, tool: str, manifest: Manifest, resolved: Mapping[str, str]
) -> Record:
    return Record(
        image=wanted.reference,
        revision=found.id,
        created=int(time.time()),
        values=resolved,
        has_service=manifest.has_service,
        files_template=manifest.files_template,
        use_links=manifest.use_links,
        runtime=tool,
    )


def _inherited(old: Record) -> dict[str, str]:
    """Values that outlive a replacement: all but those this host sets anew each time."""
    anew = {*variables.FORCED, "ATOMIC"}
    if old.values.get("RUNTIME") == old.runtime:
        anew.add("RUNTIME")
    return {key: value for key, value in old.values.items() if key not in anew}


def _identity(store: Store, target: Path, wanted: _Request, found: Image) -> dict[str, str]:
    return {
        "DESTDIR": store.seen(target),
        "NAME": wanted.name,
        "IMAGE_NAME": wanted.reference,
        "IMAGE_ID": found.id,
    }


def _write_copies(
    store: Store, prepared: Deployment, config: Mapping[str, object], before: Deployment | None
) -> None:
    exports, values = prepared.rootfs / "exports", prepared.record.values
    unit = bundle.unit_text(exports, values)
    disk.write_file(unit_copy(prepared.directory, prepared.name), unit.encode(), 0o644)
    old = ((before.tmpfiles if before else None) or b"").decode()
    lines = bundle.tmpfiles_text(store.root, exports, values, config, old)
    if lines:
        disk.write_file(tmpfiles_copy(prepared.directory, prepared.name), lines.encode(), 0o644)


def _switch(store: Store, after: Deployment, before: Deployment | None) -> tuple[bool, list[str]]:
    """Put `after` into use; on any failure `before` is again."""
    link = store.link(after.name)
    try:
        disk.switch_link(link, store.seen(after.directory))
        _, reload, messages = match(store, after, before, anew=True)
    except BaseException:
        with suppress(OSError, ContainerError):
            if before:
                disk.switch_link(link, store.seen(before.directory))
                match(store, before, after, anew=True)
            else:
                withdraw(store, after.name, [after])
                link.unlink(missing_ok=True)
            disk.wipe(after.directory)
        raise
    return reload, messages


@contextmanager
def _sentences(verb: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ContainerError(f"Cannot {verb} {name}: {error.strerror}{where}") from error
