"""The files a deployment consists of beside its root file system: config.json, unit, tmpfiles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firstboot.containers import runtime as oci
from firstboot.containers.disk import inside, read_if_there, write_file
from firstboot.containers.exports import read_text, render
from firstboot.containers.tools import ContainerError, run
from firstboot.containers.variables import possible_capabilities

SPEC_SECONDS = 10.0
TMPFILES_SECONDS = 60.0
DEFAULT_UNIT = """\
[Unit]
Description=$NAME

[Service]
ExecStartPre=$EXEC_STARTPRE
ExecStart=$EXEC_START
ExecStop=$EXEC_STOP
ExecStopPost=$EXEC_STOPPOST
Restart=on-failure
WorkingDirectory=$DESTDIR
PIDFile=$PIDFILE

[Install]
WantedBy=multi-user.target
"""


def write_config(
    deployment: Path, runtime: str, values: Mapping[str, str], rootfs: str | None = None
) -> dict[str, Any]:
    """Write the deployment's config.json and return it; ContainerError if it cannot be run.

    `rootfs` is a root file system elsewhere that the container uses instead of its own.
    """
    exports = deployment / "rootfs" / "exports"
    target = deployment / "config.json"
    text = read_text(exports / "config.json")
    if text is None:
        template = exports / "config.json.template"
        raw = read_text(template)
        text = (
            _default_config(deployment, runtime) if raw is None else render(template, raw, values)
        )
    config = _checked(text, values["NAME"], rootfs)
    changed = _keep_possible(config)
    if rootfs and config:
        config["root"]["path"] = rootfs
        changed = True
    if changed:
        text = json.dumps(config, indent=4)
    # Values may be secret, and whoever may read them can read the unit's environment as root.
    write_file(target, text.encode(), 0o600)
    return config


def exec_values(
    exports: Path, values: Mapping[str, str], runtime: oci.Runtime, cgroupfs: bool
) -> dict[str, str]:
    """The EXEC_* variables as this image's unit wants them.

    A unit that names both ``$EXEC_STOPPOST`` and ``$PIDFILE``, spelled so, has the container
    detached.
    """
    raw = read_text(exports / "service.template") or DEFAULT_UNIT
    detach = runtime.pid_file and "$EXEC_STOPPOST" in raw and "$PIDFILE" in raw
    pid_file = values["PIDFILE"] if detach else None
    return oci.exec_values(runtime, values["NAME"], pid_file, cgroupfs)


def unit_text(exports: Path, values: Mapping[str, str]) -> str:
    """The unit, filled in."""
    template = exports / "service.template"
    return render(template, read_text(template) or DEFAULT_UNIT, values)


def wants_cgroupfs(config: Mapping[str, Any]) -> bool:
    """Whether the configuration places the container in a cgroup named by path."""
    linux = config.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    return isinstance(path, str) and path.startswith("/")


def tmpfiles_text(
    root: Path, exports: Path, values: Mapping[str, str], config: Mapping[str, Any], before: str
) -> str:
    """The tmpfiles.d(5) lines: the image's template, or a line per bind mount without a source.

    `before` are the lines of the deployment that is replaced. Its sources exist by now, and those
    below /run are gone after the next boot, so they keep their line.
    """
    template = exports / "tmpfiles.template"
    raw = read_text(template)
    if raw is not None:
        return render(template, raw, values)
    owner = f"{values['HOST_UID']} {values['HOST_GID']}"
    lines = []
    for source in _bind_sources(config):
        head = f"d    {source}   "
        if not inside(root, source).exists() or head in before:
            lines.append(f"{head}0700 {owner} - -\n")
    return "".join(dict.fromkeys(lines))


def _bind_sources(config: Mapping[str, Any]) -> Iterator[str]:
    for mount in config.get("mounts") or []:
        if "bind" in str(mount.get("type")) and str(mount.get("source", "")).startswith("/"):
            yield str(mount["source"])


def tmpfiles(root: Path, action: str, path: Path) -> None:
    """Have systemd-tmpfiles(8) do `action` for the lines in `path` on the host at `root`."""
    elsewhere = [] if root == Path("/") else ["--root", str(root)]
    run(["systemd-tmpfiles", *elsewhere, action, str(path)], timeout=TMPFILES_SECONDS)


def _checked(text: str, name: str, rootfs: str | None) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ContainerError(f"The rendered config.json of {name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ContainerError(f"The rendered config.json of {name} is not a mapping")
    if not config:
        return config
    root = config.get("root")
    if not isinstance(root, dict) or root.get("readonly") is not True:
        raise ContainerError("Only readonly images are supported")
    if rootfs is None and root.get("path") != "rootfs":
        raise ContainerError(f"The root path of {name} must be 'rootfs', not {root.get('path')!r}")
    mounts = config.get("mounts") or []
    if not isinstance(mounts, list) or not all(isinstance(mount, dict) for mount in mounts):
        raise ContainerError(f"The mounts in the config.json of {name} are not a list of mappings")
    return config


def _keep_possible(config: dict[str, Any]) -> bool:
    """Take away the capabilities that nobody has on this host; whether there were any.

    A runtime fails altogether when it is asked for one of those, and Origin's images list nearly
    all there are.
    """
    process = config.get("process")
    listed = process.get("capabilities") if isinstance(process, dict) else None
    if not isinstance(listed, dict):
        return False
    possible = set(possible_capabilities())
    kept = {
        kind: [name for name in names if name in possible] if isinstance(names, list) else names
        for kind, names in listed.items()
    }
    changed = kept != listed
    listed |= kept
    return changed


def _default_config(deployment: Path, runtime: str) -> str:
    """What the runtime proposes, made read-only and without a terminal; ``{}`` if it cannot."""
    target = deployment / "config.json"
    try:
        run([runtime, "spec", "--rootless"], timeout=SPEC_SECONDS, cwd=deployment)
        config = json.loads(read_if_there(target) or b"")
        config["root"] = {**config["root"], "readonly": True, "path": "rootfs"}
        config["process"] = {**config["process"], "terminal": False, "args": ["run.sh"]}
    except (ContainerError, ValueError, KeyError, TypeError):
        return "{}"
    return json.dumps(config, indent=4)
