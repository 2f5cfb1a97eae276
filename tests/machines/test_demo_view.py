"""What the demo shows and judges, from statuses that real machines wrote."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tests.machines import demo, view
from tests.machines.view import Look, Timings

CLUSTER = "4bcf22da0bcceaa856be4080c3356109"
FOUNDER = {
    "address": "10.77.0.11",
    "name": "host-1",
    "node_id": "2394c9837d4639fc342221477960592b",
}
COMMON: dict[str, Any] = {
    "cluster_id": CLUSTER,
    "expect": 3,
    "hint": "",
    "master": FOUNDER,
    "problems": [],
    "stage": "running",
    "state": "running",
}
MASTER = COMMON | {
    "address": "10.77.0.11",
    "certificates": [
        {"not_after": 1953152839.0, "profile": "peer"},
        {"not_after": 1953066439.0, "profile": "client"},
    ],
    "name": "host-1",
    "node_id": FOUNDER["node_id"],
    "role": "master",
    "sentence": "Running as master of cluster demo (4bcf22da).",
    "timeline": [
        {"at": 1795386438.277301, "what": "network"},
        {"at": 1795386438.461608, "what": "discovering"},
        {"at": 1795386439.49815, "what": "deciding"},
        {"at": 1795386439.659646, "what": "signing"},
        {"at": 1795386439.911327, "what": "certificates"},
        {"at": 1795386440.125536, "what": "starting"},
        {"at": 1795386447.141442, "what": "running"},
    ],
    "units": ["etcd.service"],
}
NODE = COMMON | {
    "address": "10.77.0.12",
    "certificates": [{"not_after": 1953152839.0, "profile": "client"}],
    "name": "host-2",
    "node_id": "d5db6875409bb6b69d91c144b67ee26d",
    "role": "node",
    "sentence": "Running as node of cluster demo (4bcf22da).",
    "timeline": [
        {"at": 1795386438.907604, "what": "network"},
        {"at": 1795386439.005363, "what": "discovering"},
        {"at": 1795386439.50684, "what": "deciding"},
        {"at": 1795386439.677925, "what": "enrolling"},
        {"at": 1795386440.001552, "what": "certificates"},
        {"at": 1795386440.14941, "what": "starting"},
        {"at": 1795386447.298616, "what": "running"},
    ],
    "units": ["etcd-proxy.service"],
}
OTHER = NODE | {
    "address": "10.77.0.13",
    "name": "host-3",
    "node_id": "285650ca4056c2a8e2fa8de826a7fd5b",
    "timeline": [
        {"at": 1795386439.323859, "what": "network"},
        {"at": 1795386439.421365, "what": "discovering"},
        {"at": 1795386439.501244, "what": "deciding"},
        {"at": 1795386439.664272, "what": "enrolling"},
        {"at": 1795386442.001103, "what": "certificates"},
        {"at": 1795386442.077503, "what": "starting"},
        {"at": 1795386447.231468, "what": "running"},
    ],
}
WAITING = COMMON | {
    "address": "10.77.0.12",
    "certificates": [],
    "cluster_id": None,
    "hint": "Boot the missing hosts with this same document.",
    "master": None,
    "name": "host-2",
    "role": None,
    "sentence": "2 of 3 hosts are present; waiting for 1 more"
    " (seen before, now away: host-3[bfce861e] at 10.77.0.13);"
    " a majority forms the cluster in 118 s if it is still together.",
    "stage": "discovering",
    "state": "waiting",
}
PROBLEM: dict[str, Any] = {
    "blocking": True,
    "code": "STEP_FAILED",
    "hint": "The disk is full.",
    "text": "Could not write /etc/etcd/ca.crt [f5] (attempt 5; it is tried again).",
}
DEGRADED = NODE | {
    "problems": [PROBLEM],
    "sentence": "The cluster is active; step 1 of 7: write /etc/etcd/ca.crt, which failed.",
    "stage": "starting",
    "state": "degraded",
}


def look(shown: Mapping[str, Any] | None, number: int = 2, after: float = 3.21) -> Look:
    return Look(f"host-{number}", f"10.77.0.{10 + number}", True, after, shown)


def running() -> list[Look]:
    return [look(shown, number) for number, shown in enumerate((MASTER, NODE, OTHER), 1)]


def text(shown: RenderableType, width: int = 300) -> list[str]:
    """What a terminal of that width shows."""
    console = Console(width=width, file=io.StringIO(), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(shown)
    return [line.rstrip() for line in capture.get().splitlines()]


def words(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell for cell in line.split("  ") if cell.strip()]


# ---------------------------------------------------------------- while they come up


def test_one_row_for_each_host_and_one_view_for_all() -> None:
    looks = [look(MASTER, 1), look(WAITING, 2), look(None, 3)]
    title, head, *rows = text(view.view(looks))
    assert title == "1 of 3 hosts are running"
    assert head.split() == ["host", "role", "stage", "it", "says", "address", "elapsed"]
    assert [row.split()[:3] for row in rows] == [
        ["host-1", "master", "running"],
        ["host-2", "-", "discovering"],
        ["host-3", "-", "booting"],
    ]
    for row, shown in zip(rows, (MASTER, WAITING), strict=False):
        assert shown["sentence"] in row
        assert row.split()[-3:] == [shown["address"], "3.2", "s"]
    assert view.NOTHING_SAID in rows[2]


def test_brackets_in_texts_are_shown() -> None:
    shown = "\n".join(text(view.view([look(WAITING), look(DEGRADED)])))
    assert "host-3[bfce861e]" in shown
    assert "ca.crt [f5]" in shown


def test_a_narrow_terminal_still_shows_everything() -> None:
    shown = " ".join(text(view.view([look(WAITING)]), width=80))
    for word in WAITING["sentence"].split():
        assert word in shown


def test_problems_stand_below_with_their_remedy() -> None:
    lines = text(view.view([look(NODE, 1), look(DEGRADED)]))
    assert "starting (degraded)" in lines[3]
    assert lines[-1] == f"host-2  STEP_FAILED: {PROBLEM['text']} {PROBLEM['hint']}"


def test_a_line_for_each_change_and_only_then() -> None:
    (line,) = view.changes(look(WAITING), None)
    assert line.startswith("    3.2 s  host-2  ")
    assert line.endswith(WAITING["sentence"])
    later = look(WAITING | {"sentence": WAITING["sentence"].replace("118 s", "117 s")}, after=4.2)
    assert view.changes(later, look(WAITING)) == []
    (line,) = view.changes(look(NODE), look(WAITING))
    assert "node" in line and "running" in line and NODE["sentence"] in line


def test_a_new_problem_is_a_line_once() -> None:
    stage, problem = view.changes(look(DEGRADED), look(NODE))
    assert DEGRADED["sentence"] in stage
    assert "STEP_FAILED" in problem and PROBLEM["hint"] in problem
    again = PROBLEM | {"text": PROBLEM["text"].replace("attempt 5", "attempt 6")}
    assert view.changes(look(DEGRADED | {"problems": [again]}), look(DEGRADED)) == []
    another = PROBLEM | {"code": "DISK"}
    (line,) = view.changes(look(DEGRADED | {"problems": [PROBLEM, another]}), look(DEGRADED))
    assert "DISK" in line


# ---------------------------------------------------------------- giving up


def test_late_hosts_are_named_with_what_they_wait_for() -> None:
    looks = [look(MASTER, 1), look(WAITING, 2), look(None, 3)]
    sentence = view.late(looks, 180)
    assert sentence.startswith("After 180 s host-2, host-3 are not running. host-2 (discovering):")
    assert WAITING["sentence"] in sentence
    assert f"host-3 (booting): {view.NOTHING_SAID}" in sentence
    assert MASTER["sentence"] not in sentence
    assert "host-2 is not running" in view.late([look(WAITING)], 180)


@pytest.mark.parametrize("state", ["failed", "unconfigured"])
def test_nobody_waits_for_what_cannot_come(state: str) -> None:
    ended = NODE | {"stage": state, "state": state, "sentence": "There is no document."}
    assert view.hopeless([look(MASTER, 1), look(ended)]) == (
        f"host-2 is {state}: There is no document."
    )


def test_nobody_waits_for_a_machine_that_is_off() -> None:
    off = Look("host-3", "10.77.0.13", False, 3.0, None)
    assert view.hopeless([look(MASTER, 1), off]) == "host-3 is off: This machine is off."


@pytest.mark.parametrize("shown", [None, WAITING, DEGRADED, NODE])
def test_everything_else_may_still_come(shown: Mapping[str, Any] | None) -> None:
    assert view.hopeless([look(shown)]) == ""


# ---------------------------------------------------------------- the result


def test_one_line_for_each_finished_host() -> None:
    units = {
        "host-1": {"etcd.service": "active", "firstboot.target": "active"},
        "host-2": {"etcd-proxy.service": "active", "firstboot.target": "active"},
        "host-3": {"etcd-proxy.service": "failed", "firstboot.target": "inactive"},
    }
    _, *rows = (words(line) for line in text(view.result(running(), units), width=100))
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        # The earlier of the two dates.
        ["host-1", "master", "running", "10.77.0.11", "2031-11-21", *_units("etcd")],
        ["host-2", "node", "running", "10.77.0.12", "2031-11-22", *_units("etcd-proxy")],
        [
            *("host-3", "node", "running", "10.77.0.13", "2031-11-22"),
            "etcd-proxy failed, firstboot.target inactive",
        ],
    ]


def _units(name: str) -> list[str]:
    return [f"{name} active, firstboot.target active"]


def test_times_count_from_the_last_network_up() -> None:
    timings = Timings.of(running())
    assert timings.hosts["host-3"]["network"] == 0
    assert timings.hosts["host-1"]["network"] == pytest.approx(-1.046558)
    assert timings.sentence() == (
        "From the last machine's network-up: 2.68 s to all certificates held,"
        " 7.97 s to all units active."
    )
    head, first, second, _ = text(timings.rows(), width=100)
    assert head.split() == ["host", *view.PHASES]
    # A master's signing stands where a node's enrolling does.
    assert first.split() == ["host-1", "-1.05", "-0.86", "0.17", "0.34", "0.59", "0.80", "7.82"]
    assert second.split() == ["host-2", "-0.42", "-0.32", "0.18", "0.35", "0.68", "0.83", "7.97"]


def without(shown: dict[str, Any], what: str) -> dict[str, Any]:
    return shown | {"timeline": [mark for mark in shown["timeline"] if mark["what"] != what]}


def test_certificates_are_held_when_a_host_starts_its_role_at_the_latest() -> None:
    looks = [look(MASTER, 1), look(NODE, 2), look(without(OTHER, "certificates"), 3)]
    assert Timings.of(looks).last("certificates", "starting") == pytest.approx(2.753644)


def test_a_time_that_one_host_does_not_know_is_not_made_up() -> None:
    looks = [look(MASTER, 1), look(without(NODE, "running"), 2)]
    assert Timings.of(looks).sentence().endswith("not recorded to all units active.")


def test_the_first_of_two_equal_marks_counts() -> None:
    twice = NODE | {"timeline": [*NODE["timeline"], {"at": 1795386500.0, "what": "running"}]}
    assert Timings.of([look(twice)]).last("running") == pytest.approx(8.391012)


# ---------------------------------------------------------------- one cluster, or not

Statuses = list[dict[str, Any]]


def two_clusters(found: Statuses) -> None:
    found[2] |= {"cluster_id": "00" * 16}


def no_cluster(found: Statuses) -> None:
    for status in found:
        status |= {"cluster_id": None}


def two_founders(found: Statuses) -> None:
    found[2] |= {"master": FOUNDER | {"node_id": found[2]["node_id"]}, "role": "master"}


def a_founder_that_is_node(found: Statuses) -> None:
    for status in found:
        status |= {"master": {"node_id": NODE["node_id"]}}


def no_founder(found: Statuses) -> None:
    for status in found:
        status |= {"master": None}


def two_masters(found: Statuses) -> None:
    found[1] |= {"role": "master"}


def no_master(found: Statuses) -> None:
    found[0] |= {"role": "node"}


def one_name_twice(found: Statuses) -> None:
    found[1] |= {"name": "host-3"}


def no_certificate(found: Statuses) -> None:
    found[1] |= {"certificates": []}


def test_one_cluster_with_one_master_is_without_fault() -> None:
    assert view.faults([MASTER, NODE, OTHER], masters=1) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (two_clusters, "in clusters 0000"),
        (no_cluster, "in clusters None"),
        (two_founders, "follow the masters"),
        (a_founder_that_is_node, "follow the masters"),
        (no_founder, "follow the masters None"),
        (two_masters, "2 hosts are master instead of 1"),
        (no_master, "0 hosts are master instead of 1"),
        (one_name_twice, "two hosts have the same name"),
        (no_certificate, "host-2 holds no certificate"),
    ],
)
def test_anything_but_one_cluster_is_a_fault(spoil: Callable[[Statuses], None], said: str) -> None:
    statuses = [dict(MASTER), dict(NODE), dict(OTHER)]
    spoil(statuses)
    assert said in "; ".join(view.faults(statuses, masters=1))


# ---------------------------------------------------------------- what to do next


def test_two_commands_to_try_and_how_to_end_what_was_kept() -> None:
    assert demo.hints(running(), keep=False).count("make demo ") == 2
    kept = demo.hints(running(), keep=True)
    for words_ in ("enter host-3 firstboot status", "enter host-3\n", "cycle host-3", " stop"):
        assert words_ in kept
    assert "runc exec etcd-proxy etcdctl get" in kept


def test_a_host_without_etcd_is_told() -> None:
    assert demo.container(look(MASTER)) == "etcd"
    with pytest.raises(demo.Failed, match="host-2 has no etcd unit"):
        demo.container(look(NODE | {"units": []}))
