"""Hosts as processes: the real ``firstboot run`` in network namespaces, each with its own root.

Real sockets, TLS, mDNS and fsync; no systemd, so the payload is ``none``. A host that dies is
started again by the test, as systemd would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.machines.document import document
from tests.network.rig import Network
from tests.network.run import wait_until

PROJECT = Path(__file__).parents[2]
QUICK = "{grace: 5s}"  # for as long the master stays when all are in


class Host:
    """One namespace's host: its files under `root`, its process while it runs."""

    program: tuple[str, ...] = ("-m", "firstboot")  # what Python runs

    def __init__(self, network: Network, number: int, root: Path) -> None:
        self.network, self.number, self.root = network, number, root
        self.address = network.chosen(number)
        self.process: subprocess.Popen[str] | None = None
        self.environment: dict[str, str] = {}  # beside the test's own
        self.wrapper: tuple[str, ...] = ()  # what runs Python, if not the shell
        (root / "etc/firstboot").mkdir(parents=True)
        (root / "etc/machine-id").write_text(f"{number:032x}\n")
        (root / "run").mkdir()

    def configure(self, text: str) -> None:
        """Write its document, as cloud-init would."""
        path = self.root / "etc/firstboot/config.yaml"
        path.write_text(text)
        path.chmod(0o600)

    def start(self) -> None:
        """Start firstboot."""
        with (self.root / "log").open("a") as log:
            self.process = self.network.popen(
                self.number,
                *(*self.wrapper, sys.executable, *self.program),
                *("run", "--root", self.root),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=PROJECT,
                env={**os.environ, **self.environment},
            )

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self, stopped: bool) -> None:
        """SIGSTOP, or SIGCONT."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    @property
    def status(self) -> dict[str, Any]:
        """Its public status, empty while there is none."""
        try:
            shown: dict[str, Any] = json.loads(
                (self.root / "run/firstboot/status.json").read_text()
            )
        except FileNotFoundError:
            return {}
        return shown

    @property
    def state(self) -> str:
        """`running` and the like."""
        return str(self.status.get("state", ""))

    @property
    def log(self) -> str:
        """What it said so far."""
        return (self.root / "log").read_text()


class Hosts:
    """`count` hosts on one network with one document; `overrides` for those with another.

    `ip` is the network's, see `Network`.
    """

    def __init__(
        self,
        count: int,
        directory: Path,
        text: str = "",
        overrides: Mapping[int, str] | None = None,
        ip: str = "4",
    ) -> None:
        self.network = Network(count, ip=ip)
        text = text or document(count, payload="none", election=QUICK)
        self.all = [Host(self.network, n, directory / f"h{n}") for n in self.network.hosts]
        for host in self.all:
            host.configure((overrides or {}).get(host.number, text))

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.all:
            host.kill()
        self.network.owner.close()

    def __getitem__(self, number: int) -> Host:
        return self.all[number - 1]

    def start(self, *numbers: int) -> None:
        """Start these hosts, or all."""
        for host in self._chosen(numbers):
            host.start()

    def wait_running(self, *numbers: int, timeout: float = 60) -> None:
        """Until these hosts, or all, run their role."""
        chosen = self._chosen(numbers)

        def running() -> bool:
            return all(h.state == "running" for h in chosen)

        try:
            wait_until(running, timeout, "every host runs its role")
        except TimeoutError as error:
            for host in chosen:
                error.add_note(f"host {host.number} {host.status}\n{host.log[-2000:]}")
            raise

    def clusters(self, *numbers: int) -> set[str]:
        """The cluster ids these hosts hold."""
        return {h.status["cluster_id"] for h in self._chosen(numbers)}

    def masters(self, *numbers: int) -> int:
        """How many of them are master."""
        return sum(h.status["role"] == "master" for h in self._chosen(numbers))

    def _chosen(self, numbers: tuple[int, ...]) -> list[Host]:
        return [self[n] for n in numbers] if numbers else self.all
