"""Payload rows become steps: filled in the same way every time, or refused in one sentence."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from firstboot.payloads.rows import NONE, OPTIONS, PAYLOADS
from firstboot.protocol import events
from firstboot.protocol.assembly import STEP_RETRY, Assembly
from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import (
    ClusterConfig,
    Endpoint,
    Member,
    Role,
    Self,
    Stage,
    Stored,
    Value,
)
from firstboot.protocol.plan import (
    InstallContainer,
    Payload,
    Probe,
    ReachTarget,
    RolePlan,
    StartUnit,
    Step,
    WriteFile,
    make_plan,
    variables,
)
from firstboot.protocol.situation import Start

MASTERS = (
    Member("a" * 32, "m-1", "10.0.0.1"),
    Member("b" * 32, "m-2", "fd00::2"),
    Member("c" * 32, "m-3", "10.0.0.3"),
)
VALUE = Value(1, "1" * 64, MASTERS, active=True, members=4)
NODE = Member("d" * 32, "n-1", "10.0.0.4")


def one(step: Step, options: dict[str, str] | None = None, me: Member = NODE) -> Step:
    """That step as the plan of a node has it."""
    rows = RolePlan((), (step,))
    payload = Payload("test", master=RolePlan((), ()), node=rows)
    return make_plan(payload, VALUE, me, "demo", options or {})[0]


def test_what_texts_may_refer_to() -> None:
    assert variables(VALUE, NODE, "demo") == {
        "cluster": "demo",
        "cluster_id": "1" * 32,
        "name": "n-1",
        "role": "node",
        "address": "10.0.0.4",
        "url_host": "10.0.0.4",
        "founder_name": "m-1",
        "founder_address": "10.0.0.1",
        "founder_url_host": "10.0.0.1",
        "master_count": "3",
        "master_names": "m-1,m-2,m-3",
        "master_addresses": "10.0.0.1,fd00::2,10.0.0.3",
        "client_urls": "https://10.0.0.1:2379,https://[fd00::2]:2379,https://10.0.0.3:2379",
        "peer_urls": "m-1=https://10.0.0.1:2380,m-2=https://[fd00::2]:2380,"
        "m-3=https://10.0.0.3:2380",
    }
    assert variables(VALUE, MASTERS[1], "demo")["url_host"] == "[fd00::2]"


def test_every_text_of_a_step_is_filled_in_and_nothing_else() -> None:
    options = {"image": "oci:/x:1", "mode": "7"}
    assert one(WriteFile("/etc/${name}", "of ${cluster} $$5", mode=0o600), options) == WriteFile(
        "/etc/n-1", "of demo $5", mode=0o600
    )
    install = InstallContainer("c-${name}", "${image}", (("${name}", "--at=${address}"),))
    values = (("${name}", "--at=10.0.0.4"),)  # a variable's own name is not a text
    assert one(install, options) == InstallContainer("c-n-1", "oci:/x:1", values)
    probe = Probe("http://${url_host}/", "/${name}.ca", "/${name}.crt", "/${name}.key", 7.0)
    filled = Probe("http://10.0.0.4/", "/n-1.ca", "/n-1.crt", "/n-1.key", 7.0)
    assert one(probe) == filled
    assert one(StartUnit("${name}.service")) == StartUnit("n-1.service")


def test_what_was_filled_in_is_not_filled_in_again() -> None:
    assert one(StartUnit("${image}"), {"image": "$cluster ${nothing}"}) == StartUnit(
        "$cluster ${nothing}"
    )


def test_an_option_cannot_replace_what_the_cluster_decided() -> None:
    assert one(StartUnit("${name}"), {"name": "evil"}) == StartUnit("n-1")


@pytest.mark.parametrize("text", ["${nothing}", "$nothing", "${", "$", "5 $ 7", "${a-b}", "$()"])
@pytest.mark.parametrize("kind", ["path", "content", "value"])
def test_an_unknown_variable_is_a_local_error_in_one_line(text: str, kind: str) -> None:
    step: Step = WriteFile(text if kind == "path" else "/x", text if kind == "content" else "")
    if kind == "value":
        step = InstallContainer("c", "oci:/x", (("K", text),))
    with pytest.raises(LocalError) as caught:
        one(step)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_step_is_the_target_with_every_unit_in_order() -> None:
    steps = (StartUnit("b.service"), WriteFile("/x"), StartUnit("a.service"))
    payload = Payload("test", RolePlan((), steps), RolePlan((), ()))
    plan = make_plan(payload, VALUE, MASTERS[1], "demo", {})
    assert plan == (*steps, ReachTarget(("b.service", "a.service")))
    assert make_plan(payload, VALUE, NODE, "demo", {}) == (ReachTarget(()),)


# ---------------------------------------------------------------- the payloads there are


@pytest.mark.parametrize("name", sorted(PAYLOADS))
@pytest.mark.parametrize("me", [*MASTERS, NODE], ids=lambda m: m.name)
def test_every_payload_can_be_filled_in_and_always_the_same(name: str, me: Member) -> None:
    payload, options = PAYLOADS[name], dict(OPTIONS[name])
    plan = make_plan(payload, VALUE, me, "demo", options)
    backwards = dict(reversed(list(options.items())))
    assert make_plan(payload, VALUE, me, "demo", backwards) == plan
    assert isinstance(plan[-1], ReachTarget)
    role = VALUE.role_of(me.node_id)
    assert role is (Role.NODE if me is NODE else Role.MASTER)
    steps = payload.for_role(role).steps
    assert sum(step.when == "true" for step in steps) < len(plan) <= len(steps) + 1
    assert "${" not in repr(plan).replace("origin-${component}:${version}", "")  # Origin's own
    assert len({s.path for s in plan if isinstance(s, WriteFile)}) == sum(
        isinstance(s, WriteFile) for s in plan
    )


@pytest.mark.parametrize("name", sorted(PAYLOADS))
@pytest.mark.parametrize("role", list(Role))
def test_private_keys_are_for_root_alone(name: str, role: Role) -> None:
    keys = [
        s
        for s in PAYLOADS[name].for_role(role).steps
        if isinstance(s, WriteFile) and s.credential.endswith(".key")
    ]
    assert keys and all(step.mode == 0o600 for step in keys)


@pytest.mark.parametrize("me", [*MASTERS, NODE], ids=lambda m: m.name)
def test_values_of_a_container_splice_into_a_json_list(me: Member) -> None:
    for step in make_plan(PAYLOADS["etcd"], VALUE, me, "demo", OPTIONS["etcd"]):
        if isinstance(step, InstallContainer):
            for _, spliced in step.values:
                items = json.loads(f'["first"{spliced}]')
                assert all(isinstance(item, str) for item in items)


def test_every_master_has_the_same_list_of_peers() -> None:
    def peers(me: Member) -> str:
        plan = make_plan(PAYLOADS["etcd"], VALUE, me, "demo", OPTIONS["etcd"])
        values = next(dict(s.values) for s in plan if isinstance(s, InstallContainer))
        items: list[str] = json.loads(f"[0{values['ETCD_ARGS']}]")[1:]
        return next(i for i in items if i.startswith("--initial-cluster="))

    assert len({peers(m) for m in MASTERS}) == 1


# ---------------------------------------------------------------- carrying it out


def member_core(stored: Stored | None = None) -> Assembly:
    """A node whose certificates and ACTIVE are on disk: nothing but its plan is left."""
    kept = stored or Stored(
        decided=VALUE, activated=True, enrolled=NODE, enrolled_fingerprint=VALUE.fingerprint
    )
    return Assembly(
        Start(
            config=ClusterConfig("demo", 4, masters=3),
            me=Self(NODE.node_id, "boot", NODE.name, Endpoint(NODE.host, 7443)),
            stored=kept,
            issued=(),
            payload=NONE,
            options={},
            rng=random.Random(1),
            now=100.0,
        )
    )


def steps_of(actions: list[events.Action]) -> list[events.RunStep]:
    return [a for a in actions if isinstance(a, events.RunStep)]


def run_plan(core: Assembly, now: float) -> list[events.Action]:
    """Answer every step with success; what the core did along the way."""
    did = core.receive(events.DeadlineReached(), now)
    while waiting := steps_of(did[-8:]):
        more = core.receive(events.StepDone(waiting[-1].index), now)
        if not steps_of(more):
            return [*did, *more]
        did += more
    return did


def test_steps_are_asked_for_one_at_a_time_and_in_order() -> None:
    core = member_core()
    did = run_plan(core, 100.0)
    assert [a.index for a in steps_of(did)] == [0, 1, 2, 3, 4]
    assert core.stage is Stage.RUNNING


def test_a_failed_step_is_asked_for_again_ever_more_slowly_and_no_other_before_it() -> None:
    core, now = member_core(), 100.0
    assert [a.index for a in steps_of(core.receive(events.DeadlineReached(), now))] == [0]
    for pause in (*STEP_RETRY, STEP_RETRY[-1]):
        assert not steps_of(core.receive(events.StepFailed(0, "Could not."), now))
        assert not steps_of(core.receive(events.DeadlineReached(), now + pause - 0.01))
        now += pause
        assert core.deadline <= now
        assert [a.index for a in steps_of(core.receive(events.DeadlineReached(), now))] == [0]
    late = core.receive(events.StepDone(3), now)  # an answer to nothing that was asked
    assert not steps_of(late) and core.steps_done == 0
    assert [a.index for a in steps_of(core.receive(events.StepDone(0), now))] == [1]
    assert core.step_error is None and core.step_failures == 0


def test_a_host_that_lost_power_between_finished_and_its_stamp_still_finishes() -> None:
    """FINISHED is on disk, the stamp is not: the next start must end as the last one would."""
    core = member_core()
    done = replace(core.stored, finished=True, closed=True)
    core = member_core(done)
    did, now = run_plan(core, 100.0), 100.0
    assert core.stage is Stage.RUNNING
    for _ in range(200):
        if any(isinstance(a, events.Finish) for a in did):
            return
        persists = [a for a in did if isinstance(a, events.Persist)]
        now = min(core.deadline, now + 5.0)
        event = events.PersistDone(persists[-1].sequence) if persists else None
        did = core.receive(event or events.DeadlineReached(), now)
    pytest.fail(f"after {now - 100:.0f} s it runs its role and still does not finish")
