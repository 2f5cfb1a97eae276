"""`--system-package`: packages made by rpmbuild, read and installed by rpm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from firstboot import cli, containers
from firstboot.containers import ContainerError, tools
from tests.adapters.oci_images import (
    HOSTFS,
    PLAIN,
    assert_nothing_installed,
    build,
    current,
    need_root,
    need_tools,
    slot,
)

Say = Callable[..., str]
BROUGHT = {
    "/etc/nowhere",
    "/etc/web-conf/raw.conf",
    "/etc/web-conf/web.conf",
    "/usr/local/bin/alias",
    "/usr/local/bin/webctl",
    "/var/lib/empty",
}


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_root()  # rpm --root is a chroot(2)
    need_tools()
    missing = [tool for tool in ("rpm", "rpmbuild") if shutil.which(tool) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} missing: run 'make setup'")


@pytest.fixture
def say(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Say:
    monkeypatch.chdir(tmp_path)

    def run(verb: str, *words: str, code: int = 0) -> str:
        assert cli.main(["containers", verb, f"--root={root}", *words]) == code
        told = capsys.readouterr()
        return told.out + told.err

    return run


@pytest.fixture
def image(tmp_path: Path) -> str:
    return build(tmp_path / "image", {**PLAIN, **HOSTFS})


def rpm(*arguments: str, root: Path | None = None) -> str:
    where = [f"--root={root}"] if root else []
    argv = ["rpm", *where, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def database(root: Path) -> None:
    (root / "var/lib/rpm").mkdir(parents=True)


def known(root: Path) -> list[str]:
    return rpm("-qa", "--queryformat=%{NAME}-%{VERSION}\\n", root=root).split()


# ---------------------------------------------------------------- a whole container


def test_a_whole_container_as_a_package(say: Say, root: Path, tmp_path: Path) -> None:
    """For an image of a host: where it is installed, the container came with the host."""
    labels = {
        "atomic.summary": f"A server %(touch {tmp_path}/ran)\nRequires: nonsense",
        "Atomic.Version": "1.2-3",
        "atomic.license": "Apache-2.0",
        "atomic.url": "https://example.com/",
        "atomic.description": "It serves.",
    }
    reference = build(
        tmp_path / "image", PLAIN, HOSTFS, {"bin/50% off": "x", "a/b*": "x"}, labels=labels
    )
    (root / "proc").mkdir()
    said = say("install", "--name=web", "--system-package=build", "--set=GREETING=hi", reference)
    (made,) = tmp_path.glob("*.rpm")
    assert said == f"Created file {made}\n"
    assert made.name.startswith("atomic-container-web-1.2_3-")
    assert containers.installed(root) == ()
    assert list((root / "var/lib/containers/atomic/.storage").iterdir()) == []
    asked = rpm("-qp", "--queryformat=%{SUMMARY}|%{LICENSE}|%{URL}|%{DESCRIPTION}", str(made))
    summary = f"A server %(touch {tmp_path}/ran) Requires: nonsense"
    assert asked == f"{summary}|Apache-2.0|https://example.com/|It serves."
    assert not (tmp_path / "ran").exists()
    assert "nonsense" not in rpm("-qp", "--requires", str(made))
    host = tmp_path / "host"
    database(host)
    rpm("-i", str(made), root=host)
    found = current(host)
    assert found.preinstalled
    assert found.deployment == "/usr/lib/containers/atomic/web"
    assert found.values["GREETING"] == "hi"
    base = host / "usr/lib/containers/atomic/web"
    assert {p.name for p in base.iterdir()} == {"rootfs", "config.json", "info", "web.service"}
    assert (base / "rootfs/bin/50% off").read_text() == (base / "rootfs/a/b*").read_text() == "x"
    assert (base / "info").stat().st_mode & 0o777 == 0o600
    unit = (host / "usr/lib/systemd/system/web.service").read_text()
    assert "WorkingDirectory=/usr/lib/containers/atomic/web\n" in unit
    assert (host / "etc/web-conf/web.conf").read_text() == "greeting=hi\n"
    assert os.access(host / "usr/local/bin/webctl", os.X_OK)
    with pytest.raises(ContainerError, match="Cannot update a preinstalled container"):
        containers.update(host, "web", {"GREETING": "x"})
    rpm("-e", "atomic-container-web", root=host)
    assert containers.installed(host) == ()
    assert not (host / "usr/local/bin/webctl").exists()


def test_the_images_own_specification(say: Say, tmp_path: Path) -> None:
    text = (
        "Name: own-$NAME\nVersion: 7\nRelease: 1\nSummary: x\nLicense: x\nAutoReqProv: no\n"
        "%description\nx\n%install\nmkdir -p %{buildroot}/opt\n"
        "cp %{_sourcedir}/usr/lib/containers/atomic/$NAME/info %{buildroot}/opt/\n"
        "%files\n/opt/info\n"
    )
    spec = {"exports/rpm.spec.template": text}
    say("install", "--name=web", "--system-package=build", build(tmp_path / "i", PLAIN, spec))
    (made,) = tmp_path.glob("own-web-7-1.*.rpm")
    assert rpm("-qlp", str(made)) == "/opt/info\n"
    ready = {"exports/container.rpm": made, "exports/rpm.spec": "nonsense"}
    say("install", "--name=web", "--system-package=build", build(tmp_path / "j", PLAIN, ready))
    assert (tmp_path / "atomic-container-web.rpm").read_bytes() == made.read_bytes()
    broken = build(tmp_path / "k", PLAIN, {"exports/rpm.spec": "nonsense\n"})
    assert "rpmbuild failed" in say(
        "install", "--name=web", "--system-package=build", broken, code=1
    )


# ---------------------------------------------------------------- the host's database


def test_the_database_knows_the_files_and_they_are_handled_as_ever(
    say: Say, root: Path, image: str, tmp_path: Path
) -> None:
    database(root)
    theirs = root / "usr/local/bin/webctl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    say("install", "--name=web", "--system-package=yes", image)
    assert known(root) == ["atomic-container-web-0"]
    files = rpm("-ql", "atomic-container-web", root=root).split()
    assert set(files) == BROUGHT - {"/usr/local/bin/webctl"}
    assert theirs.read_text() == "theirs", "a file that is there is not overwritten"
    assert rpm("-qf", "--queryformat=%{NAME}", "/etc/web-conf/web.conf", root=root) == (
        "atomic-container-web"
    )
    info = json.loads((slot(root) / "info").read_text())
    assert info["system-package"] == "yes"
    assert info["rpm-installed"].startswith("atomic-container-web-0-")
    assert (slot(root) / f"{info['rpm-installed']}.rpm").exists()
    bare = build(tmp_path / "bare", PLAIN, {"exports/hostfs/etc/other.conf": "x"})
    say("update", f"--rebase={bare}", "web")
    assert known(root) == ["atomic-container-web-1"]
    assert rpm("-ql", "atomic-container-web", root=root) == "/etc/other.conf\n"
    assert not (root / "etc/web-conf/web.conf").exists()
    say("rollback", "web")
    assert known(root) == ["atomic-container-web-0"]
    (root / "etc/web-conf/raw.conf").write_text("mine")
    said = say("uninstall", "web")
    assert "Will not delete /etc/web-conf/raw.conf as it was manually modified." in said
    assert known(root) == []
    assert not (root / "etc/web-conf/web.conf").exists()
    assert_nothing_left(root)


def test_a_package_that_atomic_installed_goes_with_its_files(
    say: Say, root: Path, image: str
) -> None:
    """Atomic has rpm put the files there, records none, and keeps no package."""
    database(root)
    say("install", "--name=web", "--system-package=yes", image)
    info = json.loads((slot(root) / "info").read_text())
    (slot(root) / f"{info['rpm-installed']}.rpm").unlink()
    info |= {"installed-files": [], "installed-files-checksum": {}}
    (slot(root) / "info").write_text(json.dumps(info))
    assert (root / "usr/local/bin/webctl").exists()
    say("uninstall", "web")
    assert known(root) == []
    assert not (root / "usr/local/bin/webctl").exists()


def assert_nothing_left(root: Path) -> None:
    assert [p for p in (root / "var/lib/containers/atomic").iterdir() if p.name[0] != "."] == []


@pytest.mark.parametrize(
    ("packages", "ostree", "brings", "comes_to"),
    [
        (True, False, True, "yes"),
        (False, False, True, "no"),
        (True, True, True, "no"),
        (True, False, False, "no"),
    ],
)
def test_what_auto_comes_to(
    say: Say, root: Path, tmp_path: Path, packages: bool, ostree: bool, brings: bool, comes_to: str
) -> None:
    if packages:
        database(root)
    if ostree:
        (root / "run").mkdir()
        (root / "run/ostree-booted").touch()
    image = build(tmp_path / "image", {**PLAIN, **(HOSTFS if brings else {})})
    say("install", "--name=web", image)
    assert json.loads((slot(root) / "info").read_text())["system-package"] == comes_to
    assert (known(root) == ["atomic-container-web-0"]) is (comes_to == "yes")


def test_an_ostree_host_takes_no_packages(say: Say, root: Path, image: str) -> None:
    (root / "run").mkdir()
    (root / "run/ostree-booted").touch()
    said = say("install", "--name=web", "--system-package=yes", image, code=1)
    assert "This doesn't work on Atomic Host yet" in said
    assert_nothing_installed(root)


@pytest.mark.parametrize("label", ["requires", "files"])
def test_a_package_that_cannot_be_leaves_nothing(
    say: Say, root: Path, tmp_path: Path, label: str
) -> None:
    database(root)
    odd = {"exports/hostfs/etc/a*b": "x"} if label == "files" else {}
    labels = {"atomic.requires": "nobody-has-this"} if label == "requires" else {}
    image = build(tmp_path / "image", {**PLAIN, **HOSTFS, **odd}, labels=labels)
    said = say("install", "--name=web", "--system-package=yes", image, code=1)
    reason = "nobody-has-this is needed by" if label == "requires" else "cannot be packaged"
    assert reason in said
    assert known(root) == []
    assert containers.installed(root) == ()
    assert not (root / "usr/local/bin/webctl").exists()


def test_a_missing_rpmbuild_is_named(
    say: Say, root: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = tools.find
    monkeypatch.setattr(tools, "find", lambda t: None if t == "rpmbuild" else find(t))
    said = say("install", "--name=web", "--system-package=build", image, code=1)
    assert "rpmbuild is not installed: install the package that provides it" in said
    assert containers.installed(root) == ()
