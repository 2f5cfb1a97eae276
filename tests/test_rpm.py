"""The RPM, built from its spec by rpmbuild, installed into an empty root, and read by rpmlint.

Fedora's packages are not to be had here, so its dependencies are compared by name only, and the
macros of Fedora's systemd are stood in for where a test says so.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.adapters.oci_images import need_root

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "ostree-overlay/firstboot.spec"
SOURCES = ("Makefile", "LICENSE", "README.md", "CHANGELOG.md", "firstboot", "units")
PRESET = "usr/lib/systemd/system-preset/45-firstboot.preset"
# What Fedora calls the packages of pyproject.toml; the second row is wanted, not required.
FEDORA = {
    "PyYAML": "python3-pyyaml",
    "cryptography": "python3-cryptography",
    "dbus-python": "python3-dbus",
    "fastjsonschema": "python3-fastjsonschema",
    "systemd-python": "python3-systemd",
    "zeroconf": "python3-zeroconf",
}
FEDORA_EXTRAS = {"botocore": "python3-botocore", "dnspython": "python3-dns"}
# What rpmlint may say, and why it is let pass.
LET_PASS = {
    "only-non-binary-in-usr-lib": "systemd, tmpfiles and firewalld read from there",
    "hardcoded-library-path": "the same: /usr/lib on every architecture",
    "no-manual-page-for-binary": "`firstboot --help`, README.md",
    "no-signature": "who builds it signs it",
    "no-packager-tag": "set by who builds it",
    "no-group-tag": "Fedora has no groups any more",
    "no-buildroot-tag": "obsolete since rpm 4.6",
    "invalid-url": "the tarball is made from the repository",
    "invalid-license": "Debian's rpmlint knows no SPDX names",
    "empty-%post": "the scripts are macros that Debian's rpm has not; see the test of scripts",
    "empty-%preun": "likewise",
    "empty-%postun": "likewise",
    "non-executable-script": "a text that payloads install on hosts, with its mode there",
    "non-conffile-in-etc": "a program that cloud-init runs; nobody edits it",
}


def rpmbuild(top: Path, *options: str) -> str:
    (top / "SOURCES").mkdir(parents=True, exist_ok=True)
    name = f"firstboot-{version()}"
    with tarfile.open(top / f"SOURCES/{name}.tar.gz", "w:gz", compresslevel=1) as tar:
        for source in (*SOURCES, "ostree-overlay"):
            tar.add(ROOT / source, f"{name}/{source}", filter=_clean)
    # --nodeps: what it needs to be built is here, but not from RPMs.
    command = ["rpmbuild", "-bb", "--nodeps", f"--define=_topdir {top}", *options, str(SPEC)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(str(path) for path in (top / "RPMS").rglob("*.rpm"))


def _clean(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def query(package: str, *options: str) -> list[str]:
    command = ["rpm", "--query", "--package", *options, package]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def version() -> str:
    return str(project()["version"])


def files(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Path to mode and content of every file."""
    return {
        path.relative_to(tree).as_posix(): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in tree.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rpmbuild(tmp_path_factory.mktemp("rpm"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty root directory with an RPM database."""
    need_root()
    subprocess.run(["rpm", f"--root={tmp_path}", "--initdb"], check=True, timeout=60)
    return tmp_path


def rpm(root: Path, *arguments: str) -> str:
    command = ["rpm", f"--root={root}", "--nodeps", "--noscripts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_installs_what_make_install_does(
    package: str, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    database = set(files(root))
    rpm(root, "--install", package)
    installed = {path: held for path, held in files(root).items() if path not in database}
    ours = tmp_path_factory.mktemp("make")
    # The same interpreter, or the byte code would have another name.
    make = ["make", "-s", "install", f"DESTDIR={ours}", "PYTHON=/usr/bin/python3"]
    subprocess.run(make, cwd=ROOT, check=True, timeout=120)
    expected = files(ours)
    del expected[PRESET]
    documents = {path for path in installed if path.startswith("usr/share/doc/")}
    databases = {
        path for path in installed if path.startswith(("var/lib/rpm/", "usr/lib/sysimage"))
    }
    assert {Path(path).name for path in documents} == {"README.md", "CHANGELOG.md"}
    for path in documents | databases:
        del installed[path]
    assert installed.keys() == expected.keys()
    assert installed == expected
    assert rpm(root, "--verify", "firstboot") == ""
    owners = set(query(package, "--queryformat=[%{FILEUSERNAME}:%{FILEGROUPNAME}\n]"))
    assert owners == {"root:root"}


def test_the_package_goes_without_a_trace(package: str, root: Path) -> None:
    rpm(root, "--install", package)
    assert (root / "usr/bin/firstboot").exists()
    rpm(root, "--erase", "firstboot")
    left = {p for p in files(root) if "rpm" not in p}
    assert left == set()
    assert not (root / "usr/share/firstboot").exists()


def test_its_requirements_are_those_of_the_project(package: str) -> None:
    said = [line for line in query(package, "--requires") if line.startswith("python3-")]
    needed = project()["dependencies"]
    assert isinstance(needed, list)
    assert said == sorted(FEDORA[re.split("[<>=]", one)[0]] for one in needed)
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    wanted = [one for name, of in extras.items() if name not in ("test", "report") for one in of]
    assert query(package, "--recommends") == sorted(
        FEDORA_EXTRAS[re.split("[<>=]", one)[0]] for one in wanted
    )


def test_its_version_is_the_projects(package: str) -> None:
    assert query(package, "--queryformat=%{VERSION} %{ARCH}\n") == [f"{version()} noarch"]


def test_its_scripts_are_systemds_macros_for_the_service(tmp_path: Path) -> None:
    names = ("post", "preun", "postun")
    defined = [f"--define=systemd_{name}() echo systemd_{name} %{{*}}" for name in names]
    said = "\n".join(query(rpmbuild(tmp_path, *defined), "--scripts"))
    assert "echo systemd_post firstboot.service\n" in said
    assert "echo systemd_preun firstboot.service firstboot.target\n" in said
    assert said.endswith("echo systemd_postun firstboot.service")


def test_rpmlint_has_nothing_to_say_that_has_no_reason(package: str) -> None:
    assert shutil.which("rpmlint"), "run `make setup`"
    command = ["rpmlint", package, str(SPEC)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "1 packages and 1 specfiles checked" in said
    rules = re.findall(r"^firstboot\.\S+ [EW]: (\S+)", said, re.MULTILINE)
    assert rules, said
    assert set(rules) <= LET_PASS.keys(), said
