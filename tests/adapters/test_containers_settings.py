"""/etc/atomic.conf and Atomic's environment: what is read, and which is stronger."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from firstboot import containers
from firstboot.containers import ContainerError, runtime, settings
from tests.adapters.oci_images import config, install, need_tools, unit

CONF = """\
# Atomic CLI configuration file
default_scanner:
default_storage: ostree
runtime: /opt/bin/crun   # for all
checkout_path: "/srv/containers"
ostree_repository: '/srv/repo'
registry_confdir: /etc/containers/registries.d
http_proxy: http://proxy:3128
no_proxy: localhost,10.0.0.0/8
scanners:
  runtime: nested
"""


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


def write(root: Path, text: str) -> None:
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/atomic.conf").write_text(text)


def test_what_is_read_of_the_file(root: Path) -> None:
    write(root, CONF)
    assert settings.read(root) == settings.Settings(
        checkouts="/srv/containers",
        repository="/srv/repo",
        runtime="/opt/bin/crun",
        registries="/etc/containers/registries.d",
        proxies={"http_proxy": "http://proxy:3128", "no_proxy": "localhost,10.0.0.0/8"},
    )


def test_without_a_file_all_have_defaults(root: Path) -> None:
    assert settings.read(root) == settings.Settings()
    assert settings.Settings().checkouts == "/var/lib/containers/atomic"


def test_the_environment_is_stronger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, CONF)
    monkeypatch.setenv("ATOMIC_OSTREE_CHECKOUT_PATH", "/mine/")
    monkeypatch.setenv("ATOMIC_OSTREE_REPO", "/my/repo")
    found = settings.read(root)
    assert (found.checkouts, found.repository) == ("/mine", "/my/repo")


@pytest.mark.parametrize("key", ["checkout_path", "ostree_repository"])
def test_a_relative_path(root: Path, plain: str, key: str) -> None:
    write(root, f"{key}: some/where\n")
    with pytest.raises(ContainerError, match=f"{key} in /etc/atomic.conf must be an absolute path"):
        install(root, plain)


def test_a_file_without_end(root: Path, plain: str) -> None:
    write(root, "#" * (settings.FILE_LIMIT + 1))
    with pytest.raises(ContainerError, match="is larger than"):
        install(root, plain)


def test_containers_lie_where_the_operator_wants_them(root: Path, plain: str) -> None:
    write(root, "checkout_path: /srv/containers\n")
    done = install(root, plain)
    assert done.container.deployment == "/srv/containers/web.0"
    assert "WorkingDirectory=/srv/containers/web.0" in unit(root)
    link = root / "srv/containers/web"
    assert link.readlink() == Path("/srv/containers/web.0")
    assert done.container.values["DESTDIR"] == "/srv/containers/web.0"
    assert not (root / "var/lib/containers").exists()
    containers.uninstall(root, "web")
    assert list((root / "srv/containers").iterdir()) == []


def test_which_runtime_is_stronger(
    root: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--runtime, atomic.conf, the one before, $RUNC_PATH, runc."""
    real = shutil.which("runc", path="/usr/sbin:/usr/bin")
    assert real is not None
    for name in ("given", "configured", "variable"):
        (tmp_path / name).symlink_to(real)
    monkeypatch.setenv("RUNC_PATH", str(tmp_path / "variable"))
    assert install(root, plain).container.runtime == str(tmp_path / "variable")
    monkeypatch.delenv("RUNC_PATH")
    assert runtime.choose() == real
    kept = install(root, plain, GREETING="1").container
    assert kept.runtime == str(tmp_path / "variable")
    write(root, f"runtime: {tmp_path / 'configured'}\n")
    assert install(root, plain, GREETING="2").container.runtime == str(tmp_path / "configured")
    given = containers.install(root, "web", plain, {}, str(tmp_path / "given")).container
    assert given.runtime == given.values["RUNTIME"] == str(tmp_path / "given")
    assert f"ExecStart={tmp_path / 'given'} " in unit(root)


def test_proxies_and_signature_rules_reach_skopeo(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "https_proxy: http://proxy:3128\nregistry_confdir: /etc/r.d\n")
    told = tmp_path / "told"
    skopeo = tmp_path / "bin/skopeo"
    skopeo.parent.mkdir()
    skopeo.write_text(f'#!/bin/sh\necho "$https_proxy" "$@" >{told}; exit 1\n')
    skopeo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{skopeo.parent}:{os.environ['PATH']}")
    with pytest.raises(ContainerError, match="skopeo failed"):
        install(root, "registry.example.com/web")
    words = told.read_text().split()
    assert words[:3] == ["http://proxy:3128", "--registries.d=/etc/r.d", "copy"]
    assert "docker://registry.example.com/web" in words


def test_a_runtime_without_a_proposal_makes_an_empty_config(root: Path, tmp_path: Path) -> None:
    """A7: whatever fails while the default is made, the file is ``{}``."""
    from tests.adapters.oci_images import Program, build

    mute = tmp_path / "mute"
    mute.write_text('#!/bin/sh\n[ "$1" != spec ]\n')
    mute.chmod(0o755)
    image = build(tmp_path / "image", {"usr/bin/run.sh": Program("#!/bin/sh\n")})
    containers.install(root, "web", image, {}, str(mute))
    assert config(root) == {}
    shown = json.loads((root / "var/lib/containers/atomic/web.0/info").read_text())
    assert shown["has-container-service"] is True
