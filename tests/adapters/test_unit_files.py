"""The unit files, read by systemd itself beside stand-ins for cloud-init's stages."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from firstboot import host
from firstboot.containers import trial
from firstboot.host.status import STATUS
from firstboot.protocol.errors import UserError
from firstboot.userdata import places

UNITS = Path(__file__).parents[2] / "units"
# Enough of a boot, with the ordering of systemd's own units (bootup(7)); nothing of this machine.
BOOT = {
    "sysinit.target": "",
    "basic.target": "Requires=sysinit.target\nAfter=sysinit.target",
    "network.target": "",
    "network-online.target": "After=network.target",
    "nss-lookup.target": "",
    "time-sync.target": "",
    "shutdown.target": "",
    "multi-user.target": "Requires=basic.target\nAfter=basic.target",
}
EARLY = "DefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target"
CONFIG_STAGE = "Wants=network-online.target cloud-config.target\n"
CONFIG_STAGE += "After=network-online.target cloud-config.target"
FINAL_STAGE = "Wants=network-online.target cloud-config.service\n"
FINAL_STAGE += "After=network-online.target cloud-config.service"


def stages(network: str, final: str, main: str = "") -> dict[str, str]:
    """cloud-init's units; `network` is the network stage's name, which 24.3 changed."""
    units = {
        "cloud-init-local.service": f"{EARLY}\nBefore=network.target sysinit.target\n{main}",
        network: f"{EARLY}\nWants=cloud-init-local.service\nAfter=cloud-init-local.service\n"
        f"Before=network-online.target\n{main}",
        "cloud-config.target": f"Wants=cloud-init-local.service {network}\n"
        f"After=cloud-init-local.service {network}",
        "cloud-config.service": CONFIG_STAGE,
        "cloud-final.service": f"{FINAL_STAGE}\n{final}",
        "cloud-init.target": "Wants=cloud-final.service cloud-config.service\n"
        "After=multi-user.target",
    }
    if main:
        units["cloud-init-main.service"] = f"{EARLY}\nBefore=cloud-init-local.service"
    return units


LATE = "After=multi-user.target"
GENERATIONS = {
    "22.4 on Fedora": stages("cloud-init.service", ""),
    "22.4 on Debian": stages("cloud-init.service", LATE),
    "26.2": stages("cloud-init-network.service", LATE, "Requires=cloud-init-main.service"),
    "absent": {},
}


class Tree:
    """A directory of units that systemd reads instead of the machine's."""

    def __init__(self, directory: Path, cloud_init: dict[str, str], *, enabled: bool = True):
        self.directory = directory
        for name, text in {**BOOT, **cloud_init}.items():
            self.write(name, text)
        for name in ("firstboot.service", "firstboot.target"):
            text = (UNITS / name).read_text()
            # The program is not installed here, which is no fault of the unit.
            (directory / name).write_text(text.replace("/usr/bin/firstboot", "/bin/true"))
        self.want("firstboot.service")
        if enabled and cloud_init:
            self.want(
                "cloud-init.target"
            )  # as cloud-init's generator does if there is a datasource

    def write(self, name: str, text: str) -> None:
        service = "\n[Service]\nType=oneshot\nExecStart=/bin/true\n"
        rest = service if name.endswith(".service") else "\n"
        (self.directory / name).write_text(f"[Unit]\n{text}{rest}")

    def want(self, name: str) -> None:
        wants = self.directory / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(f"../{name}")

    def order(self, dependencies: str) -> None:
        """Let firstboot.service be ordered, or want, something else instead of what it says."""
        path = self.directory / "firstboot.service"
        text, changed = re.subn(r"(?m)^After=cloud-config.*$", dependencies, path.read_text())
        assert changed == 1
        path.write_text(text)

    def boot(self, target: str = "multi-user.target") -> tuple[set[str], list[str]]:
        """What systemd would start for `target`, and all it has to say against these units."""
        jobs = set(re.findall(r"Installed new job (\S+)/start", self._verify(target, "debug")))
        assert target in jobs, "systemd-analyze did not do its work"
        return jobs, self._verify(target, "notice").splitlines()

    def _verify(self, target: str, level: str) -> str:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(self.directory / target)],
            env={
                "PATH": os.environ["PATH"],
                "SYSTEMD_UNIT_PATH": str(self.directory),
                "SYSTEMD_LOG_LEVEL": level,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stderr


@pytest.mark.parametrize("generation", GENERATIONS)
def test_it_starts_beside_every_cloud_init(tmp_path: Path, generation: str) -> None:
    jobs, complaints = Tree(tmp_path, GENERATIONS[generation]).boot()
    assert complaints == []
    assert {"firstboot.service", "network-online.target"} <= jobs
    assert ("cloud-final.service" in jobs) is (generation != "absent")


@pytest.mark.parametrize(
    ("ordering", "generation"),
    [
        ("After=cloud-init.target", "22.4 on Fedora"),
        ("After=cloud-init.target", "22.4 on Debian"),
        ("After=cloud-init.target", "26.2"),
        ("After=cloud-final.service", "22.4 on Debian"),
        ("After=cloud-final.service", "26.2"),
    ],
)
def test_the_orderings_that_would_not_do_are_reported(
    tmp_path: Path, ordering: str, generation: str
) -> None:
    """The check above can fail: these are the cycles that systemd breaks by deleting a job."""
    tree = Tree(tmp_path, GENERATIONS[generation])
    tree.order(ordering)
    _, complaints = tree.boot()
    assert any("ordering cycle" in line for line in complaints)


@pytest.mark.parametrize("generation", ["22.4 on Fedora", "26.2"])
def test_it_does_not_start_a_cloud_init_that_is_disabled(tmp_path: Path, generation: str) -> None:
    tree = Tree(tmp_path, GENERATIONS[generation], enabled=False)
    jobs, complaints = tree.boot()
    assert complaints == []
    assert "firstboot.service" in jobs
    assert [name for name in jobs if name.startswith("cloud")] == []
    tree.order("Wants=cloud-config.target\nAfter=cloud-config.target")
    jobs, _ = tree.boot()
    assert [name for name in jobs if name.startswith("cloud")] != []  # so it would be seen


@pytest.mark.parametrize("generation", ["22.4 on Debian", "26.2"])
def test_after_a_power_cycle_systemd_alone_reaches_the_target(
    tmp_path: Path, generation: str
) -> None:
    tree = Tree(tmp_path, GENERATIONS[generation])
    tree.write("etcd.service", "Wants=network-online.target\nAfter=network-online.target")
    tree.write("mine.service", "After=firstboot.target")
    drop_in = tmp_path / "firstboot.target.d"
    drop_in.mkdir()
    (drop_in / "10-role.conf").write_text("[Unit]\nRequires=etcd.service\nAfter=etcd.service\n")
    tree.want("firstboot.target")
    wants = tmp_path / "firstboot.target.wants"
    wants.mkdir()
    (wants / "mine.service").symlink_to("../mine.service")
    jobs, complaints = tree.boot()
    assert complaints == []
    assert {"firstboot.target", "etcd.service", "mine.service", "cloud-final.service"} <= jobs


def test_a_misspelt_setting_would_be_reported(tmp_path: Path) -> None:
    tree = Tree(tmp_path, {})
    path = tmp_path / "firstboot.service"
    path.write_text(path.read_text().replace("RestartSec=", "RestartSecs="))
    _, complaints = tree.boot()
    assert any("RestartSecs" in line for line in complaints)


# ---------------------------------------------------------------- agreement with the program


def settings(name: str) -> dict[str, list[str]]:
    """Every value of each setting, in order (systemd.syntax(7), without continued lines)."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_service_and_the_program_agree(tmp_path: Path) -> None:
    said = settings("firstboot.service")
    state = host.StateDirectory(tmp_path)
    state.note_sealing(b"")
    mark = next(p for p in state.path.iterdir() if p.is_file())
    assert said["ConditionPathExists"][0] == f"|/{mark.relative_to(tmp_path)}"
    assert said["StateDirectory"] == [state.path.name]
    assert said["StateDirectoryMode"] == [f"{stat.S_IMODE(state.path.stat().st_mode):04o}"]
    assert f"run/{said['RuntimeDirectory'][0]}" == str(Path(STATUS).parent)
    wanted = said["ConditionPathExists"][1:] + said["ConditionDirectoryNotEmpty"]
    assert sorted(wanted) == sorted(
        f"|/{path}" for path in (places.CONFIG, places.ENABLED, *places.DROP_INS)
    )
    assert str(UserError("").code) in said["RestartPreventExitStatus"][0].split()


def test_multi_user_waits_for_nobody() -> None:
    said = settings("firstboot.service")
    assert said["Type"] == ["notify"]  # and the first thing the program does is READY=1
    assert said["WantedBy"] == ["multi-user.target"]
    assert "Before" not in said
    assert "RequiredBy" not in said
    assert said["Wants"] == ["network-online.target", "firstboot-containers.service"]


def test_the_end_of_interrupted_updates_holds_up_no_boot() -> None:
    said = settings("firstboot-containers.service")
    assert said["Type"] == ["simple"], "what is ordered after it waits for its start only"
    assert "Before" not in said
    assert said["ConditionDirectoryNotEmpty"] == [trial.DIRECTORY]
