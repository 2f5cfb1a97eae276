"""`firstboot containers` on a real machine: systemd, runc and crun, containers that serve.

The images hold busybox. Its web server shares the machine's network and says which version it is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.oci_images import MANIFEST, Directory, Link, build
from tests.machines.rig import Machine, Rig

pytestmark = pytest.mark.machine

BUSYBOX = Path("/bin/busybox")  # static, so that it needs nothing else in the image
BINDS = [{"type": "bind", "source": "${STATE_DIRECTORY}/$NAME", "destination": "/data"}]
UNIT = """[Unit]
Description=web server $NAME
[Service]
ExecStartPre=-$RUNTIME delete -f '$NAME'
ExecStart=$EXEC_START
ExecStop=$EXEC_STOP
WorkingDirectory=$DESTDIR
Restart=on-failure
[Install]
WantedBy=multi-user.target
"""
START = 30.0


def template(*arguments: str) -> dict[str, Any]:
    mounts = [
        {"type": "proc", "source": "proc", "destination": "/proc"},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/dev"},
        *({**bind, "options": ["bind", "rw"]} for bind in BINDS),
    ]
    return {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "cwd": "/",
            "args": ["/bin/busybox", *arguments],
            "env": ["PATH=/bin"],
        },
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}]},
    }


# The first process of a PID namespace gets no signal that it does not handle.
SERVE = "trap 'exit 0' TERM; httpd -f -p 127.0.0.1:$PORT -h /www & wait"
BASE: dict[str, Any] = {
    "bin/busybox": BUSYBOX,
    "bin/sh": Link("busybox"),
    **{name: Directory() for name in ("proc", "dev", "data", "run", "sys", "tmp")},
    "exports/config.json.template": template("sh", "-c", SERVE),
    "exports/service.template": UNIT,
    "exports/manifest.json": {**MANIFEST, "defaultValues": {"PORT": "8000"}},
    "exports/hostfs/usr/local/bin/tool": "#!/bin/sh\necho web\n",
}


def version(number: str, **more: Any) -> dict[str, Any]:
    changed = {name.replace("__", "/"): content for name, content in more.items()}
    return {"www/index.html": f"version {number}\n", **changed}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions of one image, as OCI layouts."""
    if not BUSYBOX.exists():
        pytest.fail(f"{BUSYBOX} missing: run 'make setup'")
    top = tmp_path_factory.mktemp("images")
    unit = "exports/service.template"
    config = "exports/config.json.template"
    build(top / "one", BASE, version("one"))
    build(top / "two", BASE, version("two"), {"exports/hostfs/etc/two.conf": "two\n"})
    build(top / "ends", BASE, version("ends"), {config: template("sh", "-c", "exit 3")})
    late = template("sh", "-c", "sleep 2; exit 3")
    build(top / "late", BASE, version("late"), {config: late})
    build(top / "unknown", BASE, version("unknown"), {unit: UNIT + "# $NOBODY_KNOWS\n"})
    broken = {config: '{"root": {"path": "rootfs", "readonly": true} $NAME'}
    build(top / "nojson", BASE, version("nojson"), broken)
    default = {"exports/.wh.service.template": ""}  # the built-in unit: detached, with a pid file
    build(top / "detached", BASE, version("one"), default)
    for broken_layout in ("damaged", "incomplete"):
        build(top / broken_layout, BASE, version(broken_layout))
        blobs = (top / broken_layout / "blobs/sha256").iterdir()
        layer = max(blobs, key=lambda path: path.stat().st_size)
        if broken_layout == "damaged":
            layer.write_bytes(layer.read_bytes()[:-1] + b"x")
        else:
            layer.unlink()
    once = {config: template("sh", "-c", "echo ran here; echo $$(date) >> /data/ran")}
    build(top / "once", BASE, version("once"), once, labels={"atomic.run": "once"})
    return top


@pytest.fixture(scope="module")
def ostree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This computer's ostree with all it links against: the machines' image has none."""
    top = tmp_path_factory.mktemp("ostree")
    program = shutil.which("ostree")
    if program is None:
        pytest.fail("ostree missing: run 'make setup'")
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in {program, *re.findall(r"(/\S+) \(0x", linked)}:
        shutil.copy(path, top)
    (loader,) = top.glob("ld-*")
    wrapper = f"#!/bin/sh\nexec /ostree-program/{loader.name} --library-path /ostree-program \\\n"
    (top / "wrapper").write_text(wrapper + '    /ostree-program/ostree "$@"\n')
    (top / "wrapper").chmod(0o755)
    return top


@pytest.fixture(scope="module")
def rig(images: Path, ostree: Path) -> Iterator[Rig]:
    binds = (f"{images}:/images", f"{ostree}:/ostree-program")
    with Rig(1, "#cloud-config\n", binds=binds) as rig:
        rig.start()
        rig.ready()
        yield rig


@pytest.fixture(scope="module")
def machine(rig: Rig) -> Machine:
    return rig[1]


def containers(machine: Machine, *words: str, code: int = 0) -> str:
    """What a verb says; it must end with `code`."""
    done = machine.exec("firstboot", "containers", *words, check=False, timeout=90)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def served(machine: Machine, port: int = 8000) -> str:
    ask = (
        "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=2).read().decode())"
    )
    argv = ("python3", "-c", ask, f"http://127.0.0.1:{port}/")
    found: str = machine.exec(*argv, check=False).stdout
    return found.strip()


def is_active(machine: Machine, name: str) -> str:
    found: str = machine.exec("systemctl", "is-active", name, check=False).stdout
    return found.strip()


def main_pid(machine: Machine, name: str) -> str:
    found: str = machine.exec("systemctl", "show", "-P", "MainPID", name).stdout
    return found.strip()


def until(rig: Rig, met: Callable[[], bool], what: str) -> None:
    rig.wait(met, START, what)


def row(machine: Machine, name: str) -> dict[str, Any]:
    """What openshift-ansible reads."""
    words = ("list", "--no-trunc", "-a", "-f", f"container={name}", "--json")
    (found,) = json.loads(containers(machine, *words))
    assert isinstance(found, dict)
    return found


def link(machine: Machine, name: str) -> str:
    found: str = machine.exec("readlink", f"/var/lib/containers/atomic/{name}").stdout
    return found.strip().rpartition("/")[2]


# ---------------------------------------------------------------- one container's life


def test_install_enables_and_does_not_start(machine: Machine, rig: Rig) -> None:
    said = containers(machine, "install", "--system", "--name=web", "oci:/images/one")
    assert "Created file /etc/systemd/system/web.service" in said
    assert "Created file /usr/local/bin/tool" in said
    assert machine.exec("systemctl", "is-enabled", "web").stdout == "enabled\n"
    assert is_active(machine, "web") == "inactive"
    assert (row(machine, "web")["state"], row(machine, "web")["running"]) == ("inactive", False)
    machine.exec("systemctl", "start", "web")
    until(rig, lambda: served(machine) == "version one", "version one serves")
    shown = row(machine, "web")
    assert (shown["state"], shown["image_name"]) == ("running", "oci:/images/one")
    assert shown["command"].startswith("/bin/busybox sh -c trap")
    assert "web" in machine.exec("runc", "list").stdout


def test_a_name_that_is_taken_is_left_as_it_is(machine: Machine) -> None:
    before = main_pid(machine, "web")
    machine.exec("systemctl", "disable", "web")
    assert (
        containers(machine, "install", "--name=web", "oci:/images/two") == "web already present\n"
    )
    enabled = machine.exec("systemctl", "is-enabled", "web", check=False).stdout
    assert enabled == "disabled\n", "nothing is done, not even that"
    machine.exec("systemctl", "enable", "web")
    assert (main_pid(machine, "web"), link(machine, "web")) == (before, "web.0")


def test_update_and_rollback(machine: Machine, rig: Rig) -> None:
    assert "Latest version already installed." in containers(machine, "update", "web")
    assert link(machine, "web") == "web.0"
    said = containers(machine, "update", "--rebase=oci:/images/two", "web")
    assert "updated and restarted" in said
    until(rig, lambda: served(machine) == "version two", "version two serves")
    assert link(machine, "web") == "web.1"
    assert machine.read("/etc/two.conf") == "two\n"
    uuid = json.loads(containers(machine, "info", "web"))["values"]["UUID"]
    containers(machine, "rollback", "web")
    until(rig, lambda: served(machine) == "version one", "version one serves again")
    assert machine.exec("test", "-e", "/etc/two.conf", check=False).returncode == 1
    containers(machine, "rollback", "web")
    until(rig, lambda: served(machine) == "version two", "version two serves again")
    assert machine.read("/etc/two.conf") == "two\n"
    containers(machine, "update", "--set", "PORT=8001", "web")
    until(rig, lambda: served(machine, 8001) == "version two", "it serves on the other port")
    shown = json.loads(containers(machine, "info", "web"))
    assert (shown["values"]["UUID"], shown["values"]["PORT"]) == (uuid, "8001")
    containers(machine, "update", "--set=PORT=8000", "web")
    until(rig, lambda: served(machine) == "version two", "it serves on the first port")


def test_an_update_that_does_not_come_up_is_rolled_back(machine: Machine, rig: Rig) -> None:
    before = link(machine, "web")
    said = containers(machine, "update", "--rebase=oci:/images/ends", "web", code=1)
    assert "Could not restart web.  Attempt automatic rollback" in said
    assert "did not come up and was rolled back" in said
    until(rig, lambda: served(machine) == "version two", "version two serves still")
    assert (link(machine, "web"), is_active(machine, "web")) == (before, "active")
    assert row(machine, "web")["image_name"] == "oci:/images/two"


def test_a_port_that_is_taken(machine: Machine, rig: Rig) -> None:
    taken = "--unit=taken", "python3", "-m", "http.server", "--bind=127.0.0.1", "8002"
    machine.exec("systemd-run", *taken)
    until(rig, lambda: "<html" in served(machine, 8002).lower(), "somebody else's server is there")
    before = link(machine, "web")
    said = containers(machine, "update", "--set=PORT=8002", "web", code=1)
    assert "did not come up and was rolled back" in said
    assert "Address already in use" in machine.journal("web.service")
    until(rig, lambda: served(machine) == "version two", "version two serves still")
    assert (link(machine, "web"), is_active(machine, "web")) == (before, "active")
    assert "<html" in served(machine, 8002).lower()
    machine.exec("systemctl", "stop", "taken")


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("unknown", "still contains an unreplaced value for: ''NOBODY_KNOWS''"),
        ("nojson", "is not JSON"),
        ("absent", "is not an OCI image layout"),
        ("damaged", "does not match its digest.  Please pull the image again"),
        ("incomplete", "Layer not found: sha256:"),
    ],
)
def test_an_image_that_is_refused_leaves_the_container_running(
    machine: Machine, image: str, error: str
) -> None:
    before = (main_pid(machine, "web"), link(machine, "web"))
    assert error in containers(machine, "update", f"--rebase=oci:/images/{image}", "web", code=1)
    assert (main_pid(machine, "web"), link(machine, "web")) == before
    assert served(machine) == "version two"


def test_it_comes_back_at_boot(machine: Machine, rig: Rig) -> None:
    machine.reboot()
    machine.ready()
    until(rig, lambda: served(machine) == "version two", "version two serves after a reboot")


@pytest.mark.parametrize("wait", [0.3, 0.8, 1.5])
def test_a_power_cut_during_an_update(machine: Machine, rig: Rig, wait: float) -> None:
    """Wherever it strikes, one of the two versions serves after it, and the update can be made."""
    before = served(machine)
    after = "version one" if before == "version two" else "version two"
    image = f"--rebase=oci:/images/{after.split()[1]}"
    argv = machine.command("firstboot", "containers", "update", image, "web")
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            machine.kill()
    machine.kill()
    machine.start()
    machine.ready()
    until(rig, lambda: served(machine) in (before, after), "one of the two serves")
    containers(machine, "update", image, "web")
    until(rig, lambda: served(machine) == after, f"{after} serves")


CUT_AT_THE_SWITCH = """
old=$(readlink /var/lib/containers/atomic/web)
firstboot containers update --rebase=oci:/images/late web & update=$!
while [ "$(readlink /var/lib/containers/atomic/web)" = "$old" ]; do :; done
kill -9 $update
"""


def test_an_update_cut_short_that_does_not_come_up_is_rolled_back_at_boot(
    machine: Machine, rig: Rig
) -> None:
    """The process dies when the link has changed, and then the machine loses its power."""
    before, serves = link(machine, "web"), served(machine)
    machine.exec("sh", "-c", CUT_AT_THE_SWITCH, timeout=90)
    assert link(machine, "web") != before
    machine.kill()
    machine.start()
    machine.ready()
    until(rig, lambda: link(machine, "web") == before, "the link is back")
    until(rig, lambda: served(machine) == serves, "what was before serves")
    said = "web: the update of web did not come up and was rolled back"
    told = lambda: said in machine.journal("firstboot-containers.service")  # noqa: E731
    until(rig, told, "it is said")
    assert machine.exec("ls", "-A", "/var/lib/firstboot-containers").stdout == ""
    machine.kill()
    machine.start()
    machine.ready()
    until(rig, lambda: served(machine) == serves, "and again")
    ran = machine.exec("systemctl", "show", "-P", "ConditionResult", "firstboot-containers").stdout
    assert ran == "no\n", "nothing is on trial, so nothing runs"


def test_uninstall(machine: Machine) -> None:
    machine.exec("touch", "/var/lib/web/precious")
    containers(machine, "uninstall", "web")
    assert is_active(machine, "web") == "inactive"
    assert machine.exec("systemctl", "cat", "web", check=False).returncode != 0
    assert served(machine) == ""
    kept = machine.exec("ls", "/var/lib/containers/atomic", "/usr/local/bin", "/var/lib/web").stdout
    assert "web." not in kept
    assert "tool" not in kept
    assert "precious" in kept
    assert "web is not installed" in containers(machine, "uninstall", "web", code=1)


# ---------------------------------------------------------------- other containers


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize("image", ["one", "detached"])
def test_both_runtimes_in_both_modes(machine: Machine, rig: Rig, runtime: str, image: str) -> None:
    containers(machine, "install", "--name=web", f"--runtime={runtime}", f"oci:/images/{image}")
    machine.exec("systemctl", "start", "web")
    until(rig, lambda: served(machine) == "version one", f"{runtime} serves")
    if image == "detached":
        pid = machine.read("/run/container-web.pid").strip()
        assert main_pid(machine, "web") == pid
        assert "busybox" in machine.read(f"/proc/{pid}/cmdline")
    containers(machine, "update", "--rebase=oci:/images/two", "web")
    until(rig, lambda: served(machine) == "version two", f"{runtime} serves the update")
    containers(machine, "rollback", "web")
    until(rig, lambda: served(machine) == "version one", f"{runtime} serves what was before")
    assert row(machine, "web")["runtime"].endswith(runtime)
    containers(machine, "uninstall", "web")
    assert machine.exec(runtime, "list", "-q").stdout == ""


STEPS = """
import sys
sys.path.insert(0, "/usr/share/firstboot")
from pathlib import Path
from firstboot import host
from firstboot.deeds import Deeds
from firstboot.protocol import plan
root = Path("/")
deeds = Deeds(root, host.StateDirectory(root), lambda name: b"", lambda: "")
for image in sys.argv[1:]:
    deeds.run(plan.InstallContainer("web", image))
    deeds.run(plan.StartUnit("web.service"))
"""


def test_what_firstboot_run_replaces_is_rolled_back_too(machine: Machine, rig: Rig) -> None:
    """The steps of a role's plan, as `firstboot run` carries them out, without a cluster."""
    good, bad = "oci:/images/one", "oci:/images/ends"
    done = machine.exec("python3", "-c", STEPS, good, bad, check=False, timeout=90)
    assert "UpdateFailed: the update of web did not come up and was rolled back" in done.stderr
    until(rig, lambda: served(machine) == "version one", "what was before serves")
    machine.exec("python3", "-c", STEPS, "oci:/images/two", timeout=90)
    until(rig, lambda: served(machine) == "version two", "what comes up stays")
    assert machine.exec("ls", "-A", "/var/lib/firstboot-containers").stdout == ""
    containers(machine, "uninstall", "web")


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_payload_that_dies_before_it_is_ready(machine: Machine, rig: Rig, runtime: str) -> None:
    """etcd's own unit of Type=notify: who waits for its READY is told at once that none comes."""
    machine.exec("mkdir", "-p", "/etc/etcd", "/var/lib/etcd")
    image = "oci:/usr/lib/firstboot/images/etcd"
    containers(machine, "install", "--name=etcd", f"--runtime={runtime}", image)
    machine.exec("systemctl", "start", "etcd", timeout=60)
    pid = main_pid(machine, "etcd")
    bad = '--set=ETCD_ARGS=,"--no-such-flag"'
    said = containers(machine, "update", bad, "etcd", code=1)
    assert "was rolled back" in said
    assert "it ended without telling that it is ready" in said, "nobody waited for a timeout"
    assert is_active(machine, "etcd") == "active"
    assert main_pid(machine, "etcd") != pid
    containers(machine, "uninstall", "etcd")
    assert machine.exec(runtime, "list", "-q").stdout == ""
    machine.exec("rm", "-rf", "/etc/etcd", "/var/lib/etcd")


def test_an_image_that_is_run_once(machine: Machine) -> None:
    said = containers(machine, "install", "--name=job", "oci:/images/once")
    assert "ran here" in said
    assert machine.read("/var/lib/job/ran") != ""
    assert json.loads(containers(machine, "list", "--all", "--json")) == []
    assert machine.exec("ls", "/var/lib/containers/atomic").stdout == ""


def test_a_full_disk_halfway(machine: Machine, rig: Rig) -> None:
    """Room for one deployment and a half: the second fails, the first goes on."""
    machine.exec("mkdir", "-p", "/var/lib/containers/atomic")
    machine.exec("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", "/var/lib/containers/atomic")
    containers(machine, "install", "--name=web", "oci:/images/one")
    machine.exec("systemctl", "start", "web")
    until(rig, lambda: served(machine) == "version one", "version one serves")
    for _ in range(2):
        said = containers(machine, "update", "--rebase=oci:/images/two", "web", code=1)
        assert "no space left on device" in said.lower()
        assert served(machine) == "version one"
        assert machine.exec("ls", "/var/lib/containers/atomic").stdout == "web\nweb.0\n"
    said = containers(machine, "install", "--name=other", "oci:/images/two", code=1)
    assert "no space left on device" in said.lower()
    assert [r["name"] for r in json.loads(containers(machine, "list", "-a", "--json"))] == ["web"]
    machine.exec("mount", "-o", "remount,size=16m", "/var/lib/containers/atomic")
    containers(machine, "update", "--rebase=oci:/images/two", "web")
    until(rig, lambda: served(machine) == "version two", "with room again it is updated")
    containers(machine, "uninstall", "web")
    machine.exec("umount", "/var/lib/containers/atomic")


def test_from_the_hosts_ostree_repository(machine: Machine, rig: Rig) -> None:
    """The same life where the host has a repository: layers are shared, and nothing is copied."""
    machine.exec("ln", "-s", "/ostree-program/wrapper", "/usr/local/bin/ostree")
    machine.exec("mkdir", "-p", "/ostree")
    machine.exec("ostree", "init", "--repo=/ostree/repo", "--mode=bare")
    containers(machine, "install", "--name=web", "oci:/images/one")
    program = "/var/lib/containers/atomic/web.{}/rootfs/bin/busybox"
    count = machine.exec("stat", "-c", "%h", program.format(0)).stdout
    assert int(count) == 2, "the repository's and the deployment's"
    branches = machine.exec("ostree", "refs", "--repo=/ostree/repo").stdout.split()
    assert "ociimage/_2Fimages_2Fone_3Alatest" in branches
    assert len(branches) == 4, "the image, its configuration, two layers"
    machine.exec("systemctl", "start", "web")
    until(rig, lambda: served(machine) == "version one", "version one serves")
    containers(machine, "update", "--rebase=oci:/images/two", "web")
    until(rig, lambda: served(machine) == "version two", "version two serves")
    assert int(machine.exec("stat", "-c", "%h", program.format(1)).stdout) == 3
    said = containers(machine, "update", "--rebase=oci:/images/ends", "web", code=1)
    assert "was rolled back" in said
    until(rig, lambda: served(machine) == "version two", "version two serves still")
    containers(machine, "update", "--rebase=oci:/images/one", "web")
    containers(machine, "rollback", "web")
    until(rig, lambda: served(machine) == "version two", "it is rolled back")
    machine.exec("ostree", "fsck", "--quiet", "--repo=/ostree/repo", timeout=120)
    containers(machine, "uninstall", "web")
    assert machine.exec("ls", "/var/lib/containers/atomic").stdout == ""
