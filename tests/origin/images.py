"""Builds OCI layouts that stand in for Origin's images: ``python -m tests.origin.images DIR``.

`origin`, `node` and `openvswitch` keep to the real images' /exports: unit, values, mounts.
Their program is `openshift`, with the machine's own Python; `etcd` is real, from Debian's packages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = ("__init__", "api", "configuration", "credentials", "objects", "openshift")
PROGRAM = """#!/usr/bin/python3 -I
import sys
from pathlib import Path

here = Path(__file__).resolve()
sys.path.insert(0, str(here.parents[1] / "share/double"))
from tests.origin.openshift import main

main(here.name, sys.argv[1:])
"""
UNIT = """[Unit]
Description=$NAME
{order}
[Service]
EnvironmentFile={environment}/etc/sysconfig/$NAME
ExecStartPre=-$RUNTIME delete -f $NAME
ExecStartPre=/bin/bash -c 'export -p > /run/$NAME-env'
ExecStart=$EXEC_START
ExecStop=$EXEC_STOP
ExecStopPost=-$RUNTIME delete -f $NAME
SyslogIdentifier=$NAME
WorkingDirectory=$DESTDIR
Delegate=yes
Restart=always
RestartSec=5s
{kind}
[Install]
WantedBy={wanted}
"""
NOTIFY = "Type=notify\nNotifyAccess=all\n"
CONFIG, DATA = "${ORIGIN_CONFIG_DIR}", "${ORIGIN_DATA_DIR}"
Bind = tuple[str, str, str]  # source, destination, rw or ro
PYTHON: tuple[Bind, ...] = (
    ("/usr/lib", "/usr/lib", "ro"),
    ("/usr/bin/python3", "/usr/bin/python3", "ro"),
)
MASTER: tuple[Bind, ...] = (
    (CONFIG, "/etc/origin", "rw"),
    (DATA, "/var/lib/origin", "rw"),
    ("/etc/pki", "/etc/pki", "ro"),
    ("/etc/resolv.conf", "/etc/resolv.conf", "ro"),
    ("/var/log", "/var/log", "rw"),
    ("/run", "/run", "rw"),
)
# Each must be there on the host before the container starts, or the runtime refuses it.
NODE: tuple[Bind, ...] = (
    ("/sys", "/sys", "ro"),
    ("/etc/localtime", "/etc/localtime", "ro"),
    ("/usr/bin/docker", "/usr/bin/docker", "ro"),
    ("/run", "/run", "rw"),
    ("/etc/systemd/system", "/host-etc/systemd/system", "rw"),
    ("/var/run/secrets", "/var/run/secrets", "rw"),
    ("/lib/modules", "/lib/modules", "ro"),
    (f"{CONFIG}/openvswitch", "/etc/openvswitch", "rw"),
    (DATA, "/var/lib/origin", "rw"),
    ("/etc/cni/net.d", "/etc/cni/net.d", "rw"),
    ("/var/lib/dockershim", "/var/lib/dockershim", "rw"),
    ("/var/lib/cni", "/var/lib/cni", "rw"),
    ("/etc/machine-id", "/etc/machine-id", "ro"),
    ("/etc/resolv.conf", "/etc/resolv.conf", "ro"),
    ("/var/lib/docker/containers", "/var/lib/docker/containers", "rw"),
    ("/var/log", "/var/log", "rw"),
    ("/", "/rootfs", "ro"),
    (f"{CONFIG}/sdn", "/etc/origin/sdn", "rw"),
    (f"{CONFIG}/node", "/etc/origin/node", "rw"),
    (f"{CONFIG}/cloudprovider", "/etc/origin/cloudprovider", "ro"),
    ("/etc/pki", "/etc/pki", "ro"),
    ("/opt/cni/bin", "/host/opt/cni/bin", "rw"),
)
OPENVSWITCH: tuple[Bind, ...] = (
    ("/run", "/run", "rw"),
    ("/lib/modules", "/lib/modules", "ro"),
    (f"{CONFIG}/openvswitch", "/etc/openvswitch", "rw"),
    ("/sys", "/sys", "ro"),
)
FILES = {"/etc/localtime", "/usr/bin/docker", "/etc/machine-id", "/etc/resolv.conf"}
FILES |= {"/usr/bin/python3"}


def config(what: str, binds: Iterable[Bind]) -> str:
    """config.json.template; `$NAME` and `$COMMAND` are filled in when it is installed."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "bind",
            "source": "/dev",
            "options": ["bind", "rw"],
        },
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
    ]
    mounts += [
        {"destination": to, "type": "bind", "source": source, "options": ["bind", mode]}
        for source, to, mode in (*PYTHON, *binds)
    ]
    # The real node asks for nearly all there are, also for what some hosts cannot give.
    caps = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    caps += [] if what == "master" else ["CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN"]
    command = ["$COMMAND"] if what == "master" else []
    tree = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/usr/bin/container", what, "$NAME", *command],
            "env": ["PATH=/usr/bin", "OPENSHIFT_CONTAINERIZED=true", "PYTHONUNBUFFERED=1"],
            "cwd": "/" if what == "openvswitch" else "/var/lib/origin",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), caps),
            "noNewPrivileges": what == "master",
        },
        "mounts": mounts,
        "linux": {
            "cgroupsPath": "/system.slice/${NAME}.service/payload",
            "namespaces": [{"type": "mount"}],
        },
    }
    return json.dumps(tree, indent=2)


def exports() -> dict[str, tuple[str, tuple[Bind, ...], str, dict[str, str]]]:
    """Image: what it runs, its binds, its unit, its manifest's defaults."""
    folders = {"ORIGIN_CONFIG_DIR": "/etc/origin"}
    docker = {"DOCKER_SERVICE": "docker.service"}
    data = {**folders, **docker, "ORIGIN_DATA_DIR": "/var/lib/origin"}
    master = UNIT.format(
        order="After=network-online.target $ETCD_SERVICE\nBefore=$NODE_SERVICE\n",
        environment="-",
        kind="",
        wanted="$DOCKER_SERVICE",
    )
    node = UNIT.format(
        order="After=$DOCKER_SERVICE $OPENVSWITCH_SERVICE $MASTER_SERVICE dnsmasq.service\n"
        "Wants=$DOCKER_SERVICE\nRequires=dnsmasq.service\n",
        environment="",
        kind=NOTIFY,
        wanted="$DOCKER_SERVICE",
    )
    # The real one's fault is kept: with a value that orders it, WantedBy has a suffix too many.
    switch = UNIT.format(
        order="After=$DOCKER_SERVICE\nRequires=$DOCKER_SERVICE\nPartOf=$DOCKER_SERVICE\n",
        environment="",
        kind=NOTIFY,
        wanted="${DOCKER_SERVICE}.service",
    )
    services = {"ETCD_SERVICE": "etcd.service", "NODE_SERVICE": "atomic-openshift-node.service"}
    parts = {"MASTER_SERVICE": "atomic-openshift-master.service", "DNS_DOMAIN": ""}
    parts |= {"OPENVSWITCH_SERVICE": "openvswitch.service", "ADDTL_MOUNTS": ""}
    return {
        "origin": ("master", MASTER, master, {"COMMAND": "", **data, **services}),
        "node": ("node", NODE, node, {**data, **parts}),
        "openvswitch": ("openvswitch", OPENVSWITCH, switch, {**folders, **docker}),
    }


def fill(root: Path, name: str) -> None:
    """An image's root file system."""
    what, binds, unit, defaults = exports()[name]
    for directory in ("exports", "proc", "dev", "tmp", "usr/bin", "usr/lib64", "run", "var/lib"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "var/run").symlink_to("../run")
    for link in ("lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    # Where there is one, it is here; on other machines the loader lies in /lib.
    loader = "x86_64-linux-gnu/ld-linux-x86-64.so.2"
    (root / "usr/lib64" / Path(loader).name).symlink_to(f"../lib/{loader}")
    for _, target, _ in (*PYTHON, *binds):
        if target.startswith(("/lib", "/var/run")):
            continue  # below a mount
        place = root / target.lstrip("/")
        (place.parent if target in FILES else place).mkdir(parents=True, exist_ok=True)
        if target in FILES:
            place.touch()
    share = root / "usr/share/double/tests/origin"
    share.mkdir(parents=True)
    (share.parent / "__init__.py").touch()
    for source in SOURCES:
        shutil.copy(Path(__file__).with_name(f"{source}.py"), share)
    for program in ("container", "openshift", "oc"):
        (root / "usr/bin" / program).write_text(PROGRAM)
        (root / "usr/bin" / program).chmod(0o755)
    (root / "exports/config.json.template").write_text(config(what, binds))
    (root / "exports/service.template").write_text(unit)
    manifest = {"version": "1.0", "defaultValues": defaults}
    (root / "exports/manifest.json").write_text(json.dumps(manifest, indent=2))


def build(directory: Path) -> None:
    """The four layouts, each with the tag ``latest``, in place of what was there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in exports():
        with tempfile.TemporaryDirectory() as work:
            root, layout = Path(work) / "root", Path(work) / "layout"
            root.mkdir(mode=0o755)
            fill(root, name)
            image = f"{layout}:latest"
            for words in (
                ("init", "--layout", layout),
                ("new", "--image", image),
                ("insert", "--image", image, root, "/"),
                ("gc", "--layout", layout),
            ):
                subprocess.run(["umoci", *words], check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(directory / name, ignore_errors=True)
            shutil.copytree(layout, directory / name)
    # They need no kernel module and raise no limit, so nothing of Origin is left out.
    (directory / "document.yaml").write_text(
        "origin: {network: {plugin: ovs-subnet}, unidling: true}\n"
    )
    if not (directory / "etcd").exists():
        program = PROJECT / "firstboot/payloads/etcd/build-image"
        subprocess.run([program, directory / "etcd"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.origin.images DIR")
    build(Path(sys.argv[1]))
