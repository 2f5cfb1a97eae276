"""Checks the sources of a system container's image, before anybody builds or installs it.

`lint` is given the directory that has a ``Dockerfile`` beside the templates, or an image's tree
with ``exports`` in it. A template is tried out with its defaults and with a sample for every
variable that the host sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from firstboot.containers import lint_build
from firstboot.containers.exports import Manifest, read_manifest, read_text
from firstboot.containers.tools import ContainerError
from firstboot.containers.variables import FORCED

CONFIG, UNIT = "config.json.template", "service.template"
TMPFILES, MANIFEST = "tmpfiles.template", "manifest.json"
EXPECTED = (CONFIG, UNIT, TMPFILES, MANIFEST)
KNOWN = {*EXPECTED, "config.json", "hostfs", "rpm.spec", "rpm.spec.template", "container.rpm"}
SAMPLES = {
    "RUN_DIRECTORY": "/run",
    "PIDFILE": "/run/container-sample.pid",
    "CONF_DIRECTORY": "/etc",
    "STATE_DIRECTORY": "/var/lib",
    "ALL_PROCESS_CAPABILITIES": '"CAP_CHOWN"\n',
    "RUNTIME": "/usr/bin/runc",
    "ATOMIC": "/usr/bin/firstboot",
    "UUID": "00000000-0000-4000-8000-000000000000",
    **dict.fromkeys(FORCED, ""),
    "DESTDIR": "/var/lib/containers/atomic/sample.0",
    "NAME": "sample",
    "HOST_UID": "0",
    "HOST_GID": "0",
}
# The host's value is stronger than the manifest's.
DEAD = FORCED | {
    "RUN_DIRECTORY", "PIDFILE", "CONF_DIRECTORY", "STATE_DIRECTORY", "ALL_PROCESS_CAPABILITIES",
    "RUNTIME", "ATOMIC",
}  # fmt: skip
NOTIFY = "/run/systemd/notify"  # systemd's own socket, wherever RUN_DIRECTORY is
CREATES = re.compile(r"^[dDvqQeLCfF]\S*\s+\"?([^\s\"]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `rule` names it for good; only errors keep an image from working."""

    rule: str
    error: bool
    path: str
    text: str

    def __str__(self) -> str:
        return f"{'error' if self.error else 'warning'} {self.rule}: {self.path}: {self.text}"


def lint(directory: Path) -> list[Finding]:
    """Everything that is wrong with the container in `directory`; ContainerError if it is none."""
    if not directory.is_dir():
        raise ContainerError(f"{directory} is not a directory")
    below = ("exports", "rootfs/exports", "root/exports", ".")
    candidates = (directory / name for name in below)
    exports = next(path for path in candidates if path.is_dir())
    found = list(_of_exports(exports, exports == directory))
    found += [Finding(*what) for what in lint_build.dockerfile(directory, exports)]
    found += [Finding(*what) for what in lint_build.repository(directory)]
    return sorted(found, key=lambda finding: not finding.error)


def _of_exports(exports: Path, mixed: bool) -> Iterator[Finding]:
    try:
        manifest = read_manifest(exports, str(exports))
    except ContainerError as error:
        yield Finding("manifest", True, MANIFEST, str(error))
        manifest = Manifest()
    yield from _names(exports, mixed)
    yield from _manifest(exports, manifest)
    texts: dict[str, str] = {}
    for name in (CONFIG, UNIT, TMPFILES):
        raw = read_text(exports / name)
        if raw is not None:
            yield from _variables(name, raw, manifest)
            texts[name] = _tried(raw, manifest)
    if (exports / "config.json").exists():
        text = "it is copied as it is, so nothing can be set; make it config.json.template"
        yield Finding("config-verbatim", True, "config.json", text)
        texts["config.json"] = read_text(exports / "config.json") or ""
    for name in ("config.json", CONFIG):
        if name in texts:
            yield from _config(
                name, texts[name], read_text(exports / name) or "", texts.get(TMPFILES)
            )
    if UNIT in texts and manifest.has_service:
        yield from _unit(read_text(exports / UNIT) or "")


def _names(exports: Path, mixed: bool) -> Iterator[Finding]:
    for name in EXPECTED:
        if not (exports / name).exists() and not (
            name == CONFIG and (exports / "config.json").exists()
        ):
            yield Finding("missing-file", False, name, "there is none; defaults are used")
    for path in [] if mixed else sorted(exports.iterdir()):
        if path.name not in KNOWN:
            yield Finding("unknown-export", False, path.name, "nothing reads it in /exports")


def _manifest(exports: Path, manifest: Manifest) -> Iterator[Finding]:
    for name in sorted(DEAD.intersection(manifest.default_values)):
        text = f"the default of {name} has no effect: the host always sets it"
        yield Finding("dead-default", False, MANIFEST, text)
    hostfs = exports / "hostfs"
    brought = {f"/{path.relative_to(hostfs)}" for path in hostfs.rglob("*")}
    for old, new in manifest.rename_files.items():
        yield from _variables(MANIFEST, new, manifest)
        if old not in brought:
            text = f"renameFiles has {old}, which hostfs does not bring"
            yield Finding("rename-nothing", False, MANIFEST, text)
        if not _tried(new, manifest).startswith("/"):
            text = f"renameFiles gives {old} the name {new}, which is not absolute"
            yield Finding("rename-relative", True, MANIFEST, text)
    renamed = {_tried(new, manifest) for new in manifest.rename_files.values()}
    for path in manifest.files_template:
        under = any(path.startswith(f"{new}/") or path == new for new in renamed)
        if path not in brought and not under:
            text = f"installedFilesTemplate has {path}, which hostfs does not bring"
            yield Finding("template-nothing", False, MANIFEST, text)
    for name in sorted(brought):
        if name.startswith("/usr/") and not name.startswith("/usr/local"):
            if (hostfs / name[1:]).is_dir():
                continue
            yield Finding("hostfs-usr", False, f"hostfs{name}", "/usr may be read-only on hosts")


def _variables(name: str, raw: str, manifest: Manifest) -> Iterator[Finding]:
    given = {**SAMPLES, **manifest.default_values}
    told = set()
    for match in Template.pattern.finditer(raw):
        variable = match["named"] or match["braced"]
        if match["invalid"] is not None:
            line = raw.count("\n", 0, match.start()) + 1
            yield Finding(
                "placeholder", True, f"{name}:{line}", "a $ that begins no variable; $$ is $"
            )
        elif variable and variable not in given and variable not in told:
            told.add(variable)
            text = f"{variable} has no default: every installation must set it"
            yield Finding("no-default", False, name, text)


def _tried(raw: str, manifest: Manifest) -> str:
    given = {**manifest.default_values, **SAMPLES}

    def fill(match: re.Match[str]) -> str:
        if match["escaped"] is not None:
            return "$"
        return str(given.get(match["named"] or match["braced"] or "", ""))

    return Template.pattern.sub(fill, raw)


def _config(name: str, text: str, raw: str, tmpfiles: str | None) -> Iterator[Finding]:
    try:
        config = json.loads(text)
    except ValueError as error:
        yield Finding("json", True, name, f"filled in with the defaults it is not JSON: {error}")
        return
    if not isinstance(config, dict):
        yield Finding("json", True, name, "filled in with the defaults it is not a mapping")
        return
    yield from _basics(name, config)
    mounts = config.get("mounts")
    for mount in [m for m in mounts if isinstance(m, dict)] if isinstance(mounts, list) else []:
        where, source = mount.get("destination"), str(mount.get("source", ""))
        if mount.get("type") == "rbind":
            text = f"the mount at {where} has type rbind; make it type bind with option rbind"
            yield Finding("mount-type", True, name, text)
        if mount.get("type") != "bind" or source == NOTIFY:
            continue
        for literal, variable in (("/var/lib/", "STATE_DIRECTORY"), ("/run/", "RUN_DIRECTORY")):
            if f'"{literal}' in raw and source.startswith(literal) and f'"{source}' in raw:
                text = f"the source {source} is fixed; use ${{{variable}}}"
                yield Finding("fixed-directory", False, name, text)
        yield from _source(name, source, tmpfiles)


def _basics(name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    def part(key: str) -> Mapping[str, Any]:
        found = config.get(key)
        return found if isinstance(found, dict) else {}

    if part("root").get("readonly") is not True:
        yield Finding("root-readonly", True, name, "root.readonly is not true: it is not installed")
    if part("root").get("path") != "rootfs":
        yield Finding("root-path", False, name, "root.path is not rootfs: it is not installed")
    if part("process").get("terminal") is not False:
        yield Finding("terminal", True, name, "process.terminal is not false")
    if "selinuxProcessLabel" in part("linux"):
        text = "linux.selinuxProcessLabel is set; say SELinuxContext= in the unit"
        yield Finding("selinux-label", True, name, text)


def _source(name: str, source: str, tmpfiles: str | None) -> Iterator[Finding]:
    """A template for tmpfiles is used alone: what it forgets, nobody makes."""
    if tmpfiles is None or not source.startswith(("/var/lib/", "/run/")):
        return
    made = CREATES.findall(tmpfiles)
    if not any(path.rstrip("/") == source.rstrip("/") for path in made):
        text = f"the source {source} of a mount is not made by {TMPFILES}"
        yield Finding("source-not-made", False, name, text)


def _unit(raw: str) -> Iterator[Finding]:
    lines = [line.strip() for line in raw.splitlines()]
    for key, variable in (
        ("ExecStart", "EXEC_START"),
        ("ExecStop", "EXEC_STOP"),
        ("WorkingDirectory", "DESTDIR"),
    ):
        given = [line.partition("=")[2].strip() for line in lines if line.startswith(f"{key}=")]
        if given not in ([f"${variable}"], [f"${{{variable}}}"]):
            yield Finding("unit-variable", False, UNIT, f"{key}= is not ${variable}, once")
    braced = "${PIDFILE}" in raw or "${EXEC_STOPPOST}" in raw
    pair = ("$EXEC_STOPPOST" in raw, "$PIDFILE" in raw)
    if braced or pair[0] != pair[1]:
        text = (
            "a container is detached only if $EXEC_STOPPOST and $PIDFILE are both there, unbraced"
        )
        yield Finding("pid-file", False, UNIT, text)
    if "Type=notify" in lines and "UnsetEnvironment=NOTIFY_SOCKET" not in lines:
        text = (
            "runc waits for the READY of a payload that has died: say UnsetEnvironment="
            f"NOTIFY_SOCKET, and have config.json bind {NOTIFY} and set NOTIFY_SOCKET"
        )
        yield Finding("notify", False, UNIT, text)
    if "$EXEC_STARTPRE" not in raw and all(pair):
        yield Finding("start-pre", False, UNIT, "ExecStartPre= is not $EXEC_STARTPRE")
