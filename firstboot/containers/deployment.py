"""Prepares the next deployment, complete and durable, where nothing uses it yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firstboot.containers import bundle, disk, hostfs, package, variables
from firstboot.containers import runtime as oci
from firstboot.containers.exports import Manifest, read_manifest
from firstboot.containers.image import Found
from firstboot.containers.store import (
    PREINSTALLED,
    Deployment,
    Record,
    Store,
    tmpfiles_copy,
    unit_copy,
)
from firstboot.containers.tools import ContainerError, attached


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller wants. `stop` is called before the deployment in use changes."""

    name: str
    reference: str
    given: Mapping[str, str]
    runtime: str | None = None
    rootfs: str | None = None
    stop: Callable[[], None] | None = None
    package: str = "no"  # as --system-package takes it


@dataclass(frozen=True, slots=True)
class _Rendered:
    tool: oci.Runtime
    manifest: Manifest
    values: Mapping[str, str]
    config: Mapping[str, Any]
    exports: Path


def prepare(
    store: Store, wanted: Request, found: Found, before: Deployment | None
) -> tuple[Deployment, list[str]]:
    """Write the next deployment; what to tell comes with it. Any failure leaves none."""
    target = store.spare(wanted.name, before)
    with _emptied(target, keep=True):
        prepared = _fill(store, target, wanted, found, before)
        disk.sync_tree(target)
    return prepared


def run_once(store: Store, wanted: Request, found: Found) -> Deployment:
    """Run the container to its end where a deployment would be, and leave nothing of it."""
    target = store.spare(wanted.name, None)
    with _emptied(target, keep=False):
        made = _render(store, target, wanted, found, Record())
        lines = bundle.tmpfiles_text(store.root, made.exports, made.values, made.config, "")
        if lines:
            path = tmpfiles_copy(target, wanted.name)
            disk.write_file(path, lines.encode(), 0o644)
            bundle.tmpfiles(store.root, "--create", path)
        status = attached([made.tool.path, "run", wanted.name], cwd=target)
        if status != 0:
            raise ContainerError(f"{wanted.name} ended with exit code {status}")
        record = _record(wanted, found, made)
        return Deployment(wanted.name, target, replace(record, has_service=False))


def build_package(store: Store, wanted: Request, found: Found, into: Path) -> Path:
    """The whole container as a package, for images of hosts: it is below PREINSTALLED there."""
    top = store.storage / "package"  # where layers of a repository can be checked out
    target = top / PREINSTALLED[1:] / wanted.name
    try:
        disk.wipe(top)
        target.mkdir(parents=True)
        made = _render(store, target, wanted, found, Record())
        files, renames = _host_files(made)
        claimed, _ = hostfs.claim(top, files, {})
        hostfs.place(top, files, claimed, {}, made.manifest.use_links)
        record = replace(
            _record(wanted, found, made), files=claimed, renames=renames, package="build"
        )
        prepared = Deployment(wanted.name, target, record)
        if record.has_service:
            _write_copies(store, prepared, made.config, None)
            for copy, place in (
                (prepared.unit, f"usr/lib/systemd/system/{wanted.name}.service"),
                (prepared.tmpfiles, f"usr/lib/tmpfiles.d/{wanted.name}.conf"),
            ):
                if copy:
                    disk.write_file(top / place, copy, 0o644)
        disk.write_file(target / "info", record.encode(), 0o600)
        what = (wanted.name, top, made.exports, made.values, found.labels, "1")
        return package.make(*what, into)
    finally:
        disk.wipe(top)


def _packaged(
    store: Store,
    target: Path,
    found: Found,
    made: _Rendered,
    files: tuple[hostfs.HostFile, ...],
    claimed: Mapping[str, str],
) -> str:
    """Make the package that tells the host's package database of `claimed`, beside the rest."""
    top = store.storage / "package"
    try:
        disk.wipe(top)
        top.mkdir(parents=True)
        hostfs.place(top, files, claimed, {}, False)
        name, _, number = target.name.rpartition(".")
        what = (name, top, made.exports, made.values, found.labels, number)
        return package.make(*what, target).stem
    finally:
        disk.wipe(top)


def _host_files(made: _Rendered) -> tuple[tuple[hostfs.HostFile, ...], dict[str, str]]:
    renames = hostfs.rename_map(made.exports, made.manifest, made.values)
    templates = made.manifest.files_template
    return hostfs.files(made.exports / "hostfs", renames, templates, made.values), renames


def _identity(store: Store, target: Path, wanted: Request, found: Found) -> dict[str, str]:
    """The forced variables that do not depend on the image's content."""
    return {
        "DESTDIR": store.seen(target),
        "NAME": wanted.name,
        "IMAGE_NAME": wanted.reference,
        "IMAGE_ID": found.id,
    }


@contextmanager
def _emptied(target: Path, *, keep: bool) -> Iterator[None]:
    disk.wipe(target)
    try:
        target.mkdir()
        yield
        if not keep:
            disk.wipe(target)
    except BaseException:
        disk.wipe(target)
        raise


def _fill(
    store: Store, target: Path, wanted: Request, found: Found, before: Deployment | None
) -> tuple[Deployment, list[str]]:
    old = before.record if before else Record()
    made = _render(store, target, wanted, found, old)
    files, renames = _host_files(made)
    claimed, messages = hostfs.claim(store.root, files, old.files)
    if not made.exports.is_dir():
        messages.insert(0, f"The image {wanted.reference} has no /exports: defaults are used")
    record = replace(_record(wanted, found, made), files=claimed, renames=renames)
    if package.wanted(wanted.package, store.root, made.exports) == "yes":
        rpm = _packaged(store, target, found, made, files, claimed)
        record = replace(record, package="yes", rpm=rpm)
    prepared = Deployment(wanted.name, target, record)
    if record.has_service:
        _write_copies(store, prepared, made.config, before)
    disk.write_file(target / "info", record.encode(), 0o600)  # last: it makes this a deployment
    return prepared, messages


def _render(store: Store, target: Path, wanted: Request, found: Found, old: Record) -> _Rendered:
    """Root file system and config.json, with all values resolved."""
    chosen = oci.choose(wanted.runtime, store.settings.runtime, old.runtime)
    tool = oci.probe(chosen)
    rootfs = target / "rootfs"
    if wanted.rootfs:
        rootfs.symlink_to(wanted.rootfs)
    else:
        found.unpack(rootfs)
    exports = rootfs / "exports"
    manifest = read_manifest(exports, wanted.reference)
    resolved = variables.resolve(
        {**_inherited(old), **wanted.given},
        manifest.default_values,
        _identity(store, target, wanted, found),
        tool.path,
    )
    # config.json may use the EXEC_* variables, and says which cgroup driver they must name.
    resolved |= bundle.exec_values(exports, resolved, tool, cgroupfs=False)
    config = bundle.write_config(target, tool.path, resolved, wanted.rootfs)
    resolved |= bundle.exec_values(exports, resolved, tool, bundle.wants_cgroupfs(config))
    return _Rendered(tool, manifest, resolved, config, exports)


def _record(wanted: Request, found: Found, made: _Rendered) -> Record:
    return Record(
        image=wanted.reference,
        revision=found.id,
        created=int(time.time()),
        values=made.values,
        has_service=made.manifest.has_service,
        files_template=made.manifest.files_template,
        use_links=made.manifest.use_links,
        runtime=made.tool.path,
        commit=found.commit,
        remote=wanted.rootfs,
    )


def _inherited(old: Record) -> dict[str, str]:
    """Values that outlive a replacement: all but those this host sets anew each time."""
    anew = {*variables.FORCED, "ATOMIC"}
    if old.values.get("RUNTIME") == old.runtime:
        anew.add("RUNTIME")
    return {key: value for key, value in old.values.items() if key not in anew}


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
