"""Images in an ostree repository, by the real ostree: branches, metadata, checkouts, failures."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from firstboot import containers
from firstboot.containers import ContainerError, layers, repository
from firstboot.containers.store import Store
from tests.adapters.oci_images import (
    MANIFEST,
    PLAIN,
    Directory,
    Layout,
    Link,
    Program,
    build,
    config,
    current,
    install,
    layer,
    need_root,
    need_tools,
    slot,
    unit,
)
from tests.adapters.test_containers_crashes import in_child, power_cut

BUSYBOX = Path("/bin/busybox")


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


def make_repository(path: Path, mode: str = "bare") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ostree(path, "init", f"--mode={mode}")
    return path


def ostree(repo: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["ostree", f"--repo={repo}", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def metadata(repo: Path, branch: str, key: str) -> str:
    shown = ostree(repo, "show", f"--print-metadata-key={key}", branch)
    found = ast.literal_eval(shown.strip())
    assert isinstance(found, str)
    return found


@pytest.fixture
def repo(root: Path) -> Path:
    """The host's own repository."""
    return make_repository(root / "ostree/repo")


def branches(repo: Path) -> set[str]:
    return set(ostree(repo, "refs", "--list").split())


def manifest_of(image: str) -> tuple[str, dict[str, Any]]:
    path = Path(image.removeprefix("oci:"))
    digest = json.loads((path / "index.json").read_text())["manifests"][0]["digest"]
    document = json.loads((path / "blobs" / digest.replace(":", "/")).read_text())
    return digest, document


# ---------------------------------------------------------------- what an import leaves


def test_branches_and_metadata_are_those_that_atomic_reads(
    root: Path, repo: Path, tmp_path: Path
) -> None:
    image = build(tmp_path / "image", PLAIN, {"more": "x"})
    done = install(root, image)
    digest, document = manifest_of(image)
    name = f"ociimage/{repository.encode(str(tmp_path / 'image') + ':latest')}"
    assert ":" not in name and name.endswith("image_3Alatest")
    hexes = [document["config"]["digest"], *(x["digest"] for x in document["layers"])]
    assert branches(repo) == {name, *(f"ociimage/{h.removeprefix('sha256:')}" for h in hexes)}
    assert json.loads(metadata(repo, name, "docker.manifest")) == document
    assert metadata(repo, name, "docker.digest") == digest
    assert metadata(repo, name, "signatures") == "0"
    assert json.loads(ostree(repo, "cat", name, "/manifest.json")) == document
    blob = Path(image.removeprefix("oci:")) / "blobs" / hexes[1].replace(":", "/")
    plain = gzip.decompress(blob.read_bytes())
    first = f"ociimage/{hexes[1].removeprefix('sha256:')}"
    assert metadata(repo, first, "docker.size") == str(blob.stat().st_size)
    assert metadata(repo, first, "docker.uncompressed_size") == str(len(plain))
    configuration = json.loads(ostree(repo, "cat", f"ociimage/{hexes[0][7:]}", "/content"))
    assert (
        metadata(repo, first, "docker.uncompressed_digest")
        == (configuration["rootfs"]["diff_ids"][0])
    )
    assert f"Parent:  {'0' * 64}" in ostree(repo, "log", first)
    info = json.loads((slot(root) / "info").read_text())
    assert info["ostree-commit"] == ostree(repo, "rev-parse", name).strip()
    assert info["revision"] == done.container.image_id == digest.removeprefix("sha256:")
    assert not (slot(root).parent / ".storage" / "import").exists()
    ostree(repo, "fsck", "-q")


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("docker.io/busybox:latest", "docker.io_2Fbusybox_3Alatest"),
        ("a_b:1", "a_5Fb_3A1"),
        ("r:5000/x-y.z@sha256:0", "r_3A5000_2Fx-y.z_40sha256_3A0"),
    ],
)
def test_how_a_name_becomes_a_branch(name: str, branch: str) -> None:
    assert repository.encode(name) == branch


def test_a_checkout_shares_its_files_with_the_repository(
    root: Path, repo: Path, tmp_path: Path
) -> None:
    install(root, build(tmp_path / "image", PLAIN, {"data": "shared"}))
    file = slot(root) / "rootfs/data"
    assert file.stat().st_nlink == 2
    install(root, build(tmp_path / "next", PLAIN, {"data": "shared"}, {"more": ""}))
    assert (slot(root, 1) / "rootfs/data").samefile(file), "one layer, two images, two deployments"


def test_layers_lie_over_one_another(root: Path, repo: Path, tmp_path: Path) -> None:
    upper = {
        "exports/.wh.tmpfiles.template": "",
        "exports/service.template": "[Service]\n# child $EXEC_START\n",
        "kept/.wh..wh..opq": "",
        "kept/new": "new",
        "etc/motd": "upper",
    }
    lower = {
        **PLAIN,
        "exports/tmpfiles.template": "$BROKEN",
        "kept/old": "old",
        "etc/motd": "lower",
        "etc/link": Link("motd"),
        "empty/dir": Directory(),
        "bin/tool": Program("#!/bin/sh\n"),
    }
    install(root, build(tmp_path / "image", lower, upper))
    rootfs = slot(root) / "rootfs"
    assert "# child" in unit(root)
    assert sorted(p.name for p in (rootfs / "kept").iterdir()) == ["new"]
    assert (rootfs / "etc/link").read_text() == "upper"
    assert (rootfs / "empty/dir").is_dir()
    assert (rootfs / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert not list(rootfs.rglob(".wh.*"))
    ostree(repo, "fsck", "-q")


def test_the_same_content_is_the_same_commit(tmp_path: Path) -> None:
    commits = set()
    for number in range(2):
        root = tmp_path / f"host{number}"
        repo = make_repository(root / "ostree/repo")
        image = build(tmp_path / f"image{number}", PLAIN)
        install(root, image)
        _, document = manifest_of(image)
        commits.add(ostree(repo, "rev-parse", f"ociimage/{document['layers'][0]['digest'][7:]}"))
    assert len(commits) == 1
    assert "Date:  1970-01-01" in ostree(repo, "show", commits.pop())


def test_owners_attributes_and_odd_files(tmp_path: Path) -> None:
    """What a layer may hold and ostree's tar reader stumbles over."""
    raw = io.BytesIO()
    long = f"usr/{'x' * 150}/ü{'y' * 150}"
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes = b"", **facts: Any) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            for key, value in facts.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(content))

        attributes = {"SCHILY.xattr.user.a": "1", "SCHILY.xattr.user.b": "2"}
        add("/usr/bin/ping", b"ping", uid=7, gid=8, mode=0o4755, pax_headers=attributes)
        add(long, b"long")
        add("soft", type=tarfile.SYMTYPE, linkname="usr", mode=0o644)
        add("./hard", type=tarfile.LNKTYPE, linkname="/usr/bin/ping")
        add("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add("run/pipe", type=tarfile.FIFOTYPE)
        add("./")
    blob = tmp_path / "blob"
    blob.write_bytes(raw.getvalue())  # not compressed
    assert layers.rewrite(blob, tmp_path / "tar")[1] == len(raw.getvalue())
    repo = make_repository(tmp_path / "repo")
    tree = (f"--tree=tar={tmp_path / 'tar'}", "--tar-autocreate-parents")
    ostree(repo, "commit", "--branch=a", *tree)
    ostree(repo, "fsck", "-q")
    out = tmp_path / "out"
    ostree(repo, "checkout", "--require-hardlinks", "a", str(out))
    ping = out / "usr/bin/ping"
    facts = ping.stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o7777) == (7, 8, 0o4755)
    assert {a: os.getxattr(ping, a) for a in os.listxattr(ping) if a.startswith("user")} == {
        "user.a": b"1",
        "user.b": b"2",
    }
    assert (out / "hard").samefile(ping)
    assert (out / "soft").readlink() == Path("usr")
    assert (out / long).read_text() == "long"
    assert {p.name for p in out.rglob("*") if not p.is_dir()} == {
        "ping",
        "hard",
        long.rpartition("/")[2],
    }


def test_an_empty_layer(root: Path, repo: Path, tmp_path: Path) -> None:
    assert install(root, build(tmp_path / "image", PLAIN, {})).changed


# ---------------------------------------------------------------- what is used, and what is not


def test_atomics_private_repository_is_used_where_it_is(root: Path, plain: str) -> None:
    repo = make_repository(slot(root).parent / ".storage/ostree")
    install(root, plain)
    assert len(branches(repo)) == 3


def test_the_configured_repository_is_used(root: Path, repo: Path, plain: str) -> None:
    other = make_repository(root / "srv/images")
    (root / "etc").mkdir()
    (root / "etc/atomic.conf").write_text("ostree_repository: /srv/images\n")
    install(root, plain)
    assert (len(branches(other)), branches(repo)) == (3, set())


@pytest.mark.parametrize("mode", ["archive", "bare-user"])
def test_a_repository_of_another_mode(root: Path, plain: str, mode: str) -> None:
    repo = make_repository(root / "ostree/repo", mode)
    assert install(root, plain).changed, "the plain store does"
    assert branches(repo) == set()
    (root / "etc/atomic.conf").write_text("ostree_repository: /ostree/repo\n")
    with pytest.raises(ContainerError, match=f"its mode is {mode}.*, not bare"):
        install(root, plain, GREETING="other")


def test_a_configured_repository_that_is_not_there(root: Path, plain: str) -> None:
    (root / "etc").mkdir()
    (root / "etc/atomic.conf").write_text("ostree_repository: /srv/none\n")
    with pytest.raises(ContainerError, match="/srv/none cannot be used: it is not there"):
        install(root, plain)


@pytest.mark.parametrize("configured", [False, True])
def test_a_repository_on_another_file_system(
    root: Path, plain: str, tmp_path: Path, configured: bool
) -> None:
    other = Path("/dev/shm") / f"firstboot-{os.getpid()}"
    if other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.fail("the temporary directory is on /dev/shm: choose another with --basetemp")
    repo = make_repository(other / "repo")
    try:
        (root / "ostree").mkdir()
        (root / "ostree/repo").symlink_to(repo)
        if not configured:
            assert install(root, plain).changed, "the plain store does"
            assert branches(repo) == set()
            return
        (root / "etc").mkdir()
        (root / "etc/atomic.conf").write_text("ostree_repository: /ostree/repo\n")
        with pytest.raises(ContainerError, match="cannot share files with /var/lib/containers"):
            install(root, plain)
    finally:
        shutil.rmtree(other)


def test_var_may_be_another_mount_of_the_repositorys_file_system(
    root: Path, plain: str, tmp_path: Path
) -> None:
    """As on an ostree host, where link(2) fails between the two though the disk is one."""
    repo = make_repository(root / "ostree/repo")
    real = root / "ostree/deploy/os/var"
    real.mkdir(parents=True)
    (root / "var").mkdir()
    script = f'mount --bind "{real}" "{root}/var" && "$@"'
    program = (
        "import sys; from pathlib import Path; from firstboot import containers;"
        "print(containers.install(Path(sys.argv[1]), 'web', sys.argv[2], {}).container.deployment)"
    )
    argv = ["unshare", "-m", "sh", "-euc", script, "sh", sys.executable]
    need_root()
    done = subprocess.run(
        [*argv, "-c", program, str(root), plain], capture_output=True, text=True, check=True
    )
    assert done.stdout == "/var/lib/containers/atomic/web.0\n"
    assert len(branches(repo)) == 3
    made = real / "lib/containers/atomic/web.0/rootfs/exports/manifest.json"
    assert made.stat().st_nlink == 2, "shared with the repository"


def test_an_image_that_is_there_is_not_imported_again(root: Path, repo: Path, plain: str) -> None:
    install(root, plain)
    before = {p: p.stat().st_mtime_ns for p in (repo / "objects").rglob("*.commit")}
    assert install(root, plain, GREETING="other").changed
    assert {p: p.stat().st_mtime_ns for p in (repo / "objects").rglob("*.commit")} == before
    assert config(root, 1)["process"]["args"] == ["run.sh", "other"]


DIGEST = f"sha256:{'d' * 64}"


def as_others_import(
    repo: Path, tmp_path: Path, manifest: dict[str, Any], details: dict[str, str]
) -> str:
    """An image in the repository with two layers, ``a…`` below ``b…``; the commit of its branch."""
    for letter, files in (("a", {**PLAIN, "below": "x", "both": "a"}), ("b", {"both": "b"})):
        tree = tmp_path / letter
        for name, content in files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        ostree(repo, "commit", f"--branch=ociimage/{letter * 64}", f"--tree=dir={tree}")
    (tmp_path / "manifest").mkdir()
    metadata = {"docker.manifest": json.dumps(manifest), **details}
    argv = [f"--add-metadata-string={key}={value}" for key, value in metadata.items()]
    branch = "--branch=ociimage/registry.example.com_2Fweb_3A1"
    return ostree(repo, "commit", branch, f"--tree=dir={tmp_path / 'manifest'}", *argv).strip()


LAYERS = [f"sha256:{letter * 64}" for letter in "ab"]
MANIFESTS: dict[str, dict[str, Any]] = {
    "schema 1": {"schemaVersion": 1, "fsLayers": [{"blobSum": x} for x in reversed(LAYERS)]},
    "schema 2": {
        "config": {"digest": f"sha256:{'c' * 64}"},
        "layers": [{"digest": x} for x in LAYERS],
    },
    "inspected": {"Layers": LAYERS, "Digest": f"sha256:{'e' * 64}"},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_image_that_others_imported_is_used_without_its_registry(
    root: Path, repo: Path, tmp_path: Path, kind: str
) -> None:
    commit = as_others_import(repo, tmp_path, MANIFESTS[kind], {"docker.digest": DIGEST})
    done = install(root, "registry.example.com/web:1")
    assert done.container.image_id == "d" * 64
    assert json.loads((slot(root) / "info").read_text())["ostree-commit"] == commit
    assert (slot(root) / "rootfs/both").read_text() == "b", "layers in their order"
    assert (slot(root) / "rootfs/below").read_text() == "x"


@pytest.mark.parametrize(
    ("kind", "found"), [("schema 2", "c"), ("inspected", "e"), ("schema 1", "")]
)
def test_the_id_of_an_image_without_a_digest(
    root: Path, repo: Path, tmp_path: Path, kind: str, found: str
) -> None:
    commit = as_others_import(repo, tmp_path, MANIFESTS[kind], {})
    image_id = install(root, "registry.example.com/web:1").container.image_id
    assert image_id == (found * 64 or commit)


def test_an_image_that_lacks_a_layer_is_fetched(
    root: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_others_import(repo, tmp_path, MANIFESTS["schema 2"], {"docker.digest": DIGEST})
    ostree(repo, "refs", "--delete", f"ociimage/{'b' * 64}")
    skopeo = tmp_path / "bin/skopeo"
    skopeo.parent.mkdir()
    skopeo.write_text("#!/bin/sh\necho asked for $4 >&2; exit 1\n")
    skopeo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{skopeo.parent}:{os.environ['PATH']}")
    with pytest.raises(ContainerError, match="skopeo failed: asked for "):
        install(root, "registry.example.com/web:1")


def test_a_layout_that_changed_is_imported_again(root: Path, repo: Path, tmp_path: Path) -> None:
    image = build(tmp_path / "image", PLAIN)
    old = install(root, image).container.image_id
    shutil.rmtree(tmp_path / "image")
    manifest = {**MANIFEST, "defaultValues": {"GREETING": "new", "ADDTL_MOUNTS": ""}}
    build(tmp_path / "image", {**PLAIN, "exports/manifest.json": manifest, "x": "y"})
    done = containers.update(root, "web", {})
    assert done.replaced
    assert done.container.image_id != old
    assert (slot(root, 1) / "rootfs/x").read_text() == "y"


# ---------------------------------------------------------------- what goes wrong


def test_a_missing_layer_in_the_repository(root: Path, repo: Path, plain: str) -> None:
    install(root, plain)
    _, document = manifest_of(plain)
    digest = document["layers"][0]["digest"].removeprefix("sha256:")
    ostree(repo, "refs", "--delete", f"ociimage/{digest}")
    found = repository.choose(Store(root))
    assert found is not None
    slot(root, 1).mkdir()
    with pytest.raises(ContainerError, match=f"^Layer not found: {digest}.  Please pull the image"):
        found.check_out((digest,), slot(root, 1) / "rootfs")
    assert install(root, plain, GREETING="other").changed, "the layout still has it"


def test_a_layer_that_is_not_what_the_configuration_says(
    root: Path, repo: Path, tmp_path: Path
) -> None:
    made = Layout(tmp_path / "image")
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}
    document = {
        "schemaVersion": 2,
        "config": made.blob({"rootfs": rootfs}, "config.v1+json"),
        "layers": [made.blob(layer(PLAIN), "layer.v1.tar+gzip")],
    }
    made.add(made.blob(document, "manifest.v1+json"))
    with pytest.raises(ContainerError, match="is not the one that the image's history names"):
        install(root, f"oci:{made.path}")
    assert branches(repo) == set()
    assert containers.installed(root) == ()


@pytest.mark.parametrize(
    "raw",
    [b"nonsense", b"\x1f\x8bnonsense", gzip.compress(b"nonsense" * 99), layer({"a": "b"})[:-30]],
    ids=["text", "half a header", "no tar", "cut short"],
)
def test_a_layer_that_cannot_be_read(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "blob").write_bytes(raw)
    with pytest.raises(ContainerError, match=r"^Layer blob is not a tar or tar\.gz: "):
        layers.rewrite(tmp_path / "blob", tmp_path / "out")


def test_a_file_outside_of_its_layer(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(layer({"a/../../evil": "x"}))
    with pytest.raises(ContainerError, match=r"a file outside of it: 'a/\.\./\.\./evil'"):
        layers.rewrite(tmp_path / "blob", tmp_path / "out")


def test_a_power_cut_during_an_import_leaves_no_half_image(memory: Path) -> None:
    image = build(memory / "image", PLAIN, {"data": "x" * 1000})
    template = memory / "template"
    make_repository(template / "ostree/repo")

    def host(number: int) -> Path:
        root = memory / f"host{number}"
        shutil.copytree(template, root, symlinks=True)
        return root

    def make(root: Path) -> None:
        containers.install(root, "web", image, {})

    count, status = in_child(partial(make, host(0)), 0, power_cut)
    assert status == 0
    assert count > 20
    for at in range(1, count + 1, 2):  # every second one, for the time it takes
        root = host(at)
        _, status = in_child(partial(make, root), at, power_cut)
        assert os.WTERMSIG(status) == signal.SIGKILL
        make(root)
        repo = root / "ostree/repo"
        assert len(branches(repo)) == 4
        ostree(repo, "fsck", "-q")
        assert (slot(root) / "rootfs/data").read_text() == "x" * 1000
        assert current(root).image_id == current(memory / "host0").image_id
        assert not list((slot(root).parent / ".storage").rglob("*.tar"))
        shutil.rmtree(root)


FULL = """
import subprocess, sys
from pathlib import Path
from firstboot import containers
root, small, large = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(root / "ostree").mkdir()
subprocess.run(["ostree", f"--repo={root}/ostree/repo", "init", "--mode=bare"], check=True)
containers.install(root, "web", small, {})
before = (containers.info(root, "web"), sorted(p.name for p in root.glob("var/lib/*/*/*")))
for name in ("web", "other"):
    try:
        containers.install(root, name, large, {})
    except containers.ContainerError as error:
        print(error)
assert before == (containers.info(root, "web"), sorted(p.name for p in root.glob("var/lib/*/*/*")))
fsck = ["ostree", f"--repo={root}/ostree/repo", "fsck", "-q"]
subprocess.run(fsck, check=True, stdout=subprocess.DEVNULL)
subprocess.run(["mount", "-o", "remount,size=32m", str(root)], check=True)
print(containers.install(root, "web", large, {}).container.deployment)
"""


def test_a_full_disk_during_an_import(root: Path, plain: str, tmp_path: Path) -> None:
    """The container in use stays, nothing is half there, and with room again it is installed."""
    need_root()
    big = tmp_path / "big"
    big.write_bytes(os.urandom(4_000_000))
    large = build(tmp_path / "large", PLAIN, {"big": big})
    enter = f'mount -t tmpfs -o size=2m tmpfs "{root}" && exec "$@"'
    argv = ["unshare", "-m", "sh", "-euc", enter, "sh", sys.executable, "-c", FULL]
    done = subprocess.run([*argv, str(root), plain, large], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert "No space left on device" in first
    assert "No space left on device" in second
    assert last == "/var/lib/containers/atomic/web.1"


def test_a_container_runs_from_its_checkout(root: Path, repo: Path, tmp_path: Path) -> None:
    if not BUSYBOX.exists():
        pytest.fail(f"{BUSYBOX} missing: run 'make setup'")
    document = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/busybox", "cat", "/greeting"],
        },
        "mounts": [{"type": "proc", "source": "proc", "destination": "/proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    }
    files = {"bin/busybox": BUSYBOX, "proc": Directory(), "greeting": "from ostree\n"}
    install(root, build(tmp_path / "image", PLAIN, {"exports/config.json": document}, files))
    name = f"firstboot-test-{os.getpid()}"
    done = subprocess.run(
        ["runc", "run", name], cwd=slot(root), capture_output=True, text=True, check=True
    )
    assert done.stdout == "from ostree\n"
