"""Packages of what an image brings: ``atomic-container-NAME``, made by rpmbuild.

One kind holds a whole container, for an image of a host; the other only says to the package
database of this host which files came with a container.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from firstboot.containers import disk
from firstboot.containers.exports import read_text, render
from firstboot.containers.tools import ContainerError, find, run

BUILD_SECONDS = 900.0
DATABASE_SECONDS = 120.0
DATABASES = ("var/lib/rpm", "usr/lib/sysimage/rpm")
OSTREE_BOOTED = "run/ostree-booted"
READY_MADE = "container.rpm"  # in /exports: used as it is
SPEC, SPEC_TEMPLATE = "rpm.spec", "rpm.spec.template"
LONGEST_LABEL = 1000  # characters
MACROS = """\
%global __spec_install_post %{nil}
%global debug_package %{nil}
%global _build_id_links none
%undefine _missing_build_ids_terminate_build
"""
_UNLISTED = re.compile(r'["*?\[\]{}\\\n]')  # what a line of %files would take for something else


def wanted(asked: str, root: Path, exports: Path) -> str:
    """``yes`` or ``no`` for what `asked` of ``--system-package`` comes to on the host at `root`."""
    ostree = (root / OSTREE_BOOTED).exists()
    if asked == "yes" and ostree:
        raise ContainerError("--system-package=yes: This doesn't work on Atomic Host yet")
    if asked != "auto":
        return asked
    keeps_packages = any((root / path).is_dir() for path in DATABASES) and find("rpmbuild")
    brings = any((exports / name).exists() for name in (SPEC, SPEC_TEMPLATE, "hostfs"))
    return "yes" if keeps_packages and brings and not ostree else "no"


def make(
    name: str,
    top: Path,
    exports: Path,
    values: Mapping[str, str],
    labels: Mapping[str, str],
    number: str,
    into: Path,
) -> Path:
    """Package what is below `top` as the new file in the directory `into`; its path.

    The image's own specification is used if it has one, `_sourcedir` is `top` then; else one is
    made from its labels. `number` is the version for want of a label.
    """
    if (exports / READY_MADE).is_file():
        return Path(shutil.copy(exports / READY_MADE, into / f"{package_name(name)}.rpm"))
    template = read_text(exports / SPEC_TEMPLATE)
    text = (
        render(exports / SPEC_TEMPLATE, template, values)
        if template is not None
        else read_text(exports / SPEC) or _specification(name, top, values, labels, number)
    )
    work = into / ".rpmbuild"
    disk.wipe(work)
    work.mkdir()
    try:
        disk.write_file(work / "container.spec", text.encode(), 0o600)
        defined = {"_topdir": work, "_rpmdir": work / "out", "_sourcedir": top}
        flags = [f"--define={key} {str(path).replace('%', '%%')}" for key, path in defined.items()]
        run(["rpmbuild", "-bb", *flags, str(work / "container.spec")], timeout=BUILD_SECONDS)
        found = sorted((work / "out").rglob("*.rpm"))
        if not found:
            raise ContainerError(f"rpmbuild made no package of {name}")
        return found[0].replace(into / found[0].name)
    finally:
        disk.wipe(work)


def package_name(name: str) -> str:
    """The package of a container."""
    return f"atomic-container-{name}"


def register(root: Path, package: Path) -> bool:
    """Have the package database know `package`, whose files are put in place without it.

    So a file that is on the host already is not overwritten, as without a package. True if it did
    not know.
    """
    full = _rpm(root, "--query", "--package", str(package)).strip()
    if full in _rpm(root, "--query", "--all", f"{package_name('')}*").split():
        return False
    _rpm(root, "--upgrade", "--oldpackage", "--justdb", "--ignoresize", str(package))
    return True


def forget(root: Path, name: str, *, files: bool = False) -> None:
    """Have the package database forget the package of a container, if it knows it.

    With `files` they go as well: Atomic leaves them to the package, we do not.
    """
    package = package_name(name)
    if _rpm(root, "--query", "--all", "--queryformat=%{NAME}", package) == package:
        _rpm(root, "--erase", *([] if files else ["--justdb"]), "--nodeps", package)


def _rpm(root: Path, *arguments: str) -> str:
    return run(["rpm", f"--root={root}", *arguments], timeout=DATABASE_SECONDS)


def _specification(
    name: str,
    top: Path,
    values: Mapping[str, str],
    labels: Mapping[str, str],
    number: str,
) -> str:
    given = {key.lower(): _plain(value) for key, value in labels.items()}

    def label(key: str, default: str) -> str:
        return given.get(f"atomic.{key}") or default

    lines = [
        f"Name: {package_name(name)}",
        f"Version: {_word(label('version', number))}",
        f"Release: {_word(label('release', values['IMAGE_ID'] or '1'))}",
        f"Summary: {label('summary', f'System container {name}')}",
        f"License: {label('license', 'GPLv2')}",
        "AutoReqProv: no",
    ]
    for key in ("URL", "Requires", "Provides", "Conflicts"):
        if value := label(key.lower(), ""):
            lines.append(f"{key}: {value}")
    source = _plain(str(top))
    lines += ["%description", label("description", f"The system container {name}."), ""]
    lines += ["%install", f"mkdir -p %{{buildroot}} && cp -a '{source}/.' %{{buildroot}}/", ""]
    lines += ["%files", *_files(top), ""]
    return MACROS + "\n".join(lines)


def _files(top: Path) -> Iterator[str]:
    """Every file, link and empty directory; of a container the directory, with all below."""
    whole = top / "usr/lib/containers/atomic"
    for path in sorted(top.rglob("*")):
        if whole in path.parents and path.parent != whole:
            continue
        seen = f"/{path.relative_to(top)}"
        folder = path.is_dir() and not path.is_symlink()
        if folder and path.parent != whole and any(path.iterdir()):
            continue  # others' as much as this one's
        if _UNLISTED.search(seen):
            raise ContainerError(f"{seen} has a name that cannot be packaged")
        kind = "%dir " if folder and path.parent != whole else ""
        yield kind + '"' + seen.replace("%", "%%") + '"'


def _plain(text: str) -> str:
    """One line without macros: whoever made the image runs nothing here."""
    return " ".join(text.split())[:LONGEST_LABEL].replace("%", "%%")


def _word(text: str) -> str:
    """As a version or a release may be written."""
    return re.sub(r"[^A-Za-z0-9._+~^]", "_", text)[:100] or "1"
