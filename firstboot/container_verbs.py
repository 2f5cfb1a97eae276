"""The verbs of ``firstboot containers``, named as Atomic's operators know them.

What is on disk is `containers`' part, what runs is `units`'; here the two come together. With a
root other than this host's own nothing is enabled, stopped or started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstboot.container_units import Units, UpdateFailed, finish, prove
from firstboot.protocol.errors import FirstbootError, LocalError, UserError

if TYPE_CHECKING:
    from firstboot.containers import Container

Say = Callable[[str], None]
OK, FAILED, USAGE = 0, 1, 64
LONGEST_PASSWORD = 4096
SYSTEM_PACKAGE = ("auto", "build", "no", "yes")
COLUMNS = ("container", "image", "command", "created", "state", "backend", "runtime")


def declare(parser: argparse.ArgumentParser, say: Say) -> None:
    """Add the verbs to `parser`; `say` prints a line."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(verb: Callable[[argparse.Namespace, Say], int], text: str) -> argparse.ArgumentParser:
        name = verb.__name__.strip("_")
        sub: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=lambda options: verb(options, say))
        sub.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
        return sub

    install = add(_install, "install a system container and enable its unit; it is not started")
    install.add_argument("image", metavar="IMAGE")
    install.add_argument("--name", help="the image's own name if none is given")
    install.add_argument("--rootfs", type=Path, help="use this root file system, where it lies")
    install.add_argument("--system-package", choices=SYSTEM_PACKAGE, default="auto")
    install.add_argument("--display", action="store_true", help="tell what would be done")
    install.add_argument("--system", action="store_true", help=argparse.SUPPRESS)
    update = add(_update, "change to the image as it is now, or to other values")
    update.add_argument("name", metavar="NAME", nargs="?")
    update.add_argument("--rebase", metavar="IMAGE", help="change to another image")
    update.add_argument("--all", action="store_true", help="every container")
    for sub in (install, update):
        sub.add_argument("--set", metavar="NAME=VALUE", action="append", default=[])
        sub.add_argument("--runtime", help="runc, crun or a path")
    pull = add(_pull, "fetch an image for a later update")
    pull.add_argument("image", metavar="IMAGE")
    for sub in (install, update, pull):
        sub.add_argument("--authfile", type=Path, metavar="FILE", help="passwords for registries")
        sub.add_argument(
            "--src-creds", metavar="USER", help="log in to the registry; asks for the password"
        )
    for verb, text in (
        (_rollback, "change back to the deployment before; again, and it is forth"),
        (_uninstall, "stop and remove a container; images and its own data stay"),
        (_info, "tell everything about a container"),
    ):
        add(verb, text).add_argument("name", metavar="NAME")
    add(_finish, "end updates that a power cut interrupted; done at boot")
    listing = add(_list, "tell which containers run; with --all, which there are")
    listing.add_argument("-a", "--all", action="store_true")
    listing.add_argument("--json", action="store_true")
    listing.add_argument("--no-trunc", action="store_true", help="do not cut columns short")
    listing.add_argument("-f", "--filter", metavar="COLUMN=VALUE", action="append", default=[])
    add(_lint, "check the sources of a container's image").add_argument("directory", metavar="DIR")


# ---------------------------------------------------------------- verbs


def _install(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers

    values = _values(options.set)
    name = options.name or containers.default_name(options.image)
    if options.display:
        say(f"{options.image} would be installed as {name}; nothing was done.")
        return OK
    if options.system_package == "build":
        return _build(options, name, values, say)
    host = Units(options.root)
    present = containers.info(options.root, name)

    with _logged_in(options, options.image) as authfile:
        done = containers.install(
            options.root,
            name,
            options.image,
            values,
            options.runtime,
            replace=False,
            rootfs=options.rootfs,
            enable=host.enable,
            authfile=authfile,
            package=options.system_package,
        )
    if present or not (done.changed or done.ran):
        say(f"{name} already present")
        if done.changed:
            host.reload()
        return OK
    _tell(done.messages, say)
    if not done.ran:
        _tell_created(done.container, say)
    return OK


def _build(options: argparse.Namespace, name: str, values: dict[str, str], say: Say) -> int:
    from firstboot import containers

    if options.rootfs:
        raise UserError(
            "--system-package=build packages the image's files: it takes no --rootfs", code=USAGE
        )
    with _logged_in(options, options.image) as authfile:
        made = containers.build(
            options.root,
            name,
            options.image,
            values,
            options.runtime,
            Path.cwd(),
            authfile=authfile,
        )
    say(f"Created file {made}")
    return OK


def _update(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers
    from firstboot.containers import trial

    values = _values(options.set)
    if bool(options.name) == options.all or (options.all and options.rebase):
        raise UserError(
            "update takes one NAME, or --all without --rebase", hint="see --help", code=USAGE
        )
    if options.src_creds and not options.rebase:
        raise UserError("update needs --src-creds only with --rebase", code=USAGE)
    with trial.alone(options.root), _logged_in(options, options.rebase or "") as authfile:
        options.authfile = authfile
        if options.name:
            _update_one(options, options.name, values, say)
            return OK
        names = [c.name for c in containers.installed(options.root) if not c.preinstalled]
        return _each(names, lambda name: _update_one(options, name, values, say), say)


def _each(names: list[str], act: Callable[[str], None], say: Say) -> int:
    """Do it to all, also after one has failed."""
    failed = 0
    for name in names:
        try:
            act(name)
        except FirstbootError as error:
            say(f"{name}: {error}")
            failed += 1
    return FAILED if failed else OK


def _update_one(options: argparse.Namespace, name: str, values: dict[str, str], say: Say) -> None:
    from firstboot import containers
    from firstboot.containers import trial

    host = Units(options.root)
    unit = f"{name}.service"
    if finish(host, name):
        say(f"{name}: an update that was interrupted has come up")
    with host.brought_back(unit):
        done = containers.update(
            options.root,
            name,
            values,
            image=options.rebase,
            runtime=options.runtime,
            stop=partial(host.stop, unit),
            authfile=options.authfile,
        )
        host.reload()
    if not done.changed:
        say(f"{name}: Latest version already installed.")
        return
    say(f"Extracting to {done.container.deployment}")
    _tell(done.messages, say)
    if not done.replaced:
        host.stop(unit)  # an interrupted update was completed under a unit that runs again
    if not host.stopped:
        trial.end(options.root, name)
        say(f"{name}: updated; it was not running and was not started")
        return
    try:
        prove(host, name)
    except UpdateFailed:
        say(f"Could not restart {name}.  Attempt automatic rollback")
        raise
    say(f"{name}: updated and restarted")


def _finish(options: argparse.Namespace, say: Say) -> int:
    from firstboot.containers import trial

    def act(name: str) -> None:
        if finish(Units(options.root), name):
            say(f"{name}: its update, which was interrupted, has come up")

    with trial.alone(options.root):
        return _each(trial.names(options.root), act, say)


def _rollback(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers
    from firstboot.containers import trial

    host, unit = Units(options.root), f"{options.name}.service"
    with trial.alone(options.root):
        with host.brought_back(unit):
            done = containers.rollback(options.root, options.name, stop=partial(host.stop, unit))
            host.reload()
        _tell(done.messages, say)
        if host.stopped:
            host.start(unit)
    say(f"{options.name}: rolled back to {done.container.deployment}")
    return OK


def _uninstall(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers

    found = containers.info(options.root, options.name)
    host, unit = Units(options.root), f"{options.name}.service"
    if found and not found.preinstalled and found.unit:
        host.remove(unit)
    done = containers.uninstall(options.root, options.name)
    if not done.found:
        raise LocalError(f"{options.name} is not installed")
    host.reload()
    _tell(done.messages, say)
    return OK


def _pull(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers

    with _logged_in(options, options.image) as authfile:
        say(containers.pull(options.root, options.image, authfile=authfile))
    return OK


def _info(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers

    found = containers.info(options.root, options.name)
    if found is None:
        raise LocalError(f"{options.name} is not installed")
    shown = {
        **_row(found, Units(options.root).state(found)),
        "deployment": found.deployment,
        "previous": found.previous,
        "preinstalled": found.preinstalled,
        "unit": found.unit,
        "tmpfiles": found.tmpfiles,
        "installed_files": list(found.files),
        "values": dict(found.values),
    }
    say(json.dumps(shown, indent=4))
    return OK


def _list(options: argparse.Namespace, say: Say) -> int:
    from firstboot import containers

    host = Units(options.root)
    rows = [_row(c, host.state(c)) for c in containers.installed(options.root)]
    for wanted in options.filter:
        column, equals, value = wanted.partition("=")
        key = {"container": "name", "image": "image_name"}.get(column, column)
        if not equals or column not in COLUMNS:
            raise UserError(f"--filter takes COLUMN=VALUE, not {wanted!r}", code=USAGE)
        rows = [row for row in rows if str(row[key]) == value]
    if not options.all:
        rows = [row for row in rows if row["running"]]
    if options.json:
        say(json.dumps(rows))
    else:
        for line in _table(rows, 0 if options.no_trunc else 20):
            say(line)
    return OK


def _lint(options: argparse.Namespace, say: Say) -> int:
    from firstboot.containers.lint import lint

    found = lint(Path(options.directory))
    for finding in found:
        say(str(finding))
    errors = sum(finding.error for finding in found)
    say(f"errors: {errors}, warnings: {len(found) - errors}")
    return FAILED if errors else OK


@contextmanager
def _logged_in(options: argparse.Namespace, image: str) -> Iterator[Path | None]:
    """The file with the password for `image`, None if none was asked for."""
    user = options.src_creds
    if not user:
        yield options.authfile
        return
    from firstboot.containers import credentials
    from firstboot.containers.image import DEFAULT_REGISTRY, registry

    if options.authfile or ":" in user:
        raise UserError(
            "--src-creds takes the user's name only, and no --authfile beside it",
            hint="the password is read from standard input: everybody may read a command line",
            code=USAGE,
        )
    where = registry(image)
    if where is None:
        raise UserError(f"{image} is from no registry: it needs no --src-creds", code=USAGE)
    with credentials.written(where or DEFAULT_REGISTRY, user, _password(user)) as path:
        yield path


def _password(user: str) -> str:
    if sys.stdin.isatty():
        from getpass import getpass

        found = getpass(f"password of {user}: ")
    else:
        found = sys.stdin.readline(LONGEST_PASSWORD).rstrip("\n")
    if not found:
        raise UserError(
            "--src-creds reads a password from standard input; there is none", code=USAGE
        )
    return found


# ---------------------------------------------------------------- words


def _values(given: list[str]) -> dict[str, str]:
    for item in given:
        if "=" not in item:
            raise UserError(f"--set takes NAME=VALUE, not {item!r}", code=USAGE)
    return dict(item.split("=", 1) for item in given)


def _tell(messages: tuple[str, ...], say: Say) -> None:
    for message in messages:
        say(message)


def _tell_created(container: Container, say: Say) -> None:
    say(f"Extracting to {container.deployment}")  # by this word callers tell that it changed
    units = [f"/etc/systemd/system/{container.unit}"] if container.unit else []
    for path in (*container.files, *units, container.tmpfiles):
        if path:
            say(f"Created file {path}")


def _row(container: Container, state: str) -> dict[str, Any]:
    """The keys that readers of ``atomic containers list --json`` know."""
    return {
        "id": container.name,
        "image_id": container.image_id,
        "image_name": container.image,
        "name": container.name,
        "command": container.command,
        "created": container.created,
        "state": state,
        "backend": "ostree",
        "runtime": container.runtime,
        "vulnerable": False,
        "running": state == "running",
    }


def _table(rows: list[dict[str, Any]], width: int) -> Iterator[str]:
    shown: list[tuple[str, ...]] = [tuple(name.upper() for name in COLUMNS)]
    for row in rows:
        moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["created"]))
        made = {**row, "container": row["name"], "image": row["image_name"], "created": moment}
        shown.append(tuple(str(made[name])[: width or None] for name in COLUMNS))
    widths = [max(len(cells[column]) for cells in shown) for column in range(len(COLUMNS))]
    for cells in shown:
        yield "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
