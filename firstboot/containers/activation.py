"""Makes the host match the deployment in use: host files, unit, tmpfiles. Safe to repeat."""

from __future__ import annotations

from pathlib import Path

from firstboot.containers import bundle, disk, hostfs, package
from firstboot.containers.store import Deployment, Store, tmpfiles_copy


def match(
    store: Store, now: Deployment, other: Deployment | None, *, anew: bool
) -> tuple[bool, bool, list[str]]:
    """Make the host match the deployment in use: was anything changed, the unit, what to tell.

    Unless `anew`, a unit that is neither missing nor the other deployment's was edited by a
    person and stays.
    """
    record = now.record
    owned = other.record.files if other else {}
    unit_before = other.unit if other else None
    lines_before = other.tmpfiles if other else None
    messages = hostfs.remove(store.root, owned, record.files)
    tree = now.rootfs / "exports" / "hostfs"
    files = hostfs.files(tree, record.renames, record.files_template, record.values)
    placed = hostfs.place(store.root, files, record.files, owned, record.use_links)
    if now.package:
        placed = package.register(store.root, now.package) or placed
    elif other and other.package:
        package.forget(store.root, now.name)
    unit = _follow(store.unit_file(now.name), now.unit, unit_before, anew)
    lines_file, lines = store.tmpfiles_file(now.name), now.tmpfiles
    stale = _is_stale(lines_file, lines, lines_before, anew)
    if lines and (anew or stale):
        # Before the file that marks it as done.
        bundle.tmpfiles(store.root, "--create", tmpfiles_copy(now.directory, now.name))
    tmpfiles = _follow(lines_file, lines, lines_before, anew)
    if not record.has_service and not record.remote:
        disk.wipe(now.rootfs)
    return placed or unit or tmpfiles, unit, messages


def _is_stale(path: Path, wanted: bytes | None, previous: bytes | None, anew: bool) -> bool:
    there = disk.read_if_there(path)
    return there != wanted and (anew or there is None or there == previous)


def _follow(path: Path, wanted: bytes | None, previous: bytes | None, anew: bool) -> bool:
    if not _is_stale(path, wanted, previous, anew):
        return False
    if wanted is None:
        path.unlink()
        disk.sync_directory(path.parent)
    else:
        disk.write_file(path, wanted, 0o644)
    return True


def withdraw(store: Store, name: str, deployments: list[Deployment]) -> tuple[list[str], bool]:
    """Take a container's files off the host: what to tell, and whether a unit went."""
    messages: list[str] = []
    lines, unit = store.tmpfiles_file(name), store.unit_file(name)
    ours = store.link(name).is_symlink()
    if lines.exists() and (ours or disk.read_if_there(lines) in [d.tmpfiles for d in deployments]):
        bundle.tmpfiles(store.root, "--remove", lines)
        lines.unlink()
    for deployment in deployments:
        messages += hostfs.remove(store.root, deployment.record.files, {})
    if any(deployment.record.rpm for deployment in deployments):
        ours_to_remove = any(deployment.package for deployment in deployments)
        package.forget(store.root, name, files=not ours_to_remove)
    reload = unit.exists() and (ours or disk.read_if_there(unit) in [d.unit for d in deployments])
    if reload:
        unit.unlink()
        disk.sync_directory(unit.parent)
    return messages, reload


def retire(store: Store, before: Deployment) -> None:
    """Remove what the lines of a deployment that was stopped say is to be removed."""
    if before.tmpfiles:
        bundle.tmpfiles(store.root, "--remove", tmpfiles_copy(before.directory, before.name))
