"""OCI image layouts on disk: reading them, checking them, unpacking them with umoci.

A layout is ``oci-layout``, ``index.json`` and ``blobs/`` (OCI image layout specification 1.0).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstboot.containers import disk
from firstboot.containers.tools import ContainerError, run

DOCUMENT_LIMIT = 4 * 1024 * 1024  # bytes; what registries accept as a manifest
LAYER_LIMIT = 500
UNPACK_SECONDS = 900.0
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
TAG = "org.opencontainers.image.ref.name"
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Image:
    """One image in a layout, pinned by its manifest's digest."""

    reference: str
    layout: Path
    manifest: str
    size: int
    blobs: tuple[str, ...]  # digests of the configuration and of the layers, lowest first

    @property
    def id(self) -> str:
        """The manifest's digest without its algorithm."""
        return self.manifest.partition(":")[2]

    @property
    def commit(self) -> None:
        """A layout knows no commits."""
        return None

    @property
    def configuration(self) -> dict[str, Any]:
        """The image's configuration (OCI image specification, config.md)."""
        return read_object(self.blob(self.blobs[0]).read_bytes())

    @property
    def labels(self) -> Mapping[str, str]:
        """The image's labels; call `verified` first."""
        return labels_of(self.configuration)

    def blob(self, digest: str) -> Path:
        """Where the content with this digest is."""
        return self.layout / "blobs" / "sha256" / digest.partition(":")[2]

    def unpack(self, rootfs: Path) -> None:
        """Extract the layers into the new directory `rootfs`."""
        unpack(self, rootfs)


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object; empty if `raw` is not one."""
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def labels_of(configuration: Mapping[str, Any]) -> dict[str, str]:
    """The labels in an image's configuration."""
    inner = configuration.get("config")
    found = inner.get("Labels") if isinstance(inner, dict) else None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def verified(image: Image) -> Image:
    """`image`, once every blob is there and has the content that its digest says."""
    for digest in image.blobs:
        path = image.blob(digest)
        if not path.is_file():
            raise ContainerError(f"Layer not found: {digest}.  Please pull the image again")
        if f"sha256:{disk.sha256(path)}" != digest:
            raise ContainerError(
                f"Layer {digest} does not match its digest.  Please pull the image again"
            )
    return image


def unpack(image: Image, rootfs: Path) -> None:
    """Extract the layers of `image` into the new directory `rootfs`.

    umoci gets a view of the layout that holds this one manifest: it needs a tag, and it may not
    write where the image is baked in read-only.
    """
    verified(image)
    view = rootfs.with_name(".layout")
    disk.wipe(view)
    view.mkdir()
    media = "application/vnd.oci.image.manifest.v1+json"
    entry = {"mediaType": media, "digest": image.manifest, "size": image.size}
    index = {"schemaVersion": 2, "manifests": [{**entry, "annotations": {TAG: "image"}}]}
    (view / "index.json").write_text(json.dumps(index))
    (view / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (view / "blobs").symlink_to((image.layout / "blobs").absolute())
    run(["umoci", "raw", "unpack", "--image", f"{view}:image", str(rootfs)], timeout=UNPACK_SECONDS)
    disk.wipe(view)


def read_layout(reference: str, layout: Path, tag: str) -> Image:
    """The image of a layout with `tag`; if empty: the only one there is, else ``latest``."""
    try:
        marker = json.loads((layout / "oci-layout").read_bytes()[:DOCUMENT_LIMIT])
        index = json.loads(_read_document(layout / "index.json"))
        known = str(marker["imageLayoutVersion"]).startswith("1.")
        entries = [entry for entry in index["manifests"] if isinstance(entry, dict)]
    except (OSError, ValueError, TypeError, KeyError):
        raise ContainerError(f"{layout} is not an OCI image layout") from None
    if not known:
        raise ContainerError(f"{layout} is an OCI image layout of an unknown version")
    return _follow(reference, layout, _choose(layout, entries, tag), depth=0)


def _choose(layout: Path, entries: list[dict[str, Any]], tag: str) -> dict[str, Any]:
    tags = [str((entry.get("annotations") or {}).get(TAG, "")) for entry in entries]
    if not tag and len(entries) == 1:
        return entries[0]
    wanted = tag or "latest"
    if tags.count(wanted) == 1:
        return entries[tags.index(wanted)]
    names = ", ".join(sorted({name for name in tags if name})) or "none"
    raise ContainerError(f"The image layout {layout} has no tag {wanted!r}; its tags: {names}")


def _follow(reference: str, layout: Path, entry: dict[str, Any], depth: int) -> Image:
    digest = str(entry.get("digest"))
    raw = _document(layout, digest)
    try:
        document = json.loads(raw)
        if entry.get("mediaType") in INDEXES or "manifests" in document:
            fitting = list(_for_this_machine(document["manifests"]))
            if depth == 0 and fitting:
                return _follow(reference, layout, fitting[0], depth + 1)
            raise ContainerError(f"{reference} has no image for {platform.machine()}")
        blobs = [document["config"]["digest"], *(layer["digest"] for layer in document["layers"])]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ContainerError(f"{reference} is not an image: its manifest is unusable") from None
    if len(blobs) > LAYER_LIMIT or not all(DIGEST.match(str(blob)) for blob in blobs):
        raise ContainerError(f"{reference} is not an image: its manifest is unusable")
    return Image(reference, layout, digest, len(raw), tuple(blobs))


def _for_this_machine(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    machine = platform.machine()
    for entry in entries:
        offered = entry.get("platform") or {}
        if offered.get("architecture") == ARCHITECTURES.get(machine, machine):
            yield entry


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.partition(":")[2]


def _document(layout: Path, digest: str) -> bytes:
    if not DIGEST.match(digest):
        raise ContainerError(f"{layout} is not an OCI image layout: it names no SHA-256 digest")
    try:
        raw = _read_document(_blob(layout, digest))
    except OSError:
        raise ContainerError(
            f"Manifest not found: {digest}.  Please pull the image again"
        ) from None
    if f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
        raise ContainerError(
            f"Manifest {digest} does not match its digest.  Please pull the image again"
        )
    return raw


def _read_document(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(DOCUMENT_LIMIT + 1)
    if len(raw) > DOCUMENT_LIMIT:
        raise ContainerError(f"{path} is larger than {DOCUMENT_LIMIT} bytes")
    return raw
