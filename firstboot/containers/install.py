"""Install, update, roll back and remove system containers; a crash at any point does no harm.

A deployment is prepared beside the one in use and made durable; flipping the link is the moment
it counts. What follows (host files, unit, tmpfiles) only makes the host match the link, and the
next call does it again if a crash came between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from firstboot.containers import disk, trial, variables
from firstboot.containers import runtime as oci
from firstboot.containers.activation import match, retire, withdraw
from firstboot.containers.deployment import Request, build_package, prepare, run_once
from firstboot.containers.image import Found, doubt, locate
from firstboot.containers.image import pull as fetch
from firstboot.containers.store import Container, Deployment, Store
from firstboot.containers.tools import ContainerError


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation leads to.

    `changed`: something was written. `needs_reload`: systemd must read the unit again.
    `replaced`: an earlier deployment was in use; a running unit must be restarted to change over.
    `ran`: the image asked to be run once; that is done, and nothing of it is left.
    `messages` are for the operator: host files left alone.
    """

    container: Container
    changed: bool = False
    needs_reload: bool = False
    replaced: bool = False
    ran: bool = False
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal leads to; `needs_reload` as in `Installed`. `found`: there was something."""

    name: str
    needs_reload: bool
    found: bool
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """In place of an image, for a container whose root file system lies elsewhere."""

    id: str = ""
    commit: None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def unpack(self, rootfs: Path) -> None:
        raise ContainerError(f"{rootfs} is not ours to fill")


def install(
    root: Path,
    name: str,
    image: str,
    values: Mapping[str, str],
    runtime: str | None = None,
    *,
    replace: bool = True,
    rootfs: Path | None = None,
    enable: Callable[[Container], None] | None = None,
    authfile: Path | None = None,
    package: str = "no",
) -> Installed:
    """Make `name` an installed container of `image` with `values` on the host at `root`.

    The same image and values again change nothing; others replace the deployment in use, unless
    `replace` is false. `image` is what `image.locate` takes, paths as this process sees them.
    `runtime` is a program's name or path. `rootfs` is a root file system to use where it lies.
    `enable` is called once per container, when its unit is in place, and again if that was
    interrupted; starting the unit is the caller's part. `authfile` is for registries that want a
    password (see `credentials.choose`). With `package` ``yes`` or ``auto`` the host's package
    database knows the files it brings. ContainerError in one sentence; then the
    deployment that was in use still is, or nothing was installed.
    """
    with _store(root, "install", name, authfile) as store:
        elsewhere = _root_elsewhere(rootfs) if rootfs else None
        wanted = Request(name, image, dict(values), runtime, elsewhere, package=package)
        base = store.current(name) or store.preinstalled(name)
        if base and not replace:
            return _again(store, base, enable)
        return _install(store, wanted, enable)


def update(
    root: Path,
    name: str,
    values: Mapping[str, str],
    *,
    image: str | None = None,
    runtime: str | None = None,
    stop: Callable[[], None] | None = None,
    authfile: Path | None = None,
) -> Installed:
    """Put the other deployment of `name` into use: of its image as it is now, or of `image`.

    Nothing changes if image and values are the same. `stop` is called when the other deployment
    is complete and before anything of the one in use changes. ContainerError in one sentence; the
    one in use still is then, and whatever `stop` stopped can be started again.
    """
    with _store(root, "update", name, authfile) as store:
        before = store.current(name)
        if before is None:
            if store.preinstalled(name):
                raise ContainerError("Cannot update a preinstalled container")
            raise ContainerError(f"{name} is not installed")
        record = before.record
        kept = (record.remote, stop, record.package)
        wanted = Request(name, image or record.image, dict(values), runtime, *kept)
        return _install(store, wanted, None)


def rollback(root: Path, name: str, *, stop: Callable[[], None] | None = None) -> Installed:
    """Put the deployment before this one into use again; repeated, it goes forth and back."""
    with _store(root, "roll back", name) as store:
        current = store.current(name)
        if current is None:
            raise ContainerError(f"{name} is not installed")
        if _interrupted_rollback(store, current):
            reload, messages = _complete_rollback(store, current)
            after = current
        else:
            found = store.previous(name, current)
            if found is None or found.unit is None or not found.rootfs.is_dir():
                raise ContainerError(f"{name} has no deployment to roll back to")
            reload, messages = _switch(store, found, current, stop, back=True)
            after = found
        container = store.container(after)
        return Installed(container, True, reload, replaced=True, messages=tuple(messages))


def resume(root: Path, name: str) -> Installed | None:
    """Complete a replacement of `name`, or a rollback, that was interrupted; None if none was.

    `Installed.replaced`: its new deployment is on trial. The caller starts the unit, and then ends
    the trial or rolls back.
    """
    with _store(root, "finish the update of", name) as store:
        before, current = trial.before(store.root, name), store.current(name)
        if before is None or current is None:
            trial.end(store.root, name)
            return None
        if _interrupted_rollback(store, current):
            reload, messages = _complete_rollback(store, current)
            done = Installed(store.container(current), True, reload, messages=tuple(messages))
        else:
            done = replace(_again(store, current, None), replaced=current.directory.name != before)
        if not done.replaced:
            trial.end(store.root, name)
        return done


def uninstall(root: Path, name: str) -> Removed:
    """Remove `name`, its host files if unchanged, its unit and its deployments.

    The caller has stopped and disabled the unit. Images and the container's own state stay.
    Nothing there is no error, so that an interrupted removal can be repeated.
    """
    with _store(root, "uninstall", name) as store:
        current = store.current(name)
        if current is None and store.preinstalled(name):
            raise ContainerError(f"Cannot uninstall {name}: it is part of the host's image")
        deployments = [d for d in (current, store.previous(name, current)) if d]
        # A container may itself be called NAME.0.
        ours = [slot for slot in store.slots(name) if slot.exists() and not slot.is_symlink()]
        found = store.link(name).is_symlink() or bool(ours)
        messages, reload = withdraw(store, name, deployments)
        for mark in (_enable_mark(store, name), _rollback_mark(store, name)):
            mark.unlink(missing_ok=True)
        trial.end(store.root, name)
        store.link(name).unlink(missing_ok=True)
        disk.sync_directory(store.checkouts)
        for slot in ours:
            disk.wipe(slot)
        return Removed(name, reload, found, tuple(messages))


def build(
    root: Path,
    name: str,
    image: str,
    values: Mapping[str, str],
    runtime: str | None,
    into: Path,
    *,
    authfile: Path | None = None,
) -> Path:
    """Make a package of the container in the directory `into`; its path. Nothing is installed."""
    with _store(root, "package", name, authfile) as store:
        store.link(name)  # or the name cannot be one
        wanted = Request(name, image, dict(values), runtime)
        return build_package(store, wanted, locate(image, store), into)


def pull(root: Path, image: str, *, authfile: Path | None = None) -> str:
    """Fetch `image` anew for a later installation or update; its id."""
    with _store(root, "pull", image, authfile) as store:
        return fetch(image, store).id


def info(root: Path, name: str) -> Container | None:
    """The installed container `name`, None if there is none."""
    with _sentences("read", name):
        store = Store(root)
        found = store.current(name) or store.preinstalled(name)
        return store.container(found) if found else None


def installed(root: Path) -> tuple[Container, ...]:
    """All installed containers, by name."""
    with _sentences("read", "the containers"):
        store = Store(root)
        found = (store.current(name) or store.preinstalled(name) for name in store.names())
        return tuple(store.container(deployment) for deployment in found if deployment)


def _install(
    store: Store, wanted: Request, enable: Callable[[Container], None] | None
) -> Installed:
    before = store.current(wanted.name)
    base = before or store.preinstalled(wanted.name)
    if base is None:
        _refuse_strangers(store, wanted.name)
    found = _Elsewhere() if wanted.rootfs else locate(wanted.reference, store)
    if base is None and found.labels.get("atomic.run") == "once":
        return Installed(store.container(run_once(store, wanted, found)), ran=True)
    if base and _unchanged(base, wanted, found):
        return _again(store, base, enable)
    if base and not before:
        raise ContainerError("Cannot update a preinstalled container")
    after, messages = prepare(store, wanted, found, before)
    if not before and not wanted.rootfs and (text := doubt(wanted.reference)):
        messages.insert(0, text)
    reload, more = _switch(store, after, before, wanted.stop, enable=enable)
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


def _unchanged(current: Deployment, wanted: Request, found: Found) -> bool:
    record = current.record
    given = {k: v for k, v in wanted.given.items() if k not in variables.FORCED}
    return (
        record.revision == found.id
        and all(record.values.get(key) == value for key, value in given.items())
        and (not wanted.runtime or oci.choose(wanted.runtime) == record.runtime)
        and record.remote == wanted.rootfs
        and (not record.has_service or current.rootfs.is_dir())
    )


def _again(
    store: Store, current: Deployment, enable: Callable[[Container], None] | None
) -> Installed:
    """The same once more: only what an interrupted installation left undone is done."""
    container = store.container(current)
    if container.preinstalled:
        return Installed(container)
    previous = store.previous(current.name, current)
    changed, reload, messages = match(store, current, previous, anew=False)
    mark = _enable_mark(store, current.name)
    if enable and mark.exists():
        enable(container)
        mark.unlink(missing_ok=True)
        changed = True
    return Installed(container, changed, reload, messages=tuple(messages))


def _switch(
    store: Store,
    after: Deployment,
    before: Deployment | None,
    stop: Callable[[], None] | None,
    *,
    enable: Callable[[Container], None] | None = None,
    back: bool = False,
) -> tuple[bool, list[str]]:
    """Put `after` into use; on any failure `before` is again, and `after` goes unless `back`."""
    link, mark = store.link(after.name), _rollback_mark(store, after.name)
    tried = trial.before(store.root, after.name)
    try:
        if back:
            disk.write_file(mark, after.directory.name.encode(), 0o600)
        elif mark.exists():
            mark.unlink()
        if before and stop:
            stop()
            retire(store, before)
        first = enable if before is None else None
        if first:
            disk.write_file(_enable_mark(store, after.name), b"", 0o600)
        if before and after.record.has_service and not back:
            trial.begin(store.root, after.name, before.directory.name)
        disk.switch_link(link, store.seen(after.directory))
        _, reload, messages = match(store, after, before, anew=True)
        if first:
            first(store.container(after))
            _enable_mark(store, after.name).unlink()
        if back:
            trial.end(store.root, after.name)
            mark.unlink()  # last: without it the next rollback goes forth again
    except BaseException:
        with suppress(OSError, ContainerError):
            _switch_back(store, after, before, back=back)
            if back and tried:
                trial.begin(store.root, after.name, tried)
        raise
    return reload, messages


def _switch_back(store: Store, after: Deployment, before: Deployment | None, *, back: bool) -> None:
    link = store.link(after.name)
    if before:
        disk.switch_link(link, store.seen(before.directory))
        match(store, before, after, anew=True)
    else:
        withdraw(store, after.name, [after])
        link.unlink(missing_ok=True)
        _enable_mark(store, after.name).unlink(missing_ok=True)
    if back:
        _rollback_mark(store, after.name).unlink(missing_ok=True)
    else:
        trial.end(store.root, after.name)
        disk.wipe(after.directory)


def _interrupted_rollback(store: Store, current: Deployment) -> bool:
    """Whether a crash came between a rollback's change of the link and the rest."""
    mark = disk.read_if_there(_rollback_mark(store, current.name))
    return mark == current.directory.name.encode()


def _complete_rollback(store: Store, current: Deployment) -> tuple[bool, list[str]]:
    before = store.previous(current.name, current)
    _, reload, messages = match(store, current, before, anew=True)
    trial.end(store.root, current.name)
    _rollback_mark(store, current.name).unlink()
    return reload, messages


def _root_elsewhere(path: Path) -> str:
    for found in (path / "rootfs", path):
        if found.is_dir() and (found.name == "rootfs" or (found / "usr").is_dir()):
            return os.path.realpath(found)
    raise ContainerError(f"{path} holds no root file system: it has neither rootfs/ nor usr/")


def _enable_mark(store: Store, name: str) -> Path:
    return store.checkouts / f".{name}.enable"


def _rollback_mark(store: Store, name: str) -> Path:
    return store.checkouts / f".{name}.rollback"


@contextmanager
def _store(root: Path, verb: str, name: str, authfile: Path | None = None) -> Iterator[Store]:
    with _sentences(verb, name):
        store = Store(root, authfile)
        with store.locked():
            yield store


@contextmanager
def _sentences(verb: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ContainerError(f"Cannot {verb} {name}: {error.strerror}{where}") from error
