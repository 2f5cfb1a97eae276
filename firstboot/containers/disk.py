"""Durable changes on disk: a file or a link is there whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from firstboot.containers.tools import ContainerError, run

MAX_LINKS = 40  # path_resolution(7): the kernel gives up after as many
SYNC_SECONDS = 300.0


def inside(root: Path, path: str) -> Path:
    """Where the host whose root directory is `root` finds `path`; a final link is not followed.

    Links in the directories above are resolved as that host would, so an absolute one does not
    lead out of `root`.
    """
    pending = [part for part in path.split("/") if part not in ("", ".")]
    found, links = root, 0
    while pending:
        part = pending.pop(0)
        if part == "..":
            found = found.parent if found != root else root
            continue
        step = found / part
        if pending and step.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise ContainerError(f"too many levels of symbolic links in {path}")
            target = str(step.readlink())
            found = root if target.startswith("/") else found
            pending[:0] = [p for p in target.split("/") if p not in ("", ".")]
        else:
            found = step
    return found


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable (fsync(2), NOTES)."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Make everything written to the file system of `directory` durable (syncfs(2))."""
    run(["sync", "-f", str(directory)], timeout=SYNC_SECONDS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to prepare the next `path` under; it takes its place, durably, at the end.

    The name is always the same, so that no crash leaves litter, and a failure leaves none either.
    """
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    try:
        yield staged
        staged.replace(path)
    finally:
        # Also after success: rename(2) does nothing for two names of one inode.
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replace `path` by `content`, atomically and durably; parents are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged, _durable(staged, mode) as file:
        file.write(content)


def copy_file(source: Path, path: Path) -> None:
    """Replace `path` by a copy of `source` with its mode, atomically and durably."""
    mode = stat.S_IMODE(source.stat().st_mode)
    with source.open("rb") as original, replacing(path) as staged, _durable(staged, mode) as file:
        shutil.copyfileobj(original, file)


@contextmanager
def _durable(path: Path, mode: int) -> Iterator[BinaryIO]:
    """A new file to write to; its content is on disk when it is closed."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)  # whatever the umask took away
        yield file
        file.flush()
        os.fsync(handle)


def switch_link(link: Path, target: str) -> None:
    """Point the symbolic link `link` at `target` in one step, durably."""
    with replacing(link) as staged:
        staged.symlink_to(target)


def read_if_there(path: Path) -> bytes | None:
    """The content of a file, None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def wipe(directory: Path) -> None:
    """Remove a directory tree if it is there; a symbolic link is refused."""
    if directory.is_symlink():
        raise ContainerError(f"{directory} is a symbolic link, not a deployment")
    if directory.exists():
        shutil.rmtree(directory)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(content: bytes) -> str:
    """SHA-256 of `content`, in hex."""
    return hashlib.sha256(content).hexdigest()
