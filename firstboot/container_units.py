"""What ``firstboot containers`` does with units: reload, stop, start, and see that they stay up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from firstboot.protocol.errors import LocalError

if TYPE_CHECKING:
    from firstboot.containers import Container
    from firstboot.units import Systemd

START_SECONDS = STOP_SECONDS = 120.0
# A unit of Type=simple is active before its program has done anything: the time it must stay so.
SETTLE_SECONDS = 3.0
LOOK_SECONDS = 0.1


@dataclass
class Units:
    """The units of the host at `root`; `stopped` says whether `stop` had anything to stop."""

    root: Path
    stopped: bool = field(default=False, init=False)

    @cached_property
    def systemd(self) -> Systemd | None:
        """This host's systemd; None for a tree, whose units nobody runs."""
        if self.root != Path("/"):
            return None
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

    def start(self, unit: str) -> None:
        """Start `unit` and see that it stays; an error says why it does not."""
        if self.systemd is None:
            return
        self.systemd.start(unit, START_SECONDS)
        first = self.systemd.state(unit)
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            now = self.systemd.state(unit)
            if (now.active, now.active_wall) != (first.active, first.active_wall):
                raise LocalError(f"{unit} did not stay up: {now.active} ({now.result})")

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
