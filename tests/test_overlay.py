"""The image's layers and `make install`: files, modes, and what systemd makes of them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

import pytest

from firstboot import host

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / "ostree-overlay"
LAYERS = ("10program", "20units", "30preset", "40firewall", "50cloud-init")
# Every file but the package's modules and the units, by layer.
FILES = {
    "10program": {
        "usr/bin/firstboot": 0o755,
        "usr/share/licenses/firstboot/LICENSE": 0o644,
    },
    "20units": {
        "usr/lib/systemd/catalog/firstboot.catalog": 0o644,
        "usr/lib/tmpfiles.d/firstboot.conf": 0o644,
    },
    "30preset": {"usr/lib/systemd/system-preset/45-firstboot.preset": 0o644},
    "40firewall": {"usr/lib/firewalld/services/firstboot.xml": 0o644},
    "50cloud-init": {"etc/cloud/clean.d/50-firstboot": 0o755},
}
# Directories that rpm-ostree and bootc want empty in an image, and files that belong to one host.
HOSTS_OWN = (
    "var",
    "run",
    "usr/etc",
    "usr/local",
    "etc/machine-id",
    "etc/hostname",
    "etc/firstboot",
)


def make(*arguments: str) -> None:
    """Run make as a user with a strict umask does."""
    command = ["sh", "-c", 'umask 077; exec make --no-print-directory -s "$@"', "make", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make overlay` writes."""
    built = tmp_path_factory.mktemp("overlay")
    make("overlay", f"OVERLAY={built}")
    return built


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install` writes."""
    target = tmp_path_factory.mktemp("install")
    make("install", f"DESTDIR={target}")
    return target


def modes(tree: Path) -> dict[str, int]:
    """Path below `tree` to mode, of every file but byte code."""
    return {
        path.relative_to(tree).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in tree.rglob("*")
        if not path.is_dir() and path.suffix != ".pyc"
    }


def program() -> dict[str, int]:
    kept = (p for p in (ROOT / "firstboot").rglob("*") if p.is_file() and p.suffix != ".pyc")
    return {
        f"usr/share/firstboot/{p.relative_to(ROOT)}": 0o644 for p in kept if p.name != "build-image"
    }


def units() -> dict[str, int]:
    top = ROOT / "units"
    kept = (p.relative_to(top) for p in top.rglob("*") if p.is_file())
    return {f"usr/lib/systemd/system/{path}": 0o644 for path in kept}


def test_every_layer_has_these_files_with_these_modes(layers: Path) -> None:
    assert tuple(sorted(p.name for p in layers.iterdir())) == LAYERS
    generated = {"10program": program(), "20units": units()}
    for layer in LAYERS:
        assert modes(layers / layer) == FILES[layer] | generated.get(layer, {}), layer
    odd = {p for p in layers.rglob("*") if p.is_dir() and stat.S_IMODE(p.stat().st_mode) != 0o755}
    assert not odd


def test_install_is_all_layers_in_one_tree(layers: Path, installed: Path) -> None:
    united: dict[str, int] = {}
    for layer in LAYERS:
        found = modes(layers / layer)
        assert not united.keys() & found.keys()
        united |= found
    assert modes(installed) == united
    for name in united:
        (one,) = [layers / layer / name for layer in LAYERS if (layers / layer / name).exists()]
        assert one.read_bytes() == (installed / name).read_bytes()


def test_byte_code_is_there_and_survives_new_dates(installed: Path) -> None:
    sources = list((installed / "usr/share/firstboot").rglob("*.py"))
    for source in sources:
        (compiled,) = source.parent.glob(f"__pycache__/{source.stem}.cpython-*.pyc")
        assert int.from_bytes(compiled.read_bytes()[4:8], "little") == 0b11, "checked by hash"
        assert stat.S_IMODE(compiled.stat().st_mode) == 0o644
        assert str(installed).encode() not in compiled.read_bytes()
    assert len(sources) > 50


def test_another_prefix_is_used_throughout(tmp_path: Path) -> None:
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/firstboot")
    service = (tmp_path / "opt/firstboot/lib/systemd/system/firstboot.service").read_text()
    assert "ExecStart=/opt/firstboot/bin/firstboot run\n" in service
    launcher = (tmp_path / "opt/firstboot/bin/firstboot").read_text()
    assert '"/opt/firstboot/share/firstboot"' in launcher
    assert sorted(p.name for p in tmp_path.iterdir()) == ["etc", "opt"]


def test_the_launcher_runs_the_program_beside_it(installed: Path) -> None:
    text = (installed / "usr/bin/firstboot").read_text()
    text = text.replace("/usr/share", f"{installed}/usr/share")
    # The tests' own interpreter has the packages; -I as in the launcher's first line.
    command = [sys.executable, "-I", "-", "token"]
    done = subprocess.run(
        command, input=text, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("fb1-")


def test_nothing_is_there_that_belongs_to_a_host(layers: Path) -> None:
    for layer in LAYERS:
        for name in HOSTS_OWN:
            assert not os.path.lexists(layers / layer / name), f"{layer}: {name}"


# ---------------------------------------------------------------- what the system makes of it


def enabled(tree: Path) -> list[str]:
    """The units of `units/` that are enabled in `tree`, as systemctl says."""
    names = sorted(p.name for p in (ROOT / "units").iterdir() if p.is_file())
    command = ["systemctl", f"--root={tree}", "is-enabled", *names]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    assert len(said) == len(names)
    return [name for name, state in zip(names, said, strict=True) if state == "enabled"]


def test_the_preset_enables_the_service_only(installed: Path) -> None:
    presets = installed / "usr/lib/systemd/system-preset"
    (presets / "99-default-disable.preset").write_text("disable *\n")
    assert enabled(installed) == []
    command = ["systemctl", f"--root={installed}", "preset-all"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert enabled(installed) == ["firstboot.service"]
    links = [p.name for p in (installed / "etc/systemd/system").rglob("*") if p.is_symlink()]
    assert links == ["firstboot.service"]


def test_without_the_preset_layer_nothing_is_enabled(layers: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", f"{layers}/20units/.", str(tmp_path)], check=True, timeout=60)
    presets = tmp_path / "usr/lib/systemd/system-preset"
    presets.mkdir()
    (presets / "99-default-disable.preset").write_text("disable *\n")
    command = ["systemctl", f"--root={tmp_path}", "preset-all"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert enabled(tmp_path) == []


def test_the_last_status_is_put_back_after_a_power_cycle(layers: Path, tmp_path: Path) -> None:
    saved = tmp_path / "var/lib/firstboot/status.json"
    saved.parent.mkdir(parents=True)
    saved.write_text("{}")
    saved.chmod(0o600)
    (tmp_path / "run").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:\n")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    subprocess.run(["cp", "-r", f"{layers}/20units/usr", str(tmp_path)], check=True, timeout=60)
    command = ["systemd-tmpfiles", "--create", f"--root={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    made = {
        name: f"{stat.S_IMODE((tmp_path / name).stat().st_mode):04o}"
        for name in ("run/firstboot", "run/firstboot/status.json", "etc/firstboot")
    }
    assert made == {
        "run/firstboot": "0755",
        "run/firstboot/status.json": "0644",
        "etc/firstboot": "0700",
    }
    assert host.read_status(tmp_path) == {}


def test_the_firewall_service_opens_what_firstboot_listens_on(layers: Path) -> None:
    """Only what firewalld.service(5) knows, which refuses the rest."""
    file = layers / "40firewall/usr/lib/firewalld/services/firstboot.xml"
    top = ET.parse(file).getroot()
    assert top.tag == "service"
    assert [child.tag for child in top] == ["short", "description", "port", "include"]
    schema = json.loads((ROOT / "firstboot/schema.json").read_text())
    port = schema["properties"]["network"]["properties"]["port"]["default"]
    assert [child.attrib for child in top[2:]] == [
        {"protocol": "tcp", "port": str(port)},
        {"service": "mdns"},
    ]


def ostree(repository: Path, *arguments: str) -> str:
    command = ["ostree", f"--repo={repository}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def listed(lines: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """`ostree ls -R`: path to mode, owner and group."""
    rows = [line.split() for line in lines]
    return {row[-1]: (row[0], row[1], row[2]) for row in rows}


def test_ostree_commits_every_layer(layers: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    ostree(repository, "init", "--mode=archive")
    for layer in LAYERS:
        owner = ("--owner-uid=0", "--owner-gid=0", "--no-xattrs")
        tree = f"--tree=dir={layers / layer}"
        ostree(repository, "commit", f"--branch=overlay/{layer}", *owner, tree)
        found = listed(ostree(repository, "ls", "-R", f"overlay/{layer}").splitlines())
        assert {o for _, *owners in found.values() for o in owners} == {"0"}
        for name, mode in modes(layers / layer).items():
            assert found[f"/{name}"][0] == f"-00{mode:o}"


def test_the_readme_has_a_paragraph_for_every_layer() -> None:
    text = (OVERLAY / "README.md").read_text()
    for layer in LAYERS:
        assert f"\n**{layer}** " in text, layer
