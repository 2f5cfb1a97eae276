"""A host as the campaign treats it, and what systemd would do about that."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from tests.network.hosts import Host
from tests.network.rig import Network

RESTART = 1.0  # seconds after which a process that ended by itself is started again


class Chaotic(Host):
    """A host that is killed, stopped, wiped and moved."""

    def __init__(self, network: Network, number: int, root: Path) -> None:
        super().__init__(network, number, root)
        self.up = False  # whether systemd would have it running
        self.gone = False  # for good
        self.started = 0.0  # Unix time
        self.wiped = 0
        self.exits: list[str] = []

    @property
    def complete(self) -> bool:
        """Whether firstboot is done here and systemd would not start it any more."""
        return (self.root / "var/lib/firstboot/complete").exists()

    def start(self) -> None:
        self.up = True
        if not self.complete:
            self.started = time.time()
            super().start()

    def kill(self) -> None:
        self.up = False
        super().kill()

    def wipe(self, aside: Path) -> None:
        """Lose the disk: the next start is a new host's. What was on it is kept in `aside`."""
        aside.mkdir(parents=True)
        for name in ("var", "run", "log"):
            if (self.root / name).exists():
                shutil.move(self.root / name, aside / name)
        (self.root / "run").mkdir()
        shutil.rmtree(self.root / "etc/firstboot/pki", ignore_errors=True)
        self.wiped += 1
        (self.root / "etc/machine-id").write_text(f"{self.wiped:016x}{self.number:016x}\n")

    def look(self) -> None:
        """Note a process that ended by itself, and start it again."""
        if not self.up or self.process is None or self.process.poll() is None:
            return
        if not self.complete or self.process.returncode != 0:
            self.exits.append(f"host {self.number} exited with {self.process.returncode}")
        if not self.complete and time.time() > self.started + RESTART:
            self.start()

    @property
    def says(self) -> dict[str, Any]:
        """The status of the process that runs now, or of one that was done; else empty."""
        try:
            path = self.root / "run/firstboot/status.json"
            fresh = path.stat().st_mtime >= self.started
            return self.status if fresh else {}
        except FileNotFoundError:
            return {}

    @property
    def runs(self) -> bool:
        """Whether it runs its role."""
        return bool(self.says.get("stage") == "running")

    @property
    def alive(self) -> bool:
        """Whether there is a process to be killed or stopped."""
        return self.up and self.process is not None and self.process.poll() is None
