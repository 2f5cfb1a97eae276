"""OCI image layouts written byte by byte, so that a test can say exactly what is in them; and
what a host looks like after an installation from one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from firstboot import containers
from firstboot.containers import Container, Installed

TEMPLATE = """{
    "root": {"path": "rootfs", "readonly": true},
    "process": {"args": ["run.sh", "$GREETING"]},
    "mounts": [
        {"type": "bind", "source": "/proc", "destination": "/proc"} $ADDTL_MOUNTS
    ]
}"""
UNIT = "[Service]\nExecStart=$EXEC_START\nExecStop=$EXEC_STOP\nWorkingDirectory=$DESTDIR\n"
MANIFEST: dict[str, Any] = {
    "version": "1.0",
    "defaultValues": {"GREETING": "hello", "ADDTL_MOUNTS": ""},
}
PLAIN: dict[str, Any] = {
    "exports/config.json.template": TEMPLATE,
    "exports/service.template": UNIT,
    "exports/manifest.json": MANIFEST,
}
Files = Mapping[str, Any]


def need_tools() -> None:
    """Fail, with the remedy, if a program that containers are made with is not there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    needed = ("umoci", "skopeo", "ostree", "runc", "crun", "systemd-tmpfiles", "sync")
    missing = [tool for tool in needed if shutil.which(tool, path=path) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} missing: run 'make setup'")


def need_root() -> None:
    """Skip where a person without root runs this by hand; in CI that is a failure."""
    if os.geteuid() and os.environ.get("CI"):
        pytest.fail("needs root: run `make test`", pytrace=False)
    if os.geteuid():
        pytest.skip("needs root: run `make test`")


class Link(str):
    """A symbolic link's target, as an image's content."""


class Directory:
    """An empty directory, as an image's content."""


class Program(str):
    """An executable file's text."""


HOSTFS: dict[str, Any] = {
    "exports/hostfs/usr/local/bin/ctl": Program("#!/bin/sh\n"),
    "exports/hostfs/etc/web/web.conf": "greeting=$GREETING\n",
    "exports/hostfs/etc/web/raw.conf": "greeting=$GREETING\n",
    "exports/hostfs/var/lib/empty": Directory(),
    "exports/hostfs/usr/local/bin/alias": Link("ctl"),
    "exports/hostfs/etc/nowhere": Link("/does/not/exist"),
    "exports/manifest.json": {
        **MANIFEST,
        "installedFilesTemplate": ["/etc/$NAME-conf/web.conf", "/etc/web-conf/web.conf"],
        "renameFiles": {
            "/etc/web": "/etc/${NAME}-conf",
            "/usr/local/bin/ctl": "/usr/local/bin/${NAME}ctl",
        },
    },
}


def layer(files: Files) -> bytes:
    """A gzipped tar. Content is text, a mapping (as JSON), a Link, a Program or a Directory; a path
    is that file."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode = 0o644
            if isinstance(content, Link):
                entry.type, entry.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(entry)
            elif isinstance(content, Directory):
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            elif isinstance(content, Path):
                raw_content = content.read_bytes()
                entry.mode, entry.size = content.stat().st_mode & 0o777, len(raw_content)
                tar.addfile(entry, io.BytesIO(raw_content))
            else:
                text = content if isinstance(content, str) else json.dumps(content)
                entry.mode = 0o755 if isinstance(content, Program) else 0o644
                entry.size = len(text.encode())
                tar.addfile(entry, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue(), mtime=0)


class Layout:
    """An OCI image layout being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.entries: list[dict[str, Any]] = []

    def blob(self, raw: bytes | dict[str, Any], kind: str = "") -> dict[str, Any]:
        data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    def image(self, *layers: Files, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
        packed = [layer(files) for files in layers]
        sums = [f"sha256:{hashlib.sha256(gzip.decompress(p)).hexdigest()}" for p in packed]
        architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Labels": dict(labels or {})},
            "rootfs": {"type": "layers", "diff_ids": sums},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(config, "config.v1+json"),
            "layers": [self.blob(p, "layer.v1.tar+gzip") for p in packed],
        }
        return self.blob(manifest, "manifest.v1+json")

    def add(self, entry: dict[str, Any], tag: str = "") -> None:
        names = {"org.opencontainers.image.ref.name": tag} if tag else {}
        self.entries.append({**entry, "annotations": names})
        index = {"schemaVersion": 2, "manifests": self.entries}
        (self.path / "index.json").write_text(json.dumps(index))


def build(
    path: Path, *layers: Files, tag: str = "latest", labels: Mapping[str, str] | None = None
) -> str:
    """A layout with one image of `layers`, lowest first; returns its reference."""
    made = Layout(path)
    made.add(made.image(*layers, labels=labels), tag)
    return f"oci:{path}"


# ---------------------------------------------------------------- hosts


def install(root: Path, image: str, **values: str) -> Installed:
    return containers.install(root, "web", image, values)


def slot(root: Path, number: int = 0, name: str = "web") -> Path:
    return root / "var/lib/containers/atomic" / f"{name}.{number}"


def config(root: Path, number: int = 0) -> Any:
    return json.loads((slot(root, number) / "config.json").read_text())


def unit(root: Path) -> str:
    return (root / "etc/systemd/system/web.service").read_text()


def tmpfiles(root: Path) -> str:
    return (root / "etc/tmpfiles.d/web.conf").read_text()


def current(root: Path, name: str = "web") -> Container:
    found = containers.info(root, name)
    assert found is not None
    return found


def bind(*sources: str) -> str:
    mounts = [{"type": "bind", "source": s, "destination": s} for s in sources]
    return "".join("," + json.dumps(mount) for mount in mounts)


def assert_nothing_installed(root: Path) -> None:
    assert containers.installed(root) == ()
    assert list((root / "var/lib/containers/atomic").iterdir()) == []
    assert not (root / "etc").exists()


def snapshot(root: Path, *, exact: bool = False) -> dict[str, object]:
    """Every path below `root` with what it is; `exact` includes whether it was written again."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        if path.is_symlink():
            what: object = path.readlink()
        elif path.is_dir():
            what = "directory"
        elif path.name == "info":
            what = {k: v for k, v in json.loads(path.read_text()).items() if k != "created"}
        else:
            what = (path.read_bytes(), facts.st_mode)
        written = (facts.st_ino, facts.st_mtime_ns) if exact else ()
        found[str(path.relative_to(root))] = (what, *written)
    return found
