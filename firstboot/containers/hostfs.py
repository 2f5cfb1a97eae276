"""Files an image puts on the host: ``/exports/hostfs``, never over a file that is there already."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from firstboot.containers import disk, labels
from firstboot.containers.exports import Manifest, read_text, render
from firstboot.containers.tools import ContainerError

ABSENT = "0"  # recorded instead of a checksum for a directory, or for a link that leads nowhere


@dataclass(frozen=True, slots=True)
class HostFile:
    """One file, empty directory or symbolic link for the host; `text` if it was a template."""

    path: str
    source: Path
    text: str | None = None


def rename_map(exports: Path, manifest: Manifest, values: Mapping[str, str]) -> dict[str, str]:
    """The manifest's renameFiles, with its templates filled in."""
    where = exports / "manifest.json"
    return {old: render(where, new, values) for old, new in manifest.rename_files.items()}


def files(
    hostfs: Path,
    renames: Mapping[str, str],
    templates: Collection[str],
    values: Mapping[str, str],
) -> tuple[HostFile, ...]:
    """Everything below `hostfs`, under the names it gets on the host; `templates` filled in."""
    found = []
    for source in _walk(hostfs):
        path = _renamed("/" + str(source.relative_to(hostfs)), renames)
        text = None
        if path in templates and source.is_file() and not source.is_symlink():
            text = render(source, read_text(source) or "", values)
        found.append(HostFile(path, source, text))
    return tuple(found)


def claim(
    root: Path, wanted: tuple[HostFile, ...], owned: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Which of `wanted` become ours, each with its checksum, and what to tell the operator.

    `owned` are the files of the deployment that is replaced: those may change, unless a person
    has changed them.
    """
    sums = {file.path: _wanted_sum(file) for file in wanted if not file.source.is_symlink()}
    claimed, messages = {}, []
    for file in wanted:
        target = disk.inside(root, file.path)
        if os.path.lexists(target) and owned.get(file.path) != checksum(root, file.path):
            messages.append(f"File {file.path} already exists")
        elif file.source.is_symlink():
            leads_to = os.path.normpath(Path(file.path).parent / file.source.readlink())
            claimed[file.path] = sums.get(leads_to) or checksum(root, leads_to)
        else:
            claimed[file.path] = sums[file.path]
    return claimed, messages


def place(
    root: Path,
    wanted: tuple[HostFile, ...],
    claimed: Mapping[str, str],
    owned: Mapping[str, str],
    use_links: bool,
) -> bool:
    """Put the `claimed` files where they belong; True if any was not in place already."""
    changed = False
    for file in wanted:
        target = disk.inside(root, file.path)
        if file.path not in claimed:
            continue
        if os.path.lexists(target):
            ours = owned.get(file.path) == checksum(root, file.path)
            if not ours or _in_place(file, target):
                continue
        _create(file, target, use_links and file.path.startswith("/usr/"))
        changed = True
    return changed


def remove(root: Path, owned: Mapping[str, str], keep: Mapping[str, str]) -> list[str]:
    """Delete files that an image put there and nobody changed; tell which ones stay."""
    messages = []
    for path, recorded in owned.items():
        target = disk.inside(root, path)
        if path in keep or not os.path.lexists(target):
            continue
        if checksum(root, path) != recorded:
            messages.append(f"Will not delete {path} as it was manually modified.")
        elif target.is_dir() and not target.is_symlink():
            if not any(target.iterdir()):
                target.rmdir()
        else:
            target.unlink()
    return messages


def checksum(root: Path, path: str) -> str:
    """SHA-256 of a file on the host, links followed; ABSENT for a directory or nothing."""
    found = disk.inside(root, path)
    for _ in range(disk.MAX_LINKS):
        if not found.is_symlink():
            break
        leads_to = Path("/") / found.relative_to(root).parent / found.readlink()
        found = disk.inside(root, str(leads_to))
    return disk.sha256(found) if found.is_file() and not found.is_symlink() else ABSENT


def _walk(hostfs: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(hostfs):
        below.sort()
        for name in sorted([*below, *names]):
            path = Path(directory, name)
            if path.is_symlink() or path.is_file() or (path.is_dir() and not any(path.iterdir())):
                yield path


def _renamed(path: str, renames: Mapping[str, str]) -> str:
    found = ""
    for part in path.split("/")[1:]:
        found = f"{found}/{part}"
        found = renames.get(found, found)
    if not found.startswith("/") or ".." in found.split("/"):
        raise ContainerError(f"renameFiles gives {path} the name {found!r}, not an absolute path")
    return found


def _wanted_sum(file: HostFile) -> str:
    if file.text is not None:
        return disk.sha256_of(file.text.encode())
    return disk.sha256(file.source) if file.source.is_file() else ABSENT


def _in_place(file: HostFile, target: Path) -> bool:
    if file.source.is_symlink() or target.is_symlink():
        return (
            file.source.is_symlink()
            and target.is_symlink()
            and file.source.readlink() == target.readlink()
        )
    if target.is_dir():
        return True
    same = disk.sha256(target) == _wanted_sum(file)
    return same and target.stat().st_mode == file.source.stat().st_mode


def _create(file: HostFile, target: Path, may_link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.source.is_dir() and not file.source.is_symlink():
        target.mkdir()
        shutil.copystat(file.source, target)
        return
    if file.text is not None:
        mode = stat.S_IMODE(file.source.stat().st_mode)
        disk.write_file(target, file.text.encode(), mode)
    elif file.source.is_symlink():
        disk.switch_link(target, str(file.source.readlink()))
    elif not (may_link and _linked(file.source, target, file.path)):
        disk.copy_file(file.source, target)


def _linked(source: Path, target: Path, place: str) -> bool:
    """Share the deployment's file with the host, unless its SELinux label would be wrong there."""
    try:
        if not labels.fits(source, place):
            return False
        with disk.replacing(target) as staged:
            staged.hardlink_to(source)
    except OSError:  # another file system, or one without links or attributes: copy
        return False
    return True
