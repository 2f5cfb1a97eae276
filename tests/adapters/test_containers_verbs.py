"""`firstboot containers` on a tree: what the verbs say, write and end with; and in which order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from firstboot import cli, container_units, container_verbs, containers
from firstboot.containers import trial
from firstboot.protocol.errors import LocalError
from firstboot.units import SystemdFailed, UnitState
from tests.adapters.oci_images import (
    HOSTFS,
    MANIFEST,
    PLAIN,
    Program,
    assert_nothing_installed,
    build,
    config,
    current,
    install,
    need_tools,
    slot,
    snapshot,
    tmpfiles,
    unit,
)

Say = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


@pytest.fixture
def say(root: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a verb on the tree; what it says, on both channels. It must end with `code`."""

    def run(verb: str, *words: str, code: int = 0) -> str:
        assert cli.main(["containers", verb, f"--root={root}", *words]) == code
        told = capsys.readouterr()
        return told.out + told.err

    return run


# ---------------------------------------------------------------- install


def test_install_says_what_it_made(say: Say, tmp_path: Path, root: Path) -> None:
    image = build(tmp_path / "image", {**PLAIN, **HOSTFS, "exports/tmpfiles.template": "d /srv\n"})
    told = say("install", "--name=web", "--set=GREETING=a=b", image)
    assert told.splitlines() == [
        "Extracting to /var/lib/containers/atomic/web.0",
        "Created file /etc/nowhere",
        "Created file /etc/web-conf/raw.conf",
        "Created file /etc/web-conf/web.conf",
        "Created file /usr/local/bin/alias",
        "Created file /usr/local/bin/webctl",
        "Created file /var/lib/empty",
        "Created file /etc/systemd/system/web.service",
        "Created file /etc/tmpfiles.d/web.conf",
    ]
    assert current(root).values["GREETING"] == "a=b", "split at the first ="


def test_a_name_that_is_present_is_left_alone(say: Say, plain: str, root: Path) -> None:
    say("install", "--name=web", plain)
    before = snapshot(root, exact=True)
    assert say("install", "--name=web", "--set=GREETING=other", plain) == "web already present\n"
    assert snapshot(root, exact=True) == before


def test_two_at_once_install_it_once(plain: str, root: Path) -> None:
    words = ["containers", "install", f"--root={root}", "--name=web", plain]
    argv = [sys.executable, "-m", "firstboot", *words]
    where = Path(__file__).parents[2]
    both = [subprocess.Popen(argv, cwd=where, stdout=subprocess.PIPE, text=True) for _ in "12"]
    told = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert told[0].startswith("Extracting to ")
    assert told[1] == "web already present\n"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("oci:{}/shop", "shop"),
        ("oci:{}/shop:latest", "shop"),
        ("oci:{}/shop:1.2", "shop-1.2"),
    ],
)
def test_the_name_is_the_images_unless_given(
    say: Say, tmp_path: Path, root: Path, reference: str, name: str
) -> None:
    build(
        tmp_path / "shop",
        PLAIN,
        tag=reference.rpartition(":")[2] if "1.2" in reference else "latest",
    )
    say("install", reference.format(tmp_path))
    assert [c.name for c in containers.installed(root)] == [name]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("docker.io/team/web", "web"),
        ("registry:5000/team/web:2", "web-2"),
        ("docker://busybox", "busybox"),
        ("docker:web:latest", "web"),
    ],
)
def test_default_names_of_registry_images(reference: str, name: str) -> None:
    assert containers.default_name(reference) == name


def test_display_writes_nothing(say: Say, plain: str, root: Path) -> None:
    assert "would be installed as web" in say("install", "--display", "--name=web", plain)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--set=GREETING", "--name=web", "IMAGE"],
        ["--system-package=build", "--rootfs=/", "--name=web", "IMAGE"],
        ["--system-package=maybe", "--name=web", "IMAGE"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage(say: Say, plain: str, root: Path, words: list[str]) -> None:
    told = say("install", *[word.replace("IMAGE", plain) for word in words], code=64)
    assert told.startswith("firstboot: ")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("package", ["no", "auto"])
def test_host_files_come_without_a_package(
    say: Say, tmp_path: Path, root: Path, package: str
) -> None:
    image = build(tmp_path / "image", {**PLAIN, **HOSTFS})
    say("install", "--name=web", f"--system-package={package}", image)
    assert (root / "usr/local/bin/webctl").exists()
    assert json.loads((slot(root) / "info").read_text())["system-package"] == "no"


def test_an_image_without_exports_is_told_of(say: Say, tmp_path: Path) -> None:
    image = build(tmp_path / "image", {"usr/bin/run.sh": Program("#!/bin/sh\n")})
    assert "has no /exports: defaults are used" in say("install", "--name=web", image)


def test_a_root_file_system_elsewhere(say: Say, tmp_path: Path, root: Path) -> None:
    there = tmp_path / "mine"
    exports = there / "rootfs/exports"
    exports.mkdir(parents=True)
    for name, content in PLAIN.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (exports / name.rpartition("/")[2]).write_text(text)
    say("install", "--name=web", f"--rootfs={there}", "docker.io/any/name")
    assert config(root)["root"]["path"] == str(there / "rootfs")
    assert (slot(root) / "rootfs").readlink() == there / "rootfs"
    assert json.loads((slot(root) / "info").read_text())["remote"] == str(there / "rootfs")
    assert "Latest version" in say("update", "web")
    say("update", "--set=GREETING=new", "web")
    assert config(root, 1)["process"]["args"] == ["run.sh", "new"]
    say("uninstall", "web")
    assert (exports / "manifest.json").exists(), "what is elsewhere is not ours"
    assert not slot(root).exists()
    told = say("install", "--name=web", f"--rootfs={tmp_path}", "x", code=1)
    assert "holds no root file system" in told


def test_run_once(say: Say, tmp_path: Path, root: Path) -> None:
    """The container is run where it would be installed, and nothing of it stays."""
    mark, runtime = root / "mark", tmp_path / "runtime"

    def write(deed: str) -> None:
        runtime.write_text(f'#!/bin/sh\n[ "$1 $2" != "run job" ] || {{ {deed}; }}\n')
        runtime.chmod(0o755)

    write(f"test -f config.json && test -d rootfs && echo $2 >{mark}")
    image = build(tmp_path / "image", PLAIN, labels={"atomic.run": "once"})
    say("install", "--name=job", f"--runtime={runtime}", image)
    assert mark.read_text() == "job\n"
    assert containers.installed(root) == ()
    assert list((root / "var/lib/containers/atomic").iterdir()) == []
    assert not (root / "etc/systemd").exists()
    write("exit 3")
    assert "job ended with exit code 3" in say(
        "install", "--name=job", f"--runtime={runtime}", image, code=1
    )
    assert list((root / "var/lib/containers/atomic").iterdir()) == []


# ---------------------------------------------------------------- update, rollback, uninstall


def test_update(say: Say, plain: str, root: Path) -> None:
    say("install", "--name=web", plain)
    uuid = current(root).values["UUID"]
    assert say("update", "web") == "web: Latest version already installed.\n"
    assert say("update", "--set=GREETING=new", "web").splitlines() == [
        "Extracting to /var/lib/containers/atomic/web.1",
        "web: updated; it was not running and was not started",
    ]
    assert config(root, 1)["process"]["args"] == ["run.sh", "new"]
    assert current(root).values["UUID"] == uuid
    assert say("update", "--set=GREETING=new", "web") == "web: Latest version already installed.\n"
    assert "nothing is not installed" in say("update", "nothing", code=1)
    for words in ([], ["--all", "web"], ["--all", f"--rebase={plain}"]):
        assert "update takes one NAME" in say("update", *words, code=64)


def test_update_of_all_goes_on_after_a_failure(
    say: Say, plain: str, tmp_path: Path, root: Path
) -> None:
    other = build(tmp_path / "other", PLAIN)
    say("install", "--name=a", other)
    say("install", "--name=b", plain)
    (tmp_path / "other/index.json").unlink()
    told = say("update", "--all", "--set=GREETING=new", code=1)
    assert "a: " in told and "is not an OCI image layout" in told
    assert current(root, "b").values["GREETING"] == "new"


def test_rollback_goes_forth_and_back(say: Say, tmp_path: Path, root: Path) -> None:
    one = build(tmp_path / "one", {**PLAIN, **HOSTFS, "exports/tmpfiles.template": "d /srv/one\n"})
    more = {"exports/hostfs/etc/two": "two", "exports/tmpfiles.template": "d /srv/two\n"}
    two = build(tmp_path / "two", {**PLAIN, **more})
    say("install", "--name=web", "--set=GREETING=first", one)
    assert "has no deployment to roll back to" in say("rollback", "web", code=1)
    files = {"etc/web-conf/web.conf", "usr/local/bin/webctl", "etc/two", "etc/nowhere"}

    def there() -> set[str]:
        return {path for path in files if os.path.lexists(root / path)}

    states = []
    for words in (["update", f"--rebase={two}"], *[["rollback"]] * 3):
        say(*words, "web")
        states.append((there(), unit(root), tmpfiles(root), current(root).deployment[-5:]))
    assert [state[0] for state in states] == [{"etc/two"}, files - {"etc/two"}] * 2
    assert states[0] == states[2]
    assert states[1] == states[3]
    assert states[0][3] == "web.1"
    assert "d /srv/one" in states[1][2]
    assert "atomic/web.0" in states[1][1]
    assert "is not installed" in say("rollback", "nothing", code=1)


def test_uninstall(say: Say, tmp_path: Path, root: Path) -> None:
    say("install", "--name=web", build(tmp_path / "image", {**PLAIN, **HOSTFS}))
    (root / "etc/web-conf/raw.conf").write_text("mine")
    told = say("uninstall", "web")
    assert told == "Will not delete /etc/web-conf/raw.conf as it was manually modified.\n"
    assert containers.installed(root) == ()
    assert "web is not installed" in say("uninstall", "web", code=1)


# ---------------------------------------------------------------- list and info


KEYS = {
    "id", "image_id", "image_name", "name", "command", "created", "state", "backend", "runtime",
    "vulnerable", "running",
}  # fmt: skip


def test_list_as_openshift_ansible_reads_it(say: Say, plain: str) -> None:
    ask = ("--no-trunc", "-a", "-f", "container=web", "--json")
    assert say("list", *ask) == "[]\n"
    say("install", "--name=web", plain)
    say("install", "--name=website", plain)
    (found,) = json.loads(say("list", *ask))
    assert set(found) == KEYS
    assert (found["name"], found["image_name"], found["backend"]) == ("web", plain, "ostree")
    assert (found["state"], found["running"]) == ("inactive", False)
    assert found["command"] == "run.sh hello"
    assert json.loads(say("list", "--json")) == [], "of those that run there is none"
    lines = say("list", "--all").splitlines()
    assert lines[0].split() == [name.upper() for name in container_verbs.COLUMNS]
    assert [line.split()[0] for line in lines[1:]] == ["web", "website"]
    assert plain not in "".join(lines)
    assert plain in say("list", "--all", "--no-trunc")
    assert "takes COLUMN=VALUE" in say("list", "--filter=web", code=64)
    assert "takes COLUMN=VALUE" in say("list", "--filter=colour=red", code=64)


def test_a_container_that_only_brings_files(say: Say, tmp_path: Path, root: Path) -> None:
    manifest = {**MANIFEST, "noContainerService": True}
    files = {"exports/manifest.json": manifest, "exports/hostfs/etc/x": "x"}
    say("install", "--name=web", build(tmp_path / "image", {**PLAIN, **files}))
    (found,) = json.loads(say("list", "--all", "--json"))
    assert found["state"] == "no service"
    assert not (slot(root) / "rootfs").exists()
    assert "has no deployment" in say("rollback", "web", code=1)
    say("uninstall", "web")
    assert not (root / "etc/x").exists()


def test_info(say: Say, plain: str) -> None:
    say("install", "--name=web", plain)
    shown = json.loads(say("info", "web"))
    assert shown["values"]["GREETING"] == "hello"
    assert shown["deployment"].endswith("/web.0")
    assert shown["previous"] == ""
    say("update", "--set=GREETING=new", "web")
    assert json.loads(say("info", "web"))["previous"].endswith("/web.0")
    assert "nothing is not installed" in say("info", "nothing", code=1)


def test_who_may_not_read_is_told_so(say: Say, plain: str, root: Path) -> None:
    say("install", "--name=web", plain)
    told = root / "told"
    told.touch()
    told.chmod(0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.chroot(root)  # the directories above are root's own
            os.setuid(65534)
            containers.installed(Path("/"))
        except containers.ContainerError as error:
            Path("/told").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert told.read_text() == (
        "Cannot read the containers: Permission denied (/var/lib/containers/atomic/web.0/info)"
    )


# ---------------------------------------------------------------- what atomic installed


@pytest.fixture
def atomics(root: Path, tmp_path: Path) -> Path:
    """A host on which ``atomic`` installed a container and updated it once."""
    base = root / "var/lib/containers/atomic"
    for number, text in ((0, "old"), (1, "new")):
        where = slot(root, number)
        exports = where / "rootfs/exports/hostfs/etc"
        exports.mkdir(parents=True)
        (exports / "web.conf").write_text(text)
        (where / "config.json").write_text('{"process": {"args": ["run.sh"]}}')
        (where / "web.service").write_text(f"[Service]\n# {text}\n")
        (where / "tmpfiles-web.conf").write_text("")
        sums = {"/etc/web.conf": hashlib.sha256(text.encode()).hexdigest()}
        info = {
            "image": "registry.example.com/web",
            "revision": f"{number}" * 64,
            "ostree-commit": "f" * 64,
            "created": 1_525_000_000,
            "values": {"NAME": "web", "HOST_UID": 0, "GREETING": "kept", "UUID": "u"},
            "has-container-service": True,
            "installed-files": list(sums),
            "installed-files-checksum": sums,
            "installed-files-template": [],
            "rename-installed-files": {},
            "rpm-installed": None,
            "system-package": "no",
            "remote": None,
            "use-links": True,
            "runtime": "/usr/bin/runc",
        }
        (where / "info").write_text(json.dumps(info, indent=4))
    (base / "web").symlink_to("/var/lib/containers/atomic/web.1")
    (base / ".storage/ostree").mkdir(parents=True)
    for path, text in (
        ("etc/systemd/system/web.service", "[Service]\n# new\n"),
        ("etc/web.conf", "new"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_what_atomic_installed_is_listed(say: Say, atomics: Path) -> None:
    (found,) = json.loads(say("list", "--all", "--json"))
    assert (found["name"], found["image_id"], found["command"]) == ("web", "1" * 64, "run.sh")
    assert found["created"] == 1_525_000_000


def test_what_atomic_installed_is_rolled_back_updated_and_removed(
    say: Say, atomics: Path, plain: str
) -> None:
    say("rollback", "web")
    assert unit(atomics) == "[Service]\n# old\n"
    assert (atomics / "etc/web.conf").read_text() == "old"
    say("update", f"--rebase={plain}", "--runtime=runc", "web")
    values = current(atomics).values
    assert (values["GREETING"], values["UUID"], values["IMAGE_NAME"]) == ("kept", "u", plain)
    assert not (atomics / "etc/web.conf").exists()
    assert not (slot(atomics, 1) / "rootfs/exports/hostfs").exists()
    say("uninstall", "web")
    assert containers.installed(atomics) == ()


# ---------------------------------------------------------------- files and units together


class Units:
    """Stands in for systemd, and notes what it is asked and where the link points then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.active: set[str] = set()
        self.enabled: set[str] = set()
        self.fails = 0

    def note(self, what: str) -> None:
        link = self.root / "var/lib/containers/atomic/web"
        self.asked.append(f"{what} {link.readlink().name if link.is_symlink() else '-'}")

    def reload(self) -> None:
        self.note("reload")

    def enable(self, unit: str) -> bool:
        self.note("enable")
        if self.fails:
            self.fails -= 1
            raise LocalError("systemd refused")
        self.enabled.add(unit)
        return True

    def disable(self, unit: str) -> None:
        self.note("disable")

    def state(self, unit: str) -> UnitState:
        active = "active" if unit in self.active else "inactive"
        return UnitState("loaded", active, "", "", 1.0)

    def stop(self, unit: str, deadline: float) -> None:
        self.note("stop")
        self.active.discard(unit)

    def is_enabled(self, unit: str) -> bool:
        return unit in self.enabled

    def start(self, unit: str, deadline: float, *, restart: bool = False) -> None:
        self.note("restart" if restart else "start")
        if self.fails:
            self.fails -= 1
            raise LocalError(f"{unit} failed: it exited with status 3")
        self.active.add(unit)


@pytest.fixture
def units(root: Path, monkeypatch: pytest.MonkeyPatch) -> Units:
    double = Units(root)
    monkeypatch.setattr(container_units.Units, "systemd", double)
    monkeypatch.setattr(container_units, "SETTLE_SECONDS", 0.2)
    return double


def test_install_enables_and_does_not_start(say: Say, units: Units, plain: str) -> None:
    say("install", "--name=web", plain)
    assert units.asked == ["reload web.0", "enable web.0"]
    say("install", "--name=web", plain)
    assert units.asked == ["reload web.0", "enable web.0"], "again: nothing"


def test_a_unit_that_cannot_be_enabled_is_not_installed(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    units.fails = 1
    assert "systemd refused" in say("install", "--name=web", plain, code=1)
    assert containers.installed(root) == ()
    assert not list((root / "etc").rglob("web*"))
    say("install", "--name=web", plain)
    assert units.enabled == {"web.service"}


def test_an_interrupted_install_is_enabled_by_the_next(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            containers.install(root, "web", plain, {}, enable=lambda _: os._exit(0))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert say("install", "--name=web", plain) == "web already present\n"
    assert units.enabled == {"web.service"}
    units.asked.clear()
    say("install", "--name=web", plain)
    assert units.asked == []


def test_update_stops_switches_and_starts(say: Say, units: Units, plain: str) -> None:
    say("install", "--name=web", plain)
    units.asked.clear()
    say("update", "--set=GREETING=one", "web")
    assert units.asked == ["reload web.1"], "what does not run is not started"
    units.active.add("web.service")
    units.asked.clear()
    say("update", "--set=GREETING=two", "web")
    assert units.asked == ["stop web.1", "reload web.0", "start web.0"]
    units.asked.clear()
    say("rollback", "web")
    assert units.asked == ["stop web.0", "reload web.1", "start web.1"]


def test_an_update_that_does_not_start_is_rolled_back(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    say("install", "--name=web", plain)
    units.active.add("web.service")
    units.asked.clear()
    units.fails = 1
    told = say("update", "--set=GREETING=bad", "web", code=1)
    assert "Could not restart web.  Attempt automatic rollback" in told
    assert "was rolled back: web.service failed: it exited with status 3" in told
    assert units.asked == [
        "stop web.0",
        "reload web.1",
        "start web.1",
        "reload web.0",
        "start web.0",
    ]
    assert current(root).values["GREETING"] == "hello"
    assert units.active == {"web.service"}
    units.fails = 2
    told = say("update", "--set=GREETING=bad", "web", code=1)
    assert "nor did the rollback" in told


def test_an_update_that_dies_soon_is_rolled_back(
    say: Say, units: Units, plain: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("install", "--name=web", plain)
    units.active.add("web.service")
    looks = iter([True, True, True])

    def state(unit: str) -> UnitState:
        alive = next(looks, False) or current(root).values["GREETING"] == "hello"
        return UnitState("loaded", "active" if alive else "failed", "", "exit-code", 1.0)

    monkeypatch.setattr(units, "state", state)
    told = say("update", "--set=GREETING=bad", "web", code=1)
    assert "was rolled back: web.service did not stay up: failed (exit-code)" in told
    assert current(root).values["GREETING"] == "hello"


def cut_short(root: Path) -> None:
    """An update up to where its unit would be started."""
    containers.update(root, "web", {"GREETING": "new"})
    assert trial.names(root) == ["web"]


def test_an_update_that_was_cut_short_comes_up_at_boot(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    say("install", "--name=web", plain)
    cut_short(root)
    units.asked.clear()
    assert "web: its update, which was interrupted, has come up" in say("finish")
    assert units.asked == ["reload web.1", "start web.1"]
    assert trial.names(root) == []
    units.asked.clear()
    assert say("finish") == ""
    assert units.asked == [], "once"


def test_an_update_that_was_cut_short_and_does_not_come_up_is_rolled_back_at_boot(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    say("install", "--name=web", plain)
    cut_short(root)
    units.fails = 1
    units.asked.clear()
    assert "web: the update of web did not come up and was rolled back" in say("finish", code=1)
    assert units.asked == ["reload web.1", "start web.1", "reload web.0", "start web.0"]
    assert current(root).values["GREETING"] == "hello"
    assert trial.names(root) == []


def test_an_update_that_was_cut_short_before_its_link_changed(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    say("install", "--name=web", plain)
    trial.begin(root, "web", "web.0")
    units.fails = 9
    assert "did not come up" not in say("finish", code=1), "there is nothing to roll back to"
    assert current(root).deployment.endswith("web.0")
    assert trial.names(root) == []


def test_a_unit_that_is_not_started_at_boot_is_not_started(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    say("install", "--name=web", plain)
    units.enabled.clear()
    cut_short(root)
    units.asked.clear()
    say("finish")
    assert units.asked == ["reload web.1"]
    assert trial.names(root) == []


def test_the_next_update_ends_the_one_before(
    say: Say, units: Units, plain: str, root: Path
) -> None:
    """Else it would overwrite the deployment that is known to work."""
    say("install", "--name=web", plain)
    cut_short(root)
    units.fails = 1
    assert "was rolled back" in say("update", "--set=GREETING=newer", "web", code=1)
    assert current(root).values["GREETING"] == "hello"
    say("update", "--set=GREETING=newer", "web")
    assert current(root).values["GREETING"] == "newer"
    assert trial.names(root) == []


def test_a_unit_that_cannot_be_asked_leaves_the_container_on_trial(
    say: Say, units: Units, plain: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("install", "--name=web", plain)
    cut_short(root)

    def start(*_: object, **__: object) -> None:
        raise SystemdFailed("no message bus")

    monkeypatch.setattr(units, "start", start)
    assert "no message bus" in say("finish", code=1)
    assert current(root).deployment.endswith("web.1")
    assert trial.names(root) == ["web"]
    say("uninstall", "web")
    assert trial.names(root) == []


def test_what_was_stopped_for_an_update_that_failed_runs_again(
    say: Say, units: Units, tmp_path: Path, plain: str
) -> None:
    say("install", "--name=web", plain)
    units.active.add("web.service")
    broken = build(tmp_path / "broken", {**PLAIN, "exports/tmpfiles.template": "q? nonsense\n"})
    units.asked.clear()
    assert "systemd-tmpfiles failed" in say("update", f"--rebase={broken}", "web", code=1)
    assert units.asked == ["stop web.0", "reload web.0", "start web.0"]
    units.asked.clear()
    broken = build(tmp_path / "unknown", {**PLAIN, "exports/service.template": "$NOBODY"})
    assert "NOBODY" in say("update", f"--rebase={broken}", "web", code=1)
    assert units.asked == [], "what fails before the switch stops nothing"


def test_uninstall_stops_and_disables_first(say: Say, units: Units, plain: str) -> None:
    say("install", "--name=web", plain)
    units.asked.clear()
    say("uninstall", "web")
    assert units.asked == ["stop web.0", "disable web.0", "reload -"]


def test_stopped_lines_are_removed_on_update(say: Say, tmp_path: Path, root: Path) -> None:
    """As ``systemd-tmpfiles --remove`` does: a D line's directory is emptied."""
    lines = {"exports/tmpfiles.template": "D /srv/cache\n"}
    say("install", "--name=web", build(tmp_path / "image", {**PLAIN, **lines}))
    (root / "srv/cache/old").write_text("")
    say("update", "--set=GREETING=new", "web")
    assert list((root / "srv/cache").iterdir()) == []


def test_nothing_of_the_unused_is_left(plain: str, root: Path) -> None:
    """An image refused in any way leaves an empty host; see also the tests of crashes."""
    with pytest.raises(containers.ContainerError):
        install(root, plain + ":absent")
    assert_nothing_installed(root)
