"""The verbs, their exit codes, and the one place where a person's mistakes end."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from firstboot.late import late_patterns
from firstboot.protocol.errors import FirstbootError, UserError
from firstboot.protocol.model import MAX_HOSTS

if TYPE_CHECKING:  # 8 ms to import and use, which the host that boots need not spend
    import argparse

OK, FAILED, WAITING, USAGE, CONFIGURATION = 0, 1, 2, 64, 78
MAX_WINDOW = 30 * 86_400.0  # seconds that `admit` may wait
MAX_LINE = 4096
EXIT_CODES = """exit codes:
  0   done: the host runs its role, or is not configured; the file is valid
  1   failed
  2   degraded, or still waiting
  64  wrong usage
  78  a mistake in the configuration"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; a mistake ends here, in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no locale, no file's name stops a page
    try:
        code = _verb(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()  # here, where a reader that left is no error of ours
        return code
    except UserError as error:
        _complain(error)
        return error.code
    except FirstbootError as error:
        _complain(error)
        return FAILED
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and Python would say so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 130


def program() -> NoReturn:
    """`main` as a whole process, which ends at once: taking all modules apart costs 25 ms."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if threading.active_count() == 1:  # else Python waits for what they do
        os._exit(code)
    sys.exit(code)


def _verb(words: Sequence[str]) -> int:
    match words:
        case ["run"]:  # what firstboot.service says
            return _run(Path("/"))
        case ["run", "--root", root] if not root.startswith("-"):
            return _run(Path(root))
    options = _parser().parse_args(words)
    verb: Callable[[argparse.Namespace], int] = options.verb
    return verb(options)


def _complain(error: FirstbootError) -> None:
    """One line, whatever a file's name or a peer's text put into it."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    print(f"firstboot: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    import argparse

    from firstboot import container_verbs

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message, hint=f"see {self.prog} --help", code=USAGE)

    parser = Parser(
        prog="firstboot",
        description="Turns N machines booted from one image with one user-data into one cluster.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, verb: Callable[[argparse.Namespace], int], text: str) -> Parser:
        sub: Parser = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=verb)
        return sub

    run = add(
        "run", _run_as_told, "assemble this host into its cluster (what firstboot.service runs)"
    )
    status = add("status", _status, "tell where this host stands and what it waits for")
    status.add_argument("--wait", action="store_true", help="wait until it runs or has failed")
    status.add_argument("--format", choices=("text", "json"), default="text")
    validate = add("validate", _validate, "check a configuration, on any machine")
    validate.add_argument("file", metavar="FILE", help="a document, a cloud-config or an Ignition")
    plan = add("plan", _plan, "print what a host would get, without touching it")
    plan.add_argument("file", metavar="FILE", help="a document, a cloud-config or an Ignition")
    plan.add_argument("--role", choices=("master", "node"), default="master")
    plan.add_argument("--format", choices=("text", "yaml", "json"), default="text")
    plan.add_argument("--name", default="host-1", help="the host's name (host-1)")
    plan.add_argument("--address", default="192.0.2.11", help="its IP address (192.0.2.11)")
    add("token", _token, "make a token for a new document")
    admit = add("admit", _admit, "on the master: let late hosts in, by a one-time token")
    admit.add_argument("--hosts", type=_count, default=1, help="how many (1)")
    admit.add_argument("--window", type=_duration, default=3600.0, help="for how long (1h)")
    join = add("join", _join, "on a late host: join by the one-time token, read from stdin")
    seal = add("seal", _seal, "make this machine ready to become an image of which hosts boot")
    seal.add_argument("--force", action="store_true", help="even if it is a cluster's member")
    timeline = add("timeline", _timeline, "tell how long each phase took on this host")
    replay = add("replay", _replay, "run a recorded history through the core again")
    replay.add_argument("file", metavar="FILE", help="a history.jsonl from /var/lib/firstboot")
    text = "system containers: install, update, roll back, remove, list, check"
    group = verbs.add_parser("containers", help=text, description=text)
    container_verbs.declare(group, lambda line: print(line, flush=True))  # some take minutes
    for sub in (run, status, admit, join, seal, timeline):
        sub.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    import argparse

    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= MAX_HOSTS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_HOSTS}")
    return int(text)


def _duration(text: str) -> float:
    import argparse

    from firstboot import userdata

    try:
        seconds = userdata.seconds(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_WINDOW:
        raise argparse.ArgumentTypeError("must be a duration up to 30d, such as 1h")
    return seconds


# ---------------------------------------------------------------- verbs


def _run(root: Path) -> int:
    if _done(root):
        return OK
    gc.disable()  # what is made on the way to the network is no garbage; looking costs 5 %
    try:
        with late_patterns():
            from firstboot import service

        return service.run(root)
    finally:
        gc.enable()


def _done(root: Path) -> bool:
    """Whether this host was done before; what is left to do at its later boots is done then."""
    state = root / "var/lib/firstboot"
    if not (state / "complete").exists() and not (state / "sealing").exists():
        return False  # without loading anything: every host's first boot goes this way
    from firstboot import afterwards

    return afterwards.run(root)


def _run_as_told(options: argparse.Namespace) -> int:
    root: Path = options.root
    return _run(root)


def _status(options: argparse.Namespace) -> int:
    from firstboot import words

    dots = options.wait and options.format == "text" and sys.stderr.isatty()
    while True:
        shown = words.current(options.root)
        code = words.exit_code(shown)
        if not options.wait or code != WAITING or not words.may_change(shown):
            break
        if dots:
            print(".", end="", file=sys.stderr, flush=True)
        time.sleep(0.25)
    if dots:
        print(file=sys.stderr)
    text = json.dumps(shown, indent=2, sort_keys=True) if options.format == "json" else None
    print(text or words.page(shown))
    return code


def _validate(options: argparse.Namespace) -> int:
    from firstboot import userdata

    path = Path(options.file)
    data = userdata.read_file(path, options.file)
    if data is None:
        raise UserError("there is no such file", where=options.file, code=USAGE)
    document = userdata.parse(data, options.file)
    for warning in document.warnings:
        print(f"warning: {warning}")
    if not document.token.reveal():
        print("warning: the token was removed when the admission of this file's host closed")
    config = document.config
    print(
        f"{options.file}: valid: cluster {config.cluster}, expect {config.expect},"
        f" masters {config.masters}, payload {config.payload}"
    )
    return OK


def _plan(options: argparse.Namespace) -> int:
    from firstboot import preview, userdata
    from firstboot.protocol.model import Role

    data = userdata.read_file(Path(options.file), options.file)
    if data is None:
        raise UserError("there is no such file", where=options.file, code=USAGE)
    document = userdata.parse(data, options.file)
    shown = preview.preview(document, Role(options.role), options.name, options.address)
    print(preview.text(shown, options.format))
    return OK


def _token(_options: argparse.Namespace) -> int:
    from firstboot import userdata

    print(userdata.make_token())
    return OK


def _admit(options: argparse.Namespace) -> int:
    from firstboot import admission

    def say(text: str) -> None:
        print(text, flush=True)

    return admission.admit(options.root, options.hosts, options.window, say)


def _join(options: argparse.Namespace) -> int:
    from firstboot import admission

    if sys.stdin.isatty():
        import getpass

        text = getpass.getpass("One-time token: ")
    else:
        text = sys.stdin.buffer.readline(MAX_LINE).decode(errors="replace")
    print(admission.join(options.root, text.strip()))
    return OK


def _seal(options: argparse.Namespace) -> int:
    from firstboot import seal

    seal.seal(options.root, force=options.force, say=lambda line: print(line, flush=True))
    return OK


def _timeline(options: argparse.Namespace) -> int:
    from firstboot import words

    print(words.timeline(words.current(options.root)))
    return OK


def _replay(options: argparse.Namespace) -> int:
    from firstboot import replay

    try:
        # What is not UTF-8 is not ours either: the line it is in will be named.
        with Path(options.file).open(encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UserError(reason, where=options.file, code=USAGE) from None
    for line in replay.replay(lines):
        print(line)
    return OK
