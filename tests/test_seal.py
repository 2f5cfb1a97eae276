"""``firstboot seal`` on a tree: what goes, what stays, who is refused, and a power cut anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from firstboot import afterwards, host
from firstboot.cli import main
from firstboot.host import Machine, StateDirectory
from firstboot.payloads.rows import PAYLOADS
from firstboot.protocol.model import Ballot, Member, Register, Stored, Value
from firstboot.protocol.plan import MakeDirectory, WriteFile
from firstboot.seal import TREES

NODE = "0123456789abcdef" * 2
VALUE = Value(1, "ab" * 32, (Member(NODE, "host-1", "10.0.0.1"),), active=True, members=3)
MEMBER = Stored(decided=VALUE, activated=True, closed=True, finished=True)
OLD, NEW = "a" * 32, "b" * 32
OURS = (
    "etc/firstboot/config.yaml",
    "etc/firstboot/config.d/50-more.yaml",
    "run/firstboot/config.d/50-more.yaml",
    "etc/etcd/client.key",
    "etc/systemd/system/firstboot.target.d/10-role.conf",
    "var/lib/etcd/0123/member/snap/db",
    "var/lib/etcd-proxy/x",
)
OTHERS = ("etc/fstab", "usr/lib/firstboot/config.d/10-image.yaml", "var/lib/mine", "etc/hosts")


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def host_at(root: Path, stored: Stored = MEMBER) -> Path:
    """A host that did its work in a formation."""
    for name in (*OURS, *OTHERS):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "etc/machine-id").write_text(f"{OLD}\n")
    state = StateDirectory(root)
    state.begin(b"key", Machine(OLD))
    state.put("authority/1.json", b"secret")
    state.save(stored)
    if stored.finished:
        state.finish()
    status = {"payload": "etcd", "state": "running", "stage": "running", "problems": []}
    host.write_status(root, {**status, "sentence": "Running."})
    return root


def seal(root: Path, *options: str) -> int:
    return main(["seal", "--root", str(root), *options])


def is_sealed(root: Path) -> bool:
    assert all((root / name).exists() for name in OTHERS)
    left = [name for name in OURS if (root / name).exists()]
    return not left and not any((root / "var/lib/firstboot").iterdir())


def test_what_made_it_a_host_goes_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = host_at(tmp_path)
    assert seal(root, "--force") == 0
    assert is_sealed(root)
    assert (root / "etc/machine-id").read_text() == "uninitialized\n"
    said = capsys.readouterr().out
    assert "/var/lib/etcd: removed" in said
    assert "cloud-init clean --logs" in said
    assert seal(root) == 0  # again: nothing is left to refuse or to remove
    assert is_sealed(root)


def test_a_machine_that_firstboot_never_ran_on_is_sealed(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert seal(tmp_path) == 0
    assert (tmp_path / "etc/machine-id").read_text() == "uninitialized\n"


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (MEMBER, "this host is a cluster's member"),
        (Stored(register=Register(promised=Ballot(1, NODE))), "this host is about to be one"),
        (None, "this host is about to be one"),
    ],
    ids=["member", "voted", "votes-lost"],
)
def test_a_member_is_refused_in_one_sentence(
    tmp_path: Path, stored: Stored | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = host_at(tmp_path, stored or Stored())
    if stored is None:
        (root / "var/lib/firstboot/state.json").write_text("{")
    assert seal(root) == 64
    error = capsys.readouterr().err
    assert told in error and "seal --force" in error and error.count("\n") == 1
    assert all((root / name).exists() for name in OURS)
    assert not (root / "var/lib/firstboot/sealing").exists()
    assert (root / "etc/machine-id").read_text() == f"{OLD}\n"


def test_only_root_seals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert seal(host_at(tmp_path), "--force") == 64
    assert "only root" in capsys.readouterr().err


def test_a_role_that_nobody_knows_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = host_at(tmp_path)
    (root / "run/firstboot/status.json").unlink()
    assert seal(root, "--force") == 1  # its document is nonsense as well
    assert "not known what this host's role put here" in capsys.readouterr().err
    assert all((root / name).exists() for name in OURS)


# ---------------------------------------------------------------- cut short


class PowerCut(BaseException):
    """Nothing catches this."""


CHANGES = ((os, "replace"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree"))


@contextmanager
def power(changes: int) -> Iterator[list[str]]:
    """Power for so many changes of the disk; what was changed."""
    done: list[str] = []

    def limited(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: object, **options: object) -> object:
            if len(done) == changes:
                raise PowerCut
            done.append(name)
            return real(*arguments, **options)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHANGES:
            patch.setattr(owner, name, limited(name, getattr(owner, name)))
        yield done


def cut_after(root: Path, changes: int) -> bool:
    """Whether sealing was cut short."""
    with power(changes):
        try:
            seal(root, "--force")
        except PowerCut:
            return True
        return False


def test_a_power_cut_anywhere_is_made_good_at_the_next_boot(tmp_path: Path) -> None:
    changes, noted = 0, 0
    while cut_after(root := host_at(tmp_path / str(changes)), changes):
        changes += 1
        if not (root / "var/lib/firstboot/sealing").exists():
            state = StateDirectory(root, working=False)
            assert state.complete or not any(state.path.iterdir())  # untouched, or all done
            continue
        noted += 1
        for name in OURS[:3]:  # a cloud writes the next host's document before firstboot looks
            (root / name).write_text("the next host's")
        machine_id = (root / "etc/machine-id").read_text()
        assert not afterwards.run(root)
        assert {(root / name).read_text() for name in OURS[:3]} == {"the next host's"}
        for name in OURS[:3]:
            (root / name).unlink()
        assert is_sealed(root)
        assert (root / "etc/machine-id").read_text() == machine_id
    assert changes > noted > 10
    assert is_sealed(root)


def test_a_power_cut_anywhere_is_made_good_by_sealing_again(tmp_path: Path) -> None:
    changes = 0
    while cut_after(root := host_at(tmp_path / str(changes)), changes):
        assert seal(root, "--force") == 0
        assert is_sealed(root)
        assert (root / "etc/machine-id").read_text() == "uninitialized\n"
        changes += 1


def test_a_seal_that_did_not_get_to_the_machine_id_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = host_at(tmp_path)
    state = StateDirectory(root)
    state.note_sealing(json.dumps({"payload": "etcd", "machine_id": OLD}).encode())
    assert not afterwards.run(root)
    assert "before the machine-id was reset" in capsys.readouterr().err


# ---------------------------------------------------------------- a copy that was not sealed


def copied(tmp_path: Path) -> dict[str, object]:
    shown = host.read_status(tmp_path)
    assert shown is not None
    return shown


def test_a_done_host_in_another_machine_is_told_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = host_at(tmp_path)
    assert main(["run", "--root", str(root)]) == 0
    assert capsys.readouterr().err == ""
    (root / "etc/machine-id").write_text(f"{NEW}\n")
    assert main(["run", "--root", str(root)]) == 0
    said = capsys.readouterr().err
    assert f"its machine-id was {OLD} and is {NEW}" in said
    assert "firstboot seal --force" in said
    shown = copied(root)
    assert shown["state"] == "degraded"
    assert [p["code"] for p in shown["problems"]] == ["CLONE"]  # type: ignore[attr-defined]
    assert all((root / name).exists() for name in OURS)
    assert StateDirectory(root).complete
    assert main(["run", "--root", str(root)]) == 0
    assert capsys.readouterr().err == ""  # told once
    # Told that the machine was only moved, it knows it again.
    (root / "var/lib/firstboot/machine.json").unlink()
    assert main(["run", "--root", str(root)]) == 0
    assert copied(root)["problems"] == []
    assert copied(root)["state"] == "running"
    (root / "etc/machine-id").write_text(f"{OLD}\n")
    assert main(["run", "--root", str(root)]) == 0
    assert copied(root)["state"] == "degraded"


# ---------------------------------------------------------------- completeness


@pytest.mark.parametrize("payload", sorted(PAYLOADS))
def test_every_file_of_a_role_is_known_to_the_seal(payload: str) -> None:
    """A row whose path is filled in for the host must lie below a tree that is removed whole."""
    rows = PAYLOADS[payload]
    for step in (*rows.master.steps, *rows.node.steps):
        if isinstance(step, WriteFile) and "$" in step.path:
            assert any(step.path[1:].startswith(f"{t}/") for t in TREES[payload]), step.path
        if isinstance(step, MakeDirectory) and step.claim:
            assert step.path[1:] in TREES[payload]
