"""Makes one step of a role's plan true: files, containers, units, gates.

Every deed may be done again. What a step changed under a unit that runs already is remembered
until that unit's turn to start comes, and then it is restarted.
"""

from __future__ import annotations

import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from firstboot import host
from firstboot.protocol import plan
from firstboot.protocol.errors import LocalError

if TYPE_CHECKING:  # what only a role with units needs is loaded when it does: 15 ms
    from firstboot import units

TARGET = "firstboot.target"
PLACES = ("@{hosts}", "@{inventory}")  # credentials that change with every member
MANY = 1 << 30
FIRST_TOLD, TOLD_AGAIN = 1.0, 5.0  # seconds after which a gate's reason is told, and another one
DROP_IN = f"etc/systemd/system/{TARGET}.d/10-role.conf"
CREDENTIAL = re.compile(r"@\{(?P<how>base64:)?(?P<name>[a-z0-9.-]{1,64})\}")


class Deeds:
    """The adapters a role needs, below `root`.

    `credential` gives the bytes of a credential by name; `cluster` names the cluster, for what
    must not be mistaken for another one's.
    """

    def __init__(
        self,
        root: Path,
        directory: host.StateDirectory,
        credential: Callable[[str], bytes],
        cluster: Callable[[], str],
    ) -> None:
        self.root, self.directory = root, directory
        self._credential, self._cluster = credential, cluster
        self._systemd: units.Systemd | None = None
        self._cancelled = threading.Event()
        self._replaced: set[str] = set()  # units whose container or file changed under them
        self._installs: dict[str, plan.InstallContainer] = {}  # by unit, as they were last done
        self._undone: set[str] = set()  # units whose container was rolled back
        self._writing = threading.Lock()  # the founding master learns of members meanwhile
        self.gate = ""  # why the health gate that is waited at is still shut
        self.gate_told: Callable[[], None] = lambda: None  # called when that changes, in a thread

    def run(self, step: plan.Step) -> None:
        """Make it true; FirstbootError, perhaps with a `detail`, if that fails."""
        match step:
            case plan.MakeDirectory():
                self._make_directory(step)
            case plan.WriteFile():
                self._write_file(step)
            case plan.WriteBlock():
                self._write_block(step)
            case plan.MakeLink():
                host.make_link(self.root / step.path[1:], step.target)
            case plan.SetKernel():
                self._set_kernel(step)
            case plan.UseResolver():
                self._use_resolver(step)
            case plan.InstallContainer():
                self._install(step)
            case plan.StartUnit():
                self._start_unit(step)
            case plan.Probe():
                self._probe(step)
            case plan.CreateObject():
                from firstboot import health

                health.create(step, self.root, self._filled(step.content))
            case plan.ReachTarget():
                self._reach_target(step.units)

    def tell_places(self, steps: Iterable[plan.Step]) -> None:
        """There is a new member: write what names all of them again. Any thread may call this."""
        for step in steps:
            match step:
                case plan.WriteBlock() | plan.WriteFile() if _names_places(step.content):
                    self.run(step)

    def cancel(self) -> None:
        """End whatever step is under way: the process was told to stop."""
        self._cancelled.set()
        if self._systemd is not None:
            self._systemd.cancel()

    def _probe(self, step: plan.Probe) -> None:
        from firstboot import health

        try:
            health.wait(step, self.root, self._cancelled, self._teller(step.unit))
        except health.ProbeFailed as error:
            if step.unit and not self._cancelled.is_set():
                error.detail = self.systemd.log(step.unit)
            raise
        finally:
            self._tell_gate("")

    def _teller(self, unit: str) -> Callable[[str], None]:
        """What a gate does after a try in vain: say why, and look whether `unit` stays up.

        It raises UnitFailed when the unit has failed as often as one that is started may.
        """
        from firstboot.units import PATIENCE

        due = time.monotonic() + FIRST_TOLD
        before = self.systemd.ailing(unit, MANY)[0] if unit else 0
        known = before
        failure: units.UnitFailed | None = None

        def tried(reason: str) -> None:
            nonlocal due, known, failure
            if time.monotonic() < due:
                return
            if unit:
                known, newest = self.systemd.ailing(unit, known)
                if newest is not None and (failure is None or newest.result != "again"):
                    failure = newest
                if failure is not None and known >= before + PATIENCE:
                    raise failure
            said = [reason] + ([str(failure), *failure.log[-1:]] if failure is not None else [])
            if (text := "; ".join(said)) != self.gate:
                due = time.monotonic() + TOLD_AGAIN
                self._tell_gate(text)

        return tried

    def _tell_gate(self, text: str) -> None:
        if text != self.gate:
            self.gate = text
            self.gate_told()

    def _make_directory(self, step: plan.MakeDirectory) -> None:
        path, claim = self.root / step.path[1:], f"claims/{step.path[1:].replace('/', '-')}"
        if step.claim and self.directory.get(claim) != self._cluster().encode():
            if host.holds_anything(path):
                raise LocalError(f"{path} holds data of an earlier cluster; move it away")
            self.directory.put(claim, self._cluster().encode())
        host.use_directory(path, step.mode)

    def _start_unit(self, step: plan.StartUnit) -> None:
        if step.ports and self.systemd.state(step.unit).active in ("inactive", "failed"):
            for at in step.ports:
                address, _, port = at.rpartition(":")
                owner = host.taken(address.strip("[]"), int(port))
                if owner:
                    raise LocalError(f"port {port} is taken by {owner}")
        if step.unit in self._undone:  # the old one serves meanwhile; what is asked for is the new
            self._install(self._installs[step.unit])
        self.systemd.enable(step.unit)
        restart = step.unit in self._replaced
        if step.unit in self._installs and self._on_trial(step.unit):
            self._prove(step)
        else:
            self.systemd.start(step.unit, deadline=step.deadline, restart=restart)
        self._replaced.discard(step.unit)

    def _install(self, step: plan.InstallContainer) -> None:
        from firstboot import containers

        done = containers.install(self.root, step.name, step.image, dict(step.values))
        unit = done.container.unit
        if done.replaced:
            self._replaced.add(unit)
        self._installs[unit] = step
        self._undone.discard(unit)
        self.systemd.reload()  # always: a crash may have come between install and this

    def _on_trial(self, unit: str) -> bool:
        from firstboot.containers import trial

        return trial.before(self.root, self._installs[unit].name) is not None

    def _prove(self, step: plan.StartUnit) -> None:
        """Change a unit over to what replaced its container; if that fails, roll back."""
        from firstboot import container_units
        from firstboot.containers import trial

        units = container_units.Units(self.root, self.systemd)
        try:
            with trial.alone(self.root):
                name = self._installs[step.unit].name
                container_units.prove(units, name, step.deadline, restart=True)
        except container_units.UpdateFailed:
            self._replaced.discard(step.unit)
            self._undone.add(step.unit)
            raise

    def _write_file(self, step: plan.WriteFile) -> None:
        where = self.root / step.path[1:]
        if step.keep and where.exists():  # a link that leads nowhere is nothing to keep
            return
        with self._writing:
            content = self._content(step)
            if step.restarts and not _holds(where, content):
                self._replaced.add(step.restarts)
            self._write(step.path[1:], content, step.mode)

    def _write_block(self, step: plan.WriteBlock) -> None:
        with self._writing:
            host.write_block(self.root / step.path[1:], self._filled(step.content).decode())

    def _set_kernel(self, step: plan.SetKernel) -> None:
        path = self.root / "proc/sys" / step.key.replace(".", "/")
        if self.root != Path("/"):
            return  # a tree under test, or an image being made: not this kernel's business
        try:
            if path.read_text().strip() != step.value:
                path.write_text(step.value)
        except OSError as error:
            raise LocalError(f"{path}: {error.strerror}") from None

    def _use_resolver(self, step: plan.UseResolver) -> None:
        saved, servers = self.root / step.saved[1:], self.root / step.servers[1:]
        if host.use_resolver(self.root, step.address, step.search, saved, servers):
            self._replaced.add(step.restarts)

    def _write(self, path: str, content: bytes, mode: int) -> None:
        where = self.root / path
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalError(f"cannot make {where.parent}: {error.strerror}") from None
        host.write_durably(where, content, mode)

    def _content(self, step: plan.WriteFile) -> bytes:
        return self._credential(step.credential) if step.credential else self._filled(step.content)

    def _filled(self, text: str) -> bytes:
        """A step's content with this host's credentials in it."""

        def put_in(found: re.Match[str]) -> str:
            secret = self._credential(found["name"])
            return (b64encode(secret) if found["how"] else secret).decode()

        return CREDENTIAL.sub(put_in, text).encode()

    @property
    def systemd(self) -> units.Systemd:
        """systemd's manager, connected when first needed."""
        if self._systemd is None:
            from firstboot import units

            self._systemd = units.Systemd()
        return self._systemd

    def _reach_target(self, names: tuple[str, ...]) -> None:
        if self.root != Path("/"):
            return  # a tree under test, or an image being made: no systemd of ours runs there
        lines = ["[Unit]", *(f"{key}={name}" for name in names for key in ("Requires", "After"))]
        self._write(DROP_IN, "\n".join([*lines, ""]).encode(), 0o644)
        self.systemd.reload()
        self.systemd.enable(TARGET)
        self.systemd.start(TARGET, deadline=60.0)


def _names_places(content: str) -> bool:
    return any(name in content for name in PLACES)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
