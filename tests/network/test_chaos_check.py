"""The campaign's checker finds each violation in histories doctored to hold it, and only then.

The histories are the simulator's, so that this needs neither root nor network: they are what real
hosts write, see `tests.recording`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from firstboot import pki
from firstboot.host.state import SCHEMA
from firstboot.protocol import history
from firstboot.protocol.messages import Certificate, Granted, to_plain
from firstboot.protocol.model import ClusterConfig, Profile, Stored
from tests.network.chaos.check import Findings, check
from tests.network.chaos.evidence import Life, trail
from tests.network.chaos.formation import Outcome
from tests.network.chaos.plan import draw
from tests.network.chaos.verdict import Verdict, judge
from tests.recording import RecordingWorld, formed
from tests.sim.world import Faults

Line = dict[str, Any]
FINGERPRINT = "ab" * 32


@cache
def world(seed: int) -> RecordingWorld:
    return formed(seed)


def lives_of(here: RecordingWorld) -> list[Life]:
    """What real hosts of that formation would have on their disks, but for certificates."""
    return [
        Life(f"h{n + 1}", tuple(here.history_of(n)), host.disk.stored)
        for n, host in enumerate(here.hosts)
    ]


def founder(seed: int) -> int:
    """The index of the founding master."""
    decided = world(seed).hosts[0].disk.stored.decided
    assert decided is not None
    return [h.node_id for h in world(seed).hosts].index(decided.founder.node_id)


def doctored(lives: list[Life], index: int, cure: Callable[[list[Line]], Sequence[Line]]) -> None:
    """Replace one life's history by what `cure` makes of it, line by line."""
    lines = [json.loads(line) for line in lives[index].lines]
    changed = tuple(f"{json.dumps(line)}\n" for line in cure(lines))
    lives[index] = dataclasses.replace(lives[index], lines=changed, state=None)


def look(lives: list[Life], told: Sequence[str] = ()) -> Findings:
    """The findings; not those about certificates, of which the simulator has none."""
    found = check(trail(lives), lives, told)
    found.wrong = [line for line in found.wrong if not line.startswith("I8")]
    return found


def kinds(found: Findings) -> set[str]:
    return {line.partition(":")[0] for line in found.wrong}


# ---------------------------------------------------------------- nothing wrong, nothing found


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_sound_formation_passes_every_check(seed: int) -> None:
    found = look(lives_of(world(seed)))
    assert found.wrong == []
    assert len(found.active) == 1
    assert (found.voters, found.quorum, found.split) == (3, 3, False)
    for invariant in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I11"):
        assert found.checks[invariant] > 0, invariant


@pytest.mark.parametrize("seed", range(20, 28))
def test_so_does_one_with_crashes(seed: int) -> None:
    here = formed(seed, faults=Faults(until=8.0, loss=0.2, crashes=4))
    assert any(len(here.runs(n)) > 1 for n in range(3))
    assert look(lives_of(here)).wrong == []


# ---------------------------------------------------------------- each violation is found


def test_i1_i2_two_clusters() -> None:
    lives, others = lives_of(world(1)), lives_of(world(2))
    text = [json.dumps(life.lines) for life in others]
    for mine, theirs in zip(world(1).hosts, world(2).hosts, strict=True):
        text = [t.replace(theirs.node_id, mine.node_id) for t in text]
    for name, t in zip(("a", "b", "c"), text, strict=True):
        lives.append(Life(name, tuple(json.loads(t))))
    assert {"I1", "I2"} <= kinds(look(lives))


def test_i1_a_split_outside_the_promise_must_be_told() -> None:
    lives = lives_of(world(1)) + [
        dataclasses.replace(life, name=f"other-{life.name}") for life in lives_of(world(2))
    ]
    assert "I1: a split that nobody names" in str(look(lives).wrong)
    told = look(lives, told=["CONFLICT"])
    assert told.split
    assert told.wrong == []


def test_i3_a_step_before_active() -> None:
    lives = lives_of(world(1))

    def early(lines: list[Line]) -> list[Line]:
        done = {"at": lines[1]["at"], "event": "StepDone", "index": 0}
        return [*lines[:2], done, *lines[2:]]

    doctored(lives, 0, early)
    assert any("acts early" in line for line in look(lives).wrong)


def test_i3_a_step_without_a_quorum_on_disk() -> None:
    """All but the master lose what their disks held; the master goes on as if they had voted."""
    lives = lives_of(world(1))
    for index in {0, 1, 2} - {founder(1)}:
        doctored(lives, index, lambda lines: [n for n in lines if n.get("event") != "PersistDone"])
    assert any("1 of 2 hold ACTIVE" in line for line in look(lives).wrong)


def test_i3_strict_wants_all() -> None:
    config = ClusterConfig("demo", 3, grace=30.0, agreed="x", strict=True)
    here = RecordingWorld(1, 3, config, Faults(until=0.0))
    here.schedule()
    here.run(60.0, here.all_running)
    lives = lives_of(here)
    assert look(lives).wrong == []
    decided = here.hosts[0].disk.stored.decided
    assert decided is not None
    other = next(n for n, h in enumerate(here.hosts) if h.node_id != decided.founder.node_id)
    doctored(lives, other, lambda lines: [n for n in lines if n.get("event") != "PersistDone"])
    assert any("2 of 3 hold ACTIVE" in line for line in look(lives).wrong)


def test_i4_a_vote_taken_back_by_a_restart() -> None:
    lives = lives_of(world(1))

    def forgetful(lines: list[Line]) -> list[Line]:
        again = json.loads(json.dumps(lines[0]))
        again["run"]["now"] = lines[-1]["at"] + 1.0
        return [*lines, again]

    doctored(lives, 0, forgetful)
    assert {"I4", "I11"} <= kinds(look(lives))


@pytest.mark.parametrize("word", ["promise", "vote"])
def test_i4_a_reply_before_it_was_on_disk(word: str) -> None:
    lives = lives_of(world(1))
    other = next(n for n in range(3) if n != founder(1))
    doctored(lives, other, lambda lines: [n for n in lines if n.get("event") != "PersistDone"])
    assert any(f"'s {word} at" in line for line in look(lives).wrong)


def test_i5_two_values_under_one_ballot() -> None:
    lives = lives_of(world(1))
    other = next(n for n in range(3) if n != founder(1))

    def another(lines: list[Line]) -> list[Line]:
        for line in lines:
            message = json.loads(line.get("message", "{}"))
            if message.get("t") == "accept":
                message["value"]["fingerprint"] = FINGERPRINT
                line["message"] = json.dumps(message)
        return lines

    doctored(lives, other, another)
    assert "I5" in kinds(look(lives))


@pytest.mark.parametrize(
    ("event", "field", "invariant"),
    [("AuthorityMade", "fingerprint", "I6"), ("Signed", "key", "I7")],
)
def test_i6_i7_a_second_ca_or_key(event: str, field: str, invariant: str) -> None:
    lives = lives_of(world(1))

    def twice(lines: list[Line]) -> list[Line]:
        made = next(line for line in lines if line.get("event") == event)
        return [*lines, {**made, field: FINGERPRINT, "at": lines[-1]["at"]}]

    doctored(lives, founder(1), twice)
    assert invariant in kinds(look(lives))


def test_i7_more_members_than_may_be() -> None:
    lives = lives_of(world(1))

    def generous(lines: list[Line]) -> list[Line]:
        signed = next(line for line in lines if line.get("event") == "Signed")
        more = [
            {
                **signed,
                "member": {**signed["member"], "node_id": f"{n:032x}"},
                "at": lines[-1]["at"],
            }
            for n in range(4)
        ]
        return [*lines, *more]

    doctored(lives, founder(1), generous)
    assert "I7" in kinds(look(lives))


def about_certificates(life: Life) -> set[str]:
    return kinds(check(trail(lives_of(world(1))), [life])) - {"I1"}  # of another formation


def test_i8_certificates_of_another_ca() -> None:
    state = world(1).hosts[0].disk.stored
    member = state.enrolled
    assert member is not None
    assert state.decided is not None
    authority, other = (pki.make_authority("demo", 1) for _ in range(2))
    key = pki.make_key()
    csr = pki.make_request(key, member.node_id)

    def signed_by(by: pki.Authority) -> bytes:
        return pki.sign(by, csr, member, Profile.PEER, "firstboot")

    fingerprint = pki.fingerprint(authority.certificate)
    decided = dataclasses.replace(state.decided, fingerprint=fingerprint)
    state = dataclasses.replace(state, decided=decided, enrolled_fingerprint=fingerprint)

    def found(authority_sent: pki.Authority, certificate: bytes, laid: bytes = b"") -> set[str]:
        certificates = (Certificate(Profile.PEER, certificate),)
        granted = Granted(1, "a", certificates, authority_sent.certificate)
        files = {"server.crt": pki.to_pem(laid)} if laid else {}
        return about_certificates(Life("x", (), state, granted, files))

    good, bad = signed_by(authority), signed_by(other)
    assert found(authority, good) == found(authority, good, good) == set()
    assert found(authority, bad) == {"I8"}
    assert found(other, bad) == {"I8"}
    assert found(authority, good, bad) == {"I8"}
    assert about_certificates(Life("x", (), state)) == {"I8"}  # it acts, and holds none


def test_i11_a_state_nobody_asked_to_be_written() -> None:
    lives = lives_of(world(1))
    lives[0] = dataclasses.replace(lives[0], state=Stored())
    assert kinds(look(lives)) == {"I11"}


# ---------------------------------------------------------------- who may wait


RUNNING = {"stage": "running", "state": "running", "sentence": "Running.", "problems": []}
WAITING = {"stage": "enrolling", "state": "waiting", "sentence": "Waiting.", "problems": []}


def judged(directory: Path, lives: list[Life], statuses: dict[str, Any], **more: Any) -> Verdict:
    for life in lives:
        kept = directory / life.name / "var/lib/firstboot"
        kept.mkdir(parents=True)
        (kept / "history.jsonl").write_text("".join(life.lines))
        plain = {"schema": SCHEMA, "state": to_plain(life.state)}
        (kept / "state.json").write_text(json.dumps(plain))
    plan = dataclasses.replace(
        draw(0), hosts=3, expect=3, masters=1, strict=False, discovery="mdns", faults=()
    )
    outcome = Outcome(
        plan,
        directory,
        peace=1.0,
        ended=2.0,
        running=False,
        statuses=statuses,
        up=sorted(statuses.keys() - {"stranger"}),
        **{"exits": [], "told": set(), "leaks": [], "faults": Counter[str](), **more},
    )
    # The simulator's certificates are none, and I8 has a test of its own.
    verdict = judge(outcome)
    verdict.wrong = [line for line in verdict.wrong if not line.startswith("I8")]
    return verdict


def addressed(seed: int) -> dict[str, Any]:
    """What the master says that runs at its address."""
    return {**RUNNING, "address": world(seed).hosts[founder(seed)].endpoint.host}


def test_all_running_is_as_it_must_be(tmp_path: Path) -> None:
    statuses = dict.fromkeys(("h1", "h2", "h3"), RUNNING)
    assert judged(tmp_path, lives_of(world(1)), statuses).wrong == []


def test_a_host_that_waits_without_a_reason_is_stuck(tmp_path: Path) -> None:
    master = f"h{founder(1) + 1}"
    names = ("h1", "h2", "h3")
    other = next(n for n in names if n != master)
    statuses = {**dict.fromkeys(names, RUNNING), master: addressed(1), other: WAITING}
    lives = lives_of(world(1))
    lives[founder(1)] = dataclasses.replace(
        lives[founder(1)], state=dataclasses.replace(_state(lives[founder(1)]), closed=False)
    )
    verdict = judged(tmp_path, lives, statuses)
    assert [line for line in verdict.wrong if line.startswith("L1")] == [
        f"L1: {other} is stuck: enrolling: Waiting."
    ]


def _state(life: Life) -> Stored:
    assert life.state is not None
    return life.state


def test_a_host_whose_master_is_gone_may_wait(tmp_path: Path) -> None:
    master = f"h{founder(1) + 1}"
    names = sorted({"h1", "h2", "h3"} - {master})
    verdict = judged(tmp_path, lives_of(world(1)), dict.fromkeys(names, WAITING))
    assert verdict.wrong == []
    assert verdict.excused == {"the master is gone after ACTIVE": 2}


def test_a_host_that_says_nothing_or_failed_is_never_excused(tmp_path: Path) -> None:
    master = f"h{founder(1) + 1}"
    names = sorted({"h1", "h2", "h3"} - {master})
    statuses = {names[0]: {}, names[1]: {**WAITING, "state": "failed"}}
    verdict = judged(tmp_path, lives_of(world(1)), statuses)
    assert len(verdict.wrong) == 2


def test_below_the_quorum_a_host_must_say_for_how_many_it_waits(tmp_path: Path) -> None:
    opening = [history.opening_line(world(1).runs(n)[0][0]) for n in range(3)]
    lives = [Life(f"h{n + 1}", (f"{line}\n",), Stored()) for n, line in enumerate(opening)]
    status = {**WAITING, "sentence": "1 of 3 hosts are present; waiting for 1 more."}
    verdict = judged(tmp_path / "one", lives, {"h1": status})
    assert (verdict.wrong, verdict.excused) == ([], {"no quorum": 1})
    assert judged(tmp_path / "mute", lives, {"h1": WAITING}).wrong
    assert judged(tmp_path / "two", lives, {"h1": status, "h2": status}).wrong


def test_what_else_went_wrong_is_told(tmp_path: Path) -> None:
    statuses = dict.fromkeys(("h1", "h2", "h3"), RUNNING)
    stranger = {"stranger": {**WAITING, "present": 2, "cluster_id": "x"}}
    verdict = judged(
        tmp_path,
        lives_of(world(1)),
        {**statuses, **stranger},
        exits=["host 1 exited with 1"],
        leaks=["the token is in h1/log"],
    )
    assert len(verdict.wrong) == 3


def test_plans_are_those_of_their_seeds() -> None:
    assert [draw(n) for n in range(50)] == [draw(n) for n in range(50)]
    assert len({draw(n) for n in range(50)}) == 50
