"""What this host must not forget: identity, votes, secrets, and the certificates it issued.

Everything lies under ``/var/lib/firstboot`` (0700). The order of writing carries meaning. At the
first start the empty state is written before the identity key, so

- a state without a key is a first start that was cut short: start afresh;
- a key without a readable state is a host whose votes are lost: it keeps its identity, joins,
  and never votes again, for it might contradict what it once promised.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from firstboot.host.durable import (
    StorageFailed,
    make_directory,
    storage,
    sweep,
    sync_directory,
    write_durably,
)
from firstboot.host.machine import Machine
from firstboot.protocol.errors import LocalError
from firstboot.protocol.messages import Certificate, from_plain, to_plain
from firstboot.protocol.model import FINGERPRINT, NODE_ID, Issued, Stored, require
from firstboot.protocol.record import dataclass

SCHEMA = 1
_MISSING = "the state file is missing"
MAX_STATE = 16 * 1024 * 1024  # two lists of at most 20,000 ids; anything larger is not ours
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,3}\Z")
_ISSUED = re.compile(r"(?P<epoch>[0-9]{1,10})-(?P<node>[0-9a-f]{32})\.json\Z")


@dataclass(frozen=True, slots=True)
class LostState:
    """This host once had votes and does not know them any more.

    ``stored`` is what it has saved since (its enrolment, say), but no vote in it may be counted.
    """

    reason: str
    stored: Stored


class StateDirectory:
    """The files under ``<root>/var/lib/firstboot``; one process at a time works on them.

    With `working` False this is for reading beside that process: nothing is made or swept.
    Every method that touches the disk raises StorageFailed with the reason in words.
    """

    def __init__(self, root: Path, *, working: bool = True) -> None:
        self.path = root / "var/lib/firstboot"
        self._state = self.path / "state.json"
        self._key = self.path / "identity.key"
        self._looks = self.path / "machine.json"
        self._lost = self.path / "votes-lost"
        self._complete = self.path / "complete"
        self._sealing = self.path / "sealing"  # named in firstboot.service as well
        self._secrets = self.path / "secrets"
        self._issued = self.path / "issued"
        if working:
            self._prepare()

    def _prepare(self) -> None:
        with storage(f"prepare {self.path}"):
            for directory in (self.path, self._secrets, self._issued):
                make_directory(directory, 0o700)
            sweep(self.path)

    # ------------------------------------------------------------ identity

    def adopt(self, machine: Machine) -> str:
        """Make sure the identity in here was made on `machine`; call it before anything else.

        A disk copied from another machine carries that machine's identity and votes, which must
        not exist twice: they are moved aside into ``clone-<n>``, and a new identity is to be
        made. Returns a sentence for the log, or an empty string.
        """
        if self.load_identity_key() is None:
            return ""
        before = self._read_looks()
        changed = _copied(before, machine)
        if changed:
            aside = self._move_aside()
            return f"this disk was copied from another machine ({changed}): old state is in {aside}"
        now = Machine(
            machine.machine_id or before.machine_id,
            machine.dmi_uuid or before.dmi_uuid,
            machine.instance_id or before.instance_id,
        )
        if now != before:
            self._write_looks(now)
        # The instance-id alone comes from a metadata service that anybody on the network path
        # can imitate, so it must not make a host throw its identity away; a real copy of a disk
        # gets another DMI UUID or machine-id as well.
        renamed = _differs(before.instance_id, machine.instance_id, "instance-id")
        return f"{renamed}, the machine is the same: the identity is kept" if renamed else ""

    def load_identity_key(self) -> bytes | None:
        """The identity key as `begin` got it, None before that."""
        return _read(self._key, 64 * 1024) or None

    def begin(self, key: bytes, machine: Machine) -> Stored:
        """Give this host the new identity `key`, made on `machine`; answer its empty state."""
        if self.load_identity_key() is not None:
            raise LocalError("this host has an identity already")
        if self._has_history():
            self._move_aside()
        stored = Stored()
        self.save(stored)
        self._write_looks(machine)
        write_durably(self._key, key, 0o600)  # the last: from here on the votes count
        return stored

    def _has_history(self) -> bool:
        """Whether there is more than the empty state of a first start that was cut short."""
        kept = (names for d in (self._secrets, self._issued) for *_, names in os.walk(d))
        state = self._read_state()
        return self._lost.exists() or any(kept) or state not in (Stored(), _MISSING)

    # ------------------------------------------------------------ votes

    def load(self) -> Stored | LostState | None:
        """The state, LostState if it is lost, None on a host that has no identity yet."""
        if self.load_identity_key() is None:
            return None
        reason = (_read(self._lost, MAX_STATE) or b"").decode(errors="replace").strip()
        state = self._read_state()
        if isinstance(state, str):
            if not reason:
                # Remembered before anything is saved: after the next save the state file would
                # look sound again, and the host would vote without its memory.
                write_durably(self._lost, f"{state}\n".encode(), 0o600)
            return LostState(reason or state, Stored())
        return LostState(reason, state) if reason else state

    def save(self, stored: Stored) -> None:
        """Write the state; when this returns, it survives a power cut."""
        plain = {"schema": SCHEMA, "state": to_plain(stored)}
        write_durably(self._state, json.dumps(plain, separators=(",", ":")).encode(), 0o600)

    def _read_state(self) -> Stored | str:
        try:
            data = _read(self._state, MAX_STATE)
        except StorageFailed as error:
            return str(error)
        if data is None:
            return _MISSING
        try:
            plain = json.loads(data)
            if plain["schema"] != SCHEMA:
                return "the state file was written by another version"
            stored = from_plain(Stored, plain["state"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return "the state file cannot be read"
        assert isinstance(stored, Stored)
        return stored

    # ------------------------------------------------------------ secrets

    def put(self, name: str, data: bytes, mode: int = 0o600) -> None:
        """Keep `data` durably under `name`: up to four path components, see `_NAME`."""
        path = self._blob(name)
        with storage(f"make {path.parent}"):
            make_directory(path.parent, 0o700)
        write_durably(path, data, mode)

    def get(self, name: str) -> bytes | None:
        """What was put under `name`, None if nothing."""
        return _read(self._blob(name), MAX_STATE)

    def drop(self, prefix: str) -> int:
        """Remove, durably, every name that starts with `prefix`; answer how many there were.

        End the prefix of a directory with ``/``: ``cluster-1`` also begins ``cluster-10``.
        """
        if not prefix:
            raise LocalError("to drop every secret, erase the directory")
        with storage(f"drop {prefix}* in {self._secrets}"):
            names = {
                p: p.relative_to(self._secrets).as_posix()
                for p in self._secrets.rglob("*")
                if not p.is_dir()
            }
            doomed = [path for path, name in names.items() if name.startswith(prefix)]
            for path in doomed:
                path.unlink()
            for parent in {path.parent for path in doomed}:
                sync_directory(parent)
        return len(doomed)

    def _blob(self, name: str) -> Path:
        if not _NAME.match(name):
            raise LocalError(f"{name!r} is not the name of a secret")
        return self._secrets / name

    # ------------------------------------------------------------ the journal of certificates

    def record(self, issued: Issued, certificates: tuple[Certificate, ...]) -> None:
        """Journal an answer to a certificate request, durably, before it is sent."""
        plain = {
            "schema": SCHEMA,
            "issued": to_plain(issued),
            "certificates": to_plain(certificates),
        }
        path = self._issued / f"{issued.epoch}-{issued.member.node_id}.json"
        write_durably(path, json.dumps(plain, separators=(",", ":")).encode(), 0o600)

    def issued(self, epoch: int | None = None) -> tuple[Issued, ...]:
        """What was issued in that epoch, or ever, in the order of epoch and node id."""
        return tuple(self._read_entry(path)[0] for path in self._entries() if _of(path, epoch))

    def answer(self, epoch: int, node_id: str) -> tuple[Issued, tuple[Certificate, ...]] | None:
        """The journalled answer to that host, so that a repeated request gets the same one."""
        if not NODE_ID.match(node_id):
            raise LocalError("a node id has 32 hexadecimal digits")
        path = self._issued / f"{epoch}-{node_id}.json"
        return self._read_entry(path) if path.exists() else None

    def drop_issued(self, until_epoch: int, kept: int = 0) -> int:
        """Forget what was issued until that epoch, but in `kept`; answer how many entries."""
        doomed = [p for p in self._entries() if _epoch(p) <= until_epoch and _epoch(p) != kept]
        if not doomed:
            return 0
        with storage(f"drop entries in {self._issued}"):
            for path in doomed:
                path.unlink()
            sync_directory(self._issued)
        return len(doomed)

    def _entries(self) -> list[Path]:
        with storage(f"list {self._issued}"):
            found = [p for p in self._issued.iterdir() if _ISSUED.match(p.name)]
        return sorted(found, key=lambda p: (_epoch(p), p.name))

    def _read_entry(self, path: Path) -> tuple[Issued, tuple[Certificate, ...]]:
        try:
            plain = json.loads(_read(path, MAX_STATE) or b"")
            issued = from_plain(Issued, plain["issued"])
            certificates = from_plain(tuple[Certificate, ...], plain["certificates"])
            right = path.name == f"{issued.epoch}-{issued.member.node_id}.json"
            require(right and bool(FINGERPRINT.match(issued.key)), "not the entry it says it is")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            # Going on without it could give a second key to that host: let a person look.
            raise StorageFailed(f"the journal entry {path} cannot be read") from None
        return issued, certificates

    # ------------------------------------------------------------ end and new beginning

    @property
    def complete(self) -> bool:
        """Whether `finish` was called: this host forms nothing any more."""
        return self._complete.exists()

    def finish(self) -> None:
        """Stamp this host as complete: systemd alone brings its role up from now on."""
        write_durably(self._complete, b"", 0o600)

    def erase(self) -> None:
        """Forget everything, and be a new host at the next start.

        The identity goes first, and last the note that this machine is being sealed.
        """
        with storage(f"erase {self.path}"):
            if not self.path.is_dir():
                return
            for path in (self._key, self._complete):
                path.unlink(missing_ok=True)
            sync_directory(self.path)
            for path in self.path.iterdir():
                if path != self._sealing:
                    _remove(path)
            sync_directory(self.path)
            self._sealing.unlink(missing_ok=True)
            sync_directory(self.path)

    @property
    def sealing(self) -> bytes | None:
        """What `note_sealing` was told; None if this machine is not being made into an image."""
        return _read(self._sealing, 64 * 1024)

    def note_sealing(self, data: bytes) -> None:
        """Note durably that everything in here is to be erased, see `erase`."""
        with storage(f"make {self.path}"):
            make_directory(self.path, 0o700)
        write_durably(self._sealing, data, 0o600)

    def moved_from(self, machine: Machine) -> str:
        """In words, what tells that this disk is a copy of another machine's; else nothing.

        What is not known yet is noted. See `adopt` for what may be done about it.
        """
        before = self._read_looks()
        if before == Machine():
            self._write_looks(machine)
        return _copied(before, machine)

    def _move_aside(self) -> Path:
        """Move everything into a new ``clone-<n>``, the key first: cut short, no host has two."""
        with storage(f"move the old state in {self.path} aside"):
            taken = {p.name for p in self.path.glob("clone-*")}
            number = next(n for n in range(1, len(taken) + 2) if f"clone-{n}" not in taken)
            aside = self.path / f"clone-{number}"
            make_directory(aside, 0o700)
            others = [p for p in self.path.iterdir() if not p.name.startswith("clone-")]
            for path in sorted(others, key=lambda p: p != self._key):
                path.rename(aside / path.name)
                sync_directory(self.path)
            sync_directory(aside)
        self._prepare()
        return aside

    # ------------------------------------------------------------ what the machine looked like

    def _read_looks(self) -> Machine:
        try:
            plain = json.loads(_read(self._looks, 64 * 1024) or b"")
            ids = (str(plain[key]) for key in ("machine_id", "dmi_uuid", "instance_id"))
            return Machine(next(ids), next(ids), next(ids))
        except (ValueError, TypeError, KeyError, RecursionError):
            return Machine()  # what is not known cannot differ

    def _write_looks(self, machine: Machine) -> None:
        plain = {
            "machine_id": machine.machine_id,
            "dmi_uuid": machine.dmi_uuid,
            "instance_id": machine.instance_id,
        }
        write_durably(self._looks, json.dumps(plain, sort_keys=True).encode(), 0o600)


def _copied(before: Machine, now: Machine) -> str:
    """In words, what tells that a disk made on `before` is in another machine."""
    return _differs(before.machine_id, now.machine_id, "machine-id") or _differs(
        before.dmi_uuid, now.dmi_uuid, "DMI UUID"
    )


def _differs(before: str, now: str, what: str) -> str:
    """In words, if `what` changed; an id that was or is unknown proves nothing."""
    return f"its {what} was {before} and is {now}" if before and now and before != now else ""


def _read(path: Path, limit: int) -> bytes | None:
    with storage(f"read {path}"):
        try:
            with path.open("rb") as file:
                return file.read(limit + 1)[:limit]
        except FileNotFoundError:
            return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()


def _epoch(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _of(path: Path, epoch: int | None) -> bool:
    return epoch is None or _epoch(path) == epoch
