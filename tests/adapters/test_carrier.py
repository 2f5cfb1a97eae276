"""The carrier over a real state directory: keys and answers once and for all, errors as events."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstboot import host, pki
from firstboot.carrier import CERTIFICATES, HOST_KEY, MAX_DETAIL, Carrier
from firstboot.host import durable
from firstboot.payloads.rows import NONE
from firstboot.protocol import events
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.errors import LocalError
from firstboot.protocol.messages import Certificate
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Member,
    Profile,
    Self,
    Stored,
    Value,
)
from firstboot.protocol.plan import InstallContainer, ReachTarget, StartUnit, WriteFile
from firstboot.protocol.situation import Start

NODE, PEER = "a" * 32, "b" * 32
MEMBER = Member(NODE, "host", "10.0.0.1")
PEER_KEY, OTHER_KEY = pki.make_key(), pki.make_key()
JOINER = Member(PEER, "node-1", "10.0.0.2")
PROFILES = (Profile.SERVER, Profile.CLIENT)


class Transport:
    """Remembers which channels were opened, and with what."""

    def __init__(self) -> None:
        self.channels: dict[Channel, pki.Credentials | None] = {}

    def set_channel(self, channel: Channel, credentials: Any, _identify: object = None) -> None:
        self.channels[channel] = credentials


def make(root: Path, stored: Stored | None = None) -> Carrier:
    """A carrier as a new process has it: everything read from disk anew."""
    core = Assembly(
        Start(
            config=ClusterConfig("demo", 3),
            me=Self(NODE, "boot", "host", Endpoint("10.0.0.1", 7443)),
            stored=stored or Stored(),
            issued=(),
            payload=NONE,
            options={},
            rng=random.Random(1),
            now=0.0,
        )
    )
    return Carrier(root, host.StateDirectory(root), Transport(), core)  # type: ignore[arg-type]


@pytest.fixture
def carrier(tmp_path: Path) -> Carrier:
    return make(tmp_path)


def files(carrier: Carrier) -> dict[str, bytes]:
    """Everything in the state directory."""
    top = carrier.directory.path
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}


def authority_made(carrier: Carrier, epoch: int = 1) -> str:
    event = carrier.on_disk(events.MakeAuthority(epoch))
    assert isinstance(event, events.AuthorityMade) and event.epoch == epoch
    return event.fingerprint


def requested(carrier: Carrier) -> events.RequestMade:
    event = carrier.on_disk(events.MakeRequest())
    assert isinstance(event, events.RequestMade)
    return event


def asked(
    key: bytes = PEER_KEY, epoch: int = 1, member: Member = JOINER, profiles: Any = PROFILES
) -> events.Sign:
    csr = pki.make_request(key, member.node_id)
    return events.Sign(member, epoch, csr, pki.key_digest(key), profiles)


def signed(carrier: Carrier, sign: events.Sign) -> events.Signed:
    event = carrier.on_disk(sign)
    assert isinstance(event, events.Signed), event
    return event


# ---------------------------------------------------------------- the full disk

Break = Callable[[int], None]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """From now on the disk reports that error, when something is written or also when read."""

    def start(code: int = errno.ENOSPC, *, reading: bool = False) -> None:
        def failing(*_: object, **__: object) -> Any:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("firstboot.host.durable._staged", failing)
        monkeypatch.setattr(Path, "unlink", failing)
        if reading:
            monkeypatch.setattr(Path, "open", failing)

    yield start
    monkeypatch.undo()


# ---------------------------------------------------------------- the state


def test_the_state_is_on_disk_when_the_answer_comes(carrier: Carrier) -> None:
    stored = Stored(authority_epoch=2, voters=(NODE,))
    assert carrier.on_disk(events.Persist(7, stored)) == events.PersistDone(7)
    plain = json.loads(files(carrier)["state.json"])
    assert plain["state"]["authority_epoch"] == 2


def test_a_state_that_cannot_be_written_is_told_in_words(
    carrier: Carrier, breaks: Callable[..., None]
) -> None:
    breaks()
    event = carrier.on_disk(events.Persist(7, Stored()))
    assert isinstance(event, events.PersistFailed) and event.sequence == 7
    assert event.reason.endswith("the disk is full")


def test_an_action_of_somebody_else_is_a_bug(carrier: Carrier) -> None:
    with pytest.raises(TypeError, match="Announce"):
        carrier.on_disk(events.Announce())


# ---------------------------------------------------------------- the cluster CA


def test_an_authority_is_made_once_and_told_ever_after(carrier: Carrier) -> None:
    first = authority_made(carrier)
    assert authority_made(carrier) == first
    assert authority_made(make(carrier.root)) == first
    assert authority_made(carrier, 2) != first
    assert authority_made(carrier) == first


def test_after_a_crash_before_the_file_is_there_another_one_is_made(
    carrier: Carrier, breaks: Callable[..., None]
) -> None:
    before = files(carrier)
    breaks()
    event = carrier.on_disk(events.MakeAuthority(1))
    assert isinstance(event, events.PersistFailed) and event.sequence == 0
    assert files(carrier) == before


def test_after_a_crash_behind_the_write_the_same_one_is_told(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is renamed into place; then power fails before anybody hears of it."""

    def power_cut(_directory: Path) -> None:
        raise OSError(errno.EIO, "power")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_directory", power_cut)
        event = carrier.on_disk(events.MakeAuthority(1))
        assert isinstance(event, events.PersistFailed)
    again = make(carrier.root)
    first = authority_made(again)
    assert authority_made(make(carrier.root)) == first
    key = json.loads(files(again)["secrets/authority/1.json"])
    assert first == pki.fingerprint(pki.to_der(key["crt"].encode()))


def test_a_key_of_the_ca_is_for_root_alone(carrier: Carrier) -> None:
    authority_made(carrier)
    path = carrier.directory.path / "secrets/authority/1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_dropped_authority_is_gone_with_all_before_it_and_what_they_signed(
    carrier: Carrier,
) -> None:
    prints = {epoch: authority_made(carrier, epoch) for epoch in (1, 2, 3, 12)}
    for epoch in prints:
        signed(carrier, asked(epoch=epoch))
    assert carrier.on_disk(events.DropAuthority(2)) is None
    left = [name for name in files(carrier) if "authority" in name or "issued" in name]
    assert sorted(left) == [
        f"issued/12-{PEER}.json",
        f"issued/3-{PEER}.json",
        "secrets/authority/12.json",
        "secrets/authority/3.json",
    ]
    assert authority_made(carrier, 3) == prints[3] and authority_made(carrier, 12) == prints[12]
    refused = carrier.on_disk(asked(epoch=1))
    assert isinstance(refused, events.SignFailed)
    assert carrier.on_disk(events.DropAuthority(2)) is None  # nothing left to do


def test_the_authority_that_is_kept_outlives_a_later_one(carrier: Carrier) -> None:
    """A master that would have replaced itself made another, which nobody needs any more."""
    prints = {epoch: authority_made(carrier, epoch) for epoch in (1, 2)}
    for epoch in prints:
        signed(carrier, asked(epoch=epoch))
    assert carrier.on_disk(events.DropAuthority(2, kept=1)) is None
    left = [name for name in files(carrier) if "authority" in name or "issued" in name]
    assert sorted(left) == [f"issued/1-{PEER}.json", "secrets/authority/1.json"]
    assert authority_made(carrier, 1) == prints[1]


def test_an_authority_that_cannot_be_dropped_is_told(
    carrier: Carrier, breaks: Callable[..., None]
) -> None:
    authority_made(carrier)
    breaks(errno.EROFS)
    event = carrier.on_disk(events.DropAuthority(1))
    assert isinstance(event, events.PersistFailed)
    assert "read-only" in event.reason


# ---------------------------------------------------------------- signing


def test_a_request_is_answered_once_and_the_same_ever_after(carrier: Carrier) -> None:
    authority_made(carrier)
    first = signed(carrier, asked())
    assert first.member == JOINER and first.key == pki.key_digest(PEER_KEY)
    assert [c.profile for c in first.certificates] == list(PROFILES)
    pki.check_granted(
        first.certificates, first.authority, pki.fingerprint(first.authority), PEER_KEY, JOINER
    )
    assert signed(carrier, asked()) == first  # the request differs in its signature
    assert signed(make(carrier.root), asked()) == first
    renamed = asked(member=replace(JOINER, name="other"))
    assert signed(carrier, renamed) == first  # the journalled name, not the new wish


def test_what_is_signed_is_journalled_first(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority_made(carrier)

    def full(*_: object) -> None:
        raise host.StorageFailed("cannot write: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(carrier.directory, "record", full)
        event = carrier.on_disk(asked())
        expected = events.SignFailed(PEER, 1, "cannot write: the disk is full")
        assert event == expected
    assert carrier.directory.answer(1, PEER) is None
    signed(carrier, asked())


def test_a_request_for_another_key_than_the_peer_named_is_refused(carrier: Carrier) -> None:
    authority_made(carrier)
    mixed = replace(asked(), key=pki.key_digest(OTHER_KEY))
    event = carrier.on_disk(mixed)
    assert event == events.SignFailed(PEER, 1, "the request is for another key")
    assert carrier.directory.answer(1, PEER) is None


def test_a_member_gets_no_second_key_in_one_epoch(carrier: Carrier) -> None:
    """What was journalled was perhaps sent: two valid keys of one member must not exist."""
    authority_made(carrier)
    first = signed(carrier, asked())
    event = carrier.on_disk(asked(OTHER_KEY))
    assert isinstance(event, events.SignFailed), event
    assert signed(carrier, asked()) == first


@pytest.mark.parametrize("epoch", [0, 2, 999])
def test_a_request_of_an_epoch_without_a_ca_is_refused(carrier: Carrier, epoch: int) -> None:
    authority_made(carrier)
    event = carrier.on_disk(asked(epoch=epoch))
    reason = f"the cluster CA of epoch {epoch} is not on this host"
    assert event == events.SignFailed(PEER, epoch, reason)


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"0" * 5000])
def test_a_request_that_cannot_be_read_is_the_peers_mistake(carrier: Carrier, csr: bytes) -> None:
    authority_made(carrier)
    event = carrier.on_disk(replace(asked(), csr=csr))
    assert isinstance(event, events.SignFailed) and event.node_id == PEER


def test_a_request_in_anothers_name_is_refused(carrier: Carrier) -> None:
    authority_made(carrier)
    theirs = pki.make_request(PEER_KEY, "c" * 32)
    event = carrier.on_disk(replace(asked(), csr=theirs))
    assert isinstance(event, events.SignFailed)


# ---------------------------------------------------------------- this host's own certificates


def granted(carrier: Carrier, issuer: Carrier) -> events.StoreCertificates:
    """This host's certificates from the CA of epoch 1 of `issuer`."""
    request, pinned = requested(carrier), authority_made(issuer)
    sign = events.Sign(MEMBER, 1, request.csr, request.key, PROFILES)
    answer = signed(issuer, sign)
    return events.StoreCertificates(1, pinned, MEMBER, answer.certificates, answer.authority)


@pytest.fixture
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Carrier:
    return make(tmp_path_factory.mktemp("master"))


def test_the_hosts_key_is_made_once_and_stays_here(carrier: Carrier) -> None:
    first = requested(carrier)
    assert requested(carrier).key == requested(make(carrier.root)).key == first.key
    assert pki.check_request(first.csr, NODE) == first.key
    path = carrier.directory.path / "secrets" / HOST_KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(first)


def test_certificates_of_the_pinned_ca_are_kept_and_open_the_channel(
    carrier: Carrier, issuer: Carrier
) -> None:
    store = granted(carrier, issuer)
    done = carrier.on_disk(store)
    assert done == events.CertificatesStored(1)
    transport: Any = carrier.transport
    assert transport.channels == {}  # on the loop's thread only, see after()
    carrier.after(done)
    assert Channel.CLUSTER in transport.channels
    assert [e["profile"] for e in carrier.expiries] == ["server", "client"]
    anew = make(carrier.root)
    anew.open_cluster_channel()
    assert Channel.CLUSTER in anew.transport.channels  # type: ignore[attr-defined]


def test_certificates_of_another_ca_are_refused_and_nothing_is_kept(
    carrier: Carrier, issuer: Carrier
) -> None:
    store = granted(carrier, issuer)
    before = files(carrier)
    foreign = pki.make_authority("demo", 1)
    wrong = [
        replace(store, fingerprint="5" * 64),
        replace(store, authority=foreign.certificate),
        # The right CA beside certificates of another one.
        replace(
            store,
            certificates=tuple(
                Certificate(p, pki.sign(foreign, requested(carrier).csr, MEMBER, p, "firstboot"))
                for p in PROFILES
            ),
        ),
        replace(store, fingerprint=pki.fingerprint(b""), authority=b""),
        replace(store, certificates=()),
        replace(store, member=replace(MEMBER, name="other")),
        replace(store, member=replace(MEMBER, node_id=PEER)),
        replace(store, certificates=(Certificate(Profile.CLIENT, b"nonsense"),)),
        replace(store, certificates=store.certificates * 2),
    ]
    for case in wrong:
        event = carrier.on_disk(case)
        assert isinstance(event, events.CertificatesRejected) and event.epoch == 1, case
    assert files(carrier) == before
    assert carrier.on_disk(store) == events.CertificatesStored(1)


def test_certificates_without_the_one_the_channel_needs_are_refused(
    carrier: Carrier, issuer: Carrier
) -> None:
    """Once kept they would end this process at every start, and nobody would ask for others."""
    store = granted(carrier, issuer)
    event = carrier.on_disk(replace(store, certificates=store.certificates[:1]))
    if isinstance(event, events.CertificatesStored):
        carrier.after(event)
    else:
        assert isinstance(event, events.CertificatesRejected)


def test_certificates_for_a_key_this_host_has_not_are_refused(
    carrier: Carrier, issuer: Carrier
) -> None:
    store = granted(carrier, issuer)
    carrier.directory.drop(HOST_KEY)
    assert isinstance(carrier.on_disk(store), events.CertificatesRejected)


def test_the_channel_stays_shut_before_there_are_certificates(carrier: Carrier) -> None:
    carrier.open_cluster_channel()
    requested(carrier)
    carrier.open_cluster_channel()
    assert carrier.transport.channels == {}  # type: ignore[attr-defined]


# ---------------------------------------------------------------- errors are events


def every_action(carrier: Carrier, issuer: Carrier) -> list[events.Action]:
    store = granted(carrier, issuer)
    authority_made(carrier)
    return [
        events.Persist(1, Stored()),
        events.MakeAuthority(1),
        events.MakeAuthority(2),
        events.DropAuthority(1),
        events.MakeRequest(),
        asked(),
        store,
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("reading", [False, True])
def test_a_disk_that_fails_is_an_event_whatever_was_asked(
    carrier: Carrier, issuer: Carrier, breaks: Callable[..., None], code: int, reading: bool
) -> None:
    actions = every_action(carrier, issuer)
    assert carrier.on_disk(actions[-1]) == events.CertificatesStored(1)
    breaks(code, reading=reading)
    for action in actions:
        event = carrier.on_disk(action)
        kinds = (events.PersistFailed, events.SignFailed, events.CertificatesRejected)
        told = isinstance(event, kinds)
        # What is there already need not be written again.
        there = isinstance(event, events.AuthorityMade | events.RequestMade) and not reading
        assert told or there, f"{action} -> {event}"
        if isinstance(event, kinds):
            assert event.reason and "\n" not in event.reason
            assert "PRIVATE" not in event.reason
    steps = (WriteFile("/etc/x", "y"), WriteFile("/etc/x.crt", credential="client.crt"))
    for index, step in enumerate(steps):
        failed = carrier.run_step(events.RunStep(index, step))
        assert isinstance(failed, events.StepFailed), failed


DAMAGED = [b"", b"{", b"{}", b"[]", b"null", b'{"key": 1, "crt": 2}', b'{"key": "", "crt": ""}']


@pytest.mark.parametrize("data", [*DAMAGED, b"\xff\xfe"], ids=range(len(DAMAGED) + 1))
def test_a_damaged_authority_is_an_event(carrier: Carrier, data: bytes) -> None:
    authority_made(carrier)
    carrier.directory.put("authority/1.json", data)
    made = carrier.on_disk(events.MakeAuthority(1))
    assert isinstance(made, events.PersistFailed)
    assert isinstance(carrier.on_disk(asked()), events.SignFailed)
    assert files(carrier)["secrets/authority/1.json"] == data  # nobody made a second one


@pytest.mark.parametrize("data", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_damaged_key_is_an_event(carrier: Carrier, issuer: Carrier, data: bytes) -> None:
    store = granted(carrier, issuer)
    carrier.directory.put(HOST_KEY, data)
    assert isinstance(carrier.on_disk(events.MakeRequest()), events.PersistFailed)
    assert isinstance(carrier.on_disk(store), events.CertificatesRejected)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe"])
def test_damaged_certificates_fail_the_step_that_needs_them(
    carrier: Carrier, issuer: Carrier, data: bytes
) -> None:
    carrier.on_disk(granted(carrier, issuer))
    carrier.directory.put(CERTIFICATES, data)
    step = WriteFile("/etc/x.crt", credential="client.crt")
    assert isinstance(carrier.run_step(events.RunStep(0, step)), events.StepFailed)


# ---------------------------------------------------------------- steps


@pytest.fixture
def member(carrier: Carrier, issuer: Carrier) -> Carrier:
    """A carrier whose host has its certificates."""
    assert carrier.on_disk(granted(carrier, issuer)) == events.CertificatesStored(1)
    return carrier


@pytest.mark.parametrize(
    ("name", "mode", "begins"),
    [
        ("ca.crt", 0o644, "-----BEGIN CERTIFICATE-----"),
        ("server.crt", 0o644, "-----BEGIN CERTIFICATE-----"),
        ("client.crt", 0o600, "-----BEGIN CERTIFICATE-----"),
        ("host.key", 0o600, "-----BEGIN PRIVATE KEY-----"),
    ],
)
def test_a_credential_is_written_with_its_mode_again_and_again(
    member: Carrier, name: str, mode: int, begins: str
) -> None:
    step = WriteFile(f"/etc/deep/below/{name}", credential=name, mode=mode)
    path = member.root / f"etc/deep/below/{name}"
    old = os.umask(0o077)
    try:
        for _ in range(2):
            assert member.run_step(events.RunStep(4, step)) == events.StepDone(4)
            assert stat.S_IMODE(path.stat().st_mode) == mode
            path.chmod(0o666)  # whoever did that
    finally:
        os.umask(old)
    assert path.read_text().startswith(begins)
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_text_is_written_as_it_is(member: Carrier) -> None:
    step = WriteFile("/etc/x", "Hällo\n")
    assert member.run_step(events.RunStep(0, step)) == events.StepDone(0)
    path = member.root / "etc/x"
    assert path.read_bytes() == "Hällo\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_that_cannot_be_there_is_a_failed_step(member: Carrier) -> None:
    (member.root / "etc").mkdir(exist_ok=True)
    (member.root / "etc/file").write_text("")
    (member.root / "etc/directory/x").mkdir(parents=True)
    for path in ("/etc/file/below", "/etc/directory", "/etc/" + "x" * 300):
        event = member.run_step(events.RunStep(1, WriteFile(path, "y")))
        assert isinstance(event, events.StepFailed) and event.index == 1
        assert event.reason.startswith("Could not write /etc/") and "\n" not in event.reason


def test_a_credential_this_host_has_not_is_a_failed_step(member: Carrier) -> None:
    event = member.run_step(events.RunStep(0, WriteFile("/etc/p", credential="peer.crt")))
    assert isinstance(event, events.StepFailed)
    assert "peer.crt" in event.reason


class Failed(LocalError):
    detail = "first\n" + "x" * 5000 + "\nlast"


def test_what_failed_is_told_with_its_last_lines_and_bounded(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Systemd:
        def enable(self, _unit: str) -> None:
            raise Failed("it " + "is " * 1000 + "so")

    monkeypatch.setattr("firstboot.units.Systemd", Systemd)
    event = carrier.run_step(events.RunStep(2, StartUnit("x.service")))
    assert isinstance(event, events.StepFailed) and event.index == 2
    assert event.reason.startswith("Could not start x.service: it is ")
    assert len(event.reason) <= MAX_DETAIL and len(event.detail) <= MAX_DETAIL
    assert event.detail.endswith("\nlast")


def test_a_container_that_changed_restarts_its_unit_once(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Systemd:
        def reload(self) -> None:
            calls.append(("reload",))

        def enable(self, unit: str) -> None:
            calls.append(("enable", unit))

        def start(self, unit: str, deadline: float, restart: bool) -> None:
            assert deadline > 0
            calls.append(("start", unit, restart))
            if len([c for c in calls if c[0] == "start"]) == 1:
                raise LocalError("it did not become active")

    class Done:
        replaced = True

        class container:
            unit = "c.service"

    monkeypatch.setattr("firstboot.units.Systemd", Systemd)
    monkeypatch.setattr("firstboot.containers.install", lambda *_: Done)
    assert carrier.run_step(events.RunStep(0, InstallContainer("c", "oci:/x"))) == (
        events.StepDone(0)
    )
    start = events.RunStep(1, StartUnit("c.service"))
    assert isinstance(carrier.run_step(start), events.StepFailed)
    assert carrier.run_step(start) == carrier.run_step(start) == events.StepDone(1)
    starts = [c[2] for c in calls if c[0] == "start"]
    assert starts == [True, True, False]  # restarted until it worked, then left alone
    assert calls[0] == ("reload",)


def test_in_a_tree_under_test_no_systemd_is_touched(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firstboot.units.Systemd", None)
    step = ReachTarget(("x.service",))
    assert carrier.run_step(events.RunStep(0, step)) == events.StepDone(0)
    carrier.cancel()


def test_the_value_of_a_master_names_the_certificate_its_channel_shows(
    tmp_path: Path, issuer: Carrier
) -> None:
    value = Value(1, authority_made(issuer), (MEMBER,))
    shown = {}
    for name, stored in (("node", Stored()), ("master", Stored(decided=value))):
        carrier = make(tmp_path / name, stored)
        carrier.on_disk(granted(carrier, make(tmp_path / f"{name}-issuer")))
        carrier.open_cluster_channel()
        transport: Any = carrier.transport
        chain = pki.to_der(transport.channels[Channel.CLUSTER].chain)
        own = {c["profile"]: c for c in carrier.expiries}
        assert set(own) == {"server", "client"}
        kept = json.loads(files(carrier)[f"secrets/{CERTIFICATES}"])["certificates"]
        shown[name] = [c["profile"] for c in kept if base64.b64decode(c["der"]) == chain]
    assert shown == {"node": ["client"], "master": ["server"]}
