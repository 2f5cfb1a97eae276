"""What is done with containers' units: reload, stop, start, see that they stay up or roll back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from firstboot.protocol.errors import FirstbootError, LocalError

if TYPE_CHECKING:
    from firstboot.containers import Container
    from firstboot.units import Systemd

START_SECONDS = STOP_SECONDS = 120.0
# A unit of Type=simple is active before its program has done anything: the time it must stay so.
SETTLE_SECONDS = 3.0
LOOK_SECONDS = 0.1


class UpdateFailed(LocalError):
    """What replaced a container did not come up; `detail` are its last words."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail


@dataclass
class Units:
    """The units of the host at `root`; `stopped` says whether `stop` had anything to stop.

    `manager` is that host's systemd if the caller has it already.
    """

    root: Path
    manager: Systemd | None = None
    stopped: bool = field(default=False, init=False)

    @cached_property
    def systemd(self) -> Systemd | None:
        """This host's systemd; None for a tree, whose units nobody runs."""
        if self.manager or self.root != Path("/"):
            return self.manager
        from firstboot import units

        return units.Systemd()

    def reload(self) -> None:
        """Have systemd read all units again."""
        if self.systemd:
            self.systemd.reload()

    def state(self, container: Container) -> str:
        """As ``atomic containers list`` says it."""
        if not container.unit:
            return "no service"
        active = self.systemd.state(container.unit).active if self.systemd else "inactive"
        return {"active": "running", "failed": "failed"}.get(active, "inactive")

    def stop(self, unit: str) -> None:
        """Stop `unit` if it runs, or is about to."""
        if self.systemd and self.systemd.state(unit).active not in ("inactive", "failed"):
            self.stopped = True
            self.systemd.stop(unit, STOP_SECONDS)

    def remove(self, unit: str) -> None:
        """Stop `unit` and have it not started at boot."""
        if self.systemd:
            self.systemd.stop(unit, STOP_SECONDS)
            self.systemd.disable(unit)

    def enable(self, container: Container) -> None:
        """Have a new container's unit started at boot."""
        self.reload()
        if container.unit and self.systemd:
            self.systemd.enable(container.unit)

    def start(self, unit: str, seconds: float = START_SECONDS, *, restart: bool = False) -> None:
        """Start `unit` and see that it stays; an error says why it does not."""
        if self.systemd is None:
            return
        self.systemd.start(unit, seconds, restart=restart)
        first = self.systemd.state(unit)
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            now = self.systemd.state(unit)
            if (now.active, now.active_wall) != (first.active, first.active_wall):
                raise LocalError(f"{unit} did not stay up: {now.active} ({now.result})")

    def wanted(self, unit: str) -> bool:
        """Whether `unit` runs, has failed to, or is started at boot."""
        if self.systemd is None:
            return False
        return self.systemd.state(unit).active != "inactive" or self.systemd.is_enabled(unit)

    def brought_back(self, unit: str) -> BroughtBack:
        """A block at whose failure `unit` is started again if it was stopped in it."""
        return BroughtBack(self, unit)


@dataclass(frozen=True)
class BroughtBack:
    """See `Units.brought_back`."""

    units: Units
    unit: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error and self.units.stopped and self.units.systemd:
            self.units.reload()
            self.units.systemd.start(self.unit, START_SECONDS)


def prove(
    units: Units, name: str, seconds: float = START_SECONDS, *, restart: bool = False
) -> None:
    """Start what replaced container `name`; if it does not stay up, roll back, and say so.

    When systemd cannot be asked, or the caller was told to end, nothing is known of the container:
    it stays on trial.
    """
    from firstboot.containers import trial
    from firstboot.units import SystemdFailed

    try:
        units.start(f"{name}.service", seconds, restart=restart)
    except SystemdFailed:
        raise
    except FirstbootError as error:
        _undo(units, name, error)
    trial.end(units.root, name)


def _undo(units: Units, name: str, failure: FirstbootError) -> None:
    from firstboot import containers

    unit = f"{name}.service"
    try:
        containers.rollback(units.root, name, stop=partial(units.stop, unit))
        units.reload()
        units.start(unit)
    except FirstbootError as error:
        words = f"did not come up ({failure}), nor did the rollback: {error}"
    else:
        words = f"did not come up and was rolled back: {failure}"
    raise UpdateFailed(f"the update of {name} {words}", getattr(failure, "detail", "")) from None


def finish(units: Units, name: str) -> bool:
    """End an update of `name` that was cut short: it comes up now, or is rolled back (`prove`).

    False if there was none. A unit that neither runs nor is started at boot is left as it is.
    """
    from firstboot import containers
    from firstboot.containers import trial

    done = containers.resume(units.root, name)
    if done is None:
        return False
    units.reload()
    unit = f"{name}.service"
    if not units.wanted(unit):
        trial.end(units.root, name)
    elif done.replaced:
        prove(units, name, restart=done.needs_reload)
    else:
        units.start(unit, restart=done.needs_reload)
    return True
