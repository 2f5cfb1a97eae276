"""``make demo``: machines booted from one image with one user-data become one cluster.

python -m tests.machines.demo                  watch, prove, leave nothing behind
python -m tests.machines.demo --keep           the same, and leave the machines running
python -m tests.machines.demo enter host-2     a shell in a kept machine; or a command's words
python -m tests.machines.demo cycle host-2     cut a kept machine's power and switch it on again
python -m tests.machines.demo stop             remove every kept machine and all that goes with it
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from firstboot.userdata import make_token
from tests.machines.rig import ARTEFACTS, PROJECT, Machine, MachineOff, Rig
from tests.machines.view import TARGET, Look, Timings, changes, faults, hopeless, late, result, view
from tests.network.run import RUNS

CONTROL = "control"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
JOURNAL_LINES = 15
LOOK, REDRAW = 0.05, 0.2  # seconds
USER_DATA = """#cloud-config
write_files:
  - path: /etc/firstboot/config.yaml
    permissions: '0600'
    content: |
      cluster: demo
      token: {token}
      expect: {hosts}
      masters: {masters}
      payload: etcd
"""


class Failed(Exception):
    """The demo did not hold what it promises; a sentence."""


# ---------------------------------------------------------------- machines


@contextlib.contextmanager
def display(console: Console) -> Iterator[Callable[[Sequence[Look]], None]]:
    """How looks are shown: one view on a terminal, else a line for each change."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            drawn: list[Look] = []

            def draw(looks: Sequence[Look]) -> None:
                old = max((look.after for look in drawn), default=-1.0)
                due = max(look.after for look in looks) > old + REDRAW
                if due or [x.cells for x in looks] != [x.cells for x in drawn]:
                    drawn[:] = looks
                    live.update(view(looks), refresh=True)

            yield draw
        return
    before: dict[str, Look] = {}

    def show(looks: Sequence[Look]) -> None:
        for look in looks:
            for line in changes(look, before.get(look.host)):
                print(line, flush=True)
            before[look.host] = look

    yield show


def watch(rig: Rig, timeout: float, show: Callable[[Sequence[Look]], None]) -> list[Look]:
    """Look until all hosts run; Failed if that takes too long or cannot happen any more."""
    begun = time.monotonic()
    took: dict[str, float] = {}
    while True:
        after = time.monotonic() - begun
        looks = []
        for machine in rig:
            shown, name = machine.status(), machine.name
            if shown and shown["state"] == "running":
                took.setdefault(name, after)
            elapsed = took.get(name, after)
            looks.append(Look(name, machine.address, machine.running, elapsed, shown))
        show(looks)
        if all(look.state == "running" for look in looks):
            return looks
        complaint = hopeless(looks) or (late(looks, timeout) if after > timeout else "")
        if complaint:
            raise Failed(complaint)
        time.sleep(LOOK)


def inside(machine: Machine, *argv: str) -> str:
    """What a program in a machine prints; Failed if it fails."""
    try:
        return machine.exec(*argv).stdout.strip()
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()
        text = f"{machine.name}: `{shlex.join(argv)}` failed with {error.returncode}: {said}"
        raise Failed(text) from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{machine.name}: `{shlex.join(argv)}` hangs") from error


def units_of(machine: Machine, look: Look) -> dict[str, str]:
    """The units firstboot started, and its target, with their states."""
    names = [*(look.shown or {}).get("units", ()), TARGET]
    states = machine.exec("systemctl", "is-active", *names, check=False).stdout.split()
    return dict.fromkeys(names, "unknown") | dict(zip(names, states, strict=False))


def container(look: Look) -> str:
    """The system container that gives a host its local etcd endpoint."""
    for unit in (look.shown or {}).get("units", ()):
        if str(unit).startswith("etcd"):
            return str(unit).removesuffix(".service")
    raise Failed(f"{look.host} has no etcd unit")


def exchange(rig: Rig, looks: Sequence[Look]) -> str:
    """Write through one host's local etcd, a node's if there is one, and read on all others."""
    pairs = list(zip(rig, looks, strict=True))
    writer = next((p for p in pairs if p[1].get("role") == "node"), pairs[0])
    readers = [p for p in pairs if p is not writer] or [writer]
    key, value = "demo", f"written on {writer[0].name} {secrets.token_hex(4)}"
    inside(writer[0], "runc", "exec", container(writer[1]), "etcdctl", "put", key, value)
    for machine, look in readers:
        read = ("runc", "exec", container(look), "etcdctl", "get", key, "--print-value-only")
        found = inside(machine, *read)
        if found != value:
            raise Failed(f"{machine.name} reads {found!r} instead of {value!r}")
    names = ", ".join(machine.name for machine, _ in readers)
    return f"One etcd store: {value!r} is read on {names}."


def prove(rig: Rig, looks: Sequence[Look], masters: int, console: Console) -> None:
    """Show the finished cluster; Failed if it is not exactly one, or not all of it works."""
    units = {m.name: units_of(m, x) for m, x in zip(rig, looks, strict=True)}
    console.print("", result(looks, units), "", sep="\n")
    statuses = [look.shown for look in looks if look.shown]
    found = faults(statuses, masters)
    found += [
        f"{h}: {n} is {s}" for h, all_ in units.items() for n, s in all_.items() if s != "active"
    ]
    if found:
        raise Failed("; ".join(found) + ".")
    timings = Timings.of(looks)
    title = "Seconds after the last machine's network was up, when each phase began:"
    console.print(title, timings.rows(), "", sep="\n", highlight=False)
    who = ", ".join(s["name"] for s in statuses if s["role"] == "master")
    cluster = statuses[0]["cluster_id"]
    print(timings.sentence())
    print(f"One cluster, {cluster}; hosts: {len(looks)}; master: {who}.", flush=True)
    print(exchange(rig, looks), flush=True)


def explain(rig: Rig, error: Exception) -> None:
    """Everything about a failure that helps to understand it."""
    print(f"\nFAILED: {error}", flush=True)
    for machine in rig:
        look = Look(machine.name, machine.address, machine.running, 0, machine.status())
        print(f"\n{look.host}  {look.stage}: {look.sentence}")
        for problem in look.problems:
            print(f"  {problem}")
        with contextlib.suppress(subprocess.SubprocessError, MachineOff):
            for line in machine.journal("firstboot.service").splitlines()[-JOURNAL_LINES:]:
                print(f"  | {line}")
    kept = rig.collect(ARTEFACTS / f"demo-{rig.run.prefix}")
    print(f"\nConsoles, journals and statuses: {kept}", flush=True)


def demo(options: argparse.Namespace, detach: Callable[[], None] | None = None) -> int:
    """The whole demo; the exit code. With `detach`, call that and hold the machines thereafter."""
    first_signal_ends()
    console = Console(
        width=None if sys.stdout.isatty() else 160, force_terminal=sys.stdout.isatty()
    )
    text = USER_DATA.format(token=make_token(), hosts=options.hosts, masters=options.masters)
    print(f"Booting {options.hosts} machines from one image with one user-data.", flush=True)
    stopping: socket.socket | None = None  # closed by leaving, so after all else is gone
    with Rig(options.hosts, text) as rig:
        try:
            rig.start()
            with display(console) as show:
                looks = watch(rig, options.timeout, show)
            prove(rig, looks, options.masters, console)
            print("", hints(looks, keep=detach is not None), sep="\n", flush=True)
            if detach:
                detach()
                stopping = hold(rig)
        except (Failed, MachineOff) as error:
            explain(rig, error)
            return 1
        except SystemExit:
            with contextlib.suppress(OSError):  # its terminal may be gone
                print("Interrupted; removing the machines.", file=sys.stderr, flush=True)
            raise
        finally:
            ignore_signals()
    del stopping
    return 0


def hints(looks: Sequence[Look], *, keep: bool) -> str:
    """What to try next, ready to copy."""
    if not keep:
        return "To try:  make demo KEEP=1\n         make demo HOSTS=5 MASTERS=3"
    where = "" if Path.cwd() == PROJECT else f"cd {shlex.quote(str(PROJECT))} && "
    root = "sudo " if "SUDO_USER" in os.environ else ""
    python = os.path.relpath(sys.executable, PROJECT)
    call = f"{where}{root}{python} -m tests.machines.demo"
    host, has = looks[-1].host, container(looks[-1])
    rows = (
        ("To try:", f"enter {host} firstboot status"),
        ("", f"enter {host} runc exec {has} etcdctl get demo"),
        ("A shell:", f"enter {host}"),
        ("Cut the power and boot again:", f"cycle {host}"),
        ("Stop and remove everything:", "stop"),
    )
    return "\n".join(f"{what:31}{call} {verb}" for what, verb in rows)


# ---------------------------------------------------------------- signals and staying


def first_signal_ends() -> None:
    """The first signal unwinds everything; more of them do not disturb the tidying-up."""

    def end(number: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise SystemExit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """From here on, tidy up undisturbed; so do the programs that are started for it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def background(options: argparse.Namespace) -> int:
    """Run the demo in a process of its own, and return when that detaches or ends.

    That process owns the machines from the start, because reading what nspawn reports is a
    thread's work, and no thread survives a fork.
    """
    reading, writing = os.pipe()
    here = os.getpid()
    child = os.fork()
    if child == 0:
        os.closerange(3, writing)  # with what make and shells left open: a reader may wait for it
        os.closerange(writing + 1, 1024)
        os.setsid()  # signals reach it through its parent only, so each one once
        follow_parent(signal.SIGTERM)
        if os.getppid() != here:
            return 1

        def detach() -> None:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            follow_parent(0)
            os.write(writing, b"0")
            os.close(writing)

        return demo(options, detach)

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    os.close(writing)
    if os.read(reading, 1):
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def follow_parent(number: int) -> None:
    """Be sent this signal when the parent dies, 0 for none (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, number)


def hold(rig: Rig) -> socket.socket:
    """Keep the machines until `stop`; the connection that asked for it.

    A machine that went off is switched on again, so that ``reboot`` works inside.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.run.directory / CONTROL))
        listener.listen()
        listener.settimeout(0.5)
        while True:
            rig.start()
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.settimeout(5)
                verb, _, name = connection.recv(1024).decode(errors="replace").partition(" ")
                if verb == "stop":
                    return connection
                with connection:
                    connection.sendall(json.dumps(answer(rig, verb, name)).encode())


def answer(rig: Rig, verb: str, name: str) -> dict[str, Any]:
    """Carry out one verb on one kept machine, called by name or number."""
    for machine in rig:
        if name in (machine.name, str(machine.number)):
            try:
                if verb == "cycle":
                    machine.kill()
                    machine.start()
                    machine.ready()
                return {"enter": machine.command() if verb == "enter" else []}
            except (MachineOff, TimeoutError) as error:
                return {"error": f"{error}"}
    return {"error": f"there is no {name}; there are {', '.join(m.name for m in rig)}"}


def kept(words: str) -> Iterator[tuple[str, bytes]]:
    """Send words to every process that keeps machines, youngest first: its run, its answer."""
    for path in sorted(RUNS.glob(f"fb*/{CONTROL}"), key=lambda p: p.stat().st_mtime, reverse=True):
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(path))
            except ConnectionRefusedError:
                continue  # killed; the next run removes what it left
            connection.sendall(words.encode())
            with connection.makefile("rb") as lines:
                yield path.parent.name, lines.read()


def stop(_options: argparse.Namespace) -> int:
    """Remove all kept machines; done when they are gone."""
    for run, _ in kept("stop"):
        print(f"removed {run}")
    return 0


def one(options: argparse.Namespace) -> int:
    """``enter`` or ``cycle`` one machine of the youngest kept demo."""
    for _, text in kept(f"{options.verb} {options.host}"):
        reply = json.loads(text)
        if "error" in reply:
            print(reply["error"], file=sys.stderr)
            return 1
        if options.verb == "enter":
            argv = [*reply["enter"], *(options.command or ("bash", "-l"))]
            path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            terminal = os.environ.get("TERM", "dumb")
            variables = {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "TERM": terminal}
            os.execvpe(argv[0], argv, variables)
        print(f"{options.host} has booted again")
        return 0
    print("no machines are kept: make demo KEEP=1", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or a verb on kept machines; 0 only if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines.demo")
    number = os.environ.get
    parser.add_argument("--hosts", type=int, default=number("HOSTS") or 3)
    parser.add_argument("--masters", type=int, default=number("MASTERS") or 1)
    parser.add_argument("--timeout", type=float, default=180, help="seconds; 180")
    parser.add_argument("--keep", action="store_true", default=bool(number("KEEP")))
    parser.set_defaults(run=lambda options: (background if options.keep else demo)(options))
    verbs = parser.add_subparsers(dest="verb")
    for verb in ("enter", "cycle"):
        sub = verbs.add_parser(verb)
        sub.add_argument("host")
        sub.set_defaults(run=one)
        if verb == "enter":
            sub.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("stop").set_defaults(run=stop)
    options = parser.parse_args(arguments)
    if not (1 <= options.hosts <= 200 and options.masters in (1, 3, 5)):
        parser.error("HOSTS must be 1 to 200, MASTERS 1, 3 or 5")
    if options.masters > options.hosts:
        parser.error("MASTERS cannot be more than HOSTS")
    if os.geteuid() != 0:
        print("machines need root: make demo, or sudo", file=sys.stderr)
        return 1
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
