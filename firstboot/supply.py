"""A payload's own certificates: keys made on each host, signed on the founding master, kept.

Everything is under the state directory's secrets, bound to the cluster by its CA's fingerprint:
what an earlier cluster left is never used. The signing half runs in one thread, so that no serial
number is given twice; each is on disk before the certificate that has it exists.
"""

from __future__ import annotations

import json
import os
import re
import threading
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstboot import host, pki
from firstboot.pki import signers as ca
from firstboot.protocol.credentials import Leaf, Signer
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.messages import Item, Place, Supplies
from firstboot.protocol.model import Member
from firstboot.protocol.plan import Payload

MAX_ANSWERS = 16  # times a member may ask with new keys
MAX_SERIAL_FILE = 256
KEY_THREADS = 4
# Texts with a line for each member: hosts(5), and hosts of an Ansible inventory.
LISTS = {"hosts": "{0.host} {0.name}", "inventory": "{0.name} ansible_host={0.host}"}
KEYS, HELD, AUTHORITY, SERIALS = (
    f"payload/{name}.json" for name in ("keys", "held", "authority", "serials")
)


@dataclass(frozen=True, slots=True)
class Order:
    """What one member gets: `leaves` are its rows, filled in.

    `shared` are the rows all masters share, filled in for the founding one, which makes them.
    """

    payload: Payload
    fingerprint: str
    member: Member
    leaves: tuple[Leaf, ...]
    shared: tuple[Leaf, ...]
    master: bool
    founder: bool

    @property
    def signers(self) -> tuple[Signer, ...]:
        """The authorities whose certificates this member needs."""
        if self.master:
            return self.payload.signers
        used = {leaf.signer for leaf in self.leaves}
        return tuple(s for s in self.payload.signers if s.name in used)

    def secrets(self) -> tuple[str, ...]:
        """The names of the private keys it gets from the master."""
        if not self.master:
            return ()
        signers = [s.name for s in self.payload.signers if s.shared or self.founder]
        shared = [leaf.name for leaf in self.leaves if leaf.shared]
        return (*signers, *shared, *self.payload.pairs)


class Supply:
    """The credentials of one host's payload, on its disk."""

    def __init__(self, root: Path, directory: host.StateDirectory) -> None:
        self.root, self.directory = root, directory
        self._keys = Keys()

    def prepare(self, payload: Payload, *, founder: bool) -> None:
        """Begin to make the keys that will be needed: a node's, or all of the founding master's."""
        if self.directory.get(AUTHORITY if founder else KEYS) is not None:
            return  # a host that was started again has made them
        bits = [ca.LEAF_BITS] * len(payload.node.leaves)
        if founder:
            count = len(payload.master.leaves) + len(payload.pairs)
            bits = [*(s.bits for s in payload.signers), *[ca.LEAF_BITS] * count]
        self._keys.prepare(bits)

    def close(self) -> None:
        """Stop making keys."""
        self._keys.close()

    # ------------------------------------------------------------ on every host

    def has(self, order: Order) -> bool:
        """Whether all that the order names is on this host's disk."""
        held = self._load(HELD, order.fingerprint)
        names = {*(leaf.name for leaf in order.leaves)}
        return held is not None and held["member"] == order.member.name and names <= {*held["leaf"]}

    def requests(self, order: Order) -> tuple[Item, ...]:
        """A request for each certificate of a key of this host's own; the keys are on disk."""
        own = [leaf for leaf in order.leaves if not leaf.shared]
        keys = self._own_keys(order.fingerprint, [leaf.name for leaf in own])
        return tuple(
            Item(leaf.name, ca.make_leaf_request(keys[leaf.name].encode(), leaf)) for leaf in own
        )

    def _own_keys(self, fingerprint: str, names: Sequence[str]) -> dict[str, str]:
        saved = self._load(KEYS, fingerprint) or {"keys": {}}
        keys: dict[str, str] = saved["keys"]
        missing = [name for name in names if name not in keys]
        if missing:
            keys |= zip(missing, self._keys.take([ca.LEAF_BITS] * len(missing)), strict=True)
            self._save(KEYS, fingerprint, {"keys": keys})
        return keys

    def store(self, order: Order, answer: Supplies, host_key: bytes) -> None:
        """Check all of an answer, then keep it; RemoteError, naming what is wrong."""
        signers = _named(answer.signers, [s.name for s in order.signers], "signer")
        for signer in order.signers:
            ca.check_signer(signer, signers[signer.name])
        sealed = _named(answer.sealed, order.secrets(), "key")
        keys = dict(self._own_keys(order.fingerprint, []))
        for name, hidden in sealed.items():
            keys[name] = ca.key_to_pem(ca.unseal(host_key, hidden, name)).decode()
        leaves = _named(answer.certificates, [leaf.name for leaf in order.leaves], "certificate")
        for leaf in order.leaves:
            if leaf.name not in keys:
                raise RemoteError(f"there is no key for the certificate {leaf.name}")
            signer = order.payload.signer(leaf.signer)
            key = keys[leaf.name].encode()
            ca.check_leaf(leaf, leaves[leaf.name], key, signer, signers[leaf.signer])
        held = {
            "member": order.member.name,
            "leaf": {name: pki.to_pem(der).decode() for name, der in leaves.items()},
            "signer": {name: pki.to_pem(der).decode() for name, der in signers.items()},
            "key": keys,
            "chain": {leaf.name: leaf.signer for leaf in order.leaves if leaf.chain},
            "places": [[place.name, place.host] for place in answer.places],
        }
        self._save(HELD, order.fingerprint, held)

    def credential(self, name: str, fingerprint: str) -> bytes | None:
        """The bytes of ``NAME.crt``, ``NAME.key``, of a pair's two keys, ``hosts``
        or ``inventory``.

        None if the payload has none of that name.
        """
        held = self._load(HELD, fingerprint)
        if held is None:
            return None
        if name in LISTS:
            places = sorted((Place(*place) for place in held["places"]), key=lambda p: p.name)
            return "".join(f"{LISTS[name].format(place)}\n" for place in places).encode()
        stem, _, kind = name.rpartition(".")
        found = None
        if kind == "crt" and stem in held["leaf"]:
            issuer = held["chain"].get(stem, "")
            found = held["leaf"][stem] + (held["signer"][issuer] if issuer else "")
        elif kind == "crt":
            found = held["signer"].get(stem)
        elif kind == "key" and stem.endswith(".public"):
            private = held["key"].get(stem.removesuffix(".public"))
            return ca.public_half(private.encode()) if private else None
        elif kind == "key":
            found = held["key"].get(stem.removesuffix(".private"))
        return found.encode() if found else None

    def place(self, places: Sequence[Place], fingerprint: str) -> bool:
        """Know these members, if this host has its certificates; whether that changed anything."""
        held = self._load(HELD, fingerprint)
        listed = [[place.name, place.host] for place in places]
        if held is None or held["places"] == listed:
            return False
        self._save(HELD, fingerprint, {**held, "places": listed})
        return True

    # ------------------------------------------------------------ on the founding master

    def issue(
        self,
        order: Order,
        requests: Sequence[Item],
        certificate: bytes,
        places: Sequence[Place],
        epoch: int,
        now: float,
    ) -> Supplies:
        """Sign what a member asks for, and seal what masters share to its `certificate` (DER).

        The same requests again give the same certificates. RemoteError if one is not in order.
        """
        authority = self._authority(order, now)
        own = [leaf for leaf in order.leaves if not leaf.shared]
        asked = _named(requests, [leaf.name for leaf in own], "request")
        signed = self._signed(order, authority, own, asked, now)
        shared = {
            leaf.name: b64decode(authority["leaf"][leaf.name])
            for leaf in order.leaves
            if leaf.shared
        }
        return Supplies(
            epoch=epoch,
            certificates=tuple(Item(name, der) for name, der in (signed | shared).items()),
            signers=tuple(
                Item(s.name, pki.to_der(authority["signer"][s.name].encode()))
                for s in order.signers
            ),
            sealed=tuple(
                Item(name, ca.seal(certificate, _secret(authority, name), name))
                for name in order.secrets()
            ),
            places=tuple(places),
        )

    def _signed(
        self,
        order: Order,
        authority: dict[str, Any],
        own: Sequence[Leaf],
        asked: Mapping[str, bytes],
        now: float,
    ) -> dict[str, bytes]:
        journal = f"payload/issued/{order.member.node_id}.json"
        digests = {name: ca.key_of_request(csr) for name, csr in asked.items()}
        before = self._load(journal, order.fingerprint) or {"keys": {}, "count": 0}
        if before["keys"] == digests and before["name"] == order.member.name:
            return {name: b64decode(der) for name, der in before["leaf"].items()}
        if before["count"] >= MAX_ANSWERS:
            raise RemoteError(f"{order.member.name} asked with new keys {MAX_ANSWERS} times")
        for leaf in own:  # all of them first: a request that is refused uses up no number
            ca.check_leaf_request(leaf, asked[leaf.name])
        signed = self._sign(order.payload, authority, own, asked, order.fingerprint, now)
        entry = {
            "keys": digests,
            "count": before["count"] + 1,
            "name": order.member.name,
            "leaf": {name: b64encode(der).decode() for name, der in signed.items()},
        }
        self._save(journal, order.fingerprint, entry)
        return signed

    def _sign(
        self,
        payload: Payload,
        authority: dict[str, Any],
        rows: Sequence[Leaf],
        asked: Mapping[str, bytes],
        fingerprint: str,
        now: float,
    ) -> dict[str, bytes]:
        signed: dict[str, bytes] = {}
        for signer in payload.signers:
            mine = [row for row in rows if row.signer == signer.name]
            if not mine:
                continue
            first = self._next_serials(signer, len(mine), fingerprint)
            crt, key = authority["signer"][signer.name], authority["key"][signer.name]
            for serial, row in enumerate(mine, first):
                csr = asked[row.name]
                signed[row.name] = ca.sign_leaf(
                    row, csr, signer, crt.encode(), key.encode(), serial, now
                )
            if signer.index_file:
                lines = "".join(ca.index_line(signed[row.name]) for row in mine)
                self._append(signer, lines)
        return signed

    def _authority(self, order: Order, now: float) -> dict[str, Any]:
        """The signers this order needs and, for a master, what masters share: made once, on disk.

        A node needs one signer only, and need not wait until a large key of another is made.
        """
        saved = self._load(AUTHORITY, order.fingerprint)
        if saved is None:
            self.directory.drop("payload/issued/")
            self._save(SERIALS, order.fingerprint, {"last": {}})
            saved = {"signer": {}, "key": {}, "leaf": {}}
        new = [s for s in order.signers if s.name not in saved["signer"]]
        shared = [f for f in order.shared if order.master and f.name not in saved["leaf"]]
        pairs = [p for p in order.payload.pairs if order.master and p not in saved["key"]]
        if not (new or shared or pairs):
            return saved
        names = [*(s.name for s in new), *(f.name for f in shared), *pairs]
        bits = [s.bits for s in new] + [ca.LEAF_BITS] * (len(shared) + len(pairs))
        saved["key"] |= zip(names, self._keys.take(bits), strict=True)
        for signer in new:
            self._clear(signer)
            key = saved["key"][signer.name].encode()
            saved["signer"][signer.name] = ca.make_signer(signer, key, now).decode()
        asked = {f.name: ca.make_leaf_request(saved["key"][f.name].encode(), f) for f in shared}
        signed = self._sign(order.payload, saved, shared, asked, order.fingerprint, now)
        saved["leaf"] |= {name: b64encode(der).decode() for name, der in signed.items()}
        self._save(AUTHORITY, order.fingerprint, saved)
        return saved

    # ------------------------------------------------------------ serial numbers

    def _clear(self, signer: Signer) -> None:
        """A new authority counts anew; what an earlier one left would mislead."""
        for path in (signer.serial_file, signer.index_file):
            if path:
                self._write(signer, path, b"")

    def _next_serials(self, signer: Signer, count: int, fingerprint: str) -> int:
        """The first of `count` numbers, all of them taken, durably, before any is used.

        Whoever else signs with this authority goes on from its serial file, so that counts too.
        """
        saved = self._load(SERIALS, fingerprint) or {"last": {}}
        last = max(saved["last"].get(signer.name, signer.own_serial), self._read_serial(signer))
        saved["last"][signer.name] = last + count
        self._save(SERIALS, fingerprint, {"last": saved["last"]})
        if signer.serial_file:
            shown = last + count + signer.openssl
            self._write(signer, signer.serial_file, f"{ca.hex_serial(shown)}\n".encode())
        return int(last) + 1

    def _read_serial(self, signer: Signer) -> int:
        """The last number its serial file says was used, 0 if it says nothing."""
        if not signer.serial_file:
            return 0
        path = self.root / signer.serial_file[1:]
        try:
            with path.open("rb") as file:
                text = file.read(MAX_SERIAL_FILE).decode(errors="replace").strip()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror}") from None
        if not text:
            return 0
        if not re.fullmatch(r"[0-9A-Fa-f]{1,40}", text):
            raise LocalError(f"{path} holds no serial number; put back the one it held")
        return int(text, 16) - signer.openssl

    def _write(self, signer: Signer, path: str, content: bytes) -> None:
        where = self.root / path[1:]
        host.make_parent(where)
        host.write_durably(where, content, 0o600 if signer.openssl else 0o644)

    def _append(self, signer: Signer, lines: str) -> None:
        where = self.root / signer.index_file[1:]
        before = where.read_bytes() if where.exists() else b""
        self._write(signer, signer.index_file, before + lines.encode())

    # ------------------------------------------------------------ on disk

    def _load(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        saved = self.directory.get(name)
        if saved is None:
            return None
        try:
            plain: dict[str, Any] = json.loads(saved)
            return plain if plain["cluster"] == fingerprint else None
        except (ValueError, TypeError, LookupError):
            raise LocalError(f"{name} among this host's secrets cannot be read") from None

    def _save(self, name: str, fingerprint: str, plain: Mapping[str, Any]) -> None:
        self.directory.put(name, json.dumps({"cluster": fingerprint, **plain}).encode())


class Keys:
    """RSA keys, made side by side, and ahead of time: it takes long, and does not block Python."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._stock: dict[int, list[Future[bytes]]] = {}
        self._lock = threading.Lock()

    def prepare(self, bits: Sequence[int]) -> None:
        """Begin to make keys of these sizes, unless as many are on their way."""
        with self._lock:
            for size in sorted(set(bits), reverse=True):
                stock = self._stock.setdefault(size, [])
                while len(stock) < bits.count(size):
                    stock.append(self._begin(size))

    def take(self, bits: Sequence[int]) -> list[str]:
        """Keys of these sizes, each given out once."""
        with self._lock:
            first = sorted(range(len(bits)), key=lambda i: -bits[i])  # the slowest begin first
            found: dict[int, Future[bytes]] = {}
            for i in first:
                stock = self._stock.get(bits[i])
                found[i] = stock.pop(0) if stock else self._begin(bits[i])
        return [found[i].result().decode() for i in range(len(bits))]

    def close(self) -> None:
        """Make no more; what is being made is thrown away."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, size: int) -> Future[bytes]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(KEY_THREADS, "keys", initializer=_behind_the_rest)
        return self._pool.submit(ca.make_rsa, size)


def _behind_the_rest() -> None:
    """Forming the cluster goes before: on Linux a thread has a priority of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def _named(items: Sequence[Item], wanted: Sequence[str], what: str) -> dict[str, bytes]:
    """The items by name; RemoteError unless they are exactly the wanted ones."""
    found = {item.name: item.data for item in items}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise RemoteError(f"the {what} {missing[0]} is missing")
    if len(items) != len(wanted):
        raise RemoteError(f"there is a {what} that nobody asked for")
    return found


def _secret(authority: Mapping[str, Any], name: str) -> bytes:
    return ca.key_to_der(authority["key"][name].encode())
