"""Starts programs at one moment, and tells what each of them used up.

A program of its own, and a small one: a process inherits the peak memory of whoever forked it
(getrusage(2), ru_maxrss survives execve), so the benchmark's own size would show in every figure.

Reads one line from standard input, a JSON list of ``{"argv": [...], "out": descriptor}``, and
kills what still runs when standard input ends. Writes JSON lines: first ``{"started": seconds}``
(monotonic), then for each program that ended ``{"index", "status", "cpu", "peak"}`` with the
seconds of CPU it took and its peak memory in bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any


def main() -> None:
    """Start them, wait for them, report."""
    programs = json.loads(sys.stdin.readline())
    barrier, release = os.pipe()
    pids = {_fork(program, barrier, release): i for i, program in enumerate(programs)}
    ended, awake = os.pipe()
    os.set_blocking(awake, False)
    signal.set_wakeup_fd(awake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _tell({"started": time.monotonic()})
    os.close(release)
    while pids:
        readable, _, _ = select.select([0, ended], [], [])
        if 0 in readable:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _reap(pids, block=0 in readable)
        if ended in readable:
            os.read(ended, 4096)


def _fork(program: dict[str, Any], barrier: int, release: int) -> int:
    pid = os.fork()
    if pid:
        os.close(program["out"])
        return pid
    try:
        os.close(release)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(program["out"], 1)
        os.dup2(program["out"], 2)
        os.close(program["out"])
        os.read(barrier, 1)  # ends when the starter closes its side
        os.execvp(program["argv"][0], program["argv"])
    finally:
        os._exit(127)


def _reap(pids: dict[int, int], *, block: bool) -> None:
    while pids:
        pid, status, used = os.wait4(-1, 0 if block else os.WNOHANG)
        if not pid:
            return
        code = os.waitstatus_to_exitcode(status)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        _tell({"index": pids.pop(pid), "status": code, "cpu": cpu, "peak": peak})


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
