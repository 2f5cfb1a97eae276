"""The provider `openstack` against strict doubles of Keystone, Nova and the metadata service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from firstboot import userdata, web
from firstboot.discovery import imds, openstack
from firstboot.discovery.interface import Context, ProviderReport
from firstboot.discovery.openstack import Openstack
from firstboot.protocol.model import Endpoint
from tests.clouds.double import Double, Instance
from tests.clouds.double import look as look_once

OWN = Endpoint("127.0.0.1", 7443)
SECRET = "firstboot-secret"
SERVERS = (
    Instance("127.0.0.1", ipv6="::1", tags={"cluster": "demo"}, second="10.77.1.1", group="spread"),
    Instance("10.77.0.12", ipv6="fd00::12", tags={"cluster": "demo"}, second="10.77.1.2"),
    Instance("10.77.0.13", tags={"cluster": "other"}, state="pending", group="spread"),
    Instance("10.77.0.14", tags={"cluster": "demo"}, state="stopped"),
    Instance("10.77.0.15", tags={"cluster": "demo"}, launch=1),
    Instance("10.77.0.16", launch=1, group="others"),
)
ALONE = (replace(SERVERS[0], group=""), *SERVERS[1:])  # of no server group
AS_MADE: dict[str, Any] = {
    "instances": SERVERS,
    "faults": {},
    "services": ["volumev3", "compute"],
    "rules": None,
    "elsewhere": ["elsewhere"],
    "page": 1000,
    "token_seconds": 3600.0,
}


@pytest.fixture(scope="module")
def started() -> Iterator[Double]:
    with Double("openstack", instances=SERVERS) as double:
        yield double


@pytest.fixture
def cloud(started: Double) -> Double:
    started.tell(**AS_MADE)
    return started


def clouds_yaml(root: Path, url: str, secret: str = SECRET, **more: str) -> None:
    """Write the credential where the provider looks, as an operator would."""
    path = root / "etc/openstack/clouds.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"    {key}: {text}\n" for key, text in more.items())
    path.write_text(
        "clouds:\n"
        "  any-name:\n"
        "    auth_type: v3applicationcredential\n"
        f"{lines}"
        "    auth:\n"
        f"      auth_url: {url}\n"
        "      application_credential_id: firstboot-credential\n"
        f"      application_credential_secret: {secret}\n"
    )


def provider(cloud: Double, root: Path, **options: Any) -> Openstack:
    """One that finds its credential below `root`; a file that is there already stays."""
    if not (root / "etc/openstack/clouds.yaml").exists():
        clouds_yaml(root, cloud.urls["api"], region_name="eu-west-1")
    settings = partial(userdata.settings, root)
    context = Context("a" * 16, "demo", "b" * 16, root=root, settings=settings)
    return Openstack({"metadata_url": cloud.urls["metadata"], **options}, context)


def look(one: Openstack, own: Endpoint = OWN) -> tuple[list[str], ProviderReport]:
    """Whom it finds at one announcement, and what it says."""
    found, report = look_once(one, own)
    assert SECRET not in repr(report)
    return [at.host for at in found], report


def test_metadata_finds_those_that_have_it_and_are_up(cloud: Double, tmp_path: Path) -> None:
    hosts, report = look(provider(cloud, tmp_path, metadata={"cluster": "demo"}))
    assert hosts == ["10.77.0.12", "10.77.0.15"]
    assert (report.found, report.error) == (2, "")
    assert report.detail == "servers by metadata cluster demo"


def test_a_server_group_finds_its_members(cloud: Double, tmp_path: Path) -> None:
    for options in ({}, {"server_group": True}, {"server_group": "spread"}):
        hosts, report = look(provider(cloud, tmp_path, **options))
        assert (hosts, report.error) == (["10.77.0.13"], "")
        assert report.detail == "servers by server group spread"
    hosts, report = look(provider(cloud, tmp_path, server_group="others"))
    assert hosts == ["10.77.0.16"]
    assert report.error == "this server itself is not among them"
    assert "no group 'absent'" in look(provider(cloud, tmp_path, server_group="absent"))[1].error
    cloud.tell(instances=ALONE)
    report = look(provider(cloud, tmp_path, server_group=True))[1]
    assert report.error == "this server is in no server group"


def test_a_launch_call_finds_its_own(cloud: Double, tmp_path: Path) -> None:
    cloud.tell(instances=ALONE)
    hosts, report = look(provider(cloud, tmp_path))
    assert hosts == ["10.77.0.12", "10.77.0.13"]
    assert report.detail.startswith("servers by launch call r-")


def test_a_launch_call_known_from_cloud_init(cloud: Double, tmp_path: Path) -> None:
    data = imds.instance_data("openstack", cloud.urls["metadata"])
    known = data["ds"]["ec2_metadata"]["reservation-id"]
    cloud.tell(instances=ALONE, faults={"metadata": "closed"})
    one = provider(cloud, tmp_path)
    assert "closed the connection" in look(one)[1].error
    one = provider(cloud, tmp_path)
    one._context = replace(one._context, reservation=known)
    assert look(one)[0] == ["10.77.0.12", "10.77.0.13"]


def test_a_credential_that_may_only_list_servers(cloud: Double, tmp_path: Path) -> None:
    cloud.tell(rules=["/v2.1/servers/detail"])
    assert look(provider(cloud, tmp_path))[0] == ["10.77.0.12", "10.77.0.13"]
    cloud.tell(rules=["/v2.1/flavors"])
    _, report = look(provider(cloud, tmp_path))
    assert report.error == "Nova does not accept the token (401)"
    assert "/compute/v2.1/servers/detail of the service compute" in report.remedy


def test_the_network_and_family_of_this_host_count(cloud: Double, tmp_path: Path) -> None:
    wanted = {"metadata": {"cluster": "demo"}}
    hosts, _ = look(provider(cloud, tmp_path, **wanted), Endpoint("10.77.1.1", 7443))
    assert hosts == ["10.77.1.2", "10.77.0.15"]
    hosts, _ = look(provider(cloud, tmp_path, **wanted), Endpoint("::1", 7443))
    assert hosts == ["fd00::12"]


def test_many_pages(cloud: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"a": "b"}
    cloud.tell(
        instances=[Instance(f"10.77.2.{n}" if n else "127.0.0.1", tags=tags) for n in range(23)],
        page=5,
    )
    before = cloud.tell()["api"]
    hosts, report = look(provider(cloud, tmp_path, metadata=tags))
    assert len(hosts) == report.found == 22
    assert cloud.tell()["api"] - before == 5
    monkeypatch.setattr(openstack, "MAX_PAGES", 2)
    assert len(look(provider(cloud, tmp_path, metadata=tags))[0]) == 9


def test_a_token_is_used_until_it_ends_or_is_refused(cloud: Double, tmp_path: Path) -> None:
    one = provider(cloud, tmp_path, metadata={"cluster": "demo"})
    before = cloud.tell().get("token", 0)
    look(one)
    one._due = 0.0
    look(one)
    assert cloud.tell()["token"] == before + 1
    session = one._session
    assert session is not None
    one._session = openstack.Session("revoked", session.until, session.compute)
    one._due = 0.0
    assert "10.77.0.15" in look(one)[0]
    assert cloud.tell()["token"] == before + 2
    cloud.tell(token_seconds=30.0)  # shorter than the margin: a new one each time
    one._session, one._due = None, 0.0
    look(one)
    one._due = 0.0
    assert "10.77.0.15" in look(one)[0]
    assert cloud.tell()["token"] > before + 4


def test_a_wrong_secret(cloud: Double, tmp_path: Path) -> None:
    clouds_yaml(tmp_path, cloud.urls["api"], "wrong-secret")
    hosts, report = look(provider(cloud, tmp_path))
    assert hosts == []
    assert report.error == "Keystone does not accept the application credential (401)"
    assert "openstack application credential create" in report.remedy
    assert "wrong-secret" not in repr(report)


def test_without_a_credential(cloud: Double, tmp_path: Path) -> None:
    (tmp_path / "etc/openstack/clouds.yaml").parent.mkdir(parents=True)
    settings = partial(userdata.settings, tmp_path)
    one = Openstack({}, Context("a", "demo", "b", root=tmp_path, settings=settings))
    report = look(one)[1]
    assert report.error == "there is no application credential in /etc/openstack/clouds.yaml"
    assert "mode 0600" in report.remedy


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("clouds: {}", "must hold one cloud, or one named openstack"),
        ("clouds: {a: {auth: {}}, b: {auth: {}}}", "must hold one cloud, or one named openstack"),
        ("clouds: {a: {auth: {auth_url: 'http://x/v3'}}}", "lacks auth.application_credential_id"),
        ("clouds: [", "not valid YAML"),
        ("just words", "not a mapping"),
    ],
)
def test_a_file_that_is_no_credential(cloud: Double, tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "etc/openstack/clouds.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    report = look(provider(cloud, tmp_path))[1]
    assert told in report.error
    assert "/etc/openstack/clouds.yaml" in report.error


def test_the_cloud_named_openstack_is_taken(cloud: Double, tmp_path: Path) -> None:
    clouds_yaml(tmp_path, cloud.urls["api"], region_name="eu-west-1")
    path = tmp_path / "etc/openstack/clouds.yaml"
    path.write_text(path.read_text().replace("any-name", "openstack") + "  other: {auth: {}}\n")
    assert look(provider(cloud, tmp_path))[1].error == ""


def test_no_nova_in_the_catalogue(cloud: Double, tmp_path: Path) -> None:
    cloud.tell(services=["volumev3"])
    report = look(provider(cloud, tmp_path))[1]
    assert report.error == (
        "Keystone's catalogue has no public endpoint of compute in the region eu-west-1"
    )
    assert "region_name" in report.remedy


def test_the_region_must_be_clear(cloud: Double, tmp_path: Path) -> None:
    clouds_yaml(tmp_path, cloud.urls["api"])
    report = look(provider(cloud, tmp_path))[1]
    assert report.error == "Nova is in several regions: elsewhere, eu-west-1"
    cloud.tell(elsewhere=[])
    assert look(provider(cloud, tmp_path))[0] == ["10.77.0.13"]


def test_may_not_list(cloud: Double, tmp_path: Path) -> None:
    cloud.tell(faults={"api": "forbidden"})
    report = look(provider(cloud, tmp_path, metadata={"cluster": "demo"}))[1]
    assert report.error == "the credential may not list servers/detail (403)"
    assert "reader" in report.remedy


def test_throttled_it_asks_less_often(cloud: Double, tmp_path: Path) -> None:
    cloud.tell(faults={"api": "throttled"})
    one = provider(cloud, tmp_path)
    assert look(one)[1].error == "Nova asks for fewer questions (429)"
    assert one._pause == 60.0


@pytest.mark.parametrize("part", ["api", "identity"])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("garbage", " answers "),
        ("oversized", "its answer is larger than 4 MB"),
        ("closed", "it closed the connection without an answer"),
        ("broken", " answers 500"),
        ("slow", "no whole answer within 1 s"),
        ("silent", "no whole answer within 1 s"),
    ],
)
def test_a_service_that_is_not_sound(
    cloud: Double,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    fault: str,
    told: str,
) -> None:
    cloud.tell(faults={part: fault})
    if fault in ("slow", "silent"):
        monkeypatch.setattr(openstack, "ask", lambda *a, **k: web.ask(*a, **k, seconds=1))
    hosts, report = look(provider(cloud, tmp_path, metadata={"cluster": "demo"}))
    assert hosts == []
    assert report.error.startswith("Nova" if part == "api" else "Keystone")
    assert told in report.error


def test_services_out_of_reach_tell_what_to_open(cloud: Double, tmp_path: Path) -> None:
    clouds_yaml(tmp_path, "http://127.0.0.1:1/v3")
    report = look(provider(cloud, tmp_path))[1]
    assert "Keystone at 127.0.0.1:1: connection refused" in report.error
    assert "Let this server reach 127.0.0.1:1" in report.remedy


def test_a_url_without_keystone(cloud: Double, tmp_path: Path) -> None:
    clouds_yaml(tmp_path, cloud.urls["api"].removesuffix("/v3"))
    report = look(provider(cloud, tmp_path))[1]
    assert report.error.startswith("no Keystone v3 at http://127.0.0.1:")


def test_over_https_by_an_authority_of_its_own(tmp_path: Path) -> None:
    with Double("openstack", instances=SERVERS, tls=str(tmp_path)) as cloud:
        clouds_yaml(tmp_path, cloud.urls["api"], region_name="eu-west-1")
        report = look(provider(cloud, tmp_path))[1]
        assert "its certificate is not accepted" in report.error
        clouds_yaml(tmp_path, cloud.urls["api"], region_name="eu-west-1", cacert="/ca.pem")
        assert look(provider(cloud, tmp_path))[0] == ["10.77.0.13"]


def test_the_doubles_are_strict(cloud: Double) -> None:
    """Or the tests above show nothing."""
    nova = cloud.urls["api"].replace("/identity/v3", "/compute/v2.1")
    assert web.ask("GET", f"{nova}/servers/detail", {}).status == 401
    assert web.ask("GET", f"{nova}/servers/detail", {"X-Auth-Token": "made-up"}).status == 401
    identity = {"methods": ["password"], "password": {"user": {"name": "a", "password": "b"}}}
    body = json.dumps({"auth": {"identity": identity}}).encode()
    kind = {"Content-Type": "application/json"}
    assert web.ask("POST", f"{cloud.urls['api']}/auth/tokens", kind, body).status == 401
    assert web.ask("POST", f"{cloud.urls['api']}/auth/tokens", {}, body).status == 415


def test_another_microversion_is_refused_by_the_double(
    cloud: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openstack, "MICROVERSION", "compute 2.999")
    report = look(provider(cloud, tmp_path, metadata={"cluster": "demo"}))[1]
    assert report.error == "Nova answers 406"


def test_what_is_secret_is_not_shown(cloud: Double, tmp_path: Path) -> None:
    one = provider(cloud, tmp_path, metadata={"cluster": "demo"})
    look(one)
    assert SECRET not in repr(one._credential)
    session = one._session
    assert session is not None
    assert session.token not in repr(session)


def test_facts_for_images_without_cloud_init(cloud: Double) -> None:
    data = imds.instance_data("openstack", cloud.urls["metadata"])
    assert data["v1"]["availability_zone"] == "nova"
    assert data["ds"]["meta_data"]["launch_index"] == 0
    assert data["ds"]["meta_data"]["meta"] == {"cluster": "demo"}
