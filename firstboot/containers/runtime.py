"""The OCI runtime (runc or crun): which one, what it can do, how a unit calls it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from firstboot.containers.tools import ContainerError, find, run

PREFERRED = ("runc", "crun")
PROBE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime and the features that decide how it is called."""

    path: str
    pid_file: bool
    systemd_cgroup: bool


def choose(*wanted: str | None) -> str:
    """The path of the runtime: the first of `wanted` that is set, else $RUNC_PATH, runc, crun."""
    for name in (*wanted, os.environ.get("RUNC_PATH")):
        if name:
            return find(name) or name
    return next((path for path in map(find, PREFERRED) if path), PREFERRED[0])


def probe(path: str) -> Runtime:
    """What the runtime at `path` supports; ContainerError if it does not even run."""
    try:
        run([path, "--version"], timeout=PROBE_SECONDS)
    except ContainerError:
        raise ContainerError(
            f"Cannot install the container: the runtime {path} is not installed"
        ) from None
    run_options = run([path, "run", "--help"], timeout=PROBE_SECONDS)
    options = run([path, "--help"], timeout=PROBE_SECONDS)
    return Runtime(
        path,
        pid_file="--pid-file" in run_options,
        systemd_cgroup=os.geteuid() == 0 and "--systemd-cgroup" in options,
    )


def exec_values(
    runtime: Runtime, name: str, pid_file: str | None, cgroupfs: bool
) -> dict[str, str]:
    """The four EXEC_* variables of a unit.

    With a `pid_file` the runtime detaches and the unit's main process is the container's own;
    without, the runtime stays in the foreground. `cgroupfs` says that the configuration asks for
    a cgroup by path, which runtimes refuse together with ``--systemd-cgroup``.
    """
    flag = "--systemd-cgroup " if runtime.systemd_cgroup and not cgroupfs else ""
    if pid_file is not None:
        return {
            # Two spaces: units compared with those of other installers are the same, byte by byte.
            "EXEC_START": f"{runtime.path}  {flag}run -d --pid-file {pid_file} '{name}'",
            "EXEC_STOP": "",
            "EXEC_STARTPRE": "",
            "EXEC_STOPPOST": f"{runtime.path} delete '{name}'",
        }
    return {
        "EXEC_START": f"{runtime.path} {flag}run '{name}'",
        "EXEC_STOP": f"{runtime.path} {flag}kill '{name}'",
        "EXEC_STARTPRE": "",
        "EXEC_STOPPOST": "",
    }
