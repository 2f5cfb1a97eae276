"""A24: clocks at 1970, five years ahead, or stepping; certificates hold on all after time sync.

Formation itself sees no wall clock (the core imports none, and the bootstrap channel ignores
dates), so what a wrong clock can spoil is what the master's disk floor signs. It runs here with
that clock, and openssl judges the outcome at the true time, strictly, as etcd and our own
cluster channel would.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from firstboot import carrier, pki
from firstboot.host import StateDirectory
from firstboot.payloads.rows import NONE
from firstboot.protocol import events
from firstboot.protocol.model import Member, Profile

pytestmark = pytest.mark.scenario("A24")

DAY = 86_400.0
YEAR = 365 * DAY
TRUE = pki.RELEASED + 40 * DAY  # the right time when this cluster forms
HOSTS = tuple(Member(c * 32, f"node-{c}", f"10.0.0.{i + 1}") for i, c in enumerate("abc"))
PROFILES = (Profile.PEER, Profile.SERVER, Profile.CLIENT)
KEYS = {m: pki.make_key() for m in HOSTS}


class Master:
    """The real carrier of a founding master, with a clock of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = TRUE
        monkeypatch.setattr(carrier, "time", SimpleNamespace(time=lambda: self.clock))
        core = SimpleNamespace(config=SimpleNamespace(cluster="demo"), payload=NONE)
        directory = StateDirectory(root)
        self.carrier = carrier.Carrier(root, directory, None, core)  # type: ignore[arg-type]

    def make_authority(self, clock: float) -> None:
        self.clock = clock
        assert isinstance(self.carrier.on_disk(events.MakeAuthority(1)), events.AuthorityMade)

    def sign(self, member: Member, clock: float) -> events.Event | None:
        self.clock = clock
        key = KEYS[member]
        csr = pki.make_request(key, member.node_id)
        return self.carrier.on_disk(
            events.Sign(member, 1, csr, pki.key_digest(key), PROFILES),
        )


@pytest.fixture
def master(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Master:
    return Master(tmp_path / "master", monkeypatch)


def why_not(directory: Path, signed: events.Signed, at: float) -> list[str]:
    """What openssl says against each certificate at that time; nothing if all are good."""
    program, said = shutil.which("openssl"), []
    assert program, "these tests need the openssl program"
    ca = directory / "ca.crt"
    ca.write_bytes(pki.to_pem(signed.authority))
    for certificate in signed.certificates:
        leaf = directory / f"{certificate.profile}.crt"
        leaf.write_bytes(pki.to_pem(certificate.der))
        command = [program, "verify", "-x509_strict", "-attime", str(int(at))]
        command += ["-CAfile", str(ca), str(leaf)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said.append(done.stderr)
    return said


CLOCKS = [
    pytest.param(TRUE, TRUE, id="right"),
    pytest.param(0.0, 0.0, id="1970"),
    pytest.param(0.0, TRUE, id="1970, then set"),
    pytest.param(TRUE, 0.0, id="stepping back to 1970"),
    pytest.param(pki.RELEASED - YEAR, pki.RELEASED - YEAR, id="a battery of last year"),
    pytest.param(TRUE - 3600, TRUE + 3600, id="an hour each way"),
    pytest.param(TRUE + 0.9 * DAY, TRUE + 0.9 * DAY, id="almost a day ahead"),
    pytest.param(TRUE + 5 * YEAR, TRUE + 5 * YEAR, id="five years ahead"),
    pytest.param(TRUE + 5 * YEAR, TRUE, id="five years ahead, then set"),
    pytest.param(TRUE, TRUE + 5 * YEAR, id="stepping five years ahead"),
    pytest.param(TRUE, TRUE + 2 * DAY, id="stepping two days ahead"),
]


@pytest.mark.parametrize(("made", "signed"), CLOCKS)
def test_a24_certificates_hold_at_the_true_time_whatever_the_masters_clock_was(
    master: Master, tmp_path: Path, made: float, signed: float
) -> None:
    master.make_authority(made)
    for member in HOSTS:
        answer = master.sign(member, signed)
        assert isinstance(answer, events.Signed), answer
        for later in (0.0, DAY, YEAR):
            assert why_not(tmp_path, answer, TRUE + later) == []


def test_a24_a_clock_beyond_the_authoritys_end_is_refused_and_later_made_good(
    master: Master, tmp_path: Path
) -> None:
    """Eleven years ahead when signing: an error, not an answer; right again: the answer."""
    master.make_authority(TRUE)
    refused = master.sign(HOSTS[1], TRUE + 11 * YEAR)
    assert isinstance(refused, events.SignFailed)
    assert "clock is wrong" in refused.reason
    answer = master.sign(HOSTS[1], TRUE)
    assert isinstance(answer, events.Signed)
    assert why_not(tmp_path, answer, TRUE) == []


def test_a24_openssl_would_say_so(master: Master, tmp_path: Path) -> None:
    """Positive control: the judge looks at the time."""
    master.make_authority(TRUE)
    answer = master.sign(HOSTS[0], TRUE)
    assert isinstance(answer, events.Signed)
    assert "not yet valid" in str(why_not(tmp_path, answer, pki.RELEASED - 3 * DAY))
    assert "expired" in str(why_not(tmp_path, answer, TRUE + 6 * YEAR))
    assert "expired" not in str(why_not(tmp_path, answer, TRUE + 4 * YEAR))
