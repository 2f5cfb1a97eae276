"""Image layers on their way into an ostree repository: checked, and without what it cannot hold."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from firstboot.containers import labels
from firstboot.containers.tools import ContainerError

GZIP = b"\x1f\x8b"
XATTR = "SCHILY.xattr."
BLOCK = 1024 * 1024


class _Counted(io.RawIOBase):
    """What is read from `source`, counted and hashed."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.digest = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data


def rewrite(blob: Path, target: Path) -> tuple[str, int]:
    """Write the layer `blob` to the tar file `target`, devices, pipes and sockets left out.

    Returns digest and size in bytes of the layer as it was before it was compressed. Its whiteouts
    stay what they are, files called ``.wh.…``. Where SELinux is enabled files get labels.
    """
    try:
        named = labels.of_policy(list(_files(blob))) if labels.enabled() else {}
        with blob.open("rb") as packed:
            compressed = packed.read(2) == GZIP
            packed.seek(0)
            plain = _Counted(gzip.GzipFile(fileobj=packed) if compressed else packed)  # type: ignore[arg-type]
            with (
                tarfile.open(fileobj=plain, mode="r|", bufsize=BLOCK) as layer,
                tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as kept,
            ):
                _copy(layer, kept, named)
            while plain.read(BLOCK):
                pass  # what follows the end of the archive counts as well
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ContainerError(f"Layer {blob.name} is not a tar or tar.gz: {error}") from None
    return f"sha256:{plain.digest.hexdigest()}", plain.size


def _files(blob: Path) -> Iterator[tuple[str, int]]:
    """Path and type of what is kept of a layer."""
    with tarfile.open(blob, bufsize=BLOCK) as layer:
        for entry in layer:
            kinds = (stat.S_IFREG, entry.isreg()), (stat.S_IFDIR, entry.isdir())
            for kind, is_it in (*kinds, (stat.S_IFLNK, entry.issym())):
                if is_it:
                    yield _below_root(entry.name), kind


def _below_root(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _copy(layer: tarfile.TarFile, kept: tarfile.TarFile, named: Mapping[str, str]) -> None:
    top = tarfile.TarInfo(".")  # ostree takes no tree without one
    top.type, top.mode = tarfile.DIRTYPE, 0o755
    kept.addfile(top)
    for entry in layer:
        name = entry.name
        if ".." in name.split("/"):
            raise ContainerError(f"The layer has a file outside of it: {entry.name!r}")
        if name in ("", ".") or not (
            entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()
        ):
            continue
        if entry.issym():
            entry.mode = 0o777  # what the link on disk will have, whatever the archive says
        content = layer.extractfile(entry) if entry.isreg() else None
        if entry.isreg():
            entry.type = tarfile.REGTYPE  # sparse ones are read in full
        # The reader on the other side turns their order around, and ostree hashes them sorted. All
        # other headers follow from the entry.
        given = {k: v for k, v in entry.pax_headers.items() if k.startswith(XATTR)}
        if label := named.get(_below_root(name)):
            given[XATTR + labels.ATTRIBUTE] = f"{label}\0"
        entry.pax_headers = dict(sorted(given.items(), reverse=True))
        kept.addfile(entry, content)
