"""What installations leave on a host: deployments, host files, replacements, removals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from firstboot import containers
from firstboot.containers import ContainerError, Installed
from tests.adapters.oci_images import (
    HOSTFS,
    MANIFEST,
    PLAIN,
    Link,
    assert_nothing_installed,
    bind,
    build,
    config,
    current,
    install,
    need_tools,
    slot,
    snapshot,
    unit,
)


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


# ---------------------------------------------------------------- layout on disk


def test_where_everything_goes(root: Path, tmp_path: Path) -> None:
    image = build(tmp_path / "image", {**PLAIN, "exports/tmpfiles.template": "d /var/lib/web\n"})
    done = install(root, image)
    base = root / "var/lib/containers/atomic"
    assert (base / "web").readlink() == Path("/var/lib/containers/atomic/web.0")
    assert {p.name for p in base.iterdir()} == {"web", "web.0"}
    names = {"rootfs", "config.json", "info", "web.service", "tmpfiles-web.conf"}
    assert {p.name for p in slot(root).iterdir()} == names
    assert (slot(root) / "web.service").read_text() == unit(root)
    assert (done.changed, done.needs_reload, done.replaced) == (True, True, False)
    assert done.container.unit == "web.service"
    assert done.container.deployment == "/var/lib/containers/atomic/web.0"
    for secret in ("info", "config.json"):
        assert (slot(root) / secret).stat().st_mode & 0o777 == 0o600


def test_the_info_file_is_what_atomics_tools_read(root: Path, plain: str) -> None:
    done = install(root, plain)
    document = json.loads((slot(root) / "info").read_text())
    assert document.pop("created") > 1_500_000_000
    values = document.pop("values")
    assert (values["HOST_UID"], values["HOST_GID"]) == (os.getuid(), os.getgid())
    assert {name: str(value) for name, value in values.items()} == dict(done.container.values)
    assert document == {
        "image": plain,
        "revision": done.container.image_id,
        "ostree-commit": None,
        "has-container-service": True,
        "installed-files": [],
        "installed-files-checksum": {},
        "installed-files-template": [],
        "rename-installed-files": {},
        "rpm-installed": None,
        "system-package": "no",
        "remote": None,
        "use-links": True,
        "runtime": done.container.runtime,
    }


def test_an_info_file_of_older_tools_is_read(root: Path) -> None:
    slot(root).mkdir(parents=True)
    (slot(root) / "info").write_text("{}")
    slot(root).with_name("web").symlink_to("/var/lib/containers/atomic/web.0")
    found = current(root)
    assert (found.image, found.image_id, found.created, found.unit) == ("", "", 0, "web.service")


def test_the_list_holds_containers_only(root: Path, plain: str) -> None:
    assert containers.installed(root) == ()
    for name in ("b", "a", "a.0"):
        if name == "a.0":
            continue
        containers.install(root, name, plain, {})
    base = root / "var/lib/containers/atomic"
    (base / ".storage").mkdir()
    (base / "dangling").symlink_to("/var/lib/containers/atomic/dangling.0")
    (base / "foreign").symlink_to("/etc")
    assert [c.name for c in containers.installed(root)] == ["a", "b"]
    assert containers.info(root, "dangling") is None
    assert containers.info(root, "c") is None


def test_a_name_may_look_like_a_deployment(root: Path, plain: str) -> None:
    containers.install(root, "x.0", plain, {})
    assert current(root, "x.0").deployment.endswith("/x.0.0")
    with pytest.raises(ContainerError, match="symbolic link"):
        containers.install(root, "x", plain, {})
    containers.uninstall(root, "x")
    assert current(root, "x.0").name == "x.0", "removing x leaves it alone"


def test_a_directory_in_the_way(root: Path, plain: str) -> None:
    slot(root).with_name("web").mkdir(parents=True)
    with pytest.raises(ContainerError, match="in the way"):
        install(root, plain)


def test_what_came_with_the_host_is_listed_but_never_changed(root: Path, plain: str) -> None:
    install(root, plain)
    baked = root / "usr/lib/containers/atomic/web"
    baked.parent.mkdir(parents=True)
    slot(root).rename(baked)
    slot(root).with_name("web").unlink()
    shutil.rmtree(root / "etc")
    assert current(root).preinstalled
    assert [c.name for c in containers.installed(root)] == ["web"]
    assert not install(root, plain).changed
    with pytest.raises(ContainerError, match="Cannot update a preinstalled container"):
        install(root, plain, GREETING="other")
    with pytest.raises(ContainerError, match="part of the host's image"):
        containers.uninstall(root, "web")


def test_absolute_links_do_not_lead_out_of_the_root(root: Path, plain: str) -> None:
    (root / "real/systemd").mkdir(parents=True)
    (root / "etc").symlink_to("/real")
    install(root, plain)
    assert (root / "real/systemd/system/web.service").is_file()
    containers.uninstall(root, "web")
    assert not (root / "real/systemd/system/web.service").exists()


# ---------------------------------------------------------------- host files


@pytest.fixture
def hostfs(tmp_path: Path) -> str:
    return build(tmp_path / "hostfs", {**PLAIN, **HOSTFS})


def sums(root: Path, number: int = 0) -> dict[str, str]:
    document = json.loads((slot(root, number) / "info").read_text())
    assert document["installed-files"] == list(document["installed-files-checksum"])
    found: dict[str, str] = document["installed-files-checksum"]
    return found


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_host_files_are_copied_renamed_rendered_and_recorded(root: Path, hostfs: str) -> None:
    done = install(root, hostfs)
    assert done.messages == ()
    ctl = root / "usr/local/bin/webctl"
    assert ctl.read_text() == "#!/bin/sh\n"
    assert ctl.stat().st_mode & 0o777 == 0o755
    assert (root / "etc/web-conf/web.conf").read_text() == "greeting=hello\n"
    assert (root / "etc/web-conf/raw.conf").read_text() == "greeting=$GREETING\n"
    assert (root / "etc/nowhere").readlink() == Path("/does/not/exist")
    assert (root / "usr/local/bin/alias").readlink() == Path("ctl")
    assert sums(root) == {
        "/etc/web-conf/raw.conf": sha256("greeting=$GREETING\n"),
        "/etc/web-conf/web.conf": sha256("greeting=hello\n"),
        "/etc/nowhere": "0",
        "/usr/local/bin/alias": "0",
        "/usr/local/bin/webctl": sha256("#!/bin/sh\n"),
        "/var/lib/empty": "0",
    }
    assert (root / "var/lib/empty").is_dir()


def test_a_link_to_a_host_file_has_that_files_checksum(root: Path, tmp_path: Path) -> None:
    files = {
        "exports/hostfs/opt/tool": "x",
        "exports/hostfs/opt/link": Link("tool"),
    }
    install(root, build(tmp_path / "image", {**PLAIN, **files}))
    assert sums(root) == {"/opt/link": sha256("x"), "/opt/tool": sha256("x")}
    assert containers.uninstall(root, "web").messages == ()
    assert not list((root / "opt").iterdir())


def test_files_below_usr_share_the_deployments_inode_unless_told_otherwise(
    root: Path, tmp_path: Path
) -> None:
    files = {"exports/hostfs/usr/bin/ctl": "x", "exports/hostfs/etc/ctl": "x"}
    install(root, build(tmp_path / "links", {**PLAIN, **files}))
    tree = slot(root) / "rootfs/exports/hostfs"
    assert (root / "usr/bin/ctl").samefile(tree / "usr/bin/ctl")
    assert not (root / "etc/ctl").samefile(tree / "etc/ctl")
    manifest = {**MANIFEST, "useLinks": False}
    image = build(tmp_path / "copies", {**PLAIN, **files, "exports/manifest.json": manifest})
    containers.uninstall(root, "web")
    install(root, image)
    assert not (root / "usr/bin/ctl").samefile(tree / "usr/bin/ctl")


def test_a_host_file_is_never_overwritten(root: Path, hostfs: str) -> None:
    mine = root / "etc/web-conf/web.conf"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = install(root, hostfs)
    assert done.messages == ("File /etc/web-conf/web.conf already exists",)
    assert mine.read_text() == "mine"
    assert "/etc/web-conf/web.conf" not in sums(root)
    install(root, hostfs, GREETING="other")
    containers.uninstall(root, "web")
    assert mine.read_text() == "mine"


def test_a_replacement_replaces_its_host_files(root: Path, hostfs: str) -> None:
    install(root, hostfs)
    done = install(root, hostfs, GREETING="other")
    assert done.messages == ()
    assert (root / "etc/web-conf/web.conf").read_text() == "greeting=other\n"
    assert sums(root, 1)["/etc/web-conf/web.conf"] == sha256("greeting=other\n")


def test_a_replacement_removes_what_the_new_image_lacks(
    root: Path, hostfs: str, plain: str
) -> None:
    (root / "proc").mkdir()
    install(root, hostfs)
    (root / "etc/web-conf/raw.conf").write_text("mine")
    done = install(root, plain)
    expected = "Will not delete /etc/web-conf/raw.conf as it was manually modified."
    assert done.messages == (expected,)
    left = {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()}
    assert {p for p in left if not p.startswith("var/lib/containers")} == {
        "var/lib/firstboot-containers/web",
        "etc/web-conf/raw.conf",
        "etc/systemd/system/web.service",
    }


def test_a_host_file_a_person_changed_stays_through_a_replacement(root: Path, hostfs: str) -> None:
    install(root, hostfs)
    (root / "etc/web-conf/web.conf").write_text("mine")
    done = install(root, hostfs, GREETING="other")
    assert "File /etc/web-conf/web.conf already exists" in done.messages
    assert (root / "etc/web-conf/web.conf").read_text() == "mine"
    assert "/etc/web-conf/web.conf" not in sums(root, 1)


def test_a_name_that_leads_elsewhere_is_refused(root: Path, tmp_path: Path) -> None:
    manifest = {**MANIFEST, "renameFiles": {"/etc/a": "/etc/../../outside"}}
    files = {**PLAIN, "exports/hostfs/etc/a": "x", "exports/manifest.json": manifest}
    with pytest.raises(ContainerError, match="renameFiles"):
        install(root, build(tmp_path / "image", files))
    assert_nothing_installed(root)


def test_an_image_that_only_brings_files(root: Path, tmp_path: Path) -> None:
    manifest = {**MANIFEST, "noContainerService": True}
    files = {**PLAIN, "exports/manifest.json": manifest, "exports/hostfs/etc/a": "x"}
    image = build(tmp_path / "image", {**files, "exports/tmpfiles.template": "d /var/lib/x\n"})
    done = install(root, image)
    assert (done.container.unit, done.container.tmpfiles, done.needs_reload) == ("", "", False)
    assert not (slot(root) / "rootfs").exists()
    assert (root / "etc/a").read_text() == "x"
    assert not (root / "etc/systemd").exists()
    assert not install(root, image).changed
    containers.uninstall(root, "web")
    assert not (root / "etc/a").exists()


# ---------------------------------------------------------------- again, and otherwise


def test_the_same_again_writes_nothing(root: Path, hostfs: str) -> None:
    first = install(root, hostfs, GREETING="hi")
    before = snapshot(root, exact=True)
    again = install(root, hostfs, GREETING="hi")
    assert snapshot(root, exact=True) == before
    assert again == Installed(first.container)
    assert install(root, hostfs) == again, "a value not mentioned stays as it was"
    assert snapshot(root, exact=True) == before


def test_another_value_goes_into_the_other_deployment(root: Path, plain: str) -> None:
    install(root, plain)
    first = snapshot(slot(root))
    done = install(root, plain, GREETING="other")
    assert (done.changed, done.replaced, done.needs_reload) == (True, True, True)
    assert done.container.deployment.endswith("/web.1")
    assert current(root) == done.container
    assert config(root, 1)["process"]["args"] == ["run.sh", "other"]
    assert snapshot(slot(root)) == first, "the deployment before is there for a rollback"
    assert "WorkingDirectory=/var/lib/containers/atomic/web.1" in unit(root)


def test_another_image_keeps_the_values(root: Path, plain: str, tmp_path: Path) -> None:
    old = install(root, plain, GREETING="kept").container.values
    new = {"defaultValues": {"GREETING": "new", "ADDTL_MOUNTS": "", "EXTRA": "new"}}
    image = build(tmp_path / "new", {**PLAIN, "exports/manifest.json": new})
    done = install(root, image)
    assert done.replaced
    assert done.container.values["GREETING"] == "kept"
    assert done.container.values["EXTRA"] == "new"
    assert done.container.values["UUID"] == old["UUID"]
    assert done.container.values["IMAGE_ID"] != old["IMAGE_ID"]


def test_the_target_deployment_is_wiped_first(root: Path, plain: str, tmp_path: Path) -> None:
    install(root, build(tmp_path / "old", {**PLAIN, "stale": "two generations ago"}))
    install(root, plain)
    install(root, plain, GREETING="third")
    assert current(root).deployment.endswith("/web.0")
    assert not (slot(root) / "rootfs/stale").exists()


def test_a_strangers_unit_is_not_replaced(root: Path, plain: str) -> None:
    for path in ("etc/systemd/system/web.service", "etc/tmpfiles.d/web.conf"):
        stranger = root / path
        stranger.parent.mkdir(parents=True)
        stranger.write_text("mine")
        with pytest.raises(ContainerError, match=f"^The file {stranger} already exists.$"):
            install(root, plain)
        assert stranger.read_text() == "mine"
        assert containers.installed(root) == ()
        stranger.unlink()


def test_a_unit_a_person_edited_stays_until_the_container_changes(root: Path, plain: str) -> None:
    install(root, plain)
    (root / "etc/systemd/system/web.service").write_text("edited")
    assert not install(root, plain).changed
    assert unit(root) == "edited"
    install(root, plain, GREETING="other")
    assert unit(root) != "edited"


def test_a_damaged_deployment_is_replaced(root: Path, plain: str) -> None:
    install(root, plain)
    shutil.rmtree(slot(root) / "rootfs")
    assert install(root, plain).changed
    assert (slot(root, 1) / "rootfs").is_dir()
    (slot(root, 1) / "info").write_text("{")
    assert install(root, plain).changed
    assert current(root).name == "web"


def test_a_failed_replacement_changes_nothing(root: Path, hostfs: str, tmp_path: Path) -> None:
    install(root, hostfs)
    before = snapshot(root, exact=True)
    broken = build(tmp_path / "broken", {**PLAIN, "exports/service.template": "$MISSING"})
    with pytest.raises(ContainerError, match="MISSING"):
        install(root, broken)
    after = snapshot(root, exact=True)
    base = "var/lib/containers/atomic"  # its time stamp changed, and nothing else did
    assert {**after, base: ""} == {**before, base: ""}


def test_uninstall_leaves_what_is_not_ours(root: Path, hostfs: str) -> None:
    (root / "proc").mkdir()
    install(root, hostfs, ADDTL_MOUNTS=bind("/var/lib/state"))
    (root / "var/lib/state/data").write_text("precious")
    (root / "etc/web-conf/raw.conf").write_text("mine")
    done = containers.uninstall(root, "web")
    assert done.needs_reload
    assert done.messages == ("Will not delete /etc/web-conf/raw.conf as it was manually modified.",)
    files = {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()}
    assert files == {"var/lib/state/data", "etc/web-conf/raw.conf"}
    assert not (root / "var/lib/empty").exists()
    again = containers.uninstall(root, "web")
    assert (again.needs_reload, again.messages) == (False, ())


def test_uninstall_of_nothing_leaves_a_strangers_unit(root: Path) -> None:
    stranger = root / "etc/systemd/system/web.service"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    assert not containers.uninstall(root, "web").needs_reload
    assert stranger.read_text() == "mine"
