"""The variables a template may use, and which source wins."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

# capabilities(7) in the order of their numbers, linux/capability.h
# fmt: off
CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID",
    "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW",
    "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD",
    "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)
FORCED = frozenset((
    "DESTDIR", "NAME", "EXEC_START", "EXEC_STOP", "EXEC_STARTPRE", "EXEC_STOPPOST",
    "HOST_UID", "HOST_GID", "IMAGE_NAME", "IMAGE_ID",
))
# fmt: on


def resolve(
    given: Mapping[str, str], defaults: Mapping[str, str], forced: Mapping[str, str], runtime: str
) -> dict[str, str]:
    """All variables of one deployment.

    From the weakest: a new UUID, the manifest's `defaults`, what this host sets, `given`; the
    `forced` ones are never up to anyone else.
    """
    run_directory = given.get("RUN_DIRECTORY", "/run")
    host = {
        "RUN_DIRECTORY": run_directory,
        "PIDFILE": f"{run_directory}/container-{forced['NAME']}.pid",
        "CONF_DIRECTORY": "/etc",
        "STATE_DIRECTORY": "/var/lib",
        "ALL_PROCESS_CAPABILITIES": capability_list(),
        "RUNTIME": runtime,
        "ATOMIC": str(Path(sys.argv[0]).absolute()),
    }
    fresh = {"UUID": str(uuid.uuid4())}
    owner = {"HOST_UID": str(os.getuid()), "HOST_GID": str(os.getgid())}
    return {**fresh, **defaults, **host, **given, **owner, **forced}


def capability_list() -> str:
    """Every capability a container can get here, as the inside of a JSON list."""
    return ",\n".join(f'"{name}"' for name in possible_capabilities()) + "\n"


def possible_capabilities() -> tuple[str, ...]:
    """Every capability a container can get here.

    The kernel's list, less what the first process may not pass on: in a machine without
    CAP_SYS_RESOURCE a runtime asked for it fails.
    """
    last = _read_number("/proc/sys/kernel/cap_last_cap", r"(\d+)", len(CAPABILITIES) - 1)
    bounding = _read_number("/proc/1/status", r"CapBnd:\s*([0-9a-f]+)", -1, base=16)
    names = [name for number, name in enumerate(CAPABILITIES) if number <= last]
    return tuple(f"CAP_{name}" for name in names if bounding >> CAPABILITIES.index(name) & 1)


def _read_number(path: str, pattern: str, default: int, base: int = 10) -> int:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return default
    return int(found.group(1), base) if found else default
