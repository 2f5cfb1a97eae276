"""Files that are not firstboot's alone: a block among others' lines, a link, a resolver."""

from __future__ import annotations

import shutil
from pathlib import Path

from firstboot.host.durable import make_directory, storage, sync_directory, write_durably
from firstboot.protocol.errors import LocalError

BEGIN = "# begin: written by firstboot, lost when changed"
END = "# end: written by firstboot"
_RESOLVER = "# written by firstboot\n"
MAX_FILE = 1024 * 1024
MAX_SERVERS = 8


def write_block(path: Path, lines: str) -> None:
    """Make `lines` the block between firstboot's two comments in a file; the rest stays.

    A block that is there is replaced where it stands, else it is added at the end.
    """
    before = _text(path)
    head, begin, rest = before.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(f"{END}\n")
    if begin and not end:
        raise LocalError(f"{path} has the line {BEGIN!r} but not {END!r}; remove it")
    if head and not head.endswith("\n"):
        head += "\n"
    block = f"{BEGIN}\n{lines}{'' if lines.endswith(chr(10)) or not lines else chr(10)}{END}\n"
    after = f"{head}{block}{tail}"
    if after != before:
        make_parent(path)
        write_durably(path, after.encode(errors="surrogateescape"), _mode(path, 0o644))


def remove_block(path: Path) -> None:
    """Take firstboot's block out of a file; the rest stays."""
    before = _text(path)
    head, _, rest = before.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(f"{END}\n")
    if end:
        write_durably(path, (head + tail).encode(errors="surrogateescape"), _mode(path, 0o644))


def remove_link(path: Path, target: str) -> None:
    """Remove a symbolic link to `target`; anything else in its place stays."""
    with storage(f"remove {path}"):
        if path.is_symlink() and str(path.readlink()) == target:
            path.unlink()
            sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a file, or a directory with all it holds; one that is mounted there stays, empty."""
    with storage(f"remove {path}"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            for child in path.iterdir():
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
            if not path.is_mount():
                path.rmdir()
        else:
            return
        sync_directory(path.parent)


def make_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, unless somebody else's file is there."""
    with storage(f"make {path}"):
        if path.is_symlink():
            if str(path.readlink()) == target:
                return
        elif path.exists():
            return
        make_parent(path)
        staged = path.with_name(f".{path.name}.staged")
        staged.unlink(missing_ok=True)
        staged.symlink_to(target)
        staged.replace(path)


def use_directory(path: Path, mode: int) -> None:
    """Make a directory and its parents; one that is there is only made stricter."""
    with storage(f"make {path}"):
        if not path.is_dir():
            make_directory(path, mode)
        elif not mode & 0o077:
            path.chmod(mode)


def holds_anything(path: Path) -> bool:
    """Whether a directory is there and holds more than a file system's own lost+found."""
    with storage(f"look into {path}"):
        return path.is_dir() and any(p.name != "lost+found" for p in path.iterdir())


def make_parent(path: Path) -> None:
    """Make the directories above a file."""
    if not path.parent.is_dir():
        make_directory(path.parent, 0o755)


def use_resolver(root: Path, address: str, search: str, saved: Path, servers: Path) -> bool:
    """Let /etc/resolv.conf name `address` alone; keep what it named before.

    That goes to `saved`, as a resolv.conf(5), and to `servers`, as lines of dnsmasq(8). Whether
    the latter changed is the answer.
    """
    path = root / "etc/resolv.conf"
    before = [a for a in _upstream(root, path) if a != address]
    if before or not saved.exists():
        _write(saved, "".join(f"nameserver {a}\n" for a in before), 0o644)
    else:  # ours already, so what was there before is in `saved`
        before = _servers(_text(saved))
    changed = _write(servers, "".join(f"server={a}\n" for a in before), 0o644)
    with storage(f"write {path}"):
        if path.is_symlink():  # of systemd-resolved, say, which would write through it
            path.unlink()
    _write(path, f"{_RESOLVER}search {search}\nnameserver {address}\n", 0o644)
    return changed


def give_back_resolver(root: Path, saved: Path) -> None:
    """Undo `use_resolver`: what /etc/resolv.conf named before, if it is still firstboot's."""
    path = root / "etc/resolv.conf"
    if saved.exists() and _text(path).startswith(_RESOLVER):
        write_durably(path, _text(saved).encode(), 0o644)


def _upstream(root: Path, path: Path) -> list[str]:
    """The name servers in use; those behind systemd-resolved's local stub, if that is named."""
    found = _servers(_text(path))
    if any(a.startswith("127.0.0.5") for a in found):
        found = _servers(_text(root / "run/systemd/resolve/resolv.conf"))
    return [a for a in found if not a.startswith("127.") and a != "::1"]


def _servers(text: str) -> list[str]:
    words = (line.split() for line in text.splitlines())
    found = [w[1] for w in words if len(w) >= 2 and w[0] == "nameserver"]
    return list(dict.fromkeys(found))[:MAX_SERVERS]


def _write(path: Path, text: str, mode: int) -> bool:
    if path.exists() and _text(path) == text:
        return False
    make_parent(path)
    write_durably(path, text.encode(), mode)
    return True


def _text(path: Path) -> str:
    """What a file holds, as text that can be written back; nothing if it is not there."""
    with storage(f"read {path}"):
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE + 1)
        except FileNotFoundError:
            return ""
    if len(data) > MAX_FILE:
        raise LocalError(f"{path} is larger than {MAX_FILE} bytes")
    return data.decode(errors="surrogateescape")


def _mode(path: Path, default: int) -> int:
    return path.stat().st_mode & 0o777 if path.exists() else default
