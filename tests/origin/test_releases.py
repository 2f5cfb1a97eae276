"""Each release's rows through the double as processes: gates open, objects are made."""

from __future__ import annotations

import http.server
import os
import random
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from firstboot import health
from firstboot.protocol import plan
from tests.adapters.origin_hosts import Cluster, Host
from tests.origin.images import PROJECT

RUN = "import sys; from tests.origin.openshift import main; main(sys.argv[1], sys.argv[2:])"
MASTER = "etc/origin/master"
ROUTER = {"origin_images_router": "router:v1", "origin_images_registry": "registry:v1"}
Start = Callable[..., "subprocess.Popen[str]"]


class Etcd(http.server.BaseHTTPRequestHandler):
    """Says that it is well, to whom it knows."""

    def do_GET(self) -> None:
        text = b'{"health":"true"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve_etcd() -> Iterator[Callable[[Host], None]]:
    """By the certificates in /etc/etcd, at its real port."""
    with ExitStack() as servers:

        def serve(host: Host) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            here = host.root / "etc/etcd"
            context.load_cert_chain(here / "server.crt", here / "server.key")
            context.load_verify_locations(here / "ca.crt")
            context.verify_mode = ssl.CERT_REQUIRED
            server = http.server.ThreadingHTTPServer((host.member.host, 2379), Etcd)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            servers.callback(server.server_close)
            servers.callback(thread.join)
            servers.callback(server.shutdown)

        yield serve


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A program of the double's, below a host's root; ended after the test."""
    with ExitStack() as running:

        def begin(root: Path, *words: str) -> subprocess.Popen[str]:
            log = (tmp_path / f"{words[2] if len(words) > 2 else words[0]}.log").open("w")
            running.enter_context(log)
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, *words],
                cwd=PROJECT,
                env={**os.environ, "DOUBLE_ROOT": str(root), "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        yield begin


def below(host: Host) -> None:
    """Listen on the host's own address, which is one of this machine's loopback, not on all."""
    sysconfig = (host.root / "etc/sysconfig").iterdir()
    configs = (host.root / "etc/origin").glob("*/*-config.yaml")
    for path in (*sysconfig, *configs):
        path.write_text(path.read_text().replace("0.0.0.0:", f"{host.member.host}:"))


def export(host: Host, name: str) -> None:
    """What the container's unit does before it starts."""
    words = (host.root / f"etc/sysconfig/{name}").read_text().splitlines()
    text = "".join(f'declare -x {w.partition("=")[0]}="{w.partition("=")[2]}"\n' for w in words)
    text = text.replace("/etc/origin", f"{host.root}/etc/origin")
    (host.root / "run").mkdir(exist_ok=True)
    (host.root / f"run/{name}-env").write_text(text)


@pytest.mark.parametrize("release", ["v3.6.1", "v3.7.2", "v3.9.0"])
def test_a_release_comes_up(
    release: str, tmp_path: Path, start: Start, serve_etcd: Callable[[Host], None]
) -> None:
    network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
    cluster = Cluster(tmp_path, 1, 0, {"origin_version": release, **ROUTER}, network)
    cluster.connect()
    cluster.run()
    host = cluster.hosts[0]
    assert host.core.running and not host.failures
    below(host)
    serve_etcd(host)
    commands = {s.name: dict(s.values) for s in host.did if isinstance(s, plan.InstallContainer)}
    began, created = [], []
    for step in host.did:
        match step:
            case plan.StartUnit() if step.unit.endswith("-policy.service"):
                config = f"--filename={host.root / MASTER / 'policy.json'}"
                made = start(
                    host.root, "openshift", "admin", "create-bootstrap-policy-file", config
                )
                assert made.wait(30) == 0
            case plan.StartUnit() if step.unit.startswith("origin-") and "host" not in step.unit:
                name = step.unit.removesuffix(".service")
                export(host, name)
                if name == "origin-node":
                    start(host.root, "container", "node", name)
                else:
                    command = commands[name]["COMMAND"]
                    start(host.root, "container", "master", name, *[command][: bool(command)])
                began.append(name)
            case plan.Probe():
                health.wait(step, host.root)
            case plan.CreateObject():
                for _ in range(2):  # the second time it is there
                    health.create(step, host.root, host.carrier.deeds._filled(step.content))
                created.append(step.name)
    single = ["origin-master", "origin-node"]
    split = ["origin-master-api", "origin-master-controllers", "origin-node"]
    assert began == (single if release.startswith("v3.6") else split)
    assert {"DeploymentConfig router", "DeploymentConfig docker-registry"} < set(created)
