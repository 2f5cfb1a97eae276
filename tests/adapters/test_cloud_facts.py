"""What the cloud says of a host, for ranks and labels: both spellings, and strange ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firstboot.host import Facts, Machine, Network, look, with_cloud
from firstboot.userdata import make_token, parse
from tests.machines.document import document

# As cloud-init 22.4 and 26.2 leave them: EC2's metadata keeps its hyphens, OpenStack's has none.
EC2 = {
    "v1": {"instance_id": "i-1", "instance-id": "i-1", "availability_zone": "eu-west-1a"},
    "ds": {
        "meta-data": {
            "ami-launch-index": "2",
            "reservation-id": "r-1",
            "tags": {"instance": {"disk": "fast", "rack-row": "7"}},
        }
    },
}
OPENSTACK = {
    "v1": {"instance-id": "i-1", "availability-zone": "eu-west-1a"},
    "ds": {
        "ec2_metadata": {"reservation-id": "r-1", "ami-launch-index": 2},
        "meta_data": {"launch_index": 2, "meta": {"disk": "fast", "rack-row": "7"}},
    },
}
FOUND = Machine(
    instance_id="i-1",
    launch_index=2,
    reservation="r-1",
    zone="eu-west-1a",
    tags={"disk": "fast", "rack-row": "7"},
)


@pytest.mark.parametrize("data", [EC2, OPENSTACK], ids=["ec2", "openstack"])
def test_both_spellings(tmp_path: Path, data: dict[str, Any]) -> None:
    path = tmp_path / "run/cloud-init/instance-data.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    assert look(tmp_path) == FOUND
    assert with_cloud(Machine("a" * 32), data).machine_id == "a" * 32


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"v1": {"availability_zone": None}},
        {"v1": {"availability_zone": ["a"]}, "ds": {"meta-data": {"reservation-id": 7}}},
        {"ds": {"meta_data": {"meta": ["disk"]}, "ec2_metadata": "x"}},
        {"ds": {"meta-data": {"tags": {"instance": {"disk": 1, "x": None}}}}},
    ],
)
def test_what_is_not_there_or_strange_stays_empty(data: dict[str, Any]) -> None:
    assert with_cloud(Machine(), data) == Machine()


def test_it_is_bounded() -> None:
    tags = {str(n): "x" * 5000 for n in range(5000)}
    found = with_cloud(Machine(), {"ds": {"meta_data": {"meta": tags}}}).tags
    assert len(found) == 128
    assert {len(text) for text in found.values()} == {256}


def host(machine: Machine) -> Facts:
    return Facts(machine, "web-1", Network(), None, 7443)


@pytest.mark.parametrize(
    ("match", "other"),
    [
        ({"reservation": "r-1"}, {"reservation": "r-2"}),
        ({"instance_id": "i-1"}, {"instance_id": "i-2"}),
        ({"zone": "eu-west-1a"}, {"zone": "eu-west-1b"}),
        ({"tag": {"disk": "fast"}}, {"tag": {"disk": "slow"}}),
        ({"tag": {"disk": "fast", "rack-row": "7"}}, {"tag": {"disk": "fast", "rack-row": "8"}}),
        ({"zone": "eu-west-1a", "launch_index": 2}, {"zone": "eu-west-1a", "launch_index": 0}),
    ],
)
def test_matches(match: dict[str, Any], other: dict[str, Any]) -> None:
    assert host(FOUND).matches(match)
    assert not host(FOUND).matches(other)
    assert not host(Machine()).matches(match)
    assert not host(Machine()).matches({"tag": {"disk": ""}})


def test_a_document_names_them() -> None:
    prefer = "{prefer: [{tag: {disk: fast}}, {zone: eu-west-1a}], never: [{instance_id: i-1}]}"
    made = parse(document(3, make_token(), election=prefer).encode(), "here")
    assert made.matched_by == {"tag", "zone", "instance_id"}
    assert [host(FOUND).matches(m) for m in (*made.prefer, *made.never)] == [True] * 3
