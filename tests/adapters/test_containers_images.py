"""Where images come from, and what is wrong with some: with real umoci, skopeo and a registry."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import platform
import re
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firstboot import cli, containers
from firstboot.containers import ContainerError, image, tools
from tests.adapters.oci_images import (
    MANIFEST,
    PLAIN,
    Layout,
    assert_nothing_installed,
    build,
    config,
    current,
    install,
    layer,
    need_root,
    need_tools,
    snapshot,
)


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


def test_a_layout_is_read_where_it_is(root: Path, tmp_path: Path) -> None:
    image = build(tmp_path / "image", PLAIN)
    before = snapshot(tmp_path / "image", exact=True)
    for path in (tmp_path / "image").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(tmp_path / "image", exact=True)
    install(root, image)
    assert snapshot(tmp_path / "image", exact=True) == before


def test_a_layouts_tags(root: Path, tmp_path: Path) -> None:
    made = Layout(tmp_path / "image")
    for tag in ("one", "two"):
        greeting = {**MANIFEST, "defaultValues": {"GREETING": tag, "ADDTL_MOUNTS": ""}}
        made.add(made.image({**PLAIN, "exports/manifest.json": greeting}), tag)
    install(root, f"oci:{made.path}:two")
    assert config(root)["process"]["args"] == ["run.sh", "two"]
    with pytest.raises(ContainerError, match="has no tag 'three'; its tags: one, two"):
        install(root, f"oci:{made.path}:three")
    with pytest.raises(ContainerError, match="has no tag 'latest'"):
        install(root, f"oci:{made.path}")


def test_the_only_image_needs_no_tag(root: Path, tmp_path: Path) -> None:
    assert install(root, build(tmp_path / "image", PLAIN, tag="")).changed


def test_the_image_for_this_machine_is_chosen(root: Path, tmp_path: Path) -> None:
    made = Layout(tmp_path / "image")
    mine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    entries = [
        {**made.image({"other": ""}), "platform": {"architecture": "s390x", "os": "linux"}},
        {**made.image(PLAIN), "platform": {"architecture": mine, "os": "linux"}},
    ]
    made.add(made.blob({"schemaVersion": 2, "manifests": entries}, "index.v1+json"), "all")
    made.add(made.blob({"schemaVersion": 2, "manifests": entries[:1]}, "index.v1+json"), "other")
    install(root, f"oci:{made.path}:all")
    assert config(root)["process"]["args"] == ["run.sh", "hello"]
    with pytest.raises(ContainerError, match="has no image for"):
        install(root, f"oci:{made.path}:other")


def blobs(image: str) -> tuple[Path, list[Path]]:
    """The image's manifest, and its blobs: configuration, layers."""
    path = Path(image.removeprefix("oci:"))
    digest = json.loads((path / "index.json").read_text())["manifests"][0]["digest"]
    manifest = path / "blobs" / digest.replace(":", "/")
    document = json.loads(manifest.read_text())
    digests = [document["config"]["digest"], *(x["digest"] for x in document["layers"])]
    return manifest, [path / "blobs" / d.replace(":", "/") for d in digests]


def test_a_missing_layer(root: Path, plain: str) -> None:
    _, (_, missing) = blobs(plain)
    missing.unlink()
    expected = f"Layer not found: sha256:{missing.name}.  Please pull the image again"
    with pytest.raises(ContainerError, match=f"^{re.escape(expected)}$"):
        install(root, plain)
    assert_nothing_installed(root)


@pytest.mark.parametrize("which", [0, 1], ids=["configuration", "layer"])
def test_a_damaged_blob(root: Path, plain: str, which: int) -> None:
    _, found = blobs(plain)
    raw = bytearray(found[which].read_bytes())
    raw[-1] ^= 1
    found[which].write_bytes(raw)
    with pytest.raises(ContainerError, match=f"{found[which].name} does not match its digest"):
        install(root, plain)
    assert_nothing_installed(root)


def test_a_layer_that_is_not_what_the_configuration_says(root: Path, tmp_path: Path) -> None:
    made = Layout(tmp_path / "image")
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}
    document = {
        "schemaVersion": 2,
        "config": made.blob(
            {"architecture": "amd64", "os": "linux", "rootfs": rootfs}, "config.v1+json"
        ),
        "layers": [made.blob(layer(PLAIN), "layer.v1.tar+gzip")],
    }
    made.add(made.blob(document, "manifest.v1+json"))
    with pytest.raises(ContainerError, match=r"^umoci failed: .*diffid mismatch"):
        install(root, f"oci:{made.path}")
    assert_nothing_installed(root)


def test_a_damaged_or_missing_manifest(root: Path, plain: str) -> None:
    manifest, _ = blobs(plain)
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(ContainerError, match=r"Manifest .* does not match its digest"):
        install(root, plain)
    manifest.unlink()
    with pytest.raises(ContainerError, match="Manifest not found"):
        install(root, plain)


@pytest.mark.parametrize(
    "document",
    [[], {}, {"config": {}, "layers": []}, {"config": {"digest": "md5:0"}, "layers": []}],
    ids=str,
)
def test_a_manifest_that_is_no_image(root: Path, tmp_path: Path, document: Any) -> None:
    made = Layout(tmp_path / "image")
    made.add(made.blob(json.dumps(document).encode(), "manifest.v1+json"))
    with pytest.raises(ContainerError, match="is not an image"):
        install(root, f"oci:{made.path}")


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"manifests": 1}', "nul"], ids=repr)
def test_a_directory_that_is_no_layout(root: Path, tmp_path: Path, index: str) -> None:
    with pytest.raises(ContainerError, match="is not an OCI image layout"):
        install(root, f"oci:{tmp_path}/absent")
    made = Layout(tmp_path / "image")
    (made.path / "index.json").write_text(index)
    with pytest.raises(ContainerError, match="is not an OCI image layout"):
        install(root, f"oci:{made.path}")


def test_a_document_without_end_is_not_read(root: Path, tmp_path: Path) -> None:
    made = Layout(tmp_path / "image")
    with (made.path / "index.json").open("wb") as file:
        file.truncate(5 * 1024 * 1024)
    with pytest.raises(ContainerError, match="is larger than"):
        install(root, f"oci:{made.path}")


@pytest.mark.parametrize(
    "reference", ["", "--help", "dockertar:x.tar", "a b", "x" * 600, "docker://", "docker:-x:y"]
)
def test_what_is_no_reference(root: Path, reference: str) -> None:
    with pytest.raises(ContainerError, match="is not an image: use oci:/LAYOUT:TAG, a reg"):
        install(root, reference)


class Registry(http.server.ThreadingHTTPServer):
    """A read-only registry (OCI distribution specification 1.0) of one image, tagged ``1``."""

    def __init__(self, image: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.layout = Path(image.removeprefix("oci:"))
        self.asked = 0
        self.wants = ""  # a user and the password, as Basic authentication has them

    @property
    def reference(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}/team/web:1"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.wants and self.headers["Authorization"] != self.server.wants:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="team"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        index = json.loads((self.server.layout / "index.json").read_text())
        wanted = self.path.rpartition("/")[2]
        digest = index["manifests"][0]["digest"] if wanted == "1" else wanted
        path = self.server.layout / "blobs" / digest.replace(":", "/")
        raw = b"{}" if self.path == "/v2/" else path.read_bytes() if path.exists() else None
        self.send_response(200 if raw is not None else 404)
        if "/manifests/" in self.path:
            self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            self.send_header("Docker-Content-Digest", digest)
        self.send_header("Content-Length", str(len(raw or b"")))
        self.end_headers()
        self.wfile.write(raw or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(plain: str) -> Iterator[Registry]:
    with Registry(plain) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_registrys_image_is_pulled_once(root: Path, registry: Registry) -> None:
    image = f"http:{registry.reference}"
    assert install(root, image).changed
    asked = registry.asked
    assert not install(root, image).changed
    assert install(root, image, GREETING="other").changed
    assert registry.asked == asked, "the registry need not be there any more"
    kept = root / "var/lib/containers/atomic/.storage/oci"
    port = registry.server_address[1]
    assert [p.name for p in kept.iterdir()] == [f"127.0.0.1_3A{port}_2Fteam_2Fweb_3A1"]
    assert current(root).values["IMAGE_NAME"] == image


def test_a_damaged_copy_is_pulled_again(root: Path, registry: Registry) -> None:
    image = f"http:{registry.reference}"
    install(root, image)
    (kept,) = (root / "var/lib/containers/atomic/.storage/oci").iterdir()
    asked = registry.asked
    for path in (kept / "blobs/sha256").iterdir():
        path.unlink()
    assert install(root, image, GREETING="other").changed
    assert registry.asked > asked


@pytest.mark.parametrize(
    ("reference", "doubted"),
    [
        ("busybox", True),
        ("team/web:1", True),
        ("docker.io/team/web", False),
        ("localhost/web", False),
        ("http:127.0.0.1:5000/web", False),
        ("oci:/images/web", False),
        ("docker:web:1", False),
    ],
)
def test_a_name_without_a_registry_is_told_of(reference: str, doubted: bool) -> None:
    assert bool(image.doubt(reference)) is doubted


def test_a_pull_fetches_anew_and_an_update_takes_it(
    root: Path, registry: Registry, tmp_path: Path
) -> None:
    reference = f"http:{registry.reference}"
    old = install(root, reference).container.image_id
    registry.layout = Path(build(tmp_path / "new", PLAIN, {"x": "y"}).removeprefix("oci:"))
    assert not containers.update(root, "web", {}).changed, "what is on this host counts"
    new = containers.pull(root, reference)
    assert new != old
    assert containers.update(root, "web", {}).container.image_id == new
    kept = root / "var/lib/containers/atomic/.storage/oci"
    assert len(list(kept.iterdir())) == 1


def test_a_pull_that_fails_leaves_the_copy(root: Path, registry: Registry) -> None:
    reference = f"http:{registry.reference}"
    install(root, reference)
    registry.layout = registry.layout / "absent"
    with pytest.raises(ContainerError):
        containers.pull(root, reference)
    assert install(root, reference, GREETING="other").changed


def test_a_crash_between_two_copies_loses_none(root: Path, registry: Registry) -> None:
    reference = f"http:{registry.reference}"
    install(root, reference)
    (kept,) = (root / "var/lib/containers/atomic/.storage/oci").iterdir()
    kept.rename(kept.with_name(f".{kept.name}.old"))
    asked = registry.asked
    assert install(root, reference, GREETING="other").changed
    assert registry.asked == asked


# ---------------------------------------------------------------- passwords

PASSWORD = "correct:horse"


@pytest.fixture
def locked(registry: Registry) -> Registry:
    """A registry that wants a password."""
    secret = b64encode(f"anna:{PASSWORD}".encode()).decode()
    registry.wants = f"Basic {secret}"
    return registry


def auth(path: Path, registry: Registry) -> Path:
    host = registry.reference.partition("/")[0]
    secret = registry.wants.removeprefix("Basic ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"auths": {host: {"auth": secret}}}))
    return path


def test_a_password_may_be_in_a_file_or_given(
    root: Path,
    locked: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = f"http:{locked.reference}"
    spy = tmp_path / "bin/skopeo"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/argv\nexec {shutil.which("skopeo")} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    with pytest.raises(ContainerError, match=r"^skopeo failed: .*(unauthorized|authentication)"):
        containers.pull(root, reference)
    containers.pull(root, reference, authfile=auth(tmp_path / "given.json", locked))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth(tmp_path / "env.json", locked)))
    containers.pull(root, reference)
    monkeypatch.delenv("REGISTRY_AUTH_FILE")
    auth(root / "etc/firstboot/auth.json", locked)  # as user-data writes it for `firstboot run`
    install(root, reference)
    (root / "etc/firstboot/auth.json").unlink()
    for words, typed, code in (
        (["--src-creds=anna"], PASSWORD, 0),
        (["--src-creds=anna"], "wrong", 1),
        (["--src-creds=anna"], "", 64),
        ([f"--src-creds=anna:{PASSWORD}"], PASSWORD, 64),
        (["--src-creds=anna", "--authfile=/x"], PASSWORD, 64),
        (["--authfile=/does/not/exist"], "", 1),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{typed}\n"))
        assert cli.main(["containers", "pull", f"--root={root}", *words, reference]) == code
    assert PASSWORD not in (tmp_path / "argv").read_text()
    told = capsys.readouterr()
    assert PASSWORD not in told.out + told.err
    assert "/does/not/exist cannot be read: No such file or directory" in told.err
    assert not list(Path(tempfile.gettempdir()).glob("firstboot-*/auth.json"))
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert cli.main(["containers", "pull", "--src-creds=anna", "oci:/layout"]) == 64


@pytest.mark.parametrize("text", ["", "[]", "secret"])
def test_a_file_without_passwords(root: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "auth.json").write_text(text)
    with pytest.raises(ContainerError, match="is not JSON as skopeo login writes it") as caught:
        containers.pull(root, "registry.example.com/web", authfile=tmp_path / "auth.json")
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- Docker's own


def docker_archive(path: Path, image: str, tag: str) -> Path:
    """What ``docker save`` writes, made by skopeo from a layout."""
    argv = ["skopeo", "copy", "-q", f"{image}:latest", f"docker-archive:{path}:{tag}"]
    subprocess.run(argv, check=True)
    return path


def test_what_docker_save_wrote(root: Path, plain: str, tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "web.tar", plain, "team/web:1.5")
    assert containers.default_name(f"dockertar:{path}") == "web-1.5"
    done = install(root, f"dockertar:{path}")
    assert config(root)["process"]["args"] == ["run.sh", "hello"]
    (kept,) = (root / "var/lib/containers/atomic/.storage/oci").iterdir()
    assert kept.name.endswith("team_2Fweb_3A1.5")
    newer = build(tmp_path / "newer", PLAIN, {"x": "y"})
    path.unlink()
    docker_archive(path, newer, "team/web:1.5")
    assert containers.update(root, "web", {}).container.image_id != done.container.image_id


@pytest.mark.parametrize("raw", [b"", b"no tar", gzip.compress(b"x", mtime=0)], ids=repr)
def test_what_docker_save_did_not_write(root: Path, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(ContainerError, match=r"x\.tar is not what docker save writes"):
        install(root, f"dockertar:{tmp_path}/x.tar")
    with pytest.raises(ContainerError, match=r"y\.tar cannot be read: No such file"):
        install(root, f"dockertar:{tmp_path}/y.tar")


class Daemon(socketserver.ThreadingUnixStreamServer):
    """A Docker daemon that has one image (Engine API 1.24, image export); skopeo asks it."""

    def __init__(self, path: Path, archive: Path) -> None:
        self.archive = archive
        self.asked: list[str] = []
        super().__init__(str(path), DaemonAnswer)


class DaemonAnswer(http.server.BaseHTTPRequestHandler):
    server: Daemon

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        export = "/images/" in self.path
        raw = self.server.archive.read_bytes() if export else b"{}"
        self.send_response(200)
        self.send_header("Api-Version", "1.40")
        self.send_header("Content-Type", "application/x-tar" if export else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    do_HEAD = do_GET

    def address_string(self) -> str:
        return "skopeo"

    def log_message(self, *_: object) -> None:
        pass


IN_A_NAMESPACE = """
import sys
from pathlib import Path
from firstboot import cli, containers
print(containers.install(Path(sys.argv[1]), "web", "docker:team/web:1", {}).container.image)
"""


def test_an_image_of_the_docker_daemon(root: Path, plain: str, tmp_path: Path) -> None:
    need_root()
    archive = docker_archive(tmp_path / "web.tar", plain, "team/web:1")
    socket = tmp_path / "docker.sock"
    enter = 'mount -t tmpfs tmpfs /run && ln -s "$0" /run/docker.sock && exec "$@"'
    argv = ["unshare", "-m", "sh", "-euc", enter, str(socket), sys.executable]
    with Daemon(socket, archive) as daemon:
        thread = threading.Thread(target=daemon.serve_forever)
        thread.start()
        try:
            done = subprocess.run(
                [*argv, "-c", IN_A_NAMESPACE, str(root)], capture_output=True, text=True
            )
        finally:
            daemon.shutdown()
            thread.join()
        assert done.returncode == 0, done.stderr
        assert any("team" in path and "web" in path for path in daemon.asked)
    assert config(root)["process"]["args"] == ["run.sh", "hello"]
    assert install(root, "docker:team/web:1", GREETING="other").changed, "the copy is used"
    with pytest.raises(ContainerError, match="names no tag"):
        install(root, "docker:team/web")


def test_a_registry_that_does_not_have_it(root: Path, registry: Registry) -> None:
    with pytest.raises(ContainerError, match=r"^skopeo failed: ") as error:
        install(root, f"http:{registry.reference}2")
    assert "\n" not in str(error.value)
    assert not list((root / "var/lib/containers/atomic/.storage/oci").iterdir())


def test_a_missing_tool_is_named(
    root: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runc = shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert runc is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/runc").symlink_to(runc)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tools, "SBIN", "")
    with pytest.raises(ContainerError, match="umoci is not installed: install the package"):
        install(root, plain)
    assert_nothing_installed(root)


def test_a_tool_that_never_ends_is_stopped(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(ContainerError, match=r"^sh did not finish within 1 s$"):
        tools.run(["sh", "-c", f"echo $$ > {pid}; exec sleep 1000"], timeout=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_only_the_last_line_of_a_tools_complaint_is_repeated() -> None:
    with pytest.raises(ContainerError, match=r"^sh failed: last one$"):
        tools.run(["sh", "-c", "echo first >&2; echo last one >&2; echo >&2; exit 3"], timeout=5.0)
    with pytest.raises(ContainerError, match=r"^sh failed: exit code 3$"):
        tools.run(["sh", "-c", "exit 3"], timeout=5.0)
