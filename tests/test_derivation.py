"""The Containerfile, built by buildah on a small base, and the treefile.

The base stands in for Fedora's: a shell, the real systemctl, and doubles of what is only there. The
double of dnf takes the packages this project names and nothing else, and leaves what dnf leaves in
/var; that of bootc refuses what `bootc container lint` refuses and a tree can show.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.adapters.oci_images import need_root

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / "ostree-overlay"
LAYERS = sorted(p.name for p in OVERLAY.iterdir() if p.is_dir())
IMAGES_OWN = {"cloud-init"}  # wanted in an image, not by the package
DNF = """#!/bin/sh
case "$1 $2 $3" in
"-y install --setopt=install_weak_deps=False") shift 3 ;;
"clean all ") rm -rf /var/cache/libdnf5; exit 0 ;;
*) echo "dnf: not known here: $*" >&2; exit 2 ;;
esac
for package; do
    case " KNOWN " in
    *" $package "*) ;;
    *) echo "No match for argument: $package" >&2; exit 3 ;;
    esac
done
mkdir -p /var/cache/libdnf5 /var/lib/dnf /var/log
touch /var/cache/libdnf5/packages.solv /var/lib/dnf/repos /var/log/dnf5.log
"""
BOOTC = """#!/bin/sh
[ "$*" = "container lint" ] || { echo "bootc: not known here: $*" >&2; exit 2; }
bad() { echo "Lint error: $2" >&2; exit "$1"; }
[ "$(ls -d /usr/lib/modules/*/vmlinuz | wc -l)" = 1 ] || bad 11 "kernel: not exactly one"
[ ! -e /usr/etc ] || bad 12 "etc-usretc: /usr/etc in a container"
[ "$(readlink /var/run)" = ../run ] || bad 13 "var-run: not a link to ../run"
left=$(find /var ! -type d ! -path /var/run)
[ -z "$left" ] || bad 14 "var: $left"
[ -z "$(ls -A /boot)" ] || bad 15 "nonempty-boot"
for d in dev proc run sys tmp usr var; do [ -d /$d ] || bad 16 "api-base-directories: /$d"; done
"""
TOOLS = ("sh", "ls", "wc", "readlink", "find", "rm", "mkdir", "touch", "[")


@dataclass(frozen=True, slots=True)
class Buildah:
    """buildah with a storage of its own."""

    storage: Path

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """One command; it may fail."""
        where = (f"--root={self.storage}/root", f"--runroot={self.storage}/run")
        command = ["buildah", *where, "--storage-driver=vfs", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)

    def build(self, file: Path, context: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Build what a Containerfile says, without an engine: its commands run in a chroot."""
        return self.run("build", "--isolation=chroot", *options, f"--file={file}", context)


def make_base(tree: Path) -> None:
    """A root file system with a shell, systemctl, a kernel's name, and the doubles."""
    for name in ("dev", "proc", "run", "sys", "tmp", "var", "boot", "etc", "usr/bin"):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(exist_ok=True)
        (tree / name).symlink_to(f"usr/{name}")
    (tree / "var/run").symlink_to("../run")
    kernel = tree / "usr/lib/modules/6.1.0/vmlinuz"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("a kernel\n")
    shutil.copy(
        "/usr/bin/busybox" if Path("/usr/bin/busybox").exists() else "/bin/busybox",
        tree / "usr/bin",
    )
    for tool in TOOLS:
        (tree / "usr/bin" / tool).symlink_to("busybox")
    linked = subprocess.run(
        ["ldd", "/usr/bin/systemctl"], capture_output=True, text=True, check=True
    )
    for path in ["/usr/bin/systemctl", *re.findall(r"(/\S+) \(0x", linked.stdout)]:
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    known = " ".join(sorted(IMAGES_OWN | packages_of_the_spec()))
    for name, text in {"dnf": DNF.replace("KNOWN", known), "bootc": BOOTC}.items():
        (tree / "usr/bin" / name).write_text(text)
        (tree / "usr/bin" / name).chmod(0o755)


def packages_of_the_spec() -> set[str]:
    """What the RPM requires and recommends, as far as it is not there in any case."""
    spec = (OVERLAY / "firstboot.spec").read_text()
    named = re.findall(r"^(?:Requires|Recommends): +\(?([a-z0-9-]+)", spec, re.MULTILINE)
    return set(named) - {"python3", "systemd"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Buildah, str]]:
    """buildah, and the base as an OCI layout."""
    need_root()
    assert shutil.which("buildah"), "run `make setup`"
    directory = tmp_path_factory.mktemp("buildah")
    buildah = Buildah(directory / "storage")
    tree, layout = directory / "context/tree", f"oci:{directory}/base:latest"
    make_base(tree)
    file = directory / "context/Containerfile"
    file.write_text("FROM scratch\nCOPY tree/ /\n")
    done = buildah.build(file, file.parent, "--tag=base")
    assert done.returncode == 0, done.stderr
    assert buildah.run("push", "base", layout).returncode == 0
    yield buildah, layout
    buildah.run("rm", "--all")
    buildah.run("rmi", "--all", "--force")


def test_the_containerfile_makes_an_image_that_bootc_would_take(
    base: tuple[Buildah, str], tmp_path: Path
) -> None:
    buildah, layout = base
    built = tmp_path / "context/build/overlay"
    make = ["make", "-s", "overlay", f"OVERLAY={built}"]
    subprocess.run(make, cwd=ROOT, check=True, timeout=120)
    more = built / "60etcd/usr/lib/firstboot/images/etcd/oci-layout"  # a layer somebody adds
    more.parent.mkdir(parents=True)
    more.write_text("{}")
    file = OVERLAY / "Containerfile"
    done = buildah.build(file, tmp_path / "context", f"--build-arg=BASE={layout}", "--tag=derived")
    assert done.returncode == 0, done.stdout + done.stderr
    assert buildah.run("push", "derived", f"oci:{tmp_path}/derived:latest").returncode == 0
    subprocess.run(
        ["umoci", "unpack", f"--image={tmp_path}/derived:latest", str(tmp_path / "bundle")],
        check=True,
        capture_output=True,
        timeout=120,
    )
    tree = tmp_path / "bundle/rootfs"
    for layer in (*LAYERS, "60etcd"):
        for path in (built / layer).rglob("*"):
            there = tree / path.relative_to(built / layer)
            assert there.lstat().st_mode == path.lstat().st_mode, there
            assert path.is_dir() or there.read_bytes() == path.read_bytes()
            assert there.lstat().st_uid == there.lstat().st_gid == 0
    link = tree / "etc/systemd/system/multi-user.target.wants/firstboot.service"
    assert link.readlink().as_posix().endswith("/systemd/system/firstboot.service")
    assert not [p for p in (tree / "var").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("RUN touch /var/left", 14),
        ("RUN mkdir /usr/etc", 12),
        ("RUN rm /usr/lib/modules/6.1.0/vmlinuz", 11),
        ("RUN dnf -y install --setopt=install_weak_deps=False cloud-int", 3),
    ],
)
def test_the_doubles_refuse(
    base: tuple[Buildah, str], tmp_path: Path, line: str, status: int
) -> None:
    buildah, layout = base
    file = tmp_path / "Containerfile"
    file.write_text(f"FROM {layout}\n{line}\nRUN bootc container lint\n")
    done = buildah.build(file, tmp_path)
    # buildah says the status; what a command last said, it may lose.
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(f": exit status {status}"), done.stderr


def test_the_treefile_names_the_layers_and_the_same_packages() -> None:
    tree = yaml.safe_load((OVERLAY / "firstboot.yaml").read_text())
    # All are keys of a treefile (rpm-ostree, docs/treefile.md).
    assert list(tree) == ["packages", "ostree-layers", "postprocess"]
    (script,) = tree["postprocess"]
    assert script.splitlines()[1] in (OVERLAY / "Containerfile").read_text()
    assert tree["ostree-layers"] == [f"overlay/{layer}" for layer in LAYERS]
    assert set(tree["packages"]) == IMAGES_OWN | packages_of_the_spec()
    installed = (OVERLAY / "Containerfile").read_text().partition("install_weak_deps=False")[2]
    words = installed.partition("&&")[0].replace("\\", " ").split()
    assert sorted(words) == sorted(tree["packages"])
