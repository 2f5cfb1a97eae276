"""A double of OpenStack: the metadata service, Keystone's tokens, Nova's lists of servers.

Keystone takes an application credential and nothing else, and says 401 to a wrong secret. Tokens
end after `token_seconds`. Nova says 401 without a token that is good, or to a path beyond the
credential's access `rules`, 403 if the `api` fault is ``forbidden``, and 406 to a microversion it
has not. It ignores filters that only administrators may use, as Nova does, and pages its lists.
"""

from __future__ import annotations

import datetime
import json
import secrets
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.clouds.instances import Cloud, digits
from tests.clouds.serving import Handler, Server, tls

PROJECT = digits("project", length=32)
NETWORK = "private"
MICROVERSIONS = (1, 90)  # 2.1 to 2.90
VERSIONS = ("2012-08-10", "2015-10-15", "2018-08-27", "latest")
SECOND = "%Y-%m-%dT%H:%M:%S.%fZ"


class Openstack:
    """The double; it serves once it is made. Keystone and Nova share the API's address."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.tokens: dict[str, float] = {}
        self.metadata = Server(cloud.metadata, _handler(Metadata, self), None)
        names = (cloud.api.rpartition(":")[0], *cloud.names)
        self.api = Server(cloud.api, _handler(Api, self), tls(cloud.tls, names))

    def urls(self) -> dict[str, str]:
        """Where to reach it."""
        return {"metadata": self.metadata.url, "api": f"{self.api.url}/identity/v3"}

    def calls(self) -> dict[str, int]:
        """What was asked, and how often."""
        return dict(self.metadata.calls + self.api.calls)

    def build(self) -> None:
        """Nothing is kept: everything follows from the cloud."""

    grant = build

    def uuid(self, number: int) -> str:
        """A server's id."""
        d = digits("server", self.cloud.instances[number].address, length=32)
        return "-".join((d[:8], d[8:12], d[12:16], d[16:20], d[20:]))

    def reservation(self, number: int) -> str:
        """Of the call that made it."""
        return "r-" + digits("launch", self.cloud.instances[number].launch, length=8)

    def server(self, number: int) -> dict[str, Any]:
        """A server as Nova details it."""
        instance = self.cloud.instances[number]
        addresses = {NETWORK: [_address(instance.address), _address(instance.ipv6)]}
        addresses[NETWORK] = [row for row in addresses[NETWORK] if row["addr"]]
        floating = {**_address("203.0.113.9"), "OS-EXT-IPS:type": "floating"}
        addresses[NETWORK].append(floating)
        if instance.second:
            addresses["storage"] = [_address(instance.second)]
        status = {"running": "ACTIVE", "pending": "BUILD", "stopped": "SHUTOFF"}
        return {
            "id": self.uuid(number),
            "name": f"demo-{number + 1}",
            "status": status[instance.state],
            "metadata": instance.tags,
            "addresses": addresses,
            "tenant_id": PROJECT,
            "OS-EXT-AZ:availability_zone": "nova",
        }

    def groups(self) -> list[dict[str, Any]]:
        """The server groups."""
        names = dict.fromkeys(i.group for i in self.cloud.instances if i.group)
        every = range(len(self.cloud.instances))
        return [
            {
                "id": digits("group", name, length=32),
                "name": name,
                "policies": ["anti-affinity"],
                "members": [self.uuid(n) for n in every if self.cloud.instances[n].group == name],
                "metadata": {},
            }
            for name in names
        ]


def _address(text: str) -> dict[str, Any]:
    return {
        "addr": text,
        "version": 6 if ":" in text else 4,
        "OS-EXT-IPS:type": "fixed",
        "OS-EXT-IPS-MAC:mac_addr": "fa:16:3e:00:00:01",
    }


def _handler(kind: type[Handler], double: Openstack) -> type[Handler]:
    return type(kind.__name__, (kind,), {"double": double})


class Metadata(Handler):
    """http://169.254.169.254 of a server: OpenStack's and the EC2-like one, without tokens."""

    double: Openstack

    def do_PUT(self) -> None:
        """There are no session tokens here."""
        self.answer(405)

    def do_GET(self) -> None:
        """A file of the metadata."""
        self.server.calls["metadata"] += 1
        double = self.double
        if self.fails(double.cloud.faults.get("metadata", "")):
            return
        number = double.cloud.who(str(self.client_address[0]))
        if number is None:
            self.answer(404)
            return
        amazon = {
            "ami-launch-index": str(double.cloud.launch_index(number)),
            "instance-id": "i-" + digits("ec2", double.uuid(number), length=8),
            "local-ipv4": double.cloud.instances[number].address,
            "placement/availability-zone": "nova",
            "reservation-id": double.reservation(number),
        }
        version, _, name = self.path.removeprefix("/openstack/").partition("/")
        if self.path in ("/openstack", "/openstack/"):
            self.answer(200, "\n".join(VERSIONS))
        elif version in VERSIONS and name == "meta_data.json":
            self.json(200, self._file(number))
        elif version in VERSIONS and name == "user_data" and double.cloud.user_data:
            self.answer(200, double.cloud.user_data)
        elif self.path.rstrip("/").endswith("/meta-data"):
            self.answer(200, "\n".join(dict.fromkeys(n.partition("/")[0] for n in amazon)))
        elif self.path.endswith("/placement"):
            self.answer(200, "availability-zone")
        elif self.path.partition("/meta-data/")[2] in amazon:
            self.answer(200, amazon[self.path.partition("/meta-data/")[2]])
        else:
            self.answer(404)

    def _file(self, number: int) -> dict[str, Any]:
        cloud = self.double.cloud
        tags = cloud.instances[number].tags
        return {
            "uuid": self.double.uuid(number),
            **({"meta": tags} if tags else {}),
            "hostname": f"demo-{number + 1}.novalocal",
            "name": f"demo-{number + 1}",
            "launch_index": cloud.launch_index(number),
            "availability_zone": "nova",
            "random_seed": "c2VjcmV0",
            "project_id": PROJECT,
            "devices": [],
            "dedicated_cpus": [],
        }


class Api(Handler):
    """Keystone below /identity/v3, Nova below /compute/v2.1."""

    double: Openstack

    def do_POST(self) -> None:
        """Ask for a token."""
        cloud, body = self.double.cloud, self.body()
        self.server.calls["token"] += 1
        if self.fails(cloud.faults.get("identity", "")):
            return
        if self.path != "/identity/v3/auth/tokens":
            self._keystone(404, "Could not find what was asked for.")
        elif not self.headers.get("Content-Type", "").startswith("application/json"):
            self._keystone(415, "Unsupported media type.")
        elif self._credential(body) != cloud.credential:
            self._keystone(401, "The request you have made requires authentication.")
        else:
            self._token()

    @staticmethod
    def _credential(body: bytes) -> tuple[str, str] | None:
        try:
            identity = json.loads(body)["auth"]["identity"]
            credential = identity["application_credential"]
            if identity["methods"] != ["application_credential"]:
                return None
            return credential["id"], credential["secret"]
        except (ValueError, KeyError, TypeError):
            return None

    def _token(self) -> None:
        cloud = self.double.cloud
        token = secrets.token_urlsafe(90)
        self.double.tokens[token] = time.monotonic() + cloud.token_seconds
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=cloud.token_seconds)
        host = self.headers.get("Host", "")
        base = f"{self.server.scheme}://{host}"
        catalogue = [
            {
                "type": kind,
                "name": kind,
                "id": digits("service", kind, length=32),
                "endpoints": [
                    {
                        "id": digits(kind, interface, region, length=32),
                        "interface": interface,
                        "region": region,
                        "region_id": region,
                        "url": f"{base}/{kind}/v2.1" if region == cloud.region else "http://0/",
                    }
                    for region in (*cloud.elsewhere, cloud.region)
                    for interface in ("admin", "internal", "public")
                ],
            }
            for kind in cloud.services
        ]
        data = {
            "methods": ["application_credential"],
            "expires_at": end.strftime(SECOND),
            "project": {"id": PROJECT, "name": "demo"},
            "application_credential": {"id": cloud.credential[0], "restricted": True},
            "catalog": catalogue,
        }
        self.json(201, {"token": data}, **{"X-Subject-Token": token})

    def _keystone(self, status: int, message: str) -> None:
        title = {401: "Unauthorized", 404: "Not Found"}.get(status, "Error")
        self.json(status, {"error": {"code": status, "message": message, "title": title}})

    def do_GET(self) -> None:
        """Nova's lists."""
        cloud, parts = self.double.cloud, urlsplit(self.path)
        self.server.calls["api"] += 1
        place = parts.path.removeprefix("/compute")
        if cloud.faults.get("api") == "throttled":
            self.json(429, {"overLimit": {"code": 429, "message": "Rate limited"}}, Retry_After="7")
        elif self.fails(cloud.faults.get("api", "").replace("forbidden", "")):
            return
        elif not self._admitted(place):
            self._keystone(401, "The request you have made requires authentication.")
        elif not self._microversion():
            message = "Version 2.999 is not supported by the API. Minimum is 2.1, maximum is 2.90."
            self.json(406, {"computeFault": {"code": 406, "message": message}})
        elif cloud.faults.get("api") == "forbidden":
            message = "Policy doesn't allow os_compute_api:servers:detail to be performed."
            self.json(403, {"forbidden": {"code": 403, "message": message}})
        elif place == "/v2.1/servers/detail":
            self._servers({key: values[-1] for key, values in parse_qs(parts.query).items()})
        elif place == "/v2.1/os-server-groups":
            self.json(200, {"server_groups": self.double.groups()})
        else:
            self.json(404, {"itemNotFound": {"code": 404, "message": "Not found"}})

    def _admitted(self, place: str) -> bool:
        """Whether the token is good, and the credential's access rules name the path."""
        good = self.double.tokens.get(self.headers.get("X-Auth-Token", ""), 0.0) > time.monotonic()
        rules = self.double.cloud.rules
        return good and (rules is None or place in rules)

    def _microversion(self) -> bool:
        asked = self.headers.get("OpenStack-API-Version", "compute 2.1").split()
        major, _, minor = asked[-1].partition(".")
        if len(asked) != 2 or asked[0] != "compute" or major != "2" or not minor.isdecimal():
            return False
        return MICROVERSIONS[0] <= int(minor) <= MICROVERSIONS[1]

    def _servers(self, asked: dict[str, str]) -> None:
        """A page of the servers; filters on metadata are an administrator's and do nothing."""
        double, cloud = self.double, self.double.cloud
        every = [
            (n, double.server(n))
            for n in range(len(cloud.instances))
            if asked.get("reservation_id") in (None, double.reservation(n))
        ]
        ids = [server["id"] for _, server in every]
        if "marker" in asked and asked["marker"] not in ids:
            message = f"marker [{asked['marker']}] not found"
            self.json(400, {"badRequest": {"code": 400, "message": message}})
            return
        first = ids.index(asked["marker"]) + 1 if "marker" in asked else 0
        size = min(int(asked.get("limit", cloud.page)), cloud.page)
        rows = [server for _, server in every[first : first + size]]
        data: dict[str, Any] = {"servers": rows}
        if rows and first + size < len(every):
            base = f"{self.server.scheme}://{self.headers['Host']}{urlsplit(self.path).path}"
            link = f"{base}?limit={size}&marker={rows[-1]['id']}"
            data["servers_links"] = [{"rel": "next", "href": link}]
        self.json(200, data)
