"""Steps of a plan below a root of their own: what is written, restarted, refused."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import firstboot.deeds
from firstboot import container_units, containers, host
from firstboot.containers import trial
from firstboot.deeds import Deeds
from firstboot.health import ProbeFailed
from firstboot.protocol import plan
from firstboot.protocol.errors import LocalError
from firstboot.units import UnitFailed, UnitState
from tests.adapters.oci_images import PLAIN, build, need_tools

SECRETS = {"ca.crt": b"-CERT-\n", "x.key": b"-KEY-\n", "hosts": b"10.0.0.1 a\n"}


class Systemd:
    """Notes what it is asked for; `active` is what it says of every unit."""

    active = "inactive"
    failed: Sequence[int] = (0,)  # how often a unit has, at each time this is asked

    def __init__(self) -> None:
        self.asked = 0
        self.started: list[tuple[str, bool]] = []

    def state(self, _unit: str) -> UnitState:
        return UnitState("loaded", self.active, "dead", "success", 0.0)

    def enable(self, _unit: str) -> bool:
        return True

    def ailing(self, unit: str, known: int) -> tuple[int, UnitFailed | None]:
        self.asked += 1
        count = self.failed[min(self.asked, len(self.failed)) - 1]
        log = ("first", "last words")
        # The newest time it is being started again, and how it had failed is not to be seen.
        how = ("again", "it ends again and again", 0)
        if count < max(self.failed):
            how = ("exit-code", "it exited with status 1", 1)
        return count, UnitFailed(unit, *how, log) if count > known else None

    def log(self, unit: str) -> str:
        return f"last words of {unit}"

    def reload(self) -> None:
        pass

    def start(self, unit: str, deadline: float, *, restart: bool = False) -> None:
        assert deadline > 0
        self.started.append((unit, restart))


class Made(Deeds):
    """Deeds with that systemd."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, host.StateDirectory(root), SECRETS.__getitem__, lambda: self.name)
        self.name = "ab" * 32
        self.manager = Systemd()
        self._systemd = self.manager  # type: ignore[assignment]


@pytest.fixture
def deeds(tmp_path: Path) -> Made:
    return Made(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- files


def test_credentials_are_put_in_when_a_file_is_written(deeds: Made) -> None:
    text = "ca: @{base64:ca.crt}\nkey: @{x.key}# not @{ this } nor ${that}\n"
    deeds.run(plan.WriteFile("/etc/a/b", text, mode=0o600))
    path = deeds.root / "etc/a/b"
    assert path.read_text() == "ca: LUNFUlQtCg==\nkey: -KEY-\n# not @{ this } nor ${that}\n"
    assert mode(path) == 0o600


def test_a_file_to_keep_is_written_once(deeds: Made) -> None:
    step = plan.WriteFile("/etc/localtime", "", keep=True)
    deeds.run(step)
    (deeds.root / "etc/localtime").write_text("theirs")
    deeds.run(step)
    assert (deeds.root / "etc/localtime").read_text() == "theirs"
    (deeds.root / "etc/localtime").unlink()
    (deeds.root / "etc/localtime").symlink_to("/nowhere")  # as without tzdata
    deeds.run(step)
    assert (deeds.root / "etc/localtime").read_text() == ""  # else a container could not bind it


def test_a_file_that_changes_restarts_its_unit_once(deeds: Made) -> None:
    unit = plan.StartUnit("docker.service")
    for text, restarted in (("one", True), ("one", False), ("two", True)):
        deeds.run(plan.WriteFile("/etc/sysconfig/d", text, restarts="docker.service"))
        deeds.run(unit)
        assert deeds.manager.started[-1] == ("docker.service", restarted)


def test_the_resolver_restarts_dnsmasq_when_its_servers_change(deeds: Made) -> None:
    (deeds.root / "etc").mkdir(exist_ok=True)
    (deeds.root / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    step = plan.UseResolver("10.0.0.5", "cluster.local", "/etc/s", "/etc/d", "dnsmasq.service")
    for restarted in (True, False):
        deeds.run(step)
        deeds.run(plan.StartUnit("dnsmasq.service"))
        assert deeds.manager.started[-1] == ("dnsmasq.service", restarted)


def test_a_block_holds_what_the_credential_says_now(deeds: Made) -> None:
    deeds.run(plan.WriteBlock("/etc/hosts", "@{hosts}"))
    assert "10.0.0.1 a\n" in (deeds.root / "etc/hosts").read_text()


def test_a_kernel_parameter_is_left_alone_in_a_tree(deeds: Made) -> None:
    deeds.run(plan.SetKernel("net.ipv4.ip_forward", "1"))
    assert not (deeds.root / "proc").exists()


# ---------------------------------------------------------------- an earlier cluster's data


def test_data_of_an_earlier_cluster_is_not_taken_over(deeds: Made) -> None:
    step = plan.MakeDirectory("/var/lib/etcd", 0o700, claim=True)
    deeds.run(step)
    data = deeds.root / "var/lib/etcd/member"
    data.mkdir()
    deeds.run(step)  # this cluster's own: a host that was started again
    deeds.name = "cd" * 32
    with pytest.raises(LocalError, match="holds data of an earlier cluster; move it away"):
        deeds.run(step)
    data.rmdir()
    deeds.run(step)
    assert mode(deeds.root / "var/lib/etcd") == 0o700


# ---------------------------------------------------------------- containers


class Refusing(Systemd):
    """A systemd whose `web.service` does not come up with the values in `refused`."""

    def __init__(self, root: Path, refused: set[str]) -> None:
        super().__init__()
        self.root, self.refused = root, refused

    def stop(self, _unit: str, _deadline: float) -> None:
        self.active = "inactive"

    def start(self, unit: str, deadline: float, *, restart: bool = False) -> None:
        super().start(unit, deadline, restart=restart)
        found = containers.info(self.root, "web")
        assert found is not None
        if found.values["GREETING"] in self.refused:
            self.active = "failed"
            raise UnitFailed(unit, "exit-code", "it exited with status 3", 3, ("last words",))
        self.active = "active"


def greeting(root: Path) -> str:
    found = containers.info(root, "web")
    assert found is not None
    return found.values["GREETING"]


def test_a_container_that_does_not_come_up_with_what_replaced_it_is_rolled_back(
    deeds: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_tools()
    monkeypatch.setattr(container_units, "SETTLE_SECONDS", 0.2)
    manager = Refusing(deeds.root, {"bad"})
    deeds._systemd = manager  # type: ignore[assignment]
    image = build(tmp_path / "image", PLAIN)
    start = plan.StartUnit("web.service")
    deeds.run(plan.InstallContainer("web", image, (("GREETING", "good"),)))
    deeds.run(start)
    assert manager.started == [("web.service", False)]
    deeds.run(plan.InstallContainer("web", image, (("GREETING", "bad"),)))
    assert trial.names(deeds.root) == ["web"]
    for _ in range(2):  # what is asked for is tried again, and never quietly given up
        with pytest.raises(LocalError, match=r"web did not come up and was rolled back") as caught:
            deeds.run(start)
        assert "it exited with status 3" in str(caught.value)
        assert getattr(caught.value, "detail", "") == "last words"
        assert (greeting(deeds.root), manager.active) == ("good", "active")
        assert trial.names(deeds.root) == []
    manager.refused.clear()
    deeds.run(start)
    assert (greeting(deeds.root), manager.active) == ("bad", "active")
    assert trial.names(deeds.root) == []
    manager.started.clear()
    deeds.run(start)
    assert manager.started == [("web.service", False)], "settled: no restart"


def test_a_process_killed_before_the_restart_leaves_it_to_the_next(
    deeds: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_tools()
    monkeypatch.setattr(container_units, "SETTLE_SECONDS", 0.2)
    image = build(tmp_path / "image", PLAIN)
    steps = [plan.InstallContainer("web", image, (("GREETING", g),)) for g in ("one", "two")]
    deeds.run(steps[0])
    deeds.manager.active = "active"
    deeds.run(steps[1])
    later = Made(deeds.root)
    later.manager.active = "active"
    later.run(steps[1])
    later.run(plan.StartUnit("web.service"))
    assert later.manager.started == [("web.service", True)]


# ---------------------------------------------------------------- ports


def test_a_port_that_is_taken_is_said_with_who_has_it(deeds: Made) -> None:
    with socket.socket() as theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        step = plan.StartUnit("origin-master-api.service", ports=(f"127.0.0.1:{port}",))
        with pytest.raises(
            LocalError, match=rf"port {port} is taken by .* \(process {os.getpid()}\)"
        ):
            deeds.run(step)
        assert deeds.manager.started == []
        deeds.manager.active = "active"  # then the port is the unit's own
        deeds.run(step)
    deeds.manager.active = "failed"
    deeds.run(step)
    assert len(deeds.manager.started) == 2


def test_a_gate_that_stays_shut_tells_what_its_unit_wrote_last(deeds: Made) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/healthz"
        with pytest.raises(ProbeFailed, match="connection refused") as caught:
            deeds.run(plan.Probe(url, deadline=0.1, unit="origin-master-api.service"))
    assert caught.value.detail == "last words of origin-master-api.service"


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> Iterator[plan.Probe]:
    """A gate at which nobody listens, and whose reasons are told at once."""
    monkeypatch.setattr(firstboot.deeds, "FIRST_TOLD", 0.0)
    monkeypatch.setattr(firstboot.deeds, "TOLD_AGAIN", 0.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/healthz"
        yield plan.Probe(url, deadline=60.0, unit="api.service")


def test_a_gate_tells_its_reason_while_it_is_shut(deeds: Made, shut: plan.Probe) -> None:
    """And gives up as soon as its unit has failed as often as one that is started may."""
    deeds.manager.failed = (5, 5, 6, 7, 8)  # what it did before this gate does not count
    told: list[str] = []
    deeds.gate_told = lambda: told.append(deeds.gate)
    with pytest.raises(UnitFailed, match=r"api.service failed: it exited with status 1") as caught:
        deeds.run(shut)
    assert caught.value.detail == "first\nlast words"
    refused, failed = "connection refused: nothing listens there yet", "it exited with status 1"
    assert told == [refused, f"{refused}; api.service failed: {failed}; last words", ""]
    assert deeds.gate == ""


def test_a_gate_without_a_unit_asks_systemd_for_nothing(deeds: Made, shut: plan.Probe) -> None:
    with pytest.raises(ProbeFailed):
        deeds.run(dataclasses.replace(shut, unit="", deadline=0.2))
    assert deeds.manager.asked == 0


def test_a_failing_disk_is_a_sentence(deeds: Made) -> None:
    (deeds.root / "etc").write_text("a file in the way")
    for step in (
        plan.MakeDirectory("/etc/origin"),
        plan.WriteFile("/etc/x", "y", restarts="z.service"),
        plan.WriteBlock("/etc/hosts", "x\n"),
        plan.MakeLink("/etc/l", "/x"),
        plan.UseResolver("10.0.0.5", "x", "/etc/s", "/etc/d"),
    ):
        with pytest.raises(LocalError) as caught:
            deeds.run(step)
        assert "\n" not in str(caught.value)


def test_every_kind_of_step_has_words() -> None:
    from firstboot.payloads.rows import PAYLOADS
    from firstboot.protocol import status

    said: dict[type[Any], str] = {}
    for payload in PAYLOADS.values():
        for rows in (payload.master, payload.node):
            said |= {type(step): status.say(step) for step in rows.steps}
    assert set(said) == set(plan.Step.__args__) - {plan.ReachTarget}
    assert all(said.values())
