"""A double of `openshift` and `oc` 3.6 to 3.9 that refuses what the real ones refuse.

openshift start master api --config=F --listen=https://0.0.0.0:8443
openshift start master controllers --config=F --listen=https://0.0.0.0:8444
openshift start master --config=F                      both in one process, as 3.6 with one master
openshift start node --config=F
openshift admin create-bootstrap-policy-file --filename=F       until 3.7
oc --config=F whoami | get nodes -o json | serviceaccounts get-token NAME -n NAMESPACE
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.origin import configuration, credentials
from tests.origin.api import Api, make_token, serve
from tests.origin.configuration import Configuration
from tests.origin.credentials import Kubeconfig, Refused

PAUSE = 1.0  # seconds between two reports
ANSWER_SECONDS = 5.0
ETCD_SECONDS = 60.0
ROUTES = Path("/proc/net/route")
ROOT = Path(os.environ.get("DOUBLE_ROOT", "/"))  # where absolute paths of configurations begin


def ask(kubeconfig: Kubeconfig, method: str, path: str, body: Any = None) -> Any:
    """One request to the API."""
    content = json.dumps(body).encode() if body else None
    request = urllib.request.Request(kubeconfig.server + path, content, method=method)
    context = kubeconfig.context()
    with urllib.request.urlopen(request, context=context, timeout=ANSWER_SECONDS) as answer:
        return json.loads(answer.read())


def notify() -> None:
    """Tell systemd that this is ready; see sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"READY=1", path.replace("@", "\0", 1))


def serving(found: Configuration, clients: ssl.VerifyMode) -> ssl.SSLContext:
    """The server's side of TLS, as `servingInfo` says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = (str(found.get(f"servingInfo.{k}File")) for k in ("cert", "key"))
    context.load_cert_chain(found.place(certificate), found.place(key))
    context.load_verify_locations(found.place(str(found.get("servingInfo.clientCA"))))
    context.verify_mode = clients
    return context


def address(text: str) -> tuple[str, int]:
    """Of ``https://0.0.0.0:8443``, or of that without its scheme."""
    found = urlsplit(text if "//" in text else f"//{text}")
    return found.hostname or "", found.port or 0


def default_route(text: str) -> bool:
    """Whether a routing table, as in proc(5) /proc/net/route, has a way to everywhere."""
    return any(line.split()[1:2] == ["00000000"] for line in text.splitlines()[1:])


# ---------------------------------------------------------------- the master


def start_api(found: Configuration, listen: str) -> None:
    if not default_route(ROUTES.read_text()):
        raise Refused("Unable to find suitable network address: there is no default route")
    configuration.first_policy(found)
    api = Api(configuration.public_keys(found))
    context = serving(found, ssl.CERT_OPTIONAL)
    serve(address(listen or str(found.get("servingInfo.bindAddress"))), context, api)
    wait_for_etcd(found)
    api.ready = True
    print("etcd answers; ready", flush=True)
    notify()


def wait_for_etcd(found: Configuration) -> None:
    """By the client certificate; the first of the members that is well will do."""
    files = [str(found.place(found.get(f"etcdClientInfo.{k}"))) for k in ("certFile", "keyFile")]
    context = ssl.create_default_context(cafile=str(found.place(found.get("etcdClientInfo.ca"))))
    context.load_cert_chain(*files)
    end, said = time.monotonic() + ETCD_SECONDS, ""
    while time.monotonic() < end:
        for url in found.get("etcdClientInfo.urls"):
            try:
                with urllib.request.urlopen(f"{url}/health", context=context, timeout=5) as answer:
                    if json.loads(answer.read())["health"] == "true":
                        return
            except (OSError, ValueError, KeyError) as error:
                said = f"{url}: {error}"
                print(said, flush=True)
        time.sleep(1)
    raise Refused(f"etcdClientInfo.urls: nobody answers within {ETCD_SECONDS:g} s; {said}")


def start_controllers(found: Configuration, listen: str = "") -> None:
    """Makes the service accounts' tokens, through the API, and says that it is well."""
    loopback = configuration.loopback_kubeconfig(found)
    where = "serviceAccountConfig.privateKeyFile"
    key = credentials.private_key(found.read(where), where)
    state = Api([])
    if listen:  # in one process with the API, its health is the API's
        serve(address(listen), serving(found, ssl.CERT_OPTIONAL), state)
    while True:
        for name in found.get("serviceAccountConfig.managedNames"):
            token = base64.b64encode(make_token("default", name, key).encode()).decode()
            secret = {
                "kind": "Secret",
                "apiVersion": "v1",
                "type": "kubernetes.io/service-account-token",
                "metadata": {
                    "name": f"{name}-token",
                    "annotations": {"kubernetes.io/service-account.name": name},
                },
                "data": {"token": token},
            }
            try:
                ask(loopback, "POST", "/api/v1/namespaces/default/secrets", secret)
                state.ready = True
            except urllib.error.HTTPError as error:
                state.ready = error.code == 409  # it is there already
                if not state.ready:
                    print(f"{loopback.server}: {error}", flush=True)
            except OSError as error:
                print(f"{loopback.server}: {error}", flush=True)
        time.sleep(PAUSE)


# ---------------------------------------------------------------- a node


def start_node(found: Configuration, master: Kubeconfig) -> None:
    """Registers itself, serves as a kubelet does, and reports that it is ready."""
    name, kubelet = str(found.get("nodeName")), Api([])
    kubelet.ready = True
    where = address(str(found.get("servingInfo.bindAddress")))
    serve(where, serving(found, ssl.CERT_REQUIRED), kubelet)
    status = {"conditions": [{"type": "Ready", "status": "True"}]}
    told = False
    while True:
        try:
            node = {
                "kind": "Node",
                "apiVersion": "v1",
                "metadata": {"name": name},
                "status": {"conditions": []},
            }
            ask(master, "POST", "/api/v1/nodes", node)
            ask(master, "PUT", f"/api/v1/nodes/{name}/status", {"status": status})
            if not told:
                print(f"registered as {name}", flush=True)
                notify()
            told = True
        except OSError as error:
            print(f"{master.server}: {error}", flush=True)
        time.sleep(PAUSE)


# ---------------------------------------------------------------- the programs


def openshift(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("openshift", description=__doc__)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--listen", default="")
    parser.add_argument("--filename", type=Path)
    for ignored in ("--master", "--loglevel"):
        parser.add_argument(ignored)
    given = parser.parse_args(arguments)
    if given.words == ["admin", "create-bootstrap-policy-file"] and given.filename:
        given.filename.write_text(json.dumps({"kind": "PolicyList", "apiVersion": "v1"}))
        return
    if given.config is None:
        raise Refused("--config: Required value")
    match given.words:
        case ["start", "master", "api"]:
            start_api(configuration.master(given.config, ROOT), given.listen)
        case ["start", "master", "controllers"]:
            start_controllers(configuration.master(given.config, ROOT), given.listen)
        case ["start", "master"]:
            found = configuration.master(given.config, ROOT)
            start_api(found, given.listen)
            start_controllers(found)
        case ["start", "node"]:
            start_node(*configuration.node(given.config, ROOT))
        case words:
            raise Refused(f"unknown command: {' '.join(words)}")
    while True:
        time.sleep(3600)


def oc(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("oc", description=__doc__)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--config", type=Path, default=Path.home() / ".kube/config")
    parser.add_argument("-n", dest="namespace", default="default")
    parser.add_argument("-o", dest="output")
    given = parser.parse_args(arguments)
    config = credentials.kubeconfig(given.config, "--config")
    match given.words:
        case ["whoami"]:
            print(ask(config, "GET", "/apis/user.openshift.io/v1/users/~")["metadata"]["name"])
        case ["get", "nodes"] if given.output == "json":
            print(json.dumps(ask(config, "GET", "/api/v1/nodes")))
        case ["serviceaccounts", "get-token", name]:
            held = ask(config, "GET", f"/api/v1/namespaces/{given.namespace}/secrets")["items"]
            note = "kubernetes.io/service-account.name"
            found = [s for s in held if s["metadata"].get("annotations", {}).get(note) == name]
            if not found:
                raise Refused(f"serviceaccounts {name}: there is no token")
            print(base64.b64decode(found[0]["data"]["token"]).decode())
        case words:
            raise Refused(f"unknown command: {' '.join(words)}")


def container(arguments: list[str]) -> None:
    """A container's first program: what its unit exported, then the program itself."""
    what, name, *command = arguments
    if what == "openvswitch":
        Path("/etc/openvswitch/system-id.conf").write_text("double\n")
        notify()
        time.sleep(1e9)
    known = exported((ROOT / f"run/{name}-env").read_text())
    options = shlex.split(known.get("OPTIONS", "--loglevel=2"))
    default = "/etc/origin/node/node-config.yaml" if what == "node" else ""
    config = known.get("CONFIG_FILE", default)
    openshift(["start", what, *command, f"--config={config}", *options])


def exported(text: str) -> dict[str, str]:
    """What bash's ``export -p`` printed."""
    words = shlex.split(text)
    return dict(word.partition("=")[::2] for word in words if "=" in word)


def main(program: str, arguments: list[str]) -> None:
    """Ends with 1, and a sentence, when something is refused."""
    try:
        {"openshift": openshift, "oc": oc, "container": container}[program](arguments)
    except (Refused, urllib.error.URLError, OSError) as error:
        sys.exit(f"{program}: {error}")
