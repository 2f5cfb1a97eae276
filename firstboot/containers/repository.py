"""An ostree repository as the store of images, as Atomic keeps them (ADR 11).

An image is the commit of a branch ``ociimage/NAME``; its metadata hold the manifest. Every layer,
and the configuration, is the commit of a branch ``ociimage/SHA256``. A deployment's root file
system is its layers checked out over one another, hard links into the repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstboot.containers import disk, layout
from firstboot.containers.store import Store
from firstboot.containers.tools import ContainerError, find, run

HOSTS = "/ostree/repo"
BRANCHES = "refs/heads"
ANCESTOR = "0" * 64  # every import begins a history
COMMIT_SECONDS = 900.0
READ_SECONDS = 60.0
MANIFEST_LIMIT = 120_000  # bytes; one argument of a program (execve(2), MAX_ARG_STRLEN)
MODE = re.compile(r"^mode=(\S+)", re.MULTILINE)


def encode(name: str) -> str:
    """A branch for an image's name, which has a tag: docker.io_2Fbusybox_3Alatest."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda found: f"_{ord(found.group()):02X}", name)


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in the repository."""

    repository: Repository
    commit: str
    digest: str
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The manifest's digest without its algorithm."""
        return self.digest.removeprefix("sha256:")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' digests in hex, lowest first."""
        if history := self.manifest.get("fsLayers"):  # image manifest version 2, schema 1
            found = [layer["blobSum"] for layer in reversed(history)]
        elif entries := self.manifest.get("layers"):
            found = [layer["digest"] for layer in entries]
        else:
            found = list(self.manifest.get("Layers") or ())
        return tuple(str(digest).removeprefix("sha256:") for digest in found)

    @property
    def labels(self) -> Mapping[str, str]:
        """The image's labels; none if its configuration is not in the repository."""
        blob = self.manifest.get("config")
        digest = str(blob.get("digest", "")) if isinstance(blob, dict) else ""
        digest = digest.removeprefix("sha256:")
        if not digest or not self.repository.revision(digest):
            return {}
        return layout.labels_of(layout.read_object(self.repository.content(digest).encode()))

    @property
    def complete(self) -> bool:
        """Whether all layers are there."""
        return all(self.repository.revision(digest) for digest in self.layers)

    def unpack(self, rootfs: Path) -> None:
        """Check out the layers into the new directory `rootfs`."""
        self.repository.check_out(self.layers, rootfs)


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository at `path`. `reach` is a path to `checkouts` that hard links can be made by."""

    path: Path
    checkouts: Path
    reach: Path

    def revision(self, branch: str) -> str | None:
        """The commit that ``ociimage/`` `branch` points at, None if there is no such branch."""
        raw = disk.read_if_there(self.path / BRANCHES / "ociimage" / branch)
        return raw.decode().strip() if raw else None

    def content(self, digest: str) -> str:
        """The configuration with this digest."""
        return self._ostree("cat", f"ociimage/{digest}", "/content", seconds=READ_SECONDS)

    def image(self, name: str) -> Stored | None:
        """The image called `name`, None if it, or a layer of it, is not there."""
        commit = self.revision(encode(name))
        if commit is None:
            return None
        manifest = layout.read_object((self._metadata(commit, "docker.manifest") or "").encode())
        blob = manifest.get("config")
        digest = (
            self._metadata(commit, "docker.digest")
            or manifest.get("Digest")
            or (blob.get("digest") if isinstance(blob, dict) else None)
            or commit
        )
        found = Stored(self, commit, str(digest), manifest)
        try:
            return found if found.complete else None
        except (LookupError, TypeError, AttributeError):
            return None  # a manifest nobody can use is as good as none

    def holding(self, name: str, image: layout.Image) -> Stored:
        """`image` in the repository, imported from its layout unless it is there already."""
        found = self.image(name)
        if found is None or found.digest != image.manifest:
            self._add(name, layout.verified(image))
            found = self.image(name)
        if found is None:
            raise ContainerError(f"{name} is not in {self.path} after it was put there")
        return found

    def check_out(self, digests: tuple[str, ...], rootfs: Path) -> None:
        """Lay the layers over one another in the new directory `rootfs`."""
        rootfs.mkdir()
        target = self.reach / rootfs.relative_to(self.checkouts)
        for digest in digests:
            if not self.revision(digest):
                raise ContainerError(f"Layer not found: {digest}.  Please pull the image again")
            options = ("--union", "--whiteouts", "--require-hardlinks", "--force-copy-zerosized")
            self._ostree("checkout", *options, f"ociimage/{digest}", str(target))

    def _add(self, name: str, image: layout.Image) -> None:
        raw = image.blob(image.manifest).read_bytes()
        if len(raw) > MANIFEST_LIMIT:
            raise ContainerError(f"The manifest of {name} is too large for an ostree repository")
        scratch = self.checkouts / ".storage" / "import"
        disk.wipe(scratch)
        scratch.mkdir(parents=True)
        try:
            sums = list(_unpacked_sums(image))
            for number, digest in enumerate(image.blobs[1:]):
                if not self.revision(digest.removeprefix("sha256:")):
                    self._add_layer(image, digest, sums[number] if sums else None, scratch)
            config = image.blobs[0]
            self._add_file(config.removeprefix("sha256:"), "content", image.blob(config), scratch)
            details = {"docker.manifest": raw.decode(), "docker.digest": image.manifest}
            details["signatures"] = "0"
            # Last: its branch says that all the rest is there.
            path = image.blob(image.manifest)
            self._add_file(encode(name), "manifest.json", path, scratch, details)
        finally:
            disk.wipe(scratch)

    def _add_layer(
        self, image: layout.Image, digest: str, expected: str | None, scratch: Path
    ) -> None:
        from firstboot.containers import layers  # with tarfile; most hosts have no repository

        tar = scratch / "layer.tar"
        plain, size = layers.rewrite(image.blob(digest), tar)
        if expected not in (None, plain):
            raise ContainerError(f"Layer {digest} is not the one that the image's history names")
        details = {
            "docker.size": str(image.blob(digest).stat().st_size),
            "docker.uncompressed_size": str(size),
            "docker.uncompressed_digest": plain,
        }
        tree = [f"--tree=tar={tar}", "--tar-autocreate-parents"]
        self._commit(digest.removeprefix("sha256:"), tree, details)
        tar.unlink()

    def _add_file(
        self,
        branch: str,
        name: str,
        source: Path,
        scratch: Path,
        details: Mapping[str, str] | None = None,
    ) -> None:
        tree = scratch / "tree"
        tree.mkdir()
        (tree / name).write_bytes(source.read_bytes())
        self._commit(branch, [f"--tree=dir={tree}"], details or {})
        disk.wipe(tree)

    def _commit(self, branch: str, tree: list[str], details: Mapping[str, str]) -> None:
        metadata = [f"--add-metadata-string={key}={value}" for key, value in details.items()]
        # No time: the same content is the same commit, on every host.
        fixed = (f"--branch=ociimage/{branch}", f"--parent={ANCESTOR}", "--timestamp=@0")
        self._ostree("commit", *fixed, *tree, *metadata)

    def _metadata(self, commit: str, key: str) -> str | None:
        try:
            shown = self._ostree("show", f"--print-metadata-key={key}", commit)
            # A GVariant's text is a string literal like Python's (g_variant_print()).
            found = ast.literal_eval(shown.strip())
        except (ContainerError, ValueError, SyntaxError):
            return None
        return found if isinstance(found, str) else None

    def _ostree(self, verb: str, *arguments: str, seconds: float = COMMIT_SECONDS) -> str:
        return run(["ostree", f"--repo={self.path}", verb, *arguments], timeout=seconds)


def choose(store: Store) -> Repository | None:
    """The repository this host keeps its images in, None where a plain store has to do.

    ``ostree_repository`` of /etc/atomic.conf, else the host's own, else Atomic's private one; the
    latter two only if the checkouts can share files with them.
    """
    configured = store.settings.repository
    if configured:
        path = disk.inside(store.root, configured)
        if why := _unusable(path):
            raise ContainerError(f"The ostree repository {configured} cannot be used: {why}")
        if reach := _reach(path, store):
            return Repository(path, store.checkouts, reach)
        raise ContainerError(
            f"The ostree repository {configured} cannot share files with"
            f" {store.settings.checkouts}: have both on one writable file system"
        )
    for path in (disk.inside(store.root, HOSTS), store.storage / "ostree"):
        if not find("ostree") or _unusable(path):
            continue
        if reach := _reach(path, store):
            return Repository(path, store.checkouts, reach)
    return None


def _unusable(path: Path) -> str:
    raw = disk.read_if_there(path / "config")
    if raw is None:
        return "it is not there; make it with ostree init --mode=bare"
    mode = MODE.search(raw.decode(errors="replace"))
    if mode is None or mode[1] != "bare":
        return f"its mode is {mode[1] if mode else 'unknown'}, not bare"
    return ""


def _reach(path: Path, store: Store) -> Path | None:
    """A path to the checkouts that is on the mount of the repository at `path`.

    On an ostree host /var is a mount of its own, of a directory that is below the repository's
    mount too. The same file system is not enough: link(2) fails with EXDEV between two mounts.
    """
    probe = path / "tmp" / ".firstboot"
    for candidate in _aliases(store):
        link = candidate / ".firstboot"
        with suppress(OSError):
            try:
                probe.touch()
                link.unlink(missing_ok=True)
                link.hardlink_to(probe)
                return candidate
            finally:
                for name in (link, probe):
                    name.unlink(missing_ok=True)
    return None


def _aliases(store: Store) -> Iterator[Path]:
    yield store.checkouts
    var = store.settings.checkouts.removeprefix("/var/")
    if var != store.settings.checkouts:
        for deployed in sorted(disk.inside(store.root, "/ostree/deploy").glob("*/var")):
            with suppress(OSError):
                if (deployed / var).samefile(store.checkouts):
                    yield deployed / var


def _unpacked_sums(image: layout.Image) -> Iterator[str]:
    """What the configuration says of the layers before compression; nothing if it does not."""
    rootfs = image.configuration.get("rootfs")
    sums = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if isinstance(sums, list) and len(sums) == len(image.blobs) - 1:
        yield from map(str, sums)
