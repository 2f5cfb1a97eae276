"""SELinux labels, with a policy that a stand-in for matchpathcon knows: no kernel here has one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from firstboot.containers import ContainerError, labels
from tests.adapters.oci_images import PLAIN, Link, build, install, need_root, need_tools, slot
from tests.adapters.test_containers_ostree import make_repository, ostree

POLICY = """#!/bin/sh
[ "$1" = -m ] || exit 1
for path in "$@"; do
    case $path in
    /usr/bin/ctl) printf '%s\\tsystem_u:object_r:bin_t:s0\\n' "$path" ;;
    /etc*) printf '%s\\tsystem_u:object_r:etc_%s_t:s0\\n' "$path" "$2" ;;
    /tmp*) printf '%s\\t<<none>>\\n' "$path" ;;
    esac
done
"""
FILES = {
    "etc/a": "a",
    "etc/link": Link("a"),
    "tmp/x": "x",
    "exports/hostfs/usr/bin/ctl": "ctl",
}


@pytest.fixture(autouse=True)
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    need_tools()
    program = tmp_path / "bin/matchpathcon"
    program.parent.mkdir()
    program.write_text(POLICY)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(labels, "ENABLED", program)


@pytest.fixture
def repo(root: Path) -> Path:
    return make_repository(root / "ostree/repo")


def label(path: Path) -> str:
    if labels.ATTRIBUTE not in os.listxattr(path, follow_symlinks=False):
        return ""
    raw = os.getxattr(path, labels.ATTRIBUTE, follow_symlinks=False)
    assert raw.endswith(b"\0"), "as the kernel has them"
    return raw[:-1].decode()


def test_layers_are_labelled_as_the_policy_says(root: Path, repo: Path, tmp_path: Path) -> None:
    install(root, build(tmp_path / "image", PLAIN, FILES))
    rootfs = slot(root) / "rootfs"
    assert label(rootfs / "etc/a") == "system_u:object_r:etc_file_t:s0"
    assert label(rootfs / "etc/link") == "system_u:object_r:etc_lnk_file_t:s0"
    assert label(rootfs / "tmp/x") == ""
    ctl = rootfs / "exports/hostfs/usr/bin/ctl"
    assert label(ctl) == "system_u:object_r:bin_t:s0", "that of the place on the host"
    assert (root / "usr/bin/ctl").samefile(ctl), "so the file can be shared with it"
    ostree(repo, "fsck", "-q")


def test_a_file_whose_label_is_another_is_copied(
    root: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "ENABLED", tmp_path / "absent")
    image = build(tmp_path / "image", PLAIN, FILES)
    install(root, image)
    assert label(slot(root) / "rootfs/etc/a") == "", "no SELinux, no labels"
    ctl = root / "usr/bin/ctl"
    assert ctl.samefile(slot(root) / "rootfs/exports/hostfs/usr/bin/ctl")
    os.setxattr(ctl, labels.ATTRIBUTE, b"system_u:object_r:other_t:s0\0")
    assert not labels.fits(ctl, "/usr/bin/ctl")
    monkeypatch.setattr(labels, "ENABLED", tmp_path)
    assert not labels.fits(ctl, "/usr/bin/ctl")
    os.setxattr(ctl, labels.ATTRIBUTE, b"system_u:object_r:bin_t:s0\0")
    assert labels.fits(ctl, "/usr/bin/ctl")
    assert not labels.fits(ctl, "/usr/bin/elsewhere")


def test_a_host_without_the_program_says_so(
    root: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = build(tmp_path / "image", PLAIN, FILES)
    (tmp_path / "bin/matchpathcon").write_text("#!/bin/sh\necho no policy >&2; exit 1\n")
    monkeypatch.setattr(labels, "ENABLED", tmp_path)
    with pytest.raises(ContainerError, match="matchpathcon failed: no policy"):
        install(root, image)


def test_many_files_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "AT_ONCE", 3)
    paths = [f"etc/{number}" for number in range(10)]
    found = labels.of_policy([(path, stat.S_IFREG) for path in paths])
    assert found == dict.fromkeys(paths, "system_u:object_r:etc_file_t:s0")
