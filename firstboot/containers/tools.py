"""Runs the programs this adapter needs (skopeo, umoci, ostree, runc, crun, systemd-tmpfiles)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from firstboot.protocol.errors import LocalError

SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_REASON = 300  # characters of a tool's last line that an error repeats
UMOCI_MARK = "\N{VECTOR OR CROSS PRODUCT} "
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ContainerError(LocalError):
    """A system container could not be installed, changed or removed; one sentence says why."""


def find(tool: str) -> str | None:
    """The absolute path of `tool`, also where only root's PATH would have it."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `argv` for at most `timeout` seconds and return what it wrote to stdout.

    `environment` is set on top of this process's own.

    ContainerError when the program is missing, fails (its last line of stderr is the reason) or
    takes too long.
    """
    tool = argv[0].rpartition("/")[2]
    path = find(argv[0])
    if path is None:
        raise ContainerError(f"{tool} is not installed: install the package that provides it")
    try:
        done = subprocess.run(
            [path, *argv[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ContainerError(f"{tool} did not finish within {timeout:.0f} s") from None
    except OSError as error:
        raise ContainerError(f"{tool} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        raise ContainerError(f"{tool} failed: {_reason(done.stderr, done.returncode)}")
    return done.stdout.decode(errors="replace")


def attached(argv: Sequence[str], *, cwd: Path) -> int:
    """Run `argv` with this process's own output, for as long as it takes; its exit status."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, cwd=cwd, check=False).returncode
    except OSError as error:
        raise ContainerError(f"{argv[0]} cannot be run: {error.strerror}") from None


def _reason(stderr: bytes, code: int) -> str:
    text = _ESCAPE.sub("", stderr.decode(errors="replace"))
    lines = [line.strip().lstrip(UMOCI_MARK) for line in text.splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit code {code}")
    return last[:LONGEST_REASON]
