"""Files that are there whole or not at all, and still there after a power cut."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firstboot.protocol.errors import LocalError

STAGED_PREFIX, STAGED_SUFFIX = ".", ".staged"
_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
}


class StorageFailed(LocalError):
    """A state file could not be written or read; the reason is in words."""


@contextmanager
def storage(deed: str) -> Iterator[None]:
    """Turn OSError into StorageFailed: "cannot <deed>: the disk is full"."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        reason = _WORDS.get(code) or os.strerror(code)
        raise StorageFailed(f"cannot {deed}: {reason}") from None


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable (fsync(2), NOTES)."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename, fsync of the directory.

    After a crash the file holds the old bytes or the new, never a part. The directory must
    exist. Raises StorageFailed; then `path` is as it was, or already new but perhaps not durable,
    and the same call may be made again.
    """
    with storage(f"write {path}"):
        _replace(path, data, mode, durable=True)


def remove_durably(path: Path) -> None:
    """Remove `path`, should it be there; when this returns, it stays away. Raises StorageFailed."""
    with storage(f"remove {path}"):
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        sync_directory(path.parent)


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """As `write_durably` without fsync: for file systems that do not outlive a power cut."""
    with storage(f"write {path}"):
        _replace(path, data, mode, durable=False)


def _replace(path: Path, data: bytes, mode: int, *, durable: bool) -> None:
    handle, staged = _staged(path.parent)
    try:
        try:
            os.fchmod(handle, mode)
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(staged, path)  # noqa: PTH105  a Path for each name would cost more than this
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def _staged(directory: Path) -> tuple[int, str]:
    """A new file of a name of its own: two writers never share one.

    It is 0600, so that a secret is never readable by others, not even for a moment.
    """
    name = f"{directory}/{STAGED_PREFIX}{os.urandom(8).hex()}{STAGED_SUFFIX}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600), name


def sweep(directory: Path) -> None:
    """Remove what writers that crashed left in `directory` and below."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(directory, onerror=fail):
        for name in names:
            if name.startswith(STAGED_PREFIX) and name.endswith(STAGED_SUFFIX):
                Path(folder, name).unlink(missing_ok=True)


def make_directory(directory: Path, mode: int = 0o700) -> None:
    """Make `directory` and its parents durably; it gets `mode`, also if it was there already."""
    missing = [directory]
    while not missing[-1].exists() and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    for path in reversed(missing[:-1]):
        # Parents such as /var/lib are everybody's; only the last one is ours to hide.
        path.mkdir(mode=mode if path == directory else 0o755, exist_ok=True)
        sync_directory(path.parent)
    directory.chmod(mode)
