"""The provider `ec2` against moto's EC2 and a strict metadata service."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from firstboot import web
from firstboot.discovery import ec2, imds
from firstboot.discovery.cloud import Trouble
from firstboot.discovery.ec2 import Ec2
from firstboot.discovery.imds import Ec2Metadata
from firstboot.discovery.interface import Context, ProviderReport
from firstboot.protocol.model import Endpoint
from tests.clouds.double import Double, Instance
from tests.clouds.double import look as look_once

OWN = Endpoint("127.0.0.1", 7443)
CONTEXT = Context(tag="a" * 16, formation_id="demo", boot="b" * 16)
THREE = (
    Instance("127.0.0.1", ipv6="::1", tags={"cluster": "demo"}, second="10.77.1.1"),
    Instance("10.77.0.12", ipv6="fd00::12", tags={"cluster": "demo"}, second="10.77.1.2"),
    Instance("10.77.0.13", tags={"cluster": "other"}, state="pending"),
    Instance("10.77.0.14", tags={"cluster": "demo"}, state="stopped"),
    Instance("10.77.0.15", tags={"cluster": "demo"}, launch=1),
    Instance("10.77.0.16", tags={"cluster": "demo"}, launch=2, group="workers"),
)
AS_MADE: dict[str, Any] = {
    "instances": THREE,
    "faults": {},
    "role": "node",
    "granted": ["ec2:DescribeInstances"],
    "hop_limit": 1,
    "metadata_tags": True,
}


@pytest.fixture(scope="module")
def started() -> Iterator[Double]:
    with Double("ec2", instances=THREE) as double:
        yield double


@pytest.fixture
def cloud(started: Double) -> Double:
    started.tell(**AS_MADE)
    return started


def provider(cloud: Double, **options: Any) -> Ec2:
    here = {"metadata_url": cloud.urls["metadata"], "endpoint": cloud.urls["api"]}
    return Ec2({**here, **options}, CONTEXT)


def look(one: Ec2, own: Endpoint = OWN) -> tuple[list[str], ProviderReport]:
    """Whom it finds at one announcement, and what it says."""
    found, report = look_once(one, own)
    assert {at.port for at in found} <= {7443}
    return [at.host for at in found], report


def test_a_tag_finds_those_that_have_it_and_are_up(cloud: Double) -> None:
    hosts, report = look(provider(cloud, tag={"cluster": "demo"}))
    assert hosts == ["10.77.0.12", "10.77.0.15", "10.77.0.16"]
    assert (report.found, report.error) == (3, "")
    assert report.detail == "instances by cluster demo in eu-west-1"


def test_a_launch_call_finds_its_own(cloud: Double) -> None:
    assert look(provider(cloud, reservation=True))[0] == ["10.77.0.12", "10.77.0.13"]
    # And without any option, since this instance is in no Auto Scaling group.
    assert look(provider(cloud))[0] == ["10.77.0.12", "10.77.0.13"]


def test_an_auto_scaling_group_finds_its_own(cloud: Double) -> None:
    # Each of a group's instances has a launch call of its own.
    group = [
        Instance(a, launch=n, group="workers") for n, a in enumerate(("127.0.0.1", "10.77.0.2"))
    ]
    cloud.tell(instances=(*group, Instance("10.77.0.3", launch=2, group="others")))
    for options in ({}, {"autoscaling_group": True}, {"autoscaling_group": "workers"}):
        hosts, report = look(provider(cloud, **options))
        assert (hosts, report.error) == (["10.77.0.2"], "")
    hosts, report = look(provider(cloud, autoscaling_group="others"))
    assert hosts == ["10.77.0.3"]
    assert report.error == "this instance itself is not among them"


def test_another_region(cloud: Double) -> None:
    """Where this instance cannot be among those that are found."""
    hosts, report = look(provider(cloud, region="eu-north-1", tag={"cluster": "demo"}))
    assert (hosts, report.error) == ([], "there are none")
    assert report.detail == "instances by cluster demo in eu-north-1"


def test_in_no_group_is_told(cloud: Double) -> None:
    hosts, report = look(provider(cloud, autoscaling_group=True))
    assert (hosts, report.error) == ([], "this instance is in no Auto Scaling group")


def test_the_interface_and_family_of_this_host_count(cloud: Double) -> None:
    tagged = {"tag": {"cluster": "demo"}}
    hosts, _ = look(provider(cloud, **tagged), Endpoint("10.77.1.1", 7443))
    assert hosts == ["10.77.1.2", "10.77.0.15", "10.77.0.16"]
    hosts, _ = look(provider(cloud, **tagged), Endpoint("::1", 7443))
    assert hosts == ["fd00::12"]


def test_many_pages(cloud: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.tell(
        instances=[
            Instance(f"10.77.2.{n}" if n else "127.0.0.1", tags={"a": "b"}, launch=n)
            for n in range(23)
        ]
    )
    monkeypatch.setattr(ec2, "PAGE", 5)
    before = cloud.tell()["api"]
    hosts, report = look(provider(cloud, tag={"a": "b"}))
    assert len(hosts) == report.found == 22
    assert cloud.tell()["api"] - before == 5
    monkeypatch.setattr(ec2, "MAX_PAGES", 2)
    assert len(look(provider(cloud, tag={"a": "b"}))[0]) == 9


def test_it_is_the_only_one(cloud: Double) -> None:
    cloud.tell(instances=[Instance("127.0.0.1")])
    hosts, report = look(provider(cloud))
    assert (hosts, report.error) == ([], "it is the only one")
    assert "tag: {NAME: VALUE}" in report.remedy


def test_without_a_role(cloud: Double) -> None:
    cloud.tell(role="")
    _, report = look(provider(cloud))
    assert report.error == "this instance has no role"
    assert report.detail == "DescribeInstances with this instance's role"
    assert "ec2:DescribeInstances" in report.remedy
    assert report.next_try > 0


@pytest.mark.parametrize("granted", [[], ["ec2:DescribeImages"]])
def test_a_role_that_may_not(cloud: Double, granted: list[str]) -> None:
    cloud.tell(granted=granted)
    _, report = look(provider(cloud))
    assert report.error == "the role node may not ec2:DescribeInstances (AccessDenied)"
    assert report.remedy == (
        "Allow the action ec2:DescribeInstances on resource * in the policy of the role node."
    )


def test_credentials_that_are_good_no_more_are_asked_for_anew(cloud: Double) -> None:
    one = provider(cloud, reservation=True)
    assert look(one)[0]
    cloud.tell(instances=THREE[:3])  # everything is made anew, and the role's keys
    one._due = 0.0
    assert "does not accept the credentials of the role node (AuthFailure)" in look(one)[1].error
    one._due, one._self = 0.0, None
    assert look(one)[1].error == ""


def test_a_wrong_signature_is_refused_by_the_double(cloud: Double) -> None:
    """The double must be strict, or the tests above show nothing."""
    body = b"Action=DescribeInstances&Version=2016-11-15"
    url = f"{cloud.urls['api']}/"
    assert web.ask("POST", url, {}, body).status == 401
    role = provider(cloud)._credentials()
    other = ec2.Role(role.name, role.access_key, role.secret_key + "x", role.token, role.until)
    kept = ec2._signed(url, body, "eu-west-1", role)
    assert web.ask("POST", url, kept, body).status == 200
    assert web.ask("POST", url, kept, body + b"&DryRun=false").status == 401
    assert web.ask("POST", url, ec2._signed(url, body, "eu-west-1", other), body).status == 401
    kept["X-Amz-Date"] = "20200101T000000Z"
    assert b"RequestExpired" in web.ask("POST", url, kept, body).body


def test_the_metadata_double_wants_a_token(cloud: Double) -> None:
    url = f"{cloud.urls['metadata']}/latest/meta-data/instance-id"
    assert web.ask("GET", url, {}).status == 401
    assert web.ask("GET", url, {"X-aws-ec2-metadata-token": "made-up"}).status == 401
    begin = f"{cloud.urls['metadata']}/latest/api/token"
    ttl = "X-aws-ec2-metadata-token-ttl-seconds"
    assert web.ask("PUT", begin, {}).status == 400
    assert web.ask("PUT", begin, {ttl: "21601"}).status == 400
    assert web.ask("PUT", begin, {ttl: "60", "X-Forwarded-For": "10.0.0.1"}).status == 403
    token = web.ask("PUT", begin, {ttl: "60"}).body.decode()
    assert web.ask("GET", url, {"X-aws-ec2-metadata-token": token}).status == 200


def test_a_token_that_was_forgotten_is_asked_for_anew(cloud: Double) -> None:
    service = Ec2Metadata(cloud.urls["metadata"])
    assert service.get("meta-data/instance-id")
    service._token = "made-up"
    assert service.get("meta-data/instance-id")
    assert service.get("meta-data/nothing") is None


def test_where_there_is_only_ipv6_the_second_address_is_asked(
    cloud: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imds, "ADDRESSES", ("http://127.0.0.1:1", cloud.urls["metadata"]))
    assert Ec2Metadata().get("meta-data/local-ipv4") == "127.0.0.1"


def test_facts_are_asked_for_twice(cloud: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def failing(address: str) -> dict[str, Any]:
        tried.append(address)
        raise Trouble("not yet")

    monkeypatch.setattr(imds, "_ec2_data", failing)
    with pytest.raises(Trouble, match="not yet"):
        imds.instance_data("ec2", "http://here")
    assert tried == ["http://here"] * 2


def test_throttled_it_asks_less_often(cloud: Double) -> None:
    cloud.tell(faults={"api": "throttled"})
    one = provider(cloud)
    report = look(one)[1]
    assert report.error == "EC2 asks for fewer questions (RequestLimitExceeded)"
    assert one._pause == 60.0
    before = cloud.tell()["api"]
    look(one)  # too early
    assert cloud.tell()["api"] == before
    one._due = 0.0
    look(one)
    assert (one._pause, cloud.tell()["api"]) == (120.0, before + 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("garbage", "the EC2 API answers what is not its XML"),
        ("oversized", "the EC2 API at {place}: its answer is larger than 4 MB"),
        ("closed", "the EC2 API at {place}: it closed the connection without an answer"),
        ("broken", "the EC2 API answers 500"),
        ("slow", "the EC2 API at {place}: no whole answer within 1 s"),
        ("silent", "the EC2 API at {place}: no whole answer within 1 s"),
    ],
)
def test_an_api_that_is_not_sound(
    cloud: Double, monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    cloud.tell(faults={"api": fault})
    if fault in ("slow", "silent"):
        monkeypatch.setattr(ec2, "ask", lambda *a, **k: web.ask(*a, **k, seconds=1))
    hosts, report = look(provider(cloud))
    place = urlsplit(cloud.urls["api"]).netloc
    assert (hosts, report.error) == ([], told.format(place=place))


@pytest.mark.parametrize(
    ("fault", "told", "remedy"),
    [
        ("disabled", "the metadata service is off (403)", "--http-endpoint enabled"),
        (
            "silent",
            "gives no session token: no whole answer within 1 s",
            "--http-put-response-hop-limit",
        ),
        ("slow", "gives no session token: no whole answer within 1 s", "hop-limit"),
        ("garbage", "not EC2's", "openstack"),
    ],
)
def test_a_metadata_service_that_is_not_sound(
    cloud: Double, monkeypatch: pytest.MonkeyPatch, fault: str, told: str, remedy: str
) -> None:
    cloud.tell(faults={"metadata": fault})
    monkeypatch.setattr(imds, "SECONDS", 1.0)
    _, report = look(provider(cloud))
    assert told in report.error
    assert remedy in report.remedy


def test_no_metadata_service_at_all() -> None:
    _, report = look(Ec2({"metadata_url": "http://127.0.0.1:1"}, CONTEXT))
    assert report.error == "nothing answers at the metadata service's address, 169.254.169.254"
    assert "no EC2 instance" in report.remedy


def test_an_api_out_of_reach_tells_what_to_open(cloud: Double) -> None:
    _, report = look(provider(cloud, endpoint="http://127.0.0.1:1"))
    assert report.error.startswith("the EC2 API at 127.0.0.1:1: connection refused")
    assert report.remedy == (
        "Let this subnet reach ec2.eu-west-1.amazonaws.com port 443:"
        " by a NAT gateway or a VPC endpoint for ec2."
    )


def test_over_https_the_certificate_must_be_good(tmp_path: Path) -> None:
    with Double("ec2", instances=THREE, tls=str(tmp_path)) as cloud:
        hosts, report = look(provider(cloud))
        assert hosts == []
        assert "its certificate is not accepted" in report.error


def test_without_botocore(cloud: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.auth", None)
    _, report = look(provider(cloud))
    assert "botocore.auth is not in this image" in report.error
    assert "python3-botocore" in report.remedy


def test_nobody_is_asked_while_nobody_is_missing(cloud: Double) -> None:
    before = cloud.tell().get("token", 0)
    options = {"metadata_url": cloud.urls["metadata"], "endpoint": cloud.urls["api"]}
    one = Ec2(options, Context(tag="a", formation_id="demo", boot="b", lacks=lambda: False))
    assert look(one)[0] == []
    assert cloud.tell().get("token", 0) == before


def test_found_but_never_met_names_the_security_group(cloud: Double) -> None:
    one = provider(cloud, reservation=True)
    for _ in range(3):
        one._due = 0.0
        _, report = look(one)
    assert report.error == "hosts are missing all the same"
    assert report.remedy == (
        "Open TCP 7443 between the hosts: an inbound rule of the security group from itself."
    )


def test_every_announcement_names_them_again_without_asking(cloud: Double) -> None:
    one = provider(cloud, reservation=True)
    before = cloud.tell()["api"]
    assert look(one)[0] == look(one)[0] == ["10.77.0.12", "10.77.0.13"]
    assert cloud.tell()["api"] == before + 1


def test_what_is_secret_is_not_shown() -> None:
    assert repr(ec2.Role("node", "AKIA", "secret", "token", 0.0)) == "Role('node')"


def test_facts_for_images_without_cloud_init(cloud: Double) -> None:
    data = imds.instance_data("ec2", cloud.urls["metadata"])
    assert data["v1"]["availability_zone"] == "eu-west-1a"
    found = data["ds"]["meta-data"]
    assert found["ami-launch-index"] == "0"
    assert found["reservation-id"].startswith("r-")
    assert found["tags"] == {"instance": {"cluster": "demo"}}
    cloud.tell(metadata_tags=False)
    assert imds.instance_data("ec2", cloud.urls["metadata"])["ds"]["meta-data"]["tags"] == {
        "instance": {}
    }


@pytest.mark.parametrize("text", ["", "<a", "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "[]"])
def test_no_xml(text: str) -> None:
    assert ec2._xml(web.Answer(200, text.encode())) is None


def test_trouble_is_one_sentence() -> None:
    assert str(Trouble("this", "that")) == "this"
