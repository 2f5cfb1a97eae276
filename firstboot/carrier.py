"""Carries out what the core decided, where that blocks: disk, keys, containers, systemd.

Called in worker threads by `service`; every method answers with the event that tells the
outcome. An adapter's failure is an event too, never an exception.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstboot import host, pki
from firstboot.deeds import Deeds
from firstboot.protocol import events, plan, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.credentials import Leaf
from firstboot.protocol.errors import FirstbootError, LocalError, RemoteError
from firstboot.protocol.messages import Certificate, Granted, from_plain, to_plain
from firstboot.protocol.model import Channel, Issued, Member, Profile, Role
from firstboot.transport import Transport

if TYPE_CHECKING:  # what only a role with units needs is loaded when it does: 15 ms
    from firstboot.supply import Order, Supply

HOST_KEY = "host.key"
CERTIFICATES = "certificates.json"
MAX_DETAIL = 1000  # characters of a failed step's last log lines


class Carrier:
    """The adapters, bound to one host's state directory and core."""

    def __init__(
        self,
        root: Path,
        directory: host.StateDirectory,
        transport: Transport,
        core: Assembly,
    ) -> None:
        self.root, self.directory, self.transport, self.core = root, directory, transport, core
        self.deeds = Deeds(root, directory, self._credential, lambda: self._fingerprint)
        self._supply: Supply | None = None
        self.expiries: list[dict[str, Any]] = []

    # ------------------------------------------------------------ disk and keys

    def on_disk(self, action: events.Action) -> events.Event | None:
        """Persist, the authority, requests, signatures and certificates."""
        match action:
            case events.Persist():
                return self._persist(action)
            case events.MakeAuthority():
                return self._make_authority(action.epoch)
            case events.DropAuthority():
                return self._drop_authority(action)
            case events.MakeRequest():
                return self._make_request()
            case events.Sign():
                return self._sign(action)
            case events.StoreCertificates():
                return self._store_certificates(action)
        raise TypeError(f"no adapter carries out {type(action).__name__}")

    def _persist(self, action: events.Persist) -> events.Event:
        try:
            self.directory.save(action.state)
        except FirstbootError as error:
            return events.PersistFailed(action.sequence, str(error))
        return events.PersistDone(action.sequence)

    def _make_authority(self, epoch: int) -> events.Event:
        name = f"authority/{epoch}"
        self._prepare(founder=True)
        try:
            saved = self.directory.get(f"{name}.json")
            if saved is None:
                made = pki.make_authority(self.core.config.cluster, epoch, now=_sane_now())
                # One file, so that a power cut cannot leave a key without its certificate.
                plain = {"key": made.key.decode(), "crt": pki.to_pem(made.certificate).decode()}
                saved = json.dumps(plain).encode()
                self.directory.put(f"{name}.json", saved)
            made_before = _authority(saved)
        except FirstbootError as error:
            return events.PersistFailed(0, str(error))
        return events.AuthorityMade(epoch, pki.fingerprint(made_before.certificate))

    def _drop_authority(self, action: events.DropAuthority) -> events.Event | None:
        try:
            for old in range(1, action.epoch + 1):
                if old != action.kept:
                    self.directory.drop(f"authority/{old}.json")
            self.directory.drop_issued(action.epoch, action.kept)
        except FirstbootError as error:
            return events.PersistFailed(0, str(error))
        return None

    def _prepare(self, *, founder: bool) -> None:
        """Keys for the payload's own certificates take long: begin while others are waited for."""
        if self.core.payload.signers and not self.core.stored.finished:
            self.supply.prepare(self.core.payload, founder=founder)

    def _make_request(self) -> events.Event:
        self._prepare(founder=False)
        try:
            key = self.directory.get(HOST_KEY)
            if key is None:
                key = pki.make_key()
                self.directory.put(HOST_KEY, key)
            csr = pki.make_request(key, self.core.me.node_id)
            return events.RequestMade(csr, pki.key_digest(key))
        except FirstbootError as error:
            return events.PersistFailed(0, str(error))

    def _sign(self, action: events.Sign) -> events.Event:
        member, epoch = action.member, action.epoch
        try:
            if pki.check_request(action.csr, member.node_id) != action.key:
                return events.SignFailed(member.node_id, epoch, "the request is for another key")
            saved = self.directory.get(f"authority/{epoch}.json")
            if saved is None:
                reason = f"the cluster CA of epoch {epoch} is not on this host"
                return events.SignFailed(member.node_id, epoch, reason)
            authority = _authority(saved)
            answer = self.directory.answer(epoch, member.node_id)
            if answer is not None and answer[0].key != action.key:
                reason = "this host was already enrolled with another key"
                return events.SignFailed(member.node_id, epoch, reason)
            if answer is None:
                certificates = tuple(
                    Certificate(
                        p, pki.sign(authority, action.csr, member, p, "firstboot", now=_sane_now())
                    )
                    for p in action.profiles
                )
                answer = (Issued(member, epoch, action.key), certificates)
                self.directory.record(*answer)
        except FirstbootError as error:
            return events.SignFailed(member.node_id, epoch, str(error))
        issued, certificates = answer
        return events.Signed(issued.member, epoch, issued.key, certificates, authority.certificate)

    def _store_certificates(self, action: events.StoreCertificates) -> events.Event:
        try:
            key = self.directory.get(HOST_KEY) or b""
            pki.check_granted(
                action.certificates, action.authority, action.fingerprint, key, action.member
            )
            role = self.core.role or Role.NODE
            wanted = set(self.core.payload.for_role(role).profiles)
            if not wanted <= {c.profile for c in action.certificates}:
                raise RemoteError("the answer lacks a certificate that this host's role needs")
            granted = Granted(
                action.epoch, action.member.name, action.certificates, action.authority
            )
            self.directory.put(CERTIFICATES, json.dumps(to_plain(granted)).encode())
        except FirstbootError as error:
            return events.CertificatesRejected(action.epoch, str(error))
        return events.CertificatesStored(action.epoch)

    def after(self, event: events.Event) -> None:
        """What an outcome changes on the loop's side, before the core hears of it."""
        if isinstance(event, events.CertificatesStored):
            self.open_cluster_channel()

    def open_cluster_channel(self) -> None:
        """Open the cluster channel with this host's certificates, if it has any."""
        granted, key = self._granted(), self.directory.get(HOST_KEY)
        if granted is None or key is None:
            return
        name = self._channel_certificate(granted)
        credentials = pki.Credentials(
            chain=pki.credential(name, granted.certificates, granted.authority, key),
            key=key,
            authority=pki.to_pem(granted.authority),
        )
        self.transport.set_channel(Channel.CLUSTER, credentials, pki.cluster_node_id)
        self.expiries = [
            {"profile": c.profile.value, "not_after": pki.not_after(c.der)}
            for c in granted.certificates
        ]

    def _channel_certificate(self, granted: Granted) -> str:
        """The master listens, everybody else dials; PEER serves for both."""
        profiles = {c.profile for c in granted.certificates}
        if Profile.PEER in profiles:
            return "peer.crt"
        return "server.crt" if self.core.founder else "client.crt"

    def _granted(self) -> Granted | None:
        saved = self.directory.get(CERTIFICATES)
        if saved is None:
            return None
        try:
            granted: Granted = from_plain(Granted, json.loads(saved))
        except (ValueError, TypeError):
            raise LocalError("the certificates on this host cannot be read") from None
        return granted

    # ------------------------------------------------------------ the payload's certificates

    def on_supply(self, action: events.Action) -> events.Event:
        """Requests to the payload's signers, and their answer."""
        match action:
            case events.SignRequests():
                return self._sign_requests(action)
            case events.StoreSupplies():
                return self._store_supplies(action)
        raise TypeError(f"no adapter carries out {type(action).__name__}")

    def _sign_requests(self, action: events.SignRequests) -> events.Event:
        member = action.member
        try:
            answer = self.directory.answer(action.epoch, member.node_id)
            if answer is None:
                raise LocalError(f"{member.name} has no certificate of this cluster")
            supplies = self.supply.issue(
                self._order(member),
                action.requests,
                answer[1][0].der,
                action.places,
                action.epoch,
                _sane_now(),
            )
            if self.supply.place(action.places, self._fingerprint):
                self.deeds.tell_places(self.core.plan or ())
        except FirstbootError as error:
            return events.RequestsRefused(member.node_id, action.epoch, str(error)[:MAX_DETAIL])
        return events.RequestsSigned(member.node_id, supplies)

    def _store_supplies(self, action: events.StoreSupplies) -> events.Event:
        try:
            member = self.core.stored.enrolled
            assert member is not None  # it has applied
            key = self.directory.get(HOST_KEY) or b""
            self.supply.store(self._order(member), action.supplies, key)
        except FirstbootError as error:
            reason = f"Could not take what the master sent: {error}"
            return events.StepFailed(action.index, reason[:MAX_DETAIL])
        return events.StepDone(action.index)

    def _order(self, member: Member) -> Order:
        """What a member gets, from the same rows on it and on its master."""
        from firstboot.supply import Order

        core, value = self.core, self.core.decided
        assert value is not None

        def rows(one: Member) -> tuple[Leaf, ...]:
            return plan.make_leaves(core.payload, value, one, core.config.cluster, core.options)

        return Order(
            core.payload,
            value.fingerprint,
            member,
            rows(member),
            tuple(leaf for leaf in rows(value.founder) if leaf.shared),
            master=value.role_of(member.node_id) is Role.MASTER,
            founder=value.founder.node_id == member.node_id,
        )

    @property
    def supply(self) -> Supply:
        """The payload's own certificates on this host."""
        if self._supply is None:
            from firstboot.supply import Supply

            self._supply = Supply(self.root, self.directory)
        return self._supply

    @property
    def _fingerprint(self) -> str:
        return self.core.decided.fingerprint if self.core.decided else ""

    # ------------------------------------------------------------ the role

    def run_step(self, action: events.RunStep) -> events.Event:
        """Make one step of the plan true."""
        try:
            if isinstance(action.step, plan.GetCertificates):
                return self._get_certificates(action.index)
            self.deeds.run(action.step)
        except FirstbootError as error:
            detail = str(getattr(error, "detail", ""))[-MAX_DETAIL:]
            what = status.say(action.step)
            return events.StepFailed(
                action.index, f"Could not {what}: {error}"[:MAX_DETAIL], detail
            )
        return events.StepDone(action.index)

    def _get_certificates(self, index: int) -> events.Event:
        member = self.core.stored.enrolled
        assert member is not None  # the core starts no role before
        order = self._order(member)
        if self.supply.has(order):
            return events.StepDone(index)
        return events.RequestsMade(index, self.supply.requests(order))

    def cancel(self) -> None:
        """End whatever step is under way: the process was told to stop."""
        self.deeds.cancel()
        if self._supply is not None:
            self._supply.close()

    def _credential(self, name: str) -> bytes:
        if self.core.payload.signers:
            own = self.supply.credential(name, self._fingerprint)
            if own is not None:
                return own
        granted, key = self._granted(), self.directory.get(HOST_KEY)
        assert granted is not None and key is not None  # the core starts no role without them
        return pki.credential(name, granted.certificates, granted.authority, key)


def _sane_now() -> float:
    """Unix time, or this release's if the clock was never set.

    A certificate made in 1970 would have expired by the time the clock is set.
    """
    return max(time.time(), pki.RELEASED)


def _authority(saved: bytes) -> pki.Authority:
    try:
        plain = json.loads(saved)
        certificate, key = plain["crt"].encode(), plain["key"].encode()
    except (ValueError, TypeError, LookupError, AttributeError):
        raise LocalError("the cluster CA on this host cannot be read") from None
    return pki.Authority(pki.to_der(certificate), key)
