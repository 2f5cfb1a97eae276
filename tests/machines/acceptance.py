"""``make acceptance``: three machines become an OpenShift Origin cluster, from the images in a DIR.

DIR holds OCI layouts called origin, node, openvswitch and etcd, and nothing else is needed. Docker
and dnsmasq are the machines' own, Debian's (`tests/machines/image origin`). A file document.yaml in
DIR is merged into the document the machines boot with. Without DIR the test doubles of tests/origin
are built and used. It passes when all three nodes are Ready, `oc whoami` is system:admin, and a
service account's token is taken, and a spoilt one not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from firstboot.userdata import make_token
from tests.machines.demo import Failed, display, inside, watch
from tests.machines.document import user_data
from tests.machines.rig import PROJECT, Machine, Rig
from tests.machines.view import Look, table
from tests.network.run import legacy_cgroups, wait_until
from tests.origin import images

PARTS = ("origin", "node", "openvswitch", "etcd")
IMAGE = PROJECT / "build/image/layers-origin"
INSIDE = "/usr/lib/firstboot/images"  # of each machine: DIR, read-only
TAG = "org.opencontainers.image.ref.name"
BUILD = PROJECT / "build/acceptance"
ADMIN = "/etc/origin/master/admin.kubeconfig"
HOSTS, LINES, TRIES, READY_SECONDS = 3, 12, 3, 60.0
SYS_RESOURCE = 24  # capabilities(7)
# Who the API says the bearer of the token on stdin is, over TLS that is verified.
ASK = """
import ssl, sys, json, urllib.error, urllib.request
url = "https://%s:8443/apis/user.openshift.io/v1/users/~"
context = ssl.create_default_context(cafile="/etc/origin/master/ca.crt")
asked = urllib.request.Request(url, headers={"Authorization": "Bearer " + sys.stdin.read().strip()})
try:
    print(json.load(urllib.request.urlopen(asked, context=context, timeout=20))["metadata"]["name"])
except urllib.error.HTTPError as error:
    print(error.code)
"""
# What is wrong on a master before its API server starts, with --fault: as by somebody's mistake.
FAULT = "/etc/firstboot-fault"  # of each machine: the fault's name
FAULTS = {
    "san": "a serving certificate without the master's address",
    "signer": "the service signer's certificate is missing",
    "cidr": "clusterNetworkCIDR is not what clusterNetworks says",
}
FAULT_SCRIPT = f"""#!/bin/sh
set -eu
cd /etc/origin/master
for saved in *.saved; do [ ! -e "$saved" ] || cp -a "$saved" "${{saved%.saved}}"; done
for file in master.server.crt service-signer.crt master-config.yaml; do
    [ -e "$file.saved" ] || cp -a "$file" "$file.saved"
done
case $(cat {FAULT}) in
san) openssl req -new -subj /CN=elsewhere -key master.server.key |
    openssl x509 -req -CA ca.crt -CAkey ca.key -set_serial 4711 -out master.server.crt 2>/dev/null \
        -extfile /dev/fd/3 3<<-END
	extendedKeyUsage=serverAuth
	subjectAltName=DNS:elsewhere
	END
    ;;
signer) rm service-signer.crt ;;
cidr) sed -i 's|clusterNetworkCIDR:.*|clusterNetworkCIDR: "10.0.0.0/14"|' master-config.yaml ;;
esac
"""


def references(directory: Path) -> dict[str, str]:
    """How each part's image is called inside the machines; Failed if one is not there."""
    found = {}
    for part in PARTS:
        index = directory / part / "index.json"
        try:
            manifests = json.loads(index.read_text())["manifests"]
            tags = [m.get("annotations", {}).get(TAG, "") for m in manifests]
        except (OSError, ValueError, KeyError) as error:
            raise Failed(f"{index} is not an OCI layout's index: {error!r}") from error
        tag = "latest" if "latest" in tags else tags[0] if len(tags) == 1 else ""
        if not tag:
            raise Failed(f"{index} has the tags {tags}: give it one, or one called latest")
        found[part] = f"oci:{INSIDE}/{part}:{tag}"
    return found


def limits() -> dict[str, Any]:
    """Options of the payload that machines on this kernel need, where real images run in them."""
    options: dict[str, Any] = {
        # The machines share one kernel, its cgroups and its swap, and docker is Debian's.
        "kubelet_arguments": {
            "cgroup-driver": ["cgroupfs"],
            "cgroups-per-qos": ["false"],
            "enforce-node-allocatable": [""],
            "fail-swap-on": ["false"],
        }
    }
    if not _has_module("openvswitch"):
        options["network"] = {"plugin": "none"}
    status = Path("/proc/self/status").read_text()
    if not int(status.partition("CapBnd:")[2].split()[0], 16) >> SYS_RESOURCE & 1:
        options["unidling"] = False
    return options


def _has_module(name: str) -> bool:
    if Path(f"/sys/module/{name}").exists():
        return True
    with suppress(OSError):
        return (
            subprocess.run(["modprobe", "--quiet", "--dry-run", name], check=False).returncode == 0
        )
    return False


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged."""
    both = dict(under)
    for key, item in over.items():
        old = both.get(key)
        nested = isinstance(old, Mapping) and isinstance(item, Mapping)
        both[key] = merged(old, item) if nested else item  # type: ignore[arg-type]
    return both


def document(directory: Path, **more: Any) -> dict[str, Any]:
    """What all machines boot with: the images of DIR, this kernel's limits, DIR/document.yaml."""
    given: Any = {}
    own = directory / "document.yaml"
    if own.exists():
        given = yaml.safe_load(own.read_text()) or {}
        if not isinstance(given, dict):
            raise Failed(f"{own} is not a mapping")
    base = {
        "cluster": "demo",
        "token": make_token(),
        "expect": HOSTS,
        "payload": "origin",
        "origin": {"images": references(directory), **limits()},
    }
    return merged(merged(base, given), more)


def fault_layer(directory: Path, name: str) -> Path:
    """The machine image with a fault in it; its `layers`."""
    layer = directory / "fault"
    drop_in = layer / "etc/systemd/system/origin-master-api.service.d/99-fault.conf"
    script = layer / "usr/local/bin/firstboot-fault"
    for path in (drop_in, script):
        path.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nExecStartPre=/usr/local/bin/firstboot-fault\n")
    script.write_text(FAULT_SCRIPT)
    script.chmod(0o755)
    (layer / FAULT[1:]).write_text(f"{name}\n")
    layers = directory / "fault.layers"
    layers.write_text(f"{layer}\n{IMAGE.read_text()}")
    return layers


# ---------------------------------------------------------------- the proof


def oc(master: Machine, *words: str) -> str:
    """What the image's own `oc` prints for the administrator."""
    return inside(master, "/usr/local/bin/oc", f"--config={ADMIN}", *words)


def ready_nodes(master: Machine) -> list[str]:
    """The names of the nodes that are Ready."""
    items = json.loads(oc(master, "get", "nodes", "-o", "json"))["items"]
    return sorted(
        item["metadata"]["name"]
        for item in items
        for said in item["status"].get("conditions", ())
        if (said["type"], said["status"]) == ("Ready", "True")
    )


def service_account_token(master: Machine) -> str:
    """Of the default service account; the controllers make it, some time after the API is up."""
    end = time.monotonic() + READY_SECONDS
    while True:
        try:
            return oc(master, "serviceaccounts", "get-token", "default", "-n", "default")
        except Failed:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def bearer(master: Machine, token: str) -> str:
    """Who the API takes the bearer for; the HTTP status if for nobody."""
    script = ASK % master.address
    return master.exec("python3", "-c", script, input=token).stdout.strip()


def prove(rig: Rig) -> Iterator[tuple[str, str]]:
    """What was asked and what it answered; Failed at the first wrong answer."""
    masters = [m for m in rig if (m.status() or {}).get("role") == "master"]
    if len(masters) != 1:
        raise Failed(f"there are {len(masters)} masters, not 1")
    master, names = masters[0], sorted(m.name for m in rig)
    user = oc(master, "whoami")
    if user != "system:admin":
        raise Failed(f"`oc whoami` says {user!r}, not 'system:admin'")
    yield "oc whoami", user
    try:
        wait_until(lambda: ready_nodes(master) == names, READY_SECONDS, "all nodes Ready")
    except TimeoutError as error:
        raise Failed(f"{error}; Ready are {ready_nodes(master)} of {names}") from error
    yield "nodes Ready", ", ".join(names)
    token = service_account_token(master)
    user = bearer(master, token)
    if user != "system:serviceaccount:default:default":
        raise Failed(f"a service account's token is {user!r} to the API")
    yield "service account token", user
    spoilt = token[:-8] + token[-8:].swapcase()
    if (answer := bearer(master, spoilt)) != "401":
        raise Failed(f"a spoilt token is {answer!r} to the API, and not refused")
    yield "the same token, spoilt", "refused"


def explain(machine: Machine) -> None:
    """Why it does not come up: firstboot's own words, the units, each container's last lines."""
    print(f"\n---- {machine.name}")
    if not machine.running:
        print("it is off")
        return
    print(machine.exec("firstboot", "status", check=False).stdout)
    names = ("docker", "dnsmasq", "etcd", "openvswitch", "origin-*")
    patterns = [f"{name}.service" for name in names]
    listing = ("systemctl", "--no-pager", "--no-legend", "--all", "list-units", *patterns)
    print(machine.exec(*listing, check=False).stdout)
    installed = machine.exec("firstboot", "containers", "list", "--all", "--json", check=False)
    for each in json.loads(installed.stdout or "[]"):
        unit = f"{each['name']}.service"
        # Its own words only: systemd's about the unit would push them out.
        words = ("journalctl", "--no-pager", "-n", str(LINES), f"_SYSTEMD_UNIT={unit}")
        print(f"-- {unit}\n{machine.exec(*words, check=False).stdout}")


def machines(directory: Path, image: Path, shown: Mapping[str, Any]) -> Rig:
    """Three machines that boot with this document and find DIR's images."""
    text = user_data(yaml.safe_dump(dict(shown), sort_keys=False))
    return Rig(
        HOSTS,
        text,
        image=image,
        binds=(f"{directory.resolve()}:{INSIDE}",),
        # Origin's network and its proxy write to /proc/sys/net.
        environment={"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"},
        legacy=legacy_cgroups(),
    )


def impatient(show: Callable[[Sequence[Look]], None]) -> Callable[[Sequence[Look]], None]:
    """`show`; Failed once a host has tried a step in vain so often that waiting is no use."""

    def seen(looks: Sequence[Look]) -> None:
        show(looks)
        for look in looks:
            for step in (look.shown or {}).get("steps", ()):
                times = re.fullmatch(r"failed (\d+) times", step["state"])
                if times and int(times[1]) >= TRIES:
                    why = " ".join(p for p in look.problems if "STEP_FAILED" in p)
                    raise Failed(f"{look.host} failed {times[1]} times to {step['what']}: {why}")

    return seen


def judge(rig: Rig, timeout: float) -> list[tuple[str, str]]:
    """Wait, and prove; Failed, after it was said why of every machine."""
    try:
        with display(Console()) as show:
            watch(rig, timeout, impatient(show))
        return list(prove(rig))
    except Failed:
        for machine in rig:
            explain(machine)
        raise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("acceptance", description=__doc__)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--fault", choices=FAULTS, help="break this on purpose: it must be refused")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS")
    given = parser.parse_args(arguments)
    if os.geteuid():
        print("acceptance: needs root", file=sys.stderr)
        return 77
    BUILD.mkdir(parents=True, exist_ok=True)
    directory = given.images or BUILD / "images"
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        if not given.images:
            images.build(directory)
        try:
            shown = document(directory)
            print("document:", yaml.safe_dump(shown | {"token": "(hidden)"}), sep="\n")
            image = fault_layer(Path(work), given.fault) if given.fault else IMAGE
            with machines(directory, image, shown) as rig:
                rig.start()
                proof = judge(rig, given.timeout)
        except Failed as error:
            print(f"\nFAILED: {error}", *getattr(error, "__notes__", ()), sep="\n")
            return 1
    rows = table("asked", "answer")
    for row in proof:
        rows.add_row(*row)
    Console().print(rows)
    print("Accepted.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
