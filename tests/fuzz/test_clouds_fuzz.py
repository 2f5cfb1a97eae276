"""Whatever a cloud or its metadata service answers: addresses, or Trouble in one sentence."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstboot.discovery import ec2, imds, openstack
from firstboot.discovery.cloud import Cloud, Trouble
from firstboot.discovery.interface import Context
from firstboot.host import Machine, with_cloud
from firstboot.protocol.model import Endpoint
from firstboot.web import Answer
from tests.fuzz.mutations import NASTY_JSON, edited, edits, places, spliced

FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
OWN = Endpoint("10.0.0.5", 7443)
SECRET = "the-secret-itself"
CREDENTIAL = {
    "auth_url": "http://keystone/v3",
    "application_credential_id": "id",
    "application_credential_secret": SECRET,
}
SETTINGS: dict[str, Any] = {"clouds": {"openstack": {"auth": CREDENTIAL, "region_name": "r"}}}
ENDPOINT = {"interface": "public", "region": "r", "url": "http://nova/v2.1"}
KEYSTONE = {
    "token": {
        "expires_at": "2126-01-01T00:00:00.000000Z",
        "catalog": [{"type": "compute", "endpoints": [ENDPOINT]}],
    }
}
SERVER = {
    "id": "a-1",
    "status": "ACTIVE",
    "metadata": {"cluster": "demo"},
    "addresses": {"net": [{"addr": "10.0.0.5", "OS-EXT-IPS:type": "fixed"}, {"addr": "fd00::5"}]},
}
NOVA = {
    "servers": [SERVER, {**SERVER, "id": "a-2", "addresses": {"net": [{"addr": "10.0.0.6"}]}}],
    "servers_links": [{"rel": "next"}],
    "server_groups": [{"id": "g", "name": "n", "members": ["a-1", "a-2"]}],
}
ROLE = {
    "Code": "Success",
    "AccessKeyId": "AKIA",
    "SecretAccessKey": SECRET,
    "Token": "t",
    "Expiration": "2126-01-01T00:00:00Z",
}
IDENTITY = {"instanceId": "i-1", "region": "eu-west-1"}
ITEM = (
    "<item><instanceId>i-{n}</instanceId><tagSet><item><key>aws:autoscaling:groupName</key>"
    "<value>g</value></item></tagSet><networkInterfaceSet><item><attachment><deviceIndex>0"
    "</deviceIndex></attachment><privateIpAddress>10.0.0.{n}</privateIpAddress>"
    "<ipv6AddressesSet><item><ipv6Address>fd00::{n}</ipv6Address></item></ipv6AddressesSet>"
    "</item></networkInterfaceSet></item>"
)
EC2 = (
    "<DescribeInstancesResponse xmlns='http://ec2.amazonaws.com/doc/2016-11-15/'><reservationSet>"
    "<item><reservationId>r-1</reservationId><instancesSet>"
    + "".join(ITEM.format(n=n) for n in (1, 5, 6))
    + "</instancesSet></item></reservationSet></DescribeInstancesResponse>"
).encode()


def outcome(provider: Cloud) -> list[str]:
    """Whom it finds; nothing but Trouble may be raised, and that shows no secret."""
    try:
        sighting = provider._look(OWN)
    except Trouble as trouble:
        assert SECRET not in f"{trouble}{trouble.remedy}"
        return []
    assert SECRET not in repr(sighting)
    for host in sighting.hosts:
        assert str(ipaddress.ip_address(host)) == host
    return list(sighting.hosts)


def on_openstack(settings: Any, answer: Callable[[str], Answer]) -> list[str]:
    """With that clouds.yaml, and these answers to its questions."""
    context = Context("a", "demo", "b", settings=lambda path: settings)
    provider = openstack.Openstack({"metadata": {"cluster": "demo"}}, context)
    with patch.object(openstack, "ask", lambda method, url, *a, **k: answer(url)):
        return outcome(provider)


def keystone_or_nova(keystone: bytes, nova: bytes, status: int = 200) -> Callable[[str], Answer]:
    def answer(url: str) -> Answer:
        if url.endswith("/auth/tokens"):
            return Answer(201, keystone, {"x-subject-token": "t"})
        return Answer(status, nova)

    return answer


def on_ec2(answer: Answer, role: bytes = b"", identity: bytes = b"") -> list[str]:
    provider = ec2.Ec2({}, Context("a", "demo", "b"))
    texts = {
        "dynamic/instance-identity/document": identity or json.dumps(IDENTITY).encode(),
        "meta-data/iam/security-credentials/": b"node",
        "meta-data/iam/security-credentials/node": role or json.dumps(ROLE).encode(),
    }

    def get(_: object, path: str) -> str:
        return texts.get(path, b"").decode(errors="replace")

    with (
        patch.object(imds.Ec2Metadata, "get", get),
        patch.object(ec2, "ask", lambda *a, **k: answer),
        patch.object(ec2, "MAX_PAGES", 3),
    ):
        return outcome(provider)


def test_the_sound_ones_find_somebody() -> None:
    sound = keystone_or_nova(json.dumps(KEYSTONE).encode(), json.dumps(NOVA).encode())
    assert on_openstack(SETTINGS, sound) == ["10.0.0.6"]
    assert on_ec2(Answer(200, EC2)) == ["10.0.0.6"]


def test_a_catalogue_that_leaves_the_version_out() -> None:
    asked = []

    def answer(url: str) -> Answer:
        asked.append(url)
        bare = json.dumps(KEYSTONE).replace("/v2.1", "")
        return keystone_or_nova(bare.encode(), json.dumps(NOVA).encode())(url)

    on_openstack(SETTINGS, answer)
    assert asked[1].startswith("http://nova/v2.1/servers/detail?")


@FAST
@given(edits, st.sampled_from([200, 400, 401, 403, 500, 503]))
def test_damaged_xml(changes: Any, status: int) -> None:
    on_ec2(Answer(status, edited(EC2, changes)))


@FAST
@given(st.sampled_from(list(places(ROLE))), st.sampled_from(NASTY_JSON))
def test_damaged_credentials(place: Any, text: str) -> None:
    on_ec2(Answer(200, EC2), role=spliced(ROLE, place, text).encode(errors="surrogatepass"))


@FAST
@given(st.sampled_from(list(places(IDENTITY))), st.sampled_from(NASTY_JSON))
def test_damaged_identity(place: Any, text: str) -> None:
    on_ec2(Answer(200, EC2), identity=spliced(IDENTITY, place, text).encode())


@FAST
@given(st.sampled_from(list(places(KEYSTONE))), st.sampled_from(NASTY_JSON))
def test_damaged_tokens(place: Any, text: str) -> None:
    damaged = spliced(KEYSTONE, place, text).encode(errors="surrogatepass")
    on_openstack(SETTINGS, keystone_or_nova(damaged, json.dumps(NOVA).encode()))


@FAST
@given(st.sampled_from(list(places(NOVA))), st.sampled_from(NASTY_JSON))
def test_damaged_lists(place: Any, text: str) -> None:
    damaged = spliced(NOVA, place, text).encode(errors="surrogatepass")
    with patch.object(openstack, "MAX_PAGES", 3):
        on_openstack(SETTINGS, keystone_or_nova(json.dumps(KEYSTONE).encode(), damaged))


STRANGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@FAST
@given(st.sampled_from(list(places(SETTINGS))), STRANGE)
def test_a_strange_clouds_yaml(place: Any, strange: Any) -> None:
    data = json.loads(spliced(SETTINGS, place, json.dumps(strange)))
    sound = keystone_or_nova(json.dumps(KEYSTONE).encode(), json.dumps(NOVA).encode())
    on_openstack(data, sound)


@FAST
@given(st.sampled_from([{"v1": {}, "ds": {"meta_data": {"meta": {}}}}, {"ds": []}]), STRANGE)
def test_strange_instance_data(data: Any, strange: Any) -> None:
    for place in places(data):
        made = json.loads(spliced(data, place, json.dumps(strange)))
        if isinstance(made, dict):
            assert isinstance(with_cloud(Machine(), made), Machine)
