"""``make acceptance``: three machines become an OpenShift Origin cluster, from the images in a DIR.

DIR holds OCI layouts called origin, node, openvswitch and etcd. Without one the test doubles of
tests/origin are built and used. It passes when all three nodes are Ready, `oc whoami` is
system:admin, and a service account's token is taken, and a spoilt one not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tests.machines.demo import Failed, display, inside, watch
from tests.machines.document import document, user_data
from tests.machines.rig import IMAGE, PROJECT, Machine, Rig
from tests.machines.view import table
from tests.network.run import wait_until
from tests.origin import images

PARTS = ("origin", "node", "openvswitch", "etcd")
INSIDE = "/usr/lib/firstboot/images"  # of each machine: DIR, read-only
TAG = "org.opencontainers.image.ref.name"
BUILD = PROJECT / "build/acceptance"
ADMIN = "/etc/origin/master/admin.kubeconfig"
HOSTS, LINES, READY_SECONDS = 3, 12, 60.0
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
# What a machine image for Origin has, and the tests' has not. The doubles do not use them.
STAND_IN = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"


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


def stand_ins(directory: Path) -> Path:
    """The machine image with units called docker and dnsmasq that do nothing; its `layers`."""
    layer = directory / "stand-ins"
    units, binary = layer / "etc/systemd/system", layer / "usr/bin/docker"
    for path in (units, binary.parent):
        path.mkdir(parents=True, exist_ok=True)
    for name in ("docker", "dnsmasq"):
        (units / f"{name}.service").write_text(STAND_IN)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    layers = directory / "stand-ins.layers"
    layers.write_text(f"{layer}\n{IMAGE.read_text()}")
    return layers


def origin_data(found: dict[str, str]) -> str:
    """The user-data all three machines share."""
    names = ", ".join(f"{part}: '{name}'" for part, name in found.items())
    return user_data(document(HOSTS, payload="origin", origin=f"{{images: {{{names}}}}}"))


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
    token = oc(master, "serviceaccounts", "get-token", "default", "-n", "default")
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


def accept(directory: Path, image: Path, timeout: float) -> list[tuple[str, str]]:
    """Boot, wait, prove; says why on every machine when that fails."""
    found = references(directory)
    binds = (f"{directory.resolve()}:{INSIDE}",)
    # Origin's network wants ip_forward, so /proc/sys/net must be writable inside.
    environment = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
    with Rig(HOSTS, origin_data(found), image=image, binds=binds, environment=environment) as rig:
        rig.start()
        try:
            with display(Console()) as show:
                watch(rig, timeout, show)
            return list(prove(rig))
        except Failed:
            for machine in rig:
                explain(machine)
            raise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("acceptance", description=__doc__)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--image", type=Path, help="the machines' image: a file `layers`")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS")
    given = parser.parse_args(arguments)
    if os.geteuid():
        print("acceptance: needs root", file=sys.stderr)
        return 77
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        if not given.images:
            images.build(BUILD / "images")
        try:
            image = given.image or stand_ins(Path(work))
            proof = accept(given.images or BUILD / "images", image, given.timeout)
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
