"""State files, clones, facts and addresses of this host."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import firstboot
from firstboot.host import (
    Address,
    Facts,
    Interface,
    LostState,
    Machine,
    Network,
    StateDirectory,
    StorageFailed,
    address,
    choose,
    facts,
    look,
    node_name,
    read_status,
    survey,
    wait_for_address,
    write_durably,
    write_status,
)
from firstboot.host import durable as durable_files
from firstboot.host import state as state_module
from firstboot.protocol.errors import LocalError, UserError
from firstboot.protocol.messages import Certificate
from firstboot.protocol.model import (
    Ballot,
    Endpoint,
    Issued,
    Member,
    Profile,
    Register,
    Stored,
    Value,
)

NODE = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2
PROJECT = str(Path(firstboot.__file__).parents[1])
KEY = b"-----BEGIN PRIVATE KEY-----\nnot a real one\n"
HERE = Machine("a" * 32, "11111111-2222-3333-4444-555555555555", "i-1")
FINGERPRINT = "ab" * 32

# ---------------------------------------------------------------- the state file


def voted() -> Stored:
    master = Member(NODE, "node-a", "10.0.0.1")
    value = Value(1, FINGERPRINT, (master,))
    return Stored(
        register=Register(Ballot(7, NODE), Ballot(5, OTHER), value),
        decided=value,
        enrolled=master,
        voters=(NODE, OTHER),
    )


def started(root: Path) -> StateDirectory:
    state = StateDirectory(root)
    state.begin(KEY, HERE)
    return state


def test_a_new_host_has_no_state_and_no_key(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    assert state.load() is None
    assert state.load_identity_key() is None
    assert state.adopt(HERE) == ""
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_what_is_saved_is_read_by_the_next_process(tmp_path: Path) -> None:
    state = started(tmp_path)
    assert state.load() == Stored()
    state.save(voted())
    again = StateDirectory(tmp_path)
    assert again.load() == voted()
    assert again.load_identity_key() == KEY
    files = [p for p in again.path.rglob("*") if p.is_file()]
    assert files
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}


def test_the_state_is_on_disk_before_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real_fsync(handle)

    def replace(staged: str, target: Path) -> None:
        order.append(f"-> {target.name}")
        real_replace(staged, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    started(tmp_path)
    begun = order[order.index("-> state.json") - 1 :]
    directory = str(tmp_path / "var/lib/firstboot")
    names = [
        entry if entry in (directory,) or entry.startswith("->") else "data" for entry in begun
    ]
    assert names == [
        *("data", "-> state.json", directory),
        *("data", "-> machine.json", directory),
        *("data", "-> identity.key", directory),
    ]


def test_a_first_start_cut_short_starts_afresh(tmp_path: Path) -> None:
    state = started(tmp_path)
    (state.path / "identity.key").unlink()
    again = StateDirectory(tmp_path)
    assert again.load() is None
    assert again.begin(b"another", HERE) == Stored()
    assert not list(state.path.glob("clone-*"))


def test_a_state_with_history_but_no_key_is_not_inherited(tmp_path: Path) -> None:
    state = started(tmp_path)
    state.save(voted())
    state.put("cluster-1/ca.key", b"secret")
    (state.path / "identity.key").unlink()
    again = StateDirectory(tmp_path)
    again.begin(b"another", HERE)
    assert again.load() == Stored()
    assert again.get("cluster-1/ca.key") is None
    assert (state.path / "clone-1/secrets/cluster-1/ca.key").read_bytes() == b"secret"


def test_a_second_identity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="identity already"):
        started(tmp_path).begin(b"another", HERE)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "torn": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "not an object": lambda data: b"[]",
    "no state": lambda data: b'{"schema":1}',
    "other schema": lambda data: data.replace(b'"schema":1', b'"schema":2'),
    "unknown field": lambda data: data.replace(b'"closed"', b'"opened"'),
    "wrong type": lambda data: data.replace(b'"voters":[', b'"voters":[1,'),
    "impossible value": lambda data: data.replace(b'"epoch":1', b'"epoch":-1'),
    "deep": lambda data: b"[" * 100_000,
    "not text": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_lost_and_stays_lost(tmp_path: Path, damage: str) -> None:
    state = started(tmp_path)
    state.save(voted())
    file = state.path / "state.json"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    lost = StateDirectory(tmp_path).load()
    assert isinstance(lost, LostState)
    assert lost.stored == Stored()
    assert "state file" in lost.reason
    # It may save what it learns later, its enrolment say, but must never look sound again.
    StateDirectory(tmp_path).save(voted())
    later = StateDirectory(tmp_path).load()
    assert later == LostState(lost.reason, voted())


def test_a_missing_state_beside_a_key_is_lost(tmp_path: Path) -> None:
    state = started(tmp_path)
    (state.path / "state.json").unlink()
    lost = state.load()
    assert isinstance(lost, LostState)
    assert lost.reason == "the state file is missing"
    assert state.load_identity_key() == KEY


def test_every_torn_length_is_lost_state_or_whole(tmp_path: Path) -> None:
    state = started(tmp_path)
    state.save(voted())
    file = state.path / "state.json"
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        (state.path / "votes-lost").unlink(missing_ok=True)
        assert isinstance(state.load(), LostState)


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch, code: int) -> Iterator[None]:
    def broken(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        yield


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_a_failing_disk_is_told_in_words_and_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    state = started(tmp_path)
    with failing_disk(monkeypatch, code), pytest.raises(StorageFailed, match=words):
        state.save(voted())
    assert state.load() == Stored()
    assert not list(state.path.glob("*.staged")) + list(state.path.glob(".*.staged"))
    state.save(voted())
    assert StateDirectory(tmp_path).load() == voted()


def test_a_full_file_system_is_told_in_words(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageFailed, match="cannot store it: the disk is full"),
        durable_files.storage("store it"),
    ):
        Path("/dev/full").write_bytes(b"x")  # the kernel's own ENOSPC, full(4)
    with pytest.raises(StorageFailed, match="No such file"):
        write_durably(tmp_path / "missing/file", b"", 0o600)


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_durably(tmp_path / "open", b"x", 0o644)
        os.umask(0)
        write_durably(tmp_path / "closed", b"x", 0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("open", "closed")]
    assert modes == [0o644, 0o600]


def test_what_a_crashed_writer_left_is_swept(tmp_path: Path) -> None:
    state = started(tmp_path)
    state.put("deep/er/key", b"x")
    litter = [state.path / ".a.staged", state.path / "secrets/deep/er/.b.staged"]
    for path in litter:
        path.write_bytes(b"half a secret")
    StateDirectory(tmp_path)
    assert not any(path.exists() for path in litter)


# ---------------------------------------------------------------- clones


@pytest.mark.parametrize(
    "now",
    [
        Machine("b" * 32, HERE.dmi_uuid, "i-1"),
        Machine(HERE.machine_id, "99999999-2222-3333-4444-555555555555", "i-1"),
    ],
)
def test_a_cloned_disk_gets_a_new_identity(tmp_path: Path, now: Machine) -> None:
    state = started(tmp_path)
    state.save(voted())
    state.put("cluster-1/ca.key", b"secret")
    state.finish()
    clone = StateDirectory(tmp_path)
    assert "copied from another machine" in clone.adopt(now)
    assert clone.load() is None
    assert not clone.complete
    assert clone.get("cluster-1/ca.key") is None
    clone.begin(b"new", now)
    assert StateDirectory(tmp_path).adopt(now) == ""
    assert StateDirectory(tmp_path).load() == Stored()
    assert (clone.path / "clone-1/identity.key").read_bytes() == KEY
    # a clone of the clone
    third = Machine("c" * 32, now.dmi_uuid, "i-1")
    assert "clone-2" in StateDirectory(tmp_path).adopt(third)
    assert (clone.path / "clone-1/identity.key").read_bytes() == KEY


def test_a_clone_cut_short_while_moving_has_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path).save(voted())
    moved: list[str] = []
    real = Path.rename

    def once(self: Path, target: Path) -> Path:
        if moved:
            raise OSError(errno.EIO, "power cut")
        moved.append(self.name)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(StorageFailed):
        StateDirectory(tmp_path).adopt(Machine("b" * 32))
    monkeypatch.undo()
    assert moved == ["identity.key"]
    again = StateDirectory(tmp_path)
    assert again.adopt(Machine("b" * 32)) == ""
    assert again.load() is None
    again.begin(b"new", Machine("b" * 32))
    assert again.load() == Stored()


def test_a_new_instance_id_alone_keeps_the_identity(tmp_path: Path) -> None:
    state = started(tmp_path)
    state.save(voted())
    note = state.adopt(Machine(HERE.machine_id, HERE.dmi_uuid, "i-2"))
    assert "instance-id was i-1 and is i-2" in note
    assert state.load() == voted()
    assert state.adopt(Machine(HERE.machine_id, HERE.dmi_uuid, "i-2")) == ""  # told once


def test_ids_that_are_unknown_prove_nothing_and_are_learnt_later(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.begin(KEY, Machine("a" * 32))
    assert state.adopt(Machine("", "", "")) == ""
    assert state.adopt(HERE) == ""
    assert state.adopt(Machine("a" * 32)) == ""
    assert "DMI UUID" in state.adopt(Machine("a" * 32, "another"))


def test_lost_looks_are_taken_anew(tmp_path: Path) -> None:
    state = started(tmp_path)
    (state.path / "machine.json").write_text("{")
    assert state.adopt(HERE) == ""
    assert state.load() == Stored()
    assert "machine-id" in state.adopt(Machine("b" * 32))


def test_erase_makes_a_new_host(tmp_path: Path) -> None:
    state = started(tmp_path)
    state.put("a", b"x")
    state.finish()
    assert StateDirectory(tmp_path).complete
    state.erase()
    assert list(state.path.iterdir()) == []
    state = StateDirectory(tmp_path)
    assert state.load() is None
    state.begin(KEY, HERE)


def test_a_seal_is_noted_until_everything_else_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = started(tmp_path)
    state.note_sealing(b"etcd")
    removed: list[str] = []
    real = state_module._remove

    def remove(path: Path) -> None:
        if removed:
            raise OSError(errno.EIO, "cut short")
        removed.append(path.name)
        real(path)

    monkeypatch.setattr(state_module, "_remove", remove)
    with pytest.raises(StorageFailed):
        state.erase()
    assert StateDirectory(tmp_path, working=False).sealing == b"etcd"
    assert state.load() is None  # the identity went first
    monkeypatch.undo()
    state.erase()
    assert state.sealing is None
    assert list(state.path.iterdir()) == []


# ---------------------------------------------------------------- secrets and journal


def test_secrets_are_kept_replaced_and_dropped(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    assert state.get("cluster-1/ca.key") is None
    state.put("cluster-1/ca.key", b"one")
    state.put("cluster-1/ca.key", b"two")
    state.put("cluster-1/ca.crt", b"public", 0o644)
    state.put("cluster-10/ca.key", b"ten")
    assert StateDirectory(tmp_path).get("cluster-1/ca.key") == b"two"
    assert stat.S_IMODE((state.path / "secrets/cluster-1/ca.key").stat().st_mode) == 0o600
    assert state.drop("cluster-1/") == 2
    assert state.get("cluster-1/ca.key") is None
    assert state.get("cluster-10/ca.key") == b"ten"
    assert state.drop("cluster-1/") == 0


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", ".hidden", "a/", "a\n"])
def test_a_secret_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    state = StateDirectory(tmp_path)
    with pytest.raises(LocalError):
        state.put(name, b"x")
    with pytest.raises(LocalError):
        state.get(name)


def test_a_journalled_answer_is_found_again(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    first = Issued(Member(NODE, "node-a", "10.0.0.1"), 1, FINGERPRINT)
    second = Issued(Member(OTHER, "node-b", "10.0.0.2"), 1, "cd" * 32)
    later = Issued(Member(NODE, "node-a", "10.0.0.1"), 2, FINGERPRINT)
    certificates = (Certificate(Profile.CLIENT, b"\x30\x82"), Certificate(Profile.SERVER, b"\x30"))
    for entry in (later, second, first):
        state.record(entry, certificates)
    again = StateDirectory(tmp_path)
    assert again.issued() == (first, second, later)
    assert again.issued(1) == (first, second)
    assert again.answer(1, OTHER) == (second, certificates)
    assert again.answer(3, OTHER) is None
    assert again.drop_issued(1) == 2
    assert again.issued() == (later,)


def test_a_damaged_journal_entry_stops_the_signing(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.record(Issued(Member(NODE, "node-a", "10.0.0.1"), 1, FINGERPRINT), ())
    path = state.path / f"issued/1-{NODE}.json"
    path.rename(path.with_name(f"1-{OTHER}.json"))
    with pytest.raises(StorageFailed, match="cannot be read"):
        state.issued()
    path.with_name(f"1-{OTHER}.json").write_text("{}")
    with pytest.raises(StorageFailed, match="cannot be read"):
        state.answer(1, OTHER)


# ---------------------------------------------------------------- the machine


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_ids_of_a_machine(tmp_path: Path) -> None:
    write(tmp_path / "etc/machine-id", "a" * 32 + "\n")
    write(tmp_path / "sys/class/dmi/id/product_uuid", "EC2AE145-D1DC-13B2-94ED-012345678901\n")
    data = {"v1": {"instance_id": "i-1"}, "ds": {"meta_data": {"launch_index": 2}}}
    write(tmp_path / "run/cloud-init/instance-data.json", json.dumps(data))
    assert look(tmp_path) == Machine("a" * 32, "ec2ae145-d1dc-13b2-94ed-012345678901", "i-1", 2)


def test_a_machine_without_ids(tmp_path: Path) -> None:
    assert look(tmp_path) == Machine()
    write(tmp_path / "etc/machine-id", "uninitialized\n")
    write(tmp_path / "sys/class/dmi/id/product_uuid", "00000000-0000-0000-0000-000000000000\n")
    write(tmp_path / "run/cloud-init/instance-data.json", "{ torn")
    assert look(tmp_path) == Machine()


@pytest.mark.parametrize(
    ("data", "index"),
    [
        ({"ds": {"meta_data": {"launch_index": 0}}}, 0),  # OpenStack
        ({"ds": {"meta-data": {"ami-launch-index": "2"}}}, 2),  # EC2
        ({"ds": {"meta_data": {"ami_launch_index": "3"}}}, 3),
        ({"ds": {"meta_data": {"launch-index": "x"}}}, None),
        ({"ds": {"meta_data": {"launch_index": True}}}, None),
        ({"ds": {"meta_data": {"launch_index": -1}}}, None),
        ({"ds": [], "v1": 3}, None),
        ([1], None),
    ],
)
def test_the_launch_index_in_both_spellings(
    tmp_path: Path, data: object, index: int | None
) -> None:
    write(tmp_path / "run/cloud-init/instance-data.json", json.dumps(data))
    assert look(tmp_path).launch_index == index


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("web-1", "web-1"),
        ("Web-1.Example.org", "web-1"),
        ("localhost", "host-012345"),
        ("localhost.localdomain", "host-012345"),
        ("(none)", "host-012345"),
        ("", "host-012345"),
        ("under_score", "host-012345"),
        ("10.0.0.5", "host-012345"),
        ("x" * 64, "host-012345"),
    ],
)
def test_node_names(hostname: str, name: str) -> None:
    assert node_name(hostname, NODE) == name


# ---------------------------------------------------------------- addresses

LO = Interface("lo", loopback=True)
ETH0, ETH1 = Interface("eth0", "52:54:00:00:00:01"), Interface("eth1", "52:54:00:00:00:02")
LOOP = Address("127.0.0.1", "lo")
TEN, TEN6 = Address("10.0.0.5", "eth0"), Address("fd00::5", "eth0")
SIX = Address("192.168.6.6", "eth1")
LOCAL, LOCAL6 = Address("169.254.3.4", "eth0"), Address("fe80::5%eth0", "eth0")


def net(*addresses: Address, default: tuple[str, ...] = ()) -> Network:
    return Network((LO, ETH0, ETH1), (LOOP, *addresses), default)


@pytest.mark.parametrize(
    ("network", "interface", "cidr", "chosen"),
    [
        (net(), "", "", None),
        (net(TEN), "", "", TEN),
        (net(TEN6, TEN), "", "", TEN),
        (net(LOCAL6, TEN6), "", "", TEN6),
        (net(LOCAL6, LOCAL), "", "", LOCAL),
        (net(LOCAL6), "", "", LOCAL6),
        (net(TEN, SIX, default=("eth1", "eth0")), "", "", SIX),
        (net(TEN, SIX, default=("eth1",)), "eth0", "", TEN),
        (net(TEN, SIX, default=("eth1",)), "", "10.0.0.0/8", TEN),
        (net(TEN, TEN6), "", "fd00::/64", TEN6),
        (net(TEN, SIX), "", "172.16.0.0/12", None),
        (net(TEN, SIX), "eth7", "", None),
        (net(SIX, default=("eth0",)), "", "", SIX),  # the default route's has none
        (net(LOCAL, SIX, default=("eth0",)), "", "", SIX),  # or only a link-local one
        (net(Address("fd00::9", "eth0", fleeting=True), TEN6), "", "", TEN6),
        (net(Address("10.9.9.9", "lo")), "", "", None),
        (net(Address("10.9.9.9", "lo")), "lo", "", Address("10.9.9.9", "lo")),
        (net(Address("10.9.9.9", "lo")), "", "10.9.0.0/16", Address("10.9.9.9", "lo")),
        (net(Address("10.9.9.9", "lo"), TEN, TEN6), "", "0.0.0.0/0", TEN),
        (net(TEN, TEN6), "", "::/0", TEN6),
        (Network((LO, Interface("eth0", up=False)), (TEN,), ("eth0",)), "", "", None),
    ],
)
def test_the_address_for_peers(
    network: Network, interface: str, cidr: str, chosen: Address | None
) -> None:
    assert choose(network, interface, cidr) == chosen


def test_a_choice_that_only_the_operator_can_make() -> None:
    with pytest.raises(UserError, match=r"10.0.0.5 on eth0, 192.168.6.6 on eth1") as caught:
        choose(net(TEN, SIX))
    assert "network.interface" in caught.value.hint


def test_matches() -> None:
    host = Facts(Machine("a" * 32, launch_index=0), "Web-1.example.org", net(TEN, TEN6), TEN, 7443)
    fits: list[dict[str, Any]] = [
        {"launch_index": 0},
        {"mac": "52:54:00:00:00:02"},
        {"mac": "52:54:00:00:00:01", "hostname": "web-1"},
        {"hostname": "WEB-1.EXAMPLE.ORG"},
        {"address": "10.0.0.5"},
        {"address": "10.0.0.0/24"},
        {"address": "fd00::/8"},
        {"machine_id": "a" * 32},
    ]
    assert [m for m in fits if not host.matches(m)] == []
    differs: list[dict[str, Any]] = [
        {},
        {"launch_index": 1},
        {"launch_index": 0, "hostname": "web-2"},
        {"mac": "52:54:00:00:00:09"},
        {"address": "127.0.0.1"},
        {"address": "10.0.1.0/24"},
        {"machine_id": "b" * 32},
    ]
    assert [m for m in differs if host.matches(m)] == []
    assert not Facts(Machine(), "", net(), None, 7443).matches({"launch_index": 0})
    assert not Facts(Machine(), "", net(), None, 7443).matches({"machine_id": ""})
    with pytest.raises(LocalError, match="colour"):
        host.matches({"colour": "red"})
    assert host.endpoint == Endpoint("10.0.0.5", 7443)
    assert host.macs == (ETH0.mac, ETH1.mac)


def test_facts_of_a_root(tmp_path: Path) -> None:
    write(tmp_path / "proc/sys/kernel/hostname", "web-1\n")
    seen = facts(tmp_path, interface="no-such-interface", port=1234)
    assert (seen.hostname, seen.address, seen.endpoint) == ("web-1", None, None)
    assert any(i.loopback for i in seen.network.interfaces)


# ---------------------------------------------------------------- the kernel's tables


class Namespace:
    """A network namespace that lives as long as a sleeping process in it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.holder = subprocess.Popen(
            [
                "unshare",
                "-n",
                sys.executable,
                "-c",
                "import sys; print(flush=True); sys.stdin.read()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"\n", "no network namespace: root is needed"

    def ip(self, *arguments: str) -> None:
        prefix = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "ip"]
        subprocess.run([*prefix, *arguments], check=True, timeout=20)

    def inside(self, program: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PROJECT},
        )
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate(timeout=20)
        self.holder.communicate(timeout=20)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    space = Namespace()
    try:
        yield space
    finally:
        space.close()


SURVEY = "from firstboot.host import survey; print(survey())"
WAIT = """
import asyncio
from firstboot.host import wait_for_address
async def main():
    first = await wait_for_address()
    print(first.host, flush=True)
    other = await wait_for_address(known=first.host)
    print(other.host, flush=True)
waiting = asyncio.wait_for(main(), 30)
print("waiting", flush=True)
asyncio.run(waiting)
"""


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_survey_of_a_namespace(namespace: Namespace) -> None:
    namespace.ip("link", "add", "left", "type", "veth", "peer", "name", "right")
    namespace.ip("link", "set", "left", "address", "02:00:00:00:00:01")
    for name in ("lo", "left", "right"):
        namespace.ip("link", "set", name, "up")
    namespace.ip("addr", "add", "10.5.0.1/24", "dev", "left")
    namespace.ip("addr", "add", "fd05::1/64", "dev", "right", "nodad")
    namespace.ip("link", "add", "idle", "type", "veth", "peer", "name", "eldi")
    namespace.ip("route", "add", "default", "via", "10.5.0.9", "metric", "50")
    namespace.ip("-6", "route", "add", "default", "via", "fd05::9", "metric", "5")
    namespace.ip("route", "add", "unreachable", "default", "metric", "9999")
    process = namespace.inside(SURVEY)
    seen = eval(read_line(process))  # dataclasses print as their constructors
    assert process.wait(20) == 0
    assert seen.default == ("left", "right")
    links = {i.name: i for i in seen.interfaces}
    assert links["left"] == Interface("left", "02:00:00:00:00:01", up=True)
    assert links["lo"].loopback
    assert not links["idle"].up
    hosts = {a.host for a in seen.addresses if not a.ip.is_link_local}
    assert hosts == {"127.0.0.1", "::1", "10.5.0.1", "fd05::1"}
    assert choose(seen) == Address("10.5.0.1", "left", prefix=24)
    assert Address("10.5.0.1", "left", prefix=24).subnet == "10.5.0.0/24"


def test_waiting_for_an_address_is_woken_by_the_kernel(namespace: Namespace) -> None:
    process = namespace.inside(WAIT)
    assert read_line(process) == "waiting"
    namespace.ip("link", "add", "left", "type", "veth", "peer", "name", "right")
    namespace.ip("addr", "add", "10.5.0.1/24", "dev", "left")
    for name in ("left", "right"):
        namespace.ip("link", "set", name, "addrgenmode", "none")  # no fe80:: in between
        namespace.ip("link", "set", name, "up")
    assert read_line(process) == "10.5.0.1"
    namespace.ip("addr", "add", "10.7.0.2/24", "dev", "left")
    namespace.ip("addr", "add", "10.6.0.2/24", "dev", "right")  # now there is a choice,
    namespace.ip("addr", "del", "10.5.0.1/24", "dev", "left")  # so going is no reason to guess
    namespace.ip("addr", "del", "10.6.0.2/24", "dev", "right")
    assert read_line(process) == "10.7.0.2"
    assert process.wait(20) == 0


def test_waiting_answers_at_once_if_there_is_one() -> None:
    if not (network := survey()).addresses:
        pytest.fail("this machine has no address at all, not even loopback")
    assert any(a.host == "127.0.0.1" for a in network.addresses)
    # 127/8 never counts, so on a machine with only loopback this has to wait.
    expected = choose(network)
    if expected is None:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(wait_for_address(), 0.1))
    else:
        assert asyncio.run(asyncio.wait_for(wait_for_address(), 10)) == expected


@pytest.mark.parametrize(
    ("known", "there", "other"),
    [
        ("", ["fe80::1%eth0"], "fe80::1%eth0"),
        ("10.0.0.1", ["fe80::1%eth0"], None),  # between two leases
        ("10.0.0.1", ["fe80::1%eth0", "10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["fe80::1%eth0", "10.0.0.1", "10.0.0.2"], None),
        ("fe80::1%eth0", ["fe80::1%eth0"], None),
        ("fe80::1%eth0", ["fe80::1%eth0", "10.0.0.1"], "10.0.0.1"),  # DHCP came late
        ("fe80::1%eth0", ["fe80::2%eth0"], "fe80::2%eth0"),
        ("169.254.7.7", ["10.0.0.1"], "10.0.0.1"),
        ("10.0.0.1", [], None),
    ],
)
def test_when_another_address_is_a_reason_to_move(
    known: str, there: list[str], other: str | None
) -> None:
    addresses = tuple(Address(text, "eth0") for text in there)
    network = Network((Interface("eth0"),), addresses, ("eth0",))
    found = address._choose_other(network, "", "", known)
    assert (found and found.host) == other


@pytest.mark.parametrize(
    ("known", "there", "default", "other"),
    [
        ("fd00::1", ["fd00::1 eth0", "10.0.0.1 eth0"], ["eth0"], "10.0.0.1"),
        ("10.0.0.1", ["fd00::1 eth0", "10.0.0.1 eth0"], ["eth0"], None),
        ("10.9.0.1", ["10.9.0.1 eth1", "10.0.0.1 eth0"], ["eth0"], "10.0.0.1"),
        ("10.9.0.1", ["10.9.0.1 eth1", "10.0.0.1 eth0"], ["eth0", "eth1"], "10.0.0.1"),
        ("10.9.0.1", ["10.9.0.1 eth1", "10.0.0.1 eth0"], [], None),  # nobody knows
        ("10.9.0.1", ["10.9.0.1 eth1", "fe80::1 eth0"], ["eth0"], None),
        ("10.0.0.1", ["10.0.0.1 eth0", "10.0.0.2 eth0"], ["eth0"], None),
    ],
)
def test_a_better_address_counts_until_hosts_have_agreed(
    known: str, there: list[str], default: list[str], other: str | None
) -> None:
    pairs = [text.split() for text in there]
    addresses = tuple(Address(host, name) for host, name in pairs)
    network = Network((ETH0, ETH1), addresses, tuple(default))
    found = address._choose_other(network, "", "", known, settled=False)
    assert (found and found.host) == other
    assert address._choose_other(network, "", "", known) is None


@pytest.mark.parametrize(
    ("network", "interface", "cidr", "sentence", "hint"),
    [
        (net(), "", "", "Waiting for a network address.", "Check the cable, DHCP"),
        (net(), "eth0", "", "Waiting for a network address on eth0.", "Check the cable, DHCP"),
        (net(TEN), "bond0", "", "network interface bond0: there is none", "has eth0, eth1. Check"),
        (net(TEN), "", "10.9.0.0/16", "within 10.9.0.0/16.", "10.0.0.5 on eth0. Check network"),
        (
            net(TEN6),
            "",
            "0.0.0.0/0",
            "Waiting for an IPv4 address.",
            "has fd00::5 on eth0. Check the",
        ),
        (net(), "eth0", "::/0", "Waiting for an IPv6 address on eth0.", "Check the cable, DHCP"),
        (net(TEN, SIX), "", "", "This host has several addresses and no", "wait for a default"),
        (net(LOCAL6), "", "", "Waiting for a network address.", "has fe80::5%eth0 on eth0. Check"),
        (
            net(LOCAL6, Address("fe80::6%eth1", "eth1")),
            "",
            "",
            "Waiting for a network address.",
            "fe80::6%eth1 on eth1",
        ),
        (Network((LO, Interface("eth0", up=False))), "eth0", "", "eth0: it is down.", "cable"),
    ],
)
def test_what_is_waited_for(
    network: Network, interface: str, cidr: str, sentence: str, hint: str
) -> None:
    said = address.lacking(network, interface, cidr)
    assert sentence in said[0]
    assert hint in said[1]


# ---------------------------------------------------------------- status


def test_the_status_is_for_everybody(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    before = os.umask(0o077)
    try:
        write_status(tmp_path, {"stage": "deciding", "peers": ["ä"]})
    finally:
        os.umask(before)
    path = tmp_path / "run/firstboot/status.json"
    assert read_status(tmp_path) == {"stage": "deciding", "peers": ["ä"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    path.write_text("half a sta")
    assert read_status(tmp_path) is None
