"""Starts and steers a double of a cloud from a test.

In a test of one process::

    with Double("ec2", instances=[Instance("127.0.0.1")]) as cloud:
        cloud.urls["api"], cloud.urls["metadata"]
        cloud.tell(faults={"api": "throttled"})

For hosts or machines on a rig's network, at the address clouds have::

    at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:5000"}
    with Double("ec2", on=network, **at, instances=[Instance(network.address(1)), ...]): ...

With `tls` and the API at port 443 a document needs no `endpoint`: hosts then must resolve
``ec2.eu-west-1.amazonaws.com`` to `METADATA` (/etc/hosts) and trust the authority (append it to
/etc/ssl/certs/ca-certificates.crt). `user_data` is what cloud-init's own datasources Ec2 and
OpenStack find there.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from firstboot.discovery.interface import Provider, ProviderReport
from firstboot.protocol.model import Endpoint
from tests.clouds.instances import Instance
from tests.network.rig import METADATA, Network

__all__ = ["METADATA", "Double", "Instance", "look"]
PROJECT = Path(__file__).parents[2]


def look(provider: Provider, own: Endpoint) -> tuple[list[Endpoint], ProviderReport]:
    """Whom a provider finds at one announcement, and what it says."""
    found: list[Endpoint] = []

    async def announce() -> None:
        await provider.start(own, found.append, lambda kind, source: None)
        await provider.announce()
        await provider.stop()

    asyncio.run(announce())
    return found, provider.report()


class Double:
    """A cloud's double in a process of its own, `on` a network's switch or on this host.

    `cloud` is ``ec2`` or ``openstack``; `settings` are those of `tests.clouds.instances.Cloud`.
    `urls` tells where it is: ``metadata``, ``api`` (for OpenStack Keystone's), and ``authority``,
    the file of the certificate to trust if it serves HTTPS.
    """

    def __init__(self, cloud: str, on: Network | None = None, **settings: Any) -> None:
        argv: list[str] = [sys.executable, "-m", "tests.clouds"]
        if on is not None:
            on.serve_metadata()
            argv = on.at_switch(*argv)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT
        )
        try:
            self.urls: dict[str, str] = self._say({"cloud": cloud, **settings})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tell(self, **settings: Any) -> dict[str, int]:
        """Change settings; what the double was asked so far, and how often."""
        answer: dict[str, int] = self._say(settings)
        return answer

    def close(self) -> None:
        """End it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _say(self, data: dict[str, Any]) -> Any:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(data, default=asdict) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the double of the cloud ended; see its error output")
        return json.loads(line)
