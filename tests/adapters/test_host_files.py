"""Files that are not firstboot's alone: what others wrote there stays."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from firstboot import host
from firstboot.protocol.errors import LocalError

BLOCK = "# begin: written by firstboot, lost when changed\n{}# end: written by firstboot\n"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- blocks


def test_a_block_is_added_and_then_replaced_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "etc/hosts"
    path.parent.mkdir()
    path.write_text("127.0.0.1 localhost")  # without an end of line
    path.chmod(0o664)
    host.write_block(path, "10.0.0.1 a\n")
    assert path.read_text() == "127.0.0.1 localhost\n" + BLOCK.format("10.0.0.1 a\n")
    path.write_text(path.read_text() + "10.9.9.9 mine\n")
    host.write_block(path, "10.0.0.1 a\n10.0.0.2 b\n")
    expected = BLOCK.format("10.0.0.1 a\n10.0.0.2 b\n")
    assert path.read_text() == f"127.0.0.1 localhost\n{expected}10.9.9.9 mine\n"
    assert mode(path) == 0o664


def test_a_block_in_a_new_file(tmp_path: Path) -> None:
    host.write_block(tmp_path / "etc/hosts", "10.0.0.1 a\n")
    assert (tmp_path / "etc/hosts").read_text() == BLOCK.format("10.0.0.1 a\n")
    assert mode(tmp_path / "etc/hosts") == 0o644


def test_the_same_block_again_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    host.write_block(path, "10.0.0.1 a\n")
    before = path.stat().st_ino
    host.write_block(path, "10.0.0.1 a\n")
    assert path.stat().st_ino == before


def test_bytes_that_are_no_text_stay(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"# caf\xe9\n")
    host.write_block(path, "10.0.0.1 a\n")
    assert path.read_bytes().startswith(b"# caf\xe9\n# begin")


def test_a_block_without_its_end_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(BLOCK.format("10.0.0.1 a\n").partition("# end")[0] + "10.9.9.9 mine\n")
    with pytest.raises(LocalError, match="has the line"):
        host.write_block(path, "10.0.0.2 b\n")
    assert "mine" in path.read_text()


# ---------------------------------------------------------------- links and directories


def test_a_link_is_made_changed_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "usr/local/bin/oc"
    host.make_link(path, "/one")
    host.make_link(path, "/two")
    assert str(path.readlink()) == "/two"
    theirs = tmp_path / "usr/local/bin/kubectl"
    theirs.write_text("theirs")
    host.make_link(theirs, "/one")
    assert theirs.read_text() == "theirs"


def test_a_directory_that_is_there_is_only_made_stricter(tmp_path: Path) -> None:
    open_one, secret = tmp_path / "open", tmp_path / "secret"
    open_one.mkdir(mode=0o700)
    secret.mkdir(mode=0o755)
    host.use_directory(open_one, 0o755)
    host.use_directory(secret, 0o700)
    assert (mode(open_one), mode(secret)) == (0o700, 0o700)
    host.use_directory(tmp_path / "a/b", 0o700)
    assert (mode(tmp_path / "a"), mode(tmp_path / "a/b")) == (0o755, 0o700)


def test_what_a_directory_holds(tmp_path: Path) -> None:
    assert not host.holds_anything(tmp_path / "none")
    assert not host.holds_anything(tmp_path)
    (tmp_path / "lost+found").mkdir()
    assert not host.holds_anything(tmp_path)
    (tmp_path / "member").mkdir()
    assert host.holds_anything(tmp_path)


# ---------------------------------------------------------------- the resolver


def resolver(root: Path) -> bool:
    saved, servers = root / "etc/origin/node/resolv.conf", root / "etc/dnsmasq.d/upstream.conf"
    return host.use_resolver(root, "10.0.0.5", "cluster.local", saved, servers)


def read(root: Path, name: str) -> str:
    return (root / name).read_text()


def test_name_servers_are_kept_for_dnsmasq(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("nameserver 10.0.0.1\nnameserver 10.0.0.2\n")
    assert resolver(tmp_path)
    assert read(tmp_path, "etc/dnsmasq.d/upstream.conf") == "server=10.0.0.1\nserver=10.0.0.2\n"
    kept = "nameserver 10.0.0.1\nnameserver 10.0.0.2\n"
    assert read(tmp_path, "etc/origin/node/resolv.conf") == kept
    ours = read(tmp_path, "etc/resolv.conf")
    assert ours.endswith("search cluster.local\nnameserver 10.0.0.5\n")
    assert not resolver(tmp_path)  # once more: it does not forward to itself
    assert read(tmp_path, "etc/dnsmasq.d/upstream.conf") == "server=10.0.0.1\nserver=10.0.0.2\n"
    assert read(tmp_path, "etc/origin/node/resolv.conf") == kept
    assert read(tmp_path, "etc/resolv.conf") == ours


def test_behind_resolveds_stub_are_the_real_ones(tmp_path: Path) -> None:
    stub = tmp_path / "run/systemd/resolve"
    stub.mkdir(parents=True)
    (stub / "stub-resolv.conf").write_text("nameserver 127.0.0.53\n")
    (stub / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    resolver(tmp_path)
    assert read(tmp_path, "etc/dnsmasq.d/upstream.conf") == "server=192.0.2.1\n"
    assert not (tmp_path / "etc/resolv.conf").is_symlink()
    assert read(tmp_path, "run/systemd/resolve/stub-resolv.conf") == "nameserver 127.0.0.53\n"


def test_a_host_without_name_servers(tmp_path: Path) -> None:
    resolver(tmp_path)
    assert read(tmp_path, "etc/dnsmasq.d/upstream.conf") == ""
    assert "nameserver 10.0.0.5" in read(tmp_path, "etc/resolv.conf")


# ---------------------------------------------------------------- ports


def test_who_has_a_port_is_named() -> None:
    with socket.socket() as theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        comm = Path("/proc/self/comm").read_text().strip()
        assert host.taken("127.0.0.1", port) == f"{comm} (process {os.getpid()})"
        assert host.taken("0.0.0.0", port) == f"{comm} (process {os.getpid()})"
    assert host.taken("127.0.0.1", port) == ""


def test_an_address_that_is_not_here_is_nobodys() -> None:
    assert host.taken("192.0.2.1", 8443) == ""
